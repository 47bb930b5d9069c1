"""Latents can help: a toy whose answer stands in the cache, where the frozen decoder does not look.

Every document is a letter, fillers, a question mark and the same letter again. The decoder learns
this on text whose letter stands at most 2 tokens before the question; then it is frozen. Its two
layers have a window of 3 tokens, so what stands 5 tokens back never reaches the question, and on
text of that kind nothing it is fed beats a guess: ln 8 nats. A coprocessor starts from its weights
but reads the whole cache: it can find the letter, and its latents can put it where the decoder
looks. Losses are of the answer, on documents never trained on.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.optimizer import make_optimizer
from latent_delib.delib.step import (
    Objective,
    TrainState,
    ahead_step,
    read_step,
    train_step,
)
from latent_delib.nn import transformer
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Transformer

BOS, QUESTION = 1, 2
LETTERS, FILLERS = np.arange(3, 11), np.arange(11, 19)
LENGTH = 8
NEAR, FAR = (1, 2), (5,)  # tokens from the letter to the question
AT = LENGTH - 2  # where the question stands
GUESS = np.log(len(LETTERS))

DECODER = TransformerConfig(
    num_layers=2,
    embed_dim=48,
    num_heads=3,
    num_kv_heads=3,
    ffn_dim=96,
    vocab_size=19,
    layer_pattern=("local",),
    window=3,
)
COPROCESSOR = dataclasses.replace(DECODER, layer_pattern=("global",))
AUGMENTATION = Augmentation(
    Transformer(DECODER), num_latents=2, placement="overlay", coprocessor=Transformer(COPROCESSOR)
)
BATCH, DECODER_STEPS, STEPS = 32, 60, 160
SEED = 0


def documents(rng, count, distances):
    """Documents at random, int32 [count, LENGTH]."""
    letter = rng.choice(LETTERS, count)
    tokens = rng.choice(FILLERS, (count, LENGTH))
    tokens[:, 0] = BOS
    tokens[np.arange(count), AT - rng.choice(distances, count)] = letter
    tokens[:, AT] = QUESTION
    tokens[:, AT + 1] = letter
    return tokens.astype(np.int32)


def not_among(tokens, others):
    known = {row.tobytes() for row in others}
    return np.stack([row for row in tokens if row.tobytes() not in known])


def train(aug, frozen, trainable, tokens):
    """Trains on these documents in order, with the command's step; returns the trained tree."""
    steps = len(tokens) // BATCH
    optimizer = base.get_config().optimizer
    rates = {"learning_rate": 0.02, "soft_token_learning_rate": 0.02, "warmup_steps": steps // 10}
    optimizer.update({"name": "muon"} | rates)  # AdamW needs 400 steps for as much
    tx = make_optimizer(optimizer, steps).tx
    objective = Objective(
        aug=aug,
        num_traces=LENGTH - 1,
        num_ahead=1,
        dtype=jnp.float32,
        seed=SEED,
    )
    step = partial(train_step, objective=objective, tx=tx)

    # Hundreds of steps run three times as fast when they are compiled with more effort than other
    # tests need.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def run(frozen, state, batches):
        def one(state, tokens_BT):
            return step(state, frozen, {"tokens": tokens_BT, "segment": jnp.ones_like(tokens_BT)})

        return jax.lax.scan(one, state, batches)[0]

    start = TrainState(jnp.int32(0), trainable, tx.init(trainable))
    return run(frozen, start, tokens.reshape(steps, BATCH, LENGTH)).trainable


@jax.jit
def read(decoder, tokens):
    """What the decoder makes of documents, and its loss on each answer."""
    segment = jnp.ones_like(tokens)
    text, nll_BT = read_step({"decoder": decoder}, tokens, segment, aug=AUGMENTATION)
    return text, nll_BT[:, AT]


def augmented(aug, decoder, trained, tokens):
    """Mean loss on the answer: with a document's own latents, and with those of another one."""
    params = {"decoder": decoder} | trained
    text, _ = read(decoder, tokens)
    row = np.arange(len(tokens))
    at = np.full((len(tokens), 1), AT, np.int32)
    loss = jax.jit(partial(ahead_step, aug=aug, num_ahead=1))

    def mean(donor_B):
        nll_BMA, _ = loss(params, text, tokens, np.ones_like(tokens), at, donor_B)
        return float(nll_BMA.mean())

    return mean(row), mean(np.roll(row, 1))


@pytest.fixture(scope="module")
def decoder():
    """A decoder that has learned to answer from near by."""
    start = jax.jit(transformer.init, static_argnums=1)(jax.random.key(SEED), DECODER)
    aug = dataclasses.replace(AUGMENTATION, method="decoder")
    near = documents(np.random.default_rng(SEED), DECODER_STEPS * BATCH, NEAR)
    return train(aug, {}, {"decoder": start}, near)["decoder"]


@pytest.fixture(scope="module")
def far():
    """Documents to train on, and others to evaluate on."""
    rng = np.random.default_rng(SEED + 1)
    training = documents(rng, STEPS * BATCH, FAR)
    return training, not_among(documents(rng, 500, FAR), training)


@pytest.mark.slow
def test_the_decoder_answers_from_near_by_and_sees_nothing_far(decoder, far):
    _, fresh = far
    near = documents(np.random.default_rng(SEED + 2), len(fresh), NEAR)
    assert read(decoder, near)[1].mean() < 0.1

    loss = read(decoder, fresh)[1]
    assert loss.mean() > 0.9 * GUESS
    changed = fresh.copy()
    changed[:, AT - FAR[0]] = np.roll(fresh[:, AT - FAR[0]], 1)
    np.testing.assert_array_equal(read(decoder, changed)[1], loss)


def test_cache_augmentation_answers_what_decoder_and_static_tokens_cannot(decoder, far):
    training, fresh = far
    losses = {}
    for method in ("cache_augmentation", "static_tokens"):
        aug = dataclasses.replace(AUGMENTATION, method=method)
        start = METHODS[method].init(jax.random.key(SEED), decoder, aug)
        trained = train(aug, {"decoder": decoder}, start, training)
        assert set(trained) == {"coprocessor"}
        losses[method] = augmented(aug, decoder, trained, fresh)

    own, other = losses["cache_augmentation"]
    static, _ = losses["static_tokens"]
    plain = float(read(decoder, fresh)[1].mean())
    # Nats per answer, three seeds: decoder 3.7 to 5.4, static tokens 2.1 to 2.2, augmented 0.01,
    # latents of another text 6.2 to 6.8. A coprocessor whose bounds show it nothing of the cache,
    # trained with AdamW: 2.4.
    assert own < 0.5, losses
    assert own < min(plain, static) - 1, losses
    assert other > GUESS + 1, losses
