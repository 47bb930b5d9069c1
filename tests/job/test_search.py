"""The search for a mesh: its order, what it skips, and that what it finds is a job's."""

import importlib.util
import itertools
import json
import subprocess
import sys

import jax
import pytest
from absl import flags

from configs import gemma2_2b
from latent_delib.errors import UserError
from latent_delib.job import dry_run, experiment, search
from latent_delib.job import plan as planning
from latent_delib.job.search import Estimate, Setting, Verdict
from latent_delib.machine import chips, command_line

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
GIB = 2.0**30
DOES_NOT_FIT = "does not fit: a chip needs 25.29GiB of 15.75GiB; split the batch"


def test_settings_give_each_device_whole_rows():
    found = list(search.settings(8, 12))
    assert len(found) == len(set(found))
    for fsdp, traces, accumulation, _ in found:
        data = 8 // (fsdp * traces)
        assert data * fsdp * traces == 8
        assert 12 % (data * fsdp * accumulation) == 0
    # 12 rows split over 4 or fewer devices: 2, 4 or 8 of them share a row's traces
    shapes = {(s.fsdp, s.traces) for s in found}
    assert shapes == {(1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)}
    assert {s.accumulation for s in found if s.traces == 8} == {1, 2, 3, 4, 6, 12}


def test_order_is_by_time_then_by_traffic():
    near = [
        Estimate(i, seconds, received)
        for i, (seconds, received) in enumerate([(5.0, 1.0), (3.96, 9.0), (4.04, 7.0), (3.4, 99.0)])
    ]
    assert [each.setting for each in search.in_order(near)] == [3, 2, 1, 0]


def memory(s: Setting, share: float = 1.0) -> float:
    """Weights, and a share of what a part of the batch takes."""
    kept = {"dots": 8, "attention": 4, "full": 2}[s.remat]
    return 32 * GIB / (s.fsdp * s.traces) + share * 32 * GIB * kept / s.accumulation


def least(s: Setting) -> float:
    return memory(s, share=0.5)


def verdict(s: Setting, limit: float) -> Verdict:
    if memory(s) <= limit:
        return Verdict(s, {"memory": {}}, None)
    needs = f"a chip needs {memory(s) / GIB:.4f}GiB of {limit / GIB}GiB"
    return Verdict(s, None, f"does not fit: {needs}")


@pytest.mark.parametrize("limit", [3 * GIB, 6 * GIB, 20 * GIB, 400 * GIB])
def test_the_first_that_fit_are_found(limit, monkeypatch):
    monkeypatch.setattr(search, "processes", lambda: 2)
    ordered = sorted(search.settings(16, 64), key=lambda s: (search.REMAT.index(s.remat), s))
    compiled = []

    def compile_all(settings):
        assert len(settings) <= 2
        compiled.extend(settings)
        return [verdict(s, limit) for s in settings]

    verdicts = search.first_to_fit(ordered, limit, least, compile_all)
    assert [v.setting for v in verdicts] == compiled == sorted(compiled, key=ordered.index)
    fitting = [v.setting for v in verdicts if v.result]
    assert fitting[0] == next(s for s in ordered if memory(s) <= limit)
    seen = ordered
    if len(fitting) == search.WANTED:
        seen = ordered[: ordered.index(fitting[-1])]
    # What was left out needs too much, or is slower than one that fits.
    for s in set(seen) - set(compiled):
        assert memory(s) > limit or any(s.needs_no_more_than(other) for other in fitting)


def test_a_verdict_decides_what_needs_more_or_is_slower():
    middle = Setting(4, 1, 4, "attention")
    more = [Setting(2, 1, 4, "attention"), Setting(4, 1, 2, "attention"), Setting(4, 1, 4, "dots")]
    less = [Setting(8, 1, 4, "attention"), Setting(4, 1, 8, "attention"), Setting(4, 1, 4, "full")]
    fits = [Verdict(middle, {"memory": {}}, None)]
    does_not = [Verdict(middle, None, DOES_NOT_FIT)]
    for one in more:
        assert search.is_decided(one, does_not) and not search.is_decided(one, fits)
    for one in less:
        assert search.is_decided(one, fits) and not search.is_decided(one, does_not)
    for other in Setting(4, 2, 4, "attention"), Setting(8, 1, 2, "attention"):
        assert not search.is_decided(other, fits) and not search.is_decided(other, does_not)


def test_what_cannot_fit_is_not_compiled():
    ordered = [Setting(1, 1, parts, "full") for parts in (1, 2, 4)]
    assert search.first_to_fit(ordered, 39 * GIB, least, lambda settings: 1 / 0) == []


def test_needing_no_more_is_an_order_that_memory_follows():
    for a, b in itertools.product(search.settings(4, 8), repeat=2):
        if a.needs_no_more_than(b):
            assert memory(a) <= memory(b)
            assert a == b or not b.needs_no_more_than(a)


