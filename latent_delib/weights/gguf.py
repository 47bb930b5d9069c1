"""GGUF files (version 2 and 3, little-endian), as llama.cpp's converter writes them.

The header is read here, because the `gguf` library's reader trusts every count in it; blocks are dequantised by that
library. Layout: magic, version, counts; keys with typed values; tensor infos; aligned data.
"""

import dataclasses
import math
import mmap
import struct
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn import rotary
from latent_delib.nn.sizes import SIZES, TransformerConfig, differences
from latent_delib.weights import gguf_vocabulary
from latent_delib.weights.source import Source

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
STRING, ARRAY = 8, 9
MOST = 1 << 22  # entries of a list: the largest vocabularies have a quarter of a million pieces
CHUNK = 1 << 22  # elements dequantised at a time: what is in flight is float32, several times over


class Info(NamedTuple):
    """A tensor: its shape as numpy has it, ggml type, and place in the file, in bytes."""

    shape: tuple[int, ...]
    type: Any
    begin: int


class _Cursor:
    """Reads a header forwards and never past its end."""

    def __init__(self, data: mmap.mmap, where: str):
        self.data, self.where, self.at = data, where, 0

    def take(self, count: int, size: int = 1) -> bytes:
        """The next `count` entries of `size` bytes."""
        self.room(count, size)
        self.at += count * size
        return self.data[self.at - count * size : self.at]

    def room(self, count: int, size: int) -> None:
        """Refuses a count of entries, each of at least that many bytes, that the file cannot hold or nobody means."""
        left = len(self.data) - self.at
        if count > MOST or count * size > left:
            raise UserError(
                f"{self.where}: truncated or damaged: {count} x {size} bytes are to follow byte {self.at}, {left} do"
            )

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return str(self.take(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.where}: damaged: a string before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                self.room(count, 8)
                return [self.string() for _ in range(count)]
            if kind in SCALARS:
                size = struct.calcsize("<" + SCALARS[kind])
                return np.frombuffer(self.take(count, size), np.dtype("<" + SCALARS[kind])).tolist()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        raise UserError(f"{self.where}: damaged: value type {kind} before byte {self.at}")


class GGUF:
    """A GGUF file. metadata: key -> str, number, bool or list. tensors: name -> Info.

    Raises:
      UserError: not GGUF, truncated, contradictory, or with a block type that the `gguf` library does not dequantise.
    """

    def __init__(self, path: Path):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        self.path, where = path, str(path)
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except ValueError:  # an empty file
            raise UserError(f"{where}: not a GGUF file (it is empty)") from None
        head = _Cursor(data, where)
        if (magic := head.take(4)) != MAGIC:
            raise UserError(f"{where}: not a GGUF file (begins with {magic!r})")
        if (version := head.number("I")) not in (2, 3):
            raise UserError(f"{where}: GGUF version {version}, expected 2 or 3, little-endian")
        tensor_count, key_count = head.number("Q"), head.number("Q")
        head.room(tensor_count, 24)
        head.room(key_count, 13)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = head.string()
            self.metadata[key] = head.value(head.number("I"))

        infos = {}
        for _ in range(tensor_count):
            name, dims = head.string(), head.number("I")
            if not 1 <= dims <= 4:
                raise UserError(f"{where}: {name} has {dims} dimensions, expected 1 to 4")
            shape = tuple(head.number("Q") for _ in range(dims))[::-1]
            if name in infos:
                raise UserError(f"{where}: {name} is there twice")
            infos[name] = shape, head.number("I"), head.number("Q")
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{where}: general.alignment={alignment!r}, expected a power of two")
        start = -(-head.at // alignment) * alignment
        self.tensors: dict[str, Info] = {}
        for name, (shape, code, offset) in infos.items():
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise UserError(f"{where}: {name} is of the unknown type {code}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise UserError(
                    f"{where}: {name} has rows of {shape[-1]}, expected a multiple of {block} ({kind.name})"
                )
            size = math.prod(shape) // block * block_bytes
            if start + offset + size > len(data):
                raise UserError(
                    f"{where}: truncated or damaged: {name} {shape} ends at byte {start + offset + size}, "
                    f"the file has {len(data)}"
                )
            self.tensors[name] = Info(shape, kind, start + offset)

    def dtype(self, name: str) -> np.dtype:
        """What `read` returns: bfloat16 as stored, float32 for all else."""
        return np.dtype(ml_dtypes.bfloat16 if self.tensors[name].type.name == "BF16" else np.float32)

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32; bfloat16 stays what it is."""
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        shape, kind, begin = self.tensors[name]
        plain = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
        if kind.name in plain:
            stored = self._bytes(name, begin, math.prod(shape) * plain[kind.name].itemsize).view(plain[kind.name])
            return stored.reshape(shape).astype(self.dtype(name), copy=False)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        blocks, out = math.prod(shape) // block, np.empty(math.prod(shape), np.float32)
        step = max(1, CHUNK // block)
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            stored = self._bytes(name, begin + first * block_bytes, (last - first) * block_bytes)
            try:
                out[first * block : last * block] = dequantize(stored, kind)
            except NotImplementedError:
                raise UserError(f"{self.path}: {name} is of type {kind.name}, which cannot be dequantised") from None
        return out.reshape(shape)

    def _bytes(self, name: str, begin: int, size: int) -> np.ndarray:
        found = np.fromfile(self.path, np.uint8, size, offset=begin)
        if len(found) != size:
            raise UserError(f"{self.path}: {name} was cut off since the file was opened")
        return found


def open_source(path: Path) -> Source:
    """A GGUF file as a source."""
    file = GGUF(path)
    config = architecture(file)
    shapes = {name: info.shape for name, info in file.tensors.items() if name != "rope_freqs.weight"}
    return Source(
        where=str(path),
        form="gguf",
        architecture=config,
        shapes=shapes,
        dtypes={name: file.dtype(name) for name in shapes},
        read=file.read,
        write_tokenizer=partial(gguf_vocabulary.write, file.metadata, source=str(path)),
    )


def architecture(file: GGUF) -> TransformerConfig:
    """TransformerConfig of a file's metadata; what GGUF does not say is the known size's that fits the rest."""
    where, kind = str(file.path), file.metadata.get("general.architecture")
    families = {
        "llama": dict(activation="silu", scale_embeddings=False, norm_offset=0.0),
        "qwen3": dict(activation="silu", scale_embeddings=False, norm_offset=0.0, qk_norm=True),
        "gemma": {},
        "gemma2": dict(layer_pattern=("local", "global"), post_norms=True),
        "gemma3": dict(layer_pattern=("local",) * 5 + ("global",), post_norms=True, qk_norm=True),
    }
    if not isinstance(kind, str) or kind not in families:
        raise UserError(f"{where}: general.architecture={kind!r}, expected one of {', '.join(families)}")

    def get(key: str, type_: type, default: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{key}", default)
        if type(value) is not type_:
            raise UserError(f"{where}: {kind}.{key}={value!r}, expected {type_.__name__}")
        return value

    heads, width = get("attention.head_count", int), get("embedding_length", int)
    if heads < 1:
        raise UserError(f"{where}: {kind}.attention.head_count={heads}, expected at least 1")
    fields: dict[str, Any] = dict(
        num_layers=get("block_count", int),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", int, heads),
        head_dim=get("attention.key_length", int, width // heads),
        ffn_dim=get("feed_forward_length", int),
        vocab_size=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 1,
        rope_base=get("rope.freq_base", float, 10_000.0),
        # Stored as float32; the decimal number it was made from has few digits.
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon', float):.6g}"),
        **families[kind],
    )
    if get("expert_count", int, 0):
        raise UserError(
            f"{where}: {kind}.expert_count={get('expert_count', int)}, mixtures of experts are not known here"
        )
    if "layer_pattern" in fields:
        fields["window"] = get("attention.sliding_window", int)
    for key, name in (("attn_logit_softcapping", "attn_softcap"), ("final_logit_softcapping", "final_softcap")):
        fields[name] = get(key, float, 0.0)
    scaling = get("rope.scaling.type", str, "none")
    if scaling == "linear":
        fields["rope_scaling"] = (get("rope.scaling.factor", float), 1.0, 4.0, 0.0)
    elif scaling != "none":
        raise UserError(f"{where}: {kind}.rope.scaling.type={scaling!r}, expected none or linear")
    config = TransformerConfig.from_dict(fields, where)
    known = next((size for size in SIZES.values() if not _unlike(config, size)), None)
    if known is not None:
        config = dataclasses.replace(config, query_scale=known.query_scale)
    if "rope_freqs.weight" in file.tensors:  # Llama 3's scaling, as a divisor of each frequency
        config = dataclasses.replace(config, rope_scaling=known.rope_scaling if known else ())
        divisors = file.read("rope_freqs.weight").reshape(-1)
        plain = rotary.frequencies(config.head_dim, config.rope_base)
        scaled = rotary.frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
            raise UserError(f"{where}: rope_freqs.weight is not the rotary scaling of any known size")
    return config


def _unlike(config: TransformerConfig, size: TransformerConfig) -> list[str]:
    """In what a file is not of a known size, where GGUF tells."""
    silent = ("query_scale", "rope_scaling", "local_rope_base", "window")
    return [d for d in differences(config, size) if not d.startswith(silent)]
