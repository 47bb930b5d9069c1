"""Dry runs: what they say of a step, here and on slices that nobody here has; that they run and load nothing."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from latent_delib import train
from latent_delib.delib import cost
from latent_delib.errors import UserError
from latent_delib.job import dry_run, experiment
from latent_delib.nn.sizes import SIZES


def test_here(make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "place_decoder", None)  # weights are not even read
    found = dry_run.dry_run(
        make_config({"mesh.fsdp": 2, "mesh.tensor": 2, "train.accumulation": 2}), str(tmp_path / "new")
    )
    out = capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["dry_run.json"]
    assert json.loads((tmp_path / "new" / "dry_run.json").read_text()).items() >= found.items()
    # 53,792 = 43,552 in layers and final norm + 320 x 32 of the table; the coprocessor has 2 soft tokens instead.
    for words in ("53,792 frozen", "43,616 trainable", "8 x cpu", "B 8 T 32 M 4 L 2 A 3", "coprocessor.soft_tokens"):
        assert words in out
    memory = found["memory"]
    assert sum(memory.values()) == pytest.approx(2 * memory["total"])
    # Matrices on four devices, norms (4 layers x 4 x 32, and the last one) on each.
    norms = 4 * (4 * 4 * 32 + 32)
    assert memory["frozen weights"] == (4 * 53_792 - norms) / 4 + norms
    assert memory["optimizer"] == 2 * memory["trainable weights"] + 2 * 4
    assert (
        memory["cache of the text"] == 2 * 4 * (8 / 2 / 4) * 32 * 2 / 2 * 16 * 4
    )  # k and v, layers, rows, T, K, H, bytes
    assert found["received"]["all-gather"]["received"] > 0 and "estimate" not in out


def test_the_command_runs_it(config_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dry_run, "dry_run", lambda config, *rest: seen.append((config.seed, *rest)))
    flags = ConfigDict({"config": base.get_config(), "workdir": "DIR", "dry_run": True, "topology": "v5e:4x4"})
    train.main(flags)
    assert seen == [(0, "DIR", "v5e:4x4")]


@pytest.mark.parametrize("topology", ["v5e-16", "v5e", "4x4", "v5e:4", "h100", "v5e:4x4x4x4"])
def test_a_topology_of_another_form(topology):
    with pytest.raises(UserError, match=f"--topology={topology}: expected a form like v5e:4x4"):
        dry_run.slice_of(topology)


def test_an_estimate_follows_from_what_was_found(make_config):
    """The longer of compute and links, then the update; rows by proportion of what is not theirs."""
    exp = experiment.read(make_config())
    chip = dry_run.Chip(memory=10.0, bandwidth=1e12, links=1e9)
    gib = 2.0**30
    memory = {"cache of the text": gib, "other temporaries": 2 * gib, "total": 5 * gib}
    found = {"flops": {"useful": 3e9, "done again": 1e9}, "received": {"x": {"received": 1e9}}, "memory": memory}
    plan = dry_run.planning.make(exp)
    kind = exp.mesh.devices.flat[0].device_kind
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cost.PEAK, kind, 4e9)
        result = dry_run.estimate(exp, plan, found, chip)
    update = 7 * 4 * 43_616 / 1e12
    assert result["seconds"] == pytest.approx({"compute": 2.0, "links": 2.0, "update": update, "step": 2.0 + update})
    assert result["model_flops_utilisation"] == pytest.approx(3 / 4 / 2.0, rel=1e-4)
    assert result["largest_rows"] == 2  # 1 row takes 3 GiB; 2 are held, 8 are left


def test_data_that_no_job_would_take_are_refused(make_config, tmp_path):
    with pytest.raises(UserError, match="config.data.max_bad_records: -1, expected at least 0"):
        dry_run.dry_run(make_config({"data.max_bad_records": -1}), str(tmp_path))


# -- with the compiler for TPUs


def small_gemma(**mesh):
    """A model that the kernel for TPUs serves, with matrices large enough that the compiler treats them as such."""
    c = base.get_config()
    c.decoder.path, c.decoder.tokenizer = "", "packaged"
    size = dataclasses.replace(SIZES["gemma2_test"], embed_dim=1024, head_dim=128, ffn_dim=4096, vocab_size=4096)
    c.decoder.architecture = ConfigDict(dataclasses.asdict(size))
    c.method.update(num_latents=4, num_traces=16, num_ahead=4)
    c.data.seq_len, c.train.batch_size, c.compute.remat = 256, 8, "full"
    c.mesh.update(mesh)
    return c


needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@needs_libtpu
@pytest.mark.parametrize("topology, limit", [("v5e:2x4", 15.75), ("v6e:2x4", 31.25), ("v5p:2x2x2", 95.74)])
def test_a_slice(topology, limit, tmp_path):
    """Weights are gathered once for each use, the token table once. Of matrices as small as these the compiler sums
    some gradients whole, where it scatters those of true size (docs/scaling.md)."""
    found = dry_run.dry_run(small_gemma(data=2, fsdp=4), str(tmp_path), topology)
    assert found["chips"] == 8 and found["memory_limit"] == limit * 2**30
    c = small_gemma().decoder.architecture
    matrices = 2 * c.num_layers * c.embed_dim * (3 * c.ffn_dim + c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads))
    table = 2 * c.vocab_size * c.embed_dim
    received = {kind: t["received"] for kind, t in found["received"].items()}
    assert received["all-gather"] == pytest.approx(3 / 4 * (5 * matrices + table), rel=0.01)
    gradients = sum(received.values()) - received["all-gather"]
    assert 3 / 4 * matrices < gradients < 2 * matrices
    assert 0 < found["model_flops_utilisation"] < 0.5 and found["largest_rows"] > 1


@pytest.mark.parametrize(
    "said",
    [
        "Ran out of memory in memory space hbm. Used 25.29G of 15.75G hbm. Exceeded hbm capacity by 9.54G.",
        "Ran out of memory on HBM, the total required for HLO temporaries (25.29G) exceeds available HBM (15.75G).",
    ],
)
def test_what_does_not_fit_is_said_in_one_line(make_config, said):
    class TooLarge:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    exp = experiment.read(make_config())
    plan = dry_run.planning.make(exp)._replace(step=TooLarge())
    with pytest.raises(UserError, match=r"does not fit: a chip needs 25.29GiB of 15.75GiB; split the batch"):
        dry_run.needs(exp, plan)


@needs_libtpu
def test_a_slice_that_does_not_exist():
    with pytest.raises(UserError, match="--topology=v5e:3x5: no such slice"):
        dry_run.slice_of("v5e:3x5")
