"""The TPU's kernel without one: interpreted, against the reference; lowered, and compiled."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import chip_proof
from benchmarks.attention import both_passes
from benchmarks.chip_proof import Layout
from latent_delib.nn.attention import forms, tpu
from latent_delib.nn.attention.primitive import Bounds

kernel = partial(forms.attend, form="pallas_tpu")  # interpreted, where no TPU is

# Head dim, and groups of tokens over text or over none.
LAYOUTS = {
    "plain": (64, Layout(M=3, S=5, T=40, G=1)),
    "three blocks of prefix": (128, Layout(M=60, S=5, T=600, G=2, softcap=5.0)),
    "head dim 256": (256, Layout(M=3, S=5, T=300, G=4, softcap=5.0)),
    "groups across blocks": (64, Layout(M=40, S=9, T=300, G=2, softcap=5.0)),
    "one token": (64, Layout(M=1, S=1, T=300, G=4)),
    "two tokens, nothing else": (64, Layout(M=1, S=2, T=0, G=2)),
    "three heads a key head": (64, Layout(M=30, S=7, T=20, G=3)),
    "text": (128, Layout(M=1, S=600, T=0, G=2, softcap=5.0)),
    "groups alone": (128, Layout(M=3, S=5, T=0, G=8)),
}


SLOW = (
    "three blocks of prefix",
    "groups across blocks",
    "two tokens, nothing else",
    "three heads a key head",
)
CASES = [
    pytest.param(*each, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, each in LAYOUTS.items()
]


@pytest.mark.parametrize("H, layout", CASES)
def test_equals_the_reference(H, layout):
    found = chip_proof.compare("pallas_tpu", "float32", H, layout)
    assert chip_proof.within(found["errors"], (1e-5, 1e-5)), found


def test_bfloat16_stays_near_float32():
    """As close to float32 on the same numbers as 8 bits allow."""
    layout = Layout(M=6, S=9, T=300, G=2, softcap=5.0)
    found = chip_proof.compare("pallas_tpu", "bfloat16", 128, layout)
    assert chip_proof.within(found["errors"], (2**-7, 2**-6)), found


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
    q, k = array((1, M, S, 2 * G, H), dtype), array((1, M, S, 2, H), dtype)
    prefix = (array((1, T, 2, H), dtype),) * 2 if T else None
    return (q, k, k), (prefix, Bounds(*[array((1, M, S), jnp.int32)] * 3)), q


passes = both_passes(partial(kernel, scale=0.1, softcap=50.0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "H, G, M, S, T", [(64, 3, 5, 33, 300), (128, 4, 1, 600, 0), (256, 2, 128, 80, 2048)]
)
def test_lowers_for_tpu(H, G, M, S, T, dtype):
    """Mosaic takes both kernels; what it makes of them needs libtpu."""
    arguments = shapes(H, G, M, S, T, dtype)

    for name, calls in dict(forward=1, both=2).items():
        lowered = passes[name].trace(*arguments).lower(lowering_platforms=("tpu",))
        assert lowered.as_text().count("@tpu_custom_call") == calls


def test_the_names_of_what_a_backward_pass_needs(capsys):
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    operands, shown, _ = shapes(64, 1, 2, 3, 40)
    attend = partial(kernel, scale=0.1, softcap=50.0)
    jax.ad_checkpoint.print_saved_residuals(
        jax.checkpoint(attend, policy=policy), *operands, *shown
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
    compiled = passes["both"].trace(*arguments).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 2**20
