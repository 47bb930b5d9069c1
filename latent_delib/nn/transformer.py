"""The transformer of both models: a pure function of parameters, inputs and cache.

Its layers run under scan.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_delib.nn import rotary
from latent_delib.nn.attention.forms import SAVED
from latent_delib.nn.attention.primitive import Bounds, within_window
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.layers import HEADS, PARAM_AXES, TRACES, WHOLE, Block, Partition, normed
from latent_delib.nn.products import softcapped, table_product
from latent_delib.nn.sizes import TransformerConfig

Params = dict[str, Any]
TABLES = ("embedding", "head")  # parts of a decoder's tree with one row per token of the vocabulary
BODY = ("layers", "final_norm", "positions")  # all other parts; "positions" only where learned

# What a backward pass keeps of each layer besides its input. It computes the rest again.
#   none: everything. full: nothing. attention: results of attention.
#   dots: results of attention and of products with weights.
_attention = jax.checkpoint_policies.save_only_these_names(*SAVED)
_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(_dots, _attention),
    "attention": _attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """Reads soft inputs (token embeddings or latents), grouped into M independent traces per row.

    Parameters: {"layers": ..., "final_norm": ...}, and "positions" [P, D] where positions are
    learned. A decoder's tree also holds its TABLES: "embedding" [V, D] and, where the logits have a
    table of their own, "head" [V, D]. A coprocessor's tree holds "soft_tokens" [L, D]. `apply`
    ignores tables and soft tokens.
    """

    config: TransformerConfig
    remat: str = "none"
    partition: Partition = WHOLE
    form: str = "xla"  # form of attention, one of forms.FORMS

    @nn.compact
    def __call__(
        self,
        x_BMSD: jax.Array,
        position_BMU: jax.Array,
        bounds: Bounds,
        cache: Cache | None = None,
        given: KV | None = None,
        outputs: bool = True,
    ) -> tuple[jax.Array | None, KV]:
        """Runs one forward pass.

        Args:
          x_BMSD: inputs in the residual stream; their dtype is the dtype of the computation.
          position_BMU: int32 positions of each group's tokens, in nondecreasing order. A learned
            position past the end of the table uses its last row.
          bounds: the visible ranges [B, M, S] of the cache's slots and of each token's own group.
          cache: the shared prefix, or None.
          given: keys and values [layers, B, M, U - S, K, H] of the first tokens of each group,
            which are then not computed again; None where U = S.
          outputs: False to compute keys and values alone: the last layer then computes nothing
            else. It needs `cache` and `given` to be None, and is slow to differentiate.

        Returns:
          Final-normed outputs [B, M, S, D] or None, and the keys and values of all U tokens. With
          mutable="intermediates", `apply` also returns every layer's attention weights.
        """
        c = self.config
        S = x_BMSD.shape[2]
        position_BMS = position_BMU[:, :, -S:]
        prefix_position = None if cache is None else cache.position
        # Index 0 of each stack is for global layers, 1 for local ones.
        ranges = [bounds]
        if any(c.is_local):
            ranges.append(within_window(bounds, position_BMU, prefix_position, c.window))
        ropes = None
        if c.learned_positions:
            x_BMSD = x_BMSD + self._positions(position_BMS, x_BMSD.dtype)
        else:
            ropes = rotary.tables(c, position_BMS)
        ranges = jax.tree.map(lambda *kinds: jnp.stack(kinds), *ranges)
        x_BMSD = self.partition.constrain(x_BMSD, TRACES)
        if not outputs:
            assert cache is None and given is None
            return None, self._keys_and_values(x_BMSD, ropes, ranges)

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.form, self.partition, name="layers")
        dtype = x_BMSD.dtype
        prefix = None if cache is None else (cache.k.astype(dtype), cache.v.astype(dtype))
        given = None if given is None else tuple(x.astype(dtype) for x in given)
        x_BMSD, kv = layers(x_BMSD, jnp.array(c.is_local, jnp.int32), prefix, given, ropes, ranges)
        return normed(c, "final_norm", x_BMSD), KV(*kv)

    def _keys_and_values(self, x_BMSD: jax.Array, ropes: Any, ranges: Bounds) -> KV:
        """Returns the keys and values of all layers; computes no outputs of the last one."""
        c = self.config
        block = Block(c, self.form, self.partition, parent=None)
        stacks = self.variables["params"]["layers"], jnp.array(c.is_local, jnp.int32)

        def layer(index: jax.Array | int, carry: tuple) -> tuple:
            x_BMSD, kv = carry
            at = partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            weights, is_local = jax.tree.map(at, stacks)
            variables = {"params": weights}
            x_BMSD, found = block.apply(variables, x_BMSD, is_local, None, None, ropes, ranges)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
            return x_BMSD, jax.tree.map(put, kv, found)

        shape = c.num_layers, *x_BMSD.shape[:3], c.num_kv_heads, c.head_dim
        empty = self.partition.constrain(jnp.zeros(shape, x_BMSD.dtype), (None, *HEADS))
        last = c.num_layers - 1
        carry = jax.lax.fori_loop(0, last, layer, (x_BMSD, (empty, empty)))
        # XLA drops the attention and the MLP of the last layer, whose output is not used.
        _, kv = layer(last, carry)
        return KV(*kv)

    def _positions(self, position_BMS: jax.Array, dtype: Any) -> jax.Array:
        """Returns the learned vectors of positions, [B, M, S, D]."""
        shape = (self.config.learned_positions, self.config.embed_dim)
        table_PD = self.param("positions", nn.initializers.normal(shape[1] ** -0.5), shape)
        table_PD = self.partition.gather(table_PD.astype(dtype), PARAM_AXES["positions"])
        return look_up(table_PD, position_BMS)


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Draws a decoder's parameters at random, float32."""
    layers_key, embedding_key = jax.random.split(key)
    x_BMSD = jnp.zeros((1, 1, 1, config.embed_dim))
    zero = jnp.zeros((1, 1, 1), jnp.int32)
    params = Transformer(config).init(layers_key, x_BMSD, zero, Bounds(zero, zero, zero))["params"]
    shape = (config.vocab_size, config.embed_dim)
    params["embedding"] = jax.random.normal(embedding_key, shape) * config.embed_dim**-0.5
    if config.untied_head:
        head_key = jax.random.fold_in(embedding_key, 1)
        params["head"] = jax.random.normal(head_key, shape) * config.embed_dim**-0.5
    return params


