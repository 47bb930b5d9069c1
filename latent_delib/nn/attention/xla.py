"""The attention primitive in plain XLA, a block of scores at a time, for every platform.

Queries pass in chunks of groups. Under a running softmax, a chunk goes over the blocks of shared
keys that any of its queries sees; these are few, because traces are sorted by position. The
backward pass computes the weights again from the saved log-sum-exp. Neither pass has an array of
all queries x all keys.

Letters of this module: c groups of a chunk, R = S x G rows of a group, U keys of a block. In every
product heads come first and rows are one axis: with any other order XLA copies the operands, some
of them as large as the scores.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.nn.attention.layout import pad_axis
from latent_delib.nn.attention.primitive import Bounds, Keys, Options, delta_of, own_in_range
from latent_delib.nn.products import einsum, softcapped

# QUERIES x KEYS scores per head exist at a time.
QUERIES = 256  # tokens of a chunk
KEYS = 256  # slots of a block
NEVER = -1e30  # gives no weight; finite, because a row that has seen nothing yet computes with it


class Chunk(NamedTuple):
    """Holds the operands of c groups.

    The operands of all chunks together have one more axis, the first.

    q: queries [B, K, c, R, H].
    own: own keys and values [B, K, c, U, H], or None.
    own_start: `Bounds.own_start`, int32 [B, c, S].
    start, stop: the visible range of each shared source, int32 [B, c, S].
    """

    q: jax.Array
    own: Keys | None
    own_start: jax.Array
    start: list[jax.Array]
    stop: list[jax.Array]


class Softmax(NamedTuple):
    """Holds a running softmax of a chunk's rows over the keys so far, float32.

    high: the highest score, [B, K, c, R].
    total: the sum of weights exp(score - high), [B, K, c, R].
    out: the sum of values by these weights, [B, K, c, R, H].
    """

    high: jax.Array
    total: jax.Array
    out: jax.Array


class Saved(NamedTuple):
    """Holds arrays per row of a chunk that the backward pass needs besides the chunk's operands.

    dout: the gradient of the output, [B, K, c, R, H].
    lse: the log-sum-exp, [B, K, c, R, 1].
    delta: the result of `primitive.delta_of`, [B, K, c, R, 1].
    """

    dout: jax.Array
    lse: jax.Array
    delta: jax.Array


def forward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention's output and the log-sum-exp of every row.

    Args:
      q_BMSNH, prefix, bounds: as for `primitive.attend`.
      own: keys and values [B, M, U, K, H] of the groups.

    Returns:
      [B, M, S, N, H] in the dtype of the values, and float32 [B, M, S, N].
    """
    chunks, shared = _cut(q_BMSNH, own, prefix, bounds)

    def attend(chunk: Chunk) -> tuple[jax.Array, jax.Array]:
        zeros = jnp.zeros(chunk.q.shape, jnp.float32)
        state = Softmax(zeros[..., 0] + NEVER, zeros[..., 0], zeros)
        if chunk.own is not None:
            seen = own_in_range(chunk.own_start, chunk.own[0].shape[3])
            state = _see(state, chunk.q, chunk.own, seen, options)
        for keys, start, stop in zip(shared, chunk.start, chunk.stop):

            def see_block(i, state, keys=keys, start=start, stop=stop):
                found, seen = _block(keys, start, stop, i)
                return _see(state, chunk.q, found, seen, options)

            state = jax.lax.fori_loop(*_range(keys, start, stop), see_block, state)
        total = jnp.where(state.total > 0, state.total, 1.0)  # 0 in rows of padding
        out = state.out / total[..., None]
        return out.astype(own[1].dtype), state.high + jnp.log(total)

    out, lse = jax.lax.map(attend, chunks)
    lse = _join(lse[..., None], (*q_BMSNH.shape[:-1], 1))
    return _join(out, q_BMSNH.shape), lse[..., 0]


def _see(state: Softmax, q: jax.Array, keys: Keys, seen: jax.Array, options: Options) -> Softmax:
    """Adds some keys and values to a running softmax; `seen` says which of them each query sees."""
    scores, _, visible = _scores(q, keys[0], seen, options)
    high = jnp.maximum(state.high, scores.max(-1))
    weights = jnp.where(visible, jnp.exp(scores - high[..., None]), 0.0)
    fade = jnp.exp(state.high - high)
    more = _weighted(weights.astype(keys[1].dtype), keys[1])
    total = state.total * fade + weights.sum(-1)
    out = state.out * fade[..., None] + more
    return Softmax(high, total, out)


