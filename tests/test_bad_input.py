"""A user's mistake ends each command in one line that names the thing, before anything is trained."""

import errno
import logging
import os
import runpy
import shutil
import subprocess
import sys

import pytest

from latent_delib import commands
from latent_delib.errors import Outage
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

    yield run
    logging.disable(logging.NOTSET)


def test_a_store_that_does_not_answer_has_an_exit_code_of_its_own(monkeypatch, capsys):
    def main(values):
        raise Outage(errno.ECONNABORTED, "UNAVAILABLE: later", "gs://bucket/run")

    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit_:
        commands.run(main, "")
    logging.disable(logging.NOTSET)
    assert exit_.value.code == 69
    assert capsys.readouterr().err == "error: gs://bucket/run: UNAVAILABLE: later; run again to go on\n"


def named(line, *words):
    for word in words:
        assert str(word) in line, line


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.train.stepz=3", ["config.train.stepz"]),
        ("--config.optimiser.b1=0.5", ["config.optimiser.b1"]),
        ("--config.train.steps=many", ["steps", "many"]),
        ("--config.train.steps=1.5", ["steps", "1.5"]),
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
        ("--config.seed=-1", ["config.seed=-1"]),
        ("--config.data.seq_len=4", ["config.data.seq_len=4", "2 latents + 3 ahead"]),
        ("--config.data.seq_len=64", ["config.data.token_files", "32", "64"]),
        ("--config.method.num_traces=32", ["config.method.num_traces=32", "config.data.seq_len=32"]),
        ("--config.train.accumulation=3", ["config.train.accumulation=3", "batch_size=8"]),
        ("--config.train.batch_size=12", ["config.train.batch_size=12", "data=8"]),
        ("--config.train.accumulation=2", ["config.train.batch_size=8", "2 parts"]),
        ("--config.mesh.data=3", ["config.mesh", "'data': 3", "8 devices"]),
        ("--config.mesh.tensor=4", ["config.mesh.tensor=4", "num_kv_heads=2"]),
        ("--config.mesh.model=2", ["config.mesh.model"]),
        ("--config.decoder.path=nowhere", ["'nowhere'", "config.json"]),
        ("--config.decoder.tokenizer=no.model", ["tokenizer no.model", "does not exist"]),
        ("--config.data.token_files=no_tokens", ["config.data.token_files", "no_tokens/meta.json"]),
        ("--config.data.sources=()", ["config.data.sources", "empty"]),
        ("--config.data.weights=(1.0,2.0)", ["config.data.weights has 2", "config.data.sources 1"]),
        ("--config.data.weights=(0.0,)", ["config.data.weights", "0.0"]),
        ("--config.data.sources=('files:other',)", ["'files:other'", "is not in"]),
        ("--config.data.validation=('packaged/valid',)", ["'packaged/valid'", "did you mean 'packaged/validation'?"]),
        ("train.py", ["'train.py'", "--workdir"]),
        ("--configg=3", ["configg"]),
    ],
)
def test_train_refuses(error, config_file, tmp_path, capsys, argument, words):
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}", argument)
    named(line, *words)


def test_nothing_is_compiled_for_bad_data(error, config_file, tmp_path, monkeypatch):
    """On a real machine the compile takes minutes."""
    import jax

    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: type("Step", (), {"lower": None})())
    for argument in ("--config.data.token_files=no_tokens", "--config.data.sources=()"):
        named(error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'w'}", argument), "config.data")


def test_config_files_and_flags(error, config_file, tmp_path):
    named(error("train", "--config=no.py", "--workdir=w"), "--config=no.py", "no such file")
    named(error("train", f"--config={config_file()}"), "--workdir is missing")
    named(error("train", f"--config={config_file()}", "--workdir="), "--workdir is missing")
    named(error("train", "--workdir=w"), "--config is missing")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    named(error("train", f"--config={broken}", "--workdir=w"), "division by zero")
    named(error("train", "--config", str(broken), "--workdir=w"), "division by zero")


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
        ("config.json", b'{"format": "latent_delib decoder 1"}', ["config.json", "missing fields", "num_layers"]),
        ("config.json", b"\xff\xfe", ["config.json", "not JSON"]),
        ("tokenizer.model", b"not a model", ["tokenizer.model", "not a SentencePiece model"]),
        ("tokenizer.model", b"", ["tokenizer.model", "not a SentencePiece model"]),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", ["model.safetensors", "not a whole"]),
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
    for changes, key in (
        ({"decoder.path": str(make_decoder(2))}, "fingerprint="),
        ({"method.name": "pause_tokens"}, "method.name=cache_augmentation, this config has pause_tokens"),
        ({"method.num_latents": 1}, "method.num_latents=2, this config has 1"),
        ({"method.placement": "overlay"}, "method.placement=after, this config has overlay"),
    ):
        for command in ("train", "evaluate"):
            line = error(command, f"--config={config_file(changes)}", f"--workdir={workdir}")
            named(line, workdir, "its checkpoint has " + key)
    for changes, words in (
        ({"seed": 1}, ["config.seed=1:", "was started with 0; use that, or another --workdir"]),
        ({"train.batch_size": 16}, ["config.train.batch_size=16:", "was started with 8; use that"]),
        ({"optimizer.learning_rate": 0.5}, ["config.optimizer.learning_rate=0.5:", "was started with 0.01; use"]),
        ({"method.num_ahead": 2}, ["config.method.num_ahead=2:", "was started with 3; use that"]),
    ):
        named(error("train", f"--config={config_file(changes)}", f"--workdir={workdir}"), workdir, *words)
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
    named(line, tmp_path / "workdir", "cannot be written", "checkpoints: is a file, expected a folder")


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
    for workdir, words in (("nowhere", "holds no checkpoints"), ("empty", "no checkpoint; there are []")):
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
    assert done.stderr.startswith("error: --config.train.stepz=3: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "w").exists()
