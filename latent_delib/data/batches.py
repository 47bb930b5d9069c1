"""Training batches and validation documents, from text or from token files."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from latent_delib.data.rows import Document, packed, segments
from latent_delib.data.sources import check_files, has_questions
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.data.tokenizer import fingerprint as fingerprint_of_tokenizer
from latent_delib.errors import UserError

SPREAD = 16  # held-out text: of this many rows that are read, one is used
MOST_READ = 16_384  # rows of held-out text that are read, unless more are asked for


def check(data: Any, field: str) -> None:
    """Checks that the text of a job exists. A job calls this once, at its start.

    Args:
      data: config.data.
      field: "sources" or "validation".

    Raises:
      UserError: there are no sources; or local files are missing, and no token files are named.
    """
    if not data[field]:
        raise UserError(f"config.data.{field}: empty, expected at least one source")
    if not data.token_files:
        check_files(data[field])


class Training:
    """Reads the text that a job trains on. Token files are opened once, by the constructor.

    Args:
      data: config.data.
      tokenizer: the job's tokenizer.

    Raises:
      UserError: token files have no meta.json, or do not fit `data`.
    """

    def __init__(self, data: Any, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        if data.token_files:
            from latent_delib.data import token_files as route
        else:
            from latent_delib.data import tasks as route  # imports TensorFlow
        self.text = route.Training(data, tokenizer)

    def fingerprint(self) -> dict[str, str]:
        """Returns a fingerprint of the training data: the name of a part -> its digest or version.

        The folders of the files do not matter.

        For token files it covers meta.json, which holds a digest of the tokens of each source, and
        the version of the order in which rows are read. A missing or damaged file is noticed later,
        when it is read.

        For text files it covers their names, their sizes, and their first and last 64 KiB: two
        small reads per file. A change in the middle of a file that keeps its size is not noticed.
        It also covers the version of the order in which text is read.

        Raises:
          UserError: text is missing or cannot be read.
        """
        tokenizer = fingerprint_of_tokenizer(self.tokenizer.path)
        return {"tokenizer": tokenizer} | self.text.fingerprint()

    def amounts(self, rows: int) -> list[str]:
        """Returns a line for each source: its share of a job's rows, and how many epochs these are.

        Only token files tell how many rows a source has; without them there are no epochs.

        Args:
          rows: how many rows the job trains on in all.
        """
        data = self.text.data
        lines = []
        for source, weight, stored in zip(data.sources, data.weights, self.text.num_rows):
            share = weight / sum(data.weights)
            epochs = f", {share * rows / stored:.2g} epochs of {stored:,} rows" if stored else ""
            lines.append(f"text {source}: {100 * share:.3g} % of all rows{epochs}")
        return lines

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray | None = None, start_step: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches without end, batch `start_step` first.

        A batch is a function of (seed, step), not of the hosts. With `data.token_files` only the
        wanted rows are read, and any step is reached at once. Otherwise every process reads and
        tokenizes all of the text, drops the rows of other processes, and runs through `start_step`
        batches before it yields one. Use token files for many hosts and for long runs.

        Bad records are skipped and counted up to `data.max_bad_records`. A document is bad if it is
        not UTF-8, holds NUL characters, becomes BOS or padding in the tokenizer, or, in a source of
        questions, has another form. It is skipped whole, and every process counts all bad
        documents. A row of token files is bad if it is damaged or holds an id outside the
        vocabulary. It becomes padding, and each process counts its own bad rows.

        Args:
          batch_size: rows per batch, over all processes.
          seed: decides the order of rows.
          rows: int [b] sorted, the rows of each batch that this process needs; None: all rows.
          start_step: number of the first batch.

        Yields:
          {"tokens": int32 [b, T], "segment": int32 [b, T]} with T = data.seq_len. segment numbers
            the BOS-led pieces of a row from 1 and is 0 on padding.

        Raises:
          UserError: before the first batch, sources are missing, empty or do not fit `data`; later,
            there is one bad record too many, or files are gone.
          OSError: the disk fails, the store denies access or (Outage) does not answer.
        """
        rows = np.arange(batch_size) if rows is None else rows
        return self.text.batches(batch_size=batch_size, seed=seed, rows=rows, start_step=start_step)


