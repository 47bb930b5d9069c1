"""A user's mistake ends each command in one line that names the thing, before any training."""

import runpy
import shutil
import subprocess
import sys

import pytest
from small import named

from tests.processes import free_port

ARCHITECTURE = {
    "num_layers": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 48,
    "vocab_size": 1024,
}


@pytest.fixture
def error(command_line, monkeypatch, capsys):
    """error(command, *arguments) -> the one line that the command ends with, as by `python -m`.

    Nothing is compiled before it: on a real machine that takes minutes.
    """

    def run(command, *arguments):
        command_line(command, *arguments)
        monkeypatch.delitem(sys.modules, f"latent_delib.{command}", raising=False)  # or runpy warns
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(f"latent_delib.{command}", run_name="__main__")
        line, said = str(exit_.value.code), capsys.readouterr()
        assert line.startswith("error: ") and "\n" not in line, line
        assert "Traceback" not in said.out + said.err
        for later in ("compiled in", "step 1/", "evaluated"):
            assert later not in said.out
        return line

    return run


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.train.stepz=3", ["--config.train.stepz", "--config.train.steps?"]),
        ("--config.optimiser.b1=0.5", ["--config.optimiser.b1", "--config.optimizer.b1?"]),
        ("--config.train.b1=0.5", ["--config.train.b1", "--config.optimizer.b1?"]),
        ("--config.xyz=0.5", ["--config.xyz", "--list_keys"]),
        ("--config.method.coprocessor.num_layer=1", ["--config.method.coprocessor.num_layers?"]),
        ("--config.decoder.architecture.window=1.5", ["architecture.window=1.5: expected a whole"]),
        ("--config.decoder.architecture.qk_norm=maybe", ["qk_norm=maybe: expected true or false"]),
        ("--config.decoder.architecture.layer_pattern=both", ["layer_pattern=('both',)", "global"]),
        ("--config.decoder.architecture.layer_pattern=[[1]]", ["layer_pattern=([1],)", "global"]),
        ("--confg.train.steps=3", ["--confg.train.steps", "--config.train.steps?"]),
        ("--work_dir=w", ["--work_dir", "--workdir?"]),
        ("--xyz=w", ["--xyz", "--help"]),
        ("--config.train.steps=1e3", ["--config.train.steps=1e3: expected a whole number"]),
        ("--config.train.steps=1.5", ["--config.train.steps=1.5: expected a whole number"]),
        (
            "--config.train={'steps':3}",
            ["--config.train: is a table", "--config.train.accumulation="],
        ),
        ("--config.train.steps=9999999999", ["config.train.steps=9999999999", "2**31"]),
        ("--config.optimizer.b1=high", ["--config.optimizer.b1=high: expected a number"]),
        ("--config.evaluate.swap=maybe", ["evaluate.swap=maybe: expected true or false"]),
        ("--dry_run=maybe", ["--dry_run=maybe: expected true or false"]),
        ("--config.data.sources=files:a,files:b", ["config.data.sources", "('A', 'B')"]),
        ("--config.data.max_bad_records=-1", ["config.data.max_bad_records", "-1", "at least 0"]),
        ("--config.data.weights=abc", ["config.data.weights", "'abc'", "number"]),
        (
            "--config.method.start=nowhere/checkpoints/3",
            ["config.method.start=nowhere/checkpoints/3"],
        ),
        (
            "--config.method.name=coprocesor",
            ["config.method.name='coprocesor'", "cache_augmentation"],
        ),
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
        ("--config.optimizer.learning_rate=inf", ["config.optimizer.learning_rate=inf", "finite"]),
        ("--config.seed=-1", ["config.seed=-1"]),
        ("--config.seed=4294967296", ["config.seed=4294967296: expected at most 4294967295"]),
        ("--config.data.seq_len=3", ["config.method.num_ahead=3", "config.data.seq_len=3"]),
        ("--config.data.seq_len=64", ["config.data.token_files", "32", "64"]),
        (
            "--config.method.num_traces=32",
            ["config.method.num_traces=32", "config.data.seq_len=32"],
        ),
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
        (
            "--config.data.validation=('packaged/valid',)",
            ["unknown source 'packaged/valid'", "packaged/validation"],
        ),
        ("train.py", ["unexpected argument 'train.py'"]),
        ("--configg=3", ["--configg", "--config?"]),
    ],
)
def test_train_refuses(error, config_file, tmp_path, argument, words):
    line = error(
        "train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}", argument
    )
    named(line, *words)


