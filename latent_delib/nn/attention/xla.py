"""The attention primitive in plain XLA, a block of scores at a time: for every platform, without a kernel.

Queries pass in chunks of groups; a chunk goes over the blocks of shared keys that any of its queries sees (traces are
sorted by position, so that is few), under a running softmax. The backward pass computes the scores again from the saved
log-sum-exp. No array of all queries x all keys exists in either.

Letters of its own: c groups of a chunk, R = S x G rows of a group, U keys of a block. Heads come first and rows are one
axis in every product: with any other order XLA copies the operands, of a block or as large as the scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.nn.attention.primitive import Bounds, Keys
from latent_delib.nn.products import einsum

QUERIES = 256  # tokens of a chunk, and
KEYS = 256  # slots of a block: for every head this many scores are in flight
NEVER = -1e30  # a score that leaves no weight, and finite: a row that has seen nothing yet computes with it


class Chunk(NamedTuple):
    """Operands of c groups; stacked over chunks on the first axis where all of them are meant.

    q [B, K, c, R, H]. own: keys and values [B, K, c, S, H], or None; own_start: int32 [B, c, S]. start, stop: of each
    of the shared sources, int32 [B, c, S].
    """

    q: jax.Array
    own: Keys | None
    own_start: jax.Array
    start: tuple[jax.Array, ...]
    stop: tuple[jax.Array, ...]


def forward(
    q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds, scale: float, softcap: float
) -> tuple[jax.Array, jax.Array]:
    """Attention's output [B, M, S, N, H] in the dtype of the values, and every row's log-sum-exp [B, M, S, N]."""
    chunks, shared = _cut(q_BMSNH, own, prefix, bounds)

    def attend(chunk: Chunk):
        def see(state, keys, seen):
            high, total, out = state
            scores, _, visible = _scores(chunk.q, keys[0], seen, scale, softcap)
            new = jnp.maximum(high, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - new[..., None]), 0.0)
            fade = jnp.exp(high - new)
            more = _weighted(weights.astype(keys[1].dtype), keys[1])
            return new, total * fade + weights.sum(-1), out * fade[..., None] + more

        def see_shared(state, keys, start, stop):
            def block(i, state):
                return see(state, *_block(keys, start, stop, i))

            return jax.lax.fori_loop(*_range(keys, start, stop), block, state)

        zeros = jnp.zeros(chunk.q.shape, jnp.float32)
        state = zeros[..., 0] + NEVER, zeros[..., 0], zeros
        if chunk.own is not None:
            state = see(state, chunk.own, _own_seen(chunk))
        for source in zip(shared, chunk.start, chunk.stop):
            state = see_shared(state, *source)
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
    delta_BMSN = jnp.sum(out_BMSNH.astype(jnp.float32) * dout_BMSNH, axis=-1)
    like_q = [_cut(x, own, prefix, bounds)[0].q for x in (dout_BMSNH, lse_BMSN[..., None], delta_BMSN[..., None])]
    wanted = [into_prefix] * (prefix is not None) + [True] * (chunks.own is None)  # of each shared source
    zeros = [
        tuple(jnp.zeros_like(x.swapaxes(-1, -2), jnp.float32) for x in keys) if w else None
        for keys, w in zip(shared, wanted)
    ]

    def differentiate(dshared, operands):
        chunk, dout, lse, delta = operands

        def see(keys, seen):
            """Weights, and the gradient of the bare products q . k, both in the dtype of the operands."""
            scores, slope, visible = _scores(chunk.q, keys[0], seen, scale, softcap)
            weights = jnp.where(visible, jnp.exp(scores - lse), 0.0)
            dweights = _products(dout, keys[1])
            return weights.astype(dout.dtype), (weights * (dweights - delta) * slope).astype(chunk.q.dtype)

        def into_keys(p, ds, of_all):
            """Gradients of keys and values, [B, K, c, H, U], or summed over the chunk, [B, K, H, U]."""
            return tuple(_onto(x, y, of_all) for x, y in ((ds, chunk.q), (p, dout)))

        def see_shared(dq, dkeys, keys, start, stop):
            def block(i, carry):
                dq, dkeys = carry
                found, seen = _block(keys, start, stop, i)
                p, ds = see(found, seen)
                if dkeys is not None:
                    at = _first(keys, i)
                    dkeys = tuple(_add(total, part, at) for total, part in zip(dkeys, into_keys(p, ds, True)))
                return dq + _weighted(ds, found[0]), dkeys

            return jax.lax.fori_loop(*_range(keys, start, stop), block, (dq, dkeys))

        dq, down, done = jnp.zeros(chunk.q.shape, jnp.float32), None, []
        if chunk.own is not None:
            p, ds = see(chunk.own, _own_seen(chunk))
            dq += _weighted(ds, chunk.own[0])
            down = tuple(d.swapaxes(-1, -2).astype(x.dtype) for d, x in zip(into_keys(p, ds, False), chunk.own))
        for dkeys, *source in zip(dshared, shared, chunk.start, chunk.stop):
            dq, dkeys = see_shared(dq, dkeys, *source)
            done.append(dkeys)
        return done, (dq.astype(chunk.q.dtype), down)

    dshared, (dq, down) = jax.lax.scan(differentiate, zeros, (chunks, *like_q))

    def as_given(d: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(d, 3, 1).astype(like.dtype)  # [B, K, H, T] to [B, T, K, H]

    dshared = [d and tuple(map(as_given, d, keys)) for d, keys in zip(dshared, shared)]
    dprefix = dshared[0] if prefix is not None else None
    if chunks.own is None:  # the text's own keys were a shared source
        down = tuple(d[:, None] for d in dshared[-1])
    else:
        B, M = q_BMSNH.shape[:2]
        down = tuple(jnp.moveaxis(d, (1, 2), (0, 4)) for d in down)  # [B, chunks, c, S, K, H]
        down = tuple(d.reshape(B, -1, *d.shape[3:])[:, :M] for d in down)
    return _join(dq, q_BMSNH.shape), down, dprefix


def _cut(q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds) -> tuple[Chunk, tuple[Keys, ...]]:
    """All chunks, and the keys and values [B, K, T, H] of each source that every group shares: the prefix, and a long
    text's own, which is cut between its tokens: each is a group of one then, and the text is what they share."""
    B, M, S, N, H = q_BMSNH.shape
    K = own[0].shape[3]
    start, stop, own_start = bounds
    sources = [] if prefix is None else [(prefix, start, stop)]
    if M == 1 and S > QUERIES:
        until = jnp.broadcast_to(jnp.arange(1, S + 1, dtype=jnp.int32), own_start.shape)
        sources.append(((own[0][:, 0], own[1][:, 0]), own_start, until))
        sources = [(keys, start.swapaxes(1, 2), stop.swapaxes(1, 2)) for keys, start, stop in sources]
        q_BMSNH, own_start, own = q_BMSNH.swapaxes(1, 2), own_start.swapaxes(1, 2), None
        M, S = S, 1
    c = min(M, max(1, QUERIES // S))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -M % c)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, c, *x.shape[2:]), 1, 0)

    q = jnp.moveaxis(cut(q_BMSNH.reshape(B, M, S, K, N // K, -1)), 4, 2)  # [chunks, B, K, c, S, G, H]
    q = q.reshape(*q.shape[:4], S * (N // K), -1)
    own_cut = None if own is None else tuple(jnp.moveaxis(cut(x), 4, 2) for x in own)
    chunks = Chunk(q, own_cut, cut(own_start), *(tuple(cut(of[i]) for of in sources) for i in (1, 2)))
    return chunks, tuple(tuple(x.swapaxes(1, 2) for x in keys) for keys, _, _ in sources)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of the cut: [chunks, B, K, c, R, H] to [B, M, S, N, H]."""
    B, M, S, N, H = shape
    chunks, _, K, c, R, _ = x.shape
    x = x.reshape(chunks, B, K, c, R * K // N, N // K, H)
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))  # [B, chunks, c, S, K, G, H]
    return x.reshape(B, -1, N, H)[:, : M * S].reshape(shape)


def _products(x: jax.Array, keys: jax.Array) -> jax.Array:
    """x . keys: [B, K, c, R, U] of [B, K, c, R, H] and keys that are shared, [B, K, U, H], or own, [B, K, c, U, H]."""
    if keys.ndim == 5:
        return einsum("BKcRH,BKcUH->BKcRU", x, keys, jnp.float32)
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    return einsum("BKRH,BKUH->BKRU", rows, keys, jnp.float32).reshape(*x.shape[:-1], -1)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sums of values: [B, K, c, R, H] of weights [B, K, c, R, U]; values as the keys of `_products`."""
    if values.ndim == 5:
        return einsum("BKcRU,BKcUH->BKcRH", weights, values, jnp.float32)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    return einsum("BKRU,BKUH->BKRH", rows, values, jnp.float32).reshape(*weights.shape[:-1], -1)


def _onto(weights: jax.Array, x: jax.Array, of_all: bool) -> jax.Array:
    """What x [B, K, c, R, H] is to the keys: [B, K, c, H, U], or, `of_all` groups together, [B, K, H, U]. In that order
    it is x that XLA transposes; in the other the weights, which are many more."""
    if not of_all:
        return einsum("BKcRH,BKcRU->BKcHU", x, weights, jnp.float32)
    x, weights = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (x, weights))
    return einsum("BKRH,BKRU->BKHU", x, weights, jnp.float32)


def _scores(q, k, seen, scale: float, softcap: float):
    """Scores [B, K, c, R, U], their slope in q . k, and what is visible."""
    scores = _products(q, k) * scale
    G = q.shape[3] // seen.shape[2]
    visible, slope = jnp.repeat(seen, G, axis=2)[:, None], scale
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
    T = shared[0].shape[2]
    return jnp.minimum(i * KEYS, max(T - KEYS, 0))


def _block(shared: Keys, start: jax.Array, stop: jax.Array, i: jax.Array) -> tuple[Keys, jax.Array]:
    """Keys and values [B, K, U, H] of block i, and which a query sees, bool [B, c, S, U]."""
    at, size = _first(shared, i), min(KEYS, shared[0].shape[2])
    slot = at + jnp.arange(size)
    seen = (slot >= start[..., None]) & (slot < stop[..., None]) & (slot >= i * KEYS)
    k, v = (jax.lax.dynamic_slice_in_dim(x, at, size, axis=2) for x in shared)
    return (k, v), seen


def _range(shared: Keys, start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The blocks that some query of the chunk sees, from and up to."""
    T, some = shared[0].shape[2], start < stop
    first = jnp.min(jnp.where(some, start, T)) // KEYS
    last = -(-jnp.max(jnp.where(some, stop, 0)) // KEYS)
    return first, jnp.minimum(last, -(-T // KEYS))


def _add(total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """Adds a block's part [B, K, H, U] to what it belongs to [B, K, H, T]."""
    size = part.shape[3]
    return jax.lax.dynamic_update_slice_in_dim(
        total, jax.lax.dynamic_slice_in_dim(total, at, size, axis=3) + part, at, axis=3
    )
