"""The attention primitive for NVIDIA GPUs, as Pallas-Triton kernels with a gradient.

A row is a (token, g) pair of one key head, and the tokens of all M groups are flattened. So the G
query heads of a key head share the loaded keys. All groups' own keys are flattened the same
way: a row sees one range of prefix slots and one range of own tokens.

A program holds a block of rows. It walks the key blocks of the prefix, then those of the groups'
own tokens, from the least start to the greatest stop among its rows. This skips most of the work
where neighbouring groups have neighbouring positions. Any other order is slower, but correct too.

The backward pass has two kernels: one for dq, like the forward kernel, and one for dk and dv of
the groups' own keys. The prefix gets no gradient, so nothing is summed across programs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from latent_delib.nn.attention import blocks
from latent_delib.nn.attention.blocks import Blocks
from latent_delib.nn.attention.layout import by_head, flat
from latent_delib.nn.attention.primitive import Bounds, Keys, Options, delta_of
from latent_delib.nn.products import precision

HEAD_DIMS = (16, 32, 64, 128, 256)
LOG2E = 1.4426950408889634  # scores are in units of log(2), because the hardware has only exp2
MASKED = -1e30  # finite: a row that sees no key of a block must not become NaN
BOUNDED = 60.0  # up to this score no maximum is subtracted: float32 holds 1e12 times e^60


class _Source(NamedTuple):
    """Holds keys and values that rows can see.

    k, v: [B, X, K, H].
    lo, hi: each token's range lo <= x < hi, int32 [B, U].
    first, last: the blocks first <= i < last that each program walks, int32 [B, programs].
    """

    k: jax.Array
    v: jax.Array
    lo: jax.Array
    hi: jax.Array
    first: jax.Array
    last: jax.Array


# The calls. Rows are [B, U, K, G, ...], keys [B, X, K, H], ranges [B, U] or [B, programs];
# U = M * S tokens of a sequence.


def forward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention's output and the log-sum-exp of every row.

    Arguments and results are those of `xla.forward`, with as many own keys as queries, and all
    arrays in bfloat16 or all in float32. With bfloat16 the softcap's tanh is the hardware's, with a
    relative error of 2^-11. The largest blocks that fit into the shared memory are used.
    """
    rows = by_head(q_BMSNH, own[0].shape[3])
    cut = _cut("forward", rows, options.shared_memory)
    outputs = (
        jax.ShapeDtypeStruct(rows.shape, own[1].dtype),
        jax.ShapeDtypeStruct(rows.shape[:-1], jnp.float32),
    )
    out, lse = _call(
        _forward_kernel,
        [rows],
        _sources(own, prefix, bounds, rows, cut),
        outputs,
        cut,
        options,
    )
    return out.reshape(q_BMSNH.shape), lse.reshape(q_BMSNH.shape[:-1])


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
    delta_BMSN = delta_of(out_BMSNH, dout_BMSNH)
    K = own[0].shape[3]
    rows = [by_head(x, K) for x in (q_BMSNH, dout_BMSNH, lse_BMSN, delta_BMSN)]
    cut = _cut("query_gradient", rows[0], options.shared_memory)
    sources = _sources(own, prefix, bounds, rows[0], cut)
    like_q = jax.ShapeDtypeStruct(rows[0].shape, rows[0].dtype)
    dq = _call(_query_gradient_kernel, rows, sources, like_q, cut, options)
    d_own = _own_gradient(rows, own, bounds, options)
    d_own = jax.tree.map(lambda d, x: d.reshape(x.shape), d_own, own)
    return dq.reshape(q_BMSNH.shape), d_own, None


