"""Evaluation as a job: killed and continued bit for bit, over many checkpoints."""

import json
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import evaluate
from latent_delib.job import experiment
from latent_delib.machine import saved_steps
from latent_delib.measure import evaluations, perplexity
from tests.fake_gcs import running
from tests.processes import Job
from tests.run_command import run_command


class Killed(Exception):
    pass


class Batches:
    """Counts the batches that are added up.

    kill_after: the job ends once so many more are added up and saved. meanwhile: called before each
    is added up.
    """

    def __init__(self):
        self.done = 0
        self.kill_after = None
        self.meanwhile = lambda: None
        self.add_up = perplexity.add_up

    def __call__(self, *arguments):
        if self.kill_after == 0:
            self.kill_after = None
            raise Killed
        if self.kill_after is not None:
            self.kill_after -= 1
        self.meanwhile()
        self.add_up(*arguments)
        self.done += 1


@pytest.fixture
def batches(monkeypatch):
    batches = Batches()
    monkeypatch.setattr(perplexity, "add_up", batches)
    monkeypatch.setattr(evaluate, "SAVE_EVERY", 0.0)
    return batches


@pytest.fixture(scope="module")
def alone(make_config, trained, tmp_path_factory):
    """Step -> the folder of its evaluation, one checkpoint a job."""
    out = {step: tmp_path_factory.mktemp("alone") for step in (2, 4)}
    for step, folder in out.items():
        evaluate.evaluate(make_config(), str(trained), str(folder), step)
    return out


@pytest.fixture
def evaluated(alone, tmp_path):
    """An OUT in which steps 2 and 4 are evaluated."""
    for step, folder in alone.items():
        shutil.copytree(folder, tmp_path / "evaluated" / "evaluations" / str(step))
    return tmp_path / "evaluated"


def change(file, changes):
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_same(folder, expected):
    """The same bits, and nothing left over."""
    with np.load(folder / "documents.npz") as one, np.load(expected / "documents.npz") as other:
        for name in (*perplexity.Sums._fields, "source", "sources", "work", "works"):
            np.testing.assert_array_equal(one[name], other[name])
    found, known = (
        json.loads((where / "perplexity.json").read_text()) for where in (folder, expected)
    )
    for key in ("rows", "sets", "step", "pieces", "documents", "fingerprint"):
        assert found[key] == known[key]
    assert sorted(path.name for path in folder.iterdir()) == [
        "documents.npz",
        "perplexity.json",
        "perplexity.png",
    ]


def test_how_it_was_trained_is_told_by_the_checkpoint(make_config, trained, tmp_path):
    """Not by the config of the evaluation, which may differ in what evaluating leaves unread."""
    other = {"seed": 7, "method.num_ahead": 2, "method.max_delay": 1, "optimizer.clip_norm": 2.0}
    other |= {"data.seq_len": 64, "data.token_files": ""}
    result = evaluate.evaluate(make_config(other), str(trained), str(tmp_path))["config"]
    assert result["data"]["seq_len"] == 32
    assert (result["seed"], result["method"]["num_ahead"], result["method"]["max_delay"]) == (
        0,
        3,
        0,
    )
    assert result["optimizer"]["clip_norm"] == 1.0


def test_a_workdir_is_enough(trained, alone, tmp_path):
    out = tmp_path / "out"
    assert run_command("evaluate", workdir=trained, out=out) == ""
    assert_same(out, alone[4])
    fewer = {"config.evaluate.max_pieces": 2}
    assert run_command("evaluate", workdir=trained, out=tmp_path / "few", step=2, **fewer) == ""
    result = json.loads((tmp_path / "few" / "perplexity.json").read_text())
    assert (result["step"], result["pieces"]) == (2, 2)


def test_the_config_of_a_training(make_config, trained, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)

    def read(step=None, watch=False):
        flags = SimpleNamespace(workdir=str(workdir), step=step, watch=watch)
        return evaluate.config_of_training(flags)

    expected = make_config().to_dict()
    assert read(watch=True).to_dict() == expected
    assert read().to_dict() == read(2).to_dict() == expected
    newest = workdir / "checkpoints/4/meta/metadata"
    newest.write_text("{")
    assert read().to_dict() == expected  # of the checkpoint before
    with pytest.raises(ld.UserError, match="no checkpoint of step 4 .* give a --config"):
        read(4)
    with pytest.raises(ld.UserError, match=r"no checkpoint of step 3; there are \[2, 4\]"):
        read(3)
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ld.UserError, match="--watch: .* no checkpoint yet .* give the training's"):
        read(watch=True)
    with pytest.raises(ld.UserError, match="holds no checkpoints; run train first; .* a --config"):
        read()


