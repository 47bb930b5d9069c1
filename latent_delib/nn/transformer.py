"""The transformer both models are: a stack of layers under scan, a pure function of (parameters, inputs, cache)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention.forms import FEW, SAVED
from latent_delib.nn.attention.primitive import Bounds, within_window
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.layers import TRACES, WHOLE, Block, Partition, RMSNorm
from latent_delib.nn.products import einsum
from latent_delib.nn.sizes import TransformerConfig

Params = dict[str, Any]

# What a backward pass keeps of each layer beside its input: everything, what attention and the products with weights
# gave, what attention gave, or nothing. What it does not keep it computes again.
_attention = jax.checkpoint_policies.save_only_these_names(*SAVED)
_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(_dots, _attention),
    "attention": _attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Reads soft inputs (token embeddings or latents), grouped into M independent traces a row.

    Parameters: {"layers": ..., "final_norm": ...}; a decoder's tree also holds "embedding" [V, D] and a coprocessor's
    "soft_tokens" [L, D], which `apply` ignores.
    """

    config: TransformerConfig
    remat: str = "none"
    partition: Partition = WHOLE
    form: str = "xla"  # of attention: one of attention_forms.FORMS
    few: int = FEW  # queries per row up to which the reference computes, whatever the form

    @nn.compact
    def __call__(
        self,
        x_BMSD: jax.Array,
        position_BMS: jax.Array,
        bounds: Bounds,
        cache: Cache | None = None,
        given: KV | None = None,
    ) -> tuple[jax.Array, KV]:
        """One forward pass.

        Args:
          x_BMSD: inputs in the residual stream; their dtype is the dtype of the computation.
          position_BMS: int32 rotary positions, never falling inside a group.
          bounds: what each token sees of the cache's slots and of its own group.
          cache: the shared prefix, or None.
          given: keys and values [layers, B, M, L, K, H] that stand in for those of the first L tokens, or None.

        Returns:
          Final-normed outputs [B, M, S, D], and the keys and values of these tokens. With mutable="intermediates",
          `apply` also returns what each layer attended to; see `layers.Attention`.
        """
        c = self.config
        prefix_position = None if cache is None else cache.position
        # Index 0 of each stack is for global layers, 1 for local ones.
        ropes = [rotary.table(position_BMS, c.head_dim, c.rope_base, c.rope_scaling)]
        ranges = [bounds]
        if any(c.is_local):
            ropes.append(rotary.table(position_BMS, c.head_dim, c.local_rope_base))
            ranges.append(within_window(bounds, position_BMS, prefix_position, c.window))
        ropes, ranges = jnp.stack(ropes), jax.tree.map(lambda *kinds: jnp.stack(kinds), *ranges)

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.form, self.partition, self.few, name="layers")
        prefix = None if cache is None else (cache.k.astype(x_BMSD.dtype), cache.v.astype(x_BMSD.dtype))
        x_BMSD = self.partition.constrain(x_BMSD, TRACES)
        given = None if given is None else tuple(x.astype(x_BMSD.dtype) for x in given)
        x_BMSD, kv = layers(x_BMSD, jnp.array(c.is_local, jnp.int32), prefix, given, ropes, ranges)
        return RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")(x_BMSD), KV(*kv)


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """A decoder's parameters at random, float32."""
    layers_key, embedding_key = jax.random.split(key)
    x_BMSD, zero = jnp.zeros((1, 1, 1, config.embed_dim)), jnp.zeros((1, 1, 1), jnp.int32)
    params = Transformer(config).init(layers_key, x_BMSD, zero, Bounds(zero, zero, zero))["params"]
    shape = (config.vocab_size, config.embed_dim)
    return params | {"embedding": jax.random.normal(embedding_key, shape) * config.embed_dim**-0.5}


def embed(embedding_VD: jax.Array, tokens: jax.Array, config: TransformerConfig) -> jax.Array:
    """Token embeddings as they enter the residual stream: [..., D], scaled by sqrt(D) where the family does so. The
    gradient of a row is summed in float32: a frequent token has thousands of addends."""
    V, dtype = embedding_VD.shape[0], embedding_VD.dtype

    @jax.custom_vjp
    def rows(embedding_VD: jax.Array, tokens: jax.Array) -> jax.Array:
        return embedding_VD[tokens]

    def back(tokens: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
        return jnp.zeros((V, dx.shape[-1])).at[tokens].add(dx.astype(jnp.float32)).astype(dtype), None

    rows.defvjp(lambda embedding_VD, tokens: (embedding_VD[tokens], tokens), back)
    x = rows(embedding_VD, tokens)
    return scaled(x, config)


def scaled(x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Rows of the token table [..., D] as they enter the residual stream."""
    return x * jnp.asarray(config.embed_dim**0.5, x.dtype) if config.scale_embeddings else x


def unembed(embedding_VD: jax.Array, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Logits, float32 [..., V], softcapped where the family does so."""
    logits = einsum("...D,VD->...V", x, embedding_VD.astype(x.dtype), jnp.float32)
    cap = config.final_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits


def own_text(start_BT: jax.Array) -> Bounds:
    """Bounds of a call over text alone (M = 1): token t sees start_BT[t] <= j <= t."""
    zero = jnp.zeros_like(start_BT[:, None])
    return Bounds(zero, zero, start_BT[:, None])
