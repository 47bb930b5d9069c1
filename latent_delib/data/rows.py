"""Packs documents into rows of tokens, numbers their pieces, counts bad records; needs numpy alone.

A *stream* is all documents one after the other, each after a BOS. A *row* is `length` tokens of the
stream; a row that begins inside a document begins with BOS too. So every row consists of pieces
that each begin with BOS, and no token of the text is dropped or doubled. The last row of a stream
ends with padding. Questions are kept whole: then any row may end with padding, and a document
longer than a row loses its end.
"""

import atexit
import collections
import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from latent_delib.data.sources import parse, require_string
from latent_delib.errors import UserError


def check_data(data: Any) -> None:
    """Raises UserError unless the `data` config describes a possible mixture. Opens no file."""
    sources, weights = list(data.sources), list(data.weights)
    for field, listed in (("sources", sources), ("validation", list(data.validation))):
        for source in listed:
            require_string(source)
            parse(source)
            if listed.count(source) > 1:
                raise UserError(
                    f"config.data.{field}: {source!r} is listed twice, expected each source once"
                )
    if not sources:
        raise UserError("config.data.sources: empty, expected at least one source")
    if len(sources) != len(weights):
        raise UserError(
            f"config.data.weights has {len(weights)}, config.data.sources {len(sources)}: "
            "expected one weight per source"
        )
    for source, weight in zip(sources, weights, strict=True):
        if not isinstance(weight, int | float) or not 0 < weight < np.inf:
            raise UserError(
                f"config.data.weights: {weight!r} for {source!r}, expected a positive number"
            )
    if data.seq_len < 2:
        raise UserError(
            f"config.data.seq_len: {data.seq_len}, expected at least 2 (BOS and one token)"
        )
    if data.max_bad_records < 0:
        raise UserError(f"config.data.max_bad_records: {data.max_bad_records}, expected at least 0")


class Document(NamedTuple):
    """Holds a document of a source.

    source: the source string of the config.
    work: the file that the document is a part of, by its path below the common folder of the
      source's files. "" where each document is a work of its own, such as a line or a record.
    tokens: int32 [n], without BOS.
    num_bytes: the size of its text; 0 where that is not known.
    """

    source: str
    work: str
    tokens: np.ndarray
    num_bytes: int = 0


class BadRecords:
    """Counts distinct skipped records; raises UserError once there are more than `limit`.

    Each process counts from 0, so a job that resumes may skip as many again.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.met: collections.Counter[str] = collections.Counter()
        self.lock = threading.Lock()  # each source may be read by a thread of its own

    def __call__(self, record: str) -> None:
        """Counts `record`, a text "FILE: PLACE: FAULT".

        Prints the first eight records, then those whose number is a power of two.

        Raises:
          UserError: the record is one more than the limit.
        """
        with self.lock:
            is_new = record not in self.met
            number = len(self.met) + 1
            if is_new and number > self.limit:
                raise UserError(
                    f"config.data: {record} (bad record number {number}, "
                    f"config.data.max_bad_records is {self.limit})"
                )
            self.met[record] += 1
        is_power_of_two = number & (number - 1) == 0
        if is_new and (number <= 8 or is_power_of_two):
            # UserError escapes the characters of a record that cannot be printed.
            print(UserError(f"bad record number {number}, skipped: {record}"), flush=True)


def encode(text: bytes, tokenizer: Any, in_text: bool = False) -> tuple[np.ndarray, str]:
    """Returns a document's tokens, int32 [n] without BOS, and its fault; "" if it has none.

    in_text: whether it is a later part of a document (see `Tokenizer.encode_in_text`).
    """
    nothing = np.empty(0, np.int32)
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        return nothing, "not UTF-8 text"
    if "\0" in decoded:
        return nothing, "holds NUL characters, is it UTF-16? convert the file to UTF-8"
    ids = tokenizer.encode_in_text(decoded) if in_text else tokenizer.encode(decoded)
    tokens = np.array(ids, np.int32)
    if ((tokens == tokenizer.bos_id) | (tokens == tokenizer.pad_id)).any():
        return nothing, "the tokenizer turns its text into BOS or padding"
    return tokens, ""


def packed(
    documents: Iterable[np.ndarray],
    *,
    length: int,
    bos_id: int,
    pad_id: int,
    whole: bool = False,
) -> Iterator[np.ndarray]:
    """Packs documents into rows; yields those that are complete, int32 [k, length], after each.

    BOS begins each row and each document. The last row is padded.

    Args:
      documents: int32 [n] each, without BOS.
      length: number of tokens in a row.
      whole: whether documents are kept whole. If so, a document that does not fit into the current
        row begins the next row. A document that is longer than a row loses its end: otherwise the
        next row would hold the end of a question without its beginning.
    """
    room = length - 1  # tokens of a row after its BOS

    def rows(tokens: np.ndarray) -> np.ndarray:
        return np.pad(tokens.reshape(-1, room), ((0, 0), (1, 0)), constant_values=bos_id)

    def padded(body: np.ndarray) -> np.ndarray:
        return np.pad(body, (0, room - len(body)), constant_values=pad_id)

    body = np.empty(0, np.int32)  # the row begun so far, without its BOS
    for tokens in documents:
        if whole:
            tokens = tokens[:room]
            if len(body) and len(body) + 1 + len(tokens) > room:
                yield rows(padded(body))
                body = body[:0]
        if len(body):  # a document that begins a row is led by the row's own BOS
            body = np.append(body, np.int32(bos_id))
        body = np.concatenate([body, tokens])
        complete = len(body) - len(body) % room
        yield rows(body[:complete])
        body = body[complete:]
    if len(body):
        yield rows(padded(body))


def segments(tokens_BT: np.ndarray, bos_id: int, pad_id: int) -> np.ndarray:
    """Returns the number of each token's BOS-led piece, int32 [B, T]: from 1, and 0 on padding."""
    pieces_BT = np.cumsum(tokens_BT == bos_id, axis=-1)
    return np.where(tokens_BT == pad_id, 0, pieces_BT).astype(np.int32)


def cut_pieces(tokens: np.ndarray, length: int, bos_id: int) -> list[np.ndarray]:
    """Cuts a document, int32 [n], into pieces of BOS and at most `length` - 1 tokens."""
    found = []
    for start in range(0, len(tokens), length - 1):
        part = tokens[start : start + length - 1]
        found.append(np.concatenate([[bos_id], part]).astype(np.int32))
    return found


def grouped(items: Iterable, size: int) -> Iterator[list]:
    """Yields the items in lists of `size`, the last one shorter."""
    items = iter(items)
    yield from iter(lambda: list(itertools.islice(items, size)), [])


def map_in_threads(function: Callable, items: Iterable, threads: int, count: int) -> Iterator:
    """Yields function(item) of each item, in order.

    Meanwhile threads work on the next `count` - 1 items.
    """
    return closed_at_exit(_map_in_threads(function, items, threads, count))


def _map_in_threads(function: Callable, items: Iterable, threads: int, count: int) -> Generator:
    pool = ThreadPoolExecutor(threads)
    pending = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_OPEN: weakref.WeakSet[Generator] = weakref.WeakSet()


def closed_at_exit(generator: Generator) -> Generator:
    """Returns the generator; when Python exits it is closed first, so that its threads can end."""
    _OPEN.add(generator)
    return generator


@atexit.register
def _close() -> None:
    while True:
        try:
            generator = _OPEN.pop()  # another thread may add some meanwhile
        except KeyError:
            return
        with contextlib.suppress(ValueError):  # it is at work, in another thread
            generator.close()
