"""DeepMind's orbax folders: sizes by their shapes, and what is refused."""

import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import refused

from latent_delib.convert import convert
from latent_delib.nn.sizes import SIZES, TransformerConfig
from latent_delib.weights import deepmind, folder, names

SMALL = dict(
    num_layers=3, embed_dim=24, num_heads=4, num_kv_heads=2, ffn_dim=40, vocab_size=320, head_dim=8
)
CONFIG = TransformerConfig(**SMALL, layer_pattern=("local", "global"), window=5, post_norms=True)


def tree(config, random=None):
    """A flat checkpoint of random weights (the same for the same config), as they are published."""
    random, out = random or np.random.default_rng(0), {}
    for t in names.tensors(config, "deepmind"):
        *path, last = f"transformer/{t.name}".split("/")
        if last not in ("input_embedding", "scale"):
            path, last = [*path, last], "w"
        out.setdefault("/".join(path), {})[last] = random.standard_normal(t.shape).astype(
            ml_dtypes.bfloat16
        )
    return out


def save(where, weights):
    ocp.PyTreeCheckpointer().save(where, weights)
    return where


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(SIZES, "small", CONFIG)


def test_a_known_size_is_found_by_its_shapes(tmp_path, tokenizer_path, known):
    where = save(tmp_path / "theirs", tree(CONFIG))
    assert deepmind.open_source(where).architecture == CONFIG
    convert(str(where), str(tmp_path / "out"), tokenizer=str(tokenizer_path))
    file = folder.open_tensors(tmp_path / "out", folder.read_config(tmp_path / "out"))
    stored = tree(CONFIG)
    assert set(file.dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
    kv = stored["transformer/layer_2/attn/kv_einsum"]["w"]  # [2, K, D, H]
    for part, name in enumerate(("k", "v")):
        np.testing.assert_array_equal(file.read(f"layers.attn.{name}")[2], kv[part].swapaxes(0, 1))


def test_more_rows_of_the_token_table_are_padding(tmp_path, tokenizer_path, known):
    import dataclasses

    padded = dataclasses.replace(CONFIG, vocab_size=352)
    where = save(tmp_path / "theirs", tree(padded))
    convert(str(where), str(tmp_path / "out"), size="small", tokenizer=str(tokenizer_path))
    assert folder.read_config(tmp_path / "out") == padded


def test_checkpoints_that_cannot_be_converted(tmp_path, tokenizer_path, monkeypatch):
    where, out = save(tmp_path / "theirs", tree(CONFIG)), tmp_path / "out"
    given = {"tokenizer": str(tokenizer_path)}
    refused(where, out, where, "no known size", "'embed_dim': 24", "--size", **given)
    refused(where, out, "missing layer_3/", "is (320, 24), expected", size="gemma2_2b", **given)
    monkeypatch.setitem(SIZES, "small", CONFIG)
    refused(where, out, "has no tokenizer", "--tokenizer", size="small")

    weights = tree(CONFIG)
    del weights["transformer/layer_1/attn/q_einsum"]
    weights["transformer/layer_1/attn/q_norm"] = {"scale": np.zeros(3, np.float32)}
    weights["transformer/layer_0/mlp/linear"] = {"w": np.zeros((3, 5), np.float32)}
    refused(
        save(tmp_path / "wrong", weights),
        out,
        "missing layer_1/attn/q_einsum (4, 24, 8) (layers.attn.q of layer 1)",
        "unknown layer_1/attn/q_norm/scale (3,)",
        "layer_0/mlp/linear is (3, 5), expected (40, 24) (layers.mlp.down of layer 0)",
        size="small",
        **given,
    )
    refused(
        save(tmp_path / "other", {"a": {"b": np.zeros((3, 2), np.float32)}}),
        out,
        "not a Gemma checkpoint",
        **given,
    )
    weights = tree(CONFIG) | {"transformer/final_norm": {"scale": np.zeros(24, np.int32)}}
    refused(
        save(tmp_path / "ints", weights),
        out,
        "final_norm/scale is of type int32",
        size="small",
        **given,
    )


@pytest.mark.parametrize("damage", ["metadata", "metadata is gone", "data"])
def test_damaged_folders(tmp_path, tokenizer_path, known, damage):
    where = save(tmp_path / "theirs", tree(CONFIG))
    if damage == "metadata":
        (where / "_METADATA").write_text('{"tree_metadata": {"x": ')
    elif damage == "metadata is gone":
        (where / "_METADATA").unlink()
    else:
        for path in [p for p in where.rglob("*") if p.is_dir() and p.name == "d"]:
            shutil.rmtree(path)
    refused(where, tmp_path / "out", where, size="small", tokenizer=str(tokenizer_path))
