"""Whole training jobs: they resume bit for bit however they end, and what they leave on disk."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import workdirs

import latent_delib as ld
from latent_delib import train
from latent_delib.data import batches
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.machine import saved_steps
from latent_delib.weights import folder, locate
from tests import fake_gcs
from tests.run_command import run_command

pytestmark = pytest.mark.usefixtures("shared_steps")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEYS = {
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_seconds",
    "data_seconds",
}

# The train command, with something that happens to its process just before a step.
CHILD = """
import os, resource, runpy, signal, sys, time
from latent_delib.data import batches

read = batches.Training.batches

def step_2_is_saved():
    while not os.path.isdir(os.environ["WORKDIR"] + "/checkpoints/2"):
        time.sleep(0.01)

def interrupted(*args, **kwargs):
    for step, batch in enumerate(read(*args, **kwargs), start=1):
        if step == {step}:
            {event}
        yield batch

batches.Training.batches = interrupted
sys.argv = ["train", "--config=" + os.environ["CONFIG"], "--workdir=" + os.environ["WORKDIR"]]
runpy.run_module("latent_delib.train", run_name="__main__")
"""
# Stopped in its first step, resumed, evaluated; and a decoder, with a profile.
IN_STORAGE = """
import os, signal, sys
from configs import base
from latent_delib import evaluate, train
from latent_delib.data import batches

def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return read(*args, **kwargs)

config, workdir, read = base.get_config(), "gs://bucket/a/run", batches.Training.batches
config.update_from_flattened_dict(eval(sys.argv[1]))
batches.Training.batches = interrupted
assert train.train(config, workdir) == 75
batches.Training.batches = read
assert train.train(config, workdir) == 0
rows = evaluate.evaluate(config, workdir, workdir + "/out")["rows"]
config.method.name, config.train.profile_at = "decoder", 1
for _ in range(2):
    assert train.train(config, "gs://bucket/a/decoder") == 0
