"""The parts of one transformer layer.

Parameters are created in float32, and cast to the dtype of the input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention import primitive
from latent_delib.nn.attention.cards import LEAST
from latent_delib.nn.attention.forms import FEW, attend
from latent_delib.nn.attention.primitive import Bounds, Keys
from latent_delib.nn.products import einsum, matmul
from latent_delib.nn.sizes import TransformerConfig

ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}

Axes = tuple[str | None, ...]

# The logical axes of every leaf of a decoder or coprocessor, by its name.
_LEAVES: dict[str, Axes] = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "q": ("layers", "embed", "heads", None),
    "k": ("layers", "embed", "heads", None),
    "v": ("layers", "embed", "heads", None),
    "q_bias": ("layers", "heads", None),
    "k_bias": ("layers", "heads", None),
    "v_bias": ("layers", "heads", None),
    "out": ("layers", "heads", None, "embed"),
    "out_bias": ("layers", None),
    "gate": ("layers", "embed", "ffn"),
    "up": ("layers", "embed", "ffn"),
    "up_bias": ("layers", "ffn"),
    "down": ("layers", "ffn", "embed"),
    "down_bias": ("layers", None),
    "scale": (None, None),
    "bias": (None, None),
    "positions": (None, "embed"),
}
# The matrices of a layer: how many of their axes after "layers" are the input's.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


def _adapter_axes() -> dict[str, Axes]:
    """Returns the axes of low-rank adapters (`delib.lora`), split as their matrices are."""
    found: dict[str, Axes] = {}
    for name, count in INPUT_AXES.items():
        axes = _LEAVES[name]
        found[f"{name}_a"] = (*axes[: 1 + count], None)
        found[f"{name}_b"] = ("layers", None, *axes[1 + count :])
    return found


PARAM_AXES = _LEAVES | _adapter_axes()

TRACES = ("batch", "traces", None, None)  # of activations [B, M, S, D]
HEADS = ("batch", "traces", None, "heads", None)
QUERIES = ("batch", "traces", None)
TEXT = ("batch", None, "heads", None)  # a prefix
FEATURES = ("batch", "traces", None, "ffn")


def contracted(x_axes: Axes, w_axes: Axes, y_axes: Axes) -> int:
    """Returns how many axes a product of x with w sums over."""
    return (len(x_axes) + len(w_axes) - len(y_axes)) // 2


class Partition(NamedTuple):
    """Says how work is divided over devices, by the names of logical axes.

    It is all that `nn` and `delib` know of a mesh.

    constrain(x, axes): returns an activation, placed where it belongs.
    gather(w, axes): returns a table of vectors, whole along the width.
    product(x, w, x_axes, w_axes, y_axes): returns activations times a weight that is split
      (`products.matmul`).
    split(function, in_axes, out_axes): returns `function` as run on each device's own part.
    row_shards: parts into which the rows of a batch are split.
    shared_memory: bytes that one program of the GPU's kernels may have on each device.
    """

    constrain: Callable[[jax.Array, Axes], jax.Array] = lambda x, axes: x
    gather: Callable[[jax.Array, Axes], jax.Array] = lambda w, axes: w
    product: Callable[..., jax.Array] = lambda x, w, *axes: matmul(x, w, contracted(*axes))
    split: Callable[[Callable, Any, Any], Callable] = lambda function, in_axes, out_axes: function
    row_shards: int = 1
    shared_memory: int = LEAST


WHOLE = Partition()  # for one device


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(fan_in**-0.5)


class RMSNorm(nn.Module):
    """Computes x / rms(x) * (offset + scale) over the last axis (Zhang and Sennrich 2019).

    It computes in float32. Gemma stores what it adds to an offset of 1; with an offset of 0 the
    scale is the factor itself.
    """

    eps: float
    offset: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + self.eps)
        # By einsum, so that the gradient is a product too: XLA takes eight times as long on a CPU
        # to add up the rows of x * y.
        normed = einsum("...D,...->...D", x32, inverse)
        return (normed * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


def normed(c: TransformerConfig, name: str, x: jax.Array) -> jax.Array:
    """Computes a layer's norm of x [..., D], in float32; its parameters lie under `name`."""
    if c.layer_norm:
        return nn.LayerNorm(c.norm_eps, x.dtype, use_fast_variance=False, name=name)(x)
    return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)


