"""The numbers that make a transformer: one dataclass, and a table of known sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from latent_delib.errors import UserError


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a decoder-only transformer with tied embeddings.

    A layer is local (sees `window` positions back, rotary base `local_rope_base`) or global (sees everything,
    `rope_base`); `layer_pattern` is repeated over the layers. A softcap of 0 means none. `head_dim` 0 means
    embed_dim / num_heads, `query_scale` 0 means head_dim ** -0.5. Norms multiply by `norm_offset` + scale: 1 in Gemma,
    0 elsewhere, so that stored scales are the makers' own. `rope_scaling` of global layers is () for none or
    (factor, low, high, context): see `rotary.frequencies`.

    Raises:
      UserError: numbers that do not fit together, named by field.
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

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.head_dim:
            if self.embed_dim % self.num_heads:
                raise UserError(f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}")
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        for name in ("head_dim", "rope_base", "local_rope_base", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if self.activation not in ("gelu", "silu"):
            raise UserError(f"activation={self.activation!r}: expected 'gelu' or 'silu'")
        for name in ("layer_pattern", "rope_scaling"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rope_scaling:
            if len(self.rope_scaling) != 4 or not all(isinstance(x, float | int) for x in self.rope_scaling):
                raise UserError(f"rope_scaling={self.rope_scaling}: expected (factor, low, high, context) or ()")
            factor, low, high, _ = self.rope_scaling
            if not (factor > 0 and low < high):
                raise UserError(f"rope_scaling={self.rope_scaling}: expected factor > 0 and low < high")
        if not self.layer_pattern or set(self.layer_pattern) - {"local", "global"}:
            raise UserError(f"layer_pattern={self.layer_pattern}: expected a sequence of 'local' and 'global'")
        if "local" in self.layer_pattern and self.window < 1:
            raise UserError(f"window={self.window}: local layers need at least 1")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_dim**-0.5)

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For every layer, whether it is local."""
        pattern = self.layer_pattern
        return tuple(pattern[i % len(pattern)] == "local" for i in range(self.num_layers))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str) -> "TransformerConfig":
        """Builds from plain values, for example JSON or a config; `source` is named when a field is wrong."""
        if not isinstance(fields, Mapping):
            raise UserError(f"{source}: architecture is {fields!r}, expected an object")
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(f"{source}: unknown fields {unknown}, expected some of {sorted(known)}")
        if missing := sorted(required - set(fields)):
            raise UserError(f"{source}: missing fields {missing}")
        accepted = {float: (float, int), tuple[str, ...]: (tuple, list), tuple[float, ...]: (tuple, list)}
        fields = dict(fields)
        for name, value in fields.items():
            kind = known[name].type
            if not isinstance(value, accepted.get(kind, kind)) or isinstance(value, bool) != (kind is bool):
                raise UserError(f"{source}: {name}={value!r}, expected {kind.__name__}")
            if kind in (int, float) and not abs(value) < 2**31:  # what int32 holds; NaN is not below it either
                raise UserError(f"{source}: {name}={value!r}, expected a number below 2**31")
            fields[name] = float(value) if kind is float else value
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def differences(found: TransformerConfig, wanted: TransformerConfig) -> list[str]:
    """The fields in which an architecture is not the one wanted, each with both values.

    Rows of the token table beyond the wanted vocabulary are padding: some makers store more of them than others.
    """
    pairs = {f.name: (getattr(found, f.name), getattr(wanted, f.name)) for f in dataclasses.fields(found)}
    if found.vocab_size >= wanted.vocab_size:
        del pairs["vocab_size"]
    return [f"{name}={ours}, expected {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]


def _numbers(
    num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, ffn_dim: int, vocab_size: int
) -> dict[str, Any]:
    return dict(locals())


# What the members of a family share; a later family adds to an earlier one.
_GEMMA: dict[str, Any] = {}  # the defaults of TransformerConfig are Gemma's
_GEMMA2 = dict(layer_pattern=("local", "global"), window=4096, attn_softcap=50.0, final_softcap=30.0, post_norms=True)
_GEMMA3 = dict(
    layer_pattern=("local",) * 5 + ("global",), rope_base=1e6, query_scale=256**-0.5, post_norms=True, qk_norm=True
)
_LLAMA = dict(activation="silu", scale_embeddings=False, norm_offset=0.0, norm_eps=1e-5)
_QWEN3 = _LLAMA | dict(qk_norm=True, rope_base=1e6, norm_eps=1e-6)


def _size(family: dict[str, Any], *numbers: int, **fields: Any) -> TransformerConfig:
    return TransformerConfig(**(_numbers(*numbers) | family | fields))


# A new member of a family is one entry of numbers:     layers, D, N, K, H, F, V
SIZES: dict[str, TransformerConfig] = {
    "gemma_2b": _size(_GEMMA, 18, 2048, 8, 1, 256, 16384, 256_000),
    "gemma_7b": _size(_GEMMA, 28, 3072, 16, 16, 256, 24576, 256_000),
    "gemma2_2b": _size(_GEMMA2, 26, 2304, 8, 4, 256, 9216, 256_000),
    "gemma2_9b": _size(_GEMMA2, 42, 3584, 16, 8, 256, 14336, 256_000),
    "gemma2_27b": _size(_GEMMA2, 46, 4608, 32, 16, 128, 36864, 256_000, query_scale=144**-0.5),
    "gemma3_270m": _size(_GEMMA3, 18, 640, 4, 1, 256, 2048, 262_144, window=512),
    "gemma3_1b": _size(_GEMMA3, 26, 1152, 4, 1, 256, 6912, 262_144, window=512),
    "gemma3_4b": _size(_GEMMA3, 34, 2560, 8, 4, 256, 10240, 262_144, window=1024, rope_scaling=(8.0, 1.0, 4.0, 0.0)),
    "gemma3_27b": _size(
        *(_GEMMA3, 62, 5376, 32, 16, 128, 21504, 262_144),
        **dict(window=1024, rope_scaling=(8.0, 1.0, 4.0, 0.0), query_scale=168**-0.5),
    ),
    "smollm2_135m": _size(_LLAMA, 30, 576, 9, 3, 64, 1536, 49_152, rope_base=1e5),
    "smollm2_360m": _size(_LLAMA, 32, 960, 15, 5, 64, 2560, 49_152, rope_base=1e5),
    "smollm2_1.7b": _size(_LLAMA, 24, 2048, 32, 32, 64, 8192, 49_152, rope_base=1.3e5),
    "llama3.2_1b": _size(
        _LLAMA, 16, 2048, 32, 8, 64, 8192, 128_256, rope_base=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192.0)
    ),
    "qwen3_0.6b": _size(_QWEN3, 28, 1024, 16, 8, 128, 3072, 151_936),
    "qwen3_1.7b": _size(_QWEN3, 28, 2048, 16, 8, 128, 6144, 151_936),
    # The packaged decoder: the Gemma 2 architecture, small enough to ship and to train on a laptop.
    "gemma2_3m": _size(_GEMMA2, 4, 192, 4, 2, 64, 768, 4096, window=128),
    # Protocol a_gpu of configs/paper: the same family at a size that the mixture and minutes of a GPU can train.
    "gemma2_49m": _size(_GEMMA2, 12, 512, 8, 4, 64, 2048, 4096, window=256),
    # For tests: every feature of the architecture in a few thousand parameters.
    "gemma2_test": _size(_GEMMA2, 4, 32, 4, 2, 16, 48, 97, window=5, query_scale=0.2),
}
