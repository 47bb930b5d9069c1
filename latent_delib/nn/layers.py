"""The parts of one transformer layer. Parameters are float32 at birth; they compute in the dtype of their input."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention import primitive
from latent_delib.nn.attention.forms import FEW, attend
from latent_delib.nn.attention.gpu import LEAST
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.products import einsum
from latent_delib.nn.sizes import TransformerConfig

ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}

# The logical axes of every parameter, by leaf name; norms' scales lie whole.
PARAM_AXES = {
    "embedding": ("vocab", "embed"),
    "q": ("layers", "embed", "heads", None),
    "k": ("layers", "embed", "heads", None),
    "v": ("layers", "embed", "heads", None),
    "out": ("layers", "heads", None, "embed"),
    "gate": ("layers", "embed", "ffn"),
    "up": ("layers", "embed", "ffn"),
    "down": ("layers", "ffn", "embed"),
    "scale": (None, None),
}
# The matrices of a layer, and how many of their axes after "layers" are those of the input: the rest is the output's.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
for _name, _count in INPUT_AXES.items():  # low-rank adapters lie as the matrix does
    _axes = PARAM_AXES[_name]
    PARAM_AXES |= {f"{_name}_a": (*_axes[: 1 + _count], None), f"{_name}_b": ("layers", None, *_axes[1 + _count :])}


Axes = tuple[str | None, ...]
TRACES = ("batch", "traces", None, None)  # of activations [B, M, S, D]
HEADS = ("batch", "traces", None, "heads", None)
FEATURES = ("batch", "traces", None, "ffn")


class Partition(NamedTuple):
    """How work is divided over devices. Below the commands this is all that is known of a mesh, by the names of axes,
    and of its devices.

    constrain(x, axes): an activation, where it belongs.
    gather(w, axes): a table of vectors, whole along the width.
    product(equation, x, w, x_axes, w_axes, y_axes): the einsum of activations with a weight that lies split.
    split(function, in_axes, out_axes): a function that no compiler splits, run on each device's own part.
    row_shards: into how many parts the rows of a batch are split.
    shared_memory: bytes that one program of the GPU's kernels may have on each device.
    """

    constrain: Callable[[jax.Array, Axes], jax.Array] = lambda x, axes: x
    gather: Callable[[jax.Array, Axes], jax.Array] = lambda w, axes: w
    product: Callable[..., jax.Array] = lambda equation, x, w, *axes: einsum(equation, x, w)
    split: Callable[[Callable, Any, Any], Callable] = lambda function, in_axes, out_axes: function
    row_shards: int = 1
    shared_memory: int = LEAST


WHOLE = Partition()  # for one device


def _normal(fan_in: int) -> nn.initializers.Initializer:
    return nn.initializers.normal(fan_in**-0.5)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, float32 inside (Zhang and Sennrich 2019).

    Gemma stores what it adds to an offset of 1; with an offset of 0 the scale is the factor itself.
    """

    eps: float
    offset: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; returns its output [B, M, S, D] and the own keys and values [B, M, S, K, H].

    given: None, or keys and values [B, M, L, K, H], keys rotated, that stand in for those of the first L tokens.

    Who makes the collection "intermediates" mutable also gets `attention.weights`; no other call computes them.
    """

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE
    few: int = FEW

    @nn.compact
    def __call__(self, x_BMSD, rope_2BMSH, bounds: Bounds, prefix, given):
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            w_DNH = self.param(name, _normal(D), (D, heads, H)).astype(x_BMSD.dtype)
            y = self.partition.product("BMSD,DNH->BMSNH", x_BMSD, w_DNH, TRACES, PARAM_AXES[name][1:], HEADS)
            return self.partition.constrain(y, HEADS)

        q_BMSNH, k_BMSKH, v_BMSKH = project("q", N), project("k", K), project("v", K)
        if c.qk_norm:
            q_BMSNH = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(q_BMSNH)
            k_BMSKH = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(k_BMSKH)
        q_BMSNH, k_BMSKH = rotary.rotate(q_BMSNH, rope_2BMSH), rotary.rotate(k_BMSKH, rope_2BMSH)
        if given is not None:
            k_BMSKH, v_BMSKH = (
                jnp.concatenate([g, x[:, :, g.shape[2] :]], 2) for g, x in zip(given, (k_BMSKH, v_BMSKH))
            )
        if self.is_mutable_collection("intermediates"):
            seen = primitive.weights(q_BMSNH, k_BMSKH, prefix, bounds, scale=c.query_scale, softcap=c.attn_softcap)
            self.sow("intermediates", "weights", seen)
        text, query = ("batch", None, "heads", None), ("batch", "traces", None)
        out_BMSNH = self.partition.split(
            partial(
                attend,
                scale=c.query_scale,
                softcap=c.attn_softcap,
                form=self.form,
                few=self.few,
                shared_memory=self.partition.shared_memory,
            ),
            (HEADS, HEADS, HEADS, prefix and (text, text), Bounds(query, query, query)),
            HEADS,
        )(q_BMSNH, k_BMSKH, v_BMSKH, prefix, bounds)
        w_NHD = self.param("out", _normal(N * H), (N, H, D)).astype(x_BMSD.dtype)
        out_BMSD = self.partition.product("BMSNH,NHD->BMSD", out_BMSNH, w_NHD, HEADS, PARAM_AXES["out"][1:], TRACES)
        return out_BMSD, (k_BMSKH, v_BMSKH)


class MLP(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    config: TransformerConfig
    partition: Partition = WHOLE

    @nn.compact
    def __call__(self, x_BMSD):
        D, F = self.config.embed_dim, self.config.ffn_dim

        def widen(name: str) -> jax.Array:
            w_DF = self.param(name, _normal(D), (D, F)).astype(x_BMSD.dtype)
            return self.partition.product("...D,DF->...F", x_BMSD, w_DF, TRACES, PARAM_AXES[name][1:], FEATURES)

        hidden_BMSF = ACTIVATIONS[self.config.activation](widen("gate")) * widen("up")
        hidden_BMSF = self.partition.constrain(hidden_BMSF, FEATURES)
        down_FD = self.param("down", _normal(F), (F, D)).astype(x_BMSD.dtype)
        return self.partition.product("...F,FD->...D", hidden_BMSF, down_FD, FEATURES, PARAM_AXES["down"][1:], TRACES)


class Block(nn.Module):
    """One layer: attention and MLP, each normed before, and after where the family does so (Gemma 2 and 3)."""

    config: TransformerConfig
    form: str
    partition: Partition = WHOLE
    few: int = FEW

    @nn.compact
    def __call__(self, x_BMSD, is_local, prefix, given, ropes, ranges):
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        # Window and rotary base are data: both kinds stand side by side, and a layer takes its own.
        rope_2BMSH, bounds = jax.tree.map(lambda both: both[is_local], (ropes, ranges))
        attended, kv = Attention(c, self.form, self.partition, self.few, name="attn")(
            norm("pre_attn_norm", x_BMSD), rope_2BMSH, bounds, prefix, given
        )
        x_BMSD += norm("post_attn_norm", attended) if c.post_norms else attended
        fed = MLP(c, self.partition, name="mlp")(norm("pre_mlp_norm", x_BMSD))
        x_BMSD += norm("post_mlp_norm", fed) if c.post_norms else fed
        return self.partition.constrain(x_BMSD, TRACES), kv
