"""GGUF files (version 2 and 3, little-endian), as llama.cpp's converter writes them.

The `gguf` library dequantises blocks. Its reader (0.19) is not used: for a vocabulary of 256,000
pieces it takes 10 s and 0.7 GB, this one 0.3 s and 40 MB (two cores of an AMD EPYC, 2026-11-30). It
also trusts every count in a header, so one damaged length of a list makes it loop for ever. Layout
of a file (llama.cpp's gguf.md): magic, version, counts; keys with typed values; tensor infos;
aligned data.
"""

import dataclasses
import math
import mmap
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from latent_delib.errors import UserError, extra
from latent_delib.nn import rotary
from latent_delib.nn.sizes import FAMILIES, SIZES, TransformerConfig, checked, differences
from latent_delib.weights import gguf_vocabulary
from latent_delib.weights.source import Source

MAGIC = b"GGUF"
# The type of a value -> the letter that `struct` has for it.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # the other types
MOST = 1 << 22  # entries of a list; the largest vocabularies have a quarter of a million pieces
CHUNK = 1 << 22  # elements dequantised at a time; meanwhile each takes several float32
ROPE_FREQS = "rope_freqs.weight"
TABLE = "token_embd.weight"
HEAD = "output.weight"
# Our field -> the key that holds it, after the name of the architecture.
KEYS = {
    "num_layers": "block_count",
    "embed_dim": "embedding_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "ffn_dim": "feed_forward_length",
    "window": "attention.sliding_window",
    "rope_base": "rope.freq_base",
    "local_rope_base": "rope.freq_base_swa",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
SILENT = ("query_scale", "rope_scaling", "local_rope_base", "window")  # fields GGUF may omit
# llama.cpp's values where an early file of Gemma 2 has no such keys.
GEMMA2 = {"window": 4096, "attn_softcap": 50.0, "final_softcap": 30.0}
LLAMA31_SCALING = (8.0, 1.0, 4.0, 8192.0)  # of 8B and 70B, which are no known sizes here


class Info(NamedTuple):
    """Describes a tensor of the file.

    shape: in numpy's order, which is the reverse of GGUF's.
    type: ggml's type.
    num_bytes: the size of its data.
    begin: the first byte, counted from the start of the file.
    """

    shape: tuple[int, ...]
    type: Any
    num_bytes: int
    begin: int


class _Header:
    """Reads a header forwards. At the end of the file numpy raises ValueError."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.at = 0  # the next byte

    def take(self, code: str, count: int) -> np.ndarray:
        """Returns the next `count` numbers of the type that `struct` calls `code`."""
        found = np.frombuffer(self.data, "<" + code, count, self.at)
        self.at += found.nbytes
        return found

    def number(self, code: str) -> Any:
        return self.take(code, 1).item()

    def string(self) -> str:
        return self.take("B", self.number("Q")).tobytes().decode()

    def value(self) -> Any:
        """Returns a value led by its type: a string, a number, or a list of these."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        entry, count = self.number("I"), self.number("Q")
        if count > MOST:
            raise ValueError(f"a list has {count:,} entries, expected at most {MOST:,}")
        if entry == STRING:
            return [self.string() for _ in range(count)]
        return self.take(SCALARS[entry], count).tolist()

    def info(self) -> Info:
        """Returns a tensor's info, with `begin` counted from the start of all data."""
        library = _library()
        dims = self.number("I")
        if not 1 <= dims <= 4:
            raise ValueError(f"{dims} dimensions, expected 1 to 4")
        shape = tuple(self.take("Q", dims)[::-1].tolist())
        kind = library.GGMLQuantizationType(self.number("I"))
        block, block_bytes = library.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"rows of {shape[-1]}, expected a multiple of {block} ({kind.name})")
        return Info(shape, kind, math.prod(shape) // block * block_bytes, self.number("Q"))


class GGUF:
    """Holds an opened GGUF file.

    Attributes:
      metadata: key -> str, number, bool or list of these.
      tensors: name -> Info.

    Raises:
      UserError: the file is not GGUF, truncated or contradictory, or has a tensor of unknown type;
        the `gguf` library is not installed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Info] = {}
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{path}: not a GGUF file (it is empty)") from None
        magic = data[: len(MAGIC)]
        if magic != MAGIC:
            raise UserError(f"{path}: not a GGUF file; other forms are folders, so name the folder")
        _library()  # refuses here, not as damage below
        header = _Header(data)
        header.at = len(MAGIC)
        try:
            self._read(header)
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise UserError(
                f"{path}: truncated or damaged near byte {header.at} ({error})"
            ) from None

    def _read(self, header: _Header) -> None:
        version = header.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3, little-endian")
        tensor_count, key_count = header.number("Q"), header.number("Q")
        for _ in range(key_count):
            key = header.string()
            self.metadata[key] = header.value()
        for _ in range(tensor_count):
            name = header.string()
            self.tensors[name] = header.info()
        start = header.at + -header.at % int(self.metadata.get("general.alignment", 32))
        for name, info in self.tensors.items():
            begin = start + info.begin
            end = begin + info.num_bytes
            if end > len(header.data):
                raise ValueError(
                    f"{name} {info.shape} ends at byte {end}, the file has {len(header.data)}"
                )
            self.tensors[name] = info._replace(begin=begin)

    def are_same(self, one: str, other: str) -> bool:
        """Tells whether two tensors have the same shape, type and bytes."""
        a, b = self.tensors[one], self.tensors[other]
        if a._replace(begin=0) != b._replace(begin=0):
            return False
        with open(self.path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        x, y = (np.frombuffer(data, np.uint8, each.num_bytes, each.begin) for each in (a, b))
        starts = range(0, a.num_bytes, CHUNK)
        return all(np.array_equal(x[i : i + CHUNK], y[i : i + CHUNK]) for i in starts)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` returns: bfloat16 for tensors stored so, else float32."""
        is_bfloat16 = self.tensors[name].type.name == "BF16"
        return np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else np.float32)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as float32, or as bfloat16 if it is stored so."""
        library = _library()
        shape, kind, _, begin = self.tensors[name]
        block, block_bytes = library.GGML_QUANT_SIZES[kind]
        out = np.empty(math.prod(shape), self.dtype(name))
        step = max(1, CHUNK // block) * block
        for first in range(0, out.size, step):
            part = out[first : first + step]
            count = part.size // block * block_bytes
            offset = begin + first // block * block_bytes
            stored = np.fromfile(self.path, np.uint8, count, offset=offset)
            if len(stored) != count:
                raise UserError(f"{self.path}: {name} was cut off since the file was opened")
            try:
                part[:] = library.quants.dequantize(stored, kind)
            except NotImplementedError:
                raise UserError(
                    f"{self.path}: {name} is of type {kind.name}, which cannot be dequantised"
                ) from None
        return out.reshape(shape)


def _library() -> Any:
    with extra("gguf"):
        import gguf
    return gguf


def open_source(path: Path) -> Source:
    """Opens a GGUF file as a source."""
    file = GGUF(path)
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise UserError(f"{path}: is one of {parts} files; join them by `llama-gguf-split --merge`")
    config = architecture(file)
    shapes = {name: info.shape for name, info in file.tensors.items() if name != ROPE_FREQS}
    if not config.untied_head:
        shapes.pop(HEAD, None)
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
    """Returns the TransformerConfig of a file's metadata.

    The query scale, which GGUF leaves out, is taken from the known size that fits the rest. Llama
    3's scaling of rotary positions is the known one that gives the divisors of the file.

    Raises:
      UserError: a key is missing, wrong, or of a feature that is not supported.
    """
    where = str(file.path)
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: general.architecture={kind!r}, expected one of {', '.join(FAMILIES)}"
        )

    def get(key: str, type_: type, default: Any = None) -> Any:
        name = f"{kind}.{key}"
        return checked(name, file.metadata.get(name, default), type_, where)

    if get("expert_count", int, 0):
        raise UserError(f"{where}: {kind}.expert_count: mixtures of experts are not supported")
    names = {name: f"{kind}.{key}" for name, key in KEYS.items()}
    norm = "attention.layer_norm_rms_epsilon"
    if kind == "gpt2":
        names["learned_positions"] = "gpt2.context_length"
        norm = "attention.layer_norm_epsilon"
    fields = dict(FAMILIES[kind])
    if kind == "gemma2":
        fields |= GEMMA2
    for name, key in names.items():
        if key in file.metadata:
            fields[name] = file.metadata[key]
    if "layer_pattern" not in fields:
        fields.pop("window", None)
    fields.setdefault("num_kv_heads", fields.get("num_heads"))
    if kind == "gemma2" and "rope_base" in fields:  # all its layers have the same rotary positions
        fields.setdefault("local_rope_base", fields["rope_base"])
    # Stored as float32; the decimal number that it was made from has few digits.
    fields["norm_eps"] = float(f"{get(norm, float):.6g}")
    table = file.tensors.get(TABLE)
    fields["vocab_size"] = table.shape[0] if table else 1
    is_written_twice = {TABLE, HEAD} <= file.tensors.keys() and file.are_same(TABLE, HEAD)  # GPT-2
    fields["untied_head"] = HEAD in file.tensors and not is_written_twice
    # Older files have no type, or the factor under another key.
    factor = get("rope.scaling.factor", float, 0.0) or get("rope.scale_linear", float, 0.0)
    scaling = get("rope.scaling.type", str, "linear" if factor else "none")
    supported = ("none",) if kind == "gemma2" else ("none", "linear")  # not for local layers
    if scaling not in supported:
        expected = " or ".join(supported)
        raise UserError(f"{where}: {kind}.rope.scaling.type={scaling!r}, expected {expected}")
    if scaling == "linear":
        factor = factor or get("rope.scaling.factor", float)  # raises where there is none
        fields["rope_scaling"] = (factor, 1.0, 4.0, 0.0)
    config = TransformerConfig.from_dict(fields, where, names)
    rotated = get("rope.dimension_count", int, config.head_dim)
    if rotated != config.head_dim:
        expected = f"{config.head_dim}, the head dim: others are not supported"
        raise UserError(f"{where}: {kind}.rope.dimension_count={rotated}, expected {expected}")
    known = _known_size(config)
    if known is not None:
        config = dataclasses.replace(config, query_scale=known.query_scale)
    if ROPE_FREQS in file.tensors:
        config = dataclasses.replace(config, rope_scaling=_rope_scaling(file, config))
    return config


def _rope_scaling(file: GGUF, config: TransformerConfig) -> tuple[float, ...]:
    """Returns the known scaling of rotary positions that gives the divisors of a file.

    Raises:
      UserError: there is none.
    """
    divisors = file.read(ROPE_FREQS).reshape(-1)
    plain = rotary.frequencies(config.head_dim, config.rope_base)
    known = {size.rope_scaling for size in SIZES.values()} | {LLAMA31_SCALING}
    for scaling in sorted(known):
        scaled = rotary.frequencies(config.head_dim, config.rope_base, scaling)
        if divisors.shape == plain.shape and np.allclose(plain / scaled, divisors, rtol=1e-4):
            return scaling
    raise UserError(f"{file.path}: {ROPE_FREQS} is not the rotary scaling of any known size")


def _known_size(config: TransformerConfig) -> TransformerConfig | None:
    """Returns the known size that equals an architecture in all fields outside SILENT, or None."""
    for size in SIZES.values():
        told = [line for line in differences(config, size) if not line.startswith(SILENT)]
        if not told:
            return size
    return None