print(len(rows))
"""
KILL = "step_2_is_saved(); os.kill(os.getpid(), signal.SIGKILL)"
DISK_FULL = "step_2_is_saved(); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"


def run_until(event, config_file, workdir, step=4):
    """The train command in a process of its own, with an event before a step."""
    env = os.environ | {"CONFIG": str(config_file), "WORKDIR": str(workdir)}
    code = [sys.executable, "-c", CHILD.format(event=event, step=step)]
    return subprocess.run(code, env=env, cwd=ROOT, capture_output=True, text=True)


def assert_one_line(done, *words):
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_killed_and_resumed_equals_straight(trained, config_file, make_config, tmp_path):
    workdir = tmp_path / "workdir"
    done = run_until(KILL, config_file(), workdir)
    assert done.returncode == -9, done.stderr
    # A step is written during the next one.
    assert [row["step"] for row in workdirs.metrics(workdir)] == [1, 2]
    # Of a step after the checkpoint; one that is not text; one cut short.
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 9.0}\n\0\0\n{"step": 4, "lo')
    train.train(make_config(), str(workdir))
    workdirs.assert_same(workdir, trained)


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_from_text(trained, config_file, make_config, tmp_path):
    """Text through seqio: its own order, the same promise."""
    text, straight, workdir = {"data.token_files": ""}, tmp_path / "straight", tmp_path / "workdir"
    train.train(make_config(text), str(straight))
    assert workdirs.metrics(straight) != workdirs.metrics(trained)
    done = run_until(KILL, config_file(text), workdir)
    assert done.returncode == -9, done.stderr
    train.train(make_config(text), str(workdir))
    workdirs.assert_same(workdir, straight)


def test_a_text_of_your_own_is_prepared_trained_on_and_evaluated(config_file, tmp_path):
    for name, words in {
        "text/1": "a cat sat ",
        "text/2": "a dog ran ",
        "held_out/3": "rain ",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(words * 60)
    given = {
        "config": config_file({"data.token_files": "", "data.weights": (2.0,)}),
        "text": f"{tmp_path}/text/*.txt",
        "held_out": f"lines:{tmp_path}/held_out/*",
        "workdir": f"{tmp_path}/run",
    }
    assert run_command("train", **given) == ""
    meta = workdirs.meta_of(tmp_path / "run")
    assert meta["config"]["data"]["token_files"] == f"{tmp_path}/run/tokens"
    assert meta["config"]["data"]["sources"] == [f"files:{tmp_path}/text/*.txt"]
    assert "order" in meta["data"]["fingerprint"]  # of token files
    assert run_command("evaluate", workdir=f"{tmp_path}/run") == ""
    result = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    assert result["config"]["data"]["validation"] == [given["held_out"]]
    assert run_command("train", **given) == ""  # again: nothing is left to do
    (tmp_path / "run").rename(tmp_path / "moved")  # its token files come along
    assert run_command("evaluate", workdir=f"{tmp_path}/moved") == ""
    again = json.loads((tmp_path / "moved" / "perplexity.json").read_text())
    assert again["rows"] == result["rows"]
    assert again["config"]["data"]["token_files"] == f"{tmp_path}/moved/tokens"
    (tmp_path / "moved").rename(tmp_path / "run")
    (tmp_path / "text" / "3.txt").write_text("one more")
    said = run_command("train", **given)
    small.named(said, f"{tmp_path}/run/tokens", "the text of files:", "name another folder")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"held_out": ""}, ["--text", "--held_out", "expected both"]),
        ({"text": "packaged/validation"}, ["--held_out=packaged/validation: ", "is in --text too"]),
        ({"text": "*", "held_out": "lines:./a.txt"}, ["--held_out=lines:./a.txt", "/a.txt is in"]),
        (
            {"text": "hf:me/notes:train:text", "held_out": "hf:me/notes@main:train:body"},
            ["--held_out=hf:me/notes@main:train:body: hf:me/notes/:train is in --text too"],
        ),
        (
            {"text": "tfds:notes:train:text", "held_out": "tfds:notes:train[90%:]:text"},
            ["tfds:notes:train is in --text too"],
        ),
        ({"text": "none*"}, ["source 'files:none*'", "no file matches"]),
        ({"config.data.token_files": "tokens"}, ["--text", "config.data.token_files=tokens"]),
        ({"config.train.steps": 0}, ["config.train.steps=0"]),
        # before the text is read
        ({"config.mesh.data": 3}, ["mesh", "3"]),
        ({"config.train.batch_size": 7}, ["config.train.batch_size=7"]),
        ({"workdir": "runs[1]"}, ["runs[1]/checkpoints: a checkpoint's path cannot hold ["]),
        ({"workdir": "packaged"}, ["--workdir=packaged: names a coprocessor to read"]),
        ({"workdir": "hf:me/run"}, ["--workdir=hf:me/run: names a coprocessor to read"]),
        ({"config.method.start": "none/checkpoints/3"}, ["config.method.start=none/checkpoints/3"]),
        ({"distributed": True}, ["--text", "run prepare first"]),
    ],
)
def test_a_text_of_your_own_that_is_refused(changes, words, config_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat")
    given = {
        "config": config_file({"data.token_files": ""}),
        "text": f"{tmp_path}/a.txt",
        "held_out": "packaged/validation",
        "workdir": f"{tmp_path}/run",
    }
    small.named(run_command("train", **given | changes), *words)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def signal_before_step_3(monkeypatch):
    """with signal_before_step_3(number): a job is sent a signal just before its third step."""

    @contextlib.contextmanager
    def sent(number):
        read = batches.Training.batches

        def interrupted(*args, **kwargs):
            for step, batch in enumerate(read(*args, **kwargs), start=1):
                if step == 3:
                    os.kill(os.getpid(), number)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(batches.Training, "batches", interrupted)
            yield

    return sent


@pytest.mark.parametrize(
    "number, name, code", [(signal.SIGTERM, "SIGTERM", 75), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_saves_and_the_run_resumes(
    trained, make_config, tmp_path, signal_before_step_3, capfd, number, name, code
):
    config = make_config({"train.checkpoint_every": 1000, "train.keep": 1})
    flags = SimpleNamespace(
        config=config,
        workdir=str(tmp_path),
        text="",
        held_out="",
        distributed=False,
        dry_run=False,
        topology="",
        search=False,
    )
    assert saved_steps.whole_steps(str(tmp_path)) == set()
    with signal_before_step_3(number), pytest.raises(SystemExit) as end:
        train.main(flags)
    out, err = capfd.readouterr()
    assert end.value.code == code
    assert ("press Ctrl-C again" in err) == (name == "Ctrl-C")
    last = out.splitlines()[-1]
    assert name in last and "step 3 is saved" in last
    assert max(saved_steps.whole_steps(str(tmp_path))) == workdirs.everything(tmp_path)[0] == 3
    train.train(config, str(tmp_path))
    workdirs.assert_same(tmp_path, trained)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(trained, config_file, make_config, tmp_path):
    """Every file is limited to 4 KiB from step 4 on, so its checkpoint cannot be written."""
    workdir = tmp_path / "workdir"
    done = run_until(DISK_FULL, config_file(), workdir)
    assert_one_line(done, "checkpoints", "File too large")
    step, found = workdirs.everything(workdir)
    assert step == 2
    for name, leaf in workdirs.everything(trained, 2)[1].items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    train.train(make_config(), str(workdir))
    workdirs.assert_same(workdir, trained)


def test_which_checkpoints_are_kept(trained, make_config, tmp_path):
    """The newest, every second, and the two with the lowest loss: steps 3 and 4."""
    keep = {
        "train.keep": 1,
        "train.keep_every": 2,
        "train.keep_best": 2,
        "train.checkpoint_every": 1,
    }
    losses = {row["step"]: row["loss"] for row in workdirs.metrics(trained)}
    assert sorted(losses, key=losses.get)[:2] == [4, 3]
    train.train(make_config(keep), str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3", "4"]


def test_what_a_signal_saves_is_no_best_one(trained, make_config, tmp_path, signal_before_step_3):
    """Its mean loss is of the few steps since the checkpoint before: step 3, then step 4."""
    losses = [row["loss"] for row in workdirs.metrics(trained)]
    assert max(losses[2:]) < np.mean(losses[:2])
    config = make_config({"train.checkpoint_every": 2, "train.keep": 1, "train.keep_best": 1})
    with signal_before_step_3(signal.SIGTERM):
        assert train.train(config, str(tmp_path)) == 75
    assert saved_steps.whole_steps(str(tmp_path)) == {2, 3}
    train.train(config, str(tmp_path))
    assert saved_steps.whole_steps(str(tmp_path)) == {2, 4}


def test_data_that_changed_is_refused(trained, token_folder, make_config, tmp_path):
    workdirs.copy_at_step_2(trained, workdir := tmp_path / "workdir")
    shutil.copytree(token_folder, other := tmp_path / "tokens")
    config = make_config({"data.token_files": str(other)})
    meta = json.loads((token_folder / "meta.json").read_text())
    meta["train"][0]["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    before = sorted(workdir.rglob("*"))
    with pytest.raises(UserError, match="train/0.* changed"):
        train.train(config, str(workdir))
    (other / "meta.json").unlink()
    with pytest.raises(UserError, match=f"config.data.token_files.*{other}/meta.json"):
        train.train(config, str(workdir))
    assert sorted(workdir.rglob("*")) == before
    shutil.copy(token_folder / "meta.json", other)
    train.train(config, str(workdir))
    workdirs.assert_same(workdir, trained)


def test_clock_jumps(trained, make_config, tmp_path, monkeypatch):
    """A week ahead, hours forth and back at every look; then a restart earlier than its run."""
    jumps, now = itertools.cycle([7200.0, -5400.0, 0.0, 36000.0, -90000.0]), time.time
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now() + 7 * 86400 + next(jumps))
        ahead.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
        train.train(make_config(), str(tmp_path))
    workdirs.assert_same(tmp_path, trained)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train.train(make_config(), str(tmp_path))
    workdirs.assert_same(tmp_path, trained)


@pytest.mark.slow
def test_a_workdir_in_cloud_storage(trained, tiny, tmp_path):
    """Nothing of it on this machine's disk."""
    pytest.importorskip("google.cloud.storage")
    with fake_gcs.running(tmp_path) as server:
        env = os.environ | server.environment | {"PYTHONPATH": ROOT}
        command = [sys.executable, "-c", IN_STORAGE, repr(tiny)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.endswith("\n4\n"), done.stdout + done.stderr
        rows = [
            json.loads(line) for line in server.objects["bucket/a/run/metrics.jsonl"].splitlines()
        ]
        files = [name for name in server.objects if not name.endswith("/")]
        events = [name for name in files if name.startswith("bucket/a/run/tensorboard/")]
        assert b"loss" in server.objects[events[-1]]
        decoder = {
            name.removeprefix("bucket/a/decoder/decoder/"): content
            for name, content in server.objects.items()
            if name.startswith("bucket/a/decoder/decoder/") and not name.endswith("/")
        }
    for words in ("step 1 is saved", "resuming gs://bucket/a/run at step 1"):
        assert words in done.stdout
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == workdirs.metrics(trained)[3]["loss"]
    there = [name.split("/")[3] for name in files if name.startswith("bucket/a/run/")]
    assert set(there) == {
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "out",
    }
    assert json.loads(decoder["trained.json"]) == {"step": 4}
    for name, content in decoder.items():
        (tmp_path / "decoder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "decoder" / name).write_bytes(content)
    ld.load_decoder(tmp_path / "decoder")
    assert any(name.endswith(".xplane.pb") for name in files)
    assert not list(tmp_path.glob("gs:*"))


def test_a_second_job_on_the_same_workdir_is_refused(trained, make_config, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "workdir")
    with train.exclusive(str(tmp_path / "workdir")):
        with pytest.raises(UserError, match=f"{tmp_path}.*in use.*{os.getpid()}"):
            train.train(make_config(), str(tmp_path / "workdir"))
    assert capsys.readouterr().out == "", "before anything else is done"
    train.train(make_config(), str(tmp_path / "workdir"))  # free again


def test_what_a_run_leaves(trained, make_config):
    rows = workdirs.rows_of(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == KEYS  # model_flops_utilisation is known for accelerators only
        assert all(np.isfinite(value) for value in row.values())
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.0, 5e-3, 1e-2, 5.5e-3])
    events = list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    for key in KEYS - {"step"}:
        assert key.encode() in events[0].read_bytes()
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["2", "4"]
    meta = workdirs.meta_of(trained)
    tokenizer = Tokenizer(meta["config"]["decoder"]["path"] + "/tokenizer.model")
    data = batches.Training(make_config().data, tokenizer).fingerprint()
    assert (meta["step"], meta["data"]) == (4, {"seed": 0, "fingerprint": data})
    assert meta["config"]["method"]["num_latents"] == 2
    decoder = locate.find_decoder(meta["config"]["decoder"]["path"])
    content = [(decoder / name).read_bytes() for name in ("config.json", "model.safetensors")]
    # Not by `folder.fingerprint`, which returns what was stored when the folder was written.
    assert meta["fingerprint"] == hashlib.sha256(b"".join(content)).hexdigest()
    assert not list(trained.glob("*tmp*")) and not list(trained.glob(".*tmp*"))


def test_a_finished_run_is_left_alone(trained, make_config, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "workdir")
    before = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "workdir").rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    train.train(make_config(), str(tmp_path / "workdir"))
    assert "done: step 4" in capsys.readouterr().out
    after = {
        p: p.stat().st_mtime_ns
        for p in (tmp_path / "workdir").rglob("*")
        if p.is_file() and p.name != ".lock"
    }
    assert after == before


