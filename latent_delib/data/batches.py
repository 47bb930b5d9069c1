"""Training batches and validation documents, from text through seqio or from prepared token files."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from latent_delib.data.rows import Document, check_data, pieces
from latent_delib.data.sources import check_files
from latent_delib.data.tokenizer import fingerprint as fingerprint_of_tokenizer
from latent_delib.errors import UserError

__all__ = ["check", "check_fingerprint", "fingerprint", "pieces", "train_batches", "validation_documents"]


def _route(data):
    """Returns the module that reads `data`. Only the second one imports TensorFlow."""
    if data.token_files:
        from latent_delib.data import token_files as route
    else:
        from latent_delib.data import tasks as route
    return route


def check(data: Any, field: str) -> None:
    """Raises UserError for what is wrong with `data`, as far as that is seen in a moment and without TensorFlow.

    `field` is the text that is about to be read: "sources" or "validation". Its local files must be there, unless they
    are prepared as token files.
    """
    check_data(data)
    if not data[field]:
        raise UserError(f"config.data.{field}: empty, expected at least one source")
    if not data.token_files:
        check_files(data[field])


def train_batches(
    data: Any,
    *,
    batch_size: int,
    seed: int,
    tokenizer_path: str,
    rows: np.ndarray | None = None,
    start_step: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches without end, batch `start_step` first.

    A batch is a function of (seed, step) that knows nothing of hosts or mesh.

    `rows`, int [b] sorted, are the rows of each batch that this process needs; None: all `batch_size` of them.
    Each batch is {"tokens": int32 [b, T], "segment": int32 [b, T]} with T = data.seq_len; segment numbers the
    BOS-led pieces of a row from 1 and is 0 on padding.

    With `data.token_files` only these rows are read, and any step is reached at once. Otherwise every process
    reads and tokenizes all of the text and drops the rows of others, and runs through `start_step` batches before
    it yields one: many hosts, or long runs, want token files.

    Bad records are skipped and counted up to `data.max_bad_records`. Bad text is not UTF-8, holds NUL characters or
    becomes BOS or padding in the tokenizer: nothing of it is left, and every process counts all of it. A bad row of
    token files is damaged or holds an id outside the vocabulary: it becomes padding, and a process counts its own.

    Raises UserError: before the first batch for sources that are missing, empty or do not fit `data`; later for one
    bad record too many and for files that are gone. Raises OSError: the disk fails, the store denies access or
    (Outage) does not answer.
    """
    check(data, "sources")
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
    check(data, "validation")
    return _route(data).validation_documents(data, tokenizer_path=tokenizer_path)


def fingerprint(data: Any, *, tokenizer_path: str) -> dict[str, str]:
    """Returns what training reads: name -> SHA-256 of a part of it, the same wherever the files lie.

    Of token files it covers meta.json, which holds a digest of the tokens of each source (in format 1 their numbers
    alone), and the version of the order in which rows are read. So it costs one small read for any amount of data. A
    file that is missing or damaged is found when it is read.

    Of text it covers the names and sizes of the files and their first and last 64 KiB: two small reads per file. A
    change in the middle of a file that keeps its size goes unseen.

    Raises UserError for token files without meta.json, and for text that is missing or cannot be read.
    """
    check(data, "sources")
    return {
        "tokenizer": fingerprint_of_tokenizer(tokenizer_path),
        **_route(data).data_fingerprint(data, tokenizer_path=tokenizer_path),
    }


def check_fingerprint(stored: dict[str, str], found: dict[str, str]) -> None:
    """Raises UserError, naming every part that differs, unless both are of the same data in the same order."""
    from_token_files = "token_files/meta.json" in stored.keys() & found.keys()
    if from_token_files and stored.get("order") != found["order"]:
        raise UserError(
            "config.data.token_files: the checkpoint was trained by an older version, which read the rows in another "
            "order: it can still be evaluated and generated from; to train it on, use the version that started it, "
            "or begin with its weights (method.start) in a new --workdir"
        )
    parts = [f"{name} changed" for name in sorted(stored.keys() & found.keys()) if stored[name] != found[name]]
    parts += [f"{name} gone" for name in sorted(stored.keys() - found.keys())]
    parts += [f"{name} new" for name in sorted(found.keys() - stored.keys())]
    if parts:
        raise UserError(
            f"config.data: not the data that the checkpoint was trained on: {', '.join(parts)}; "
            "restore the files as they were, or start in a new --workdir"
        )
