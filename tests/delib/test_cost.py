"""Useful operations of a step, counted a second time: from parameter shapes, and pair by pair."""

import dataclasses

import numpy as np
import pytest
import small

from latent_delib.delib import flops
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.cost import step_flops
from latent_delib.nn.sizes import SIZES
from latent_delib.nn.transformer import Transformer
from latent_delib.weights import folder


def of_products(config):
    """Operations of a token in the products with all layers' matrices."""
    leaves = folder.by_name(folder.shapes(config))
    vectors = ("scale", "bias")
    return 2 * sum(
        x.size
        for name, x in leaves.items()
        if name.startswith("layers") and not name.endswith(vectors)
    )


def counted(config, L, placement, T, M, A, inserted=False):
    """One sequence: traces at every place, averaged; windows over prefix and own tokens apart."""
    products = of_products(config)

    def pairs(length):
        """Keys that `length` tokens see of each other, themselves half, over all layers."""
        return sum(
            sum(min(t, config.window) if local else t for t in np.arange(length) + 0.5)
            for local in config.is_local
        )

    pair = 4 * config.num_heads * config.head_dim
    vocabulary = 2 * config.vocab_size * config.embed_dim
    text = T * products + pair * pairs(T)
    n = (0 if inserted else L) + A - 1 + (placement == "overlay")
    per_query = pair * pairs(T) / T  # of the text, for a query at any place in it
    write = L * (3 * products + 2 * per_query) + 3 * pair * pairs(L)
    decode = n * (2 * products + 2 * per_query) + 3 * pair * pairs(n)
    if inserted:  # L keys in each layer, which each token sees
        decode += 3 * pair * n * L * config.num_layers
    return text + M * (write + decode + 2 * A * vocabulary)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
@pytest.mark.parametrize("placement", ["after", "overlay"])
def test_counted_pair_by_pair(placement, family):
    config = dataclasses.replace(small.CONFIGS[family], window=8)
    aug = Augmentation(Transformer(config), "cache_augmentation", 4, placement)
    ours = step_flops(aug, 3, 64, 5, 6).useful
    # In a window the first half pair is counted whole.
    np.testing.assert_allclose(ours, 3 * counted(config, 4, placement, 64, 5, 6), rtol=1e-3)


def test_inserted_keys_are_counted():
    config = dataclasses.replace(small.GEMMA, window=8)
    ours = step_flops(Augmentation(Transformer(config), "inserted", 4, "overlay"), 3, 64, 5, 6)
    expected = 3 * counted(config, 4, "overlay", 64, 5, 6, inserted=True)
    np.testing.assert_allclose(ours.useful, expected, rtol=1e-3)


def test_the_published_setting():
    """TFLOP per sequence of Gemma 2 2B."""
    for L, expected in ((16, 73.25), (64, 203.35)):
        aug = Augmentation(Transformer(SIZES["gemma2_2b"]), "cache_augmentation", L)
        assert abs(step_flops(aug, 1, 2048, 128, 16).useful / 1e12 - expected) < 0.01


def test_what_is_done_beyond_that():
    """Under `attention` the traces' products again; under `full` those with the text too."""
    config = dataclasses.replace(small.GEMMA, window=8)
    products = of_products(config)

    def again(remat, method="cache_augmentation"):
        return step_flops(Augmentation(Transformer(config, remat), method, 4), 3, 64, 5, 6).repeated

    tokens = 3 * 5 * (4 + 4 + 6 - 1)
    assert again("none") == again("dots") == 0
    assert again("attention") == tokens * products
    assert again("full") > again("attention")
    assert again("attention", "pause_tokens") == 3 * 5 * (4 + 6 - 1) * products
    assert again("attention", "decoder") == 3 * 64 * products
    assert again("none", "sequential") == again("none", "inserted") == 0
    assert again("attention", "sequential") == tokens * products
    text_too = again("full") - again("attention")  # attention over the text
    more = again("full", "sequential") - again("full")  # every step of writing, twice
    share = 4 / (4 + 4 + 6 - 1)
    np.testing.assert_allclose(more, share * (tokens * products + text_too), rtol=1e-6)
    assert again("attention", "inserted") == (tokens - 3 * 5 * 4) * products
    assert (
        again("attention", "joint")
        == again("attention", "last_layer")
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
    config = small.GEMMA
    alone = Augmentation(Transformer(config), "cache_augmentation", 4)
    both = dataclasses.replace(alone, distill=0.5)
    more = step_flops(both, 3, 64, 5, 6).useful - step_flops(alone, 3, 64, 5, 6).useful
    assert more == 3 * 5 * 6 * 2 * config.vocab_size * config.embed_dim