def test_evaluated_checkpoints_may_be_removed(make_config, evaluated, tmp_path):
    """All are evaluated, so nothing is left to do; or the workdir was never trained."""
    evaluate.evaluate_many(make_config(), str(evaluated), str(evaluated))
    with pytest.raises(ld.UserError, match="holds no checkpoints"):
        evaluate.evaluate_many(make_config(), str(evaluated), str(tmp_path / "other"))


def test_killed_and_continued(make_config, trained, alone, batches, tmp_path, capsys):
    """Also what another evaluation left in its place, or is damaged: it is told of, not used."""
    config, out = make_config(), tmp_path / "out"
    for _ in range(2):  # each time one batch more is done, and saved
        batches.kill_after = 1
        with pytest.raises(Killed):
            evaluate.evaluate(config, str(trained), str(out), 4)
    with np.load(out / "partial.npz") as partial:
        assert partial["done"] == 2 * config.evaluate.batch_size
    content = (out / "partial.npz").read_bytes()
    batches.done = 0
    pieces = evaluate.evaluate(config, str(trained), str(out), 4)["pieces"]
    assert batches.done == -(-pieces // config.evaluate.batch_size) - 2 > 0
    assert_same(out, alone[4])
    assert "warning" not in capsys.readouterr().err

    others = {
        "another checkpoint": (content, {}, 2, "of another config, checkpoint"),
        "another config": (
            content,
            {"optimizer.clip_norm": 2.0},
            4,
            "of another config, checkpoint",
        ),
        "damaged": (content[:-100], {}, 4, "damaged"),
    }
    for name, (found, changes, step, problem) in others.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "partial.npz").write_bytes(found)
        evaluate.evaluate(make_config(changes), str(trained), str(folder), step)
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line.startswith(f"warning: {folder / 'partial.npz'} is {problem}")
            and "starts from the beginning" in line
        )
        assert_same(folder, alone[step])


def test_partial_sums_are_of_one_decoder_one_text_and_one_mesh(
    make_config, make_decoder, monkeypatch, tmp_path
):
    """Behind the same paths there may be others when an evaluation goes on."""
    decoder, text = tmp_path / "decoder", tmp_path / "text.txt"
    shutil.copytree(make_decoder(1), decoder)
    text.write_text("the cat sat on a mat\n")
    changes = {"decoder.path": str(decoder), "data.validation": (f"files:{text}",)}
    config = make_config(changes | {"data.token_files": ""})

    def identity():
        return json.dumps(evaluate.Job(config, str(tmp_path), []).identity(None))

    found = [identity(), identity()]
    assert found[0] == found[1]
    text.write_text("the cat sat on a hat\n")
    found.append(identity())
    shutil.rmtree(decoder)
    shutil.copytree(make_decoder(8), decoder)
    found.append(identity())
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: four)
    found.append(identity())
    assert len(set(found)) == 4


def test_many_checkpoints(make_config, trained, alone, batches, tmp_path):
    """Each as by itself; killed, the job goes on where it was."""
    folder = tmp_path / "evaluations"
    batches.kill_after = 2
    with pytest.raises(Killed):
        evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    assert (folder / "2" / "partial.npz").exists()
    evaluate.evaluate_many(make_config(), str(trained), str(tmp_path))
    for step, expected in alone.items():
        assert_same(folder / str(step), expected)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_another_training_with_the_same_settings_is_refused(
    make_config, trained, evaluated, monkeypatch
):
    """Other text gives other weights; the step's evaluation would pass for theirs."""
    read = saved_steps.read_meta

    def of_other_text(*where):
        meta = read(*where)
        return meta | {"data": meta["data"] | {"fingerprint": {"tokenizer": "another"}}}

    monkeypatch.setattr(saved_steps, "read_meta", of_other_text)
    with pytest.raises(ld.UserError, match="2/perplexity.json: is of another training; give anot"):
        evaluate.evaluate_many(make_config(), str(trained), str(evaluated), [2])


