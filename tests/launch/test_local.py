"""local.sh and sweep.sh, around commands that only pretend to train."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.pretend import program

ROOT = Path(__file__).resolve().parents[2]


class Checkout:
    """The launch scripts alone, with a `python` of .venv that pretends."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("launch", "configs", ".venv/bin", "bin"):
            (root / folder).mkdir(parents=True)
        for config in ("x", "y"):
            (root / "configs" / f"{config}.py").touch()
        for script in ("common", "local", "sweep"):
            shutil.copy(ROOT / "launch" / f"{script}.sh", root / "launch")
        self.started: list[subprocess.Popen] = []
        self.env = {
            "PATH": f"{root}/bin:{os.defpath}",
            "HOME": str(root),
            "LATENT_DELIB_POLL": "0.02",
        }

    def script(self, name: str, text: str) -> Path:
        return program(self.root / name, text)

    def start(self, script: str, *arguments: str) -> subprocess.Popen:
        # A job that a shell put in the background ignores SIGINT, and so would what it starts.
        command = ["env", "--default-signal=INT", self.root / "launch" / f"{script}.sh", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=self.root, env=self.env, stdout=pipe, stderr=pipe, text=True
        )
        self.started.append(process)
        return process

    def launch(self, script: str, *arguments: str, code: int = 0) -> tuple[str, str]:
        process = self.start(script, *arguments)
        out, err = process.communicate(timeout=90)
        assert process.returncode == code, out + err
        return out, err

    def lines(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str, lines: int) -> None:
        end = time.monotonic() + 20
        while len(self.lines(name)) < lines:
            assert time.monotonic() < end, f"{name} never came"
            time.sleep(0.02)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Checkout]:
    here = Checkout(tmp_path)
    yield here
    for process in here.started:  # after a failure
        process.kill()
        process.stdout.close(), process.stderr.close()
        process.wait()


# local.sh. The commands say `up` once they can be signalled; `hang` is until SIGTERM.
PROCESS = """me=$JAX_PROCESS_ID
hang() { trap "$1" TERM; trap "$2" INT; echo $me >>up; sleep 60 & wait; }
"""
OTHER_IS_UP = "until grep -q $((1 - me)) up; do sleep 0.02; done\n"


def test_every_process_knows_its_place(here: Checkout) -> None:
    command = here.script(
        "job",
        'echo "$JAX_NUM_PROCESSES $JAX_NUM_CPU_DEVICES $JAX_PLATFORMS $*"\n'
        'echo "$JAX_COORDINATOR_ADDRESS" >&2',
    )
    out, err = here.launch("local", "--processes=3", "--devices=4", "--", str(command), "a b")
    lines = sorted(out.splitlines())
    assert [line for line in lines if "127.0.0.1" not in line] == [
        f"[{i}] 3 4 cpu a b --distributed" for i in range(3)
    ]
    addresses = {line[4:] for line in lines if "127.0.0.1" in line}
    assert len(addresses) == 1
    assert 10_000 <= int(addresses.pop().removeprefix("127.0.0.1:")) < 30_000
    assert err.count("ended with code 0") == 3


def test_one_death_stops_all_and_starts_all_again(here: Checkout) -> None:
    """What died first decides, not how the others take it."""
    body = "echo $me >>starts\n[[ $(wc -l <starts) -le 2 ]] || exit 0\n"
    body += f'if ((me == 0)); then hang "exit 1" ""; else {OTHER_IS_UP} kill -KILL $$; fi'
    _, err = here.launch("local", "--processes=2", "--", str(here.script("job", PROCESS + body)))
    assert sorted(here.lines("starts")) == ["0", "0", "1", "1"]
    assert "process 1 ended with code 137" in err
    assert "== STARTING AGAIN, 1 of 3: a process ended with code 137" in err


