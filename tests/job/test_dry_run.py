"""Dry runs, here and on slices that are not: what they say, and that they run nothing."""

import importlib.util
import json
import re
from functools import partial
from types import SimpleNamespace

import jax
import pytest

from latent_delib import mesh
from latent_delib.errors import UserError
from latent_delib.job import dry_run, experiment, parameters


def test_a_dry_run_counts_every_byte_and_reads_no_weights(
    make_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(parameters, "place_decoder", None)  # weights are not even read
    found = dry_run.dry_run(
        make_config({"mesh.fsdp": 2, "mesh.tensor": 2, "train.accumulation": 2}),
        str(tmp_path / "new"),
    )
    out = capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["dry_run.json"]
    assert json.loads((tmp_path / "new" / "dry_run.json").read_text()).items() >= found.items()
    # 53,792 = 43,552 in layers and final norm + 320 x 32 of the table; the coprocessor has 2 soft
    # tokens instead.
    for words in (
        "53,792 frozen",
        "43,616 trainable",
        "8 x cpu",
        "B 8 T 32 M 4 L 2 A 3",
        "coprocessor.soft_tokens",
    ):
        assert words in out
    memory = found["memory"]
    # Cast, their gradients, and the sums over parts.
    assert memory["gradients, and weights cast"] == 3 * memory["trainable weights"]
    assert memory["other temporaries"] > 0
    # Matrices on four devices, norms (4 layers x 4 x 32, and the last one) on each.
    norms = 4 * (4 * 4 * 32 + 32)
    assert memory["frozen weights"] == (4 * 53_792 - norms) / 4 + norms
    assert memory["optimizer"] == 2 * memory["trainable weights"] + 2 * 4
    assert (
        memory["cache of the text"] == 2 * 4 * (8 / 2 / 4) * 32 * 2 / 2 * 16 * 4
    )  # k and v, layers, rows, T, K, H, bytes
    assert found["memory_limit"] is None and "python -m benchmarks.scaling" in out.splitlines()[-1]


def test_a_step_writes_the_state_in_its_place(make_config):
    """Otherwise a device would hold weights and optimizer twice."""
    exp = experiment.read(make_config())
    plan = dry_run.planning.make(exp)
    memory = dry_run.held(exp, plan)
    written = dry_run.compile_or_explain(exp, plan).memory_analysis().alias_size_in_bytes
    assert written >= memory["trainable weights"] + memory["optimizer"]


def test_a_form_of_attention_that_a_job_may_not_take_is_told(make_config):
    note = partial(dry_run.note_on_attention, config=make_config())
    assert note("xla", topology="v5e:4x4") == "", "xla needs no proof"
    assert "attention pallas_tpu: with" in note("pallas_tpu", topology="v5e:4x4")
    assert note("pallas_tpu", topology="") == "", "this machine: as in a job"


@pytest.mark.parametrize(
    "topology", ["v5e-16", "v5e", "4x4", "v5e:4", "h100", "v5e:4x4x4x4", "0*v5e:4x4", "tpu:2x2"]
)
def test_a_topology_of_another_form(topology):
    with pytest.raises(
        UserError, match=f"--topology={re.escape(topology)}: expected a form like v5e:4x4"
    ):
        dry_run.slice_of(topology)


def test_data_that_no_job_would_take_are_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="config.data.max_bad_records: -1, expected at least 0"):
        dry_run.dry_run(make_config({"data.max_bad_records": -1}), str(tmp_path))


def test_a_start_that_is_missing_is_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="config.method.start=none/checkpoints/3: "):
        dry_run.dry_run(make_config({"method.start": "none/checkpoints/3"}), str(tmp_path))


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 25.29G of 15.75G hbm. "
        "Exceeded hbm capacity by 9.54G.",
        "Ran out of memory on HBM, the total required for HLO temporaries (25.29G) "
        "exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_is_said_in_one_line(make_config, said):
    class TooLarge:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    exp = experiment.read(make_config())
    plan = dry_run.planning.make(exp)._replace(step=TooLarge())
    with pytest.raises(
        UserError, match=r"does not fit: a chip needs 25.29GiB of 15.75GiB; split the batch"
    ):
        dry_run.compile_or_explain(exp, plan)


def test_what_a_gpu_cannot_hold_is_refused(make_config, tmp_path, monkeypatch, capsys):
    """XLA compiles it all the same; the job would end while it reads the decoder."""
    monkeypatch.setattr(dry_run, "memory_of", lambda chip: 2**20)
    with pytest.raises(UserError, match=r"does not fit: a chip needs \d\S* GiB of 0.00 GiB; split"):
        dry_run.dry_run(make_config(), str(tmp_path))
    assert "GiB of 0.00 GiB" in capsys.readouterr().out, "the parts are shown before"


def test_a_gpu_says_how_much_it_holds(monkeypatch):
    """Only those of this machine answer."""
    elsewhere = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4")
    here = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 24, "bytes_in_use": 3})
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    assert dry_run.memory_of(elsewhere) == 24
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert dry_run.memory_of(tpu) == 15.75 * 2**30
    assert dry_run.memory_of(jax.devices("cpu")[0]) is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_that_does_not_exist():
    with pytest.raises(UserError, match="--topology=v5e:3x5: no such slice"):
        dry_run.slice_of("v5e:3x5")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_two_slices_split_the_data_axis():
    chips = dry_run.slice_of("2*v5e:2x2")
    placed = mesh.make({"data": 2, "fsdp": 4}, chips).devices
    for index in (0, 1):
        assert {chip.slice_index for chip in placed[index].flat} == {index}
