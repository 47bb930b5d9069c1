"""Files of tensors in the safetensors format, read and written one tensor at a time.

The `safetensors` library checks that a header fits its file. This module reads and writes the data,
because the library maps whole files into memory to read, and takes all tensors at once to write.
Layout of a file: eight bytes with the header's length, the header (JSON), the data.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from latent_delib.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_dtype(stored: np.dtype) -> np.dtype:
    """Returns the dtype that a stored tensor is read as: float32 for float16, else `stored`."""
    return np.dtype(np.float32) if stored == np.float16 else stored


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    notes: Mapping[str, str],
) -> None:
    """Raises a UserError with all tensors that are missing, unknown or of a wrong shape, if any.

    Args:
      found, wanted: name -> shape.
      source: path of the tensors, for messages.
      notes: name -> text that the message puts after the tensor.
    """
    wrong = []
    for name, shape in wanted.items():
        if name not in found:
            wrong.append(f"missing {name} {shape}{notes.get(name, '')}")
        elif found[name] != shape:
            wrong.append(f"{name} is {found[name]}, expected {shape}{notes.get(name, '')}")
    for name, shape in found.items():
        if name not in wanted:
            wrong.append(f"unknown {name} {shape}")
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong)}")


class TensorFile:
    """Holds an opened safetensors file.

    Args:
      path: the file.
      ignored: tells by its name whether a tensor is left out, whatever its type.

    Attributes:
      shapes, dtypes: name -> shape or dtype, of every tensor.

    Raises:
      UserError: the file is missing, truncated or contradictory, or has a tensor that is not
        float32, float16 or bfloat16.
    """

    def __init__(self, path: Path, ignored: Callable[[str], bool] = lambda name: False):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._begin: dict[str, int] = {}
        try:
            with safetensors.safe_open(path, framework="numpy"):  # checks the header
                pass
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise UserError(f"{path}: does not exist") from None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error})") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if ignored(name):
                continue
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} is of type {entry['dtype']}, expected {', '.join(DTYPES)}"
                )
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = DTYPES[entry["dtype"]]
            self._begin[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """Reads a tensor, or only the part of it that a numpy index selects."""
        shape, dtype, begin = self.shapes[name], self.dtypes[name], self._begin[name]
        if index is not ... and index != (slice(None),) * len(shape):
            return np.array(np.memmap(self.path, dtype, "r", begin, shape)[index])
        size = math.prod(shape) * dtype.itemsize
        found = np.fromfile(self.path, np.uint8, size, offset=begin)
        if len(found) != size:
            raise UserError(f"{self.path}: {name} was cut off since the file was opened")
        return found.view(dtype).reshape(shape)


def header(
    entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Returns the bytes of a safetensors file before its data; arguments as for `write`."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in entries.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        fields[name] = {
            "dtype": _CODES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def raw(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array as a file holds them."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def write(
    path: Path,
    entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    chunks: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
    digest: Any = None,
) -> None:
    """Writes a safetensors file, a chunk at a time.

    Args:
      entries: name -> shape and dtype, in the order of the file.
      chunks: the data of all tensors, one after the other, cut into chunks at any place. One chunk
        at a time is in memory.
      metadata: strings for the header.
      digest: a `hashlib` object, updated with every byte of the file; None for no hash.
    """
    start = header(entries, metadata)
    with open(path, "wb") as file:

        def put(data: Any) -> None:
            file.write(data)
            if digest is not None:
                digest.update(data)

        put(start)
        for chunk in chunks:
            put(raw(chunk))
        written = file.tell() - len(start)
        wanted = sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in entries.values()
        )
        assert written == wanted, f"{path}: {written} bytes of data, {wanted} in the header"
        file.flush()
        os.fsync(file.fileno())