def test_a_trained_decoder_is_exported(
    make_config, make_decoder, decoder_folder, tokenizer_path, tmp_path
):
    """Method "decoder" trains the decoder itself; trace settings may not get in the way.

    A finished job that is called again writes nothing; a decoder that is trained again takes the
    place of the old one, though it is of the same step.
    """
    settings = {
        "method.name": "decoder",
        "method.num_traces": 128,
        "decoder.export_dtype": "bfloat16",
        "mesh.fsdp": 2,
    }
    config = make_config(settings)
    train.train(config, str(tmp_path))
    where = locate.find_decoder(str(tmp_path / "decoder"))
    architecture = folder.read_config(where)
    assert architecture == folder.read_config(decoder_folder)
    assert set(folder.open_tensors(where, architecture).dtypes.values()) == {jnp.dtype("bfloat16")}
    exported = ld.load_decoder(where, jnp.bfloat16).params
    weights = workdirs.weights_of(tmp_path, 4)["decoder"]
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), exported, weights
    )
    original = ld.load_decoder(decoder_folder).params
    assert np.abs(original["embedding"] - weights["embedding"]).max() > 1e-3
    assert Tokenizer(where / "tokenizer.model").vocab_size == Tokenizer(tokenizer_path).vocab_size

    file = where / "model.safetensors"
    first = (file.read_bytes(), file.stat().st_mtime_ns)
    train.train(config, str(tmp_path))
    assert (file.read_bytes(), file.stat().st_mtime_ns) == first
    shutil.rmtree(tmp_path / "checkpoints")
    train.train(make_config(settings | {"decoder.path": str(make_decoder(2))}), str(tmp_path))
    assert file.read_bytes() != first[0]
    assert not list(tmp_path.glob("*tmp*"))


