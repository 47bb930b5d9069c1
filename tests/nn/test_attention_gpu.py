"""The GPU's kernels, interpreted, against the reference; lowered, and compiled for cards."""

import importlib.util
import re
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import memory
from latent_delib.nn.attention import cards, forms, gpu, primitive
from latent_delib.nn.attention.cards import A100, H100, L4
from latent_delib.nn.attention.primitive import Bounds, within_window

BAIT = 3  # so many slots at either end of the prefix are outside every bound
B, K = 2, 2


class Case(NamedTuple):
    """M groups of S tokens over T slots, or none; a float32 block has 32 rows and 32 keys."""

    H: int = 64
    G: int = 2
    M: int = 7
    S: int = 11
    T: int | None = 90
    softcap: float = 0.0
    window: int | None = None
    unsorted: bool = False


# One program each, and the bounds to run it with: they are data.
CASES = {
    "in any order, and in a window": (Case(), [dict(), dict(unsorted=True), dict(window=20)]),
    "one token a group, softcap too high to do without a maximum": (
        Case(H=16, G=4, M=40, S=1, softcap=100.0),
        [dict(), dict(unsorted=True)],
    ),
    "head dim 256": (Case(H=256, G=1, M=3, softcap=2.0), [dict()]),
    "whole blocks": (Case(H=16, G=8, M=4, S=16, T=128), [dict(), dict(window=20)]),
    "a group of many blocks": (Case(H=128, G=3, M=2, S=75, T=40, softcap=2.0), [dict()]),
    "text": (Case(H=32, M=1, S=150, T=None, softcap=2.0), [dict(), dict(window=40)]),
    "groups without a prefix": (Case(H=16, T=None), [dict()]),
}