def test_only_missing_ones_are_made(make_config, trained, alone, evaluated, batches):
    folder = evaluated / "evaluations"
    written = (folder / "2" / "perplexity.json").stat().st_mtime_ns
    evaluate.evaluate_many(make_config(), str(trained), str(evaluated), [2, 4])
    assert batches.done == 0
    shutil.rmtree(folder / "4")
    evaluate.evaluate_many(make_config(), str(trained), str(evaluated), [4])
    assert_same(folder / "4", alone[4])
    assert (folder / "2" / "perplexity.json").stat().st_mtime_ns == written


def test_one_curve_shows_one_thing(make_config, trained, evaluated):
    """What is already evaluated must be of the same config, text and draws as what is asked for."""

    def refused(message, changes, steps=None):
        with pytest.raises(ld.UserError, match=message):
            evaluate.evaluate_many(make_config(changes), str(trained), str(evaluated), steps)

    folder = evaluated / "evaluations"
    refused("max_pieces is 0", {"evaluate.max_pieces": 3})
    # what is asked for is not there, but what would share a curve with it
    shutil.rmtree(folder / "4")
    refused("max_pieces is 0", {"evaluate.max_pieces": 3}, [4])

    file = folder / "2" / "perplexity.json"
    text = json.loads(file.read_text())["text"]
    change(file, {"text": text[::-1]})
    refused("on other text of the same name", {})
    assert not (folder / "4").exists()

    config = json.loads(file.read_text())["config"]
    config["evaluate"]["max_positions"] = 3
    # as older versions wrote it
    change(file, {"text": text, "config": config, "draws": None, "step": None})
    refused("random positions .scheme 1", {"evaluate.max_positions": 3})

    config["method"]["prompt_end"] = "Answer:"  # all ends of prompts are used: nothing is drawn
    change(file, {"text": text, "config": config, "draws": None, "step": None})
    at_prompts = {"evaluate.max_positions": 3, "method.prompt_end": "Answer:"}
    evaluations.require_same(folder, experiment.read(make_config(at_prompts)).record)


def test_evaluations_of_another_training_are_refused(make_config, trained, evaluated):
    file = evaluated / "evaluations" / "2" / "perplexity.json"
    config = json.loads(file.read_text())["config"]
    config["optimizer"]["learning_rate"] = 0.25
    change(file, {"config": config})
    shutil.rmtree(evaluated / "evaluations" / "4")
    message = "2/perplexity.json: optimizer.learning_rate is 0.25 there, .* give another --out"
    with pytest.raises(ld.UserError, match=message):
        evaluate.evaluate_many(make_config(), str(trained), str(evaluated), [4])
    assert not (evaluated / "evaluations" / "4").exists()


