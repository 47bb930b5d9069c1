"""The attention primitive as a Pallas kernel for TPU: forward and backward pass.

A query block is R rows of one key head. A row is a (token, g) pair, and the tokens of all M groups
are flattened. So the G queries of a token share the fetched keys, and short groups share a block.

The kernel treats prefix and own keys as one sequence, of which a row sees two ranges. The prefix
comes first, padded to whole blocks of U keys. The key blocks to visit are scalar-prefetched, so
bounds can change every step without recompilation. Keys that no row of a block sees are neither
fetched nor multiplied. This saves most where the groups of a block have close positions: sorted
positions are fast, any other order is correct.

Scores are [U, R], keys down and rows across. Bounds and statistics of rows are then vectors [1, R]
along the lanes, as in memory, and sums over keys add whole registers. In shapes, r is all rows and
u all keys of one key head.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from latent_delib.nn.attention import xla
from latent_delib.nn.attention.layout import by_head, flat, pad_axis
from latent_delib.nn.attention.primitive import Bounds, Keys, Options, delta_of
from latent_delib.nn.products import einsum, softcapped

HEAD_DIMS = (64, 128, 256)
ROWS, KEYS, LANES = 512, 256, 128  # the largest query block and key block; the unit of their sizes
UNSEEN = -1e30  # finite, because a row that has seen nothing yet computes with it


class _Plan(NamedTuple):
    """Says how a call is cut, and which keys each row sees.

    R: rows of a query block.
    U: keys of a key block.
    steps: the most key blocks that a query block can see.
    sees: the keys of each row, int32 [B, 4, r]: prefix start, prefix stop, own start, own stop.
    visits: the key blocks of each query block, int32 [4, B, r / R]: first block and number of
      blocks of the prefix, then the same for the groups' own keys.
    """

    R: int
    U: int
    steps: int
    sees: jax.Array
    visits: jax.Array


def forward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention's output and the log-sum-exp of every row.

    Arguments and results are those of `xla.forward`, with as many own keys as queries, and all
    arrays in bfloat16 or all in float32.
    """
    plan, operands = _lay_out(q_BMSNH, *own, prefix, bounds)
    B, K, r, H = operands[0].shape
    outputs = (
        jax.ShapeDtypeStruct((B, K, r, H), own[1].dtype),
        jax.ShapeDtypeStruct((B, K, 1, r), jnp.float32),
    )
    state = (H, plan.R), (1, plan.R), (1, plan.R)
    kernel = partial(_forward_kernel, scale=options.scale, softcap=options.softcap)
    out, lse = _launch(
        "attention_forward", kernel, plan, operands, (), outputs, state, options.interpret
    )
    lse = _tokens(lse.swapaxes(2, 3), (*q_BMSNH.shape[:4], 1))
    return _tokens(out, q_BMSNH.shape), lse[..., 0]


def backward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    out_BMSNH: jax.Array,
    lse_BMSN: jax.Array,
    dout_BMSNH: jax.Array,
    options: Options,
) -> tuple[jax.Array, Keys, None]:
    """Returns the gradients of queries, and of own keys and values; the prefix gets none.

    Arguments are those of `forward`, its results, and the gradient of the output.
    """
    plan, operands = _lay_out(q_BMSNH, *own, prefix, bounds)
    delta_BMSN = delta_of(out_BMSNH, dout_BMSNH)
    B, K, r, H = operands[0].shape
    per_row = (
        _rows(dout_BMSNH, K, r),
        *(_rows(x[..., None], K, r).swapaxes(2, 3) for x in (lse_BMSN, delta_BMSN)),
    )
    outputs = (jax.ShapeDtypeStruct((B, K, r, H), q_BMSNH.dtype),)
    kernel = partial(_dq_kernel, scale=options.scale, softcap=options.softcap)
    state = ((H, plan.R),)
    (dq,) = _launch(
        "attention_dq", kernel, plan, operands, per_row, outputs, state, options.interpret
    )
    # Only a group's own queries see its keys. The group of a trace is short: too little work for a
    # kernel. The group of a text is the whole text: here XLA is slower than a kernel would be.
    saved = (out_BMSNH, lse_BMSN, dout_BMSNH)
    _, d_own, _ = xla.backward(q_BMSNH, own, None, bounds, *saved, options)
    return _tokens(dq, q_BMSNH.shape), d_own, None


