"""The command that proves a chip: in small on this CPU, and what it makes of rows that fail, end
it, or are missing.
"""

import collections
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from benchmarks import chip, chip_parts, chip_proof, common
from latent_delib.nn.attention import choice

ROOT = Path(__file__).parents[2]
ABOUT = dict(
    platform="gpu",
    device="NVIDIA L4",
    family="sm_89",
    kernels=["pallas_gpu"],
    driver="570.1",
    jax=jax.__version__,
    code=choice.code_digest(),
    plugins=[],
)
ABOUT |= dict(
    jaxlib="0.10.2",
    date="2026-11-28T00:00:00+00:00",
    xla_flags=f"--a {chip.NEEDED}",
    torch=None,
    small=False,
    peak_tflops=121.0,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    out = tmp_path / "chip.json"
    chip_parts.write(out, {"about": ABOUT, "parts": {}})
    return out


def run(file, rows, seconds=100.0):
    """Makes rows of the proof; returns them as the file has them, and which were called."""
    called = []

    def noted(name, make):
        called.append(name)
        return make()

    chip_parts.run(
        ((n, lambda n=n, m=m: noted(n, m)) for n, m in rows.items()), "proof", file, seconds
    )
    return chip_parts.read(file)["parts"]["proof"], called


def agree():
    return {"passed": True}


def disagree():
    return {"passed": False, "errors": {"out": (1.0, 1.0)}}


def break_down():
    raise jax.errors.JaxRuntimeError("INTERNAL: ptxas\nwas killed")


# -- the command


@pytest.mark.slow
def test_in_small_on_this_machine(tmp_path, cache, capfd, monkeypatch):
    """Every part; the chip in a process of its own, the others here. A second call does nothing."""
    start_process = subprocess.run

    def run_here(command, **arguments):
        if "--part=about" in command:
            return start_process(command, **arguments)
        assert command[:3] == [sys.executable, "-m", "benchmarks.chip_parts"]
        with mock.patch.object(sys, "argv", command[2:]), mock.patch.dict(os.environ):
            chip_parts.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(chip.subprocess, "run", run_here)
    out = tmp_path / "small.json"
    assert chip.main([f"--out={out}", "--minutes=60", "--small"]) == 0
    result = chip_parts.read(out)
    assert result["about"]["small"] and set(result["parts"]) == set(chip.SHARES)
    rows = chip.rows(result)
    assert all(chip.is_complete(result, part) for part in chip.SHARES)
    assert not [row for row in rows.values() if "failed" in row]
    forms = {row["form"] for row in chip.proof(result).values()}
    assert forms == {"xla", "pallas_gpu", "pallas_tpu"} and "xla, one step" in rows
    for kind in ("product", "copy", "step", "evaluation", "decoding"):
        assert chip.rows(result, kind), kind
    assert not cache.exists(), "a CPU proves nothing"
    printed = capfd.readouterr().out
    assert chip.table([result]) in printed and "all rows are there, and none failed" in printed

    monkeypatch.setattr(chip.subprocess, "run", None)  # no part is begun again
    monkeypatch.setattr(chip, "start", lambda *_: out)
    assert chip.main([f"--out={out}"]) == 0
    assert chip_parts.read(out) == result


def test_a_file_of_another_machine_is_refused(file, monkeypatch):
    now = json.dumps(ABOUT | {"driver": "580.2"})
    monkeypatch.setattr(
        chip.subprocess,
        "run",
        lambda *_, **__: SimpleNamespace(returncode=0, stdout=f"noise\n{now}"),
    )
    with pytest.raises(
        SystemExit, match="made with driver '570.1', now '580.2'; name another --out"
    ):
        chip.start(False, file)


def test_a_gpu_wants_its_flags(file, monkeypatch):
    now = json.dumps(ABOUT | {"xla_flags": "--a"})
    monkeypatch.setattr(
        chip.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=now)
    )
    with pytest.raises(SystemExit, match="expected ./launch/gpu.sh"):
        chip.start(False, file)


