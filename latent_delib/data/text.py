"""Documents of text sources, in a fixed order: one reader for `prepare`, evaluation and seqio.

A source has parts, files as a rule, and each part has texts. What is particular to a kind of source
is in text_files.py, tfds_datasets.py and hub_datasets.py.
"""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from latent_delib.data import questions
from latent_delib.data.rows import BadRecords, Document, ahead, encode, grouped
from latent_delib.data.sources import Files, Tfds, has_questions, parse
from latent_delib.data.text_files import TextFiles
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError

BLOCK = 16  # texts of a part in a turn, as seqio has it
_THREADS = min(8, os.cpu_count() or 1)
_GROUP = 16  # texts that a thread takes at once


class Reader(Protocol):
    """Reads a source. The same source has the same parts and texts each time, in the same order.

    Attributes:
      source: as the config names it.
      parts: their names.
      cycle: how many of them are read in turns, a block of texts from each.
      unit: what a part is divided into, as error messages call it.
    """

    source: str
    parts: list[str]
    cycle: int
    unit: str

    def contents(self, part: str) -> Iterator[bytes]:
        """Yields the texts of a part: UTF-8, or bad."""

    def work(self, part: str) -> str:
        """Returns the work that the texts of a part are of, as in `rows.Document`."""

    def num_bytes(self) -> int:
        """Returns how many bytes there are to read; 0 where that is not known."""

    def fingerprint(self) -> str:
        """Returns a digest; different texts have different ones."""


def open_source(source: str) -> Reader:
    """Finds the text that a source string means.

    Raises:
      UserError: it is not there, or the package that reads it is not.
    """
    meant = parse(source)
    if isinstance(meant, Files):
        return TextFiles(source, meant)
    if isinstance(meant, Tfds):
        from latent_delib.data.tfds_datasets import TfdsDataset

        return TfdsDataset(source, meant)
    from latent_delib.data.hub_datasets import HubDataset

    return HubDataset(source, meant)


class Text(NamedTuple):
    """Holds a text as it was read: UTF-8 or bad, its part, and its number there, from 1."""

    content: bytes
    part: str
    number: int


def texts_of_part(reader: Reader, part: str) -> Iterator[Text]:
    """Yields the texts of one part of a source."""
    for number, content in enumerate(reader.contents(part), 1):
        yield Text(content, part, number)


def _in_turns(parts: Iterator[Iterator[Text]], cycle: int) -> Iterator[Text]:
    """Yields the texts of parts, a block of each of the open ones in turn, as tf.data does.

    The next part is opened in the place of one that has ended.
    """
    opened = collections.deque(itertools.islice(parts, cycle))
    while opened:
        part = opened.popleft()
        block = list(itertools.islice(part, BLOCK))
        yield from block
        has_ended = len(block) < BLOCK
        opened.extend(itertools.islice(parts, 1) if has_ended else [part])


def texts(reader: Reader) -> Iterator[Text]:
    """Yields every text of a source once, in the order of its seqio task without shuffling."""
    parts = (texts_of_part(reader, part) for part in reader.parts)
    yield from _in_turns(parts, reader.cycle)


def tokens_of(reader: Reader, text: Text, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Returns a text's tokens, int32 [n] without BOS, and its fault; "" if it has none.

    A text with a fault has no tokens.
    """
    if has_questions(reader.source):
        kind, _, _ = reader.source.partition(":")
        name, _, removed = kind.partition("-")
        with_steps = name == "qa_steps"
        tokens, fault = questions.encode(text.content, with_steps, tokenizer, int(removed or 0))
    else:
        tokens, fault = encode(text.content, tokenizer)
    if fault:
        fault = f"{text.part}: {reader.unit} {text.number}: {fault}"
    return tokens, fault


def documents(reader: Reader, tokenizer_path: str, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yields every good document of a source once, in a fixed order.

    Each is {"tokens": int32 [n] without BOS, "bytes": int, "work": str, as in `rows.Document`}.

    Raises:
      UserError: there is none, or one bad document too many.
    """
    tokenizer = Tokenizer(tokenizer_path)

    def encoded(group: list[Text]) -> list[tuple[Text, np.ndarray, str]]:
        return [(text, *tokens_of(reader, text, tokenizer)) for text in group]

    empty = True
    groups = grouped(texts(reader), _GROUP)
    for group in ahead(encoded, groups, threads=_THREADS, count=2 * _THREADS):
        for text, tokens, fault in group:
            if fault:
                bad(fault)
            elif len(tokens):
                empty = False
                work = reader.work(text.part)
                yield {"tokens": tokens, "bytes": len(text.content), "work": work}
    if empty:
        raise UserError(f"config.data: source {reader.source!r} holds no text")


def check_texts(readers: Iterable[Reader], tokenizer_path: str, bad: BadRecords) -> None:
    """Reads each source up to its first good document. Raises UserError where there is none."""
    for reader in readers:
        next(documents(reader, tokenizer_path, bad))


def validation_documents(data: Any, *, tokenizer_path: str) -> Iterator[Document]:
    """Returns `batches.validation_documents` of text."""
    bad = BadRecords(data.max_bad_records)
    readers = list(map(open_source, data.validation))
    check_texts(readers, tokenizer_path, bad)

    def found() -> Iterator[Document]:
        for reader in readers:
            for document in documents(reader, tokenizer_path, bad):
                yield Document(reader.source, document["work"], document["tokens"])

    return found()
