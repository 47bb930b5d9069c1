"""The TPU's kernel without one: interpreted, against `attend`; lowered, and compiled.

Interpreted in float32 it equals the reference to 1e-5 in its output and all gradients. Every prefix
has bait: slots outside every bound, whose keys score higher than anything and whose values are
unmistakable.
"""

import importlib.util
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_delib.nn.attention import forms, primitive, tpu
from latent_delib.nn.attention.primitive import Bounds, within_window

B, K = 2, 2


class Case(NamedTuple):
    """M groups of S tokens after T of text in two documents; order: of the groups' places."""

    H: int = 64
    G: int = 1
    softcap: float = 0.0
    M: int = 3
    S: int = 5
    T: int = 0
    window: int | None = None
    order: str = "sorted"


# One program each, and the bounds to run it with: they are data.
CASES = {
    "plain, and empty prefix ranges": (Case(T=40), [dict(), dict(order="first")]),
    "three blocks of prefix": (
        Case(H=128, G=2, M=60, T=600, softcap=5.0),
        [dict(), dict(order="unsorted")],
    ),
    "window": (Case(H=256, G=4, T=300, softcap=5.0), [dict(window=30), dict(order="first")]),
    "groups across blocks": (Case(G=2, M=40, S=9, T=300, softcap=5.0), [dict(), dict(window=3)]),
    "one token": (Case(G=4, M=1, S=1, T=300), [dict()]),
    "one token, nothing else": (Case(G=2, M=1, S=1), [dict()]),
    "three heads a key head": (Case(G=3, M=30, S=7, T=20), [dict(window=4)]),
    "text": (Case(H=128, G=2, M=1, S=600, softcap=5.0), [dict(), dict(window=100)]),
    "groups alone": (Case(H=128, G=8), [dict()]),
}


