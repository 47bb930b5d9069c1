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


def encode(contents: Iterable[bytes], tokenizer: Any) -> list[tuple[np.ndarray, str]]:
    """Returns the tokens of each document, int32 [n] without BOS, and its fault; "" if it has none.

    A document with a fault has no tokens.
    """
    decoded = list(map(decode, contents))
    batch = tokenizer.encode_batch([text for text, _ in decoded])
    found = []
    for (_, fault), ids in zip(decoded, batch, strict=True):
        tokens, other_fault = checked(ids, tokenizer)
        found.append((tokens, fault or other_fault))
    return found


def decode(content: bytes) -> tuple[str, str]:
    """Returns a document as text, and its fault; "" if it has none. With a fault it has no text."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "", "not UTF-8 text"
    if "\0" in text:
        return "", "holds NUL characters, is it UTF-16? convert the file to UTF-8"
    return text, ""


def checked(ids: list[int], tokenizer: Any) -> tuple[np.ndarray, str]:
    """Returns token ids as int32 [n], and their fault; "" if they have none."""
    tokens = np.array(ids, np.int32)
    if ((tokens == tokenizer.bos_id) | (tokens == tokenizer.pad_id)).any():
        return np.empty(0, np.int32), "the tokenizer turns its text into BOS or padding"
    return tokens, ""


def packed(
    documents: Iterable[np.ndarray],
    *,
    length: int,
    bos_id: int,
    pad_id: int,
    whole: bool = False,
) -> Iterator[np.ndarray]:
    """Packs documents into rows; yields rows, int32 [k, length], as soon as they are complete.

    BOS begins each row and each document. The last row is padded.

    Args:
      documents: int32 [n] each, without BOS.
      length: number of tokens in a row.
      whole: whether documents are kept whole. If so, a document that does not fit into the current
        row begins the next row. A document that is longer than a row loses its end: otherwise the
        next row would hold the end of a question without its beginning.
    """
    room = length - 1  # tokens of a row after its BOS
    bos = np.array([bos_id], np.int32)
    padding = np.full(room, pad_id, np.int32)
    held: list[np.ndarray] = []  # the row begun so far, without its BOS
    count = 0  # its tokens

    def rows(parts: list[np.ndarray]) -> np.ndarray:
        tokens = np.concatenate(parts).reshape(-1, room)
        return np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos_id)

    for tokens in documents:
        if whole:
            tokens = tokens[:room]
            if count and count + 1 + len(tokens) > room:
                yield rows([*held, padding[count:]])
                held, count = [], 0
        if count:  # a document that begins a row is led by the row's own BOS
            held.append(bos)
            count += 1
        held.append(tokens)
        count += len(tokens)
        if count >= room:  # now, so that a row begun is copied once, not with each document
            count %= room
            complete = len(tokens) - count
            yield rows([*held[:-1], tokens[:complete]])
            held = [tokens[complete:]]
    if count:
        yield rows([*held, padding[count:]])


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


def grouped(items: Iterable, size: int, size_of: Callable[[Any], int]) -> Iterator[list]:
    """Yields lists of the items. A list ends where its sizes add up to `size` or more."""
    group: list = []
    reached = 0
    for item in items:
        group.append(item)
        reached += size_of(item)
        if reached >= size:
            yield group
            group, reached = [], 0
    if group:
        yield group


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