def test_a_process_that_crashes_is_started_again_and_one_that_hangs_is_stopped(file, monkeypatch):
    codes = iter([-11, -11, -11, 0])
    calls = []

    def fake(command, timeout, env):
        calls.append((command, timeout))
        file.write_text(file.read_text() + " ")  # it tries a row
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(chip.subprocess, "run", fake)
    chip.run("proof", file, chip.time.monotonic() + 100)
    assert len(calls) == 4 and "--part=proof" in calls[0][0]
    assert calls[0][1] == pytest.approx(50 + chip.GRACE, abs=1)

    def hangs(command, timeout, env):
        calls.append(command)
        assert chip.NEEDED not in env["XLA_FLAGS"] and "--a" in env["XLA_FLAGS"]
        raise chip.subprocess.TimeoutExpired(command, timeout)

    def gets_nowhere(command, timeout, env):
        calls.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(chip.subprocess, "run", gets_nowhere)
    chip.run("steps", file, chip.time.monotonic() + 100)
    assert len(calls) == 5, "a process that gets nowhere is the last"
    monkeypatch.setenv("XLA_FLAGS", f"--a {chip.NEEDED}")
    monkeypatch.setattr(chip.subprocess, "run", hangs)
    chip.run("use", file, chip.time.monotonic() + 100)
    assert len(calls) == 6
    chip.run("use", file, chip.time.monotonic() + 5)
    assert len(calls) == 6, "too little time to begin"


# -- rows


def test_rows_that_are_there_are_not_made_again(file):
    first, called = run(file, {"xla, a": agree, "xla, b": break_down})
    assert called == ["xla, a", "xla, b"] and first["left_out"] == []
    assert first["rows"]["xla, b"]["failed"] == "JaxRuntimeError: INTERNAL: ptxas was killed"
    again, called = run(file, {"xla, a": agree, "xla, b": agree, "xla, c": agree})
    assert called == ["xla, c"]
    assert {name: again["rows"][name] for name in first["rows"]} == first["rows"]


def test_the_next_command_makes_rows_that_failed_and_a_proof_of_other_code(file):
    run(file, {"xla, a": agree, "xla, b": break_down})
    chip.forget(file, ABOUT)
    assert not chip.is_complete(chip_parts.read(file), "proof")
    part, called = run(file, {"xla, a": agree, "xla, b": agree})
    assert called == ["xla, b"] and part["left_out"] == []
    chip.forget(file, ABOUT)
    assert chip.is_complete(chip_parts.read(file), "proof")
    chip.forget(file, ABOUT | {"code": "other"})
    assert chip_parts.read(file)["parts"]["proof"] == {"rows": {}}
    assert chip_parts.read(file)["about"]["code"] == "other"


def test_a_device_that_works_no_more_ends_the_process(file, monkeypatch):
    """Rows after a fault would fail without being wrong."""
    monkeypatch.setattr(chip_parts, "device_works", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run(file, {"xla, a": break_down, "xla, b": agree})
    assert ended.value.code == chip_parts.LOST
    assert list(chip_parts.read(file)["parts"]["proof"]["rows"]) == ["xla, a"]
    monkeypatch.undo()
    assert chip_parts.device_works()
    part, called = run(file, {"xla, a": break_down, "xla, b": agree})
    assert called == ["xla, b"] and part["left_out"] == []


def test_a_chip_that_jax_cannot_open_is_not_taken_for_a_cpu(tmp_path, monkeypatch):
    now = json.dumps(ABOUT | {"platform": "cpu", "kernels": [], "plugins": ["libtpu"]})
    monkeypatch.setattr(
        chip.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=now)
    )
    with pytest.raises(SystemExit, match="jax opens no GPU or TPU here"):
        chip.start(False, tmp_path / "chip.json")


def test_a_kernel_that_is_too_large_is_not_a_step_that_does_not_fit():
    for words, expected in {
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes": True,
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded": False,
        "Ran out of memory in memory space vmem": False,
        "Ran out of memory in memory space hbm": True,
    }.items():
        assert common.out_of_memory(RuntimeError(words)) == expected


def test_rows_that_do_not_fit_the_time_are_left_out(file):
    rows = {"xla, a": agree, "xla, b": agree}
    part, called = run(file, rows, seconds=-1.0)
    assert (
        called == []
        and part["left_out"] == list(rows)
        and not chip.is_complete(chip_parts.read(file), "proof")
    )
    assert "left out for want of time: proof: xla, a; xla, b; run" in chip.summary(
        chip_parts.read(file)
    )
    part, called = run(file, rows)
    assert called == list(rows) and part["left_out"] == []