def _lay_out(q, k, v, prefix, bounds) -> tuple[_Plan, tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns a call's plan and its operands.

    The operands are queries [B, K, r, H], and all keys and values [B, K, u, H].
    """
    B, M, S, N, _ = q.shape
    K = k.shape[3]
    T = 0 if prefix is None else prefix[0].shape[1]
    G = N // K
    n = M * S
    # blocks of equal size: with blocks of ROWS rows the last could be mostly padding
    R = _up(pl.cdiv(n * G, pl.cdiv(n * G, ROWS)), LANES)
    U = min(KEYS, _up(max(T, n), LANES))
    first_own = _up(T, U)

    token = jnp.arange(n, dtype=jnp.int32).reshape(M, S)
    sees = (
        *(jnp.clip(x, 0, T) for x in (bounds.prefix_start, bounds.prefix_stop)),
        first_own + token[:, :1] + jnp.maximum(bounds.own_start, 0),
        jnp.broadcast_to(first_own + token + 1, (B, M, S)),
    )
    sees = jnp.repeat(jnp.stack(sees, axis=1).reshape(B, 4, n), G, axis=2)
    sees = pad_axis(sees, 2, R)  # rows of padding see nothing

    start = sees[:, 0::2].reshape(B, 2, -1, R)
    stop = sees[:, 1::2].reshape(B, 2, -1, R)
    some = start < stop
    first = jnp.min(jnp.where(some, start, first_own + n), axis=3) // U
    end = pl.cdiv(jnp.max(jnp.where(some, stop, 0), axis=3), U)
    count = jnp.maximum(end - first, 0)
    visits = jnp.stack([first, count], axis=2).reshape(B, 4, -1).swapaxes(0, 1)
    # The own keys of a query block reach back to the start of a group, which can be anywhere in a
    # key block.
    own_steps = min(pl.cdiv(n, U), pl.cdiv(S - 1 + pl.cdiv(R, G), U) + 1)

    def keys(own: jax.Array, shared: jax.Array | None) -> jax.Array:
        parts = [flat(own)] if shared is None else [shared, flat(own)]
        return jnp.concatenate([pad_axis(x.swapaxes(1, 2), 2, U) for x in parts], axis=2)

    shared_k, shared_v = prefix or (None, None)
    operands = _rows(q, K, sees.shape[2]), keys(k, shared_k), keys(v, shared_v)
    return _Plan(R, U, first_own // U + own_steps, sees, visits), operands


def _launch(
    name: str,
    kernel,
    plan: _Plan,
    operands,
    per_row,
    outputs,
    state,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over sequences, key heads, query blocks, and the key blocks of each.

    Args:
      operands: queries, keys and values of `_lay_out`.
      per_row: more inputs, [B, K, r, H] or [B, K, 1, r].
      outputs: shapes and dtypes of the outputs, [B, K, r, H] or [B, K, 1, r].
      state: shapes of the float32 arrays kept between the key blocks of a query block.
    """
    B, K, r, H = operands[0].shape
    R = plan.R
    U = plan.U

    def rows(x) -> pl.BlockSpec:
        if x.shape[2] == 1:
            return pl.BlockSpec((None, None, 1, R), lambda b, h, i, step, visits: (b, h, 0, i))
        return pl.BlockSpec((None, None, R, H), lambda b, h, i, step, visits: (b, h, i, 0))

    keys = pl.BlockSpec(
        (None, None, U, H), lambda b, h, i, step, visits: (b, h, _block(visits, b, i, step)[0], 0)
    )
    sees = pl.BlockSpec((None, 4, R), lambda b, h, i, step, visits: (b, 0, i))
    semantics = ("parallel", "parallel", "parallel", "arbitrary")  # last: its steps share the state
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, r // R, plan.steps),
            in_specs=[sees, rows(operands[0]), keys, keys, *map(rows, per_row)],
            out_specs=[*map(rows, outputs)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in state],
        ),
        out_shape=[*outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name=name,
    )(plan.visits, plan.sees, *operands, *per_row)