def test_a_source_that_is_no_string(error, config_file, tmp_path):
    config = config_file({"data.token_files": "", "data.sources": (("lines:a", "lines:b"),)})
    line = error("train", f"--config={config}", f"--workdir={tmp_path / 'w'}")
    named(line, "config.data: source", "is tuple, expected a string")


def test_config_files_and_flags(error, config_file, tmp_path):
    named(error("train", "--config=no.py", "--workdir=w"), "--config=no.py", "no such file")
    named(error("train", f"--config={config_file()}"), "--workdir is missing")
    named(error("train", f"--config={config_file()}", "--workdir="), "--workdir is missing")
    named(error("train", "--workdir=w"), "--config is missing")
    named(error("train", "--config.train.steps=3", "--workdir=w"), "--config is missing")
    broken = tmp_path / "broken.py"
    for text, words in (
        ("def get_config():\n    return 1 / 0\n", ["broken.py, line 2", "ZeroDivisionError"]),
        ("def get_config(:\n", ["broken.py", "line 1"]),
        ("\0", ["broken.py", "null bytes"]),
        ("def get_config():\n    return {}\n", ["broken.py", "returns dict"]),
        ("from configs import base\n", ["broken.py: defines no get_config()"]),
        (
            "from configs import base\n\n\ndef get_config():\n"
            "    c = base.get_config()\n    c.train.stpes = 3\n",
            ["broken.py, line 6", '"steps"', '"stpes"'],
        ),
    ):
        broken.write_text(text)
        named(error("train", f"--config={broken}", "--workdir=w"), *words)
        named(error("train", "--config", str(broken), "--workdir=w"), *words)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("embed_dim", 30, ["embed_dim=30", "num_heads=4"]),
        ("num_layers", "four", ["num_layers='four'", "int"]),
        ("post_norms", "yes", ["post_norms='yes'", "bool"]),
        ("layer_pattern", "local", ["layer_pattern='local'", "tuple"]),
        ("rope_base", None, ["rope_base=None", "expected a value"]),
        ("width", 3, ["unknown", "width", "embed_dim"]),
        ("vocab_size", 100, ["config.decoder.tokenizer", "1024 pieces", "100"]),
    ],
)
def test_architectures_that_do_not_fit(error, config_file, tmp_path, field, value, words):
    architecture = ARCHITECTURE | {field: value}
    path = config_file({"decoder.path": "", "decoder.architecture": architecture})
    line = error("train", f"--config={path}", f"--workdir={tmp_path / 'w'}")
    named(line, "config.decoder", *words)


def test_a_workdir_where_a_decoder_is_expected(error, config_file, tmp_path):
    (tmp_path / "run" / "decoder").mkdir(parents=True)
    config = config_file({"decoder.path": f"{tmp_path}/run"})
    line = error("train", f"--config={config}", f"--workdir={tmp_path / 'w'}")
    named(line, f"did you mean {tmp_path}/run/decoder?")


def test_an_architecture_other_than_the_folder_s(error, config_file, tmp_path, decoder_folder):
    path = config_file({"decoder.architecture": {"num_layers": 5}})
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
        (
            "config.json",
            b'{"format": "latent_delib decoder 1"}',
            ["config.json", "num_layers is missing"],
        ),
        ("config.json", b"\xff\xfe", ["config.json", "not JSON"]),
        ("tokenizer.model", b"not a model", ["tokenizer.model", "not a SentencePiece model"]),
        ("tokenizer.model", b"", ["tokenizer.model", "not a SentencePiece model"]),
        (
            "model.safetensors",
            b"\x08\0\0\0\0\0\0\0{}",
            ["model.safetensors", "has 10 bytes", "fingerprint.json"],
        ),
    ],
)
def test_decoder_folders_that_are_broken(
    error, config_file, decoder_folder, tmp_path, name, content, words
):
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


