"""Arrays on a local disk or gs://, through tensorstore, in the format zarr3.

Numbers are stored in small uncompressed chunks of large files, so that reading any few of them
takes a few kilobytes. Each chunk has a checksum.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from latent_delib.errors import UserError, reason, store_error

AGAIN = "copy the token files again, or prepare them again"
DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION")  # tensorstore's: a wrong checksum, a cut-off file
_FILE = 1 << 22  # numbers in a file, such as tokens
_CODECS = [{"name": "bytes"}, {"name": "crc32c"}]  # of a chunk
_CACHE = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def _store(path: str) -> Any:
    """Returns tensorstore's name for a directory: a URL as it is, or a local path."""
    if "://" in path:
        return f"{path}/"
    return {"driver": "file", "path": f"{os.path.abspath(path)}/"}


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turns tensorstore's errors into OSError where a store or disk fails, else into UserError."""
    try:
        yield
    except ValueError as error:
        raise store_error(error, path) or UserError(f"{path}: {reason(error)}") from None


def result(future: Any, path: str) -> Any:
    """Waits for tensorstore; returns the result.

    Raises:
      OSError: the disk or store fails.
      UserError: any other error of tensorstore; both name `path`.
    """
    with _errors(path):
        return future.result()


def folder(directory: str) -> ts.KvStore:
    """Opens a directory to read and write its small files. Raises errors as `result`."""
    with _errors(directory):  # a URL of no known kind is refused at once
        return ts.KvStore.open(_store(directory)).result()


def open_array(path: str, shape: tuple[int, ...]) -> ts.TensorStore:
    """Opens an array to read. Raises UserError unless it has `shape`, which meta.json gives."""
    spec = {"driver": "zarr3", "kvstore": _store(path), "fill_missing_data_reads": False}
    opening = ts.open(spec, open=True, read=True, context=_CACHE, recheck_cached_data=False)
    array = result(opening, path)
    if array.shape != shape:
        raise UserError(
            f"{path}: an array of shape {list(array.shape)}, meta.json says {list(shape)}; {AGAIN}"
        )
    return array


def blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups arrays along their first axis into blocks of `size`, the last one smaller."""
    held: list[np.ndarray] = []
    missing = size
    for part in parts:
        while len(part) >= missing:
            yield np.concatenate([*held, part[:missing]])
            held, part, missing = [], part[missing:], size
        held.append(part)
        missing -= len(part)
    if missing < size:
        yield np.concatenate(held)


def write_array(
    path: str,
    parts: Iterable[np.ndarray],
    dtype: str,
    chunk: int,
    digest: Any,
    width: tuple[int, ...] = (),
) -> int:
    """Writes arrays [n, *width] one after the other as one array; returns its length.

    Args:
      chunk: how many numbers are read together.
      digest: a hash object, which is updated with everything that is stored.
    """
    chunk_rows = max(1, chunk // math.prod(width))
    file_rows = max(1, _FILE // math.prod(width) // chunk_rows) * chunk_rows
    codec = {"chunk_shape": [chunk_rows, *width], "codecs": _CODECS}
    metadata = {
        "shape": [1 << 48, *width],  # cut down to the true length at the end
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [file_rows, *width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": _store(path),
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    array = result(ts.open(spec, create=True, delete_existing=True), path)
    length = 0
    for block in blocks(parts, file_rows):
        block = block.astype(dtype)
        digest.update(block)
        result(array[length : length + len(block)].write(block), path)
        length += len(block)
    result(array.resize(exclusive_max=[length, *width], resize_metadata_only=True), path)
    return length
