"""GGUF files (version 2 and 3, little-endian), as llama.cpp's converter writes them.

The `gguf` library dequantises blocks. Its reader is not used: it trusts every count in a header, so that one damaged
length of a list makes it loop for ever. Layout (llama.cpp's gguf.md): magic, version, counts; keys with typed values;
tensor infos; aligned data.
"""

import dataclasses
import math
import mmap
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn import rotary
from latent_delib.nn.sizes import FAMILIES, SIZES, TransformerConfig, differences
from latent_delib.weights import gguf_vocabulary
from latent_delib.weights.source import Source

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
STRING, ARRAY = 8, 9
MOST = 1 << 22  # entries of a list: the largest vocabularies have a quarter of a million pieces
CHUNK = 1 << 22  # elements dequantised at a time: what is in flight is float32, several times over
ROPE_FREQS = "rope_freqs.weight"
SILENT = ("query_scale", "rope_scaling", "local_rope_base", "window")  # fields that GGUF does not tell


class Info(NamedTuple):
    """Describes a tensor: its shape as numpy has it, ggml type, blocks, and the bytes of a block and before the first.

    begin: counted from the start of the file.
    """

    shape: tuple[int, ...]
    type: Any
    blocks: int
    block_bytes: int
    begin: int


class _Header:
    """Reads a header forwards and never past the end of its file."""

    def __init__(self, data: mmap.mmap, where: str):
        self.data = data
        self.where = where
        self.at = 0  # the next byte

    def make_room(self, count: int, size: int) -> None:
        """Raises UserError for a count of entries, each of at least `size` bytes, that the file cannot hold."""
        left = len(self.data) - self.at
        if count > MOST or count * size > left:
            raise UserError(
                f"{self.where}: truncated or damaged: {count} x {size} bytes are to follow byte {self.at}, {left} do"
            )

    def numbers(self, code: str, count: int) -> list[Any]:
        """Returns the next `count` numbers of the type that `struct` calls `code`."""
        dtype = np.dtype("<" + code)
        self.make_room(count, dtype.itemsize)
        found = np.frombuffer(self.data, dtype, count, self.at)
        self.at += found.nbytes
        return found.tolist()

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def bytes(self, count: int) -> bytes:
        self.make_room(count, 1)
        self.at += count
        return self.data[self.at - count : self.at]

    def string(self) -> str:
        try:
            return str(self.bytes(self.number("Q")), "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.where}: damaged: a string before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """Returns a value of a type: a string, a number, or a list of these."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == ARRAY:
            entry, count = self.number("I"), self.number("Q")
            if entry == STRING:
                self.make_room(count, 8)
                return [self.string() for _ in range(count)]
            if entry in SCALARS:
                return self.numbers(SCALARS[entry], count)
            kind = entry
        raise UserError(f"{self.where}: damaged: value type {kind} before byte {self.at}")


class GGUF:
    """Holds an opened GGUF file. metadata: key -> str, number, bool or list of these. tensors: name -> Info.

    Raises:
      UserError: not GGUF, truncated, contradictory, or with a tensor of unknown type.
    """

    def __init__(self, path: Path):
        self.path = path
        where = str(path)
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{where}: not a GGUF file (it is empty)") from None
        header = _Header(data, where)
        magic = header.bytes(len(MAGIC))
        if magic != MAGIC:
            raise UserError(f"{where}: not a GGUF file (begins with {magic!r})")
        version = header.number("I")
        if version not in (2, 3):
            raise UserError(f"{where}: GGUF version {version}, expected 2 or 3, little-endian")
        tensor_count, key_count = header.number("Q"), header.number("Q")
        header.make_room(tensor_count, 24)
        header.make_room(key_count, 13)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = header.string()
            self.metadata[key] = header.value(header.number("I"))
        self.tensors: dict[str, Info] = {}
        for _ in range(tensor_count):
            name = header.string()
            if name in self.tensors:
                raise UserError(f"{where}: {name} is there twice")
            self.tensors[name] = _info(header, name)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise UserError(f"{where}: general.alignment={alignment!r}, expected a power of two")
        start = -(-header.at // alignment) * alignment
        for name, info in self.tensors.items():
            begin = start + info.begin
            end = begin + info.blocks * info.block_bytes
            if end > len(data):
                raise UserError(
                    f"{where}: truncated or damaged: {name} {info.shape} ends at byte {end}, the file has {len(data)}"
                )
            self.tensors[name] = info._replace(begin=begin)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of what `read` returns: bfloat16 as stored, float32 for all else."""
        return np.dtype(ml_dtypes.bfloat16 if self.tensors[name].type.name == "BF16" else np.float32)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, dequantised to float32; bfloat16 stays what it is."""
        from gguf.quants import dequantize

        shape, kind, blocks, block_bytes, begin = self.tensors[name]
        size = math.prod(shape)
        out = np.empty(size, self.dtype(name))
        block = size // max(blocks, 1)
        step = max(1, CHUNK // max(block, 1))
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            count = (last - first) * block_bytes
            stored = np.fromfile(self.path, np.uint8, count, offset=begin + first * block_bytes)
            if len(stored) != count:
                raise UserError(f"{self.path}: {name} was cut off since the file was opened")
            try:
                out[first * block : last * block] = dequantize(stored, kind)
            except NotImplementedError:
                raise UserError(f"{self.path}: {name} is of type {kind.name}, which cannot be dequantised") from None
        return out.reshape(shape)


def _info(header: _Header, name: str) -> Info:
    """Reads a tensor's info, with `begin` counted from the start of all data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    dims = header.number("I")
    if not 1 <= dims <= 4:
        raise UserError(f"{header.where}: {name} has {dims} dimensions, expected 1 to 4")
    shape = tuple(reversed(header.numbers("Q", dims)))
    code = header.number("I")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise UserError(f"{header.where}: {name} is of the unknown type {code}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise UserError(f"{header.where}: {name} has rows of {shape[-1]}, expected a multiple of {block} ({kind.name})")
    return Info(shape, kind, math.prod(shape) // block, block_bytes, header.number("Q"))


def open_source(path: Path) -> Source:
    """Opens a GGUF file as a source."""
    file = GGUF(path)
    config = architecture(file)
    shapes = {name: info.shape for name, info in file.tensors.items() if name != ROPE_FREQS}
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
    """Returns the TransformerConfig of a file's metadata; what GGUF leaves out is the known size's that fits the rest.

    Raises:
      UserError: a key that is missing, wrong, or of a feature that is not known here.
    """
    where = str(file.path)
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: general.architecture={kind!r}, expected one of {', '.join(FAMILIES)}")

    def get(key: str, type_: type, default: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{key}", default)
        if type(value) is not type_:
            raise UserError(f"{where}: {kind}.{key}={value!r}, expected {type_.__name__}")
        return value

    heads, width = get("attention.head_count", int), get("embedding_length", int)
    if heads < 1:
        raise UserError(f"{where}: {kind}.attention.head_count={heads}, expected at least 1")
    experts = get("expert_count", int, 0)
    if experts:
        raise UserError(f"{where}: {kind}.expert_count={experts}, mixtures of experts are not known here")
    fields = FAMILIES[kind] | dict(
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
        attn_softcap=get("attn_logit_softcapping", float, 0.0),
        final_softcap=get("final_logit_softcapping", float, 0.0),
        untied_head="output.weight" in file.tensors,
    )
    if "layer_pattern" in fields:
        fields["window"] = get("attention.sliding_window", int)
    scaling = get("rope.scaling.type", str, "none")
    if scaling == "linear":
        fields["rope_scaling"] = (get("rope.scaling.factor", float), 1.0, 4.0, 0.0)
    elif scaling != "none":
        raise UserError(f"{where}: {kind}.rope.scaling.type={scaling!r}, expected none or linear")
    config = TransformerConfig.from_dict(fields, where)
    known = _known_size(config)
    if known is not None:
        config = dataclasses.replace(config, query_scale=known.query_scale)
    if ROPE_FREQS in file.tensors:  # Llama 3's scaling, as the divisors of frequencies
        config = dataclasses.replace(config, rope_scaling=known.rope_scaling if known else ())
        divisors = file.read(ROPE_FREQS).reshape(-1)
        plain = rotary.frequencies(config.head_dim, config.rope_base)
        scaled = rotary.frequencies(config.head_dim, config.rope_base, config.rope_scaling)
        if divisors.shape != plain.shape or not np.allclose(plain / scaled, divisors, rtol=1e-4):
            raise UserError(f"{where}: {ROPE_FREQS} is not the rotary scaling of any known size")
    return config


def _known_size(config: TransformerConfig) -> TransformerConfig | None:
    """Returns the known size that has an architecture's numbers in every field that GGUF tells."""
    for size in SIZES.values():
        told = [line for line in differences(config, size) if not line.startswith(SILENT)]
        if not told:
            return size
    return None
