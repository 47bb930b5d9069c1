"""The parts of one transformer layer.

Parameters are created in float32, and cast to the dtype of the input.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention import primitive
from latent_delib.nn.attention.blocks import LEAST
from latent_delib.nn.attention.forms import attend
from latent_delib.nn.attention.primitive import Bounds, Keys
from latent_delib.nn.products import einsum, matmul
from latent_delib.nn.sizes import TransformerConfig

ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}

Axes = tuple[str | None, ...]

# The logical axes of every leaf that a decoder can have, by its name. `delib.methods.param_axes`
# adds the leaves that only coprocessors have.
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
# Matrix of a layer -> how many of its axes after "layers" belong to the input.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}


def _adapter_axes() -> dict[str, Axes]:
    """Returns the axes of low-rank adapters (`delib.lora`), which are split like their matrices."""
    found: dict[str, Axes] = {}
    for name, count in INPUT_AXES.items():
        axes = _LEAVES[name]
        found[f"{name}_a"] = (*axes[: 1 + count], None)
        found[f"{name}_b"] = ("layers", None, *axes[1 + count :])
    return found


PARAM_AXES = _LEAVES | _adapter_axes()

# Logical axes of activations.
TRACES = ("batch", "traces", None, None)  # [B, M, S, D]
HEADS = ("batch", "traces", None, "heads", None)
QUERIES = ("batch", "traces", None)
TEXT = ("batch", None, "heads", None)  # a prefix
FEATURES = ("batch", "traces", None, "ffn")
# Attention of at most this many queries per row uses the reference: its scores fit in memory, and
# no other form is faster.
FEW = 16


def contracted(x_axes: Axes, w_axes: Axes, y_axes: Axes) -> int:
    """Returns how many axes a product of x with w sums over: those of x and w that y lacks."""
    return (len(x_axes) + len(w_axes) - len(y_axes)) // 2


def _product(
    x: jax.Array, w: jax.Array, x_axes: Axes, w_axes: Axes, y_axes: Axes, dtype: Any = None
) -> jax.Array:
    return matmul(x, w, contracted(x_axes, w_axes, y_axes), dtype=dtype)


class Partition(NamedTuple):
    """Says how work is divided over devices, by the names of logical axes.

    `nn` and `delib` know nothing else of a mesh.

    constrain(x, axes): returns the activation x, split over devices by its axes.
    gather(w, axes): returns the table of vectors w, whole along the width.
    product(x, w, x_axes, w_axes, y_axes, dtype): returns activations x times a weight w that is
      split over devices (`products.matmul`).
    split(function, in_axes, out_axes): returns a function that runs `function` on each device's own
      part of the arguments.
    row_shards: number of parts into which the rows of a batch are split.
    shared_memory: bytes of shared memory that one program of a GPU kernel may have.
    """

    constrain: Callable[[jax.Array, Axes], jax.Array] = lambda x, axes: x
    gather: Callable[[jax.Array, Axes], jax.Array] = lambda w, axes: w
    product: Callable[..., jax.Array] = _product
    split: Callable[[Callable, Any, Any], Callable] = lambda function, in_axes, out_axes: function
    row_shards: int = 1
    shared_memory: int = LEAST


WHOLE = Partition()  # for one device


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(fan_in**-0.5)


class RMSNorm(nn.Module):
    """Computes x / rms(x) * (offset + scale) over the last axis (Zhang and Sennrich 2019).

    The computation is in float32. Gemma's stored scales are added to an offset of 1. With an offset
    of 0 the scale is the whole factor.
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
    """Computes the norm of x [..., D] in float32, with the parameters that are called `name`."""
    if c.layer_norm:
        return nn.LayerNorm(c.norm_eps, x.dtype, use_fast_variance=False, name=name)(x)
    return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)


def dense(
    module: nn.Module, name: str, shape: tuple[int, ...], x: jax.Array, x_axes: Axes, y_axes: Axes
) -> jax.Array:
    """Returns x times the parameter `name` of a module.

    Low-rank adapters in the tree (`delib.lora`) are added to the product, in float32. Added to a
    parameter of bfloat16, or to a product that is rounded already, a small change would be lost.

    shape: of the parameter.
    """
    fan_in = math.prod(shape[: INPUT_AXES[name]])
    w = module.param(name, _normal(fan_in), shape).astype(x.dtype)
    first, second = f"{name}_a", f"{name}_b"
    axes_of = {each: PARAM_AXES[each][1:] for each in (name, first, second)}
    product = module.partition.product
    if not module.has_variable("params", first):
        return product(x, w, x_axes, axes_of[name], y_axes)
    a = module.get_variable("params", first).astype(x.dtype)
    b = module.get_variable("params", second).astype(x.dtype)
    few = product(x, a, x_axes, axes_of[first], TRACES)
    y = product(x, w, x_axes, axes_of[name], y_axes, jnp.float32)
    y += product(few, b, TRACES, axes_of[second], y_axes, jnp.float32)
    return y.astype(x.dtype)


