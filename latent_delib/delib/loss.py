"""The loss of predicted tokens and its weights, computed on a few tokens per sequence at a time.

The loss of a token is -log p. With a teacher, a part of it is the divergence from the teacher's
prediction.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from latent_delib.nn.products import einsum, softcapped, table_product

SEQUENCES = 4  # per device; with more sequences, fewer tokens than a chunk are computed at a time


def ahead_weights(num_ahead: int) -> jax.Array:
    """Returns the weight of the loss of the n-th ahead token, n = 1 ... A, float32 [A].

    All are 1, as published. To weight the loss by n, change this function: training and
    `validation_loss` use it, `evaluate` does not.
    """
    return jnp.ones(num_ahead)


def tokens_at_a_time(chunk: int, sequences: int, shards: int) -> int:
    """Returns how many tokens of every sequence to compute at a time.

    The number is `chunk`, or less where a device holds more than SEQUENCES sequences.

    Args:
      shards: number of parts into which the sequences are split over devices.
    """
    return max(1, min(chunk, chunk * SEQUENCES * shards // sequences))


def divergence(logits_BrV: jax.Array, teacher_BrV: jax.Array) -> jax.Array:
    """Returns the divergence of every token's distribution from the teacher's, float32 [B, r].

    The divergence is KL(teacher || student) in nats, from the logits of both. To distil by another
    divergence, change this function: its gradient follows.
    """
    log_p_BrV = jax.nn.log_softmax(logits_BrV)
    log_q_BrV = jax.nn.log_softmax(teacher_BrV)
    return jnp.sum(jnp.exp(log_q_BrV) * (log_q_BrV - log_p_BrV), axis=-1)


def token_loss(
    x_BRD: jax.Array,
    table_VD: jax.Array,
    target_BR: jax.Array,
    softcap: float,
    chunk: int,
    distill: float = 0.0,
    teacher_BRD: jax.Array | None = None,
) -> jax.Array:
    """Returns the loss of every token, in nats, float32 [B, R].

    The loss is (1 - distill) * -log p(target) + distill * `divergence`. For gradients, use
    `summed_loss`.

    Args:
      x_BRD: final-normed outputs.
      table_VD: the table of the logits, x @ table.T, also for the teacher.
      target_BR: target tokens, int32.
      softcap: softcap of the logits; 0 for none.
      chunk: number of tokens of every sequence whose logits exist at a time.
      distill: weight of the divergence, in [0, 1].
      teacher_BRD: the teacher's final-normed outputs; None where distill is 0.
    """
    parts = _cut(chunk, (x_BRD, target_BR, teacher_BRD))

    def one(part: tuple) -> jax.Array:
        x_BrD, target_Br, teacher_BrD = part
        return _loss(x_BrD, table_VD, target_Br, softcap, distill, teacher_BrD)[0]

    return _join(jax.lax.map(one, parts), x_BRD)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 8))
def summed_loss(
    x_BRD: jax.Array,
    table_VD: jax.Array,
    target_BR: jax.Array,
    weight_BR: jax.Array,
    softcap: float,
    chunk: int,
    distill: float = 0.0,
    teacher_BRD: jax.Array | None = None,
    shards: int = 1,
) -> jax.Array:
    """Returns the weighted sum of `token_loss` over all tokens: nats, a float32 scalar.

    While the forward pass has the logits, it also computes the gradient of x, and of the table
    where the table is trained. So no logits are computed twice.

    Args:
      x_BRD, table_VD, target_BR, softcap, chunk, distill: as for `token_loss`.
      weight_BR: float32; it gets no gradient.
      teacher_BRD: as for `token_loss`; the teacher gets no gradient, and gives the table none.
      shards: number of parts into which the sequences are split over devices. Each part sums its
        own gradient of the table over all chunks; then the parts are added up, once.
    """
    loss_BR = token_loss(x_BRD, table_VD, target_BR, softcap, chunk, distill, teacher_BRD)
    return jnp.sum(loss_BR * weight_BR)


def _cut(chunk: int, arrays: Any) -> Any:
    """Cuts arrays [B, R, ...] into [chunks, B, r, ...], token i in chunk i % chunks.

    Neighbouring tokens may be on one device. Cut this way, every chunk has a part on every device.
    """
    B, R = arrays[0].shape[:2]
    r = min(chunk, R)

    def cut(x: jax.Array) -> jax.Array:
        no_padding = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), (0, -R % r), *no_padding])
        return jnp.moveaxis(x.reshape(B, r, -1, *x.shape[2:]), 2, 0)

    return jax.tree.map(cut, arrays)


def _join(x: jax.Array, like_BRD: jax.Array) -> jax.Array:
    """Undoes `_cut` for x [chunks, B, r, ...], without the padding."""
    B, R = like_BRD.shape[:2]
    return jnp.moveaxis(x, 0, 2).reshape(B, -1, *x.shape[3:])[:, :R]


def _loss(
    x_BrD: jax.Array,
    table_VD: jax.Array,
    target_Br: jax.Array,
    softcap: float,
    distill: float,
    teacher_BrD: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss of every token, and its gradient with respect to x . table.

    The loss is float32 [B, r], the gradient float32 [B, r, V].
    """
    table_VD = table_VD.astype(x_BrD.dtype)
    logits_BrV, slope_BrV = softcapped(table_product(x_BrD, table_VD), softcap)
    loss_Br, dlogits_BrV = _nll(logits_BrV, target_Br)
    if teacher_BrD is not None:
        taught_BrV, _ = softcapped(table_product(teacher_BrD, table_VD), softcap)
        apart_Br, gradient = jax.vjp(lambda logits: divergence(logits, taught_BrV), logits_BrV)
        (dapart_BrV,) = gradient(jnp.ones_like(apart_Br))
        loss_Br = (1 - distill) * loss_Br + distill * apart_Br
        dlogits_BrV = (1 - distill) * dlogits_BrV + distill * dapart_BrV
    return loss_Br, dlogits_BrV * slope_BrV


