"""How commands read their line and end: an exit code, and one line where they cannot go on."""

import contextlib
import errno
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from small import named

from configs import base
from latent_delib.errors import Outage
from latent_delib.machine import commands
from latent_delib.machine.command_line import CONFIG, FOLDERS, REQUIRED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(command_line):
    """command(main, *arguments, **options) -> what a command with this main exits with, or None."""

    def run(main, *arguments, **options):
        command_line("command", *arguments)
        try:
            commands.run(main, "", **options)
        except SystemExit as exit_:
            return exit_.code

    return run


@pytest.fixture
def parsed(command, config_file):
    """parsed(*arguments, **options) -> the values of a command with a config file.

    changes: of the file, as `config_file` takes them.
    """

    def run(*arguments, changes=None, **options):
        found = []
        options = {"config": (CONFIG, "")} | options
        file = config_file(changes)
        assert command(found.append, f"--config={file}", *arguments, **options) is None
        return found[0]

    return run


def test_the_last_of_what_is_given_twice_counts(parsed):
    """Of tuples too, whose flags would be added to each other."""
    values = parsed(
        "--config.data.sources=files:a",
        "--config.data.sources=('files:b', 'files:c')",
        "--config.data.validation=('files:a',)",
        "--config.data.validation",
        "files:b",
        "--config.train.steps=1",
        "--config.train.steps=2",
        "--out=a",
        "--out=b",
        out=("", ""),
    )
    assert values.config.data.sources == ("files:b", "files:c")
    assert values.config.data.validation == ("files:b",)
    assert (values.config.train.steps, values.out) == (2, "b")


def test_fields_of_tables_are_keys(parsed):
    """Those that a file leaves out too; they have the types of the fields, whatever a file has."""
    there = {"decoder.architecture": {"rope_base": 10_000, "layer_pattern": ["global"]}}
    values = parsed(
        "--config.decoder.architecture.num_layers=2",
        "--config.decoder.architecture.activation=silu",
        "--config.decoder.architecture.rope_base=1e6",
        "--config.decoder.architecture.layer_pattern=('local', 'global')",
        "--config.decoder.architecture.post_norms",
        "--config.method.coprocessor.num_layers=3",
        "--config.method.coprocessor.layer_pattern=local",
        "--config.method.coprocessor.rope_scaling=(8, 1.0, 4.0, 64)",
        "--noconfig.method.coprocessor.qk_norm",
        changes=there,
    )
    assert values.config.decoder.architecture.to_dict() == {
        "num_layers": 2,
        "activation": "silu",
        "rope_base": 1e6,
        "layer_pattern": ("local", "global"),
        "post_norms": True,
    }
    assert values.config.method.coprocessor.to_dict() == {
        "num_layers": 3,
        "layer_pattern": ("local",),
        "rope_scaling": (8, 1.0, 4.0, 64),
        "qk_norm": False,
    }
    assert not parsed().config.method.coprocessor


def listed(capsys, command, *arguments):
    """--list_keys -> key -> (value as Python, comment) of the lines that are not headings."""

    def main(values):
        raise AssertionError("--list_keys runs nothing")

    options = {"config": (CONFIG, ""), "workdir": (REQUIRED, "")}
    assert command(main, "--list_keys", *arguments, **options) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        code, _, comment = line.partition("  # ")
        key, _, value = code.strip().partition(" = ")
        found[key] = (value.strip(), comment)
    return found


def test_the_keys_are_listed_with_values_and_comments(command, capsys, config_file):
    found = listed(capsys, command)
    assert found["method.num_latents"] == ("16", "N_L")
    assert found["method.coprocessor.num_layers"] == ("", "not set: int")
    assert found["decoder.architecture.layer_pattern"] == ("", "not set: tuple")
    above = "What the backward pass computes again instead of storing it. none: nothing; dots: "
    above += "all but products and attention; attention: all but attention; full: everything."
    assert found["compute.remat"] == ("'attention'", above)
    assert found["mesh.data"] == ("-1", "")
    of_leaves = base.get_config().to_dict()
    leaves = {f"{room}.{key}" for room in of_leaves if room != "seed" for key in of_leaves[room]}
    leaves |= {"seed"}
    leaves -= {"decoder.architecture", "method.coprocessor"}
    assert leaves <= set(found)
    names = [key for key in found if key in leaves]
    assert names[:2] == ["seed", "decoder.path"], "in the order of base.py"
    changed = listed(
        capsys,
        command,
        f"--config={config_file()}",
        "--config.train.steps=7",
        "--config.method.coprocessor.num_layers=1",
    )
    assert changed["method.num_latents"] == ("2", "N_L")
    assert changed["train.steps"][0] == "7"
    assert changed["method.coprocessor.num_layers"] == ("1", "")