def _own_gradient(rows, own, bounds, options):
    """Returns dk and dv [B, U, K, H]."""
    cut = _cut("own_gradient", rows[0], options.shared_memory)
    [source] = _sources(own, None, bounds, rows[0], cut)
    # Each program holds a block of keys and walks blocks of rows. It starts at the row of its first
    # key's token, and ends at the last row that sees one of its keys.
    B, U = source.lo.shape
    G = rows[0].shape[3]
    start = cut.keys * np.arange(pl.cdiv(U, cut.keys))
    begins_before_end = source.lo[:, None] < start[:, None] + cut.keys
    # hi grows along a sequence, so the last of these rows has the largest.
    until = jnp.max(source.hi[:, None], axis=2, where=begins_before_end, initial=0)
    first = jnp.broadcast_to(jnp.int32(start * G // cut.rows), (B, len(start)))
    source = source._replace(first=first, last=pl.cdiv(until * G, cut.rows))
    like_own = source.k, source.v
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like_own)
    return _call(_own_gradient_kernel, rows, [source], outputs, cut, options)


def _cut(kernel, q_BUKGH, shared_memory) -> Blocks:
    """Returns the largest blocks that fit, cut down to the number of rows of the call."""
    _, U, _, G, H = q_BUKGH.shape
    cut = blocks.fitting(kernel, H, q_BUKGH.dtype, shared_memory)
    return cut._replace(rows=min(cut.rows, max(16, pl.next_power_of_2(U * G))))


def _sources(own, prefix, bounds, q_BUKGH, cut) -> list[_Source]:
    """Returns the sources of rows: the prefix, if there is one, and the groups' own tokens.

    The own tokens of all groups are one sequence.
    """
    B, U, _, G, _ = q_BUKGH.shape
    index = np.arange(U, dtype=np.int32)
    k, v = own
    own_start = flat(bounds.own_start) + (index - index % k.shape[2])
    found = [(flat(k), flat(v), own_start, jnp.broadcast_to(index + 1, (B, U)))]
    if prefix is not None:
        start = jnp.maximum(flat(bounds.prefix_start), 0)
        stop = jnp.minimum(flat(bounds.prefix_stop), prefix[0].shape[1])
        found.insert(0, (*prefix, start, jnp.maximum(start, stop)))
    # Found here, not in the kernel: there every lane would find these limits for itself, and the
    # compiler could not tell that they are equal.
    token = np.arange(pl.cdiv(U * G, cut.rows) * cut.rows).reshape(-1, cut.rows) // G
    token = np.minimum(token, U - 1)  # [programs, rows]
    sources = []
    for k, v, lo, hi in found:
        first = lo[:, token].min(-1) // cut.keys
        last = pl.cdiv(hi[:, token].max(-1), cut.keys)
        sources.append(_Source(k, v, lo, hi, first, last))
    return sources


def _call(kernel, rows, sources, outputs, cut, options):
    """Runs kernel(*rows, sources, *outputs) on the part of each sequence and key head."""

    def share(x):
        shape = (None, x.shape[1], None, *x.shape[3:])[: x.ndim]
        return pl.BlockSpec(shape, lambda block, b, head: (b, 0, head, 0, 0)[: x.ndim])

    inputs = *rows, sources
    B, _, K, *_ = rows[0].shape
    return pl.pallas_call(
        partial(kernel, cut=cut, options=options),
        grid=(sources[0].first.shape[1], B, K),
        in_specs=jax.tree.map(share, inputs),
        out_specs=jax.tree.map(share, outputs),
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=options.interpret,
    )(*inputs)


# The kernels, on one sequence and key head: rows [U, G, H] or [U, G], keys [X, H], ranges [U].


class _Rows(NamedTuple):
    """Holds the indices of one block of rows, and whether each row exists."""

    token: jax.Array
    head: jax.Array
    exists: jax.Array

    def _at(self, ref):
        index = (self.token, self.head)[: len(ref.shape)]
        if len(ref.shape) < 3:
            return ref.at[index], self.exists
        lane = jnp.arange(ref.shape[2])
        return ref.at[*(i[:, None] for i in index), lane[None]], self.exists[:, None]

    def load(self, ref):
        ref, mask = self._at(ref)
        return plgpu.load(ref, mask=mask, other=0)

    def store(self, ref, x):
        ref, mask = self._at(ref)
        plgpu.store(ref, x.astype(ref.dtype), mask=mask)


def _rows(block, size, ref_UGH) -> _Rows:
    U, G = ref_UGH.shape[:2]
    row = block * size + jnp.arange(size)
    token = lax.div(row, G)
    return _Rows(token, lax.rem(row, G), token < U)


def _keys(block, size, *refs_XH):
    """Returns the indices of a block of keys, and this block of each ref; zeros past the end."""
    X = refs_XH[0].shape[0]
    index = block * size + jnp.arange(size)
    masked = dict(mask=(index < X)[:, None], other=0) if X % size else {}
    return index, *(plgpu.load(ref.at[pl.ds(block * size, size)], **masked) for ref in refs_XH)


def _within(index, lo, hi):
    """Returns lo <= index < hi in one comparison, given lo <= hi; False where lo = hi."""
    return (index - lo).astype(jnp.uint32) < (hi - lo).astype(jnp.uint32)


def _fold(program, rows, sources, cut, step, carry):
    """Applies carry = step(k, v, visible, carry) to each block of keys that a row may see."""
    for source in sources:
        lo = rows.load(source.lo)[:, None]
        hi = rows.load(source.hi)[:, None]

        def body(block, carry, source=source, lo=lo, hi=hi):
            index, k, v = _keys(block, cut.keys, source.k, source.v)
            return step(k, v, _within(index, lo, hi), carry)

        carry = lax.fori_loop(source.first[program], source.last[program], body, carry)
    return carry


def _dot(a, b, contract):
    """Contracts a and b over the axes `contract`, one of each; float32."""
    axes = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(
        a, b, axes, precision=precision(a, b), preferred_element_type=jnp.float32
    )


def _exp2(x, options):
    if options.interpret:
        return jnp.exp2(x)
    # jnp.exp2 is this instruction and three more around it, for results below 2^-126.
    code = "ex2.approx.ftz.f32 $0, $1;"
    instruction = partial(plgpu.elementwise_inline_asm, code, constraints="=f,f", pack=1)
    return instruction(args=[x], result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)])[0]


