"""Every form of attention on this platform against the reference: forward and gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib import mesh as mesh_lib
from latent_delib.job import build
from latent_delib.nn import layers, transformer
from latent_delib.nn.attention import blocks, forms, xla
from latent_delib.nn.attention.forms import attend
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.layers import WHOLE

# B, M, S, K, G, H, T: chunks and blocks are cut to 8, so that all of these go over several, few of
# them evenly.
SHAPES = {
    "traces": (2, 9, 3, 2, 2, 4, 21),
    "one chunk holds less than a trace": (1, 3, 11, 1, 4, 4, 30),
    "text": (2, 1, 35, 2, 1, 4, 0),
    "groups without a prefix": (2, 5, 6, 1, 2, 4, 0),
    "a prefix shorter than a block": (1, 6, 4, 1, 1, 4, 5),
    "text after a prefix": (2, 1, 20, 1, 2, 4, 17),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "QUERIES", 8)
    monkeypatch.setattr(xla, "KEYS", 8)


def inputs(shape, dtype=jnp.float32, sort=False):
    """Random operands and bounds; slots that nobody sees hold bait: enormous scores and values."""
    B, M, S, K, G, H, T = shape
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, k, v = jnp.abs(draw(B, M, S, K * G, H)) + 0.1, draw(B, M, S, K, H), draw(B, M, S, K, H)
    start, stop = random.integers(1, T + 2, (2, B, M, S)) if T else np.zeros((2, B, M, S), int)
    stop = np.minimum(stop, T - 1) if T else stop
    if sort:
        stop = np.sort(stop.reshape(B, -1)).reshape(stop.shape)
    own = np.minimum(random.integers(0, S, (B, M, S)), np.arange(S))
    prefix = None
    if T:
        prefix = tuple(
            x.at[:, (0, -1)].set(bait)
            for x, bait in ((draw(B, T, K, H), 1e3), (draw(B, T, K, H), 1e6))
        )
    return (
        (q, k, v, prefix),
        Bounds(*(jnp.asarray(x, jnp.int32) for x in (start, stop, own))),
        draw(*q.shape),
    )


@partial(jax.jit, static_argnames=("form", "wanted", "softcap"))
def gradients(form, operands, bounds, dout, wanted, softcap):
    """Output, and gradients of the operands that `wanted` numbers."""

    def total(*chosen):
        full = list(operands)
        for i, x in zip(wanted, chosen):
            full[i] = x
        out = attend(*full, bounds, scale=0.3, softcap=softcap, form=form)
        return jnp.sum(out * dout), out

    chosen = tuple(operands[i] for i in wanted)
    grads, out = jax.grad(total, argnums=tuple(range(len(wanted))), has_aux=True)(*chosen)
    return out, grads


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name):
    """With and without softcap, order of positions, and the prefix's gradient."""
    softcap = 2.0 if list(SHAPES).index(name) % 2 else 0.0
    of_all = (0, 1, 2, 3) if SHAPES[name][-1] else (0, 1, 2)
    for sort in (False, True):
        operands, bounds, dout = inputs(SHAPES[name], sort=sort)
        out_wanted, grads_wanted = gradients("reference", operands, bounds, dout, of_all, softcap)
        for wanted in {of_all, (0, 1, 2)}:
            out, grads = gradients("xla", operands, bounds, dout, wanted, softcap)
            np.testing.assert_allclose(out, out_wanted, rtol=1e-5, atol=1e-5)
            for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_wanted)):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_types_of_64_bits_change_nothing():
    """A notebook that enables them fails, or gets other numbers."""
    operands, bounds, dout = inputs(SHAPES["text after a prefix"])
    wanted = gradients("xla", operands, bounds, dout, (0, 1, 2), 2.0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.int64), bounds)
        found = gradients("xla", operands, wide, dout, (0, 1, 2), 2.0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, wanted)


