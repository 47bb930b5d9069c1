"""Evaluation as a job: killed and continued bit for bit, over many checkpoints, beside a training."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

import latent_delib as ld
from latent_delib import evaluate
from latent_delib.job import experiment
from latent_delib.measure import perplexity
from tests.fake_gcs import running
from tests.processes import Job


class Killed(Exception):
    pass


@pytest.fixture
def calls(monkeypatch):
    """Counts what is loaded and run; `calls["die"] = n` lets the n-th reading of a batch from now on fail."""
    calls = {"read": 0, "text": 0, "decoder": 0, "jit": 0, "die": 0}
    jit_steps, read_text, load_decoder = perplexity.jit_steps, perplexity.read_text, experiment.place_decoder

    def counted(name, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    def counting(exp):
        calls["jit"] += 1
        steps = jit_steps(exp)

        def read(*arguments):
            calls["read"] += 1
            calls["die"] -= 1
            if calls["die"] == 0:
                raise Killed
            return steps.read(*arguments)

        return steps._replace(read=read)

    monkeypatch.setattr(perplexity, "jit_steps", counting)
    monkeypatch.setattr(perplexity, "read_text", counted("text", read_text))
    monkeypatch.setattr(experiment, "place_decoder", counted("decoder", load_decoder))
    monkeypatch.setattr(evaluate, "SAVE_EVERY", 0.0)
    return calls


@pytest.fixture(scope="module")
def alone(make_config, trained, tmp_path_factory):
    """Step -> the folder of its evaluation, one checkpoint a job."""
    out = {step: tmp_path_factory.mktemp("alone") for step in (2, 4)}
    for step, folder in out.items():
        evaluate.evaluate(make_config(), str(trained), str(folder), step)
    return out


def assert_same(folder, expected):
    """The same bits, and nothing left over."""
    with np.load(folder / "documents.npz") as one, np.load(expected / "documents.npz") as other:
        for name in (*perplexity.Sums._fields, "source", "sources", "work", "works"):
            np.testing.assert_array_equal(one[name], other[name])
    found, known = (json.loads((where / "perplexity.json").read_text()) for where in (folder, expected))
    for key in ("rows", "sets", "step", "pieces", "documents", "fingerprint"):
        assert found[key] == known[key]
    assert {path.name for path in folder.iterdir()} >= {"documents.npz", "perplexity.json", "perplexity.png"}
    assert not [path for path in folder.iterdir() if "partial" in path.name or path.name.endswith(".tmp")]


def test_how_it_was_trained_is_told_by_the_checkpoint(make_config, trained, tmp_path):
    """Not by the config of the evaluation, which may be another in what evaluating takes no notice of."""
    other = {"seed": 7, "method.num_ahead": 2, "method.max_delay": 1, "evaluate.positions": 4}
    result = evaluate.evaluate(make_config(other), str(trained), str(tmp_path))["config"]
    assert (result["seed"], result["method"]["num_ahead"], result["method"]["max_delay"]) == (0, 3, 0)
    assert result["evaluate"]["positions"] == 4


def test_evaluated_checkpoints_may_be_removed(make_config, trained, alone, tmp_path):
    """All are evaluated, so nothing is left to do; without evaluations it is a workdir that was not trained."""
    for step, folder in alone.items():
        shutil.copytree(folder, tmp_path / "evaluations" / str(step))
    evaluate.evaluate_many(make_config(), str(tmp_path), str(tmp_path))
    with pytest.raises(ld.UserError, match="holds no checkpoints; train it first"):
        evaluate.evaluate_many(make_config(), str(tmp_path), str(tmp_path / "other"))


def test_killed_and_continued(make_config, trained, alone, calls, tmp_path, capsys):
    config, out = make_config(), tmp_path / "out"
    batches = -(-len(perplexity.read_text(experiment.read(config)).pieces) // config.evaluate.batch_size)
    assert batches >= 3
    for _ in range(2):  # each time one batch more is done, and saved
        calls["die"] = 2
        with pytest.raises(Killed):
            evaluate.evaluate(config, str(trained), str(out), 4)
    with np.load(out / "partial.npz") as partial:
        assert partial["done"] == 2 * config.evaluate.batch_size
    calls["read"] = 0
    evaluate.evaluate(config, str(trained), str(out), 4)
    assert calls["read"] == batches - 2
    assert_same(out, alone[4])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("what", ["config", "checkpoint", "damaged"])
def test_partial_sums_of_something_else_are_not_used(make_config, trained, alone, calls, tmp_path, capsys, what):
    changes = {"optimizer.clip_norm": 2.0} if what == "config" else {}
    calls["die"] = 3
    with pytest.raises(Killed):
        evaluate.evaluate(make_config(changes), str(trained), str(tmp_path), 2 if what == "checkpoint" else 4)
    partial = tmp_path / "partial.npz"
    if what == "damaged":
        partial.write_bytes(partial.read_bytes()[:-100])
    evaluate.evaluate(make_config(), str(trained), str(tmp_path), 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {partial} is ") and line.endswith("the evaluation begins anew")
    assert ("of another config, checkpoint, decoder, text or mesh" in line) == (what != "damaged")
    assert_same(tmp_path, alone[4])


def test_many_checkpoints(make_config, trained, alone, calls, tmp_path):
    """One text, one decoder, one compilation; each as by itself; only those that are missing are made."""
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path), [4])
    evaluations = tmp_path / "evaluations"
    assert sorted(p.name for p in evaluations.iterdir()) == ["4", "curves.png"]
    shutil.rmtree(evaluations / "4")
    calls.update(text=0, decoder=0, jit=0)
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    assert (calls["text"], calls["decoder"], calls["jit"]) == (1, 1, 1)
    for step, expected in alone.items():
        assert_same(evaluations / str(step), expected)
    assert (evaluations / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")

    written = (evaluations / "4" / "perplexity.json").stat().st_mtime_ns
    shutil.rmtree(evaluations / "2")
    calls.update(read=0, text=0, decoder=0)
    calls["die"] = 3
    with pytest.raises(Killed):
        evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    assert_same(evaluations / "2", alone[2])
    calls.update(read=0, text=0, decoder=0)
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path), [2, 4])
    assert (calls["read"], calls["text"], calls["decoder"]) == (0, 0, 0)
    assert (evaluations / "4" / "perplexity.json").stat().st_mtime_ns == written

    file = evaluations / "2" / "perplexity.json"
    shutil.rmtree(evaluations / "4")
    file.write_text(file.read_text().replace((known := json.loads(file.read_text())["text"]), known[::-1]))
    with pytest.raises(ld.UserError, match=r"2/perplexity.json: is of another text"):
        evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    assert not (evaluations / "4").exists()
    file.write_text(file.read_text().replace(known[::-1], known))
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))

    positions = {"evaluate.max_positions": 3}
    for step in (2, 4):
        file = evaluations / str(step) / "perplexity.json"
        old = json.loads(file.read_text())
        old["config"]["evaluate"] |= {"max_positions": 3}
        file.with_name("kept").write_text(file.read_text())
        file.write_text(json.dumps({key: value for key, value in old.items() if key != "draws"}))
    with pytest.raises(
        ld.UserError, match=r"perplexity.json: an older version drew its positions and donors in another"
    ):
        evaluate.evaluate_many(make_config(positions), str(trained), str(tmp_path))
    for step in (2, 4):
        (evaluations / str(step) / "kept").rename(evaluations / str(step) / "perplexity.json")

    with pytest.raises(ld.UserError, match=r"perplexity.json: has config.evaluate.max_pieces=0, this config 3; give"):
        evaluate.evaluate_many(make_config({"evaluate.max_pieces": 3}), str(trained), str(tmp_path))
    shutil.rmtree(tmp_path / "evaluations/4")  # what is asked for is not there, but what would share a curve with it
    with pytest.raises(ld.UserError, match="evaluations/2"):
        evaluate.evaluate_many(make_config({"evaluate.max_pieces": 3}), str(trained), str(tmp_path), [4])


def test_what_cannot_be_read_does_not_stop_the_others(make_config, trained, alone, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "1")
    (workdir / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp-7").mkdir()
    load = evaluate.load

    def removed(exp, workdir, step):
        if step == 2:
            shutil.rmtree(f"{workdir}/checkpoints/2")
        return load(exp, workdir, step)

    monkeypatch.setattr(evaluate, "load", removed)
    with pytest.raises(ld.UserError, match=r"checkpoints \[1\] could not be read; the same command tries again"):
        evaluate.evaluate_many(make_config(), str(workdir), str(workdir))
    damaged, gone = capsys.readouterr().err.splitlines()
    assert damaged.startswith("warning: checkpoint 1 is not evaluated: ") and "is damaged (meta: " in damaged
    assert gone == f"warning: {workdir}: checkpoint 2 was removed before it was read; skipped"
    assert_same(workdir / "evaluations" / "4", alone[4])
    with pytest.raises(ld.UserError, match=r"--steps: no checkpoint of step 2; there are \[1, 4\]"):
        evaluate.evaluate_many(make_config(), str(workdir), str(workdir), [2, 4])


def test_beside_a_training(make_config, trained, alone, tmp_path, capsys, monkeypatch):
    """Nothing there, then two checkpoints of which one goes before its turn, then the last."""
    (workdir := tmp_path / "workdir").mkdir()
    moments = iter(((2, 3), (4,)))
    there = {2: trained / "checkpoints" / "2", 3: trained / "checkpoints" / "2", 4: trained / "checkpoints" / "4"}

    def train(_):
        for step in next(moments):
            shutil.copytree(there[step], workdir / "checkpoints" / str(step))

    run = evaluate.Job.run

    def run_while_training_goes_on(*arguments):
        shutil.rmtree(workdir / "checkpoints" / "3", ignore_errors=True)
        return run(*arguments)

    monkeypatch.setattr(evaluate, "time", SimpleNamespace(sleep=train, monotonic=time.monotonic))
    monkeypatch.setattr(evaluate.Job, "run", run_while_training_goes_on)
    evaluate.evaluate_many(make_config(), str(workdir), str(tmp_path / "out"), patience=3600.0)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "step 4 was the last" and next(moments, None) is None
    assert said.err == f"warning: {workdir}: checkpoint 3 was removed before its turn; skipped\n"
    for step, expected in alone.items():
        assert_same(tmp_path / "out" / "evaluations" / str(step), expected)
    evaluate.evaluate_many(make_config(), str(workdir), str(tmp_path / "out"), patience=3600.0)  # all is done
    assert capsys.readouterr().out == "step 4 was the last\n"


def test_a_training_that_died_or_is_another(make_config, trained, tmp_path, capsys):
    with pytest.raises(ld.UserError, match="--watch: --workdir=.*none: no such folder; start the training first"):
        evaluate.evaluate_many(make_config(), str(tmp_path / "none"), str(tmp_path / "out"), patience=86400.0)
    (begun := tmp_path / "begun").mkdir()
    since = time.monotonic()
    with pytest.raises(ld.UserError, match="--watch: no checkpoint came to .*begun in 0.5 s, so nothing was evaluated"):
        evaluate.evaluate_many(make_config(), str(begun), str(tmp_path / "out"), patience=0.5)
    assert time.monotonic() - since < evaluate.POLL / 2
    assert list(tmp_path.iterdir()) == [begun]
    with pytest.raises(ld.UserError, match="trained with method.num_latents=2, this config has method.num_latents=3"):
        evaluate.evaluate_many(make_config({"method.num_latents": 3}), str(trained), str(tmp_path), patience=3600.0)
    with pytest.raises(ld.UserError, match="holds no checkpoints"):
        evaluate.evaluate_many(make_config(), str(tmp_path / "none"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"steps": "2,x"}, "--steps=2,x: expected all, or numbers with commas between"),
        ({"steps": "all", "watch": True}, "expected one of them"),
        ({"steps": "all", "step": 2}, "expected one of them"),
        ({"watch": True, "patience": -1.0}, "--patience=-1.0: expected at least 0"),
        ({"out": __file__}, "test_evaluate_job.py: is a file, expected a folder"),
    ],
)
def test_flags(flags, message):
    with pytest.raises(ld.UserError, match=message):
        given = {"config": None, "workdir": "", "out": "", "step": None, "steps": "", "watch": False, "patience": 1.0}
        evaluate.main(SimpleNamespace(**given | flags))


# The command, but partial sums are saved after every batch.
CHILD = """
from latent_delib import commands, distributed, evaluate
evaluate.SAVE_EVERY = 0.0
commands.run(evaluate.main, "", config=(commands.CONFIG, ""), workdir=(commands.REQUIRED, ""), out=("", ""),
    step=(None, ""), steps=("", ""), watch=(False, ""), patience=(60.0, ""), **distributed.FLAGS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_real_kill(config_file, trained, alone, tmp_path, count):
    """SIGKILL while partial sums are written, of one process and of one of two; the same command ends with the bits
    of an undisturbed run."""
    config, devices = config_file({"evaluate.positions": 4}), 8 // count
    command = ("-c", CHILD, f"--config={config}", f"--workdir={trained}", "--watch")
    with Job(count, devices, tmp_path / "whole", *command, f"--out={tmp_path / 'undisturbed'}") as job:
        assert job.wait() == [0] * count, job.said(0)
    out = tmp_path / "out" / "evaluations"
    for step in (2, 4):
        with Job(count, devices, tmp_path / f"killed {step}", *command, f"--out={tmp_path / 'out'}") as job:
            while not (out / str(step) / "partial.npz").exists():
                assert all(process.poll() is None for process in job.processes), job.said(0)
                time.sleep(0.001)
            job.processes[-1].send_signal(signal.SIGKILL)
            assert -signal.SIGKILL in job.wait()
        assert not (out / str(step) / "perplexity.json").exists()
    with Job(count, devices, tmp_path / "continued", *command, f"--out={tmp_path / 'out'}") as job:
        assert job.wait() == [0] * count, job.said(0)
        assert "step 4 was the last" in job.said(0) and "step 4 was the last" not in job.said(count - 1) * (count - 1)
    for step in (2, 4):
        assert_same(out / str(step), tmp_path / "undisturbed" / "evaluations" / str(step))


@pytest.mark.slow
def test_on_gs(config_file, tmp_path):
    """The workdir in a bucket: what is whole there is found, and results lie beside it."""
    pytest.importorskip("google.cloud.storage")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the server's certificate")
    config, workdir = config_file(), "gs://bucket/some/run"
    with running(tmp_path) as server:
        for command in (("train",), ("evaluate", "--steps=2"), ("evaluate", "--watch")):
            module = (f"latent_delib.{command[0]}", f"--config={config}", f"--workdir={workdir}", *command[1:])
            with Job(1, 8, tmp_path / command[-1], "-m", *module, **server.environment) as job:
                assert job.wait() == [0], job.said(0)
        assert job.said(0).splitlines()[-1] == "step 4 was the last"
        prefix = "bucket/some/run/evaluations/"
        files = {name.removeprefix(prefix) for name in server.objects if name.startswith(prefix) and name[-1] != "/"}
    each = ("documents.npz", "perplexity.json", "perplexity.png")
    assert files == {"curves.png", *(f"{step}/{name}" for step in (2, 4) for name in each)}
