"""Which form a device gets: "auto" takes a proven kernel, or says in one line why not."""

import json
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import small

from latent_delib.nn.attention import choice, forms, gpu

CONFIG, DTYPE = small.GEMMA, jnp.float32
PROOF = {"jax": jax.__version__, "code": choice.code_digest()}


class Chip(NamedTuple):
    """What `choose` asks of a device."""

    platform: str
    device_kind: str = "a chip"
    compute_capability: str | None = None


CPU, TPU, OTHER = Chip("cpu"), Chip("tpu", "TPU v5 lite"), Chip("other")
HOPPER = Chip("gpu", "NVIDIA H100 80GB HBM3", "9.0")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No record of this machine, no chip asked about before, and chips that are attached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "devices", lambda *_: [CPU, TPU, HOPPER])
    choice._failure.cache_clear()
    choice._tell.cache_clear()


@pytest.fixture
def compiles(monkeypatch):
    monkeypatch.setattr(choice, "_failure", lambda *_: None)


def choose(form, device):
    return choice.choose(form, device, CONFIG, DTYPE)


def quietly(form, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return choose(form, device)


def test_a_named_form_is_taken():
    assert forms.FORMS == ("reference", "xla", "pallas_gpu", "pallas_tpu", "tokamax_gpu")
    assert quietly("reference", TPU) == "reference"
    assert quietly("pallas_gpu", HOPPER) == "pallas_gpu"  # unproven
    assert quietly("pallas_gpu", CPU) == "pallas_gpu"  # interpreted


def test_a_device_without_a_kernel_gets_xla():
    assert [quietly("auto", x) for x in (CPU, OTHER)] == ["xla", "xla"]


@pytest.mark.parametrize(
    "device, chip", [(HOPPER, "NVIDIA H100 80GB HBM3 (sm_90)"), (TPU, "TPU v5 lite")]
)
def test_an_unproven_chip_gets_xla_and_one_line(device, chip):
    [kernel] = choice.kernels_of(device)
    line = f"attention: {kernel} is not proven on {chip}; using xla instead; "
    line += "`python -m benchmarks.chip` proves it"
    with pytest.warns(UserWarning, match=re.escape(line)) as found:
        assert [choose("auto", device) for _ in range(3)] == ["xla"] * 3
    assert len(found) == 1


def test_a_family_in_the_table_gets_the_kernel(monkeypatch, compiles):
    monkeypatch.setitem(choice.PROVEN, "pallas_gpu", ("sm_90",))
    assert quietly("auto", HOPPER) == "pallas_gpu"
    with pytest.warns(UserWarning, match="pallas_tpu is not proven on TPU v5 lite"):
        assert choose("auto", TPU) == "xla"


def test_a_record_of_this_machine_makes_auto_take_the_kernel(compiles, tmp_path):
    path = choice.record_proof("pallas_gpu", "sm_90", PROOF)
    assert path == tmp_path / "latent_delib" / "proven.json" and json.loads(path.read_text())
    choice.record_proof("pallas_tpu", "TPU v5 lite", PROOF | {"jax": "0.1"})  # by another version
    assert quietly("auto", HOPPER) == "pallas_gpu"
    assert not choice.is_proven("pallas_tpu", TPU)
    choice.record_proof("pallas_gpu", "sm_90", None)
    assert not choice.is_proven("pallas_gpu", HOPPER)


def test_a_damaged_record_is_none():
    file = choice.record_proof("pallas_gpu", "sm_90", PROOF)
    for text in ("{", "[]", ""):
        file.write_text(text)
        assert not choice.is_proven("pallas_gpu", HOPPER)


def test_many_processes_decide_by_the_table_alone(monkeypatch):
    """Machines may have records or not; a job whose processes choose apart would hang."""
    choice.record_proof("pallas_gpu", "sm_90", PROOF)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match="not proven.* has to name it in compute.attention"):
        assert choose("auto", HOPPER) == "xla"
    monkeypatch.setitem(choice.PROVEN, "pallas_gpu", ("sm_90",))
    assert quietly("auto", HOPPER) == "pallas_gpu"


def test_a_device_that_is_not_attached_gets_the_kernel(monkeypatch):
    """A compiler is asked what the chip would do."""
    monkeypatch.setattr(jax, "devices", lambda *_: [CPU])
    assert [quietly("auto", x) for x in (CPU, HOPPER, TPU)] == ["xla", "pallas_gpu", "pallas_tpu"]


@pytest.mark.parametrize("form", ["auto", "pallas_gpu"])
@pytest.mark.parametrize(
    "kind, capability", [("Tesla T4", "7.5"), ("AMD Instinct MI300X", "gfx942")]
)
def test_a_gpu_that_cannot_run_the_kernel_gets_xla_and_one_line(form, kind, capability):
    chip = Chip("gpu", kind, capability)
    line = f"attention: pallas_gpu does not support {kind} "
    line += "(it needs NVIDIA's compute capability 8.0); using xla instead"
    with pytest.warns(UserWarning, match=re.escape(line)) as found:
        assert choose(form, chip) == "xla"
    assert len(found) == 1


def test_a_kernel_that_does_not_compile_gives_way(monkeypatch):
    """Chosen by auto: it is compiled first, for a device which here is an interpreting CPU."""
    device = jax.local_devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(choice, "kernels_of", lambda _: ("pallas_gpu",))
    monkeypatch.setitem(choice.PROVEN, "pallas_gpu", (choice.chip_family(device),))
    assert quietly("auto", device) == "pallas_gpu"

    def broken(*_, **__):
        raise ValueError("no such\ninstruction")

    choice._failure.cache_clear()
    monkeypatch.setattr(gpu, "forward", broken)
    line = "attention: pallas_gpu does not compile for cpu; using xla instead: "
    line += "ValueError: no such instruction"
    with pytest.warns(UserWarning, match=re.escape(line)) as found:
        assert [choose("auto", device) for _ in range(2)] == ["xla", "xla"]
    assert len(found) == 1
    assert choose("pallas_gpu", device) == "pallas_gpu"  # named: its calls fail loudly


def test_what_a_kernel_does_not_serve_is_left_to_its_calls():
    """They say so themselves."""
    # head dim 16
    assert choice._failure("pallas_tpu", jax.local_devices()[0], CONFIG, jnp.dtype(DTYPE)) is None


def test_the_family_of_a_chip():
    assert choice.chip_family(HOPPER) == "sm_90"
    assert choice.chip_family(TPU) == "TPU v5 lite"
