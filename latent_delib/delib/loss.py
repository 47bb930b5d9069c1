"""Negative log-likelihood of tokens, a few of every sequence at a time, and its weights."""

from functools import partial

import jax
import jax.numpy as jnp

from latent_delib.nn.products import einsum, softcapped

SEQUENCES = 4  # on a device; of more, fewer tokens than a chunk are computed at a time


def ahead_weights(num_ahead: int) -> jax.Array:
    """Returns the weight of the loss of the n-th ahead token, n = 1 ... A, float32 [A].

    All are 1, as published. To weight the loss by n, change this function: training uses it,
    evaluation does not.
    """
    return jnp.ones(num_ahead)


def tokens_at_a_time(chunk: int, sequences: int, shards: int) -> int:
    """Returns how many tokens of every sequence to compute at a time.

    These are `chunk`, or fewer where a device holds more than SEQUENCES sequences.

    Args:
      shards: into how many parts the sequences are split over devices.
    """
    return max(1, min(chunk, chunk * SEQUENCES * shards // sequences))


def token_nll(
    x_BRD: jax.Array,
    table_VD: jax.Array,
    target_BR: jax.Array,
    softcap: float,
    chunk: int,
) -> jax.Array:
    """Returns -log p(target) of every token, in nats, float32 [B, R].

    `summed_nll` is the one to differentiate.

    Args:
      x_BRD: final-normed outputs.
      table_VD: the table that gives the logits, x @ table.T.
      target_BR: int32.
      softcap: logits are softcapped by it; 0 leaves them as they are.
      chunk: tokens of every sequence whose logits exist at a time.
    """
    parts = _cut(chunk, x_BRD, target_BR)
    nll = jax.lax.map(lambda part: _nll(part[0], table_VD, part[1], softcap)[0], parts)
    return _join(nll, x_BRD)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_nll(
    x_BRD: jax.Array,
    table_VD: jax.Array,
    target_BR: jax.Array,
    weight_BR: jax.Array,
    softcap: float,
    chunk: int,
) -> jax.Array:
    """Returns the weighted sum of `token_nll` over all tokens: nats, a float32 scalar.

    The forward pass makes the gradients too, while the logits are at hand: that of x, and that of
    the table where it is trained. So no logits are computed twice.

    Args:
      x_BRD, table_VD, target_BR, softcap, chunk: as for `token_nll`.
      weight_BR: float32; it gets no gradient.
    """
    return jnp.sum(token_nll(x_BRD, table_VD, target_BR, softcap, chunk) * weight_BR)


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts arrays [B, R, ...] into [chunks, B, r, ...], token i in chunk i % chunks.

    Neighbours may lie on one device, and every device is to have its part of every chunk.
    """
    B, R = arrays[0].shape[:2]
    r = min(chunk, R)

    def cut(x: jax.Array) -> jax.Array:
        no_padding = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), (0, -R % r), *no_padding])
        return jnp.moveaxis(x.reshape(B, r, -1, *x.shape[2:]), 2, 0)

    return tuple(map(cut, arrays))


def _join(x: jax.Array, like_BRD: jax.Array) -> jax.Array:
    """Inverts the cut."""
    B, R = like_BRD.shape[:2]
    return jnp.moveaxis(x, 0, 2).reshape(B, -1, *x.shape[3:])[:, :R]


def _nll(
    x_BrD: jax.Array,
    table_VD: jax.Array,
    target_Br: jax.Array,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns -log p of the targets, and its gradient in the products x . table.

    They are float32 [B, r] and [B, r, V].
    """
    logits_BrV = einsum("BrD,VD->BrV", x_BrD, table_VD.astype(x_BrD.dtype), jnp.float32)
    logits_BrV, slope_BrV = softcapped(logits_BrV, softcap)
    high_Br1 = jnp.max(logits_BrV, axis=-1, keepdims=True)
    exp_BrV = jnp.exp(logits_BrV - high_Br1)
    total_Br1 = jnp.sum(exp_BrV, axis=-1, keepdims=True)
    picked_Br1 = jnp.take_along_axis(logits_BrV, target_Br[..., None], axis=-1)
    is_target_BrV = target_Br[..., None] == jnp.arange(table_VD.shape[0])
    dlogits_BrV = (exp_BrV / total_Br1 - is_target_BrV) * slope_BrV
    return (jnp.log(total_Br1) + high_Br1 - picked_Br1)[..., 0], dlogits_BrV


def _forward(x_BRD, table_VD, target_BR, weight_BR, softcap, chunk):
    trained = table_VD.perturbed
    inputs = x_BRD, table_VD, target_BR, weight_BR
    x_BRD, table_VD, target_BR, weight_BR = (x.value for x in inputs)
    dtype = x_BRD.dtype

    def one(dtable_DV, part):
        x_BrD, target_Br, weight_Br = part
        nll_Br, dlogits_BrV = _nll(x_BrD, table_VD, target_Br, softcap)
        dlogits_BrV = (dlogits_BrV * weight_Br[..., None]).astype(dtype)
        dx_BrD = einsum("BrV,VD->BrD", dlogits_BrV, table_VD.astype(dtype), jnp.float32)
        if trained:
            dlogits_RV = dlogits_BrV.reshape(-1, dlogits_BrV.shape[-1])
            x_RD = x_BrD.reshape(-1, x_BrD.shape[-1])
            # A CPU transposes the first operand: x, not the logits, which are many more.
            dtable_DV += einsum("RD,RV->DV", x_RD, dlogits_RV, jnp.float32)
        return dtable_DV, (nll_Br * weight_Br, dx_BrD.astype(dtype))

    dtable_DV = jnp.zeros(table_VD.shape[::-1], jnp.float32) if trained else None
    dtable_DV, (nll, dx) = jax.lax.scan(one, dtable_DV, _cut(chunk, x_BRD, target_BR, weight_BR))
    dtable_VD = None
    if trained:
        # The barrier keeps XLA from taking this transpose into the product.
        dtable_VD = jax.lax.optimization_barrier(dtable_DV).T.astype(table_VD.dtype)
    return jnp.sum(nll), (_join(dx, x_BRD), dtable_VD)


def _backward(softcap, chunk, saved, dsum):
    dx_BRD, dtable_VD = (None if d is None else (d * dsum).astype(d.dtype) for d in saved)
    return dx_BRD, dtable_VD, None, None


summed_nll.defvjp(_forward, _backward, symbolic_zeros=True)