@pytest.mark.parametrize(
    "form, name, first",
    [
        ("reference", "traces", 1),
        ("xla", "traces", 1),
        ("xla", "traces", -1),  # as latents that are written one after another
        ("xla", "text", 1),
        ("xla", "text after a prefix", 1),
        ("xla", "groups without a prefix", 1),
        ("pallas_tpu", "traces of a kernel", 1),  # which leaves it to xla
    ],
)
def test_queries_of_the_last_tokens_of_a_group(form, name, first):
    """They see what they see among the queries of all its tokens."""
    shape = SHAPES.get(name, (1, 9, 3, 1, 2, 64, 21))
    operands, bounds, dout = inputs(shape)
    first %= operands[0].shape[2]
    last = (operands[0][:, :, first:], *operands[1:])
    last_bounds = jax.tree.map(lambda x: x[:, :, first:], bounds)
    out_wanted, (dq_wanted, *down_wanted) = gradients(
        "reference", operands, bounds, dout.at[:, :, :first].set(0), (0, 1, 2), 2.0
    )
    out, (dq, *down) = gradients(form, last, last_bounds, dout[:, :, first:], (0, 1, 2), 2.0)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        close, (out, dq, down), (out_wanted[:, :, first:], dq_wanted[:, :, first:], down_wanted)
    )


@pytest.mark.parametrize("first, is_kernel", [(0, True), (1, False)])
def test_a_kernel_needs_a_query_per_key_of_a_group(first, is_kernel):
    operands, bounds, _ = inputs((1, 9, 3, 1, 2, 64, 21))
    last = (operands[0][:, :, first:], *operands[1:])
    last_bounds = jax.tree.map(lambda x: x[:, :, first:], bounds)
    kernel = partial(attend, form="pallas_tpu", scale=0.3, softcap=0.0)
    assert ("pallas_call" in str(jax.make_jaxpr(kernel)(*last, last_bounds))) == is_kernel


def test_bait_has_no_gradient():
    """Nor does it matter which operands are differentiated: here queries and the prefix."""
    operands, bounds, dout = inputs(SHAPES["traces"])
    _, grads = gradients("xla", operands, bounds, dout, (0, 3), 0.0)
    _, grads_wanted = gradients("reference", operands, bounds, dout, (0, 1, 2, 3), 0.0)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, grads, (grads_wanted[0], grads_wanted[3]))
    for x in grads[1]:
        assert np.all(x[:, (0, -1)] == 0) and np.any(x[:, 1:-1] != 0)


def test_xla_in_bfloat16_stays_near_float32():
    operands, bounds, dout = inputs(SHAPES["traces"], jnp.bfloat16)
    out, grads = gradients("xla", operands, bounds, dout, (0, 1, 2), 0.0)
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), (operands, dout))
    out_wanted, grads_wanted = gradients("reference", whole[0], bounds, whole[1], (0, 1, 2, 3), 0.0)
    for x, y in zip((out, *grads), (out_wanted, *grads_wanted)):
        assert x.dtype == jnp.bfloat16
        error = np.asarray(x.astype(jnp.float32) - y)
        assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(np.square(y)))


@pytest.mark.parametrize("length", [0, 1])
def test_gradients_of_shared_keys_are_summed_in_float32(length):
    """2,048 queries in chunks of 8: a sum over chunks that keeps 8 bits errs by a tenth.

    Each query sees one slot alone: that of the prefix, or the first token of the same text.
    """
    S = 2048
    bounds = Bounds(*(jnp.full((1, 1, S), x) for x in (0, length, 0)))
    q_BMSNH = jnp.ones((1, 1, S, 1, 4), jnp.bfloat16)
    k_BMSKH = jnp.full(q_BMSNH.shape, -50.0, jnp.bfloat16)
    if not length:
        k_BMSKH = k_BMSKH.at[:, :, 0].set(50.0)
    prefix = jnp.full((1, length, 1, 4), 50.0, jnp.bfloat16) if length else None

    def seen(v_BMSKH, v_BTKH):
        shared = None if prefix is None else (prefix, v_BTKH)
        return attend(q_BMSNH, k_BMSKH, v_BMSKH, shared, bounds, scale=1.0, softcap=0.0, form="xla")

    noise = np.random.default_rng(0).normal(1.3, 0.1, q_BMSNH.shape)
    cotangent = jnp.asarray(noise, jnp.bfloat16)
    _, back = jax.vjp(seen, k_BMSKH, prefix)
    own, of_prefix = jax.jit(back)(cotangent)
    found = own[0, 0, 0] if prefix is None else of_prefix[0, 0]
    expected = np.asarray(cotangent, np.float64).sum(axis=(0, 1, 2))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found[0], np.float64), expected[0], rtol=2**-8)