def test_a_command_without_a_config_has_no_keys(command):
    for given in ("--list_keys", "--config.train.steps=3"):
        line = command(lambda values: None, given, out=("", ""))
        named(line, given.partition("=")[0], "no such flag; --help lists the flags")


def test_a_leading_tilde_is_the_home_folder(parsed, command, monkeypatch):
    """The shell leaves it alone behind `=`."""
    monkeypatch.setenv("HOME", "/home/me")
    values = parsed(
        "--config.decoder.path=~/decoder",
        "--config.method.start=~/run/checkpoints/1",
        "--config.data.sources=('files:~/a/*.txt', 'lines:~/b', 'files:a~/~')",
        "--config.data.token_files=~",
        "--config.method.prompt_end=~",
        "--workdir=~/run",
        "--prompt=~/bin is",
        "--text=qa_steps-1:~/q.jsonl",
        "--held_out=qa:hf:~/sums:test:question,answer",
        workdir=(REQUIRED, ""),
        text=("", ""),
        held_out=("", ""),
        prompt=("", ""),
    )
    config = values.config
    assert (config.decoder.path, config.method.start) == (
        "/home/me/decoder",
        "/home/me/run/checkpoints/1",
    )
    assert config.data.sources == ("files:/home/me/a/*.txt", "lines:/home/me/b", "files:a~/~")
    assert values.text == "qa_steps-1:/home/me/q.jsonl"
    assert values.held_out == "qa:hf:/home/me/sums:test:question,answer"
    assert (config.data.token_files, values.workdir, values.prompt) == (
        "/home/me",
        "/home/me/run",
        "~/bin is",
    )
    assert config.method.prompt_end == "~", "a text"
    found = []
    command(found.append, "~/a", "b", folders=(FOLDERS, ""))
    assert found[0].folders == ["/home/me/a", "b"]
    refused = command(found.append, "--folders=~/a", "b", folders=(FOLDERS, ""))
    named(refused, "--folders", "no such flag")


def test_config_files_work_from_anywhere(command, tmp_path, monkeypatch):
    """Though `from configs import base` is of the repository's root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    found = []
    assert not command(found.append, f"--config={ROOT}/configs/quickstart.py", config=(CONFIG, ""))
    assert found[0].config.method.num_latents == 8


def test_a_store_that_does_not_answer_has_an_exit_code_of_its_own(command, capsys):
    def main(values):
        raise Outage(errno.ECONNABORTED, "UNAVAILABLE: later", "gs://bucket/run")

    assert command(main) == 69
    (line,) = capsys.readouterr().err.splitlines()
    named(line, "error: gs://bucket/run", "UNAVAILABLE")


HALTED = "INTERNAL: Core halted unexpectedly: Accelerator device halted prematurely"
BUSY = "Unable to initialize backend 'tpu': open(/dev/vfio/0): Device or resource busy"


@pytest.mark.parametrize(
    "error, code",
    [
        (jax.errors.JaxRuntimeError(HALTED), 69),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the TPU went away"), 69),
        (RuntimeError(BUSY), 69),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable"), 69),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None),
    ],
)
def test_a_device_that_fails_has_an_exit_code_of_its_own(command, capsys, error, code):
    """A launcher takes a halted chip for a mistake, and gives the slice away."""

    def main(values):
        raise error

    ended = command(main)
    said = capsys.readouterr().err
    if code is None:
        assert "device failed" not in ended + said
        return
    assert ended == code
    (line,) = said.splitlines()
    named(line, "error: a device failed", str(error), "run again to resume")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            ["No space left", "writing to --out=OUT"],
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), ["a/b: No space left"]),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), ["a/b: is a folder"]),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ["Broken pipe", "writing to --out=OUT"]),
        (
            jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 1941357084896 bytes."
            ),
            ["out of device memory", "1,808.0 GiB", "config.train.accumulation"],
        ),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: Error dispatching: Out of memory allocating 1073741824 bytes."
            ),
            ["out of device memory", "1.0 GiB"],
        ),
        (
            OSError("HTTPSConnectionPool: Max retries exceeded"),
            ["HTTPSConnectionPool", "Max retries"],
        ),
        (MemoryError("Unable to allocate 9 GiB"), ["out of memory", "9 GiB"]),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(command, monkeypatch, error, words):
    monkeypatch.setenv("JAX_PLATFORMS", "foo")

    def main(values):
        raise error

    line = command(main, "--out=OUT", out=("", ""))
    assert line.startswith("error: ") and "\n" not in line
    named(line, *words)
    assert ("writing" in line) == ("writing" in words[-1])


@pytest.mark.parametrize(
    "platform, raised, words",
    [
        ("cuda", "assert False", "no such platform"),  # all that JAX has without the plug-in
        ("foo", "raise RuntimeError('Not known. (set JAX_PLATFORMS=...)')", "Not known"),
    ],
)
def test_a_platform_that_is_not_there(command, monkeypatch, platform, raised, words):
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    fails = compile(raised, "jax/_src/xla_bridge.py", "exec")
    named(command(lambda values: exec(fails)), f"error: JAX_PLATFORMS={platform}", words)


def test_a_bug_is_not_called_a_mistake(command):
    with pytest.raises(AssertionError):
        command(lambda values: exec("assert False"))


def test_a_file_where_a_folder_is_expected(command, tmp_path):
    (tmp_path / "file").write_text("")
    for below in ("", "below"):
        line = command(lambda values, path=tmp_path / "file" / below: path.mkdir())
        named(line, f"error: {tmp_path / 'file'}: is a file")


def test_a_closed_pipe_ends_a_command_without_a_word(command, capsys):
    """`--help | head -1`, and what a command prints."""
    for arguments in (["--help"], []):
        reader, writer = os.pipe()
        os.close(reader)
        pipe = os.fdopen(writer, "w")
        with contextlib.redirect_stdout(pipe):
            assert command(lambda values: print("found"), *arguments) == 141
        with contextlib.suppress(BrokenPipeError):
            pipe.close()  # Python 3.13 tells of what is left in it
    assert capsys.readouterr() == ("", "")


def test_text_that_the_terminal_cannot_show(command):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, "ascii")
    with contextlib.redirect_stdout(terminal):
        assert command(lambda values: print("déjà vu")) is None
    assert written.getvalue() == rb"d\xe9j\xe0 vu" + b"\n"


def test_what_libraries_warn_of_is_told_but_for_what_they_say_of_every_run(
    command, monkeypatch, capsys
):
    def main(values):
        absl, error = logging.getLogger("absl"), logging.ERROR
        absl.warning("Requested `tracked_metric` is not there")
        for said in ("Failed to run 5 Handler Commit operations", "bad task"):
            absl.log(error, said)
        absl.warning("%d", "a library's own mistake, which logging tells of")
        logging.getLogger("orbax").warning("the store is slow")

    # some library may have made one as it was imported
    for handlers in ([], [logging.StreamHandler()]):
        monkeypatch.setattr(logging.root, "handlers", handlers)
        assert command(main) is None
        said = capsys.readouterr().err
        assert "the store is slow\n" in said and "bad task\n" in said
        assert "tracked_metric" not in said and "Handler Commit" not in said


def test_ctrl_c_during_imports(tmp_path):
    """Some package drops KeyboardInterrupt: the command ends all the same, and without a word."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
        "except KeyboardInterrupt:\n    pass\nos._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "latent_delib.train"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


