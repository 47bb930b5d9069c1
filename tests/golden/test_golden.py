"""Ours, through the importer, against what make_transformers.py and make_deepmind.py stored."""

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load

import latent_delib as ld
from latent_delib import convert
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.nn.sizes import SIZES, TransformerConfig
from latent_delib.nn.transformer import TABLES, Transformer

TRANSFORMERS = ("gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3", "gpt2")
# What DeepMind's checkpoints do not hold.
NORMED = dict(post_norms=True, window=5)
DEEPMIND = {
    "gemma": TransformerConfig(2, 24, 3, 3, 32, 320, 8),
    "gemma2": TransformerConfig(
        *(5, 24, 4, 2, 32, 320, 8),
        layer_pattern=("local", "global"),
        query_scale=6**-0.5,
        attn_softcap=3.0,
        final_softcap=4.0,
        **NORMED,
    ),
    "gemma3": TransformerConfig(
        *(7, 24, 2, 1, 32, 320, 8),
        layer_pattern=("local",) * 5 + ("global",),
        rope_base=5000.0,
        local_rope_base=100.0,
        rope_scaling=(4.0, 1.0, 4.0, 0.0),
        qk_norm=True,
        **NORMED,
    ),
}


def equal(found, expected, err_msg=""):
    """Within 1e-4; `pytest -s` shows by how much."""
    print(f"largest difference {np.abs(found - expected).max():.1e}  {err_msg}")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=err_msg)


def stored(name):
    """The arrays of a file."""
    with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", params=TRANSFORMERS)
def golden(request, tokenizer_path, tmp_path_factory):
    """Stored values; decoder and coprocessor, both imported from a Hugging Face folder."""
    values = stored(request.param)

    def imported(model, config):
        folder = tmp_path_factory.mktemp(request.param)
        (folder / "config.json").write_text(str(values[config]))
        (folder / "model.safetensors").write_bytes(values[model].tobytes())
        (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        convert.convert(str(folder), str(folder / "ours"))
        return ld.load_decoder(str(folder / "ours"))

    decoder, coprocessor = imported("decoder", "config"), imported("coprocessor", "config_4")
    assert coprocessor.config == decoder.config  # both ways to write it say the same
    body = {name: x for name, x in coprocessor.params.items() if name not in TABLES}
    return values, decoder, body | {"soft_tokens": values["soft_tokens"]}


def test_logits(golden):
    values, decoder, _ = golden
    equal(ld.AugmentedLM(decoder).logits(values["tokens"]), values["logits"])


def test_every_layer(golden):
    values, decoder, _ = golden
    assert len(values["hidden"]) == decoder.config.num_layers
    aug = Augmentation(Transformer(decoder.config), "decoder", 0)
    tokens = values["tokens"]

    @jax.jit
    def outputs(decoder):
        return augment.read_text(aug, {"decoder": decoder}, tokens, np.ones_like(tokens)).outputs

    def first_layers(n):
        """The same decoder, whose layers after the first n add nothing to the residual stream."""

        def cut(path, x):
            last = path[-1].key.removesuffix("_bias")
            return x.at[n:].set(0) if last in ("out", "down") else x

        return decoder.params | {"layers": jax.tree.map_with_path(cut, decoder.params["layers"])}

    for n, hidden in enumerate(values["hidden"], start=1):
        equal(outputs(first_layers(n)), hidden, err_msg=f"layer {n}")


@pytest.mark.parametrize("placement", ["after", pytest.param("overlay", marks=pytest.mark.slow)])
def test_latents_and_what_they_do(golden, placement):
    values, decoder, coprocessor = golden
    num_latents = len(values["soft_tokens"])
    start = ld.init_coprocessor(decoder, num_latents, placement)
    lm = ld.AugmentedLM(decoder, dataclasses.replace(start, params=coprocessor))
    where = (values["tokens"], values["positions"])
    plain, augmented = lm.ahead_logprobs(*where, values["logprobs.decoder"].shape[-1])
    for name, found in {
        f"latents.{placement}": lm.latents(*where),
        "logprobs.decoder": plain,
        f"logprobs.{placement}": augmented,
    }.items():
        equal(found, values[name], err_msg=name)


def tree_of(leaves):
    """A tree from its leaves' paths: {"a/b": x} -> {"a": {"b": x}}."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


@pytest.mark.parametrize("form", ["flat", "nested", "other gating"])
@pytest.mark.parametrize("family", DEEPMIND)
def test_deepmind(family, form, tokenizer_path, tmp_path, monkeypatch):
    values = stored(f"deepmind_{family}")
    # exact: see there
    leaves = {k: x.astype(ml_dtypes.bfloat16) for k, x in load(values["params"].tobytes()).items()}
    if form == "other gating":  # both layouts occur, [2, D, F] and [2, F, D]
        leaves = {k: x.swapaxes(1, 2) if "gating_einsum" in k else x for k, x in leaves.items()}
    if form == "nested":
        leaves = {k.removeprefix("transformer/"): x for k, x in leaves.items()}
        tree = tree_of({k.removesuffix("/w") if "/mlp/" in k else k: x for k, x in leaves.items()})
    else:
        tree = {}
        for path, leaf in leaves.items():
            module, name = path.rsplit("/", 1)
            tree.setdefault(module, {})[name] = leaf
    ocp.PyTreeCheckpointer().save(tmp_path / "theirs", jax.tree.map(np.ascontiguousarray, tree))
    monkeypatch.setitem(SIZES, "small", DEEPMIND[family])
    convert.convert(
        str(tmp_path / "theirs"),
        str(tmp_path / "ours"),
        size="small",
        tokenizer=str(tokenizer_path),
    )
    lm = ld.AugmentedLM(ld.load_decoder(str(tmp_path / "ours")))
    equal(lm.logits(values["tokens"]), values["logits"])