class Attention(nn.Module):
    """Computes grouped-query attention.

    Attention weights are sown into the collection "intermediates", and computed only where that is
    mutable.
    """

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE
    few: int = FEW

    @nn.compact
    def __call__(
        self,
        x_BMSD: jax.Array,
        rope_2BMSH: jax.Array | None,
        bounds: Bounds,
        prefix: Keys | None,
        given: Keys | None,
    ) -> tuple[jax.Array, Keys]:
        """Attends to a prefix and to the own group.

        Args:
          x_BMSD: normed inputs.
          rope_2BMSH: the `rotary.table` of their positions; None where these are learned.
          bounds: the visible ranges.
          prefix: keys and values [B, T, K, H] that all groups of a row share, or None.
          given: keys and values [B, M, U - S, K, H], keys rotated, of the group's tokens before
            these; or None.

        Returns:
          The output [B, M, S, D], and all own keys and values [B, M, U, K, H].
        """
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            w_DNH = self.param(name, _normal(D), (D, heads, H)).astype(x_BMSD.dtype)
            y = self.partition.product(x_BMSD, w_DNH, TRACES, PARAM_AXES[name][1:], HEADS)
            if c.qkv_bias:
                y += self.param(f"{name}_bias", nn.initializers.zeros, (heads, H)).astype(y.dtype)
            return self.partition.constrain(y, HEADS)

        q_BMSNH = project("q", N)
        k_BMSKH = project("k", K)
        v_BMSKH = project("v", K)
        if c.qk_norm:
            q_BMSNH = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(q_BMSNH)
            k_BMSKH = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(k_BMSKH)
        if rope_2BMSH is not None:
            q_BMSNH = rotary.rotate(q_BMSNH, rope_2BMSH)
            k_BMSKH = rotary.rotate(k_BMSKH, rope_2BMSH)
        k_BMUKH, v_BMUKH = k_BMSKH, v_BMSKH
        if given is not None:
            k_BMUKH = jnp.concatenate([given[0], k_BMSKH], axis=2)
            v_BMUKH = jnp.concatenate([given[1], v_BMSKH], axis=2)
        if self.is_mutable_collection("intermediates"):
            seen = primitive.weights(
                q_BMSNH, k_BMUKH, prefix, bounds, scale=c.query_scale, softcap=c.attn_softcap
            )
            self.sow("intermediates", "weights", seen)
        form = partial(
            attend,
            scale=c.query_scale,
            softcap=c.attn_softcap,
            form=self.form,
            few=self.few,
            shared_memory=self.partition.shared_memory,
        )
        in_axes = (HEADS, HEADS, HEADS, prefix and (TEXT, TEXT), Bounds(QUERIES, QUERIES, QUERIES))
        attention = self.partition.split(form, in_axes, HEADS)
        out_BMSNH = attention(q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds)
        w_NHD = self.param("out", _normal(N * H), (N, H, D)).astype(x_BMSD.dtype)
        out_BMSD = self.partition.product(out_BMSNH, w_NHD, HEADS, PARAM_AXES["out"][1:], TRACES)
        if c.other_bias:
            out_BMSD += self.param("out_bias", nn.initializers.zeros, (D,)).astype(out_BMSD.dtype)
        return out_BMSD, (k_BMUKH, v_BMUKH)


class MLP(nn.Module):
    """Computes a feed-forward layer, [B, M, S, D] to the same; gated ones are Shazeer's (2020)."""

    config: TransformerConfig
    partition: Partition = WHOLE

    @nn.compact
    def __call__(self, x_BMSD):
        c = self.config
        D, F = c.embed_dim, c.ffn_dim
        activation = ACTIVATIONS[c.activation]

        def product(name: str, x: jax.Array, axes: tuple[Axes, Axes], shape: tuple) -> jax.Array:
            w = self.param(name, _normal(shape[0]), shape).astype(x.dtype)
            y = self.partition.product(x, w, axes[0], PARAM_AXES[name][1:], axes[1])
            if c.other_bias:
                y += self.param(f"{name}_bias", nn.initializers.zeros, shape[1:]).astype(y.dtype)
            return y

        def widen(name: str) -> jax.Array:
            return product(name, x_BMSD, (TRACES, FEATURES), (D, F))

        if c.plain_mlp:
            hidden_BMSF = activation(widen("up"))
        else:
            hidden_BMSF = activation(widen("gate")) * widen("up")
        hidden_BMSF = self.partition.constrain(hidden_BMSF, FEATURES)
        return product("down", hidden_BMSF, (FEATURES, TRACES), (F, D))


class Block(nn.Module):
    """Computes one layer: attention and MLP, each normed before.

    Each is also normed after it where the family does so (Gemma 2 and 3).

    ropes, ranges: rotary tables, if any, and bounds, of global layers and of local ones; `is_local`
      picks.
    """

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE
    few: int = FEW

    @nn.compact
    def __call__(self, x_BMSD, is_local, prefix, given, ropes, ranges):
        c = self.config
        norm = partial(normed, c)
        # Window and rotary base are data: one layer body serves both kinds.
        kind = partial(jax.lax.dynamic_index_in_dim, index=is_local, keepdims=False)
        rope_2BMSH, bounds = jax.tree.map(kind, (ropes, ranges))
        attention = Attention(c, self.form, self.partition, self.few, name="attn")
        x_normed = norm("pre_attn_norm", x_BMSD)
        attended, kv = attention(x_normed, rope_2BMSH, bounds, prefix, given)
        x_BMSD += norm("post_attn_norm", attended) if c.post_norms else attended
        fed = MLP(c, self.partition, name="mlp")(norm("pre_mlp_norm", x_BMSD))
        x_BMSD += norm("post_mlp_norm", fed) if c.post_norms else fed
        return self.partition.constrain(x_BMSD, TRACES), kv
