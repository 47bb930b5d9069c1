"""`attend` against a loop over queries, and `within_window` on literal arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_delib.nn.attention.primitive import Bounds, attend, within_window

B, M, S, T, K, H = 2, 2, 3, 7, 2, 4
BAIT = (0, 5, 6)  # prefix slots outside every bound
# Row 0 group 0 has an empty range; bounds differ inside a group, and one query sees of its group
# only itself.
START = np.array([[[2, 2, 2], [1, 2, 3]], [[1, 1, 1], [4, 4, 4]]])
STOP = np.array([[[2, 2, 2], [4, 4, 5]], [[5, 4, 3], [5, 5, 5]]])
OWN = np.array([[[0, 0, 1], [0, 0, 0]], [[0, 1, 2], [0, 0, 2]]])
BOUNDS = Bounds(*(jnp.array(x, jnp.int32) for x in (START, STOP, OWN)))


def inputs(G):
    """Positive queries: the bait's keys score highest, and its values are unmistakable."""
    keys = jax.random.split(jax.random.key(0), 6)
    q = jnp.abs(jax.random.normal(keys[0], (B, M, S, K * G, H))) + 0.1
    k, v = (jax.random.normal(key, (B, M, S, K, H)) for key in keys[1:3])
    prefix_k, prefix_v = (jax.random.normal(key, (B, T, K, H)) for key in keys[3:5])
    prefix_k, prefix_v = prefix_k.at[:, BAIT, :].set(1e3), prefix_v.at[:, BAIT, :].set(1e6)
    return (q, k, v, (prefix_k, prefix_v)), jax.random.normal(keys[5], q.shape)


def sliced(q, k, v, prefix, *, scale, softcap):
    """Slices out what each query sees, one query and head at a time."""
    out = np.zeros(q.shape)
    for b, m, i, n in np.ndindex(q.shape[:-1]):
        head = n // (q.shape[3] // K)
        own, text = slice(OWN[b, m, i], i + 1), slice(START[b, m, i], STOP[b, m, i])
        seen_k, seen_v = (
            x[b, m, own, head]
            if y is None
            else np.concatenate([y[b, text, head], x[b, m, own, head]])
            for x, y in zip((k, v), prefix or (None, None))
        )
        scores = scale * seen_k @ q[b, m, i, n]
        weights = np.exp(softcap * np.tanh(scores / softcap) if softcap else scores)
        out[b, m, i, n] = weights / weights.sum() @ seen_v
    return out


def masked(q, k, v, prefix, *, scale, softcap):
    """One dense mask over all keys, for the gradients."""
    slot, own = np.arange(T), np.arange(S)
    visible = (own >= OWN[..., None]) & (own <= own[:, None])
    if prefix:
        k, v = (jnp.concatenate([jnp.stack([x] * M, 1), y], 2) for x, y in zip(prefix, (k, v)))
        visible = np.concatenate(
            [(slot >= START[..., None]) & (slot < STOP[..., None]), visible], -1
        )
    k, v = (jnp.repeat(x, q.shape[3] // K, axis=3) for x in (k, v))
    scores = scale * jnp.einsum("bminh,bmjnh->bmnij", q, k)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -1e30))
    return jnp.einsum("bmnij,bmjnh->bminh", weights, v)


@pytest.mark.parametrize(
    "with_prefix, G, softcap", [(True, 1, 0.0), (True, 2, 1.5), (False, 1, 1.5), (False, 2, 0.0)]
)
def test_attend_equals_a_loop_over_queries(with_prefix, G, softcap):
    arrays, cotangent = inputs(G)
    if not with_prefix:
        arrays = (*arrays[:3], None)

    @partial(jax.jit, static_argnums=0)
    def out_and_grads(attention, arrays):
        def total(arrays):
            out = attention(*arrays, scale=0.7, softcap=softcap)
            return jnp.sum(out * cotangent), out

        return jax.grad(total, has_aux=True)(arrays)

    grads, out = out_and_grads(lambda *a, **how: attend(*a, BOUNDS, **how), arrays)
    wanted, _ = out_and_grads(masked, arrays)
    expected = sliced(*jax.tree.map(np.asarray, arrays), scale=0.7, softcap=softcap)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), grads, wanted)
    for g in grads[3] or ():
        assert not np.any(g[:, BAIT, :]) and np.any(g)


