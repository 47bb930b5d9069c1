"""Reads the documents of text sources in a fixed order, for `prepare`, evaluation and seqio alike.

A source has parts, usually files, and each part has texts. Each kind of source has a reader of its
own, in text_files.py, tfds_datasets.py and hub_datasets.py.
"""

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from latent_delib.data import questions
from latent_delib.data.rows import BadRecords, Document, encode, grouped, map_in_threads
from latent_delib.data.sources import (
    Files,
    Tfds,
    has_questions,
    has_steps,
    parse,
    removed_steps,
)
from latent_delib.data.text_files import TextFiles
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError

BLOCK = 16  # texts that are read from a part at each of its turns
_THREADS = os.cpu_count() or 1
_GROUP = 1 << 16  # bytes of text that a thread takes at once


class Reader(Protocol):
    """Reads a source. The same source has the same parts and texts each time, in the same order.

    Attributes:
      source: the source string of the config.
      parts: the names of the parts.
      cycle: how many parts are read in turns, a block of texts from each. 1: one part after the
        other, so that the order of texts does not depend on how a machine divides the source.
      unit: the word for one text of a part in error messages, such as "line".
    """

    source: str
    parts: list[str]
    cycle: int
    unit: str

    def contents(self, part: str) -> Iterator[bytes]:
        """Yields the texts of a part as bytes, which may turn out not to be UTF-8."""

    def work(self, part: str) -> str:
        """Returns the work that the texts of a part belong to, as in `rows.Document`."""

    def num_bytes(self) -> int:
        """Returns the size of the source in bytes; 0 where it is not known."""

    def fingerprint(self) -> str:
        """Returns a digest that tells different texts apart."""


def open_source(source: str) -> Reader:
    """Returns the reader of the text that a source string names.

    Raises:
      UserError: the text is missing, or the package that reads it is not installed.
      Outage: the Hub does not answer, and its cache does not have the dataset.
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
    """Holds a text as it was read.

    content: bytes, which may turn out not to be UTF-8.
    part: the part of the source that the text is from.
    number: the number of the text in its part, from 1.
    """

    content: bytes
    part: str
    number: int


def texts_of_part(reader: Reader, part: str) -> Iterator[Text]:
    """Yields the texts of one part of a source."""
    for number, content in enumerate(reader.contents(part), 1):
        yield Text(content, part, number)


def texts(reader: Reader, parts: Iterable[str] | None = None) -> Iterator[Text]:
    """Yields every text of a source once, or of some of its parts, in their order.

    `reader.cycle` parts are open at a time. A block of texts is read from each in turn. When a part
    has ended, the next part takes its place.
    """
    names = reader.parts if parts is None else parts
    unopened = (texts_of_part(reader, part) for part in names)
    opened = collections.deque(itertools.islice(unopened, reader.cycle))
    while opened:
        part = opened.popleft()
        block = list(itertools.islice(part, BLOCK))
        yield from block
        if len(block) == BLOCK:
            opened.append(part)
        else:
            opened.extend(itertools.islice(unopened, 1))


def tokens_of(
    reader: Reader, group: list[Text], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, str]]:
    """Returns the tokens of each text, int32 [n] without BOS, and its fault; "" if it has none.

    A text with a fault has no tokens. The fault names the part and the number of the text.
    """
    source = reader.source
    contents = [text.content for text in group]
    if has_questions(source):
        form = (has_steps(source), tokenizer, removed_steps(source))
        found = [questions.encode(content, *form) for content in contents]
    else:
        found = encode(contents, tokenizer)
    named = []
    for text, (tokens, fault) in zip(group, found, strict=True):
        place = f"{text.part}: {reader.unit} {text.number}: "
        named.append((tokens, fault and place + fault))
    return named


def documents(
    reader: Reader, tokenizer: Tokenizer, bad: BadRecords, parts: Iterable[str] | None = None
) -> Iterator[Document]:
    """Yields every good document of a source once, in a fixed order: that of `texts`.

    Raises:
      UserError: the source has no good document, or one bad document too many.
    """

    def encoded(group: list[Text]) -> list[tuple[Text, tuple[np.ndarray, str]]]:
        return list(zip(group, tokens_of(reader, group, tokenizer), strict=True))

    empty = True
    groups = grouped(texts(reader, parts), _GROUP, lambda text: 1 + len(text.content))
    for group in map_in_threads(encoded, groups, threads=_THREADS, count=2 * _THREADS):
        for text, (tokens, fault) in group:
            if fault:
                bad(fault)
            elif len(tokens):
                empty = False
                work = reader.work(text.part)
                yield Document(reader.source, work, tokens, len(text.content))
    if empty:
        raise UserError(f"config.data: source {reader.source!r} holds no text")


def check_texts(readers: Iterable[Reader], tokenizer: Tokenizer, bad: BadRecords) -> None:
    """Reads each source up to its first good document. Raises UserError if a source has none."""
    for reader in readers:
        next(documents(reader, tokenizer, bad))


def validation_documents(
    data: Any, sources: Iterable[str], tokenizer: Tokenizer
) -> Iterator[Document]:
    """Implements `batches.validation_documents` for text."""
    bad = BadRecords(data.max_bad_records)
    readers = list(map(open_source, sources))
    check_texts(readers, tokenizer, bad)
    of_each = (documents(reader, tokenizer, bad) for reader in readers)
    return itertools.chain.from_iterable(of_each)