def test_an_evaluated_checkpoint_that_is_damaged_since_is_not_in_the_way(
    make_config, trained, alone, evaluated, tmp_path
):
    shutil.copytree(trained, tmp_path / "workdir")
    (tmp_path / "workdir" / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    shutil.rmtree(evaluated / "evaluations" / "4")
    evaluate.evaluate_many(make_config(), str(tmp_path / "workdir"), str(evaluated), [4])
    found = json.loads((evaluated / "evaluations" / "4" / "perplexity.json").read_text())
    assert found["step"] == 4


def test_an_interrupted_evaluation_leaves_no_sign_of_completion(
    make_config, trained, evaluated, monkeypatch
):
    """Its documents.npz is new already, and the old perplexity.json does not belong to it."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "draw", stop)
    out = evaluated / "evaluations" / "4"
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(make_config({"evaluate.swap": True}), str(trained), str(out))
    assert (out / "documents.npz").exists() and not (out / "perplexity.json").exists()


def test_what_cannot_be_read_does_not_stop_the_others(
    make_config, trained, alone, batches, tmp_path, capsys
):
    """Checkpoint 1 is damaged, and 3 is removed while 2 is evaluated."""
    workdir, checkpoints = tmp_path / "workdir", tmp_path / "workdir" / "checkpoints"
    shutil.copytree(trained, workdir)
    for step in ("1", "3"):
        shutil.copytree(checkpoints / "2", checkpoints / step)
    (checkpoints / "1" / "meta" / "metadata").write_text("{")
    (checkpoints / "5.orbax-checkpoint-tmp-7").mkdir()
    batches.meanwhile = lambda: shutil.rmtree(checkpoints / "3", ignore_errors=True)
    with pytest.raises(ld.UserError, match=r"checkpoints \[1\]"):
        evaluate.evaluate_many(make_config(), str(workdir), str(workdir))
    damaged, gone = capsys.readouterr().err.splitlines()
    assert damaged.startswith("warning: checkpoint 1 is not evaluated: ") and "damaged" in damaged
    assert (
        gone.startswith("warning: checkpoint 3 is not evaluated: ")
        and "no checkpoint of step 3" in gone
    )
    for step, expected in alone.items():
        assert_same(workdir / "evaluations" / str(step), expected)
    with pytest.raises(ld.UserError, match=r"--steps: .* step 3; there are \[1, 2, 4\]"):
        evaluate.evaluate_many(make_config(), str(workdir), str(workdir), [3, 4])


def test_beside_a_training(trained, alone, tmp_path, capsys):
    """Each checkpoint once, as it comes, until the training's last is evaluated."""
    workdir, folder = tmp_path / "workdir", tmp_path / "evaluations"

    def save(step):
        shutil.copytree(trained / "checkpoints" / "2", workdir / "checkpoints" / str(step))

    save(2)
    steps = evaluations.steps_to_evaluate(str(workdir), folder, None, patience=3600.0)
    assert next(steps) == 2
    shutil.copytree(alone[2], folder / "2")
    save(3)
    assert next(steps) == 3  # which the caller cannot read
    save(4)
    assert next(steps) == 4
    shutil.copytree(alone[4], folder / "4")
    assert list(steps) == []
    assert capsys.readouterr().out == "step 4 was the last\n"
    assert list(evaluations.steps_to_evaluate(str(workdir), folder, None, patience=0.0)) == [3]


def test_beside_a_finished_training_that_goes_on(trained, evaluated, capsys):
    """No file says so before its next checkpoint, so the user is told."""
    folder = evaluated / "evaluations"
    assert list(evaluations.steps_to_evaluate(str(trained), folder, None, patience=3600.0)) == []
    said = capsys.readouterr().out
    assert (
        said.startswith("step 4 was the last; ") and "start this again after a checkpoint" in said
    )


def test_a_training_that_died_or_is_another(make_config, trained, evaluated, tmp_path, capsys):
    with pytest.raises(ld.UserError, match="--watch: .*none: no such folder"):
        evaluate.evaluate_many(
            make_config(), str(tmp_path / "none"), str(tmp_path / "out"), patience=86400.0
        )
    (begun := tmp_path / "begun").mkdir()
    since = time.monotonic()
    with pytest.raises(ld.UserError, match="begun in 0.5 s"):
        evaluate.evaluate_many(make_config(), str(begun), str(tmp_path / "out"), patience=0.5)
    assert time.monotonic() - since < evaluations.POLL / 2
    shutil.rmtree(evaluated / "evaluations" / "4")
    shutil.copytree(trained / "checkpoints" / "2", begun / "checkpoints" / "2")
    evaluate.evaluate_many(make_config(), str(begun), str(evaluated), patience=0.0)
    made, waited = capsys.readouterr().out.splitlines()
    assert made.endswith("evaluations of steps [2]: they are not made again")
    assert waited == "no new checkpoint for 0 s"
    with pytest.raises(ld.UserError, match="method.num_latents is 2"):
        evaluate.evaluate_many(
            make_config({"method.num_latents": 3}), str(trained), str(tmp_path), patience=3600.0
        )
    with pytest.raises(ld.UserError, match="holds no checkpoints"):
        evaluate.evaluate_many(make_config(), str(tmp_path / "none"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"steps": "2,x"}, "--steps=2,x"),
        ({"steps": "all", "watch": True}, "--step, --steps, --watch"),
        ({"steps": "all", "step": 2}, "--step, --steps, --watch"),
        ({"watch": True, "patience": -1.0}, "--patience=-1.0"),
        ({"patience": 1.0}, "--patience=1.0: needs --watch"),
        ({"workdir": "packaged"}, "name an --out"),
        ({"workdir": "packaged", "out": "out", "watch": True}, "packaged: .* of one step"),
        ({"workdir": "packaged", "out": "out", "steps": "all"}, "packaged: .* of one step"),
    ],
)
def test_flags(flags, message):
    with pytest.raises(ld.UserError, match=message):
        given = {
            "config": None,
            "workdir": "",
            "out": "",
            "step": None,
            "steps": "",
            "watch": False,
            "patience": evaluate.PATIENCE,
        }
        evaluate.main(SimpleNamespace(**given | flags))


