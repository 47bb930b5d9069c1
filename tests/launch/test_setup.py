"""setup.sh against pretended interpreters; what setup.py and constraints promise."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from distutils.core import run_setup  # setuptools' own
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import Distribution
from setuptools.command.build_py import build_py

from tests.launch.pretend import ROOT, program

SETUP = ("setup.py", "constraints.txt", "constraints-3.12.txt", "launch/setup.sh")

# Runs the script's own probe under another version and without a C compiler, copies itself for `-m
# venv`, and notes what pip is asked for, after pip itself.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  -c*) exec "{python}" -c 'import os, shutil, sys; shutil.which = lambda name: None
sys.version_info, sys._base_executable = {version}, "{path}"; {more}
exec(sys.argv[1])' "$2" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "{path}" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip check") ;;
  "-m pip install "*" -c constraints"*".txt pip") touch installer ;;
  "-m pip install "*)
    [[ -e installer ]] && echo "$*" >>pip.log && sleep 0.2 && exit "${{PIP_STATUS:-0}}" ;;
  *) exit 2 ;;
esac
"""


class Sandbox:
    """A checkout with nothing but what setup.sh reads, and a PATH whose interpreters are fakes."""

    def __init__(self, root: Path, names: Sequence[str] = SETUP):
        self.root = root
        self.bin = root / "bin"
        for name in names:
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        self.bin.mkdir()
        for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
            self.python(name, (3, 15, 0))

    def python(self, name: str, version: tuple[int, int, int], more: str = "pass") -> None:
        path = self.bin / name
        program(
            path, FAKE_PYTHON.format(python=sys.executable, version=version, more=more, path=path)
        )

    def start(self, *extras: str, **env: str) -> subprocess.Popen:
        env = {"PATH": f"{self.bin}:{os.defpath}", "HOME": str(self.root)} | env
        command = [self.root / "launch" / "setup.sh", *extras]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd="/", env=env, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True
        )

    def setup(self, *extras: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*extras, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def pip_calls(self) -> list[str]:
        log = self.root / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_unsuitable_interpreters_are_named_in_one_line(sandbox: Sandbox) -> None:
    sandbox.python("python3.11", (3, 11, 2), 'sys.modules["ensurepip"] = None')
    (sandbox.bin / "python3.12").write_text("#!/bin/sh\necho no such version >&2\nexit 127\n")
    code, out, err = sandbox.setup()
    assert code == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: Python 3.11 to 3.14 ")
    for part in (
        "python3 is 3.15.0",
        "python3.12 is broken",
        "3.11.2 without ensurepip",
        "install python3.11-venv",
    ):
        assert part in err
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("extras, more", [(["--tpu"], ""), (["eval", "gpu"], ""), ([], "eval,gpu")])
def test_an_extra_that_is_none(sandbox: Sandbox, extras: list[str], more: str) -> None:
    """pip would only warn."""
    sandbox.python("python3.12", (3, 12, 1))
    code, out, err = sandbox.setup(*extras, LATENT_DELIB_EXTRAS=more)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {extras[-1] if extras else 'gpu'}: ") and " cuda " in line
    assert not (sandbox.root / ".venv").exists()


@pytest.mark.parametrize("named, found", [("python3", "python3 is 3.15.0"), ("missing", "none")])
def test_no_other_interpreter_replaces_a_named_one(
    sandbox: Sandbox, named: str, found: str
) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    code, out, err = sandbox.setup(PYTHON=named)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: PYTHON={named}: Python 3.11 to 3.14 ")
    assert f"found: {found};" in err
    assert not (sandbox.root / ".venv").exists()


def test_an_interpreter_with_a_blank_in_its_path(sandbox: Sandbox) -> None:
    sandbox.python("my python", (3, 12, 1))
    assert sandbox.setup(PYTHON=str(sandbox.bin / "my python"))[0] == 0


def test_first_suitable_interpreter_is_taken_and_kept(sandbox: Sandbox) -> None:
    sandbox.python("python3.11", (3, 11, 9))
    sandbox.python("python3", (3, 12, 4))
    code, out, _ = sandbox.setup()
    assert code == 0
    assert "(Python 3.11.9)" in out

    code, out, _ = sandbox.setup(PYTHON="python3")
    assert code == 0
    assert "making .venv" in out
    assert "(Python 3.12.4)" in out

    assert "(Python 3.12.4)" in sandbox.setup()[1]
    assert len(sandbox.pip_calls()) == 2


def test_second_run_does_nothing_until_something_changes(sandbox: Sandbox) -> None:
    sandbox.python("python3.11", (3, 11, 9))
    assert sandbox.setup()[0] == 0
    (call,) = sandbox.pip_calls()
    assert "-c constraints.txt" in call
    assert call.endswith("-e .[seqio]")

    assert sandbox.setup()[0] == 0
    assert sandbox.setup("base")[0] == 0
    assert len(sandbox.pip_calls()) == 1

    assert sandbox.setup("tpu", LATENT_DELIB_EXTRAS="eval")[0] == 0
    assert sandbox.pip_calls()[1].endswith("-e .[seqio,tpu,eval]")
    assert "is ready" in sandbox.setup(LATENT_DELIB_EXTRAS="eval")[1] and sandbox.setup()[0] == 0
    assert len(sandbox.pip_calls()) == 2  # what is there is enough

    with open(sandbox.root / "constraints.txt", "a") as file:
        file.write("# another\n")
    code, out, _ = sandbox.setup(LATENT_DELIB_EXTRAS="tpu,eval")
    assert code == 0
    assert "making .venv" not in out  # installed over the old one
    assert len(sandbox.pip_calls()) == 3

    assert sandbox.setup(LATENT_DELIB_EXTRAS="cuda", PIP_STATUS="1")[0] == 1  # no network
    assert "is ready" in sandbox.setup()[1] and len(sandbox.pip_calls()) == 4


def test_what_must_be_compiled_is_for_those_who_can(sandbox: Sandbox) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    assert sandbox.setup("test", "tasks")[0] == 0
    can = "import ensurepip, sysconfig; shutil.which = str; "
    can += f'sysconfig.get_path = {{"include": "{sandbox.root}"}}.get'
    sandbox.python("python3.12", (3, 12, 1), can)
    shutil.copy(sandbox.bin / "python3.12", sandbox.root / ".venv" / "bin" / "python")
    assert sandbox.setup("test", "tasks")[0] == 0
    assert len(sandbox.pip_calls()) == 1  # a compiler, but no headers
    (sandbox.root / "Python.h").touch()
    assert sandbox.setup("test", "tasks")[0] == 0
    assert sandbox.pip_calls()[1].endswith("-e .[test,tasks]")


def test_base_adds_nothing_and_takes_more_later(sandbox: Sandbox) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    assert sandbox.setup("base")[0] == 0
    assert sandbox.setup("base")[0] == 0
    (call,) = sandbox.pip_calls()
    assert call.endswith("-e .")
    assert sandbox.setup("eval")[0] == 0
    assert sandbox.pip_calls()[1].endswith("-e .[eval]")


def test_new_versions_of_python_have_constraints_of_their_own(sandbox: Sandbox) -> None:
    sandbox.python("python3.14", (3, 14, 0))
    assert sandbox.setup()[0] == 0
    (call,) = sandbox.pip_calls()
    assert "-c constraints-3.12.txt" in call
    assert call.endswith("-e .")  # without seqio, which wants TensorFlow


def test_uv_is_taken_where_it_is_on_path(sandbox: Sandbox) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    program(sandbox.bin / "uv", '#!/usr/bin/env bash\necho "$*" >>uv.log\n')
    assert sandbox.setup()[0] == 0
    installer, call = (sandbox.root / "uv.log").read_text().splitlines()
    assert installer.endswith("-c constraints-3.12.txt pip")
    assert call.startswith("pip install --python .venv/bin/python ")
    assert call.endswith("-e .[seqio]")
    assert not sandbox.pip_calls()


def copied_before_run() -> list[str]:
    """Returns what the Dockerfile copies before it installs."""
    before = (ROOT / "Dockerfile").read_text().partition("\nRUN ")[0]
    lines = [line.split() for line in before.splitlines()]
    return [name for words in lines if words[:1] == ["COPY"] for name in words[1:-1]]


@pytest.mark.parametrize("extras, wanted", [("", "-e ."), ("tpu", "-e .[tpu]")])
def test_the_image_installs_from_what_it_has_copied(tmp_path, extras, wanted) -> None:
    sandbox = Sandbox(tmp_path, copied_before_run())
    sandbox.python("python3.12", (3, 12, 1))
    (line,) = re.findall(r"^RUN (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    env = {"PATH": f"{sandbox.bin}:{os.defpath}", "EXTRAS": extras}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, check=True, capture_output=True)
    (call,) = sandbox.pip_calls()
    assert call.endswith(wanted)
    name = [sys.executable, "setup.py", "--quiet", "--version"]  # which setup.py finds there too
    done = subprocess.run(name, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+", done.stdout.split()[-1])


@pytest.mark.parametrize("damage", ["pip fails", "no interpreter", "no pip"])
def test_broken_environment_is_made_anew(sandbox: Sandbox, damage: str) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    code, _, _ = sandbox.setup(PIP_STATUS="1" if damage == "pip fails" else "0")
    assert (code == 1) == (damage == "pip fails")
    python = sandbox.root / ".venv" / "bin" / "python"
    if damage == "no interpreter":
        python.unlink()
        python.symlink_to("/nowhere/python")
    if damage == "no pip":
        python.write_text(python.read_text().replace('"-m pip --version") ;;', ""))
    leftover = sandbox.root / ".venv" / "leftover"
    leftover.touch()

    code, out, _ = sandbox.setup()
    assert code == 0
    assert "making .venv" in out
    assert not leftover.exists()
    assert len(sandbox.pip_calls()) == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock nothing is promised")
def test_two_at_once_install_once(sandbox: Sandbox) -> None:
    sandbox.python("python3.12", (3, 12, 1))
    both = [sandbox.start(), sandbox.start()]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert len(sandbox.pip_calls()) == 1


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    """What setup.py hands to setuptools."""
    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="init")


def test_every_file_of_the_package_is_installed(distribution: Distribution) -> None:
    command = build_py(distribution)
    command.ensure_finalized()
    installed = {Path(path) for _, _, path in command.find_all_modules()}
    installed |= {
        Path(source, name) for _, source, _, names in command.data_files for name in names
    }
    here = {
        path
        for path in Path("latent_delib").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here == installed


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("latent_delib", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("setup.py", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, checkout]
    subprocess.run(build, check=True)
    shutil.rmtree(checkout)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", f"--target={tmp_path / 'there'}", wheel], check=True
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PYTHONPATH": str(tmp_path / "there")}
        command = [sys.executable, tmp_path / "there/bin/latent-delib", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    wrong = run("train", "--config=paper:lab/overlay", "--config.train.stpes=3", "--workdir=run")
    assert "did you mean --config.train.steps?" in wrong.stderr
    done = run("generate", "--workdir=packaged", "--prompt=The cat", "--max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    assert "--- augmented" in done.stdout


def test_all_is_all_that_every_machine_can_have(distribution: Distribution) -> None:
    extras = distribution.extras_require
    leaves_out = {"cuda", "tpu", "tokamax", "tasks", "reference", "test"}
    assert set(extras["all"]) == set().union(*(extras[name] for name in extras.keys() - leaves_out))


@pytest.mark.parametrize(
    "file, version, unpinned",
    [
        ("constraints.txt", "3.11", ()),
        ("constraints-3.12.txt", "3.12", ("tpu", "cuda", "tokamax", "reference")),
        ("constraints-3.12.txt", "3.13", ("tpu", "cuda", "tokamax", "reference")),
        ("constraints-3.12.txt", "3.14", ("tpu", "cuda", "tokamax", "reference")),
    ],
)
def test_constraints_satisfy_setup(
    distribution: Distribution, file: str, version: str, unpinned: tuple[str, ...]
) -> None:
    """Everything that a Python can have is pinned to a version that is allowed.

    What CUDA needs is left to jax.
    """
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", Path(file).read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = list(distribution.install_requires)
    for extra, requirements in distribution.extras_require.items():
        if extra not in unpinned:
            wanted += requirements
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"python_version": version}):
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), (
            requirement
        )