def output_table(decoder: Params) -> jax.Array:
    """Returns the table [V, D] of a decoder's logits: its head, or its token embeddings."""
    return decoder["head"] if "head" in decoder else decoder["embedding"]


def embed(embedding_VD: jax.Array, tokens: jax.Array, config: TransformerConfig) -> jax.Array:
    """Returns token embeddings [..., D] as they enter the residual stream.

    They are scaled by sqrt(D) where `config.scale_embeddings` is set.
    """
    return scaled(look_up(embedding_VD, tokens), config)


def look_up(table_VD: jax.Array, index: jax.Array) -> jax.Array:
    """Returns rows of a table, [..., D].

    The gradient of a row is summed in float32: a frequent token has thousands of addends.
    """
    V = table_VD.shape[0]
    dtype = table_VD.dtype

    @jax.custom_vjp
    def taken(table_VD: jax.Array, index: jax.Array) -> jax.Array:
        return table_VD[index]

    def back(index: jax.Array, dx: jax.Array) -> tuple[jax.Array, None]:
        dtable_VD = jnp.zeros((V, dx.shape[-1])).at[index].add(dx.astype(jnp.float32))
        return dtable_VD.astype(dtype), None

    taken.defvjp(lambda table_VD, index: (table_VD[index], index), back)
    return taken(table_VD, index)


def scaled(x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Returns rows of the token table [..., D] as they enter the residual stream."""
    if not config.scale_embeddings:
        return x
    return x * jnp.asarray(config.embed_dim**0.5, x.dtype)


def unembed(table_VD: jax.Array, x: jax.Array, config: TransformerConfig) -> jax.Array:
    """Returns logits, float32 [..., V], softcapped by `config.final_softcap`.

    table_VD: the decoder's `output_table`.
    """
    logits = table_product(x, table_VD.astype(x.dtype))
    return softcapped(logits, config.final_softcap)[0]


def own_text(start_BT: jax.Array) -> Bounds:
    """Returns the bounds of a call over text alone (M = 1): token t sees start_BT[t] <= j <= t."""
    zero = jnp.zeros_like(start_BT[:, None])
    return Bounds(zero, zero, start_BT[:, None])