def biased(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns y [B, M, S, ...] plus a bias [...], in the dtype of y.

    The bias is repeated in float32: its gradient is a sum over all tokens, and a sum of thousands
    of addends in bfloat16 would lose most of them.
    """
    bias = bias.astype(y.dtype).astype(jnp.float32)
    return y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)


class Attention(nn.Module):
    """Computes grouped-query attention.

    Where the collection "intermediates" is mutable, attention weights are also computed, and sown
    into this collection.
    """

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE

    @nn.compact
    def __call__(
        self,
        x_BMSD: jax.Array,
        rope_2BMSH: jax.Array | None,
        bounds: Bounds,
        prefix: Keys | None,
        given: Keys | None,
    ) -> tuple[jax.Array, Keys]:
        """Attends to a prefix and to each query's own group.

        Args:
          x_BMSD: normed inputs.
          rope_2BMSH: `rotary.table` of the inputs' positions; None where positions are learned.
          bounds: the visible ranges.
          prefix: keys and values [B, T, K, H] that all groups of a row share, or None.
          given: keys (already rotated) and values [B, M, U - S, K, H] of the group's tokens before
            the inputs, or None.

        Returns:
          The output [B, M, S, D], and the keys and values [B, M, U, K, H] of the whole group.
        """
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            y = dense(self, name, (D, heads, H), x_BMSD, TRACES, HEADS)
            if c.qkv_bias:
                y = biased(y, self.param(f"{name}_bias", nn.initializers.zeros, (heads, H)))
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
        M, S = x_BMSD.shape[1:3]
        form = partial(
            attend,
            scale=c.query_scale,
            softcap=c.attn_softcap,
            form="reference" if M * S <= FEW else self.form,
            shared_memory=self.partition.shared_memory,
        )
        in_axes = (HEADS, HEADS, HEADS, prefix and (TEXT, TEXT), Bounds(QUERIES, QUERIES, QUERIES))
        attention = self.partition.split(form, in_axes, HEADS)
        out_BMSNH = attention(q_BMSNH, k_BMUKH, v_BMUKH, prefix, bounds)
        out_BMSD = dense(self, "out", (N, H, D), out_BMSNH, HEADS, TRACES)
        if c.other_bias:
            out_BMSD = biased(out_BMSD, self.param("out_bias", nn.initializers.zeros, (D,)))
        return out_BMSD, (k_BMUKH, v_BMUKH)


class MLP(nn.Module):
    """Computes a feed-forward layer of x [B, M, S, D]: plain, or gated (Shazeer 2020)."""

    config: TransformerConfig
    partition: Partition = WHOLE

    @nn.compact
    def __call__(self, x_BMSD):
        c = self.config
        D, F = c.embed_dim, c.ffn_dim
        activation = ACTIVATIONS[c.activation]

        def product(name: str, x: jax.Array, axes: tuple[Axes, Axes], shape: tuple) -> jax.Array:
            y = dense(self, name, shape, x, *axes)
            if c.other_bias:
                y = biased(y, self.param(f"{name}_bias", nn.initializers.zeros, shape[1:]))
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
    """Computes one layer: attention and MLP, with a norm before each.

    Where `config.post_norms` is set (Gemma 2 and 3), a norm also follows each.

    ropes: rotary tables of global layers and of local ones, or None; `is_local` is the index.
    ranges: bounds of global layers and of local ones; `is_local` is the index.
    """

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE

    @nn.compact
    def __call__(self, x_BMSD, is_local, prefix, given, ropes, ranges):
        c = self.config
        norm = partial(normed, c)
        # Window and rotary base are data: one layer body serves both kinds.
        kind = partial(jax.lax.dynamic_index_in_dim, index=is_local, keepdims=False)
        rope_2BMSH, bounds = jax.tree.map(kind, (ropes, ranges))
        attention = Attention(c, self.form, self.partition, name="attn")
        x_normed = norm("pre_attn_norm", x_BMSD)
        attended, kv = attention(x_normed, rope_2BMSH, bounds, prefix, given)
        x_BMSD += norm("post_attn_norm", attended) if c.post_norms else attended
        fed = MLP(c, self.partition, name="mlp")(norm("pre_mlp_norm", x_BMSD))
        x_BMSD += norm("post_mlp_norm", fed) if c.post_norms else fed
        return self.partition.constrain(x_BMSD, TRACES), kv
