"""Useful operations of a step, counted a second time: from parameter shapes, and pair by pair."""

import dataclasses

import numpy as np
import pytest
import small

from latent_delib.delib import flops
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.cost import step_flops
from latent_delib.delib.methods import METHODS
from latent_delib.nn.sizes import SIZES
from latent_delib.nn.transformer import Transformer
from latent_delib.weights import folder


def of_products(config, but=()):
    """Operations of a token in the products with all layers' matrices, `but` some."""
    leaves = folder.by_name(folder.shapes(config))
    vectors = ("scale", "bias")
    return 2 * sum(
        x.size
        for name, x in leaves.items()
        if name.startswith("layers") and not name.endswith((*vectors, *but))
    )


# Passes of each method, as its paper has them: forward is one, and each of the gradients, to inputs
# and to weights, is one more. Of the text by all its readers; of latents that the coprocessor
# writes, of which all but `skipped` need a pass; attention of these over the text's keys; traces.
# With `keys`, latents are keys and values in each layer, not tokens. Of the passes over the text,
# `cache_alone` compute only the keys and values of the last layer.
PASSES = {
    "cache_augmentation": dict(text=1, latents=3, over_text=2, traces=2, cache_alone=1),
    "from_scratch": dict(text=1, latents=3, over_text=2, traces=2, cache_alone=1),
    "last_layer": dict(text=1 + 3, latents=3, over_text=3, traces=2),
    "assistant": dict(text=1 + 1, latents=3, over_text=2, traces=2, cache_alone=2),
    "pause_tokens": dict(text=1, latents=0, over_text=0, traces=2, cache_alone=1),
    "static_tokens": dict(text=1, latents=0, over_text=0, traces=2, cache_alone=1),
    "latent_tokens": dict(text=1, latents=0, over_text=0, traces=2, cache_alone=1),
    "cartridge": dict(text=1, latents=0, over_text=0, traces=2, keys=True, cache_alone=1),
    "inserted": dict(text=1, latents=3, over_text=2, traces=2, keys=True, cache_alone=1),
    "joint": dict(text=3, latents=3, over_text=3, traces=3),
    "unified": dict(text=3, latents=3, over_text=3, traces=3),
    "feedback": dict(text=3, latents=3, over_text=3, traces=3, skipped=1),
    "sequential": dict(text=1, latents=3, over_text=2, traces=2, cache_alone=1),
    "resized": dict(text=1, latents=3, over_text=2, traces=2, cache_alone=1),
}


def counted(config, passes, L, placement, T, M, A, every=0):
    """One sequence: traces at every place, averaged; windows over prefix and own tokens apart."""
    products = of_products(config)

    def pairs(config, length):
        """Keys that `length` tokens see of each other, themselves half, over all layers."""
        return sum(
            sum(min(t, config.window) if local else t for t in np.arange(length) + 0.5)
            for local in config.is_local
        )

    pair = 4 * config.num_heads * config.head_dim
    vocabulary = 2 * config.vocab_size * config.embed_dim
    text = T * products + pair * pairs(config, T)
    kind = config.layer_pattern[(config.num_layers - 1) % len(config.layer_pattern)]
    last = dataclasses.replace(config, num_layers=1, layer_pattern=(kind,))
    unread = T * of_products(last, but=("attn.k", "attn.v")) + pair * pairs(last, T)
    per_query = pair * pairs(config, T) / T  # of the text, for a query at any place in it

    written = L - passes.get("skipped", 0)
    write = written * (passes["latents"] * products + passes["over_text"] * per_query)
    write += passes["latents"] * pair * pairs(config, written)

    n = A - 1 + (placement == "overlay")
    if "keys" not in passes:
        n += L * (len(range(0, A, every)) if every else 1)
    decode = passes["traces"] * n * (products + per_query) + 3 * pair * pairs(config, n)
    if "keys" in passes:  # L keys in each layer, which each token sees
        decode += 3 * pair * n * L * config.num_layers
    read = passes["text"] * text - passes.get("cache_alone", 0) * unread
    return read + M * (write + decode + passes["traces"] * A * vocabulary)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
@pytest.mark.parametrize("method", PASSES)
def test_counted_pair_by_pair(method, family):
    """All models of a row are of one size here."""
    config = dataclasses.replace(small.CONFIGS[family], window=8)
    every = 2 if METHODS[method].recurs else 0
    for placement in ("overlay",) if METHODS[method].writes_keys else ("after", "overlay"):
        aug = Augmentation(Transformer(config), method, 4, placement, every=every)
        ours = step_flops(aug, 3, 64, 5, 6).useful
        theirs = 3 * counted(config, PASSES[method], 4, placement, 64, 5, 6, every)
        # In a window the first half pair is counted whole.
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_the_plain_decoder():
    config = small.LLAMA
    ours = step_flops(Augmentation(Transformer(config), "decoder"), 3, 64, 5, 6).useful
    pair = 4 * config.num_heads * config.head_dim * config.num_layers
    vocabulary = 2 * config.vocab_size * config.embed_dim
    per_token = of_products(config) + vocabulary + pair * 32  # a token sees half the row
    np.testing.assert_allclose(ours, 3 * 3 * 64 * per_token, rtol=1e-6)


