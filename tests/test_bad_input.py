"""A user's mistake ends each command in one line that names the thing, before anything is trained."""

import errno
import io
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import latent_delib
from latent_delib.errors import Outage
from latent_delib.machine import commands
from tests.processes import free_port

ARCHITECTURE = {
    "num_layers": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 48,
    "vocab_size": 4096,
}


@pytest.fixture
def error(monkeypatch, capsys):
    """error(command, *arguments) -> the one line that command ends with, run as `python -m` runs it."""

    def run(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command, *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a command sets it
        monkeypatch.delitem(sys.modules, f"latent_delib.{command}", raising=False)  # or runpy warns
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(f"latent_delib.{command}", run_name="__main__")
        line, said = str(exit_.value.code), capsys.readouterr()
        assert line.startswith("error: ") and "\n" not in line, line
        assert "Traceback" not in said.out + said.err
        assert "step 1/" not in said.out and "evaluated" not in said.out
        return line

    return run


@pytest.fixture
def command(monkeypatch):
    """command(main, *arguments, **options) -> what a command with this main exits with, or None."""

    def run(main, *arguments, **options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.setattr(os, "_exit", sys.exit)
        try:
            commands.run(main, "", **options)
        except SystemExit as exit_:
            return exit_.code

    return run


@pytest.fixture
def parsed(command, config_file):
    """parsed(*arguments, **options) -> the values of a command with a config file, and with these options."""

    def run(*arguments, **options):
        found = []
        options = {"config": (commands.CONFIG, "")} | options
        assert command(found.append, f"--config={config_file()}", *arguments, **options) is None
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


def test_a_leading_tilde_is_the_home_folder(parsed, command, monkeypatch):
    """The shell leaves it alone behind `=`."""
    monkeypatch.setenv("HOME", "/home/me")
    values = parsed(
        "--config.decoder.path=~/decoder",
        "--config.method.start=~/run/checkpoints/1",
        "--config.data.sources=('files:~/a/*.txt', 'lines:~/b', 'files:a~/~')",
        "--config.data.token_files=~",
        "--workdir=~/run",
        "--prompt=~/bin is",
        workdir=(commands.REQUIRED, ""),
        prompt=("", ""),
    )
    config = values.config
    assert (config.decoder.path, config.method.start) == ("/home/me/decoder", "/home/me/run/checkpoints/1")
    assert config.data.sources == ("files:/home/me/a/*.txt", "lines:/home/me/b", "files:a~/~")
    assert (config.data.token_files, values.workdir, values.prompt) == ("/home/me", "/home/me/run", "~/bin is")
    found = []
    command(found.append, "~/a", "b", folders=(commands.FOLDERS, ""))
    assert found[0].folders == ["/home/me/a", "b"]
    refused = command(found.append, "--folders=~/a", "b", folders=(commands.FOLDERS, ""))
    assert refused == "error: --folders: no such flag; there are DIR"


def test_config_files_work_from_anywhere(command, tmp_path, monkeypatch):
    """Though `from configs import base` is of the repository's root."""
    root = str(Path(commands.__file__).parents[2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", root)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    found = []
    assert not command(found.append, f"--config={root}/configs/quickstart.py", config=(commands.CONFIG, ""))
    assert found[0].config.method.num_latents == 8


def test_a_store_that_does_not_answer_has_an_exit_code_of_its_own(command, capsys):
    def main(values):
        raise Outage(errno.ECONNABORTED, "UNAVAILABLE: later", "gs://bucket/run")

    assert command(main) == 69
    assert capsys.readouterr().err == "error: gs://bucket/run: UNAVAILABLE: later; run again to go on\n"


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device, writing to --out=OUT or"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error: a/b: No space left on device"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/b"), "error: a/b: is a folder, expected a file"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: Broken pipe, writing to --out=OUT or standard output"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1941357084896 bytes."),
            "error: out of device memory: 1,808.0 GiB asked for at once; take fewer rows at once",
        ),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Error dispatching: Out of memory allocating 1073741824 bytes."),
            "error: out of device memory: 1.0 GiB asked for at once;",
        ),
        (OSError("HTTPSConnectionPool: Max retries exceeded"), "error: HTTPSConnectionPool: Max retries exceeded"),
        (MemoryError("Unable to allocate 9 GiB"), "error: out of memory: Unable to allocate 9 GiB"),
        (
            RuntimeError(
                "Unable to initialize backend 'foo': Backend 'foo' is not known: ['cpu']. (set JAX_PLATFORMS="
            ),
            "error: JAX_PLATFORMS=foo: Backend 'foo' is not known: ['cpu']; unset it, or install what it needs",
        ),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(command, monkeypatch, error, said):
    monkeypatch.setenv("JAX_PLATFORMS", "foo")

    def main(values):
        raise error

    code = command(main, "--out=OUT", out=("", ""))
    assert code == said or code.startswith(said)
    assert "\n" not in str(code) and ("writing" in str(code)) == ("writing" in str(said))


def test_a_platform_without_its_plug_in(command, monkeypatch):
    """Where all that JAX has is an assertion."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    fails = compile("assert False", "jax/_src/xla_bridge.py", "exec")
    assert command(lambda values: exec(fails)).startswith("error: JAX_PLATFORMS=cuda: JAX finds no such platform here;")


def test_a_bug_is_not_called_a_mistake(command):
    with pytest.raises(AssertionError):
        command(lambda values: exec("assert False"))


def test_a_file_where_a_folder_is_expected(command, tmp_path):
    (tmp_path / "file").write_text("")
    for below in ("", "below"):
        code = command(lambda values, path=tmp_path / "file" / below: path.mkdir())
        assert code == f"error: {tmp_path / 'file'}: is a file, expected a folder"


def test_a_closed_pipe_ends_a_command_without_a_word(command, monkeypatch, capsys):
    """`--help | head -1`, and what a command prints."""
    for arguments in (["--help"], []):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
        assert command(lambda values: print("found"), *arguments) == 141
        monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_text_that_the_terminal_cannot_show(command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert command(lambda values: print("déjà vu")) is None
    assert written.getvalue() == rb"d\xe9j\xe0 vu" + b"\n"


def test_what_libraries_warn_of_is_told_but_for_what_they_say_of_every_run(command, monkeypatch, capsys):
    def main(values):
        absl, error = logging.getLogger("absl"), logging.ERROR
        absl.warning("Requested `tracked_metric` is not there")
        for said in ("Failed to run 5 Handler Commit operations", "bad task"):
            absl.log(error, said)
        absl.warning("%d", "a library's own mistake, which logging tells of")
        logging.getLogger("orbax").warning("the store is slow")

    for handlers in ([], [logging.StreamHandler()]):  # some library may have made one as it was imported
        monkeypatch.setattr(logging.root, "handlers", handlers)
        assert command(main) is None
        said = capsys.readouterr().err
        assert "the store is slow\n" in said and "bad task\n" in said
        assert "tracked_metric" not in said and "Handler Commit" not in said


def test_ctrl_c_during_imports(tmp_path):
    """Some package drops KeyboardInterrupt: the command ends all the same, and without a word."""
    (tmp_path / "jax.py").write_text(
        "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
        "except KeyboardInterrupt:\n    pass\nos._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "latent_delib.train"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_leaves_without_the_clean_up_at_exit(monkeypatch):
    """In which jax crashes now and then, after a compile that was interrupted."""
    left = []
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(os, "_exit", left.append)

    def main(values):
        raise KeyboardInterrupt

    commands.run(main, "")
    assert left == [130]


def test_ctrl_c_that_python_drops(command):
    class Dropped:
        def __del__(self):
            raise KeyboardInterrupt

    def main(values):
        dropped = Dropped()
        del dropped
        time.sleep(5)

    assert command(main) == 130


def test_the_package_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latent_delib"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    runpy.run_module("latent_delib", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[2:]
    sources = {path.stem: path.read_text() for path in Path(latent_delib.__file__).parent.glob("*.py")}
    mains = [name for name, source in sources.items() if '\nif __name__ == "__main__":' in source]
    assert sorted(line.split()[2] for line in lines) == sorted(
        f"latent_delib.{name}" for name in mains if name != "__main__"
    )
    assert all(len(line.split()) > 6 for line in lines)


def named(line, *words):
    for word in words:
        assert str(word) in line, line


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.train.stepz=3", ["--config.train.stepz: no such key; did you mean --config.train.steps?"]),
        ("--config.optimiser.b1=0.5", ["--config.optimiser.b1: no such key; did you mean --config.optimizer.b1?"]),
        ("--config.train.b1=0.5", ["--config.train.b1: no such key; did you mean --config.optimizer.b1?"]),
        ("--config.xyz=0.5", ["--config.xyz: no such key; the config file and configs/base.py declare all"]),
        ("--confg.train.steps=3", ["--confg.train.steps: no such flag; did you mean --config.train.steps?"]),
        ("--work_dir=w", ["--work_dir: no such flag; did you mean --workdir?"]),
        ("--xyz=w", ["--xyz: no such flag; there are --config, --workdir"]),
        ("--config.method.coprocessor.num_layers=2", ["method.coprocessor is empty", "\"{'num_layers': ...}\""]),
        ("--config.train.steps=many", ["--config.train.steps=many: expected a whole number, found 'many'"]),
        ("--config.train.steps=1.5", ["--config.train.steps=1.5: expected a whole number, found '1.5'"]),
        ("--config.train.steps=1e3", ["expected a whole number, found '1e3'"]),
        ("--config.train.steps=9999999999", ["config.train.steps=9999999999: expected less than 2**31"]),
        ("--config.optimizer.b1=high", ["--config.optimizer.b1=high: expected a number, found 'high'"]),
        ("--config.evaluate.swap=maybe", ["--config.evaluate.swap=maybe: expected True or False, found 'maybe'"]),
        ("--dry_run=maybe", ["--dry_run=maybe: expected True or False, found 'maybe'"]),
        ("--config.data.sources=files:a,files:b", ["expected one value, or several like \"('A', 'B')\""]),
        ("--config.data.max_bad_records=-1", ["config.data.max_bad_records", "-1", "at least 0"]),
        ("--config.data.weights=abc", ["config.data.weights", "'abc'", "number"]),
        ("--config.method.start=nowhere/checkpoints/3", ["config.method.start=nowhere/checkpoints/3: holds no check"]),
        ("--config.method.name=coprocesor", ["config.method.name='coprocesor'", "cache_augmentation"]),
        ("--config.method.placement=beside", ["config.method.placement='beside'", "overlay"]),
        ("--config.compute.dtype=float16", ["config.compute.dtype='float16'", "bfloat16"]),
        ("--config.compute.remat=some", ["config.compute.remat='some'", "dots"]),
        ("--config.train.steps=0", ["config.train.steps=0"]),
        ("--config.optimizer.b2=1", ["config.optimizer.b2=1", "less than 1"]),
        ("--config.optimizer.final_fraction=-1", ["config.optimizer.final_fraction=-1", "0 to 1"]),
        ("--config.data.token_files=s4://nowhere/tokens", ["s4://nowhere/tokens"]),
        ("--config.train.profile_at=2", ["config.train.profile_at=2", "steps=4"]),
        ("--config.train.keep_every=-1", ["config.train.keep_every=-1"]),
        ("--config.train.keep_best=-1", ["config.train.keep_best=-1"]),
        ("--config.train.max_bad_steps=-1", ["config.train.max_bad_steps=-1"]),
        ("--config.compute.attention=flash", ["config.compute.attention='flash'", "pallas_tpu"]),
        ("--config.optimizer.learning_rate=-1", ["config.optimizer.learning_rate=-1"]),
        ("--config.optimizer.learning_rate=nan", ["config.optimizer.learning_rate=nan"]),
        ("--config.optimizer.learning_rate=inf", ["config.optimizer.learning_rate=inf: expected a finite number"]),
        ("--config.seed=-1", ["config.seed=-1"]),
        ("--config.data.seq_len=4", ["config.data.seq_len=4", "2 latents + 3 ahead"]),
        ("--config.data.seq_len=64", ["config.data.token_files", "32", "64"]),
        ("--config.method.num_traces=32", ["config.method.num_traces=32", "config.data.seq_len=32"]),
        ("--config.train.accumulation=3", ["config.train.accumulation=3", "batch_size=8"]),
        ("--config.train.batch_size=12", ["config.train.batch_size=12", "data=8"]),
        ("--config.train.accumulation=2", ["config.train.batch_size=8", "2 parts"]),
        ("--config.mesh.data=3", ["the mesh axes multiply to 3: expected 8"]),
        ("--config.mesh.tensor=4", ["config.mesh.tensor=4", "num_kv_heads=2"]),
        ("--config.mesh.model=2", ["config.mesh.model"]),
        ("--config.decoder.path=nowhere", ["'nowhere'", "config.json"]),
        ("--config.decoder.tokenizer=no.model", ["tokenizer no.model", "does not exist"]),
        ("--config.data.token_files=no_tokens", ["config.data.token_files", "no_tokens/meta.json"]),
        ("--config.data.sources=()", ["config.data.sources", "empty"]),
        ("--config.data.weights=(1.0,2.0)", ["config.data.weights has 2", "config.data.sources 1"]),
        ("--config.data.weights=(0.0,)", ["config.data.weights", "0.0"]),
        ("--config.data.sources=('files:other',)", ["'files:other'", "is not in"]),
        ("--config.data.validation=('packaged/valid',)", ["unknown source 'packaged/valid'", "packaged/validation"]),
        ("train.py", ["'train.py'", "--workdir"]),
        ("--configg=3", ["--configg: no such flag; did you mean --config?"]),
    ],
)
def test_train_refuses(error, config_file, tmp_path, capsys, argument, words):
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}", argument)
    named(line, *words)


def test_nothing_is_compiled_for_bad_data(error, config_file, tmp_path, monkeypatch):
    """On a real machine the compile takes minutes."""

    def compiles(*args, **kwargs):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)
    for argument in ("--config.data.token_files=no_tokens", "--config.data.sources=()"):
        named(error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'w'}", argument), "config.data")


def test_config_files_and_flags(error, config_file, tmp_path):
    named(error("train", "--config=no.py", "--workdir=w"), "--config=no.py", "no such file")
    named(error("train", f"--config={config_file()}"), "--workdir is missing")
    named(error("train", f"--config={config_file()}", "--workdir="), "--workdir is missing")
    named(error("train", "--workdir=w"), "--config is missing")
    named(error("train", "--config.train.steps=3", "--workdir=w"), "--config is missing")
    broken = tmp_path / "broken.py"
    for text, words in (
        ("def get_config():\n    return 1 / 0\n", "broken.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:\n", "broken.py, line 1: "),
        ("\0", "broken.py: source code string cannot contain null bytes"),
        ("def get_config():\n    return {}\n", "broken.py: get_config() returns dict, expected a ConfigDict"),
        ("from configs import base\n", "broken.py: defines no get_config()"),
        (
            "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.train.stpes = 3\n",
            'broken.py, line 6: AttributeError: Key "stpes" does not exist and cannot be added since the config is '
            'locked. Did you mean "steps" instead of "stpes"?',
        ),
    ):
        broken.write_text(text)
        named(error("train", f"--config={broken}", "--workdir=w"), words)
        named(error("train", "--config", str(broken), "--workdir=w"), words)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("embed_dim", 30, ["embed_dim=30", "num_heads=4"]),
        ("num_kv_heads", 3, ["num_heads=4", "num_kv_heads=3"]),
        ("head_dim", 7, ["head_dim=7", "even"]),
        ("activation", "relu", ["activation='relu'", "gelu"]),
        ("layer_pattern", ("local",), ["window=0"]),
        ("num_layers", 0, ["num_layers=0"]),
        ("num_layers", "four", ["num_layers='four'", "int"]),
        ("post_norms", "yes", ["post_norms='yes'", "bool"]),
        ("layer_pattern", "local", ["layer_pattern='local'", "tuple"]),
        ("rope_base", None, ["rope_base=None", "float"]),
        ("width", 3, ["unknown", "width", "embed_dim"]),
        ("vocab_size", 100, ["config.decoder.tokenizer", "4096 pieces", "100"]),
    ],
)
def test_architectures_that_do_not_fit(error, tmp_path, field, value, words):
    path = tmp_path / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom configs import base\n\n\ndef get_config():\n"
        "    c = base.get_config()\n    c.decoder.path = ''\n"
        f"    c.decoder.architecture = ConfigDict({ARCHITECTURE | {field: value}!r})\n    return c\n"
    )
    named(error("train", f"--config={path}", f"--workdir={tmp_path / 'w'}"), "config.decoder", *words)


def test_an_architecture_other_than_the_folder_s(error, tmp_path, decoder_folder):
    path = tmp_path / "config.py"
    path.write_text(
        "from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n"
        f"    c.decoder.path = {str(decoder_folder)!r}\n    c.decoder.architecture.num_layers = 5\n    return c\n"
    )
    line = error("train", f"--config={path}", f"--workdir={tmp_path / 'w'}")
    named(line, "config.decoder.architecture", decoder_folder, "num_layers=4, expected 5")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", None, ["config.json does not exist"]),
        ("model.safetensors", None, ["model.safetensors does not exist"]),
        ("config.json", b"{", ["config.json", "not JSON"]),
        ("config.json", b"[]", ["config.json", "holds list", "an object"]),
        ("config.json", b'{"format": "other"}', ["config.json", "'other'"]),
        ("config.json", b'{"format": "latent_delib decoder 1"}', ["config.json", "num_layers is missing"]),
        ("config.json", b"\xff\xfe", ["config.json", "not JSON"]),
        ("tokenizer.model", b"not a model", ["tokenizer.model", "not a SentencePiece model"]),
        ("tokenizer.model", b"", ["tokenizer.model", "not a SentencePiece model"]),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", ["model.safetensors", "has 10 bytes", "fingerprint.json"]),
    ],
)
def test_decoder_folders_that_are_broken(error, config_file, decoder_folder, tmp_path, name, content, words):
    broken = tmp_path / "decoder"
    shutil.copytree(decoder_folder, broken)
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_bytes(content)
    config = config_file({"decoder.path": str(broken), "decoder.tokenizer": ""})
    if name == "tokenizer.model":  # its checksum is looked at first where token files are read
        config = config_file({"decoder.path": str(broken)})
    named(error("train", f"--config={config}", f"--workdir={tmp_path / 'w'}"), broken, *words)


def test_a_checkpoint_of_another_decoder_or_method(error, config_file, trained, make_decoder, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    before = sorted(p for p in workdir.rglob("*"))
    for changes, words in (
        ({"decoder.path": str(make_decoder(2))}, "decoder.fingerprint is "),
        ({"method.name": "pause_tokens"}, "method.name is 'cache_augmentation' there, 'pause_tokens' here"),
        ({"method.num_latents": 1}, "method.num_latents is 2 there, 1 here"),
        ({"method.placement": "overlay"}, "method.placement is 'after' there, 'overlay' here"),
    ):
        for command in ("train", "evaluate"):
            line = error(command, f"--config={config_file(changes)}", f"--workdir={workdir}")
            named(line, f"{workdir}: ", words, "or another --workdir")
    for changes, words in (
        ({"seed": 1}, "seed is 0 there, 1 here; use that, or another --workdir"),
        ({"train.batch_size": 16}, "train.batch_size is 8 there, 16 here; use that"),
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate is 0.01 there, 0.5 here; use that"),
        ({"method.num_ahead": 2}, "method.num_ahead is 3 there, 2 here; use that"),
    ):
        line = error("train", f"--config={config_file(changes)}", f"--workdir={workdir}")
        named(line, f"{workdir}: ", words)
    assert sorted(p for p in workdir.rglob("*")) == before


def test_a_workdir_that_cannot_be_written(error, config_file, tmp_path):
    (tmp_path / "file").write_text("a regular file")
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'file' / 'workdir'}")
    named(
        line, tmp_path / "file" / "workdir", "cannot be written", f"{tmp_path / 'file'}: is a file, expected a folder"
    )
    assert (tmp_path / "file").read_text() == "a regular file"


def test_workdirs_elsewhere(error, config_file):
    config = f"--config={config_file()}"
    named(error("train", config, "--workdir=s3://bucket/run"), "s3://bucket/run", "gs://BUCKET/PATH")
    for changes in ({"method.name": "decoder"}, {"train.profile_at": 1}):
        line = error("train", f"--config={config_file(changes)}", "--workdir=gs://bucket/run")
        named(line, "gs://bucket/run", "local folders only")


def test_a_checkpoints_folder_that_cannot_be_written(error, config_file, tmp_path):
    """As root nothing is read-only: the folder's name is taken by a file."""
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / "checkpoints").write_text("")
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}")
    named(line, tmp_path / "workdir", "checkpoints: is a file, expected a folder")