@pytest.mark.parametrize("code, starts", [(1, 1), (126, 1), (127, 1), (75, 3), (134, 3)])
def test_which_codes_are_worth_another_start(here: Checkout, code: int, starts: int) -> None:
    job = here.script("job", f"echo >>starts; exit {code}")
    _, err = here.launch("local", "--processes=1", "--restarts=2", "--", str(job), code=code)
    assert len(here.lines("starts")) == starts
    assert ("giving up after 2 restarts" in err) == (starts == 3)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process(here: Checkout, number: signal.Signals, code: int) -> None:
    job = here.script("job", PROCESS + 'hang "echo $me >>term; exit 75" "echo $me >>int; exit 130"')
    process = here.start("local", "--processes=2", "--", str(job))
    here.wait_for("up", 2)
    process.send_signal(number)
    process.communicate(timeout=90)
    assert process.returncode == code
    assert sorted(here.lines("term" if code == 75 else "int")) == ["0", "1"]
    assert len(here.lines("up")) == 2  # not started again


def test_what_ignores_sigterm_is_killed(here: Checkout) -> None:
    body = f'if ((me == 0)); then hang "" ""; else {OTHER_IS_UP} exit 75; fi\n'
    job = here.script("job", PROCESS + body + "for _ in {1..300}; do sleep 0.1; done")
    _, err = here.launch(
        "local", "--processes=2", "--restarts=0", "--grace=0.2", "--", str(job), code=75
    )
    assert "process 0 ended with code 137" in err


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("local", "--processes=0 -- x", "--processes=N"),
        ("local", "--processes=2", "no command"),
        ("local", "--processes=2 --restarts=x -- x", "--restarts=x: "),
        ("local", "--processes=2 --grace=x -- x", "--grace=x: "),
        ("local", "--processes=2 --dry_run=false -- x", "--dry_run=false: "),
        ("local", "--process=2 -- x", "--process=2: "),
        ("sweep", "Name configs/x.py", "'Name': expected a name of a-z, 0-9 and -"),
        ("sweep", "name quickstart seed=0", "'quickstart': expected a config, as configs/"),
        ("sweep", "name configs/x.py config.seed=0", "config.seed=0: "),
        ("sweep", "name configs/x.py seed", "seed: "),
        ("sweep", "name configs/x.py seed=", "seed=: "),
        ("sweep", "name configs/x.py seed=,", "seed=,: "),
        ("sweep", "name configs/x.py seed=0,,1 --dry_run", "seed=0,,1: "),
        ("sweep", "name configs/x.py,configs/none.py --dry_run", "configs/none.py: "),
        ("sweep", "name configs/x.py --jobs=0 --dry_run", "--jobs=0: "),
        ("sweep", "name configs/x.py --with={launcher}", "LATENT_DELIB_BUCKET"),
    ],
)
def test_mistakes_are_one_line(here: Checkout, script: str, arguments: str, message: str) -> None:
    _, err = here.launch(
        script, *(word.format(launcher="keep @ --") for word in arguments.split()), code=1
    )
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line


def test_dry_runs(here: Checkout) -> None:
    out, err = here.launch(
        "local", "--processes=2", "--devices=4", "--dry_run", "--", "python", "a b"
    )
    shared = "env PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 JAX_NUM_PROCESSES=2"
    rest = r"JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT python a\ b --distributed"
    assert out.splitlines() == [f"{shared} JAX_PROCESS_ID={i} {rest}" for i in (0, 1)]
    here.env["LATENT_DELIB_BUCKET"] = "bucket"
    out, _ = here.launch(
        "sweep",
        "s",
        "configs/x.py",
        "seed=0,1",
        "--with=keep @ --",
        "--dry_run",
        "--",
        "--config.a=b c",
    )
    (mkdir, *runs) = out.splitlines()
    assert mkdir == "mkdir -p runs/s"
    assert [shlex.split(run)[3:] for run in runs] == [
        [
            *"python -m latent_delib.train --config=configs/x.py".split(),
            f"--workdir=gs://bucket/s/x,seed={seed}",
            f"--config.seed={seed}",
            "--config.a=b c",
        ]
        for seed in (0, 1)
    ]
    slices = [shlex.split(run)[1] for run in runs]
    assert len(set(slices)) == 2 and all(
        len(name) <= 40 and name.startswith("s-") for name in slices
    )
    assert not (here.root / "runs").exists()


