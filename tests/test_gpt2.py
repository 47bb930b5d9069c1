"""GPT-2 through the commands: trained on eight devices, in use, and the end of its positions."""

import dataclasses
import json

import jax
import naive
import numpy as np
import pytest
import small
import workdirs

import latent_delib as ld
from latent_delib import convert, train
from latent_delib.delib.lora import INPUT_AXES
from latent_delib.errors import UserError
from latent_delib.job import build, experiment, parameters
from latent_delib.job.record import Record
from latent_delib.lm import load
from latent_delib.weights import folder, tokenizer_files

P, L = 48, 2  # learned positions; latents of the tiny config
RESIZED = {"method.name": "resized", "method.coprocessor": {"learned_positions": 40}}
CONFIG = dataclasses.replace(small.GPT2, vocab_size=320, learned_positions=P)
PROMPT, NEW = "the cat sat on a mat and a dog", 6


@pytest.fixture(scope="module")
def gpt2_folder(tokenizer_path, tmp_path_factory):
    """Two layers of random weights, norms and biases at random too."""
    where = tmp_path_factory.mktemp("gpt2")
    leaves = folder.by_name(small.decoder(CONFIG))
    entries = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    tokenizer_files.copy_tokenizer(tokenizer_path, where)
    folder.write_model(where, CONFIG, entries, leaves.values())
    return where


@pytest.fixture(scope="module")
def config_of(make_config, gpt2_folder):
    """config_of(changes) -> the tiny config with this decoder."""
    return lambda changes: make_config({"decoder.path": str(gpt2_folder)} | changes)


@pytest.fixture(scope="module")
def workdir(config_of, tmp_path_factory):
    """Four steps, each row of a batch on a device of its own."""
    where = tmp_path_factory.mktemp("run")
    train.train(config_of({}), str(where))
    return where


@pytest.mark.slow
def test_every_mesh_trains_alike(config_of, workdir, tmp_path):
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.traces": 2, "mesh.tensor": 2}
    train.train(config_of(mesh), str(tmp_path))
    workdirs.assert_close(tmp_path, workdir)
    before, after = (workdirs.weights_of(workdir, step) for step in (2, 4))
    moved = folder.by_name(jax.tree.map(lambda x, y: float(abs(x - y).max()), before, after))
    assert "coprocessor.positions" in moved
    assert min(moved.values()) > 1e-4, moved


@pytest.mark.slow
def test_decoding_and_scoring_are_the_naive_readings(gpt2_folder, workdir):
    decoder = ld.load_decoder(str(gpt2_folder))
    coprocessor = ld.load_coprocessor(str(workdir))
    lm = ld.AugmentedLM(decoder, coprocessor)
    ids = [decoder.tokenizer.bos_id, *decoder.tokenizer.encode(PROMPT)]
    (new,) = lm.continuations([PROMPT], NEW)
    sums, greedy = lm.logprobs([PROMPT], [new.tokens.tolist()])
    assert greedy.all()
    document = np.array(ids + new.tokens.tolist())
    trees = jax.device_get((decoder.params, coprocessor.params))
    expected = naive.trace_nll(CONFIG, *trees, document, len(ids) - 1, NEW, "after")
    np.testing.assert_allclose(-sums, expected.sum(), rtol=1e-5)


def test_a_coprocessor_is_exported_and_read_again(gpt2_folder, workdir, tmp_path):
    convert.convert(str(workdir), str(tmp_path / "out"))
    found, trained = (ld.load_coprocessor(str(w)) for w in (tmp_path / "out", workdir))
    jax.tree.map(np.testing.assert_array_equal, found.params, trained.params)
    convert.convert(str(gpt2_folder), str(tmp_path / "hf"), to="huggingface")
    body, own = (folder.TensorFile(tmp_path / w / "model.safetensors") for w in ("hf", "out"))
    assert own.shapes.keys() - body.shapes.keys() == {"soft_tokens"}
    assert body.shapes.keys() - own.shapes.keys() == {"transformer.wte.weight"}


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"data.seq_len": P - L + 1}, "data.seq_len=47"),
        ({"evaluate.max_length": P - L + 1}, "evaluate.max_length=47"),
        ({"method.placement": "overlay", "data.seq_len": P + 1}, "data.seq_len=49"),
        ({"method.name": "decoder", "data.seq_len": P + 1}, "data.seq_len=49"),
        (RESIZED | {"data.seq_len": 40 - L + 1}, "data.seq_len=39"),
    ],
)
def test_texts_past_the_last_position_are_refused_before_training(config_of, changes, key):
    name = key.partition("=")[0]
    most = changes[name] - 1
    with pytest.raises(UserError, match=f"config.{key}: .* at most {most}, .*learned positions"):
        experiment.read(config_of(changes))
    experiment.read(config_of(changes | {name: most}))


def test_texts_past_the_last_position_are_refused_before_decoding(gpt2_folder):
    decoder = ld.load_decoder(str(gpt2_folder))
    lm = ld.AugmentedLM(decoder, ld.init_coprocessor(decoder, L))
    for model, room in ((lm, P - L), (ld.AugmentedLM(decoder), P)):
        assert model.max_length == room
        with pytest.raises(UserError, match=f"40 tokens and {room} .*max_length={room}; .*learned"):
            model.generate([[5] * 40], room)
        with pytest.raises(UserError, match=f"rows of {room + 1}, expected at most {room}"):
            model.logits(np.full((1, room + 1), 5))
    assert ld.AugmentedLM(decoder, max_length=20).max_length == 20


def test_a_benchmark_knows_how_long_texts_may_be(gpt2_folder, workdir):
    """Before it loads weights: answers that do not fit are refused at once, rows say the length."""
    assert build.longest_text(load.read_record(str(workdir))) == P - L
    alone = {"method": {"name": "decoder", "num_latents": 0}}
    architecture = folder.read_config(gpt2_folder).to_dict()
    assert build.longest_text(Record(alone, "", architecture)) == P


def test_adapters_are_of_matrices_alone(config_of):
    exp = experiment.read(config_of({"method.lora_rank": 2}))
    leaves = set(folder.by_name(parameters.trainable_on_mesh(exp)["coprocessor"]))
    matrices = {f"attn.{name}" for name in ("q", "k", "v", "out")} | {"mlp.up", "mlp.down"}
    assert {m.partition(".")[2] for m in matrices} == INPUT_AXES.keys() - {"gate"}
    assert leaves == {f"layers.{m}_{part}" for m in matrices for part in "ab"} | {"soft_tokens"}


def test_the_folder_says_what_is_new(gpt2_folder):
    fields = json.loads((gpt2_folder / "config.json").read_text())["architecture"]
    assert fields["learned_positions"] == P and fields["layer_norm"] and fields["plain_mlp"]
    assert folder.read_config(gpt2_folder) == CONFIG
