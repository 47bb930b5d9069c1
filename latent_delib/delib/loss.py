"""Negative log-likelihood under a tied vocabulary, a slice of the vocabulary at a time."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_nll(
    x_RD: jax.Array, embedding_VD: jax.Array, target_R: jax.Array, softcap: float, vocab_chunk: int
) -> jax.Array:
    """-log p(target) of each row, in nats, float32 [R].

    Logits are x @ embedding.T, softcapped where `softcap` is not 0. No array of R x V elements exists, forward or
    backward: the vocabulary passes in slices of `vocab_chunk` rows under a running log-sum-exp, and the backward
    pass computes each slice again.

    Args:
      x_RD: final-normed outputs. embedding_VD: the token table. target_R: int32.
    """
    return _forward(x_RD, embedding_VD, target_R, softcap, vocab_chunk)[0]


def _slices(embedding_VD: jax.Array, vocab_chunk: int) -> tuple[jax.Array, jax.Array]:
    """The table as [slices, chunk, D], padded with zero rows, and the index of each slice's first row."""
    V, D = embedding_VD.shape
    chunk = min(vocab_chunk, V)
    padded = jnp.pad(embedding_VD, ((0, -V % chunk), (0, 0)))
    return padded.reshape(-1, chunk, D), jnp.arange(0, V, chunk)


def _logits(x_RD: jax.Array, slice_CD: jax.Array, first: jax.Array, V: int, softcap: float) -> jax.Array:
    logits_RC = jnp.einsum("RD,CD->RC", x_RD, slice_CD.astype(x_RD.dtype), preferred_element_type=jnp.float32)
    if softcap:
        logits_RC = softcap * jnp.tanh(logits_RC / softcap)
    return jnp.where(first + jnp.arange(slice_CD.shape[0]) < V, logits_RC, -jnp.inf)


def _forward(x_RD, embedding_VD, target_R, softcap, vocab_chunk):
    V = embedding_VD.shape[0]

    def step(carry, one):
        highest_R, total_R, picked_R = carry
        slice_CD, first = one
        logits_RC = _logits(x_RD, slice_CD, first, V, softcap)
        new_R = jnp.maximum(highest_R, logits_RC.max(axis=1))
        total_R = total_R * jnp.exp(highest_R - new_R) + jnp.exp(logits_RC - new_R[:, None]).sum(axis=1)
        index_R = target_R - first
        inside_R = (index_R >= 0) & (index_R < slice_CD.shape[0])
        here_R = jnp.take_along_axis(logits_RC, jnp.clip(index_R, 0, slice_CD.shape[0] - 1)[:, None], axis=1)[:, 0]
        return (new_R, total_R, jnp.where(inside_R, here_R, picked_R)), None

    zero_R = jnp.zeros(x_RD.shape[0], jnp.float32)
    (highest_R, total_R, picked_R), _ = jax.lax.scan(
        step, (zero_R - jnp.inf, zero_R, zero_R), _slices(embedding_VD, vocab_chunk)
    )
    lse_R = highest_R + jnp.log(total_R)
    return lse_R - picked_R, (x_RD, embedding_VD, target_R, lse_R)


def _backward(softcap, vocab_chunk, residuals, dnll_R):
    x_RD, embedding_VD, target_R, lse_R = residuals
    V = embedding_VD.shape[0]

    def step(dx_RD, one):
        slice_CD, first = one
        logits_RC = _logits(x_RD, slice_CD, first, V, softcap)
        is_target_RC = target_R[:, None] == first + jnp.arange(slice_CD.shape[0])
        dlogits_RC = dnll_R[:, None] * (jnp.exp(logits_RC - lse_R[:, None]) - is_target_RC)
        if softcap:
            dlogits_RC *= 1 - jnp.square(jnp.where(jnp.isfinite(logits_RC), logits_RC, 0.0) / softcap)
        dlogits_RC = dlogits_RC.astype(x_RD.dtype)
        dslice_CD = jnp.einsum("RC,RD->CD", dlogits_RC, x_RD).astype(embedding_VD.dtype)
        return dx_RD + jnp.einsum(
            "RC,CD->RD", dlogits_RC, slice_CD.astype(x_RD.dtype), preferred_element_type=jnp.float32
        ), dslice_CD

    dx_RD, dslices = jax.lax.scan(step, jnp.zeros(x_RD.shape, jnp.float32), _slices(embedding_VD, vocab_chunk))
    dembedding_VD = dslices.reshape(-1, x_RD.shape[1])[:V]
    return dx_RD.astype(x_RD.dtype), dembedding_VD, None


token_nll.defvjp(_forward, _backward)
