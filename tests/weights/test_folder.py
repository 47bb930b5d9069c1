"""Our own folders: read part by part onto a mesh; a damaged one is named."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

import latent_delib as ld
from latent_delib import mesh as mesh_lib
from latent_delib import train
from latent_delib.convert import convert
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.lm import load
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.weights import exported, folder, locate
from latent_delib.weights.tensors import TensorFile
from tests.workdirs import flip


def same(one, two):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), one, two)


def test_a_device_reads_its_own_part(decoder_folder, monkeypatch):
    """On 2 x 2 x 2 devices no read exceeds a shard, and the whole is what one device reads."""
    config = folder.read_config(decoder_folder)
    mesh = mesh_lib.make({"data": 2, "fsdp": 2, "traces": 1, "tensor": 2})
    shardings = mesh_lib.parameters(mesh, folder.shapes(config), PARAM_AXES)
    sizes, plain = {}, TensorFile.read

    def counted(self, name, index=...):
        x = plain(self, name, index)
        sizes[name] = max(sizes.get(name, 0), x.size)
        return x

    monkeypatch.setattr(TensorFile, "read", counted)
    sharded = folder.load(decoder_folder, config, np.float32, shardings)
    for name, x in folder.by_name(sharded).items():
        assert sizes[name] == x.addressable_shards[0].data.size, name
    assert sizes["layers.mlp.gate"] == sharded["layers"]["mlp"]["gate"].size / 4
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, sharded, shardings)))
    same(sharded, ld.load_decoder(decoder_folder).params)


def hashed(where):
    """The fingerprint by its definition."""
    files_ = (where / name for name in ("config.json", "model.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files_)).hexdigest()


def test_a_fingerprint_is_stored_and_not_made_again(decoder_folder, tmp_path):
    where = tmp_path / "decoder"
    shutil.copytree(decoder_folder, where)
    assert folder.fingerprint(where) == hashed(where) == folder.fingerprint(decoder_folder)
    flip(where / "model.safetensors", 0.9)  # which only its hash would tell
    assert folder.fingerprint(where) == hashed(decoder_folder) != hashed(where)
    (where / "fingerprint.json").unlink()  # as folders were written before
    assert folder.fingerprint(where) == hashed(where)
    assert folder.fingerprint(locate.PACKAGED) == hashed(locate.PACKAGED)


def test_old_checkpoints_fit_converted_decoders(hf, tmp_path):
    """Fingerprints as before they were stored, and before the architecture's youngest fields."""
    convert(str(hf("gemma2")), str(tmp_path / "out"))
    assert folder.fingerprint(tmp_path / "out")[:16] == "619a76fd3bef2b9a"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "fingerprint.json"])
def test_a_folder_that_changed_since_it_was_written(decoder_folder, tmp_path, file):
    where = tmp_path / "decoder"
    shutil.copytree(decoder_folder, where)
    if file == "config.json":  # of the same size
        (where / file).write_text((where / file).read_text().replace('"window": 5', '"window": 6'))
    elif file == "model.safetensors":
        (where / file).write_bytes((where / file).read_bytes()[:-4])
    else:
        (where / file).write_text("{}")
    with pytest.raises(UserError, match=str(where / file)) as error:
        folder.fingerprint(where)
    assert "\n" not in str(error.value)


@pytest.fixture
def trained_coprocessor(trained):
    return ld.load_coprocessor(str(trained))


def test_a_folder_of_ours_without_a_tokenizer(decoder_folder, tmp_path):
    """`convert` takes no --tokenizer for it, so the message offers none."""
    shutil.copytree(decoder_folder, tmp_path / "decoder")
    (tmp_path / "decoder" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="has no tokenizer, .*; put one there$"):
        ld.load_decoder(str(tmp_path / "decoder"))


