"""Training batches and validation documents, from text through seqio or from prepared token files."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from latent_delib.data.rows import Document, check_data, pieces
from latent_delib.errors import UserError
from latent_delib.tokenizer import fingerprint as fingerprint_of_tokenizer

__all__ = ["check_fingerprint", "fingerprint", "pieces", "train_batches", "validation_documents"]


def _route(data):
    """The module that reads `data`. Only the second one imports TensorFlow."""
    if data.token_files:
        from latent_delib.data import token_files as route
    else:
        from latent_delib.data import tasks as route
    return route


def train_batches(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    tokenizer_path: str,
    rows: np.ndarray | None = None,
    start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, batch `start_step` first: a function of (seed, step) that knows nothing of hosts or mesh.

    `rows`, int [b] sorted, are the rows of each batch that this process needs; None: all `batch_size` of them.
    Each batch is {"tokens": int32 [b, T], "segment": int32 [b, T]} with T = data.seq_len; segment numbers the
    BOS-led pieces of a row from 1 and is 0 on padding.

    With `data.token_files` only these rows are read, and any step is reached at once. Otherwise every process
    reads and tokenizes all of the text and drops the rows of others, and runs through `start_step` batches before
    it yields one: many hosts, or long runs, want token files.

    Bad records (text that is not UTF-8 or that the tokenizer makes BOS or padding of; a row of token files that
    cannot be read or holds an id outside the vocabulary) are skipped and counted up to `data.max_bad_records`: of
    text nothing is left, a row becomes padding. From text every process counts all; from token files its own rows.

    Raises UserError: before the first batch for sources that are missing, empty or do not fit `data`; later for one
    bad record too many and for files that vanish.
    """
    check_data(data)
    return _route(data).train_batches(
        data,
        batch_size=batch_size,
        seed=seed,
        tokenizer_path=tokenizer_path,
        rows=np.arange(batch_size) if rows is None else rows,
        start_step=start_step,
    )


def validation_documents(data: Any, *, tokenizer_path: str) -> Iterator[Document]:
    """Every document of `data.validation` once, in a fixed order.

    Bad records are left out and counted as in `train_batches`.

    Raises UserError, before the first document, for sources that are missing or empty.
    """
    check_data(data)
    if not data.validation:
        raise UserError("config.data.validation: empty, expected at least one source")
    return _route(data).validation_documents(data, tokenizer_path=tokenizer_path)


def fingerprint(data: Any, *, tokenizer_path: str) -> dict[str, str]:
    """What training reads: name -> SHA-256 of a part of it, the same wherever the files lie.

    Of token files it covers meta.json, which holds a digest of all tokens, and the names and ends of the files; of
    text the names and sizes of the files and their first and last 64 KiB. So it takes seconds for any amount of
    data, and a change in the middle of a file that keeps its size goes unseen (in token files a checksum finds it
    when it is read).

    Raises UserError for files that are missing or cannot be read.
    """
    check_data(data)
    return {
        "tokenizer": fingerprint_of_tokenizer(tokenizer_path),
        **_route(data).data_fingerprint(data, tokenizer_path=tokenizer_path),
    }


def check_fingerprint(stored: dict[str, str], found: dict[str, str]) -> None:
    """Raises UserError, naming every part that differs, unless both are of the same data."""
    words = {"changed": stored.keys() & found.keys(), "gone": stored.keys() - found.keys()}
    words["new"] = found.keys() - stored.keys()
    parts = [
        f"{name} {word}"
        for word, names in words.items()
        for name in sorted(names)
        if word != "changed" or stored[name] != found[name]
    ]
    if parts:
        raise UserError(
            f"config.data: not the data that the checkpoint was trained on: {', '.join(parts)}; "
            "restore the files as they were, or start in a new --workdir"
        )
