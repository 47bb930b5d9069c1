"""The whole method's gradient against finite differences of the naive reading.

`augment.loss` runs as a training job runs it: the xla form of attention, remat "attention", the
loss in chunks. The naive reading is float64 numpy and knows no autodiff. Each trained leaf is moved
along a random direction, forth and back: the difference of the two losses is the gradient's product
with that direction.
"""

from functools import partial

import jax
import naive
import numpy as np
import pytest
import small
from two_rows import AT, SEGMENT, TOKENS, WEIGHTS, A, L, document_of

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.loss import ahead_weights
from latent_delib.delib.methods import METHODS
from latent_delib.nn import layers
from latent_delib.nn.transformer import Transformer

EVERY = 2  # ahead tokens from one group of `latent_tokens` to the next
STEP = 1e-4  # of the finite differences: their own error is of its square; lower it if it shows
CASES = [  # between gemma, llama and gpt2 every feature of the architecture
    ("cache_augmentation", "gemma", "after"),
    ("cache_augmentation", "gpt2", "after"),
    ("static_tokens", "llama", "after"),
    ("latent_tokens", "gemma", "shared"),
    ("cartridge", "gemma", "overlay"),
    ("inserted", "gemma", "overlay"),
    ("decoder", "gemma", "after"),  # ordinary language modelling: placement means nothing
]
FURTHER = [
    ("pause_tokens", "gemma", "overlay"),
    ("last_layer", "gemma", "after"),
    ("joint", "gemma", "after"),
    ("unified", "llama", "overlay"),
    ("sequential", "gemma", "overlay"),
    ("assistant", "gemma", "overlay"),  # it has the next family
    ("feedback", "gemma", "after"),
    ("cache_augmentation", "llama", "overlay"),
    ("cache_augmentation", "gemma", "before"),
    ("assistant", "llama", "after"),
    ("last_layer", "gpt2", "overlay"),
    ("inserted", "llama", "before"),
    ("inserted", "gpt2", "overlay"),
    ("joint", "gpt2", "before"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER]


def parameters(method, config):
    """What is trained, and what is frozen."""
    if method == "assistant":
        return with_assistant(config)
    decoder, coprocessor = small.decoder(config), small.coprocessor(config, L)
    soft_tokens = coprocessor["soft_tokens"]
    trained = {
        "pause_tokens": {"coprocessor": {"soft_tokens": soft_tokens[:1]}},
        "static_tokens": {"coprocessor": {"soft_tokens": soft_tokens}},
        "latent_tokens": {"coprocessor": {"soft_tokens": soft_tokens}},
        "joint": {"decoder": decoder, "coprocessor": coprocessor},
        "unified": {"decoder": decoder, "coprocessor": {"soft_tokens": soft_tokens}},
        "feedback": {"decoder": decoder, "coprocessor": {"soft_tokens": soft_tokens[:1]}},
        "cartridge": {"coprocessor": cartridge(config)},
        "decoder": {"decoder": decoder},
    }.get(method, {"coprocessor": coprocessor})
    return trained, {"decoder": decoder}


ASSISTANTS = {small.GEMMA: small.LLAMA, small.LLAMA: small.GPT2}  # by the decoder


def with_assistant(config):
    assistant = ASSISTANTS[config]
    coprocessor = small.coprocessor(assistant, L)
    size = (assistant.embed_dim, config.embed_dim)
    coprocessor["latents_out"] = np.random.default_rng(6).normal(0, 0.2, size).astype(np.float32)
    frozen = {"decoder": small.decoder(config), "assistant": small.decoder(assistant, seed=7)}
    return {"coprocessor": coprocessor}, frozen


def cartridge(config):
    rng = np.random.default_rng(5)
    shape = (config.num_layers, L, config.num_kv_heads, config.head_dim)
    return {name: rng.normal(size=shape).astype(np.float32) for name in ("keys", "values")}


def naive_loss(method, config, placement, params):
    """Σ -log p over the tokens that `augment.loss` counts, one trace after the other."""
    decoder = params["decoder"]
    if method == "decoder":
        documents = (TOKENS[0, :9], TOKENS[0, 9:], TOKENS[1, :12])
        return sum(naive_text_loss(config, decoder, document) for document in documents)
    coprocessor = params["coprocessor"]
    if method in ("unified", "feedback"):
        coprocessor = decoder | coprocessor
    if method == "pause_tokens":
        coprocessor = {"soft_tokens": np.repeat(coprocessor["soft_tokens"], L, axis=0)}
    read = "static_tokens" if method == "pause_tokens" else method
    total = 0.0
    z = None
    for b, m in np.ndindex(AT.shape):
        document, p = document_of(b, m)
        if method == "latent_tokens":
            read = document[: p + 1 + A]
            outputs = naive.recurring(config, decoder, coprocessor["soft_tokens"], read, p, EVERY)
            total += weighted(naive.nll(config, decoder, outputs[:-1], read[p + 1 :]))
            continue
        if method == "assistant":
            z = latents_of_assistant(ASSISTANTS[config], params, document[: p + 1], placement)
        nll = naive.trace_nll(
            config, decoder, coprocessor, document, p, A, placement, read, z=z, L=L
        )
        total += weighted(nll)
    return total


def weighted(nll):
    """Σ of a trace's tokens, each with the weight of its n; fewer than A at a document's end."""
    return (nll * np.asarray(ahead_weights(A), np.float64)[: len(nll)]).sum()


def latents_of_assistant(config, params, tokens, placement):
    """Latents [L, D]: the assistant's method of its own, cache augmentation, and then the map."""
    assistant, coprocessor = params["assistant"], params["coprocessor"]
    text = naive.embed(config, assistant, tokens)
    z = naive.written(config, assistant, coprocessor, text, len(tokens) - 1, placement)
    return z @ np.asarray(coprocessor["latents_out"], np.float64)


def naive_text_loss(config, decoder, document):
    outputs = naive.text_outputs(config, decoder, document, np.zeros(len(document)))
    return naive.nll(config, decoder, outputs[:-1], document[1:]).sum()


def moved(tree, path, change):
    """The tree with `change` added to the leaf at `path`, in float64."""

    def one(here, leaf):
        return np.asarray(leaf, np.float64) + change if here == path else leaf

    return jax.tree.map_with_path(one, tree)


@pytest.mark.parametrize("method, family, placement", CASES + SLOW)
def test_loss_and_gradient_equal_the_naive_reading(method, family, placement, monkeypatch):
    monkeypatch.setattr(layers, "FEW", 0)
    config = small.CONFIGS[family]
    trained, frozen = parameters(method, config)
    model = partial(Transformer, remat="attention", form="xla")
    other = model(ASSISTANTS[config]) if method == "assistant" else None
    aug = Augmentation(
        model(config),
        method,
        L,
        placement,
        loss_chunk=5,
        coprocessor=other,
        every=EVERY if METHODS[method].recurs else 0,
    )

    @partial(jax.value_and_grad, has_aux=True)
    def loss(trained):
        params = augment.assemble(frozen, trained)
        return augment.loss(aug, params, TOKENS, SEGMENT, AT, A)

    (total, tokens), gradient = jax.jit(loss)(trained)
    expected = naive_loss(method, config, placement, frozen | trained)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    counted = WEIGHTS * ahead_weights(A)
    assert tokens == (8 + 6 + 11 if method == "decoder" else counted.sum())

    rng = np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        direction = rng.normal(size=leaf.shape)
        forth, back = (moved(frozen | trained, path, sign * STEP * direction) for sign in (1, -1))
        slope = naive_loss(method, config, placement, forth) - naive_loss(
            method, config, placement, back
        )
        found = np.sum(np.asarray(leaf, np.float64) * direction)
        size = np.linalg.norm(np.asarray(leaf, np.float64))
        name = jax.tree_util.keystr(path)
        # it writes keys and values, no outputs
        unused = method == "inserted" and "final_norm" in name
        # a softmax does not see what all its keys share, where nothing turns them
        shared = method == "last_layer" and config.learned_positions and "k_bias" in name
        assert (size < 1e-4) if unused or shared else (size > 1e-3), name
        np.testing.assert_allclose(
            found, slope / (2 * STEP), rtol=0, atol=3e-5 * size + 1e-5, err_msg=name
        )


def test_every_method_that_the_naive_reading_knows_is_here():
    """A new method needs a row of CASES or FURTHER, and its reading in `naive_loss`.

    from_scratch computes as cache_augmentation does; resized is tested in test_methods.py.
    """
    assert {method for method, *_ in CASES + FURTHER} == set(METHODS) - {"from_scratch", "resized"}