def test_processes_that_are_not_there(error, config_file, trained, tmp_path, monkeypatch):
    """Found out before jax looks for its devices; evaluation waits for them as training does."""
    config = f"--config={config_file()}"
    named(error("train", config, f"--workdir={tmp_path}", "--distributed"), "--distributed", "JAX_COORDINATOR_ADDRESS")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address := f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    line = error("train", config, f"--workdir={tmp_path}", "--distributed", "--start_timeout=1")
    named(line, "2 of 3 processes did not connect", address, "within 1 s", "number 1, 2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    line = error("evaluate", config, f"--workdir={trained}", "--distributed", "--start_timeout=1")
    named(line, "process 0 does not answer", address, "within 1 s")


def test_a_second_job(error, config_file, tmp_path):
    from latent_delib import train

    with train.exclusive(str(tmp_path / "workdir")):
        line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}")
    named(line, tmp_path / "workdir", "in use by another job", os.getpid())


def test_evaluate_and_generate_need_a_checkpoint(error, config_file, trained, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    config = config_file()
    for workdir, words in (("nowhere", "holds no checkpoints"), ("empty", "holds no checkpoints")):
        at = tmp_path / workdir
        named(error("evaluate", f"--config={config}", f"--workdir={at}"), at, words)
        named(error("generate", f"--workdir={at}", "--prompt=the cat"), f"error: {at}: ", words)
    named(error("generate", f"--workdir={trained}", "--prompt=a", "--step=3"), "no checkpoint of step 3", "[2, 4]")
    named(error("evaluate", f"--config={config}", f"--workdir={trained}", "--step=3"), "no checkpoint of step 3")
    assert not (tmp_path / "nowhere").exists()


def test_generate_refuses(error, trained):
    for arguments in ([], ["--prompt="], ["--prompt=a", "--prompts=FILE"]):
        named(error("generate", f"--workdir={trained}", *arguments), "--prompt=TEXT or --prompts=FILE, one of them")
    for argument in ("max_new_tokens=0", "temperature=-1.0", "top_k=-1", "top_p=0.0", "batch_size=0"):
        named(error("generate", "--workdir=nowhere", "--prompt=a", f"--{argument}"), f"error: {argument}: expected")
    for arguments, words in (
        (["--every=-1"], "every=-1: expected at least 0"),
        (["--delay=-1"], "delay=-1: expected at least 0"),
        (["--every=2", "--delay=2"], "delay=2: expected less than every=2"),
    ):
        named(error("generate", "--workdir=nowhere", "--prompt=a", *arguments), words)
    named(error("generate", f"--workdir={trained}", "--prompt=a", "--top_p=high"), "top_p", "high")
    named(error("generate", f"--workdir={trained}", "--prompt=a", "--seed=-1"), "--seed=-1", "expected at least 0")
    named(
        error("generate", f"--workdir={trained}", "--prompt=a", "--max_length=8"),
        "prompts[0]",
        "more than max_length=8",
    )


@pytest.mark.parametrize(
    "lines, said",
    [
        ("", ["holds no prompts"]),
        ('{"prompt": "a"}\n{"prompt": \n', [":2: not JSON, expected", '{"prompt": TEXT}']),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", [":1: not JSON"]),
        ('\ufeff{"prompt": "a", "seed": true}', [":1: seed=True: expected a whole number"]),  # the mark is no mistake
        ('{"prompt": "a"}\n\n', [":2:", "JSON"]),
        ('["a"]\n', [":1:", '"prompt"']),
        ('{"prompt": ""}\n', [":1:", '"prompt"']),
        ('{"prompt": "a", "seed": -1}\n', [":1: seed=-1: expected at least 0"]),
        (
            '{"prompt": "a", "seed": 9223372036854775808}\n',
            [":1: seed=9223372036854775808: expected at most 9223372036854775807"],
        ),
        (b"\xff", ["not UTF-8 at byte 0"]),
        (None, ["No such file"]),
    ],
)
def test_generate_refuses_a_file_of_prompts(lines, said, error, trained, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    named(error("generate", f"--workdir={trained}", f"--prompts={path}", f"--out={tmp_path}/o"), str(path), *said)


def test_evaluate_refuses_bad_validation_data(error, config_file, trained):
    at = f"--workdir={trained}"
    named(error("evaluate", f"--config={config_file({'data.validation': ()})}", at), "config.data.validation", "empty")
    named(error("evaluate", f"--config={config_file({'evaluate.batch_size': 3})}", at), "config.evaluate.batch_size=3")
    line = error("evaluate", f"--config={config_file({'data.token_files': 'no_tokens'})}", at)
    named(line, "config.data.token_files", "no_tokens")


def test_a_real_process_prints_one_line_and_exits_1(config_file, tmp_path):
    command = [sys.executable, "-m", "latent_delib.train", f"--config={config_file()}", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run([*command, "--config.train.stepz=3"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --config.train.stepz: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "w").exists()


def test_a_config_is_refused_before_any_text_is_read(error, config_file, tmp_path, monkeypatch):
    """And before TensorFlow is imported."""
    monkeypatch.setitem(sys.modules, "latent_delib.data.tasks", None)
    for argument, words in (
        ("--config.train.steps=0", "config.train.steps=0: expected at least 1"),
        ("--config.data.sources=()", "config.data.sources: empty"),
    ):
        named(error("prepare", f"--config={config_file()}", f"--out={tmp_path / 'out'}", argument), words)