def arrays_in(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["traces", "text"])
def test_no_array_of_queries_by_keys(name):
    B, M, S, K, G, H, T = SHAPES[name]
    operands, bounds, dout = inputs(SHAPES[name])
    full = B * M * S * K * G * (T or S)

    def largest(form):
        program = jax.make_jaxpr(
            lambda *x: gradients(form, (*x, operands[3]), bounds, dout, (0, 1, 2), 2.0)
        )(*operands[:3])
        return max(int(np.prod(shape)) for shape in arrays_in(program.jaxpr))

    assert largest("reference") >= full > largest("xla")


@pytest.mark.parametrize("form", ["pallas_gpu", "pallas_tpu"])
def test_a_kernel_gives_way_for_the_gradient_of_a_prefix(form):
    operands, bounds, dout = inputs((1, 4, 6, 1, 2, 64, 40))
    with pytest.warns(UserWarning, match=f"{form} does not support the gradient"):
        _, grads = gradients(form, operands, bounds, dout, (0, 3), 2.0)
    # compiled once for both kernels
    _, wanted = gradients("reference", operands, bounds, dout, (0, 3), 2.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), grads, wanted)


@pytest.mark.parametrize("form", ["pallas_gpu", "pallas_tpu"])
def test_what_a_kernel_does_not_serve_is_named(form):
    def why(H=64, dtype=jnp.bfloat16):
        return forms.unsupported(form, H, dtype)

    assert why() is why(dtype="float32") is None
    assert why(80) == "head dim 80"
    assert why(16) == (None if form == "pallas_gpu" else "head dim 16")
    assert why(dtype=jnp.float16) == "dtype float16"
    operands, bounds, _ = inputs((1, 4, 6, 1, 2, 80, 40))
    with pytest.warns(UserWarning, match=f"{form} does not support head dim 80"):
        jax.eval_shape(lambda: attend(*operands, bounds, scale=1.0, softcap=0.0, form=form))


def test_a_model_on_a_mesh_knows_its_devices():
    mesh = mesh_lib.make({"data": 2, "fsdp": 2, "traces": 2}, jax.devices()[:8])
    partition = build.transformer(small.LLAMA, mesh, jnp.float32).partition
    assert (partition.row_shards, partition.shared_memory) == (4, blocks.LEAST)


def test_attention_is_called_with_the_shared_memory_of_its_devices():
    asked = []

    def split(function, in_axes, out_axes):
        asked.append(function.keywords["shared_memory"])
        return function

    partition = WHOLE._replace(split=split, shared_memory=163 * 1024)
    model = transformer.Transformer(small.LLAMA, partition=partition)
    x, zero = jnp.zeros((4, 2, 3, small.LLAMA.embed_dim)), jnp.zeros((4, 2, 3), jnp.int32)
    jax.eval_shape(lambda: model.init(jax.random.key(0), x, zero, Bounds(zero, zero, zero)))
    assert set(asked) == {163 * 1024}


@pytest.mark.parametrize("queries, is_kernel", [(layers.FEW, False), (layers.FEW + 1, True)])
def test_few_queries_are_a_product_with_the_cache(queries, is_kernel):
    model = transformer.Transformer(
        dataclasses.replace(small.LLAMA, head_dim=64), form="pallas_tpu"
    )
    x = jnp.zeros((1, 1, queries, small.LLAMA.embed_dim))
    zero = jnp.zeros(x.shape[:3], jnp.int32)
    program = partial(model.init, jax.random.key(0))
    traced = jax.make_jaxpr(program)(x, zero, Bounds(zero, zero, zero))
    assert ("pallas_call" in str(traced)) == is_kernel