def test_a_row_that_ends_its_process_is_tried_three_times(file):
    def ends():
        raise SystemExit  # no Exception: as if the process had died

    for tries in (1, 2, 3):
        with pytest.raises(SystemExit):
            run(file, {"pallas_gpu, a": ends})
        assert chip_parts.read(file)["parts"]["proof"]["rows"] == {
            "pallas_gpu, a": {"tries": tries}
        }
        assert not chip.is_complete(chip_parts.read(file), "proof")
    part, called = run(file, {"pallas_gpu, a": ends, "xla, a": agree})
    assert (
        called == ["xla, a"]
        and "its process ended 3 times" in part["rows"]["pallas_gpu, a"]["failed"]
    )
    assert "NOT proven" in chip.record(chip_parts.read(file))
    chip.forget(file, ABOUT)  # the next command tries it again
    assert list(chip_parts.read(file)["parts"]["proof"]["rows"]) == ["xla, a"]


@pytest.mark.parametrize(
    "room, needs, tried",
    [
        (80, {8: 50}, [8]),
        (80, {8: 100, 4: 60}, [8, 4]),
        (80, {4: 148, 1: 60}, [4, 1]),  # by proportion of what grows, 2 would not fit either
        (80, {8: None, 4: 90, 2: 60}, [8, 4, 2]),  # the compiler refuses
        (20, {8: 100}, [8]),  # what is held is too much
    ],
)
def test_the_largest_batch_that_fits(monkeypatch, room, needs, tried):
    gib = 2**30
    compiled = []

    class Job:
        a = SimpleNamespace(rounds=1, least=0.0, config=SimpleNamespace(num_layers=26))

        def compile(self, form, remat, inputs):
            compiled.append(inputs["tokens"])
            if needs[inputs["tokens"]] is None:
                raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
            size = SimpleNamespace(
                argument_size_in_bytes=27.5 * gib, temp_size_in_bytes=needs[compiled[-1]] * gib
            )
            size.temp_size_in_bytes -= size.argument_size_in_bytes
            size.output_size_in_bytes = size.alias_size_in_bytes = 0
            return SimpleNamespace(memory_analysis=lambda: size)

        def advance(self, compiled, inputs):
            return jnp.zeros(())

    monkeypatch.setattr(chip_parts.common, "room", lambda: room * gib)
    monkeypatch.setattr(chip_parts.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(chip_parts.common, "text", lambda a, batch: (batch, batch))
    monkeypatch.setattr(chip_parts, "useful", lambda *_: 1.0)
    steps = chip_parts.Steps(small=False)
    L = {8: 16, 4: 64}[tried[0]]
    steps.jobs[L] = Job()
    row = steps.row(L, "xla", "dots")
    assert compiled == tried
    assert row["batch"] == (0 if room == 20 else tried[-1]) and (row["ms"] is None) == (room == 20)


def test_models_that_do_not_fit_lose_layers(monkeypatch):
    def layers(room, trains=True):
        monkeypatch.setattr(chip_parts.common, "room", lambda: room * 2**30)
        return chip_parts.arguments(False, trains).config.num_layers

    assert [layers(room) for room in (75, 38, 15, 1)] == [26, 13, 6, 1]
    assert layers(15, trains=False) == 26


def test_without_torch_the_peer_is_skipped(monkeypatch):
    monkeypatch.setattr(chip_parts.common, "has_torch", lambda: False)
    found = [make() for _, make in chip_parts.peer(small=False)]
    assert [row["skipped"] for row in found] == ["torch is not installed"] * 2


# -- the proof


def test_a_form_that_is_wrong_does_not_agree(monkeypatch):
    layout = chip_proof.SMALL["traces"]
    right = chip_proof.passes

    def wrong(form, softcap, memory):
        return right(form, softcap, memory) if form == "reference" else right("xla", 0.0, memory)

    monkeypatch.setattr(chip_proof, "passes", wrong)
    row = chip_proof.compare("pallas_gpu", "float32", 16, layout)
    assert not row["passed"] and row["errors"]["out"][0] > 1e-3


def test_errors_that_are_no_numbers_do_not_agree(monkeypatch):
    assert not chip_proof.within(
        {"out": chip_proof.errors(jnp.array([1.0, jnp.nan]), jnp.ones(2))}, (1.0, 1.0)
    )
    nothing = jnp.full(3, jnp.nan)
    monkeypatch.setattr(chip_proof, "passes", lambda *_: lambda *_: (nothing, (nothing,) * 3))
    assert not chip_proof.compare("xla", "float32", 16, chip_proof.SMALL["traces"])["passed"]
    assert chip_proof.errors(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])) == pytest.approx(
        (0.5**0.5, 1.0)
    )


