"""paper.sh around a python that only pretends, and the configs it runs."""

import importlib
import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from latent_delib.delib.methods import METHODS
from latent_delib.job import experiment

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs/paper").glob("*.py") if path.stem != "protocols")
PYTHON = """#!/usr/bin/env bash
echo "${*:2}" >>calls
for argument; do
  case $argument in
    --workdir=*) out=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
  esac
done
[[ $2 == latent_delib.report ]] && exit
mkdir -p "$out"
case $2 in
  *.evaluate) [[ $* == *--steps=all* ]] || touch "$out/perplexity.json" ;;
  *.prepare) touch "$out/meta.json" ;;
  *.make_mixture) touch "$out/MIXTURE.md" ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    shutil.copytree(ROOT / "configs/paper", tmp_path / "configs/paper")
    for name in ("common", "paper"):
        shutil.copy(ROOT / f"launch/{name}.sh", tmp_path / "launch")
    scripts = {"launch/setup.sh": "", "launch/get_smollm2.sh": "echo model.gguf", ".venv/bin/python": PYTHON}
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return tmp_path


def paper(here: Path, *arguments: str, code: int = 0) -> list[str]:
    """The commands it ran, without `latent_delib.`; or what it said, where it fails."""
    (here / "calls").unlink(missing_ok=True)
    command = [here / "launch/paper.sh", *arguments]
    done = subprocess.run(command, cwd=here, env={"PATH": os.defpath}, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        return done.stderr.splitlines()
    return [line.removeprefix("latent_delib.") for line in (here / "calls").read_text().splitlines()]


def test_a_run_of_protocol_a(here: Path) -> None:
    calls = paper(here, "a/overlay@1")
    run = "--workdir=runs/paper/a/overlay@1"
    assert (
        calls[0] == "prepare --config=configs/paper/overlay.py:a --config.data.token_files= --out=runs/paper/a/tokens"
    )
    assert calls[1] == f"train --config=configs/paper/overlay.py:a {run} --config.seed=1"
    controls = {"": "", "/swap": " --config.evaluate.swap", "/longer": " --config.evaluate.longer_prompt=32"}
    late = {f"/delay{n}": f" --config.evaluate.delay={n}" for n in (1, 2, 3)}
    at = f"evaluate --config=configs/paper/overlay.py:a {run}"
    once, curve, delayed = [
        [f"{at} --out=runs/paper/a/overlay@1{kind}{more}" for kind, more in controls.items()],
        [f"{at} --steps=all"],
        [f"{at} --out=runs/paper/a/overlay@1{kind}{more}" for kind, more in late.items()],
    ]
    assert calls[2:-1] == [*once, *curve, *delayed]
    assert calls[-1] == "report runs/paper --out=runs/paper/report"

    again = paper(here, "a/overlay@1")
    assert [call.split()[0] for call in again] == ["evaluate", "report"] and "--steps=all" in again[0]


def test_a_trial_is_not_the_experiment(here: Path) -> None:
    """More arguments: a folder of its own, so that the run they are left out of is made too."""
    more = ("--config.train.steps=20", "--config.a=(1, 'b')")
    calls = paper(here, "a/pause_tokens", "--", *more)
    workdir = "--workdir=runs/trials/a/pause_tokens@0,train.steps=20,a=-1,--b--"
    assert calls[1:] == [
        f"train --config=configs/paper/pause_tokens.py:a {workdir} --config.seed=0 {' '.join(more)}",
        f"evaluate --config=configs/paper/pause_tokens.py:a {workdir} --out={workdir[10:]} " + " ".join(more),
    ]
    assert "train" in [call.split()[0] for call in paper(here, "a/pause_tokens")]


def test_what_each_protocol_needs_is_made_once(here: Path) -> None:
    calls = paper(here, "b/pause_tokens", "a_gpu/decoder", "a_gpu/joint", "a/pause_tokens", "a/adapt_decoder")
    made = [call.split()[0] for call in calls if call.split()[0] not in ("train", "evaluate")]
    assert made == ["make_mixture", "convert", *["prepare"] * 3, "make_tasks", "prepare", "report"]
    assert "convert --source=model.gguf --out=runs/smollm2_135m/decoder --size=smollm2_135m" in calls
    pretrain = "train --config=configs/paper/pretrain.py --workdir=runs/paper/a_gpu/pretrain"
    pretrained = calls.index(pretrain)
    assert calls.count(pretrain) == 1
    assert pretrained < next(i for i, call in enumerate(calls) if "paper/decoder.py:a_gpu --workdir=" in call)
    unseen = " --config.data.token_files= --config.data.validation=('files:runs/mixture/unseen/*.txt',)"
    (call,) = (call for call in calls if "--out=runs/paper/a/pause_tokens@0/unseen" in call)  # the mixture is there
    assert call.endswith(unseen)
    assert not any("--out=runs/paper/b/pause_tokens@0/unseen" in call for call in calls)  # it is in the tokens
    assert not any("--out=runs/paper/a/adapt_decoder@0/unseen" in call for call in calls)


@pytest.mark.parametrize("name", ["adapt_coprocessor", "joint", "unified", "after_8", "overlay_64", "before"])
def test_latents_of_another_document_are_a_control(here: Path, name: str) -> None:
    calls = paper(here, f"a/{name}")
    assert any(f"a/{name}@0/swap " in call and call.endswith(" --config.evaluate.swap") for call in calls)
    assert not any("/swap" in call for call in paper(here, "a/pause_tokens"))  # theirs depend on no document


@pytest.mark.parametrize("name", ["overlay", "adapt_decoder"])
@pytest.mark.parametrize("protocol", ["a", "a_gpu", "b", "b_cpu"])
def test_a_run_that_is_stopped_keeps_its_curve(protocol: str, name: str) -> None:
    """Every checkpoint that is evaluated stays, whatever else a signal saves between them."""
    c = importlib.import_module(f"configs.paper.{name}").get_config(protocol).train
    assert c.steps % c.checkpoint_every == 0 and c.keep_every == c.checkpoint_every


def test_without_names_all_of_protocol_a(here: Path) -> None:
    trained = [call.split()[1] for call in paper(here) if call.startswith("train")]
    assert sorted(trained) == [f"--config=configs/paper/{name}.py:a" for name in NAMES if name != "pretrain"]
    started = {name: trained.index(f"--config=configs/paper/{name}.py:a") for name in ("overlay", "adapt_coprocessor")}
    assert started["overlay"] < started["adapt_coprocessor"]  # which starts from it


def test_without_tasks_all_else_is_made_and_reported(here: Path) -> None:
    python = here / ".venv/bin/python"
    python.write_text(PYTHON.replace("mkdir -p", "[[ $2 != *.make_tasks ]] || exit 1\nmkdir -p"))
    (said,) = paper(here, "a/adapt_decoder", "a/pause_tokens", code=1)
    assert said == "error: left out, for want of runs/tasks: a/adapt_decoder"
    calls = (here / "calls").read_text()
    assert "train --config=configs/paper/pause_tokens.py:a" in calls and "adapt_decoder" not in calls
    assert calls.endswith("report runs/paper --out=runs/paper/report\n")


def test_more_arguments_are_of_the_config(here: Path) -> None:
    (said,) = paper(here, "a/overlay", "--", "--steps=all", code=1)
    assert said == "error: --steps=all: expected --config.KEY=VALUE; --help tells more"
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["overlay", "a/nothing", "a/protocols", "a/", "c/overlay"])
def test_a_name_that_is_none(here: Path, name: str) -> None:
    (said,) = paper(here, name, code=1)
    assert said.startswith(f"error: {name}: expected PROTOCOL/NAME or PROTOCOL/NAME@SEED")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("protocol", ["a", "a_gpu", "b", "b_cpu"])
def test_every_experiment_is_a_config_that_can_run(protocol: str) -> None:
    """With random weights where a protocol's decoder is made elsewhere."""
    methods = set()
    for name in NAMES:
        config = importlib.import_module(f"configs.paper.{name}").get_config(protocol)
        if config.decoder.path != "packaged":
            config.decoder.path, config.decoder.tokenizer = "", "packaged"
        methods.add(experiment.read(config, jax.devices()[:1]).aug.method)
    assert methods == set(METHODS)