def test_a_checkpoint_of_another_decoder_or_method(
    error, config_file, trained, make_decoder, tmp_path
):
    workdir = tmp_path / "workdir"
    shutil.copytree(trained, workdir)
    before = sorted(p for p in workdir.rglob("*"))
    for changes, words in (
        ({"decoder.path": str(make_decoder(2))}, "decoder.fingerprint is "),
        ({"method.name": "pause_tokens"}, "method.name is 'cache_augmentation'"),
        ({"method.num_latents": 1}, "method.num_latents is 2"),
        ({"method.placement": "overlay"}, "method.placement is 'after'"),
    ):
        for command in ("train", "evaluate"):
            line = error(command, f"--config={config_file(changes)}", f"--workdir={workdir}")
            named(line, f"{workdir}: ", words, "another --workdir")
    for changes, words in (
        ({"seed": 1}, "seed is 0"),
        ({"train.batch_size": 16}, "train.batch_size is 8"),
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate is 0.01"),
        ({"method.num_ahead": 2}, "method.num_ahead is 3"),
    ):
        line = error("train", f"--config={config_file(changes)}", f"--workdir={workdir}")
        named(line, f"{workdir}: ", words)
    assert sorted(p for p in workdir.rglob("*")) == before


def test_a_workdir_that_cannot_be_written(error, config_file, tmp_path):
    (tmp_path / "file").write_text("a regular file")
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'file' / 'workdir'}")
    named(line, tmp_path / "file" / "workdir", f"{tmp_path / 'file'}: is a file")
    assert (tmp_path / "file").read_text() == "a regular file"


def test_workdirs_elsewhere(error, config_file):
    config = f"--config={config_file()}"
    named(
        error("train", config, "--workdir=s3://bucket/run"), "s3://bucket/run", "gs://BUCKET/PATH"
    )
    for arguments in (["prepare", config], ["report", "runs"]):
        named(error(*arguments, "--out=s3://bucket/x"), "--out=s3://bucket/x", "gs://BUCKET/PATH")


def test_a_checkpoints_folder_that_cannot_be_written(error, config_file, tmp_path):
    """As root nothing is read-only: the folder's name is taken by a file."""
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / "checkpoints").write_text("")
    line = error("train", f"--config={config_file()}", f"--workdir={tmp_path / 'workdir'}")
    named(line, tmp_path / "workdir", "checkpoints: is a file")