def _nll(logits_BrV: jax.Array, target_Br: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns -log p of the targets, float32 [B, r], and its gradient with respect to logits."""
    high_Br1 = jnp.max(logits_BrV, axis=-1, keepdims=True)
    exp_BrV = jnp.exp(logits_BrV - high_Br1)
    total_Br1 = jnp.sum(exp_BrV, axis=-1, keepdims=True)
    picked_Br1 = jnp.take_along_axis(logits_BrV, target_Br[..., None], axis=-1)
    is_target_BrV = target_Br[..., None] == jnp.arange(logits_BrV.shape[-1])
    dlogits_BrV = exp_BrV / total_Br1 - is_target_BrV
    return (jnp.log(total_Br1) + high_Br1 - picked_Br1)[..., 0], dlogits_BrV


def _forward(x_BRD, table_VD, target_BR, weight_BR, softcap, chunk, distill, teacher_BRD, shards):
    # True where the table is differentiated: with `symbolic_zeros` each input says so.
    trained = table_VD.perturbed
    inputs = x_BRD, table_VD, target_BR, weight_BR, teacher_BRD
    x_BRD, table_VD, *others = jax.tree.map(lambda x: x.value, inputs)
    dtype = x_BRD.dtype

    def one(dtable_WDV, part):
        x_BrD, target_Br, weight_Br, teacher_BrD = part
        loss_Br, dlogits_BrV = _loss(x_BrD, table_VD, target_Br, softcap, distill, teacher_BrD)
        dlogits_BrV = (dlogits_BrV * weight_Br[..., None]).astype(dtype)
        dx_BrD = einsum("BrV,VD->BrD", dlogits_BrV, table_VD.astype(dtype), jnp.float32)
        if trained:
            dlogits_WRV = dlogits_BrV.reshape(shards, -1, dlogits_BrV.shape[-1])
            x_WRD = x_BrD.reshape(shards, -1, x_BrD.shape[-1])
            # On a CPU the first operand is transposed: x, not the logits, which are larger.
            dtable_WDV += einsum("WRD,WRV->WDV", x_WRD, dlogits_WRV, jnp.float32)
        return dtable_WDV, (loss_Br * weight_Br, dx_BrD.astype(dtype))

    # W parts of the batch: a sum over all of it would cross devices in every chunk.
    dtable_WDV = jnp.zeros((shards, *table_VD.shape[::-1]), jnp.float32) if trained else None
    parts = _cut(chunk, (x_BRD, *others))
    dtable_WDV, (loss, dx) = jax.lax.scan(one, dtable_WDV, parts)
    dtable_VD = None
    if trained:
        # The barrier keeps XLA from merging this transpose into the product.
        dtable_DV = jax.lax.optimization_barrier(jnp.sum(dtable_WDV, axis=0))
        dtable_VD = dtable_DV.T.astype(table_VD.dtype)
    return jnp.sum(loss), (_join(dx, x_BRD), dtable_VD)


def _backward(softcap, chunk, distill, shards, saved, dsum):
    dx_BRD, dtable_VD = saved
    dx_BRD = (dx_BRD * dsum).astype(dx_BRD.dtype)
    if dtable_VD is not None:
        dtable_VD = (dtable_VD * dsum).astype(dtable_VD.dtype)
    return dx_BRD, dtable_VD, None, None, None


summed_loss.defvjp(_forward, _backward, symbolic_zeros=True)