def validation_documents(
    data: Any, *, tokenizer: Tokenizer, sources: Iterable[str] | None = None
) -> Iterator[Document]:
    """Returns every document of held-out text once, in a fixed order.

    Bad records are left out and counted as in `Training.batches`. Each call counts its own.

    Args:
      data: config.data.
      tokenizer: the job's tokenizer.
      sources: sources among `data.validation`; None: all of them.

    Raises:
      UserError: before the first document, sources are missing or empty.
    """
    if data.token_files:
        from latent_delib.data import token_files as route
    else:
        from latent_delib.data import text as route
    wanted = data.validation if sources is None else sources
    return route.validation_documents(data, wanted, tokenizer)


def validation_rows(data: Any, *, tokenizer: Tokenizer, count: int) -> dict[str, np.ndarray]:
    """Returns rows of held-out text, always the same rows, packed as training rows are.

    Each source of `data.validation` gives an equal share of the rows. SPREAD times as many rows are
    read from its beginning, and every SPREAD-th row is used. Fewer are read if all sources together
    would exceed MOST_READ. Each source may have `data.max_bad_records` bad records.

    Args:
      data: config.data.
      tokenizer: the job's tokenizer.
      count: how many rows; where sources are short, the last rows are padding.

    Returns:
      As `Training.batches` yields them, {"tokens": int32 [count, T], "segment": int32 [count, T]}.

    Raises:
      UserError: sources are missing, empty or do not fit `data`.
    """
    spread = max(1, min(SPREAD, MOST_READ // count))
    share, more = divmod(count, len(data.validation))
    shares = [share] * len(data.validation)
    for number in range(more):
        shares[number] += 1
    taken: list[np.ndarray] = []
    for source, share in zip(data.validation, shares):
        documents = validation_documents(data, tokenizer=tokenizer, sources=[source])
        parts = packed(
            (document.tokens for document in documents),
            length=data.seq_len,
            bos_id=tokenizer.bos_id,
            pad_id=tokenizer.pad_id,
            whole=has_questions(source),
        )
        found = list(itertools.islice(itertools.chain.from_iterable(parts), spread * share))
        stride = max(1, len(found) // max(1, share))
        taken += found[::stride][:share]
    if not taken:
        raise UserError("config.data.validation: holds no text")
    tokens = np.full([count, data.seq_len], tokenizer.pad_id, np.int32)
    tokens[: len(taken)] = taken[:count]
    return {"tokens": tokens, "segment": segments(tokens, tokenizer.bos_id, tokenizer.pad_id)}


def check_fingerprint(stored: dict[str, str], found: dict[str, str]) -> None:
    """Raises UserError, with the parts that differ, unless both fingerprints are of equal data."""
    was_prepared = "token_files/meta.json" in stored
    is_prepared = "token_files/meta.json" in found
    if was_prepared and not is_prepared:
        raise UserError(
            "config.data.token_files is empty: the checkpoint was trained on token files; name "
            "them, or give --text and --held_out as before"
        )
    if is_prepared and not was_prepared:
        raise UserError(
            "config.data.token_files is set: the checkpoint was trained on text that was not "
            "prepared; leave it empty, or start in a new --workdir"
        )
    changed = [name for name in stored.keys() & found.keys() if stored[name] != found[name]]
    gone = stored.keys() - found.keys()
    new = found.keys() - stored.keys()
    parts = []
    for names, what in ((changed, "changed"), (gone, "gone"), (new, "new")):
        parts += [f"{name} {what}" for name in sorted(names)]
    remedy = "restore the files as they were, or start in a new --workdir"
    if any(part.startswith("order") for part in parts):
        remedy = "this version reads the same text in another order: start in a new --workdir"
    if parts:
        raise UserError(
            f"config.data: not the data that the checkpoint was trained on: {', '.join(parts)}; "
            f"{remedy}"
        )