def _scores(a, b, options):
    """Returns scores in units of log(2), and the slope of the softcap at these scores."""
    products = _dot(a, b, (1, 1))
    if not options.softcap:
        return products * (options.scale * LOG2E), 1.0
    tanh = jnp.tanh if options.interpret or a.dtype == jnp.float32 else plgpu.approx_tanh
    capped = tanh(products * (options.scale / options.softcap))
    return capped * (options.softcap * LOG2E), 1.0 - capped * capped


def _forward_kernel(q_ref, sources, out_ref, lse_ref, *, cut, options):
    # Programs start in order. The highest positions, which have the most work, come first.
    program = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = _rows(program, cut.rows, q_ref)
    q = rows.load(q_ref)
    bounded = 0 < options.softcap <= BOUNDED

    def step(k, v, visible, carry):
        out, total, top = carry
        scores = jnp.where(visible, _scores(q, k, options)[0], MASKED)
        if not bounded:
            # Until a row sees its first key, its sums are wrong; at this key the factor is 0.
            higher = jnp.maximum(top, jnp.max(scores, axis=1))
            factor = _exp2(top - higher, options)
            top = higher
            out *= factor[:, None]
            total *= factor
            scores -= top[:, None]
        weights = _exp2(scores, options)
        out += _dot(weights.astype(v.dtype), v, (1, 0))
        return out, total + jnp.sum(weights, axis=1), top

    carry = jnp.zeros(q.shape), jnp.zeros(cut.rows), jnp.full(cut.rows, 0.0 if bounded else MASKED)
    out, total, top = _fold(program, rows, sources, cut, step, carry)
    total = jnp.where(rows.exists, total, 1.0)
    rows.store(out_ref, out / total[:, None])
    rows.store(lse_ref, top / LOG2E + jnp.log(total))


def _query_gradient_kernel(q_ref, dout_ref, lse_ref, delta_ref, sources, dq_ref, *, cut, options):
    program = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = _rows(program, cut.rows, q_ref)
    q = rows.load(q_ref)
    dout = rows.load(dout_ref)
    lse = rows.load(lse_ref)[:, None] * LOG2E
    delta = rows.load(delta_ref)[:, None]

    def step(k, v, visible, dq):
        scores, slope = _scores(q, k, options)
        weights = _exp2(jnp.where(visible, scores - lse, MASKED), options)
        dscores = weights * slope * (_dot(dout, v, (1, 1)) - delta)
        return dq + _dot(dscores.astype(k.dtype), k, (1, 0))

    dq = _fold(program, rows, sources, cut, step, jnp.zeros(q.shape))
    rows.store(dq_ref, options.scale * dq)


def _own_gradient_kernel(
    q_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    sources,
    dk_ref,
    dv_ref,
    *,
    cut,
    options,
):
    [own] = sources
    program = pl.program_id(0)
    index, k, v = _keys(program, cut.keys, own.k, own.v)

    def body(block, carry):
        dk, dv = carry
        rows = _rows(block, cut.rows, q_ref)
        q, dout, lse, delta, lo, hi = (
            rows.load(x) for x in (q_ref, dout_ref, lse_ref, delta_ref, own.lo, own.hi)
        )
        scores, slope = _scores(k, q, options)
        visible = _within(index[:, None], lo, hi)
        weights = _exp2(jnp.where(visible, scores - lse * LOG2E, MASKED), options)
        dv += _dot(weights.astype(dout.dtype), dout, (1, 0))
        dscores = weights * slope * (_dot(v, dout, (1, 1)) - delta)
        dk += _dot(dscores.astype(q.dtype), q, (1, 0))
        return dk, dv

    zeros = jnp.zeros(k.shape), jnp.zeros(v.shape)
    dk, dv = lax.fori_loop(own.first[program], own.last[program], body, zeros)
    for ref, x in (dk_ref, options.scale * dk), (dv_ref, dv):
        at = ref.at[pl.ds(program * cut.keys, cut.keys)]
        plgpu.store(at, x.astype(ref.dtype), mask=(index < ref.shape[0])[:, None])