# The command, but partial sums are saved after every batch.
CHILD = """
from latent_delib import evaluate
from latent_delib.machine import commands, distributed
from latent_delib.machine.command_line import CONFIG, REQUIRED
evaluate.SAVE_EVERY = 0.0
commands.run(evaluate.main, "", config=(CONFIG, ""), workdir=(REQUIRED, ""), out=("", ""),
    step=(None, ""), steps=("", ""), watch=(False, ""), patience=(evaluate.PATIENCE, ""),
    **distributed.FLAGS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_real_kill(config_file, trained, tmp_path, count):
    """SIGKILL while partial sums are written: the same command ends with the same bits."""
    config, devices = config_file({"evaluate.positions": 4}), 8 // count
    command = (
        "-c",
        CHILD,
        f"--config={config}",
        f"--workdir={trained}",
        "--watch",
        "--patience=60",
    )
    with Job(
        count, devices, tmp_path / "whole", *command, f"--out={tmp_path / 'undisturbed'}"
    ) as job:
        assert job.wait() == [0] * count, job.said(0)
    out = tmp_path / "out" / "evaluations"
    for step in (2, 4):
        with Job(
            count, devices, tmp_path / f"killed {step}", *command, f"--out={tmp_path / 'out'}"
        ) as job:
            while not (out / str(step) / "partial.npz").exists():
                assert all(process.poll() is None for process in job.processes), job.said(0)
                time.sleep(0.001)
            job.processes[-1].send_signal(signal.SIGKILL)
            assert -signal.SIGKILL in job.wait()
        assert not (out / str(step) / "perplexity.json").exists()
    with Job(count, devices, tmp_path / "continued", *command, f"--out={tmp_path / 'out'}") as job:
        assert job.wait() == [0] * count, job.said(0)
        assert "step 4 was the last" in job.said(0) and "step 4 was the last" not in job.said(
            count - 1
        ) * (count - 1)
    for step in (2, 4):
        assert_same(out / str(step), tmp_path / "undisturbed" / "evaluations" / str(step))


@pytest.mark.slow
def test_on_gs(config_file, tmp_path):
    """The workdir in a bucket: what is whole there is found, and results lie beside it."""
    pytest.importorskip("google.cloud.storage")
    config, workdir = config_file(), "gs://bucket/some/run"
    with running(tmp_path) as server:
        for command in (("train",), ("evaluate", "--steps=2"), ("evaluate", "--watch")):
            module = (
                f"latent_delib.{command[0]}",
                f"--config={config}",
                f"--workdir={workdir}",
                *command[1:],
            )
            with Job(1, 8, tmp_path / command[-1], "-m", *module, **server.environment) as job:
                assert job.wait() == [0], job.said(0)
        assert job.said(0).splitlines()[-1] == "step 4 was the last"
        prefix = "bucket/some/run/evaluations/"
        files = {
            name.removeprefix(prefix)
            for name in server.objects
            if name.startswith(prefix) and name[-1] != "/"
        }
    each = ("documents.npz", "perplexity.json", "perplexity.png")
    assert files == {"curves.png", *(f"{step}/{name}" for step in (2, 4) for name in each)}


# Before the command: process 1 cannot read a checkpoint that process 0 can.
DENIED = """
import jax
load = evaluate.read_checkpoint
def denied_to_one(*arguments):
    if jax.process_index() == 1:
        raise PermissionError(13, "Permission denied", "meta")
    return load(*arguments)
evaluate.read_checkpoint = denied_to_one
"""


@pytest.mark.slow
def test_an_error_of_the_disk_of_one_process_ends_all(config_file, trained, tmp_path):
    """It must not skip the checkpoint: the others evaluate it, and would wait for its share."""
    child = CHILD.replace("commands.run", f"{DENIED}commands.run", 1)
    command = (
        "-c",
        child,
        f"--config={config_file({})}",
        f"--workdir={trained}",
        f"--out={tmp_path}",
        "--steps=all",
    )
    with Job(2, 4, tmp_path / "said", *command) as job:
        assert job.wait() == [1, 1], job.said(0)
        assert "Permission denied" in job.said(1)