INTERRUPTED = """
import atexit
from latent_delib.machine import commands

def main(values):
    raise KeyboardInterrupt

atexit.register(print, "cleaned up")
commands.run(main, "")
"""


def test_ctrl_c_leaves_without_the_clean_up_at_exit():
    """In which jax crashes now and then, after a compile that was interrupted."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_that_python_drops(command):
    class Dropped:
        def __del__(self):
            raise KeyboardInterrupt

    def main(values):
        dropped = Dropped()
        del dropped
        time.sleep(5)

    assert command(main) == 130


def test_a_config_by_name(command):
    found = []
    assert command(found.append, "--config=paper:lab/overlay_32", config=(CONFIG, "")) is None
    assert found[0].config.method.num_latents == 32
    named(
        command(found.append, "--config=quick", config=(CONFIG, "")),
        "--config=quick: no such file; known names: base, coconut, gemma2_2b",
        "quickstart",
    )
    named(
        command(found.append, "--config=quickstart:lab", config=(CONFIG, "")),
        "--config=quickstart:lab: takes no argument; leave out :lab",
    )


def test_the_package_runs_its_commands(command_line, monkeypatch):
    class Replaced(Exception):
        pass

    def execv(program, arguments):
        raise Replaced(program, *arguments)

    monkeypatch.setattr(os, "execv", execv)
    command_line("latent-delib", "train", "--workdir=w")
    with pytest.raises(Replaced) as replaced:
        runpy.run_module("latent_delib", run_name="__main__")
    python = sys.executable
    assert replaced.value.args == (python, python, "-m", "latent_delib.train", "--workdir=w")
    command_line("latent-delib", "trian", "--workdir=w")
    with pytest.raises(SystemExit, match="trian: no such command; there are benchmark, convert, "):
        runpy.run_module("latent_delib", run_name="__main__")


def test_the_package_lists_its_commands(command_line, capsys):
    command_line("latent_delib")
    runpy.run_module("latent_delib", run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    names = ("train", "evaluate", "generate", "prepare", "convert", "benchmark", "report")
    assert sorted(line[2] for line in lines) == sorted(f"latent_delib.{name}" for name in names)
    assert all(len(line) > 6 for line in lines), "what each does"