def test_attend_scores_and_softmax_are_float32_accurate_in_bfloat16():
    """Scores near 100 lie 0.25 apart, closer than bfloat16 can tell there."""
    apart = np.linspace(0, 1, 5)
    q = jnp.full((1, 1, 1, 1, 16), 16.0, jnp.bfloat16)
    k = np.zeros((1, 5, 1, 16))
    k[..., :12], k[0, :, 0, 12] = 0.5, 0.25 + apart / 16
    prefix = (
        jnp.array(k, jnp.bfloat16),
        jnp.array(np.eye(5)[None, :, None] @ np.eye(5, 16), jnp.bfloat16),
    )
    assert np.array_equal(prefix[0], k.astype(np.float32))
    scores = 100 + apart
    own = jnp.full((1, 1, 1, 1, 16), -16.0, jnp.bfloat16)
    bounds = Bounds(*(jnp.full((1, 1, 1), i) for i in (0, 5, 0)))
    out = attend(q, own, own, prefix, bounds, scale=1.0, softcap=0.0)
    assert out.dtype == jnp.bfloat16
    wanted = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(out[0, 0, 0, 0, :5].astype(np.float32), wanted, rtol=2**-7)


def narrowed(own_start, position, window, prefix=None):
    """One group in one row: the new own_start, and prefix_start where there is a prefix."""

    def group(x):
        return jnp.array(x, jnp.int32)[None, None]

    start, stop, slots = (
        prefix if prefix else (np.zeros(len(own_start)), np.zeros(len(own_start)), None)
    )
    bounds = Bounds(group(start), group(stop), group(own_start))
    slots = None if slots is None else jnp.array(slots, jnp.int32)[None]
    new = within_window(bounds, group(position), slots, window)
    np.testing.assert_array_equal(new.prefix_stop, bounds.prefix_stop)
    return (new.own_start[0, 0].tolist(), new.prefix_start[0, 0].tolist())[: 2 if prefix else 1]


def test_window_of_text():
    assert narrowed([0] * 5, [0, 1, 2, 3, 4], 2) == ([0, 0, 1, 2, 3],)
    assert narrowed([0] * 5, [0, 1, 2, 3, 4], 1) == ([0, 1, 2, 3, 4],)
    assert narrowed([0] * 5, [0, 1, 2, 3, 4], 9) == ([0] * 5,)


def test_window_of_packed_documents():
    """Positions start again: what stands before the document must not count as near."""
    assert narrowed([0, 0, 0, 0, 4, 4, 4, 4], [0, 1, 2, 3, 0, 1, 2, 3], 2) == (
        [0, 0, 1, 2, 4, 4, 5, 6],
    )


def test_window_over_a_prefix():
    prefix = ([1, 1, 1], [4, 4, 4], [7, 0, 1, 2, 3, 4])  # slot 0 and slots 4, 5 belong to others
    assert narrowed([0, 0, 0], [3, 4, 5], 3, prefix) == ([0, 0, 0], [2, 3, 4])
    assert narrowed([0, 0, 0], [3, 4, 5], 2, prefix) == ([0, 0, 1], [3, 4, 4])


def test_window_of_the_last_queries_of_a_group():
    assert narrowed([0, 1], [0, 1, 2, 3, 4], 2) == ([2, 3],)
    assert narrowed([2, 2], [9, 9, 0, 1, 2], 3) == ([2, 2],)  # what stands before is not seen


def test_window_where_positions_repeat():
    """Overlay: latents share the positions of the text before them; x_p is read again after."""
    prefix = ([0] * 5, [4] * 5, [0, 1, 2, 3])
    assert narrowed([0] * 5, [3, 4, 4, 5, 6], 2, prefix) == ([0, 0, 0, 1, 3], [2, 3, 3, 4, 4])
    assert narrowed([0] * 5, [0, 0, 0, 1, 2], 2, ([2] * 5, [2] * 5, [0, 1, 0])) == (
        [0, 0, 0, 0, 3],
        [2] * 5,
    )