def end_with(monkeypatch, *codes):
    """Replaces the dry runs by scripts."""
    scripts = iter(codes)

    def start(words, log):
        assert words[:2] == ["--config=X", "--nosearch"] and words[2] == f"--workdir={log.parent}"
        with log.open("w") as out:
            return subprocess.Popen(
                [sys.executable, "-c", next(scripts)], stdout=out, stderr=out, cwd=log.parent
            )

    monkeypatch.setattr(search, "_start", start)


def test_verdicts_are_read_from_the_dry_runs(monkeypatch):
    result = {"memory": {"total": 2**30}}
    end_with(
        monkeypatch,
        f"open('dry_run.json', 'w').write({json.dumps(result)!r})",
        f"exit('error: {DOES_NOT_FIT}')",
    )
    first, second = Setting(2, 1, 1, "dots"), Setting(1, 1, 1, "dots")
    assert search.compile_all([first, second], ["--config=X"]) == [
        Verdict(first, result, None),
        Verdict(second, None, DOES_NOT_FIT.partition(";")[0]),
    ]


def test_another_failure_ends_the_search(monkeypatch):
    end_with(monkeypatch, "exit('error: no such file')")
    with pytest.raises(UserError, match="mesh.fsdp=2 .* exit code 1: no such file"):
        search.compile_all([Setting(2, 1, 1, "dots")], ["--config=X"])


def test_a_batch_that_no_mesh_divides(make_config):
    with pytest.raises(UserError, match="batch_size=7 does not split over any mesh of 8 devices"):
        config = make_config({"train.batch_size": 7, "method.num_traces": 3})
        search.estimate_all(config, jax.devices())


def test_a_mistake_elsewhere_is_said_as_always(make_config):
    with pytest.raises(UserError, match="config.data.max_bad_records: -1"):
        search.estimate_all(make_config({"data.max_bad_records": -1}), jax.devices())


# -- with the compiler for TPUs


@needs_libtpu
def test_what_a_search_needs(make_config, tmp_path):
    with pytest.raises(UserError, match="--search: expected --topology"):
        search.search(make_config(), str(tmp_path), "", [])
    with pytest.raises(UserError, match="no figures for TPU v3: .* TPU v5 lite"):
        search.search(make_config(), str(tmp_path), "v3:2x2", [])


@needs_libtpu
@pytest.mark.parametrize("topology, devices", [("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)])
def test_chips_of_two_cores(topology, devices):
    """The cores of a v4 are one device, those of a TPU7x two."""
    found = dry_run.slice_of(topology)
    assert len(found) == devices
    assert None not in chips.chip_of(found[0])


# The compiler's verdicts, from docs/scaling.md.
@needs_libtpu
@pytest.mark.parametrize(
    "size, latents, topology, setting, fits",
    [
        ("gemma2_2b", 64, "v5e:4x4", Setting(16, 1, 64, "attention"), True),
        ("gemma2_9b", 16, "v5e:4x4", Setting(16, 1, 64, "attention"), False),
        ("gemma2_9b", 16, "v5e:4x4", Setting(16, 1, 64, "full"), True),
        ("gemma2_9b", 64, "v5e:4x4", Setting(4, 4, 256, "full"), True),
        ("gemma2_9b", 64, "v6e:16x16", Setting(16, 1, 2, "attention"), False),
        ("gemma2_9b", 16, "v6e:16x16", Setting(16, 1, 2, "attention"), True),
        ("gemma2_9b", 64, "v5p:4x4x4", Setting(16, 1, 4, "attention"), True),
    ],
)
def test_the_least_memory_tells_what_fits(size, latents, topology, setting, fits):
    config = gemma2_2b.get_config(size)
    config.method.num_latents = latents
    devices = dry_run.slice_of(topology)
    least_memory = search.least_memory(config, setting, devices)
    assert (least_memory <= chips.chip_of(devices[0]).memory) == fits


@needs_libtpu
def test_a_small_search(config_file, make_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "WANTED", 1)
    words = [f"--config={config_file()}", f"--workdir={tmp_path}", "--topology=v5e:2x2"]
    (row,) = search.search(make_config(), str(tmp_path), "v5e:2x2", words)
    assert json.loads((tmp_path / "search.json").read_text()) == [row]
    assert 0 < row["memory"] < row["memory_limit"] and row["seconds"] > 0
    # small weights, few rows: a copy on each chip is fastest
    assert row["mesh"] == {"data": 4, "fsdp": 1, "traces": 1, "tensor": 1}

    # The last line is flags that a job takes.
    pasted = capsys.readouterr().out.splitlines()[-1].split()
    monkeypatch.setattr(sys, "argv", ["train", words[0], *pasted])
    values = flags.FlagValues()
    command_line.parse(values, {"config": (command_line.CONFIG, "")})
    exp = experiment.read(values.config, dry_run.slice_of("v5e:2x2"))
    assert dict(planning.make(exp).batch["tokens"].sharding.mesh.shape) == row["mesh"]
