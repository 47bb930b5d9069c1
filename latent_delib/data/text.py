"""Documents of text sources, in a fixed order (see sources.py).

TensorFlow is imported only where a source is on a store such as gs://, or a TFDS dataset.
"""

import codecs
import collections
import contextlib
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latent_delib.data.rows import BadRecords, Document, ahead, encode, grouped
from latent_delib.data.sources import Tfds, common_folder, local_files, only_files, parse
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError, store_error

CYCLE = BLOCK = 16  # files that are read in turns, and texts of a file in a turn, as seqio does
_SEPARATOR = re.compile(rb"\n\f(?:\r?\n\f)*\r?\n")
_THREADS = min(8, os.cpu_count() or 1)
_GROUP = 16  # texts that a thread takes at once
_END = 1 << 16  # bytes
# Errors of a file, by name: the last four are TensorFlow's. The last is a store of unknown kind.
_LOST = {"FileNotFoundError", "PermissionError"}
_LOST |= {"NotFoundError", "PermissionDeniedError", "DataLossError", "UnimplementedError"}


@contextlib.contextmanager
def reading(sources: Iterable[str]) -> Iterator[None]:
    """Raises UserError for a file that is lost, OSError where a store or disk fails.

    Other faults are the program's, and pass.
    """
    try:
        yield
    except Exception as error:
        read = ", ".join(map(repr, sources))
        if type(error).__name__ not in _LOST:
            raise store_error(error, read) or error from None
        raise UserError(f"config.data: reading {read}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """Returns the file and the fault that an error is about."""
    if isinstance(error, OSError):
        return f"{error.filename}; {error.strerror}"
    # TensorFlow's message names them among parts of the pipeline.
    cause = error.message.partition("\n")[0].partition(" [Op:")[0]
    return re.sub(r"\{\{.*?\}\} |Error in user-defined function .* Iterator::\S+: ", "", cause)


# Files.


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return open(path, "rb")
    from latent_delib.data.stores import gfile

    return gfile.GFile(path, "rb")


def files_of(source: str) -> list[str]:
    """Returns the files of a source. Raises UserError where there are none."""
    meant = parse(source)
    if isinstance(meant, Tfds):
        from latent_delib.data import stores

        return stores.files_of(meant)
    if "://" not in meant.pattern:
        return only_files(source, local_files(meant.pattern), os.path.isdir)
    from latent_delib.data.stores import gfile

    with reading([source]):
        found = gfile.glob(meant.pattern)
    return only_files(source, found, gfile.isdir)


def num_bytes(source: str) -> int:
    """Returns the size of the files of a source, which a progress line counts towards."""
    total = 0
    for path in files_of(source):
        with reading([source]), _open(path) as file:
            total += _size(file)
    return total


def _size(file: BinaryIO) -> int:
    file.seek(0, os.SEEK_END)
    return file.tell()


def _fingerprint_of_file(path: str) -> tuple[int, str]:
    """Returns the size of a file, and a digest of its first and last 64 KiB."""
    with _open(path) as file:
        first = file.read(_END)
        size = _size(file)
        file.seek(max(0, size - _END))
        return size, hashlib.sha256(first + file.read(_END)).hexdigest()


def fingerprint(source: str) -> str:
    """Returns a digest of a source's files, wherever they lie."""
    paths = sorted(files_of(source))
    folder = common_folder(paths)
    kind = source[:5] if source.startswith(("files:", "lines:")) else source
    with reading([source]), ThreadPoolExecutor(32) as pool:
        found = list(pool.map(_fingerprint_of_file, paths))
    files = [
        (path.removeprefix(folder), *of_file) for path, of_file in zip(paths, found, strict=True)
    ]
    return hashlib.sha256(repr((kind, files)).encode()).hexdigest()


# Texts.


class Text(NamedTuple):
    """Holds a text as it was read.

    content: UTF-8, or bad. file: it is in. number: in its file, from 1. A record of TFDS has
    neither: "" and 0.
    """

    content: bytes
    file: str = ""
    number: int = 0


def _documents(file: BinaryIO) -> Iterator[bytes]:
    """Yields the documents of a file, without the empty lines around them."""
    for text in _SEPARATOR.split(b"\n" + file.read() + b"\n"):
        yield text.strip(b"\r\n")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file, without carriage returns, as TensorFlow reads them."""
    for line in file:
        yield line.removesuffix(b"\n").replace(b"\r", b"")


def texts_of_file(source: str, path: str) -> Iterator[Text]:
    """Yields the texts of one file of a source. Raises UserError where it is lost."""
    parts = _lines if source.startswith("lines:") else _documents
    with reading([source]), _open(path) as file:
        for number, content in enumerate(parts(file), 1):
            if number == 1 and content.startswith(codecs.BOM_UTF8):  # a mark, which is no text
                content = content.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
            yield Text(content, path, number)


def _in_turns(files: Iterator[Iterator[Text]]) -> Iterator[Text]:
    """Yields the texts of files, a block of each of the open ones in turn, as tf.data does.

    The next file is opened in the place of one that has ended.
    """
    opened = collections.deque(itertools.islice(files, CYCLE))
    while opened:
        file = opened.popleft()
        block = list(itertools.islice(file, BLOCK))
        yield from block
        has_ended = len(block) < BLOCK
        opened.extend(itertools.islice(files, 1) if has_ended else [file])


def texts(source: str) -> Iterator[Text]:
    """Yields every text of a source once, in the order of its seqio task without shuffling."""
    meant = parse(source)
    if not isinstance(meant, Tfds):
        yield from _in_turns(texts_of_file(source, path) for path in files_of(source))
        return
    from latent_delib.data import stores

    with reading([source]):
        yield from map(Text, stores.texts_of(meant))


def tokens_of(source: str, text: Text, tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
    """Returns the tokens of a text, int32 [n] without BOS, and a line that says why it is bad.

    The line is empty as a rule. A bad text has no tokens.
    """
    tokens, fault = encode(text.content, tokenizer)
    if not fault:
        return tokens, ""
    if text.file:
        unit = "line" if source.startswith("lines:") else "document"
        return tokens, f"{text.file}: {unit} {text.number}: {fault}"
    # A record of TFDS has no number: its beginning names it.
    return tokens, f"{source}: text {text.content[:60]!r}: {fault}"


def documents(source: str, tokenizer_path: str, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yields every good document of a source once, in a fixed order.

    Each is {"tokens": int32 [n] without BOS, "bytes": int, "work": str, as in `rows.Document`}.

    Raises:
      UserError: there is none, or one bad document too many.
    """
    tokenizer = Tokenizer(tokenizer_path)
    folder = common_folder(files_of(source))
    of_files = not source.startswith("lines:")  # a record of TFDS has no file

    def encoded(group: list[Text]) -> list[tuple[Text, np.ndarray, str]]:
        return [(text, *tokens_of(source, text, tokenizer)) for text in group]

    empty = True
    groups = grouped(texts(source), _GROUP)
    for group in ahead(encoded, groups, threads=_THREADS, count=2 * _THREADS):
        for text, tokens, fault in group:
            if fault:
                bad(fault)
            elif len(tokens):
                empty = False
                work = text.file.removeprefix(f"{folder}/") if of_files else ""
                yield {"tokens": tokens, "bytes": len(text.content), "work": work}
    if empty:
        raise UserError(f"config.data: source {source!r} holds no text")


def check_sources(sources: Iterable[str], tokenizer_path: str, bad: BadRecords) -> None:
    """Reads each source up to its first good document. Raises UserError where there is none."""
    for source in sources:
        next(documents(source, tokenizer_path, bad))


def validation_documents(data: Any, *, tokenizer_path: str) -> Iterator[Document]:
    """Returns `batches.validation_documents` of text."""
    bad = BadRecords(data.max_bad_records)
    check_sources(data.validation, tokenizer_path, bad)

    def found() -> Iterator[Document]:
        for source in data.validation:
            for document in documents(source, tokenizer_path, bad):
                yield Document(source, document["work"], document["tokens"])

    return found()