def test_every_method_is_counted():
    assert PASSES.keys() | {"decoder"} == METHODS.keys()


@pytest.mark.parametrize("method", ["resized", "assistant"])
def test_another_size_writes(method):
    """A coprocessor of half the layers, and its reading if it is an assistant, cost half."""
    config = dataclasses.replace(small.LLAMA, num_layers=4)
    half = Transformer(dataclasses.replace(config, num_layers=2))
    whole = Augmentation(Transformer(config), method, 4)
    saved = step_flops(whole, 3, 64, 5, 6).useful
    saved -= step_flops(dataclasses.replace(whole, coprocessor=half), 3, 64, 5, 6).useful
    # Both read the last layer alike.
    passes = PASSES[method] | dict(cache_alone=0)
    cost = counted(config, passes, 4, "after", 64, 5, 6)
    all_but_that = passes | dict(text=1, latents=0, over_text=0)
    cost -= counted(config, all_but_that, 4, "after", 64, 5, 6)
    np.testing.assert_allclose(saved, 3 * cost / 2, rtol=1e-6)


def test_the_published_setting():
    """TFLOP per sequence of Gemma 2 2B."""
    for L, expected in ((16, 72.93), (64, 203.03)):
        aug = Augmentation(Transformer(SIZES["gemma2_2b"]), "cache_augmentation", L)
        assert abs(step_flops(aug, 1, 2048, 128, 16).useful / 1e12 - expected) < 0.01


def test_what_is_done_beyond_that():
    """Under `attention` the traces' products again; under `full` those with the text too."""
    config = dataclasses.replace(small.GEMMA, window=8)
    products = of_products(config)

    def recomputed(remat, method="cache_augmentation"):
        aug = Augmentation(Transformer(config, remat), method, 4)
        return step_flops(aug, 3, 64, 5, 6).recomputed

    tokens = 3 * 5 * (4 + 4 + 6 - 1)
    assert recomputed("none") == recomputed("dots") == 0
    assert recomputed("attention") == tokens * products
    assert recomputed("full") > recomputed("attention")
    assert recomputed("attention", "pause_tokens") == 3 * 5 * (4 + 6 - 1) * products
    assert recomputed("attention", "decoder") == 3 * 64 * products
    assert recomputed("none", "sequential") == recomputed("none", "inserted") == 0
    assert recomputed("attention", "sequential") == tokens * products
    text_too = recomputed("full") - recomputed("attention")  # attention over the text
    more = recomputed("full", "sequential") - recomputed("full")  # every step of writing, twice
    share = 4 / (4 + 4 + 6 - 1)
    np.testing.assert_allclose(more, share * (tokens * products + text_too), rtol=1e-6)
    assert recomputed("attention", "inserted") == (tokens - 3 * 5 * 4) * products
    assert (
        recomputed("attention", "joint")
        == recomputed("attention", "last_layer")
        == (tokens + 3 * 64) * products
    )


def test_the_token_that_begins_thoughts_costs_no_pass():
    w = flops.Writing(small.GEMMA, "full", 3 * 64, 64, 15, num_latents=1, trains_decoder=True)
    assert flops.pass_per_thought(w) == flops.Flops(0.0, 0.0)
    two = flops.pass_per_thought(w._replace(num_latents=2)).useful
    assert two == pytest.approx(flops.one_pass(w).useful, rel=0.1)


def test_hidden_text_costs_no_attention():
    """A trace at each place of the row sees what is before it, the window, or eight tokens."""
    config = small.GEMMA
    aug = Augmentation(Transformer(config), "cache_augmentation", 4)
    place = np.arange(64) + 0.5

    def pairs(visible):
        windows = [config.window if is_local else 64 for is_local in config.is_local]
        return sum(np.minimum(place, min(window, visible)).mean() for window in windows)

    tokens, passes, features = 3 * 5 * (4 + 5), 2, 4 * config.num_heads * config.head_dim
    less = tokens * passes * features * (pairs(64) - pairs(8))
    short = dataclasses.replace(aug, visible_text=8)
    found = step_flops(aug, 3, 64, 5, 6).useful - step_flops(short, 3, 64, 5, 6).useful
    assert found == pytest.approx(less)


def test_a_teacher_costs_its_logits():
    """And the last layer of the text, whose outputs it needs."""
    config = small.GEMMA
    alone = Augmentation(Transformer(config), "cache_augmentation", 4)
    both = dataclasses.replace(alone, distill=0.5)
    more = step_flops(both, 3, 64, 5, 6).useful - step_flops(alone, 3, 64, 5, 6).useful
    more -= flops.text(config, 3 * 64, 64) - flops.text(config, 3 * 64, 64, outputs=False)
    assert more == 3 * 5 * 6 * 2 * config.vocab_size * config.embed_dim