def test_text_without_tensorflow(error, config_file, tmp_path, monkeypatch):
    """Training on text that is not prepared names the extra that brings it."""
    for name in ("tensorflow", "tasks"):
        monkeypatch.delitem(sys.modules, f"latent_delib.data.{name}", raising=False)
        monkeypatch.delattr(f"latent_delib.data.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    config = config_file({"data.token_files": ""})
    line = error("train", f"--config={config}", f"--workdir={tmp_path / 'w'}")
    named(line, "tensorflow is not installed", "setup.sh seqio", "or run prepare")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_processes_that_are_not_there(error, config_file, trained, tmp_path, monkeypatch):
    """Found out before jax looks for its devices; evaluation waits for them as training does."""
    config = f"--config={config_file()}"
    named(
        error("train", config, f"--workdir={tmp_path}", "--distributed"),
        "--distributed",
        "JAX_COORDINATOR_ADDRESS",
    )
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address := f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    line = error("train", config, f"--workdir={tmp_path}", "--distributed", "--start_timeout=1")
    named(line, "2 of 3 processes", address, "1 s", "number 1, 2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    line = error("evaluate", config, f"--workdir={trained}", "--distributed", "--start_timeout=1")
    named(line, "process 0", address, "1 s")


def test_evaluate_and_generate_need_a_checkpoint(
    error, config_file, trained, decoder_folder, tmp_path
):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    config = config_file()
    out = f"--out={tmp_path}/out"
    for workdir in ("nowhere", "empty"):
        at, words = tmp_path / workdir, "holds no checkpoints"
        named(error("evaluate", f"--config={config}", f"--workdir={at}", out), at, words)
        named(error("generate", f"--workdir={at}", "--prompt=the cat"), f"error: {at}: ", words)
    line = error("generate", f"--workdir={decoder_folder}", "--prompt=a")
    named(line, decoder_folder, "is a decoder's folder", "workdir of a training job")
    named(
        error("generate", f"--workdir={trained}", "--prompt=a", "--step=3"),
        "no checkpoint of step 3",
        "[2, 4]",
    )
    named(
        error("evaluate", f"--config={config}", f"--workdir={trained}", "--step=3", out),
        "no checkpoint of step 3",
    )
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "out").exists()


def test_results_that_have_no_place_are_met_before_the_work(error, config_file, tmp_path):
    (tmp_path / "file").write_text("")
    config = f"--config={config_file()}"
    for arguments in (
        ["train", config, f"--workdir={tmp_path}/file/new", "--dry_run"],
        ["evaluate", config, "--workdir=nowhere", f"--out={tmp_path}/file/new"],
        ["generate", "--workdir=nowhere", "--prompt=a", f"--out={tmp_path}/file/new/a.jsonl"],
        ["benchmark", "--decoder=nowhere", "--benchmarks=gsm8k", f"--out={tmp_path}/file/new"],
    ):
        named(error(*arguments), f"error: {tmp_path}/file: is a file, expected a folder")


def test_generate_refuses(error, trained):
    for arguments in ([], ["--prompt="], ["--prompt=a", "--prompts=FILE"]):
        named(
            error("generate", f"--workdir={trained}", *arguments), "--prompt=TEXT", "--prompts=FILE"
        )
    for arguments, words in (
        (["--max_new_tokens=0"], ["max_new_tokens=0"]),
        (["--temperature=-1.0"], ["temperature=-1.0"]),
        (["--top_k=-1"], ["top_k=-1"]),
        (["--top_p=0.0"], ["top_p=0.0"]),
        (["--batch_size=0"], ["batch_size=0"]),
        (["--every=-1"], ["every=-1"]),
        (["--delay=-1"], ["delay=-1"]),
        (["--every=2", "--delay=2"], ["delay=2", "every=2"]),
        (["--top_p=high"], ["top_p", "high"]),
    ):
        named(error("generate", "--workdir=nowhere", "--prompt=a", *arguments), *words)
    named(
        error("generate", f"--workdir={trained}", "--prompt=a", "--seed=-1"),
        "--seed=-1",
        "at least 0",
    )
    named(
        error("generate", f"--workdir={trained}", "--prompt=a", "--max_length=8"),
        "--max_length=8: expected more than --max_new_tokens=64",
    )
    few = ("--max_new_tokens=7", "--max_length=8")
    named(
        error("generate", f"--workdir={trained}", "--prompt=a", *few),
        "prompts[0]",
        "max_length=8",
    )


def test_generate_refuses_a_file_of_prompts(error, trained, tmp_path):
    path = tmp_path / "prompts.jsonl"
    flags = (f"--workdir={trained}", f"--prompts={path}", f"--out={tmp_path}/o")
    named(error("generate", *flags), path, "No such file")
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    named(error("generate", *flags), f"{path}:2: not JSON", '{"prompt": TEXT}')


def test_evaluate_refuses_bad_validation_data(error, config_file, trained, tmp_path):
    at = (f"--workdir={trained}", f"--out={tmp_path}/out")
    named(
        error("evaluate", f"--config={config_file({'data.validation': ()})}", *at),
        "config.data.validation",
        "empty",
    )
    named(
        error("evaluate", f"--config={config_file({'evaluate.batch_size': 3})}", *at),
        "config.evaluate.batch_size=3",
    )
    line = error("evaluate", f"--config={config_file({'data.token_files': 'no_tokens'})}", *at)
    named(line, "config.data.token_files", "no_tokens")
    assert not (tmp_path / "out").exists()


def test_a_real_process_prints_one_line_and_exits_1(config_file, tmp_path):
    command = [
        sys.executable,
        "-m",
        "latent_delib.train",
        f"--config={config_file()}",
        f"--workdir={tmp_path / 'w'}",
    ]
    done = subprocess.run([*command, "--config.train.stepz=3"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: --config.train.stepz") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert not (tmp_path / "w").exists()


def test_a_config_is_refused_before_any_text_is_read(error, config_file, tmp_path, monkeypatch):
    """And before TensorFlow is imported."""
    monkeypatch.setitem(sys.modules, "latent_delib.data.tasks", None)
    for argument, words in (
        ("--config.data.seq_len=1", "config.data.seq_len"),
        ("--config.data.sources=()", "config.data.sources"),
    ):
        named(
            error("prepare", f"--config={config_file()}", f"--out={tmp_path / 'out'}", argument),
            words,
        )
