"""The coprocessor: reads the decoder's cache through its own soft tokens and writes latents (Section 2.1)."""

import jax
import jax.numpy as jnp

from latent_delib.delib.traces import Traces
from latent_delib.nn import transformer
from latent_delib.nn.cache import Cache
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params, Transformer


def soft_tokens(key: jax.Array, embedding_VD: jax.Array, num_latents: int) -> jax.Array:
    """N_L distinct starting vectors [L, D], float32: random rows of the token table."""
    rows = jax.random.choice(key, embedding_VD.shape[0], (num_latents,), replace=False)
    return embedding_VD[rows].astype(jnp.float32)


def from_decoder(key: jax.Array, decoder: Params, model: Transformer, num_latents: int) -> Params:
    """Starts from the decoder's own layers. It has no embedding table: it never reads a token."""
    del model
    body = jax.tree.map(lambda x: x.astype(jnp.float32), {name: decoder[name] for name in ("layers", "final_norm")})
    return body | {"soft_tokens": soft_tokens(key, decoder["embedding"], num_latents)}


def from_scratch(key: jax.Array, decoder: Params, model: Transformer, num_latents: int) -> Params:
    """Starts from random layers of the decoder's shape."""
    body_key, soft_key = jax.random.split(key)
    body = transformer.init(body_key, model.config)
    del body["embedding"]
    return body | {"soft_tokens": soft_tokens(soft_key, decoder["embedding"], num_latents)}


def as_inputs(soft_LD: jax.Array, model: Transformer, traces: Traces, dtype: jnp.dtype) -> jax.Array:
    """The same L vectors for every trace, [B, M, L, D]."""
    B, M, L = traces.latent_position.shape
    soft_LD = model.partition.gather(soft_LD.astype(dtype), PARAM_AXES["soft_tokens"])
    return jnp.broadcast_to(soft_LD, (B, M, L, soft_LD.shape[-1]))


def latents(params: Params, model: Transformer, cache: Cache, traces: Traces) -> jax.Array:
    """Latents z [B, M, L, D] of every trace, in one forward pass.

    In layer l the soft tokens see the decoder's keys and values of layer l up to x_p, and each other causally. The
    final-normed outputs are the latents: they enter the decoder where token embeddings do, not scaled again.
    """
    x_BMLD = as_inputs(params["soft_tokens"], model, traces, cache.k.dtype)
    z_BMLD, _ = model.apply({"params": params}, x_BMLD, traces.latent_position, traces.latent_bounds, cache)
    return z_BMLD
