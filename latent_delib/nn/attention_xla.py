"""The attention primitive in plain XLA, a block of scores at a time: for every platform, without a kernel.

Queries pass in chunks of groups; a chunk goes over the blocks of shared keys that any of its queries sees (traces are
sorted by position, so that is few), under a running softmax. The backward pass computes the scores again from the saved
log-sum-exp. No array of all queries x all keys exists in either.

Two letters of its own: c groups of a chunk, U keys of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.nn.attention import Bounds, Keys

QUERIES = 256  # tokens of a chunk, and
KEYS = 256  # slots of a block: for every head this many scores are in flight
NEVER = -1e30  # a score that leaves no weight, and finite: a row that has seen nothing yet computes with it
FLOAT32 = dict(preferred_element_type=jnp.float32)


class Chunk(NamedTuple):
    """Operands of c groups; stacked over chunks on the first axis where all of them are meant.

    q [B, K, c, S, G, H]. own: keys and values [B, c, S, K, H], or None. start, stop, own_start: int32 [B, c, S].
    """

    q: jax.Array
    own: Keys | None
    start: jax.Array
    stop: jax.Array
    own_start: jax.Array


def forward(
    q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds, scale: float, softcap: float
) -> tuple[jax.Array, jax.Array]:
    """Attention's output [B, M, S, N, H] in the dtype of the values, and every row's log-sum-exp [B, M, S, N]."""
    chunks, shared = _cut(q_BMSNH, own, prefix, bounds)

    def attend(chunk: Chunk):
        def see(state, score, values, equation):
            high, total, out = state
            scores, _, visible = score
            new = jnp.maximum(high, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
            fade = jnp.exp(high - new)
            more = jnp.einsum(equation, weights.astype(values.dtype), values, **FLOAT32)
            return new, total * fade + weights.sum(-1), out * fade[..., None] + more

        def block(i, state):
            (k, v), seen = _block(shared, chunk, i)
            return see(state, _scores(chunk.q, k, seen, scale, softcap), v, "BKcSGU,BUKH->BKcSGH")

        zeros = jnp.zeros(chunk.q.shape, jnp.float32)
        state = zeros[..., 0] + NEVER, zeros[..., 0], zeros
        if chunk.own is not None:
            seen = _own_seen(chunk)
            state = see(
                state, _scores(chunk.q, chunk.own[0], seen, scale, softcap), chunk.own[1], "BKcSGU,BcUKH->BKcSGH"
            )
        if shared is not None:
            state = jax.lax.fori_loop(*_range(chunk, shared), block, state)
        high, total, out = state
        total = jnp.where(total > 0, total, 1.0)  # rows of padding
        return (out / total[..., None]).astype(own[1].dtype), high + jnp.log(total)

    out, lse = jax.lax.map(attend, chunks)
    return _join(out, q_BMSNH.shape), _join(lse[..., None], (*q_BMSNH.shape[:-1], 1))[..., 0]


def backward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    out_BMSNH: jax.Array,
    lse_BMSN: jax.Array,
    dout_BMSNH: jax.Array,
    scale: float,
    softcap: float,
    into_prefix: bool,
) -> tuple[jax.Array, Keys, Keys | None]:
    """Gradients of q, of own keys and values and, where asked for, of the prefix; each in its operand's dtype."""
    chunks, shared = _cut(q_BMSNH, own, prefix, bounds)
    into_shared = into_prefix or (shared is not None and chunks.own is None)
    delta_BMSN = jnp.sum(out_BMSNH.astype(jnp.float32) * dout_BMSNH, axis=-1)
    like_q = [_cut(x, own, prefix, bounds)[0].q for x in (dout_BMSNH, lse_BMSN[..., None], delta_BMSN[..., None])]
    zeros = None if shared is None or not into_shared else tuple(jnp.zeros(x.shape, jnp.float32) for x in shared)

    def differentiate(dshared, operands):
        chunk, dout, lse, delta = operands

        def see(score, values, equation):
            """Weights, and the gradient of the bare products q . k, both in the dtype of the operands."""
            scores, slope, visible = score
            weights = jnp.where(visible, jnp.exp(scores - lse), 0.0)
            dweights = jnp.einsum(equation, dout, values, **FLOAT32)
            return weights.astype(dout.dtype), (weights * (dweights - delta) * slope).astype(chunk.q.dtype)

        def block(i, carry):
            dq, dshared = carry
            (k, v), seen = _block(shared, chunk, i)
            p, ds = see(_scores(chunk.q, k, seen, scale, softcap), v, "BKcSGH,BUKH->BKcSGU")
            dq += jnp.einsum("BKcSGU,BUKH->BKcSGH", ds, k, **FLOAT32)
            if into_shared:
                dk = jnp.einsum("BKcSGU,BKcSGH->BUKH", ds, chunk.q, **FLOAT32)
                dv = jnp.einsum("BKcSGU,BKcSGH->BUKH", p, dout, **FLOAT32)
                at = _first(shared, i)
                dshared = tuple(_add(total, part, at) for total, part in zip(dshared, (dk, dv)))
            return dq, dshared

        dq, down = jnp.zeros(chunk.q.shape, jnp.float32), None
        if chunk.own is not None:
            k, v = chunk.own
            p, ds = see(_scores(chunk.q, k, _own_seen(chunk), scale, softcap), v, "BKcSGH,BcUKH->BKcSGU")
            dq += jnp.einsum("BKcSGU,BcUKH->BKcSGH", ds, k, **FLOAT32)
            dk = jnp.einsum("BKcSGU,BKcSGH->BcUKH", ds, chunk.q, **FLOAT32)
            dv = jnp.einsum("BKcSGU,BKcSGH->BcUKH", p, dout, **FLOAT32)
            down = dk.astype(k.dtype), dv.astype(v.dtype)
        if shared is not None:
            dq, dshared = jax.lax.fori_loop(*_range(chunk, shared), block, (dq, dshared))
        return dshared, (dq.astype(chunk.q.dtype), down)

    dshared, (dq, down) = jax.lax.scan(differentiate, zeros, (chunks, *like_q))
    dq_BMSNH = _join(dq, q_BMSNH.shape)
    if dshared is not None:
        dshared = tuple(d.astype(x.dtype) for d, x in zip(dshared, shared))
    if chunks.own is None:  # the text's keys were the shared ones
        return dq_BMSNH, tuple(d[:, None] for d in dshared), None
    B, M, S = q_BMSNH.shape[:3]
    down = tuple(jnp.moveaxis(d, 0, 1).reshape(B, -1, *d.shape[3:])[:, :M] for d in down)
    return dq_BMSNH, down, dshared