def test_a_child_that_was_killed_meanwhile_is_not_forgotten(here: Checkout) -> None:
    """One that dies while bash runs another command, which bash's own `wait -n` forgets."""
    script = here.script(
        "launch/waits.sh",
        'source "${0%/*}/common.sh"\n'
        "sleep 60 & one=$!\nbash -c 'kill -KILL $$' & other=$!\n"
        "/bin/sleep 0.3\nwait_one $one $other\n"
        '[[ $ended == "$other" ]] && echo "$code"\nkill $one; wait_one $one; echo "$code"\n',
    )
    done = subprocess.run([script], capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == ["137", "143"], done


# sweep.sh. Its python fails where a line of `failing` is in the arguments.
TRAIN = (
    "[[ $* != *--list_keys* ]] || exit 0\n"
    'echo "${*:3}" >>trained\nwhile read -r part; do [[ $* != *$part* ]] || exit 1; done <failing\n'
)


def test_sweep_skips_what_is_done_and_names_what_failed(here: Checkout) -> None:
    here.script(".venv/bin/python", TRAIN)
    (here.root / "failing").write_text("placement=overlay --config.seed=1\n")
    grid = ("sweep", "s", "configs/x.py", "method.placement=after,overlay", "seed=0,1")
    _, err = here.launch(*grid, code=1)
    runs = [
        f"x,method.placement={placement},seed={seed}"
        for placement in ("after", "overlay")
        for seed in (0, 1)
    ]
    flags = [
        "--config.method.placement=" + run.split("placement=")[1].replace(",", " --config.")
        for run in runs
    ]
    expected = [
        f"--config=configs/x.py --workdir=runs/s/{run} {flag}" for run, flag in zip(runs, flags)
    ]
    assert here.lines("trained") == expected
    assert "3 finished, 1 failed of 4" in err
    assert err.splitlines()[-1].startswith(
        f"error: failed: {runs[3]} (code 1, runs/s/{runs[3]}.log)"
    )

    (here.root / "failing").write_text("nothing\n")
    here.launch(*grid)
    assert here.lines("trained") == [*expected, expected[3]]
    here.launch(*grid)
    assert len(here.lines("trained")) == 5
    here.launch(*grid, "--", "--config.train.steps=9")  # other runs, though of the same names
    assert len(here.lines("trained")) == 9


def test_sweep_checks_the_keys_of_every_config_before_anything_runs(here: Checkout) -> None:
    here.script(
        ".venv/bin/python",
        'echo "${*:3}" >>checked\n[[ $* != *configs/y.py* ]] || { echo "error: y" >&2; exit 1; }\n',
    )
    grid = ("configs/x.py,configs/y.py", "seed=0,1", "--dry_run", "--", "--config.a=b c")
    out, err = here.launch("sweep", "s", *grid, code=1)
    assert (out, err) == ("", "error: y\n")
    keys = "--config.seed=0 --config.seed=1 --config.a=b c"
    assert here.lines("checked") == [
        f"--list_keys --config=configs/{name}.py {keys}" for name in "xy"
    ]


def test_sweep_of_runs_that_would_share_a_folder(here: Checkout) -> None:
    _, err = here.launch("sweep", "s", "configs/x.py", "data.sources=a*b,a?b", code=1)
    assert err.startswith("error: x,data.sources=a-b: two runs of the grid have this name")
    assert not (here.root / "runs").exists()


def test_sweep_of_slices_runs_several_at_a_time(here: Checkout) -> None:
    here.env["LATENT_DELIB_BUCKET"] = "bucket"
    launcher = here.script(
        "keep", 'echo "$*" >>kept\nuntil [[ $(wc -l <kept) -ge 2 ]]; do sleep 0.02; done\n'
    )
    here.launch("sweep", "s", "configs/x.py,configs/y.py", f"--with={launcher} @ --", "--jobs=2")
    for line, config in zip(
        sorted(here.lines("kept"), key=lambda line: line.split("--config=")[1]), "xy"
    ):
        assert (
            f"-- python -m latent_delib.train --config=configs/{config}.py --workdir=gs://bucket/s/{config}"
            in line
        )


def test_sweep_passes_sigterm_on_and_starts_no_more(here: Checkout) -> None:
    checked = "[[ $* != *--list_keys* ]] || exit 0\n"
    here.script(
        ".venv/bin/python", f"{checked}trap 'exit 75' TERM; echo >>trained; sleep 60 & wait"
    )
    process = here.start("sweep", "s", "configs/x.py", "seed=0,1,2")
    here.wait_for("trained", 1)
    process.terminate()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "x,seed=0 (code 75" in err
    assert len(here.lines("trained")) == 1
