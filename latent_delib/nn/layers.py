"""The parts of one transformer layer. Parameters are float32 at birth; they compute in the dtype of their input."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention import Bounds
from latent_delib.nn.attention_forms import attend
from latent_delib.nn.sizes import TransformerConfig

# Below the commands this is all that is known of a mesh, both by the names of axes: how an activation is placed on it,
# and how a function that nothing else may split is run on each device's own part.
Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
Split = Callable[[Callable, Any, Any], Callable]
ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}


def unconstrained(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Leaves placement to the compiler."""
    del axes
    return x


def unsplit(function: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """For one device."""
    del in_axes, out_axes
    return function


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
    """Grouped-query attention; returns its output [B, M, S, D] and the own keys and values [B, M, S, K, H]."""

    config: TransformerConfig
    form: str
    constrain: Constrain = unconstrained
    split: Split = unsplit

    @nn.compact
    def __call__(self, x_BMSD, rope_2BMSH, bounds: Bounds, prefix):
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int) -> jax.Array:
            w_DNH = self.param(name, _normal(D), (D, heads, H)).astype(x_BMSD.dtype)
            y = jnp.einsum("BMSD,DNH->BMSNH", x_BMSD, w_DNH)
            return self.constrain(y, ("batch", "traces", None, "heads", None))

        q_BMSNH, k_BMSKH, v_BMSKH = project("q", N), project("k", K), project("v", K)
        if c.qk_norm:
            q_BMSNH = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(q_BMSNH)
            k_BMSKH = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(k_BMSKH)
        q_BMSNH, k_BMSKH = rotary.rotate(q_BMSNH, rope_2BMSH), rotary.rotate(k_BMSKH, rope_2BMSH)
        heads, text, query = (
            ("batch", "traces", None, "heads", None),
            ("batch", None, "heads", None),
            ("batch", "traces", None),
        )
        out_BMSNH = self.split(
            partial(attend, scale=c.query_scale, softcap=c.attn_softcap, form=self.form),
            (heads, heads, heads, prefix and (text, text), Bounds(query, query, query)),
            heads,
        )(q_BMSNH, k_BMSKH, v_BMSKH, prefix, bounds)
        w_NHD = self.param("out", _normal(N * H), (N, H, D)).astype(x_BMSD.dtype)
        return jnp.einsum("BMSNH,NHD->BMSD", out_BMSNH, w_NHD), (k_BMSKH, v_BMSKH)


class MLP(nn.Module):
    """Gated feed-forward layer (Shazeer 2020)."""

    config: TransformerConfig
    constrain: Constrain = unconstrained

    @nn.compact
    def __call__(self, x_BMSD):
        D, F = self.config.embed_dim, self.config.ffn_dim
        gate_DF, up_DF = (self.param(n, _normal(D), (D, F)).astype(x_BMSD.dtype) for n in ("gate", "up"))
        down_FD = self.param("down", _normal(F), (F, D)).astype(x_BMSD.dtype)
        hidden_BMSF = ACTIVATIONS[self.config.activation](x_BMSD @ gate_DF) * (x_BMSD @ up_DF)
        return self.constrain(hidden_BMSF, ("batch", "traces", None, "ffn")) @ down_FD


class Block(nn.Module):
    """One layer: attention and MLP, each normed before, and after where the family does so (Gemma 2 and 3)."""

    config: TransformerConfig
    form: str
    constrain: Constrain = unconstrained
    split: Split = unsplit

    @nn.compact
    def __call__(self, x_BMSD, is_local, prefix, ropes, ranges):
        c = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        # Window and rotary base are data: both kinds stand side by side, and a layer takes its own.
        rope_2BMSH, bounds = jax.tree.map(lambda both: both[is_local], (ropes, ranges))
        attended, kv = Attention(c, self.form, self.constrain, self.split, name="attn")(
            norm("pre_attn_norm", x_BMSD), rope_2BMSH, bounds, prefix
        )
        x_BMSD += norm("post_attn_norm", attended) if c.post_norms else attended
        fed = MLP(c, self.constrain, name="mlp")(norm("pre_mlp_norm", x_BMSD))
        x_BMSD += norm("post_mlp_norm", fed) if c.post_norms else fed
        return self.constrain(x_BMSD, ("batch", "traces", None, None)), kv