def test_every_row_of_the_proof_has_a_name_of_its_own():
    names = [name for name, _ in chip_proof.rows(small=False)]
    assert len(names) == len(set(names))
    assert "pallas_gpu, bfloat16, head dim 256, traces" in names
    assert "pallas_tpu, float32, head dim 64, text, high softcap" in names
    assert not [name for name in names if "pallas_tpu" in name and "head dim 32" in name]


KERNEL = {"pallas_gpu, a": agree, "pallas_gpu, one step": agree}


def test_a_proven_kernel_is_what_auto_takes(file, monkeypatch):
    """The record of the run, read where a job chooses."""
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(choice, "_failure", lambda *_: None)
    run(file, KERNEL | {"xla, a": disagree})
    assert "pallas_gpu on sm_89: proven; `auto` takes it" in chip.record(chip_parts.read(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice.choose("auto", device, None, jnp.bfloat16) == "pallas_gpu"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "code_digest", lambda: "other")
        assert not choice.is_proven("pallas_gpu", device), "the kernels have changed since"
    assert chip.disagreeing(chip_parts.read(file)) == ["xla, a"]


@pytest.mark.parametrize("wrong", [disagree, break_down])
def test_a_failing_kernel_is_reported_and_not_proven(file, wrong):
    choice.record_proof("pallas_gpu", "sm_89", {"jax": jax.__version__})  # of an earlier run
    run(file, KERNEL | {"pallas_gpu, b": wrong, "xla, a": agree})
    result = chip_parts.read(file)
    line = chip.record(result)
    assert "pallas_gpu on sm_89: NOT proven, 1 rows failed: pallas_gpu, b" in line
    assert not choice._records()["pallas_gpu"]
    assert "pallas_gpu, b" in chip.summary(result) and "not proven" in chip.table([result])


def test_a_kernel_with_missing_rows_is_not_proven(file):
    assert not chip.is_proven(chip_parts.read(file), "pallas_gpu")
    run(file, KERNEL, seconds=-1.0)
    assert "not proven yet, rows are missing" in chip.record(chip_parts.read(file))
    assert not choice._records()


def test_nothing_is_recorded_in_small(file):
    run(file, KERNEL)
    result = chip_parts.read(file)
    result["about"]["small"] = True
    assert "nothing to record" in chip.record(result) and not choice._records()


# -- the table


def test_a_row_of_the_table(file):
    run(file, KERNEL)
    result = chip_parts.read(file)
    step = dict(kind="step", latents=64, remat="attention", layers=26, needs_gib=50.0, seconds=1.0)
    result["parts"]["steps"] = {
        "rows": {
            "product a": dict(kind="product", tflops=100.0, seconds=1.0),
            "copy": dict(kind="copy", gb_per_second=300.0, seconds=1.0),
            "a": step | dict(form="pallas_gpu", batch=4, ms=2000.0, tflop=100.0),
            "b": step | dict(form="dense", batch=1, ms=2500.0, tflop=25.0),
            "c": step | dict(form="pallas_gpu", remat="none", batch=0, ms=None),
            "d": dict(failed="ValueError: x", seconds=1.0),
        },
        "left_out": [],
    }
    row = chip.table([result]).splitlines()[2]
    assert "| NVIDIA L4 (sm_89) | 570.1 |" in row and "| pallas_gpu, proven | 2 of 2 |" in row
    assert "| 2.00/s, MFU 41.3% / 50.0%, 5.0 x dense, pallas_gpu, B 4, attention, 50 GiB |" in row
    columns = [line.count("|") for line in chip.table([result]).splitlines()]
    assert len(set(columns)) == 1


def test_the_page_has_the_table_of_the_stored_results():
    """And `auto` goes by the same."""
    results = chip.stored(ROOT / "docs/results/chip")
    assert chip.table(results) in (ROOT / "docs/performance.md").read_text()
    proven = collections.defaultdict(set)
    for result in results:
        kernels = [k for k in result["about"]["kernels"] if chip.is_proven(result, k)]
        assert kernels, result["about"]["device"]
        for kernel in kernels:
            proven[kernel].add(result["about"]["family"])
    assert {kernel: set(families) for kernel, families in choice.PROVEN.items()} == proven