def test_a_coprocessor_is_exported_and_read_again(
    trained, trained_coprocessor, decoder_folder, tmp_path
):
    convert(str(trained), str(tmp_path / "out"))
    found = ld.load_coprocessor(str(tmp_path / "out"))
    same(found.params, trained_coprocessor.params)
    for field in ("method", "num_latents", "placement", "fingerprint", "step"):
        assert getattr(found, field) == getattr(trained_coprocessor, field)
    decoder = ld.load_decoder(str(decoder_folder))
    text, at = np.arange(3, 23)[None], np.array([[2, 9]])
    ours, theirs = (
        ld.AugmentedLM(decoder, c).latents(text, at) for c in (found, trained_coprocessor)
    )
    np.testing.assert_array_equal(ours, theirs)

    # The names and axes of a Hugging Face decoder, which export gives the decoder itself too.
    with pytest.raises(UserError, match="--tokenizer=x: "):
        convert(str(decoder_folder), str(tmp_path / "hf"), to="huggingface", tokenizer="x")
    convert(str(decoder_folder), str(tmp_path / "hf"), to="huggingface")
    body, own = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert own.keys() - body.keys() == {"soft_tokens"} and body.keys() - own.keys() == {
        "model.embed_tokens.weight"
    }
    assert all(own[name].shape == body[name].shape for name in own.keys() & body.keys())
    file = tmp_path / "out" / "coprocessor.json"
    fields = json.loads(file.read_text())
    assert fields["record"]["step"] == 4
    record = load.read_record(str(trained))
    assert load.read_record(str(tmp_path / "out")) == record
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "2 latents, placement after, step 4",
        record.fingerprint,
        "| `train.steps` | 4 |",
    ):
        assert words in card
    assert "Perplexity" not in card
    assert ld.load_coprocessor(str(tmp_path / "out"), step=4).step == 4
    with pytest.raises(UserError, match="of step 4, not of step 3"):
        ld.load_coprocessor(str(tmp_path / "out"), step=3)
    del fields["record"]
    file.write_text(json.dumps(fields | {"format": "latent_delib coprocessor 1"}))
    for read in (ld.load_coprocessor, load.read_record):
        with pytest.raises(UserError, match="format is .*1'.*; export it again"):
            read(str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_coprocessor_with_biases_is_stored(tmp_path, family):
    """It has no table of tokens, whether the decoder's head is tied or not.

    Parameters of a method that nobody here knows are stored too.
    """
    config = dataclasses.replace(small.CONFIGS[family], qk_norm=False)
    tree = small.coprocessor(config, 2) | {"loudness": np.ones(2, np.float32)}
    fields = {"fingerprint": "f", "record": {"step": 3}}
    exported.save(tmp_path / "out", fields, config, tree, "# A card\n")
    found, read = exported.load(tmp_path / "out")
    assert found["architecture"]["qkv_bias"] and fields.items() <= found.items()
    same(read, tree)


def test_a_parameter_of_a_layer_without_a_name_is_not_left_out(tmp_path):
    config = small.CONFIGS["gemma"]
    tree = small.coprocessor(config, 2)
    tree["layers"] = tree["layers"] | {"new_norm": {"scale": np.ones((2, 8), np.float32)}}
    with pytest.raises(ValueError, match=r"no names for \['layers.new_norm.scale'\]"):
        exported.save(tmp_path / "out", {}, config, tree, "# A card\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, tensors",
    [
        ("cartridge", {"keys", "values"}),
        pytest.param("pause_tokens", {"soft_tokens"}, marks=pytest.mark.slow),
    ],
)
def test_trained_vectors_are_stored_without_layers(make_config, tmp_path, method, tensors):
    changes = {"method.name": method, "method.placement": "overlay", "train.steps": 1}
    train.train(make_config(changes), str(tmp_path / "w"))
    convert(str(tmp_path / "w"), str(tmp_path / "out"))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == tensors
    same(
        ld.load_coprocessor(str(tmp_path / "out")).params,
        ld.load_coprocessor(str(tmp_path / "w")).params,
    )


@pytest.mark.slow
def test_a_decoder_with_a_head_and_biases_is_trained_by_adapters(hf, make_config, tmp_path):
    """Only the matrices of its layers change: no table, no bias. It is no coprocessor."""
    convert(str(hf("qwen2")), str(tmp_path / "qwen2"))
    changes = {
        "decoder.path": str(tmp_path / "qwen2"),
        "decoder.export_dtype": "float32",
        "train.steps": 1,
    }
    changes |= {"method.name": "decoder", "method.lora_rank": 2, "optimizer.warmup_steps": 0}
    train.train(make_config(changes), str(tmp_path / "w"))
    before, after = (
        ld.load_decoder(str(path)) for path in (tmp_path / "qwen2", tmp_path / "w" / "decoder")
    )
    assert after.config == before.config and after.config.untied_head and after.config.qkv_bias
    leaves = folder.by_name(after.params)
    changed = {
        name
        for name, x in folder.by_name(before.params).items()
        if not np.array_equal(x, leaves[name])
    }
    assert changed == {f"layers.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.out")} | {
        f"layers.mlp.{name}" for name in ("gate", "up", "down")
    }
    with pytest.raises(UserError, match="'decoder' has no coprocessor"):
        convert(str(tmp_path / "w"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def of_method(fields, **changes):
    """Returns the fields of coprocessor.json with changes in its record's `method`."""
    fields["record"]["config"]["method"].update(changes)
    return fields


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("coprocessor.json", lambda c: c | {"format": "x"}, "format is 'x'"),
        ("coprocessor.json", lambda c: c | {"record": "x"}, "record='x', expected dict"),
        (
            "coprocessor.json",
            lambda c: of_method(c, num_latents=3),
            r"method .* with 3 latents: soft_tokens is \(2, .*\), expected \(3, ",
        ),
        ("coprocessor.json", lambda c: c | {"architecture": {}}, "is missing"),
        (
            "coprocessor.json",
            lambda c: c | {"record": {"step": 4}},
            r"coprocessor.json: record is damaged \(KeyError: 'data'\)",
        ),
        ("coprocessor.json", lambda c: of_method(c, placement=[]), "record is damaged"),
        (
            "coprocessor.json",
            lambda c: of_method(c, name="x"),
            r"method.name='x', expected one of \['assistant'",
        ),
        (
            "coprocessor.json",
            lambda c: of_method(c, placement="x"),
            r"method.placement='x', expected one of \['after'",
        ),
        (
            "model.safetensors",
            lambda t: {"soft_tokens": t["soft_tokens"], "x.weight": t["soft_tokens"]},
            "only 1 tensors",
        ),
        ("model.safetensors", lambda t: t | {"x.weight": t["soft_tokens"]}, "unknown x.weight"),
        ("model.safetensors", lambda t: t | {"x": t["soft_tokens"]}, r"unknown x \(2, "),
        (
            "model.safetensors",
            lambda t: {k: x for k, x in t.items() if "q_proj" not in k},
            "missing .*q_proj",
        ),
    ],
)
def test_coprocessor_folders_that_are_broken(trained, tmp_path, file, change, words):
    convert(str(trained), str(tmp_path / "out"))
    path = tmp_path / "out" / file
    if file.endswith("json"):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=words):
        ld.load_coprocessor(str(tmp_path / "out"))


def test_sizes_are_asserted_by_configs_too(make_config):
    """A padded token table is no other size; anything else is."""
    config = make_config()
    with config.unlocked():
        config.decoder.architecture.vocab_size = 300
        config.decoder.architecture.window = 5
        experiment.read(config)
        config.decoder.architecture.window = 6
        with pytest.raises(UserError, match="window=5, expected 6"):
            experiment.read(config)