def _forward_kernel(
    visits_ref,
    sees_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    acc_ref,
    high_ref,
    sum_ref,
    *,
    scale,
    softcap,
):
    """Adds one key block's part to the output of one query block, under a running softmax."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        high_ref[...] = jnp.full_like(high_ref, UNSEEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(visible_UR):
        products_UR = einsum("UH,RH->UR", k_ref[...], q_ref[...], jnp.float32)
        scores_UR, _ = softcapped(products_UR * scale, softcap)
        scores_UR = jnp.where(visible_UR, scores_UR, UNSEEN)
        # Until a row sees its first key, it gives weight exp(UNSEEN - UNSEEN) = 1 to keys that it
        # does not see. At its first key `fade` is 0, which removes these weights. Every row has
        # such a key, because every query sees itself.
        high = jnp.maximum(high_ref[...], jnp.max(scores_UR, axis=0, keepdims=True))
        weights_UR = jnp.exp(scores_UR - high)
        fade = jnp.exp(high_ref[...] - high)
        high_ref[...] = high
        sum_ref[...] = sum_ref[...] * fade + jnp.sum(weights_UR, axis=0, keepdims=True)
        more_HR = einsum("UH,UR->HR", v_ref[...], weights_UR.astype(v_ref.dtype), jnp.float32)
        acc_ref[...] = acc_ref[...] * fade + more_HR

    _visit(visits_ref, sees_ref, k_ref.shape[0], visit)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = (acc_ref[...] / sum_ref[...]).T.astype(out_ref.dtype)
        lse_ref[...] = high_ref[...] + jnp.log(sum_ref[...])


def _dq_kernel(
    visits_ref,
    sees_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    acc_ref,
    *,
    scale,
    softcap,
):
    """Adds one key block's part to the gradient of one query block."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(visible_UR):
        products_UR = einsum("UH,RH->UR", k_ref[...], q_ref[...], jnp.float32)
        scores_UR, slope_UR = softcapped(products_UR * scale, softcap)
        p_UR = jnp.exp(jnp.where(visible_UR, scores_UR, UNSEEN) - lse_ref[...])
        dp_UR = einsum("UH,RH->UR", v_ref[...], dout_ref[...], jnp.float32)
        ds_UR = p_UR * (dp_UR - delta_ref[...]) * slope_UR * scale
        acc_ref[...] += einsum("UH,UR->HR", k_ref[...], ds_UR.astype(k_ref.dtype), jnp.float32)

    _visit(visits_ref, sees_ref, k_ref.shape[0], visit)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = acc_ref[...].T.astype(dq_ref.dtype)


def _visit(visits_ref, sees_ref, U: int, visit: Callable[[jax.Array], None]) -> None:
    """Calls `visit` with the visibility of this step's keys to each row, bool [U, R].

    A step past the last key block makes no call.
    """
    b = pl.program_id(0)
    i = pl.program_id(2)
    step = pl.program_id(3)
    block, in_prefix = _block(visits_ref, b, i, step)

    @pl.when(step < visits_ref[1, b, i] + visits_ref[3, b, i])
    def _():
        start, stop = (
            jnp.where(in_prefix, sees_ref[x : x + 1], sees_ref[x + 2 : x + 3]) for x in range(2)
        )
        key = block * U + jax.lax.broadcasted_iota(jnp.int32, (U, start.shape[1]), 0)
        visit((key >= start) & (key < stop))


def _block(visits_ref, b, i, step):
    """Returns the key block of a step, and whether it belongs to the prefix.

    Steps past the last block return the last block again, so that nothing is fetched.
    """
    first, count, own_first, own_count = (visits_ref[x, b, i] for x in range(4))
    step = jnp.minimum(step, count + own_count - 1)
    in_prefix = step < count
    return jnp.where(in_prefix, first + step, own_first + step - count), in_prefix


def _rows(x_BMSNX: jax.Array, K: int, r: int) -> jax.Array:
    """Turns [B, M, S, N, X] into rows [B, K, r, X]."""
    x = jnp.moveaxis(by_head(x_BMSNX, K), 2, 1)
    return pad_axis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 2, r)


def _tokens(x_BKrX: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Turns rows [B, K, r, X] into [B, M, S, N, X], which is `shape`."""
    B, M, S, N, X = shape
    K = x_BKrX.shape[1]
    x = x_BKrX[:, :, : M * S * N // K].reshape(B, K, M * S, N // K, X)
    return jnp.moveaxis(x, 1, 2).reshape(shape)


def _up(x: int, unit: int) -> int:
    return pl.cdiv(x, unit) * unit
