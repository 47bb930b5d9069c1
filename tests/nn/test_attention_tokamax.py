"""The form that is tokamax's: against the reference with stand-ins for its kernels on a CPU,
lowered for chips that are not there, and refused where tokamax or the chip is missing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from benchmarks import chip_proof
from benchmarks.chip_proof import Layout
from latent_delib.errors import UserError
from latent_delib.nn.attention import choice, forms, primitive, tokamax_gpu
from latent_delib.nn.products import softcapped

needs_tokamax = pytest.mark.skipif(
    not tokamax_gpu.is_installed(), reason="needs tokamax: Python 3.12, jax 0.11.1"
)


class Chip(NamedTuple):
    """What tokamax and `choice` ask of a device."""

    compute_capability: str
    platform: str = "gpu"
    core_count: int = 132
    device_kind: str = "NVIDIA H100 80GB HBM3"


HOPPER = Chip("9.0")


# -- the choice


def test_a_missing_tokamax_is_one_line(monkeypatch):
    monkeypatch.setattr(tokamax_gpu, "is_installed", lambda: False)
    with pytest.raises(UserError, match="tokamax is not installed; expected the extra `tokamax`"):
        choice.choose("tokamax_gpu", HOPPER, small.GEMMA, jnp.bfloat16)
    assert choice.kernels_of(HOPPER) == ("pallas_gpu",)


@pytest.mark.parametrize("device", [Chip("8.0"), Chip("12.0"), Chip("", "cpu")])
def test_another_device_gets_xla_and_one_line(device, monkeypatch):
    monkeypatch.setattr(tokamax_gpu, "is_installed", lambda: True)
    with pytest.warns(UserWarning, match="tokamax_gpu does not support NVIDIA H100.*9.0 or 10.0"):
        assert choice.choose("tokamax_gpu", device, small.GEMMA, jnp.bfloat16) == "xla"


@pytest.mark.parametrize("device", [HOPPER, Chip("10.3")])
def test_auto_takes_it_once_it_alone_is_proven(device, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tokamax_gpu, "is_installed", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(choice, "_failure", lambda *_: None)
    choose = partial(choice.choose, "auto", device, small.GEMMA, jnp.bfloat16)
    with pytest.warns(UserWarning, match="pallas_gpu or tokamax_gpu is not proven"):
        assert choose() == "xla"
    proof = {"jax": jax.__version__, "code": choice.code_digest()}
    choice.record_proof("tokamax_gpu", choice.chip_family(device), proof)
    assert choose() == "tokamax_gpu"
    choice.record_proof("pallas_gpu", choice.chip_family(device), proof)
    assert choose() == "pallas_gpu"


def test_what_it_does_not_serve_is_named():
    def why(H, dtype):
        return forms.unsupported("tokamax_gpu", H, dtype)

    assert why(128, jnp.bfloat16) is None
    assert why(32, jnp.bfloat16) == "head dim 32"
    assert why(128, jnp.float32) == "dtype float32"


# -- equality with the reference


LAYOUTS = {
    "several groups per sequence": Layout(M=7, S=11, T=90, G=2),
    "softcap": Layout(M=7, S=11, T=90, G=2, softcap=2.0),
    "a group longer than a block": Layout(M=2, S=150, T=40, G=1),
    "text": Layout(M=1, S=150, T=0, G=2, softcap=2.0),
}


def inputs(layout, **changes):
    """Returns operands, bounds and the output's gradient. The head dim is 64."""
    (q, k, v, prefix), dout = chip_proof.operands(layout, 64)
    return (q, (k, v), prefix), chip_proof.bounds_of(layout, **changes), dout


@partial(jax.jit, static_argnums=(0, 4))
def out_and_gradients(attend, operands, bounds, dout, softcap):
    """The output, and gradients of all operands."""

    def call(q, own, prefix):
        return attend(q, *own, prefix, bounds, scale=2.0, softcap=softcap)

    out, pull = jax.vjp(call, *operands)
    return out, pull(dout)


def kernel_gradient(residuals, out, dout, q, k, v, *, mask, logits_scale, logits_soft_cap, **_):
    """Computes what tokamax's Mosaic kernels do, in their order: from the weights by the given
    log-sum-exp, and from the given output. (The gradient of its plain attention takes neither.)
    """
    group = q.shape[-2] // k.shape[-2]
    all_k, all_v = (jnp.repeat(x, group, axis=-2) for x in (k, v))
    products = jnp.einsum("bqhd,bkhd->bhqk", q, all_k)
    scores, slope = softcapped(products * logits_scale, logits_soft_cap or 0.0)
    top, total = (x[..., None] for x in residuals)
    seen = mask.as_array(q.shape[-3], k.shape[-3])
    weights = jnp.where(seen, jnp.exp(scores - top) / total, 0.0)
    delta = jnp.einsum("bqhd,bqhd->bhq", out, dout)[..., None]
    dweights = jnp.einsum("bqhd,bkhd->bhqk", dout, all_v)
    dproducts = weights * (dweights - delta) * slope * logits_scale
    dk = jnp.einsum("bhqk,bqhd->bkhd", dproducts, q)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, dout)
    dk, dv = (x.reshape(*k.shape[:-1], group, -1).sum(-2) for x in (dk, dv))
    return {"q": jnp.einsum("bhqk,bkhd->bqhd", dproducts, all_k), "k": dk, "v": dv}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """tokamax's attention in plain XLA, and `kernel_gradient`, in float32: jax's interpreter stops
    at the products of the Mosaic kernels.
    """
    from tokamax._src.ops.attention.base import DotProductAttention

    kernel = DotProductAttention(vjp=kernel_gradient)
    original = tokamax_gpu._kernel
    monkeypatch.setattr(tokamax_gpu, "_kernel", lambda *x: (kernel, original(*x)[1]))
    float32 = forms.KERNELS["tokamax_gpu"]._replace(dtypes=(jnp.float32,))
    monkeypatch.setitem(forms.KERNELS, "tokamax_gpu", float32)


@needs_tokamax
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_the_reference(layout, window, on_a_cpu):
    """The prefix's gradient too, which no kernel of ours gives."""
    operands, bounds, dout = inputs(layout, window=window)
    form = partial(forms.attend, form="tokamax_gpu")
    found = out_and_gradients(form, operands, bounds, dout, layout.softcap)
    wanted = out_and_gradients(primitive.attend, operands, bounds, dout, layout.softcap)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max()))


# -- the kernels for chips


@needs_tokamax
@pytest.mark.parametrize("device", [HOPPER, Chip("10.0")], ids=["sm_90", "sm_100"])
def test_lowers_for_chips_that_are_not_there(device, monkeypatch):
    """Forward, one Mosaic kernel for the own tokens and one for the prefix; backward, two each."""
    from jax.extend import backend

    monkeypatch.setattr(backend, "get_default_device", lambda: device)
    operands, bounds, dout = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
        inputs(Layout(M=7, S=11, T=90, G=1)),
    )
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.core_count, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=abstract)
    form = partial(forms.attend, form="tokamax_gpu")
    with jax.sharding.use_abstract_mesh(mesh):
        traced = out_and_gradients.trace(form, operands, bounds, dout, 50.0)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2(") == 6


@needs_tokamax
def test_a_cpu_is_refused():
    operands, bounds, _ = inputs(LAYOUTS["softcap"])
    q, own, prefix = jax.tree.map(lambda x: x.astype(jnp.bfloat16), operands)
    with pytest.raises(NotImplementedError, match="Not supported on cpu"):
        forms.attend(q, *own, prefix, bounds, scale=1.0, softcap=0.0, form="tokamax_gpu")
