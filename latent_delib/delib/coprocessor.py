"""Coprocessors: what reads the decoder's cache through soft tokens of its own, and what it writes (Section 2.1).

Every `write` here is (params, models, text, traces) -> latents; `params` is that of `delib.augment`, with "decoder" and
"coprocessor". Latents are vectors z [B, M, L, D] that enter the decoder where token embeddings do, not scaled again; or
keys and values for each of its layers, `Inserted`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib.traces import Traces
from latent_delib.errors import UserError
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import rotary, transformer
from latent_delib.nn.cache import Cache
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.products import einsum
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params, Transformer


class Models(NamedTuple):
    """The decoder's architecture and the coprocessor's: the same, but for a coprocessor of another size."""

    transformer: Transformer
    coprocessor: Transformer


class Text(NamedTuple):
    """What the decoder made of a text: final-normed outputs [B, T, D], and the cache."""

    outputs: jax.Array
    cache: Cache


class Inserted(NamedTuple):
    """Latents as keys and values, [B, M, layers, L, K, H] each; keys rotated as in the call."""

    k: jax.Array
    v: jax.Array


Latents = jax.Array | Inserted


# How the trees begin.


def soft_tokens(key: jax.Array, embedding_VD: jax.Array, num_latents: int) -> jax.Array:
    """N_L distinct starting vectors [L, D], float32: random rows of the token table. Raises UserError for more than it
    has."""
    if num_latents > embedding_VD.shape[0]:
        raise UserError(f"{num_latents} latents: expected at most {embedding_VD.shape[0]}, the rows of the token table")
    rows = jax.random.choice(key, embedding_VD.shape[0], (num_latents,), replace=False)
    return embedding_VD[rows].astype(jnp.float32)


def body(decoder: Params) -> Params:
    """A decoder's layers: all of it but the token table."""
    return {name: decoder[name] for name in ("layers", "final_norm")}