def bounds_of(case: Case) -> Bounds:
    """Rows differ: in where the second document starts and in where the groups are."""
    rng = np.random.default_rng(0)
    zero = np.zeros((B, case.M, case.S), np.int32)
    if not case.T:  # a text, or groups without any: documents, too
        cut = np.array([case.S // 2, case.S // 3])[:, None, None]
        own = np.arange(case.S)
        start = zero + np.where(own >= cut, cut, 0)
        bounds = Bounds(*(jnp.array(x, jnp.int32) for x in (zero, zero, start)))
        return (
            within_window(bounds, jnp.array(own - start), None, case.window)
            if case.window
            else bounds
        )
    cut = np.array([case.T // 2, case.T // 3])[:, None]
    at = np.sort(
        np.stack(
            [
                rng.choice(np.arange(1, case.T - 1), case.M, replace=case.M > case.T)
                for _ in range(B)
            ]
        )
    )
    if case.order == "unsorted":
        at = rng.permuted(at, axis=1)
    start = np.where(at >= cut, cut, 1)  # no document holds slot 0
    stop = at + 1 if case.order != "first" else np.where(np.arange(case.M) % 2, at + 1, start)
    bounds = Bounds(
        *(jnp.array(x[..., None] + zero, jnp.int32) for x in (start, stop)), jnp.array(zero)
    )
    if case.window is None:
        return bounds
    position = (at - start + 1)[..., None] + np.arange(case.S)
    slot = np.arange(case.T)
    prefix_position = np.where(slot >= cut, slot - cut, slot - 1)
    return within_window(bounds, jnp.array(position), jnp.array(prefix_position), case.window)


def inputs(case: Case, bounds: Bounds, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    q = jnp.abs(jax.random.normal(keys[0], (B, case.M, case.S, K * case.G, case.H))) + 0.1
    k, v = (jax.random.normal(key, (B, case.M, case.S, K, case.H)) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], q.shape)
    prefix = None
    if case.T:
        slot = np.arange(case.T)
        seen = (slot >= bounds.prefix_start[..., None]) & (slot < bounds.prefix_stop[..., None])
        bait = ~seen.any((1, 2))[..., None, None]
        assert bait.any()
        prefix = tuple(
            jnp.where(bait, loud, jax.random.normal(key, (B, case.T, K, case.H)))
            for key, loud in zip(keys[4:], (1e2, 1e6))
        )
    return jax.tree.map(lambda x: x.astype(dtype), (q, k, v, prefix, cotangent))


def out_and_grads(attend, bounds, softcap, q, k, v, prefix, cotangent):
    def run(q, k, v):
        return attend(q, k, v, prefix, bounds, scale=q.shape[-1] ** -0.5, softcap=softcap)

    out, vjp = jax.vjp(run, q, k, v)
    return out, vjp(cotangent)


kernel = partial(forms.attend, form="pallas_tpu")  # interpreted, where no TPU is


@pytest.mark.parametrize("case, variants", CASES.values(), ids=CASES)
def test_equals_the_reference(case, variants):
    run = jax.jit(out_and_grads, static_argnums=(0, 2))
    for variant in variants:
        bounds = bounds_of(case._replace(**variant))
        arrays = inputs(case, bounds)
        wanted, wanted_grads = run(primitive.attend, bounds, case.softcap, *arrays)
        out, grads = run(kernel, bounds, case.softcap, *arrays)
        for got, want in zip((out, *grads), (wanted, *wanted_grads)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_near_float32():
    """As close to float32 on the same numbers as 8 bits allow."""
    case = Case(H=128, G=2, M=6, S=9, T=300, softcap=5.0)
    bounds = bounds_of(case)
    arrays = inputs(case, bounds, jnp.bfloat16)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    wanted, wanted_grads = jax.jit(partial(out_and_grads, primitive.attend, bounds, case.softcap))(
        *exact
    )
    out, grads = jax.jit(partial(out_and_grads, kernel, bounds, case.softcap))(*arrays)
    for got, want in zip((out, *grads), (wanted, *wanted_grads)):
        assert got.dtype == jnp.bfloat16
        assert jnp.linalg.norm(got.astype(jnp.float32) - want) < 2**-7 * jnp.linalg.norm(want)


def test_only_blocks_between_the_first_and_the_last_that_a_row_sees_are_visited():
    """Four groups of one query block each, after 4 blocks of prefix, each before 2 own blocks."""
    start, stop, own_start = (
        [[x] * 512 for x in column]
        for column in zip((0, 10, 0), (3, 300, 0), (512, 513, 0), (9, 9, 0))
    )
    start[0][0], stop[0][0] = 1000, 1024  # one row that sees a far slot
    own_start[2] = list(range(512))
    own_start[3][300:] = [290] * 212
    bounds = Bounds(*(jnp.array([x], jnp.int32) for x in (start, stop, own_start)))
    q = k = jnp.zeros((1, 4, 512, 1, 64))
    plan, _ = tpu._lay_out(q, k, k, (jnp.zeros((1, 1024, 1, 64)),) * 2, bounds)
    assert (plan.R, plan.U, plan.steps) == (512, 256, 4 + 5)
    first, count, own_first, own_count = plan.visits[:, 0].tolist()
    assert list(zip(first, count))[:3] == [(0, 4), (0, 2), (2, 1)] and count[3] == 0
    assert (own_first, own_count) == ([4, 6, 8, 10], [2] * 4)


def shapes(H, G, M, S, T, dtype=jnp.bfloat16, sharding=None):
    """Arguments of `both`, as shapes."""
    array = partial(jax.ShapeDtypeStruct, sharding=sharding)
    q, k = array((1, M, S, K * G, H), dtype), array((1, M, S, K, H), dtype)
    prefix = (array((1, T, K, H), dtype),) * 2 if T else None
    return Bounds(*[array((1, M, S), jnp.int32)] * 3), q, k, k, prefix, q


def attend(bounds, q, k, v, prefix):
    return kernel(q, k, v, prefix, bounds, scale=0.1, softcap=50.0)


def both(bounds, q, k, v, prefix, cotangent):
    out, vjp = jax.vjp(lambda q, k, v: attend(bounds, q, k, v, prefix), q, k, v)
    return out, vjp(cotangent)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "H, G, M, S, T", [(64, 3, 5, 33, 300), (128, 4, 1, 600, 0), (256, 2, 128, 80, 2048)]
)
def test_lowers_for_tpu(H, G, M, S, T, dtype):
    """Mosaic takes both kernels; what it makes of them needs libtpu."""
    arguments = shapes(H, G, M, S, T, dtype)

    def calls(f):
        return (
            jax.jit(f)
            .trace(*arguments)
            .lower(lowering_platforms=("tpu",))
            .as_text()
            .count("@tpu_custom_call")
        )

    assert calls(lambda bounds, *arrays: attend(bounds, *arrays[:4])) == 1
    assert calls(both) == 2


def test_the_names_of_what_a_backward_pass_needs(capsys):
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    bounds, q, k, v, prefix, _ = shapes(64, 1, 2, 3, 40)
    jax.ad_checkpoint.print_saved_residuals(
        jax.checkpoint(attend, policy=policy), bounds, q, k, v, prefix
    )
    kept = [
        line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line
    ]
    assert len(kept) == 2 and "attention_out" in kept[0] and "attention_lse" in kept[1], kept


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "chip",
    ["v5e:2x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5p:2x2x1", "v6e:2x2"))],
)
@pytest.mark.parametrize("M, S, T", [(128, 32, 2048), (128, 80, 2048), (1, 2048, 0)])
def test_compiles_for_tpu(M, S, T, chip, monkeypatch):
    """The published setting: queries against all keys would take 4 GB; q itself takes 40 MB."""
    from jax.experimental import topologies

    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
    arguments = shapes(256, 2, M, S, T, sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    compiled = jax.jit(both).trace(*arguments).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20
