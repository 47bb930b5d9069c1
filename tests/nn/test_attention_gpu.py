"""The GPU's kernels, interpreted, against the reference; lowered, and compiled for chips."""

import importlib.util
import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import chip_proof, memory
from benchmarks.chip_proof import Layout
from latent_delib.nn.attention import blocks, forms, gpu
from latent_delib.nn.attention.blocks import A100, H100, L4
from latent_delib.nn.attention.primitive import Bounds

BF16, F32 = jnp.bfloat16, jnp.float32

# Head dim, and groups of tokens over text or over none; a float32 block has 32 rows and 32 keys.
LAYOUTS = {
    "in any order": (64, Layout(M=7, S=11, T=90, G=2)),
    "one token a group, softcap too high to do without a maximum": (
        16,
        Layout(M=40, S=1, T=90, G=4, softcap=100.0),
    ),
    "head dim 256": (256, Layout(M=3, S=11, T=90, G=1, softcap=2.0)),
    "whole blocks": (16, Layout(M=4, S=16, T=128, G=8)),
    "a group of many blocks": (128, Layout(M=2, S=75, T=40, G=3, softcap=2.0)),
    "text": (32, Layout(M=1, S=150, T=0, G=2, softcap=2.0)),
    "groups without a prefix": (16, Layout(M=7, S=11, T=0, G=2)),
}


SLOW = ("whole blocks", "head dim 256")
CASES = [
    pytest.param(*each, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, each in LAYOUTS.items()
]


@pytest.mark.parametrize("H, layout", CASES)
def test_equals_the_reference(H, layout):
    """The kernel is interpreted, where no GPU is."""
    found = chip_proof.compare("pallas_gpu", "float32", H, layout)
    assert chip_proof.within(found["errors"], (1e-5, 1e-5)), found


def test_scores_at_a_high_softcap_do_not_overflow():
    layout = Layout(M=3, S=5, T=30, G=2)
    (q, k, v, prefix), dout = chip_proof.operands(layout, 64)
    arguments = (100 * q, k, v), (prefix, chip_proof.bounds_of(layout)), dout
    out, wanted = (
        chip_proof.passes(form, 100.0, L4)(*arguments)[0] for form in ("pallas_gpu", "reference")
    )
    assert chip_proof.errors(out, wanted)[1] < 1e-5


WIDE = 256, Layout(M=5, S=30, T=150, G=2)


@pytest.mark.parametrize(
    "H, layout, chip",
    [
        (64, Layout(M=9, S=20, T=200, G=2, softcap=50.0), L4),
        (*WIDE, H100),
        pytest.param(*WIDE, A100, marks=pytest.mark.slow),  # other blocks, the same kernel
        pytest.param(*WIDE, L4, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_stays_near_float32(H, layout, chip):
    """With the blocks of bfloat16."""
    found = chip_proof.compare("pallas_gpu", "bfloat16", H, layout, shared_memory=chip)
    assert chip_proof.within(found["errors"], (2**-7, 2**-6)), found


def operands(H, dtype):
    """Operands of both passes: 256 tokens of two rows each."""
    layout = Layout(M=16, S=16, T=90, G=2)
    arrays, dout = jax.tree.map(lambda x: x.astype(dtype), chip_proof.operands(layout, H))
    return arrays[:3], (arrays[3], chip_proof.bounds_of(layout)), dout


def test_a_policy_can_save_what_the_backward_pass_needs(capsys):
    (q, k, v), (prefix, bounds), _ = operands(64, F32)
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    kernel = partial(forms.attend, form="pallas_gpu", scale=1.0, softcap=0.0)
    attend = jax.checkpoint(kernel, policy=policy)
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
def test_shared_memory_of_a_chip(platform, capability, found):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert blocks.shared_memory_of(device) == found
    assert blocks.shared_memory_of(SimpleNamespace(platform=platform)) == (
        found if platform == "cpu" else 0
    )


@pytest.mark.parametrize(
    # each: programs, warps, stages
    "dtype, H, softcap, chip, forward, query_gradient, own_gradient",
    [
        (BF16, 64, 0.0, L4, (4, 8, 3), (4, 8, 2), (4, 8, 2)),
        (BF16, 256, 50.0, H100, (4, 8, 2), (4, 8, 2), (4, 8, 2)),
        (BF16, 256, 0.0, A100, (4, 8, 2), (8, 8, 2), (4, 8, 2)),
        (F32, 128, 50.0, L4, (16, 8, 1), (16, 8, 1), (8, 8, 1)),
    ],
)
def test_lowers_with_the_blocks_of_the_chip(
    dtype, H, softcap, chip, forward, query_gradient, own_gradient
):
    gpu = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=gpu)
    arguments = operands(H, dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = chip_proof.passes("pallas_gpu", softcap, chip).trace(*arguments)
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


@pytest.mark.parametrize("name", memory.CHIPS)
def test_lowers_for_every_architecture(name):
    """For a chip that is not there, with the blocks that its shared memory takes."""
    chip = memory.CHIPS[name]
    device = SimpleNamespace(platform="gpu", compute_capability=f"{chip.major}.{chip.minor}")
    kind = chip.name
    if name == "rtx5090":  # of sm_120 jax 0.12 knows professional cards alone
        kind = "NVIDIA RTX PRO 6000"
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=chip.cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=abstract)
    both = chip_proof.passes("pallas_gpu", 50.0, blocks.shared_memory_of(device))
    arguments = operands(256, BF16)  # inside, jax 0.12 computes nothing
    with jax.sharding.use_abstract_mesh(mesh):
        text = both.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3


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
def test_every_chip_has_blocks_that_fit(kernel, dtype, H):
    rows = jax.ShapeDtypeStruct((1, 1024, 1, 1, H), dtype)
    for chip in (L4, A100, H100):
        cut = gpu._cut(kernel, rows, chip)
        on_ampere, on_hopper = ASKED[kernel, rows.dtype.itemsize, H, cut]
        assert (on_hopper if chip == H100 else on_ampere) <= chip


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs XLA's CUDA plug-in"
)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    "H", [pytest.param(64, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow), 256]
)
@pytest.mark.parametrize("chip", memory.CHIPS)
def test_compiles_for_chips_that_are_not_there(chip, H, dtype):
    """The published setting: traces of 31 tokens over a text of 2048."""
    one = memory.chip(chip)
    array = partial(jax.ShapeDtypeStruct, sharding=one)
    q, k, prefix = (
        array(shape, dtype) for shape in ((1, 128, 31, 8, H), (1, 128, 31, 4, H), (1, 2048, 4, H))
    )
    bounds = Bounds(*[array((1, 128, 31), jnp.int32)] * 3)
    memory_of_chip = blocks.shared_memory_of(one.mesh.devices.flat[0])
    both = chip_proof.passes("pallas_gpu", 50.0, memory_of_chip)
    with jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh):  # jax 0.12 asks for its devices
        lowered = both.lower((q, k, k), ((prefix, prefix), bounds), q)
    lowered.compile()
