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
    embed_dim / num_heads, `query_scale` 0 means head_dim ** -0.5.

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
    query_scale: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    scale_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.head_dim:
            if self.embed_dim % self.num_heads:
                raise UserError(f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}")
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim}: rotary positions need an even number")
        if self.activation not in ("gelu", "silu"):
            raise UserError(f"activation={self.activation!r}: expected 'gelu' or 'silu'")
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
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
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(f"{source}: unknown fields {unknown}, expected some of {sorted(known)}")
        if missing := sorted(required - set(fields)):
            raise UserError(f"{source}: missing fields {missing}")
        accepted = {float: (float, int), tuple[str, ...]: (tuple, list)}
        for name, value in fields.items():
            kind = known[name].type
            if not isinstance(value, accepted.get(kind, kind)):
                raise UserError(f"{source}: {name}={value!r}, expected {kind.__name__}")
        try:
            return cls(**{name: tuple(v) if name == "layer_pattern" else v for name, v in fields.items()})
        except UserError as error:
            raise UserError(f"{source}: {error}") from None


def _gemma2(num_layers: int, embed_dim: int, num_heads: int, num_kv_heads: int, ffn_dim: int, **fields: Any):
    return TransformerConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn_dim=ffn_dim,
        **dict(
            vocab_size=256_000,
            head_dim=256,
            layer_pattern=("local", "global"),
            window=4096,
            attn_softcap=50.0,
            final_softcap=30.0,
            post_norms=True,
        )
        | fields,
    )


# A new member of a family is one entry of numbers.
SIZES: dict[str, TransformerConfig] = {
    "gemma2_2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma2_9b": _gemma2(42, 3584, 16, 8, 14336),
    # The packaged decoder: the Gemma 2 architecture, small enough to ship and to train on a laptop.
    "gemma2_3m": _gemma2(4, 192, 4, 2, 768, vocab_size=4096, head_dim=64, window=128),
    # For tests: every feature of the architecture in a few thousand parameters.
    "gemma2_test": _gemma2(4, 32, 4, 2, 48, vocab_size=97, head_dim=16, window=5, query_scale=0.2),
}
