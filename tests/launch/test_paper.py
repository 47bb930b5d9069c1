"""paper.sh around a python that only pretends."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs import paper
from latent_delib.delib.methods import METHODS
from tests.launch.pretend import program

ROOT = Path(__file__).resolve().parents[2]
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
  *.make_questions) touch "$out"/{countdown,hops,plus_minus}.train.jsonl ;;
  *.make_vocabulary) rmdir "$out" && touch "$out" ;;
esac
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/paper.py", tmp_path / "configs")
    for name in ("common", "paper"):
        shutil.copy(ROOT / f"launch/{name}.sh", tmp_path / "launch")
    scripts = {
        "launch/setup.sh": 'touch installed; echo "$*" >>extras',
        "launch/get_smollm2.sh": "echo model.gguf",
        ".venv/bin/python": PYTHON,
    }
    for name, text in scripts.items():
        program(tmp_path / name, text)
    return tmp_path


def run(here: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [here / "launch" / script, *arguments]
    env = {"PATH": os.defpath}
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)


def run_paper(here: Path, *arguments: str, code: int = 0) -> list[str]:
    """Returns the commands it ran, without `latent_delib.`; or what it said, where it fails."""
    (here / "calls").unlink(missing_ok=True)
    done = run(here, "paper.sh", *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        return done.stderr.splitlines()
    return [
        line.removeprefix("latent_delib.") for line in (here / "calls").read_text().splitlines()
    ]


def test_a_run_of_the_laboratory(here: Path) -> None:
    calls = run_paper(here, "lab/overlay@1")
    run = "--workdir=runs/paper/lab/overlay@1"
    tokens = "--config.data.token_files= --out=runs/paper/lab/tokens"
    assert calls[0] == "tools.make_mixture --out=runs/mixture"
    assert calls[1] == f"prepare --config=configs/paper.py:lab/overlay {tokens}"
    assert calls[2] == f"train --config=configs/paper.py:lab/overlay {run} --config.seed=1"
    controls = {
        "": "",
        "/swap": " --config.evaluate.swap",
        "/longer": " --config.evaluate.longer_prompt=32",
    }
    late = {f"/delay{n}": f" --config.evaluate.delay={n}" for n in (1, 2, 3)}
    at = f"evaluate --config=configs/paper.py:lab/overlay {run}"
    once, curve, delayed = [
        [f"{at} --out=runs/paper/lab/overlay@1{kind}{more}" for kind, more in controls.items()],
        [f"{at} --steps=all"],
        [f"{at} --out=runs/paper/lab/overlay@1{kind}{more}" for kind, more in late.items()],
    ]
    assert calls[3:-1] == [*once, *curve, *delayed]
    assert calls[-1] == "report runs/paper --out=runs/paper/report"

    again = run_paper(here, "lab/overlay@1")
    assert [call.split()[0] for call in again] == ["evaluate", "report"]
    assert "--steps=all" in again[0]


def test_a_trial_is_not_the_experiment(here: Path) -> None:
    """More arguments: a folder of its own, so that the run they are left out of is made too."""
    more = ("--config.train.steps=20", "--config.a=(1, 'b')")
    calls = run_paper(here, "lab/pause_tokens", "--", *more)
    workdir = "--workdir=runs/trials/lab/pause_tokens@0,train.steps=20,a=-1,--b--"
    config = "--config=configs/paper.py:lab/pause_tokens"
    added = " ".join(more)
    assert calls[2:] == [
        f"train {config} {workdir} --config.seed=0 {added}",
        f"evaluate {config} {workdir} --out={workdir[10:]} {added}",
    ]
    assert "train" in [call.split()[0] for call in run_paper(here, "lab/pause_tokens")]


def test_what_each_protocol_needs_is_made_once(here: Path) -> None:
    calls = run_paper(
        here,
        "b/pause_tokens",
        "lab_gpu/decoder",
        "lab_gpu/joint",
        "lab/pause_tokens",
        "lab/adapt_decoder",
    )
    made = [call.split()[0] for call in calls if call.split()[0] not in ("train", "evaluate")]
    assert made == [
        "tools.make_mixture",
        "convert",
        "prepare",
        "tools.make_vocabulary",
        *["prepare"] * 2,
        "tools.make_tasks",
        "prepare",
        "report",
    ]
    assert (
        "convert --source=model.gguf --out=runs/smollm2_135m/decoder --size=smollm2_135m" in calls
    )
    pretrain = "train --config=configs/paper.py:lab_gpu/pretrain"
    pretrain += " --workdir=runs/paper/lab_gpu/pretrain"
    pretrained = calls.index(pretrain)
    assert calls.count(pretrain) == 1
    assert pretrained < next(
        i for i, call in enumerate(calls) if "paper.py:lab_gpu/decoder --workdir=" in call
    )


def test_latents_of_another_document_are_a_control(here: Path) -> None:
    """Of each experiment whose latents depend on the document, and not on their position."""
    names = [name for name in paper.EXPERIMENTS if name not in ("pretrain", "distilled")]
    swapped = run_paper(here, *(f"lab/{name}" for name in names))
    found = [
        re.search(r"--out=runs/paper/lab/(\w+)@0/swap ", call)
        for call in swapped
        if call.endswith("evaluate.swap")
    ]
    methods = {name: METHODS[paper.get_config(f"lab/{name}").method.name] for name in names}
    assert [match[1] for match in found] == [
        name for name, row in methods.items() if row.reads_text and not row.writes_keys
    ]


def test_smaller_decoders_are_made_first_on_the_same_tokens(here: Path) -> None:
    calls = run_paper(here, "lab_58k/static_tokens", "lab_58k/pause_tokens")
    config, folder = "--config=configs/paper.py:lab_58k", "runs/paper/lab_58k"
    assert calls[1:5] == [
        f"prepare {config}/pretrain --config.data.token_files= --out=runs/paper/lab/tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
        f"evaluate {config}/decoder --workdir={folder}/frozen",
        f"train {config}/static_tokens --workdir={folder}/static_tokens@0 --config.seed=0",
    ]
    assert sum("pretrain" in call for call in calls) == 2


def test_the_laboratory_of_a_gpu_begins_with_its_vocabulary(here: Path) -> None:
    calls = run_paper(here, "lab_gpu/static_tokens")
    config, folder = "--config=configs/paper.py:lab_gpu", "runs/paper/lab_gpu"
    text = "--text=runs/mixture/train/*.txt --size=4096"
    assert calls[:5] == [
        "tools.make_mixture --out=runs/mixture",
        f"tools.make_vocabulary {text} --out={folder}/tokenizer.model",
        f"prepare {config}/pretrain --config.data.token_files= --out={folder}/tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
        f"evaluate {config}/decoder --workdir={folder}/frozen",
    ]
    extras = (here / "extras").read_text().splitlines()
    assert "hub" in extras[-1].split()
    run_paper(here, "lab/static_tokens")
    assert "hub" not in (here / "extras").read_text().splitlines()[-1].split()


def test_problems_are_made_and_solved(here: Path) -> None:
    calls = run_paper(here, "problems/static_tokens", "problems/decoder", "problems/overlay")
    config, folder = "--config=configs/paper.py:problems", "runs/paper/problems"
    assert calls[1:4] == [
        "tools.make_problems --out=runs/problems",
        f"prepare {config}/pretrain --config.data.token_files= --out={folder}/tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
    ]
    table = "--benchmarks=sums,sorting,look_ups,brackets --table=configs/problems.py"
    table += " --tasks=runs/problems"
    assert [call for call in calls if call.startswith("benchmark")] == [
        f"benchmark --workdir={folder}/{name}@0 --model={models} {table} --out={folder}/{name}@0"
        for name, models in (
            ("static_tokens", "decoder,augmented"),
            ("decoder", "decoder"),
            ("overlay", "decoder,augmented"),
        )
    ]
    text = "--config.data.validation=('files:runs/mixture/validation/*.txt',)"
    run = f"{folder}/decoder@0"
    assert [call for call in calls if "/text" in call] == [
        f"evaluate {config}/decoder --workdir={run} --out={run}/text {text}"
        " --config.method.prompt_end="
    ]
    assert not any("delay" in call or "longer" in call for call in calls)


def test_problems_within_text_have_the_decoder_and_the_tokens_of_problems(here: Path) -> None:
    calls = run_paper(here, "mixed/overlay", "mixed/decoder")
    config, folder = "--config=configs/paper.py", "runs/paper"
    assert calls[:7] == [
        "tools.make_mixture --out=runs/mixture",
        "tools.make_problems --out=runs/problems",
        f"prepare {config}:problems/pretrain --config.data.token_files="
        f" --out={folder}/problems/tokens",
        f"train {config}:problems/pretrain --workdir={folder}/problems/pretrain",
        f"evaluate {config}:problems/decoder --workdir={folder}/problems/frozen",
        f"train {config}:mixed/overlay --workdir={folder}/mixed/overlay@0 --config.seed=0",
        f"evaluate {config}:mixed/overlay --workdir={folder}/mixed/overlay@0"
        f" --out={folder}/mixed/overlay@0",
    ]
    problems = "--benchmarks=sums,sorting,look_ups,brackets --table=configs/problems.py"
    problems += " --tasks=runs/problems"
    assert [call for call in calls if call.startswith("benchmark")] == [
        f"benchmark --workdir={folder}/mixed/{name}@0 --model={models} {problems}"
        f" --out={folder}/mixed/{name}@0"
        for name, models in (("overlay", "decoder,augmented"), ("decoder", "decoder"))
    ]
    run = f"{folder}/mixed/overlay@0"
    assert [call for call in calls if "/answers" in call] == [
        f"evaluate {config}:mixed/overlay --workdir={run} --out={run}/answers"
        " --config.data.validation=('files:runs/problems/text/test/*.txt',)"
        " --config.method.prompt_end=="
    ]


def test_look_ups_are_made_and_solved_without_the_mixture(here: Path) -> None:
    calls = run_paper(here, "depth/decoder")
    config, folder = "--config=configs/paper.py:depth", "runs/paper/depth"
    names = ",".join(f"follow_{steps}" for steps in range(1, 7))
    table = f"--benchmarks={names} --table=configs/problems.py"
    assert calls == [
        "tools.make_problems --kinds=follow,far --train=1600000 --test=3000 --out=runs/follow",
        f"prepare {config}/pretrain --config.data.token_files= --out={folder}/tokens",
        f"prepare {config}/overlay --config.data.token_files= --out={folder}/far_tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
        f"evaluate {config}/decoder --workdir={folder}/frozen",
        f"train {config}/decoder --workdir={folder}/decoder@0 --config.seed=0",
        f"evaluate {config}/decoder --workdir={folder}/decoder@0 --out={folder}/decoder@0",
        f"benchmark --workdir={folder}/decoder@0 --model=decoder {table} --tasks=runs/follow"
        f" --out={folder}/decoder@0",
        "report runs/paper --out=runs/paper/report",
    ]


def test_questions_are_made_and_answered_in_four_rows(here: Path) -> None:
    calls = run_paper(here, "questions")
    config, folder = "--config=configs/paper.py:questions", "runs/paper/questions"
    assert calls[:4] == [
        "tools.make_questions --out=runs/questions",
        f"prepare {config}/pretrain --config.data.token_files= --out={folder}/tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
        f"evaluate {config}/decoder --workdir={folder}/frozen",
    ]
    asked = "--benchmarks=qa:runs/questions/countdown.test.jsonl"
    found = [call for call in calls if call.startswith("benchmark")]
    for call, (name, models) in zip(
        found,
        (
            ("overlay", "decoder,augmented"),
            ("static_tokens", "decoder,augmented"),
            ("feedback_fast", "decoder,augmented"),
            ("decoder_fast", "decoder"),
        ),
        strict=True,
    ):
        run = f"{folder}/{name}@0"
        assert call.startswith(f"benchmark --workdir={run} --model={models} {asked} ")
        assert call.endswith(f" --out={run}")
    assert calls[-1] == "report runs/paper --out=runs/paper/report"


def test_hops_are_read_with_steps_and_without(here: Path) -> None:
    calls = run_paper(here, "hops")
    config, folder = "--config=configs/paper.py:hops", "runs/paper/hops"
    assert calls[:5] == [
        "tools.make_questions --out=runs/questions",
        f"prepare {config}/pretrain --config.data.token_files= --out={folder}/tokens",
        f"prepare {config}/overlay --config.data.token_files= --out={folder}/answer_tokens",
        f"train {config}/pretrain --workdir={folder}/pretrain",
        f"evaluate {config}/decoder --workdir={folder}/frozen",
    ]
    rows = ["double", "overlay", "static_tokens", "decoder_fast"]
    trained = [call.split()[1] for call in calls if call.startswith("train")]
    assert trained == [f"{config}/{row}" for row in ["pretrain", *rows]]
    asked = [call for call in calls if "--benchmarks=qa:runs/questions/hops.test.jsonl" in call]
    assert len(asked) == len(rows)
    for row, files in (("distilled", "tokens"), ("overlay", "answer_tokens")):
        found = paper.get_config(f"hops/{row}")
        assert found.data.token_files == f"{folder}/{files}"
        assert found.data.sources[0].startswith("qa_steps:") == (row == "distilled")


def test_a_real_decoder_is_fetched_and_asked(here: Path) -> None:
    calls = run_paper(here, "plus_minus")
    config, folder = "--config=configs/paper.py:plus_minus", "runs/paper/plus_minus"
    converted = "convert --source=model.gguf --out=runs/smollm2_135m/decoder --size=smollm2_135m"
    assert calls[:3] == [
        "tools.make_questions --out=runs/questions",
        converted,
        f"prepare {config}/overlay --config.data.token_files= --out={folder}/tokens",
    ]
    trained = [call for call in calls if call.startswith("train")]
    assert trained == [
        f"train {config}/{name} --workdir={folder}/{name}@0 --config.seed=0"
        for name in ("overlay", "static_tokens")
    ]
    asked = [call for call in calls if call.startswith("benchmark")]
    assert len(asked) == 2
    assert all("--benchmarks=qa:runs/questions/plus_minus.test.jsonl" in call for call in asked)


def test_questions_of_before_there_were_all_kinds_are_not_overwritten(here: Path) -> None:
    (here / "runs/questions").mkdir(parents=True)
    for protocol in ("hops", "plus_minus"):
        said = run_paper(here, protocol, code=1)[-1]
        assert f"has no {protocol}.train.jsonl; remove the folder" in said
    assert not (here / "calls").exists()


def test_decoders_are_not_asked_for(here: Path) -> None:
    for name in ("lab/pretrain", "hops/pretrain@1"):
        (said,) = run_paper(here, name, code=1)
        assert said.startswith(f"error: {name}: decoders are made automatically")
    assert not (here / "calls").exists()


def test_the_script_knows_all_protocols() -> None:
    script = (ROOT / "launch/paper.sh").read_text()
    assert f"protocols='{' '.join(paper.PROTOCOLS)}'" in script


def test_all_of_a_protocol(here: Path) -> None:
    calls = run_paper(here, "lab")
    trained = [call.split()[1].partition(":")[2] for call in calls if call.startswith("train")]
    names = [name for name in paper.EXPERIMENTS if name not in ("pretrain", "distilled")]
    assert sorted(trained) == sorted([*(f"lab/{name}" for name in names), "lab_58k/pretrain"])
    for first, then in (
        ("lab/overlay", "lab/adapt_coprocessor"),  # which starts from it
        ("lab_58k/pretrain", "lab/assistant"),
    ):
        assert trained.index(first) < trained.index(then)
    left_out = [call for call in run_paper(here, "depth") if "assistant" in call or "adapt" in call]
    assert left_out == []
    (solved,) = [call for call in run_paper(here, "depth/adapt_decoder") if "benchmark" in call]
    assert " --model=decoder " in solved


def test_the_time_left_counts_what_is_not_done(here: Path) -> None:
    run_paper(here, "lab/static_tokens")
    done = run(here, "paper.sh", "lab/static_tokens", "lab/pause_tokens")
    said = [line for line in done.stdout.splitlines() if "left" in line]
    assert said == ["== 0 of 2 experiments left, about 0 h 0 min"]


def test_no_experiment_is_named(here: Path) -> None:
    (said,) = run_paper(here, "--", "--config.train.steps=20", code=1)
    assert said == "error: no experiment is named; --help tells more"


def test_without_tasks_all_else_is_made_and_reported(here: Path) -> None:
    python = here / ".venv/bin/python"
    python.write_text(PYTHON.replace("mkdir -p", "[[ $2 != *.make_tasks ]] || exit 1\nmkdir -p"))
    (said,) = run_paper(here, "lab/adapt_decoder", "lab/pause_tokens", code=1)
    assert said.startswith("error: ") and "runs/tasks" in said and "lab/adapt_decoder" in said
    calls = (here / "calls").read_text()
    assert (
        "train --config=configs/paper.py:lab/pause_tokens" in calls and "adapt_decoder" not in calls
    )
    assert calls.endswith("report runs/paper --out=runs/paper/report\n")


def test_more_arguments_are_of_the_config(here: Path) -> None:
    (said,) = run_paper(here, "lab/overlay", "--", "--steps=all", code=1)
    assert said.startswith("error: --steps=all: ")
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    "name, part",
    [
        *(
            (name, "PROTOCOL/NAME@SEED")
            for name in ("overlay", "lab/protocols", "lab/", "c/overlay")
        ),
        ("problems/overlay@x", "a number"),
        ("lab/overlay@", "a number"),
        ("b/assistant", "second decoder"),
        ("plus_minus/assistant", "second decoder"),
        ("plus_minus/latent_tokens", "too short"),
        ("lab/distilled@1", "hops/distilled"),
    ],
)
def test_a_name_that_is_none(here: Path, name: str, part: str) -> None:
    """Or that cannot work: said before anything is made or installed."""
    (said,) = run_paper(here, "lab/overlay", name, code=1)
    assert said.startswith(f"error: {name}: ") and part in said
    assert not (here / "runs").exists() and not (here / "installed").exists()


def test_the_script_finds_the_names_of_all_experiments(here: Path) -> None:
    (said,) = run_paper(here, "nope", code=1)
    assert said.split("NAME one of ")[1].split() == list(paper.EXPERIMENTS)


def test_a_sweep_over_experiments(here: Path) -> None:
    shutil.copy(ROOT / "launch/sweep.sh", here / "launch")
    configs = "configs/paper.py:lab/overlay,configs/paper.py:b/after_8"
    done = run(here, "sweep.sh", "s", configs, "seed=0", "--dry_run")
    folders = re.findall(r"--workdir=(\S+)", done.stdout.replace("\\", ""))
    assert folders == ["runs/s/paper-lab-overlay,seed=0", "runs/s/paper-b-after_8,seed=0"], (
        done.stderr
    )