def backward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    out_BMSNH: jax.Array,
    lse_BMSN: jax.Array,
    dout_BMSNH: jax.Array,
    options: Options,
) -> tuple[jax.Array, Keys, Keys | None]:
    """Returns the gradients of queries, of own keys and values and, where asked for, of the prefix.

    Args:
      q_BMSNH, own, prefix, bounds, options: as for `forward`.
      out_BMSNH, lse_BMSN: the results of `forward`. To differentiate through the own keys alone,
        pass the results for own keys and prefix together. The gradients through own keys and
        through the prefix then add up to the whole.
      dout_BMSNH: the gradient of the output.

    Returns:
      Each gradient in its operand's shape and dtype; None for the prefix's unless asked for.
    """
    chunks, shared = _cut(q_BMSNH, own, prefix, bounds)
    delta_BMSN = delta_of(out_BMSNH, dout_BMSNH)
    like_q = (dout_BMSNH, lse_BMSN[..., None], delta_BMSN[..., None])
    saved = Saved(*(_cut_rows(x, own[0].shape[3]) for x in like_q))
    wanted = []  # for each shared source, whether its gradient is computed
    if prefix is not None:
        wanted.append(options.into_prefix)
    if chunks.own is None:
        wanted.append(True)
    totals = [_no_gradient(keys) if is_wanted else None for keys, is_wanted in zip(shared, wanted)]

    def differentiate(totals, operands):
        chunk, saved = operands
        dq, d_own = _through_own(chunk, saved, options)
        sums = []
        for number, (total, keys) in enumerate(zip(totals, shared)):
            dq, total = _through_shared(chunk, saved, number, keys, dq, total, options)
            sums.append(total)
        return sums, (dq.astype(chunk.q.dtype), d_own)

    totals, (dq, d_own) = jax.lax.scan(differentiate, totals, (chunks, saved))
    dshared = [total and _as_given(total, keys) for total, keys in zip(totals, shared)]
    if chunks.own is None:  # the text's own keys were a shared source
        d_own = jax.tree.map(lambda d: d[:, None], dshared[-1])
    else:
        B, M = q_BMSNH.shape[:2]
        # [B, chunks, c, U, K, H]
        d_own = jax.tree.map(lambda d: jnp.moveaxis(d, (1, 2), (0, 4)), d_own)
        d_own = jax.tree.map(lambda d: d.reshape(B, -1, *d.shape[3:])[:, :M], d_own)
    return _join(dq, q_BMSNH.shape), d_own, None if prefix is None else dshared[0]


def _through_own(chunk: Chunk, saved: Saved, options: Options) -> tuple[jax.Array, Keys | None]:
    """Returns the gradients of queries and own keys through the scores between them.

    They are float32 [B, K, c, R, H], and like `chunk.own`.
    """
    if chunk.own is None:
        return jnp.zeros(chunk.q.shape, jnp.float32), None
    seen = own_in_range(chunk.own_start, chunk.own[0].shape[3])
    weights, dproducts = _derive(chunk.q, chunk.own, seen, saved, options)
    d_own = _sum_over_rows(dproducts, chunk.q), _sum_over_rows(weights, saved.dout)
    d_own = jax.tree.map(lambda d, x: d.swapaxes(-1, -2).astype(x.dtype), d_own, chunk.own)
    return _weighted(dproducts, chunk.own[0]), d_own


def _through_shared(
    chunk: Chunk,
    saved: Saved,
    number: int,
    keys: Keys,
    dq: jax.Array,
    total: Keys | None,
    options: Options,
) -> tuple[jax.Array, Keys | None]:
    """Adds the gradients through the keys of a shared source, block by block.

    Args:
      number: number of the source.
      keys: its keys and values [B, K, T, H].
      dq: gradient of the queries so far.
      total: gradients of the keys and values so far, as `_no_gradient` begins them; None: they are
        not wanted.
    """
    start, stop = chunk.start[number], chunk.stop[number]

    def through_block(i, carry):
        dq, total = carry
        found, seen = _block(keys, start, stop, i)
        weights, dproducts = _derive(chunk.q, found, seen, saved, options)
        if total is not None:
            first = _first(keys, i)
            dk = _add(total[0], _sum_over_rows(dproducts, chunk.q, over_groups=True), first)
            total = dk, _add(total[1], _sum_over_rows(weights, saved.dout, over_groups=True), first)
        return dq + _weighted(dproducts, found[0]), total

    return jax.lax.fori_loop(*_range(keys, start, stop), through_block, (dq, total))