def bounds_of(case: Case) -> Bounds:
    """Two documents per row; groups at random positions, the first of them with an empty range.

    Without a prefix each group is text of two documents.
    """
    draw = np.random.default_rng(1)
    M, S, T = case.M, case.S, case.T
    own = np.broadcast_to(np.arange(S), (B, M, S))
    if T is None:
        middle = draw.integers(0, S, (B, M, 1))
        own_start = np.where(own >= middle, middle, 0)
        prefix_start, prefix_stop, position, slots = (
            np.zeros_like(own),
            np.zeros_like(own),
            own - own_start,
            None,
        )
    else:
        middle = draw.integers(T // 3, T // 2, (B, 1))
        at = draw.integers(BAIT, T - BAIT, (B, M))
        at = at if case.unsorted else np.sort(at, axis=1)
        start = np.where(at >= middle, middle, BAIT)
        at[:, 0] = start[:, 0]
        own_start = np.minimum(own, draw.integers(0, 3, own.shape))
        prefix_start, prefix_stop = (np.broadcast_to(x[..., None], own.shape) for x in (start, at))
        position = (at - start)[..., None] + own
        slots = jnp.arange(T) - jnp.where(jnp.arange(T) >= middle, middle, BAIT)
    bounds = Bounds(*(jnp.array(x, jnp.int32) for x in (prefix_start, prefix_stop, own_start)))
    return (
        bounds
        if case.window is None
        else within_window(bounds, jnp.array(position), slots, case.window)
    )


def inputs(case: Case, dtype=jnp.float32):
    """Draws q, k, v and prefix: positive queries, so that the bait's keys score highest."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jnp.abs(jax.random.normal(keys[0], (B, case.M, case.S, K * case.G, case.H), dtype))
    k, v = (jax.random.normal(key, (B, case.M, case.S, K, case.H), dtype) for key in keys[1:3])
    if case.T is None:
        return q, k, v, None
    prefix = (jax.random.normal(key, (B, case.T, K, case.H), dtype) for key in keys[3:])
    ends = np.r_[:BAIT, case.T - BAIT : case.T]
    return q, k, v, tuple(x.at[:, ends].set(bait) for x, bait in zip(prefix, (1e3, 1e6)))


@partial(jax.jit, static_argnums=(0, 3))
def out_and_grads(attend, arrays, bounds, softcap):
    """The output, and gradients of q, k and v."""

    def total(own):
        out = attend(*own, arrays[3], bounds, scale=arrays[0].shape[-1] ** -0.5, softcap=softcap)
        return jnp.sum(
            out * jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(out.dtype)
        ), out

    grads, out = jax.grad(total, has_aux=True)(arrays[:3])
    return out, grads


KERNEL = partial(forms.attend, form="pallas_gpu")  # interpreted, where no GPU is


def close(x, wanted, within):
    """No element is further off than `within` of the largest."""
    x, wanted = np.asarray(x, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(x, wanted, rtol=0, atol=within * np.abs(wanted).max())


@pytest.mark.parametrize("case, variants", CASES.values(), ids=CASES)
def test_equals_the_reference(case, variants):
    arrays = inputs(case)
    for variant in variants:
        bounds = bounds_of(case._replace(**variant))
        out, grads = out_and_grads(KERNEL, arrays, bounds, case.softcap)
        expected, expected_grads = out_and_grads(primitive.attend, arrays, bounds, case.softcap)
        close(out, expected, 1e-5)
        for got, wanted in zip(grads, expected_grads):
            close(got, wanted, 1e-5)


WIDE = Case(H=256, M=5, S=30, T=150)


@pytest.mark.parametrize(
    "case, card",
    [
        (Case(H=64, M=9, S=20, T=200, softcap=50.0), L4),
        (WIDE, H100),
        pytest.param(WIDE, A100, marks=pytest.mark.slow),  # other blocks, the same kernel
        pytest.param(WIDE, L4, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_stays_near_float32(case, card):
    """With the blocks of bfloat16. The reference rounds as it likes: float32 decides."""
    arrays, bounds = inputs(case, jnp.bfloat16), bounds_of(case)
    exact, exact_grads = out_and_grads(
        primitive.attend,
        jax.tree.map(lambda x: x.astype(jnp.float32), arrays),
        bounds,
        case.softcap,
    )
    out, grads = out_and_grads(partial(KERNEL, shared_memory=card), arrays, bounds, case.softcap)
    close(out, exact, 2**-7)
    for got, x, wanted in zip(grads, arrays, exact_grads):
        assert got.dtype == x.dtype
        close(got, wanted, 2**-6)


def test_a_policy_can_save_what_the_backward_pass_needs(capsys):
    (q, k, v, prefix), bounds = inputs(Case()), bounds_of(Case())
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    attend = jax.checkpoint(partial(KERNEL, scale=1.0, softcap=0.0), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(lambda q: attend(2 * q, k, v, prefix, bounds), q)
    saved = capsys.readouterr().out
    assert "named 'attention_out'" in saved and "named 'attention_lse'" in saved


@pytest.mark.parametrize(
    "platform, capability, found",
    [
        ("gpu", "8.0", 166912),
        ("gpu", "8.6", 101376),
        ("cuda", "8.9", 101376),
        ("gpu", "9.0", 232448),
        ("gpu", "10.0", 232448),
        ("gpu", "12.0", 101376),
        ("gpu", "13.7", 101376),  # not known: what all have
        ("gpu", "7.5", 0),
        ("gpu", "gfx942", 0),  # AMD's
        ("cpu", "", 101376),
    ],
)
def test_shared_memory_of_a_card(platform, capability, found):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert cards.shared_memory_of(device) == found
    assert cards.shared_memory_of(SimpleNamespace(platform=platform)) == (
        found if platform == "cpu" else 0
    )


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    # each: programs, warps, stages
    "dtype, H, softcap, card, forward, query_gradient, own_gradient",
    [
        (BF16, 64, 0.0, L4, (4, 8, 3), (4, 8, 2), (4, 8, 2)),
        (BF16, 256, 50.0, H100, (4, 8, 2), (4, 8, 2), (4, 8, 2)),
        (BF16, 256, 0.0, A100, (4, 8, 2), (8, 8, 2), (4, 8, 2)),
        (F32, 128, 50.0, L4, (16, 8, 1), (16, 8, 1), (8, 8, 1)),
    ],
)
def test_lowers_with_the_blocks_of_the_card(
    dtype, H, softcap, card, forward, query_gradient, own_gradient
):
    """256 tokens of two rows each."""
    case = Case(H=H, M=16, S=16)
    gpu = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=gpu)
    arrays, bounds = inputs(case, dtype), bounds_of(case)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = out_and_grads.trace(partial(KERNEL, shared_memory=card), arrays, bounds, softcap)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    calls = (
        r'grid_x = (\d+) : .*?name = "_(\w+)_kernel", num_stages = (\d+) : i32, num_warps = (\d+)'
    )
    found = {
        name: (int(n), int(warps), int(stages))
        for n, name, stages, warps in re.findall(calls, text)
    }
    assert found == dict(forward=forward, query_gradient=query_gradient, own_gradient=own_gradient)


@pytest.mark.parametrize("name", memory.CARDS)
def test_lowers_for_every_architecture(name):
    """For a card that is not there, with the blocks that its shared memory takes."""
    card = memory.CARDS[name]
    device = SimpleNamespace(platform="gpu", compute_capability=f"{card.major}.{card.minor}")
    kind = card.name
    if name == "rtx5090":  # of sm_120 jax 0.12 knows professional cards alone
        kind = "NVIDIA RTX PRO 6000"
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=card.cores, platform="gpu")
    case = Case(H=256, M=16, S=16)
    attend = partial(KERNEL, shared_memory=cards.shared_memory_of(device))
    arrays, bounds = inputs(case, BF16), bounds_of(case)  # inside, jax 0.12 computes nothing
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("device",), abstract_device=abstract)
    ):
        traced = out_and_grads.trace(attend, arrays, bounds, 50.0)
        assert (
            traced.lower(lowering_platforms=("cuda",)).as_text().count("@__gpu$xla.gpu.triton(")
            == 3
        )


# Bytes of shared memory that XLA asked for (jax 0.10.2), by kernel, bytes of an operand, head dim
# and blocks: on sm_80, sm_86, sm_89 and sm_120 alike, and at most on sm_90 and sm_100.
ASKED = {
    ("forward", 2, 64, (128, 64, 8, 3)): (49152, 66592),
    ("forward", 2, 128, (128, 64, 8, 3)): (98304, 132128),
    ("forward", 2, 256, (128, 64, 8, 2)): (147456, 197664),
    ("forward", 2, 256, (64, 32, 8, 2)): (69632, 98848),
    ("query_gradient", 2, 64, (128, 64, 8, 2)): (49152, 74752),
    ("query_gradient", 2, 128, (128, 64, 8, 2)): (98304, 148480),
    ("query_gradient", 2, 256, (128, 32, 8, 2)): (172032, 213040),
    ("query_gradient", 2, 256, (64, 64, 8, 2)): (139264, 230400),
    ("query_gradient", 2, 256, (64, 32, 8, 1)): (98304, 98312),
    ("own_gradient", 2, 64, (64, 64, 8, 2)): (33792, 66624),
    ("own_gradient", 2, 128, (64, 64, 8, 2)): (74752, 132160),
    ("own_gradient", 2, 256, (32, 64, 8, 2)): (102912, 164416),
    ("own_gradient", 2, 256, (32, 32, 4, 2)): (68096, 68096),
    ("forward", 4, 64, (32, 32, 8, 1)): (24576, 24576),
    ("forward", 4, 128, (32, 32, 8, 1)): (49152, 49152),
    ("forward", 4, 256, (32, 32, 8, 1)): (98304, 98304),
    ("forward", 4, 256, (32, 16, 8, 1)): (65536, 65536),
    ("query_gradient", 4, 64, (32, 32, 8, 1)): (32768, 32768),
    ("query_gradient", 4, 128, (32, 32, 8, 1)): (65536, 65536),
    ("query_gradient", 4, 256, (32, 32, 8, 1)): (131072, 131072),
    ("query_gradient", 4, 256, (32, 16, 8, 1)): (98304, 98304),
    ("own_gradient", 4, 64, (32, 32, 8, 1)): (36864, 36864),
    ("own_gradient", 4, 128, (32, 32, 8, 1)): (69632, 69632),
    ("own_gradient", 4, 256, (32, 32, 8, 1)): (135168, 135168),
    ("own_gradient", 4, 256, (32, 16, 8, 1)): (100352, 100352),
}


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "own_gradient"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("H", [64, 128, 256])
def test_every_card_has_blocks_that_fit(kernel, dtype, H):
    rows = jax.ShapeDtypeStruct((1, 1024, 1, 1, H), dtype)
    for card in (L4, A100, H100):
        cut = gpu._cut(kernel, rows, card)
        on_ampere, on_hopper = ASKED[kernel, rows.dtype.itemsize, H, cut]
        assert (on_hopper if card == H100 else on_ampere) <= card


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs XLA's CUDA plug-in"
)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "H", [pytest.param(64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 256]
)
@pytest.mark.parametrize("card", memory.CARDS)
def test_compiles_for_cards_that_are_not_there(card, H, dtype):
    """The published setting: traces of 31 tokens over a text of 2048."""
    one = memory.chip(card)
    array = partial(jax.ShapeDtypeStruct, sharding=one)
    q, k, prefix = (
        array(shape, dtype) for shape in ((1, 128, 31, 8, H), (1, 128, 31, 4, H), (1, 2048, 4, H))
    )
    bounds = Bounds(*[array((1, 128, 31), jnp.int32)] * 3)
    attend = partial(KERNEL, shared_memory=cards.shared_memory_of(one.mesh.devices.flat[0]))
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):  # jax 0.12 asks for its devices
        lowered = out_and_grads.lower(attend, (q, k, k, (prefix, prefix)), bounds, 50.0)
    lowered.compile()
