"""Models of random weights and a text for them; no test changes these."""

import dataclasses

import jax
import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib.delib.traces import PLACEMENTS
from tests.prompts import Ids


@pytest.fixture(scope="session")
def decoder(decoder_folder):
    """With layers loud enough to be heard over the last token's embedding."""
    found, random = ld.load_decoder(str(decoder_folder)), np.random.default_rng(2)

    def louder(x):
        return x + 1.5 + 0.5 * random.standard_normal(x.shape) if x.ndim == 2 else x

    params = found.params | {"layers": jax.tree.map(louder, found.params["layers"])}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    return dataclasses.replace(found, params=params, tokenizer=Ids(found.tokenizer.path))


@pytest.fixture(scope="session")
def lms(decoder):
    """By placement, with a coprocessor far from the decoder. "decoder": no coprocessor."""
    random = np.random.default_rng(0)

    def changed(x):
        return np.asarray(x + 0.1 * random.standard_normal(x.shape), np.float32)

    found = {"decoder": ld.AugmentedLM(decoder)}
    for placement in PLACEMENTS:
        start = ld.init_coprocessor(decoder, 4, placement)
        params = jax.tree.map(changed, start.params)
        found[placement] = ld.AugmentedLM(decoder, dataclasses.replace(start, params=params))
    return found


@pytest.fixture(scope="session")
def recurring(decoder):
    """Two trained vectors before the prompt's last token, and before each third one after it."""
    vectors = np.random.default_rng(4).standard_normal((2, decoder.config.embed_dim))
    params = {"soft_tokens": vectors.astype(np.float32)}
    start = ld.init_coprocessor(decoder, 2, "shared")
    start = small.with_method(start, name="latent_tokens", every=3)
    return ld.AugmentedLM(decoder, dataclasses.replace(start, params=params))


@pytest.fixture(scope="session")
def text(decoder):
    """Two rows of 24 tokens, BOS first."""
    tokens = np.random.default_rng(1).integers(4, decoder.config.vocab_size, (2, 24))
    tokens[:, 0] = decoder.tokenizer.bos_id
    return tokens
