"""The numbers that make a transformer: one dataclass, the families, and a table of known sizes."""

import dataclasses
import json
import re
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from latent_delib.errors import UserError

ACTIVATIONS = ("gelu", "silu")  # `nn.layers` computes them

# Fields that were added after the first decoder folders were written.
ADDED_LATER = (
    "untied_head",
    "qkv_bias",
    "other_bias",
    "layer_norm",
    "plain_mlp",
    "learned_positions",
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Holds the architecture of a decoder-only transformer.

    head_dim: H; 0 means embed_dim / num_heads.
    layer_pattern: kinds of layers, "local" or "global", repeated over all layers. A global layer
      sees all tokens before; a local one sees those less than `window` positions back.
    rope_base, local_rope_base: bases of the rotary frequencies, in global and in local layers.
    rope_scaling: scaling of global layers' frequencies, as in `rotary.frequencies`; () for none.
    query_scale: factor on the scores; 0 means head_dim ** -0.5.
    attn_softcap, final_softcap: softcaps of scores and of logits; 0 means none.
    post_norms: a norm also follows attention and MLP (Gemma 2 and 3).
    qk_norm: queries and keys are normed (Gemma 3, Qwen 3).
    norm_offset: RMSNorm multiplies by norm_offset + scale. The offset is 1 for Gemma and 0 for all
      others, so that scales are stored as in the original checkpoints.
    untied_head: logits come from a table of their own instead of the token table.
    qkv_bias: queries, keys and values have a bias (Qwen 2, GPT-2).
    other_bias: the other products of a layer have a bias (GPT-2).
    layer_norm: norms are LayerNorm with a bias instead of RMSNorm (GPT-2).
    plain_mlp: the MLP is not gated (GPT-2).
    learned_positions: number of rows of a learned table of positions, whose rows are added to the
      inputs (GPT-2); 0 means rotary positions.

    Raises:
      UserError: numbers that contradict each other; the message names the fields.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int = 0
    activation: str = "gelu"  # tanh-approximated GeLU (Gemma) or "silu" (Llama)
    layer_pattern: tuple[str, ...] = ("global",)
    window: int = 0
    rope_base: float = 10_000.0
    local_rope_base: float = 10_000.0
    rope_scaling: tuple[float, ...] = ()
    query_scale: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    scale_embeddings: bool = True
    norm_eps: float = 1e-6
    norm_offset: float = 1.0
    untied_head: bool = False
    qkv_bias: bool = False
    other_bias: bool = False
    layer_norm: bool = False
    plain_mlp: bool = False
    learned_positions: int = 0

    def __post_init__(self):
        counts = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.head_dim:
            if self.embed_dim % self.num_heads:
                raise UserError(
                    f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        for name in ("head_dim", "rope_base", "local_rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.learned_positions < 0:
            raise UserError(f"learned_positions={self.learned_positions}: expected at least 0")
        if self.head_dim % 2 and not self.learned_positions:
            raise UserError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if self.other_bias and not self.plain_mlp:
            raise UserError("other_bias=True: expected plain_mlp=True too; a gate has no bias")
        if self.activation not in ACTIVATIONS:
            expected = " or ".join(map(repr, ACTIVATIONS))
            raise UserError(f"activation={self.activation!r}: expected {expected}")
        for name in ("layer_pattern", "rope_scaling"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_scaling:
            are_numbers = all(isinstance(x, float | int) for x in self.rope_scaling)
            if len(self.rope_scaling) != 4 or not are_numbers:
                raise UserError(
                    f"rope_scaling={self.rope_scaling}: expected (factor, low, high, context) or ()"
                )
            factor, low, high, _ = self.rope_scaling
            if not (factor > 0 and low < high):
                raise UserError(
                    f"rope_scaling={self.rope_scaling}: expected factor > 0 and low < high"
                )
        kinds_are_known = all(kind in ("local", "global") for kind in self.layer_pattern)
        if not self.layer_pattern or not kinds_are_known:
            raise UserError(
                f"layer_pattern={self.layer_pattern}: expected a sequence of 'local' and 'global'"
            )
        if "local" in self.layer_pattern and self.window < 1:
            raise UserError(f"window={self.window}: local layers need at least 1")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_dim**-0.5)

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Returns for every layer whether it is local."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values.

        Fields in ADDED_LATER are left out where they are 0 or False, so that older folders and
        checkpoints keep their bytes, and with them their fingerprints.
        """
        fields = dataclasses.asdict(self)
        for name in ADDED_LATER:
            if not fields[name]:
                del fields[name]
        return json.loads(json.dumps(fields))  # lists for tuples

    @classmethod
    def from_dict(
        cls,
        fields: Mapping[str, Any],
        source: str,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> "TransformerConfig":
        """Builds an architecture from plain values, for example JSON or a config.

        Args:
          fields: values by name of field.
          source: the origin of the values, for messages.
          names: name of a field -> its name in the source, where the two differ.

        Raises:
          UserError: unknown or missing fields, values of the wrong type, or numbers that contradict
            each other.
        """
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: architecture is {fields!r}, expected an object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise UserError(f"{source}: unknown fields {unknown}, expected some of {sorted(known)}")
        for name, field in known.items():
            if field.default is dataclasses.MISSING and name not in fields:
                raise UserError(f"{source}: {names.get(name, name)} is missing")
        values = {}
        for name, value in fields.items():
            values[name] = checked(names.get(name, name), value, known[name].type, source)
        try:
            return cls(**values)
        except UserError as error:
            message = re.sub(r"\w+(?==)", lambda name: names.get(name[0], name[0]), str(error))
            raise UserError(f"{source}: {message}") from None


def checked(name: str, value: Any, kind: Any, source: str) -> Any:
    """Returns a value that was read from a source, in the type of its field.

    Raises:
      UserError: a value of the wrong type, or a number that is not within +-2**31.
    """
    accepted = {
        float: (float, int),
        tuple[str, ...]: (tuple, list),
        tuple[float, ...]: (tuple, list),
    }
    if not isinstance(value, accepted.get(kind, kind)) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{source}: {name}={reprlib.repr(value)}, expected {kind.__name__}")
    if kind in (int, float) and not abs(value) < 2**31:  # NaN is not below it either
        raise UserError(f"{source}: {name}={reprlib.repr(value)}, expected a number below 2**31")
    return float(value) if kind is float else value


def differences(found: TransformerConfig, wanted: TransformerConfig) -> list[str]:
    """Lists the fields in which an architecture differs from the one wanted, with both values.

    Rows of the token table beyond the wanted vocabulary are padding, and are not listed: some
    publishers store more of them than others.
    """
    lines = []
    for field in dataclasses.fields(found):
        here = getattr(found, field.name)
        there = getattr(wanted, field.name)
        is_padding = field.name == "vocab_size" and here > there
        if here != there and not is_padding:
            lines.append(f"{field.name}={here}, expected {there}")
    return lines


# How the layers of a family are built. The defaults of TransformerConfig are Gemma's.
_PLAIN: dict[str, Any] = dict(activation="silu", scale_embeddings=False, norm_offset=0.0)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": dict(layer_pattern=("local", "global"), post_norms=True),
    "gemma3": dict(layer_pattern=("local",) * 5 + ("global",), post_norms=True, qk_norm=True),
    "llama": _PLAIN,
    "qwen2": _PLAIN | dict(qkv_bias=True),
    "qwen3": _PLAIN | dict(qk_norm=True),
    "gpt2": dict(
        scale_embeddings=False,
        norm_offset=0.0,
        qkv_bias=True,
        other_bias=True,
        layer_norm=True,
        plain_mlp=True,
    ),
}
# The fields that tell families apart. They decide how tensors are named and which class is chosen.
MARKS = (
    "scale_embeddings",
    "post_norms",
    "qk_norm",
    "qkv_bias",
    "other_bias",
    "layer_norm",
    "plain_mlp",
)


def family(config: TransformerConfig) -> str:
    """Returns the name of the family with the same MARKS as an architecture."""
    found = _marks(vars(config))
    for name, fields in FAMILIES.items():
        if _marks(fields) == found:
            return name
    raise UserError(f"no family has {found}")


def _marks(fields: Mapping[str, Any]) -> dict[str, bool]:
    return {mark: fields.get(mark, getattr(TransformerConfig, mark)) for mark in MARKS}


# The numbers that the members of a family share.
_GEMMA = FAMILIES["gemma"]
_GEMMA2 = FAMILIES["gemma2"] | dict(window=4096, attn_softcap=50.0, final_softcap=30.0)
_GEMMA3 = FAMILIES["gemma3"] | dict(rope_base=1e6, query_scale=256**-0.5)
_GEMMA3_LARGE = _GEMMA3 | dict(window=1024, rope_scaling=(8.0, 1.0, 4.0, 0.0))
_LLAMA = FAMILIES["llama"] | dict(norm_eps=1e-5)
_LLAMA3 = _LLAMA | dict(rope_base=5e5)
_LLAMA3_BY_32 = _LLAMA3 | dict(rope_scaling=(32.0, 1.0, 4.0, 8192.0))
_QWEN2 = FAMILIES["qwen2"] | dict(rope_base=1e6)
_QWEN3 = FAMILIES["qwen3"] | dict(rope_base=1e6)
_GPT2 = FAMILIES["gpt2"] | dict(norm_eps=1e-5, learned_positions=1024)


def _size(family: dict[str, Any], *numbers: int, **fields: Any) -> TransformerConfig:
    layers, D, N, K, H, F, V = numbers
    return TransformerConfig(layers, D, N, K, F, V, H, **(family | fields))


# A new member of a family is one entry of numbers:     layers, D, N, K, H, F, V
SIZES: dict[str, TransformerConfig] = {
    "gemma_2b": _size(_GEMMA, 18, 2048, 8, 1, 256, 16384, 256_000),
    "gemma_7b": _size(_GEMMA, 28, 3072, 16, 16, 256, 24576, 256_000),
    "gemma2_2b": _size(_GEMMA2, 26, 2304, 8, 4, 256, 9216, 256_000),
    "gemma2_9b": _size(_GEMMA2, 42, 3584, 16, 8, 256, 14336, 256_000),
    "gemma2_27b": _size(_GEMMA2, 46, 4608, 32, 16, 128, 36864, 256_000, query_scale=144**-0.5),
    "gemma3_270m": _size(_GEMMA3, 18, 640, 4, 1, 256, 2048, 262_144, window=512),
    "gemma3_1b": _size(_GEMMA3, 26, 1152, 4, 1, 256, 6912, 262_144, window=512),
    "gemma3_4b": _size(_GEMMA3_LARGE, 34, 2560, 8, 4, 256, 10240, 262_144),
    "gemma3_27b": _size(
        _GEMMA3_LARGE, 62, 5376, 32, 16, 128, 21504, 262_144, query_scale=168**-0.5
    ),
    "smollm2_135m": _size(_LLAMA, 30, 576, 9, 3, 64, 1536, 49_152, rope_base=1e5),
    "smollm2_360m": _size(_LLAMA, 32, 960, 15, 5, 64, 2560, 49_152, rope_base=1e5),
    "smollm2_1.7b": _size(_LLAMA, 24, 2048, 32, 32, 64, 8192, 49_152, rope_base=1.3e5),
    "llama3.2_1b": _size(_LLAMA3_BY_32, 16, 2048, 32, 8, 64, 8192, 128_256),
    "llama3_8b": _size(_LLAMA3, 32, 4096, 32, 8, 128, 14336, 128_256, untied_head=True),
    "qwen2.5_0.5b": _size(_QWEN2, 24, 896, 14, 2, 64, 4864, 151_936),
    "qwen2.5_1.5b": _size(_QWEN2, 28, 1536, 12, 2, 128, 8960, 151_936),
    "qwen2.5_7b": _size(_QWEN2, 28, 3584, 28, 4, 128, 18944, 152_064, untied_head=True),
    "qwen3_0.6b": _size(_QWEN3, 28, 1024, 16, 8, 128, 3072, 151_936),
    "qwen3_1.7b": _size(_QWEN3, 28, 2048, 16, 8, 128, 6144, 151_936),
    "gpt2": _size(_GPT2, 12, 768, 12, 12, 64, 3072, 50_257),
    # The packaged decoder: two cores train it on 1,000 tokens per parameter in about an hour.
    "gemma2_160k": _size(_GEMMA2, 2, 64, 4, 2, 16, 192, 1024, window=64),
    # Smaller ones, to see how the gain grows with the decoder (protocols lab_58k and lab_23k).
    "gemma2_58k": _size(_GEMMA2, 2, 32, 2, 1, 16, 96, 1024, window=64),
    "gemma2_23k": _size(_GEMMA2, 2, 16, 1, 1, 16, 48, 1024, window=64),
    "gemma2_3m": _size(_GEMMA2, 4, 192, 4, 2, 64, 768, 4096, window=128),
    # Protocol lab_gpu of configs/paper: its text has some 840 tokens for each parameter.
    "gemma2_30m": _size(_GEMMA2, 8, 512, 8, 4, 64, 1792, 4096, window=256),
    # For tests: most features of the architecture in about 50,000 parameters.
    "gemma2_test": _size(_GEMMA2, 4, 32, 4, 2, 16, 48, 97, window=5, query_scale=0.2),
}