def _derive(
    q: jax.Array, keys: Keys, seen: jax.Array, saved: Saved, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns weights and the gradient of the products q . k, [B, K, c, R, U] each.

    The products are without scale and softcap. The weights have the dtype of dout, the gradient has
    the dtype of q.
    """
    scores, slope, visible = _scores(q, keys[0], seen, options)
    weights = jnp.where(visible, jnp.exp(scores - saved.lse), 0.0)
    dweights = _products(saved.dout, keys[1])
    dproducts = weights * (dweights - saved.delta) * slope
    return weights.astype(saved.dout.dtype), dproducts.astype(q.dtype)


def _no_gradient(keys: Keys) -> Keys:
    """Returns zeros, float32 [B, K, H, T], for gradients of shared keys [B, K, T, H]."""
    return jax.tree.map(lambda x: jnp.zeros_like(x.swapaxes(-1, -2), jnp.float32), keys)


def _as_given(gradients: Keys, keys: Keys) -> Keys:
    """Returns gradients [B, K, H, T] as [B, T, K, H], in the dtypes of the keys and values."""
    return jax.tree.map(lambda d, x: jnp.moveaxis(d, 3, 1).astype(x.dtype), gradients, keys)


def _cut(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
) -> tuple[Chunk, list[Keys]]:
    """Returns all chunks, and each source that every group shares, [B, K, T, H].

    The sources are the prefix, and the own keys of a long text (M = 1). Such a text is cut between
    its tokens: each token is then a group of one, and these groups share the text's keys.
    """
    shared, start, stop = [], [], []
    if prefix is not None:
        shared.append(prefix)
        start.append(bounds.prefix_start)
        stop.append(bounds.prefix_stop)
    U, K = own[0].shape[2:4]
    q = _cut_rows(q_BMSNH, K)
    if _is_long(q_BMSNH):
        shared.append((own[0][:, 0], own[1][:, 0]))
        start.append(bounds.own_start)
        S = q_BMSNH.shape[2]
        last = jnp.arange(U - S + 1, U + 1, dtype=jnp.int32)
        stop.append(jnp.broadcast_to(last, bounds.own_start.shape))
        own = None
    c = q.shape[3]
    chunks = Chunk(
        q=q,
        own=jax.tree.map(lambda x: jnp.moveaxis(_split(x, c), 4, 2), own),
        own_start=_by_chunk(bounds.own_start),
        start=jax.tree.map(_by_chunk, start),
        stop=jax.tree.map(_by_chunk, stop),
    )
    return chunks, jax.tree.map(lambda x: x.swapaxes(1, 2), shared)


def _cut_rows(x_BMSNH: jax.Array, K: int) -> jax.Array:
    """Returns queries, or what belongs to each of them, as rows [chunks, B, K, c, R, H]."""
    N, H = x_BMSNH.shape[3:]
    x = _by_chunk(x_BMSNH)
    x = x.reshape(*x.shape[:4], K, N // K, H)
    x = jnp.moveaxis(x, 4, 2)  # [chunks, B, K, c, S, G, H]
    return x.reshape(*x.shape[:4], -1, H)


def _by_chunk(x: jax.Array) -> jax.Array:
    """Returns what belongs to each token, [B, M, S, ...], as [chunks, B, c, S, ...]."""
    if _is_long(x):
        x = x.swapaxes(1, 2)
    M, S = x.shape[1:3]
    return _split(x, min(M, max(1, QUERIES // S)))


def _is_long(x: jax.Array) -> bool:
    """Tells whether the tokens [B, M, S, ...] are of one long text, which is cut between them."""
    return x.shape[1] == 1 and x.shape[2] > QUERIES


def _split(x: jax.Array, c: int) -> jax.Array:
    """Splits groups [B, M, ...] into chunks [chunks, B, c, ...]; the last one is padded."""
    x = pad_axis(x, 1, c)
    return jnp.moveaxis(x.reshape(len(x), -1, c, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `_cut_rows`: [chunks, B, K, c, R, H] to [B, M, S, N, H]."""
    B, M, S, N, H = shape
    chunks, _, K, c, R, _ = x.shape
    x = x.reshape(chunks, B, K, c, R * K // N, N // K, H)
    x = jnp.moveaxis(x, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))  # [B, chunks, c, S, K, G, H]
    return x.reshape(B, -1, N, H)[:, : M * S].reshape(shape)


def _products(x: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns products of x [B, K, c, R, H] with keys, float32 [B, K, c, R, U].

    keys: shared [B, K, U, H], or own [B, K, c, U, H].
    """
    if keys.ndim == 5:
        return einsum("BKcRH,BKcUH->BKcRU", x, keys, jnp.float32)
    rows = x.reshape(*x.shape[:2], -1, x.shape[-1])
    products = einsum("BKRH,BKUH->BKRU", rows, keys, jnp.float32)
    return products.reshape(*x.shape[:-1], -1)


def _weighted(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns sums of values by weights [B, K, c, R, U], float32 [B, K, c, R, H].

    values: in the same shapes as the keys of `_products`.
    """
    if values.ndim == 5:
        return einsum("BKcRU,BKcUH->BKcRH", weights, values, jnp.float32)
    rows = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    sums = einsum("BKRU,BKUH->BKRH", rows, values, jnp.float32)
    return sums.reshape(*weights.shape[:-1], -1)


def _sum_over_rows(weights: jax.Array, x: jax.Array, over_groups: bool = False) -> jax.Array:
    """Returns sums over rows of x [B, K, c, R, H] by weights, float32 [B, K, c, H, U].

    over_groups: sum over all groups too, which gives [B, K, H, U].

    With H before U XLA transposes x; with U before H, the weights, which are larger.
    """
    if not over_groups:
        return einsum("BKcRH,BKcRU->BKcHU", x, weights, jnp.float32)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    weights = weights.reshape(*weights.shape[:2], -1, weights.shape[-1])
    return einsum("BKRH,BKRU->BKHU", x, weights, jnp.float32)


def _scores(q, k, seen, options: Options):
    """Returns scores [B, K, c, R, U], their slope in q . k, and which of them are visible."""
    scores, slope = softcapped(_products(q, k) * options.scale, options.softcap)
    G = q.shape[3] // seen.shape[2]
    visible = jnp.repeat(seen, G, axis=2)[:, None]
    return jnp.where(visible, scores, NEVER), options.scale * slope, visible


def _first(shared: Keys, i: jax.Array) -> jax.Array:
    """Returns the first slot of block i; the last block begins earlier, to end with the keys."""
    T = shared[0].shape[2]
    return jnp.minimum(i * KEYS, max(T - KEYS, 0))


def _block(shared: Keys, start: jax.Array, stop: jax.Array, i: jax.Array) -> tuple[Keys, jax.Array]:
    """Returns keys and values [B, K, U, H] of block i, and which of them each query sees.

    What a query sees is bool [B, c, S, U].
    """
    at = _first(shared, i)
    size = min(KEYS, shared[0].shape[2])
    slot = at + jnp.arange(size)
    seen = (slot >= start[..., None]) & (slot < stop[..., None]) & (slot >= i * KEYS)
    found = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, size, axis=2), shared)
    return found, seen


def _range(shared: Keys, start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns first and stop of the blocks that some query of the chunk sees."""
    T = shared[0].shape[2]
    some = start < stop
    first = jnp.min(jnp.where(some, start, T)) // KEYS
    last = jnp.minimum(jnp.max(jnp.where(some, stop, 0)), T)
    return first.astype(jnp.int32), (-(-last // KEYS)).astype(jnp.int32)  # also with jax_enable_x64


def _add(total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """Adds a block's part [B, K, H, U] to the total [B, K, H, T], from slot `at` on."""
    before = jax.lax.dynamic_slice_in_dim(total, at, part.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(total, before + part, at, axis=3)