def test_types_of_64_bits_are_refused(make_config, tmp_path):
    """The second step would fail: Adam's moments become float64 in the first."""
    with jax.enable_x64(True), pytest.raises(UserError, match="JAX_ENABLE_X64 is set"):
        train.train(make_config(), str(tmp_path))


def test_a_decoder_that_is_trained_on_is_not_replaced(
    make_config, decoder_folder, tmp_path, config_file
):
    """It lies where the trained one would go, or one that no training has written does."""
    shutil.copytree(decoder_folder, tmp_path / "decoder")
    before = {path.name: path.read_bytes() for path in (tmp_path / "decoder").iterdir()}
    own = {"method.name": "decoder", "decoder.path": f"{tmp_path}/decoder"}
    for settings in (own, {"method.name": "joint"}):
        with pytest.raises(UserError, match="would replace .*/decoder, which is not of this"):
            train.train(make_config(settings), str(tmp_path))
    (tmp_path / "decoder" / "trained.json").write_text('{"step": 4}')  # by an earlier training
    with pytest.raises(UserError, match="would replace"):
        train.train(make_config(own), str(tmp_path))
    (tmp_path / "decoder" / "trained.json").unlink()
    after = {path.name: path.read_bytes() for path in (tmp_path / "decoder").iterdir()}
    assert after == before and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow  # one that is cut short begins and ends like it
def test_three_steps_are_traced(make_config, tmp_path):
    train.train(make_config({"train.profile_at": 1}), str(tmp_path))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_trace_of_a_job_that_is_stopped(make_config, tmp_path, signal_before_step_3):
    with signal_before_step_3(signal.SIGTERM):
        assert train.train(make_config({"train.profile_at": 1}), str(tmp_path)) == 75
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_dry_run_is_of_the_text_that_is_named(config_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train.dry_run, "dry_run", lambda config, *rest: seen.append((config.data.sources, *rest))
    )
    (tmp_path / "a.txt").write_text("a cat")
    given = {
        "config": config_file({"data.token_files": ""}),
        "text": f"{tmp_path}/a.txt",
        "workdir": f"{tmp_path}/run",
        "dry_run": True,
        "topology": "v5e:4x4",
    }
    small.named(run_command("train", **given), "--text", "--held_out", "expected both")
    assert run_command("train", **given, held_out="packaged/validation") == ""
    assert seen == [((f"files:{tmp_path}/a.txt",), f"{tmp_path}/run", "v5e:4x4")]
    assert not (tmp_path / "run").exists()