def _cut(q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds) -> tuple[Chunk, Keys | None]:
    """All chunks, and the keys and values [B, T, K, H] that every group shares.

    A text alone is cut between its tokens: each is a group of one, and the text is what they share.
    """
    B, M, S, N, H = q_BMSNH.shape
    K = own[0].shape[3]
    start, stop, own_start = bounds
    if prefix is None and M == 1:
        prefix, own = (own[0][:, 0], own[1][:, 0]), None
        start, stop = own_start, jnp.broadcast_to(jnp.arange(1, S + 1, dtype=jnp.int32), own_start.shape)
        q_BMSNH, start, stop, own_start = (x.swapaxes(1, 2) for x in (q_BMSNH, start, stop, own_start))
        M, S = S, 1
    c = min(M, max(1, QUERIES // S))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -M % c)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, c, *x.shape[2:]), 1, 0)

    q = jnp.moveaxis(cut(q_BMSNH.reshape(B, M, S, K, N // K, -1)), 4, 2)
    own_cut = None if own is None else (cut(own[0]), cut(own[1]))
    return Chunk(q, own_cut, cut(start), cut(stop), cut(own_start)), prefix


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of the cut: [chunks, B, K, c, S, G, H] to [B, M, S, N, H]."""
    B, M, S = shape[:3]
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))  # [B, chunks, c, S, K, G, H]
    return x.reshape(B, -1, *shape[3:])[:, : M * S].reshape(shape)


def _scores(q, k, seen, scale: float, softcap: float):
    """Scores [B, K, c, S, G, U], their slope in q . k, and what is visible; keys are shared (BUKH) or own (BcUKH)."""
    equation = "BKcSGH,BUKH->BKcSGU" if k.ndim == 4 else "BKcSGH,BcUKH->BKcSGU"
    scores = jnp.einsum(equation, q, k, **FLOAT32) * scale
    visible, slope = seen[:, None, :, :, None, :], scale
    if softcap:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, scale * (1 - jnp.square(bent))
    return jnp.where(visible, scores, NEVER), slope, visible


def _own_seen(chunk: Chunk) -> jax.Array:
    """Which own tokens a query sees, bool [B, c, S, U]."""
    own = jnp.arange(chunk.own_start.shape[-1])
    return (own >= chunk.own_start[..., None]) & (own <= own[:, None])


def _first(shared: Keys, i: jax.Array) -> jax.Array:
    """The first slot of block i: the last block is moved back so that it ends where the keys end."""
    T = shared[0].shape[1]
    return jnp.minimum(i * KEYS, max(T - KEYS, 0))


def _block(shared: Keys, chunk: Chunk, i: jax.Array) -> tuple[Keys, jax.Array]:
    """Keys and values [B, U, K, H] of block i, and which a query sees, bool [B, c, S, U]."""
    at, size = _first(shared, i), min(KEYS, shared[0].shape[1])
    slot = at + jnp.arange(size)
    seen = (slot >= chunk.start[..., None]) & (slot < chunk.stop[..., None]) & (slot >= i * KEYS)
    k, v = (jax.lax.dynamic_slice_in_dim(x, at, size, axis=1) for x in shared)
    return (k, v), seen


def _range(chunk: Chunk, shared: Keys) -> tuple[jax.Array, jax.Array]:
    """The blocks that some query of the chunk sees, from and up to."""
    T, some = shared[0].shape[1], chunk.start < chunk.stop
    first = jnp.min(jnp.where(some, chunk.start, T)) // KEYS
    last = -(-jnp.max(jnp.where(some, chunk.stop, 0)) // KEYS)
    return first, jnp.minimum(last, -(-T // KEYS))


def _add(total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """Adds a block's part [B, U, K, H] to what it belongs to [B, T, K, H]."""
    size = part.shape[1]
    return jax.lax.dynamic_update_slice_in_dim(
        total, jax.lax.dynamic_slice_in_dim(total, at, size, axis=1) + part, at, axis=1
    )