def from_decoder(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    """Starts from the decoder's own layers. It has no embedding table: it never reads a token."""
    del models
    tree = jax.tree.map(lambda x: x.astype(jnp.float32), body(decoder))
    return tree | {"soft_tokens": soft_tokens(key, decoder["embedding"], num_latents)}


def from_scratch(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    """Starts from random layers of the decoder's shape."""
    body_key, soft_key = jax.random.split(key)
    tree = body(transformer.init(body_key, models.transformer.config))
    return tree | {"soft_tokens": soft_tokens(soft_key, decoder["embedding"], num_latents)}


def only_soft_tokens(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    """N_L vectors and no layers of its own."""
    del models
    return {"soft_tokens": soft_tokens(key, decoder["embedding"], num_latents)}


def one_soft_token(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    """One vector for all latents."""
    del num_latents
    return only_soft_tokens(key, decoder, models, 1)


def resized(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    """Starts from random layers of the coprocessor's own shape, and random maps from the decoder's cache and back."""
    theirs, ours = models.transformer.config, models.coprocessor.config
    layers_key, soft_key, *keys = jax.random.split(key, 5)

    def normal(key: jax.Array, fan_in: int, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * fan_in**-0.5

    heads = (theirs.num_kv_heads, theirs.head_dim, ours.num_kv_heads, ours.head_dim)
    fan_in = theirs.num_kv_heads * theirs.head_dim
    return body(transformer.init(layers_key, ours)) | {
        "soft_tokens": normal(soft_key, ours.embed_dim, num_latents, ours.embed_dim),
        "keys_in": normal(keys[0], fan_in, ours.num_layers, *heads),
        "values_in": normal(keys[1], fan_in, ours.num_layers, *heads),
        "latents_out": normal(keys[2], ours.embed_dim, ours.embed_dim, theirs.embed_dim),
    }


# What they write.


def as_inputs(params: Params, model: Transformer, traces: Traces, dtype: jnp.dtype) -> jax.Array:
    """Returns the soft tokens for every trace, [B, M, L, D] in `dtype`; a single one stands L times.

    They are repeated as float32, because their gradient is the sum over all traces: thousands of addends, of which a
    sum in bfloat16 would lose most.
    """
    B, M, L = traces.latent_position.shape
    soft_LD = model.partition.gather(params["coprocessor"]["soft_tokens"].astype(dtype), PARAM_AXES["soft_tokens"])
    soft_BMLD = jnp.broadcast_to(soft_LD.astype(jnp.float32), (B, M, L, soft_LD.shape[-1]))
    return soft_BMLD.astype(dtype)


def unread(params: Params, models: Models, text: Text, traces: Traces) -> jax.Array:
    """The soft tokens themselves, whatever was read: rows of the token table for tokens that stand nowhere in it, and
    scaled as its rows are. Unscaled they would enter a Gemma decoder sqrt(D) times shorter than its tokens do."""
    soft_BMLD = as_inputs(params, models.transformer, traces, text.cache.k.dtype)
    return transformer.scaled(soft_BMLD, models.transformer.config)


def latents(params: Params, models: Models, text: Text, traces: Traces) -> jax.Array:
    """Latents z [B, M, L, D] of every trace, in one forward pass.

    In layer l the soft tokens see the decoder's keys and values of layer l up to x_p, and each other causally. The
    final-normed outputs are the latents.
    """
    return _over(params, models.coprocessor, text.cache, traces)[0]


def inserted(params: Params, models: Models, text: Text, traces: Traces) -> Inserted:
    """The keys and values of the same pass, for the decoder's layer l those of layer l (Coda-Forno et al. 2025, H1)."""
    _, kv = _over(params, models.coprocessor, text.cache, traces)
    return Inserted(*(jnp.moveaxis(x, 0, 2) for x in kv))


def of_last_layer(params: Params, models: Models, text: Text, traces: Traces) -> jax.Array:
    """Latents of a coprocessor that reads the decoder's last-layer outputs as inputs of its own, not the cache."""
    position_BT = text.cache.position
    bounds = transformer.own_text(jnp.arange(position_BT.shape[1]) - position_BT)
    body = {"params": params["coprocessor"]}
    _, kv = models.coprocessor.apply(body, text.outputs[:, None], position_BT[:, None], bounds)
    return _over(params, models.coprocessor, cache_lib.of_text(kv, position_BT), traces)[0]


def one_after_another(params: Params, models: Models, text: Text, traces: Traces) -> jax.Array:
    """Latents each of which the next one is given, added to its soft token: as many passes as there are latents."""
    soft_BMLD = as_inputs(params, models.coprocessor, traces, text.cache.k.dtype)

    @jax.checkpoint
    def one(x_BMLD: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        z_BMLD, _ = _over(params, models.coprocessor, text.cache, traces, x_BMLD)
        return x_BMLD.at[:, :, i + 1].add(jnp.take(z_BMLD, i, axis=2), mode="drop"), None

    x_BMLD, _ = jax.lax.scan(one, soft_BMLD, jnp.arange(soft_BMLD.shape[2] - 1))
    return _over(params, models.coprocessor, text.cache, traces, x_BMLD)[0]


def through_maps(params: Params, models: Models, text: Text, traces: Traces) -> jax.Array:
    """Latents of a coprocessor of another depth, heads and width.

    Its layers read layers of the decoder evenly spaced from the first to the last, through a linear map each. Keys are
    mapped as they were before they were rotated, so that what a map says does not depend on the position.
    """
    theirs, ours, cache = models.transformer.config, models.coprocessor.config, text.cache
    tree = params["coprocessor"]
    source = np.linspace(0, theirs.num_layers - 1, ours.num_layers).round().astype(int)
    k = jnp.stack([_rotated(cache.k[l], -cache.position, theirs, l) for l in source])
    k = einsum("lBTKH,lKHkh->lBTkh", k, tree["keys_in"].astype(k.dtype))
    k = jnp.stack([_rotated(k[l], cache.position, ours, l) for l in range(ours.num_layers)])
    v = einsum("lBTKH,lKHkh->lBTkh", cache.v[source], tree["values_in"].astype(k.dtype))
    z_BMLd, _ = _over(params, models.coprocessor, cache._replace(k=k, v=v), traces)
    return einsum("BMLd,dD->BMLD", z_BMLd, tree["latents_out"].astype(z_BMLd.dtype))


def _over(params: Params, model: Transformer, cache: Cache, traces: Traces, x_BMLD: jax.Array | None = None):
    """One pass of a coprocessor over a cache: final-normed outputs and their keys and values."""
    if x_BMLD is None:
        x_BMLD = as_inputs(params, model, traces, cache.k.dtype)
    return model.apply({"params": params["coprocessor"]}, x_BMLD, traces.latent_position, traces.latent_bounds, cache)


def _rotated(x_BTKH: jax.Array, position_BT: jax.Array, config: TransformerConfig, layer: int) -> jax.Array:
    """Keys as layer `layer` turns them at these positions; negative positions turn them back."""
    kinds = ((config.rope_base, config.rope_scaling), (config.local_rope_base,))
    return rotary.rotate(x_BTKH, rotary.table(position_BT, config.head_dim, *kinds[config.is_local[layer]]))
