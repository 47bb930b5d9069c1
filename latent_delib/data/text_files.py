"""Finds the text files of a source, reads their texts, and computes their digest.

epath reads files on gs://, by TensorFlow where it is installed, else by gcsfs.
"""

import codecs
import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from etils import epath
from fsspec.spec import AbstractBufferedFile

from latent_delib.data.sources import Files, common_folder, local_files, only_files
from latent_delib.errors import UserError, reason, store_error

CYCLE = 16  # files that are read in turns, as in TFDS
_END = 1 << 16  # bytes at each end of a file that its digest covers
_BUFFER = 1 << 20  # bytes that are read at once from gs:// by gcsfs
# Errors of a file, by name: the last three are TensorFlow's.
_LOST = {"FileNotFoundError", "PermissionError"}
_LOST |= {"NotFoundError", "PermissionDeniedError", "DataLossError"}


class TextFiles:
    """Implements `text.Reader` for files on a local disk or gs://: `parts` has their sorted paths.

    Raises:
      UserError: there are no files.
    """

    cycle = CYCLE

    def __init__(self, source: str, meant: Files):
        self.source = source
        self.kind = meant.kind
        self.unit = "document" if meant.kind == "files" else "line"
        self.parts = _find(source, meant.pattern)
        self.folder = common_folder(self.parts)

    def contents(self, path: str) -> Iterator[bytes]:
        """Yields the texts of one file. Raises UserError if the file is lost."""
        divide = _lines if self.unit == "line" else _documents
        with reading([self.source]), open_file(path) as file:
            for number, content in enumerate(divide(_by_lines(file))):
                if number == 0 and content.startswith(codecs.BOM_UTF8):  # a mark, not text
                    content = content.removeprefix(codecs.BOM_UTF8).lstrip(b"\r\n")
                yield content

    def work(self, path: str) -> str:
        return "" if self.unit == "line" else path.removeprefix(f"{self.folder}/")

    def num_bytes(self) -> int:
        return bytes_of_files(self.source, self.parts)

    def fingerprint(self) -> str:
        """Returns a digest of all files, which does not depend on their folder."""
        is_packaged = self.source.startswith("packaged/")
        kind = self.source if is_packaged else self.kind
        return digest_of_files(self.source, kind, self.parts)


def _find(source: str, pattern: str) -> list[str]:
    """Returns the files that match a pattern, sorted. Raises UserError if there are none."""
    if "://" not in pattern:
        return only_files(source, local_files(pattern))
    bucket, _, inside = pattern.removeprefix("gs://").partition("/")
    with reading([source]):
        found = [str(path) for path in epath.Path(f"gs://{bucket}").glob(inside)]
        return only_files(source, found)


def _documents(file: BinaryIO) -> Iterator[bytes]:
    """Yields the documents of a file, without the empty lines around them."""
    lines: list[bytes] = []
    was_separator = False
    for line in file:
        is_separator = line.rstrip(b"\r\n") == b"\f"
        if not is_separator:
            lines.append(line)
        elif not was_separator:  # separators that follow each other are one
            yield b"".join(lines).strip(b"\r\n")
            lines = []
        was_separator = is_separator
    yield b"".join(lines).strip(b"\r\n")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file, without their ends."""
    for line in file:
        yield line.removesuffix(b"\n").removesuffix(b"\r")


# For files of any source, datasets included.


def open_file(path: str) -> Any:
    """Opens a file on a disk or a store, to read bytes."""
    return epath.Path(path).open("rb")


def _by_lines(file: Any) -> Any:
    """Returns an open file as one whose lines are read fast: gcsfs fetches megabytes for each."""
    is_slow = isinstance(file, AbstractBufferedFile)
    return io.BufferedReader(file, _BUFFER) if is_slow else file


@contextlib.contextmanager
def reading(sources: Iterable[str]) -> Iterator[None]:
    """Raises UserError for a file that is lost, OSError where a store or disk fails.

    Other errors are bugs of the program, and pass unchanged.
    """
    try:
        yield
    except Exception as error:
        read = ", ".join(map(repr, sources))
        if isinstance(error, ImportError):  # "Please install gcsfs ..."
            raise UserError(
                f"config.data: reading {read}: {error}, or TensorFlow (./launch/setup.sh seqio)"
            ) from None
        if type(error).__name__ not in _LOST:
            raise store_error(error, read) or error from None
        raise UserError(f"config.data: reading {read}: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """Returns the file and the fault that an error is about."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}; {error.strerror}"
    # TensorFlow's message names file and fault among parts of the pipeline.
    cause = getattr(error, "message", reason(error))
    cause = cause.partition("\n")[0].partition(" [Op:")[0]
    return re.sub(r"\{\{.*?\}\} ", "", cause)


def bytes_of_files(source: str, paths: Iterable[str]) -> int:
    """Returns the total size of files in bytes."""
    return sum(_of_each(source, paths, _size_of_file))


def _of_each(source: str, paths: Iterable[str], look: Callable[[str], Any]) -> list[Any]:
    """Returns the result of `look` for each file. A store answers many calls at once."""
    with reading([source]), ThreadPoolExecutor(32) as pool:
        return list(pool.map(look, paths))


def _size_of_file(path: str) -> int:
    with open_file(path) as file:
        return _size(file)


def _size(file: BinaryIO) -> int:
    file.seek(0, os.SEEK_END)
    return file.tell()


def digest_of_files(source: str, kind: str, paths: Iterable[str]) -> str:
    """Returns a digest of a kind of text and of files: of their sizes, beginnings and ends.

    Files are named by their paths below their common folder.
    """
    paths = sorted(paths)
    folder = common_folder(paths)
    found = _of_each(source, paths, _digest_of_file)
    names = ["/" + path.removeprefix(folder).lstrip("/") for path in paths]
    files = [(name, *of_file) for name, of_file in zip(names, found, strict=True)]
    return hashlib.sha256(repr((kind, files)).encode()).hexdigest()


def _digest_of_file(path: str) -> tuple[int, str]:
    """Returns the size of a file, and a digest of its first and last 64 KiB."""
    with open_file(path) as file:
        first = file.read(_END)
        size = _size(file)
        file.seek(max(0, size - _END))
        return size, hashlib.sha256(first + file.read(_END)).hexdigest()
