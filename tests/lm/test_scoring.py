"""Log-probabilities of text against a dense sequence, and in whichever batch it is read."""

import jax
import numpy as np
import pytest
import small
from naive_decoding import naive_generate, naive_logprobs, recurring_logprob

import latent_delib as ld
from tests.prompts import FIVE, NEW, PROMPTS, TAILS, ids_of
from tests.texts import WORDS


@pytest.mark.parametrize("name", ["decoder", *small.TWO_AND_SLOW])
def test_logprobs(lms, name):
    lm = lms[name]
    sums, greedy = lm.logprobs(FIVE, TAILS)
    for prompt, tail, found in zip(FIVE, TAILS, sums):
        tokens = lm.tokenizer.encode_in_text(tail)
        expected = naive_logprobs(lm, ids_of(lm, prompt), tokens).sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sums.dtype == np.float32 and not greedy.any()


def test_logprobs_know_the_likeliest(lms):
    lm = lms["overlay"]
    (best,) = naive_generate(lm, PROMPTS[:1], 3)
    but_one = [*best[:2], best[2] ^ 1]
    _, greedy = lm.logprobs(FIVE, [best, *TAILS[1:4], but_one])
    assert greedy.tolist() == [True, False, False, False, False]


def test_logprobs_where_latents_recur(recurring):
    prompts = [ids_of(recurring, prompt) for prompt in PROMPTS]
    tails = [c.tokens.tolist() for c in recurring.continuations(prompts, NEW)]
    sums, greedy = recurring.logprobs(prompts, tails)
    for prompt, tail, found in zip(prompts, tails, sums):
        expected = recurring_logprob(recurring, prompt + tail, len(prompt) - 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert greedy.all()


def test_logprobs_without_latents_are_the_decoders(lms):
    found = lms["after"].logprobs(FIVE, TAILS, augment=False)
    expected = lms["decoder"].logprobs(FIVE, TAILS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_logits_are_the_decoders(lms, text):
    np.testing.assert_array_equal(lms["after"].logits(text), lms["decoder"].logits(text))


# Continuations of one prompt: of the second one there are more than one row takes.

PAIRS = [(p, t) for p in PROMPTS[:3] for t in ("the mat", "on a green door", "a")]
PAIRS += [(PROMPTS[3], "rain")]
PAIRS += [(PROMPTS[1], f"{t} {u}") for t in WORDS[:5] for u in WORDS[:2]]


def test_continuations_of_one_prompt_are_read_together(lms):
    """Whatever they are read with, each has the log-probability it has alone."""
    lm = lms["after"]
    together, _ = lm.logprobs(*zip(*PAIRS), batch_size=16)
    alone = [lm.logprobs([prompt], [tail])[0][0] for prompt, tail in PAIRS[::4]]
    np.testing.assert_allclose(together[::4], alone, rtol=1e-5)


def test_progress_of_logprobs(lms):
    done = []
    lms["after"].logprobs(*zip(*PAIRS), batch_size=16, progress=done.append)
    assert done == sorted(done) and done[-1] == len(PAIRS)


def test_logprobs_of_token_ids_are_those_of_text(lms):
    lm = lms["after"]
    ids = [(ids_of(lm, prompt), lm.tokenizer.encode_in_text(tail)) for prompt, tail in PAIRS]
    np.testing.assert_array_equal(lm.logprobs(*zip(*ids))[0], lm.logprobs(*zip(*PAIRS))[0])


# Whole texts, cut into pieces of 12 tokens.

TEXTS = [PROMPTS[0], "rain " * 9, "", "a"]
each_model = pytest.mark.parametrize(
    "name", ["decoder", pytest.param("after", marks=pytest.mark.slow), "overlay"]
)
each_rhythm = pytest.mark.parametrize(
    "name, every",
    [("decoder", 0), pytest.param("after", 0, marks=pytest.mark.slow), ("overlay", 3)],
)


def of_pieces(lm):
    return ld.AugmentedLM(lm.decoder, lm.coprocessor, max_length=12)


@each_rhythm
def test_rolling_logprobs(lms, name, every):
    """Each stretch lies ahead of its own latents; pieces of a long text all begin with BOS."""
    lm, stretch = of_pieces(lms[name]), every or 11
    at = np.arange(0, 11, stretch)
    predicted = at[:, None] + 1 + np.arange(stretch)
    found = lm.rolling_logprobs(TEXTS, every=every, batch_size=4)
    for text, logprob in zip(TEXTS, found):
        ids, expected = lm.tokenizer.encode(text), 0.0
        for i in range(0, len(ids), 11):
            piece = [2, *ids[i : i + 11]]
            row = piece + [0] * (24 - len(piece))
            _, ahead = lm.ahead_logprobs([row], at[None], stretch)
            expected += ahead[0][predicted < len(piece)].sum()
        np.testing.assert_allclose(logprob, expected, rtol=1e-5, atol=1e-5)
    assert found[2] == 0


@each_rhythm
def test_rolling_logprobs_of_token_ids_are_those_of_text(lms, name, every):
    """With BOS and without it."""
    lm = of_pieces(lms[name])
    ids = lm.tokenizer.encode(TEXTS[0])
    expected = lm.rolling_logprobs(TEXTS, every=every, batch_size=4)[0]
    found = lm.rolling_logprobs([ids, [2, *ids], np.array(ids)], every=every, batch_size=4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@each_model
def test_rolling_logprobs_without_latents_are_the_decoders(lms, name):
    plain = lms["decoder"].rolling_logprobs(TEXTS[:1])
    assert lms[name].rolling_logprobs(TEXTS[:1], augment=False) == plain


@each_model
def test_rhythms_longer_than_a_text_take_no_room(lms, name):
    lm = of_pieces(lms[name])
    once = lm.rolling_logprobs(TEXTS, batch_size=4)
    again = lm.rolling_logprobs(TEXTS, every=10**6, batch_size=4)
    np.testing.assert_array_equal(again, once)


@pytest.mark.slow
def test_rolling_logprobs_where_latents_recur(recurring, text):
    rows = text.tolist()
    expected = [recurring_logprob(recurring, row, 0) for row in rows]
    np.testing.assert_allclose(recurring.rolling_logprobs(rows), expected, rtol=1e-4)


# The tokens ahead of some positions.

AT, AHEAD = np.array([[0, 3, 9], [1, 7, 9]]), 6


@pytest.mark.parametrize("name", ["after", "overlay"])
def test_ahead_logprobs(lms, name, text):
    _, found = lms[name].ahead_logprobs(text, AT, AHEAD)
    for b, m in np.ndindex(AT.shape):
        after = AT[b, m] + 1
        prompt, ahead = text[b, :after].tolist(), text[b, after : after + AHEAD].tolist()
        np.testing.assert_allclose(found[b, m], naive_logprobs(lms[name], prompt, ahead), atol=2e-4)


@pytest.mark.parametrize("name", ["after", "overlay"])
def test_plain_ahead_logprobs_are_those_of_logits(lms, name, text):
    found, _ = lms[name].ahead_logprobs(text, AT, AHEAD)
    logp = np.asarray(jax.nn.log_softmax(lms[name].logits(text)))
    row, at = np.arange(len(text))[:, None, None], AT[..., None] + np.arange(AHEAD)
    np.testing.assert_allclose(found, logp[row, at, text[row, at + 1]], atol=1e-5)


def test_ahead_logprobs_without_coprocessor_are_the_decoders_twice(lms, text):
    both = lms["decoder"].ahead_logprobs(text, [[3], [8]], 6)
    np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(both[0], lms["after"].ahead_logprobs(text, [[3], [8]], 6)[0])


@pytest.mark.slow
def test_ahead_logprobs_where_latents_recur(recurring, text):
    _, found = recurring.ahead_logprobs(text, [[3], [8]], 7)
    rows = text.tolist()
    expected = [recurring_logprob(recurring, row[: p + 8], p) for row, p in zip(rows, (3, 8))]
    np.testing.assert_allclose(found.sum(axis=(1, 2)), expected, rtol=1e-4)


def padded(lm, text, length):
    """Returns a text with padding from some token on."""
    changed = text.copy()
    changed[:, length:] = lm.tokenizer.pad_id
    assert (changed != text).any()
    return changed


@pytest.mark.parametrize("name", ["after", "overlay"])
def test_ahead_logprobs_do_not_see_padding(lms, name, text):
    lm = lms[name]
    found = lm.ahead_logprobs(padded(lm, text, AT.max() + AHEAD + 1), AT, AHEAD)
    jax.tree.map(np.testing.assert_array_equal, found, lm.ahead_logprobs(text, AT, AHEAD))


@pytest.mark.parametrize("name", ["after", "overlay"])
def test_latents_do_not_see_padding(lms, name, text):
    lm = lms[name]
    latents = lm.latents(text, AT)
    assert latents.shape == (*AT.shape, 4, lm.decoder.config.embed_dim)
    np.testing.assert_array_equal(lm.latents(padded(lm, text, AT.max() + 1), AT), latents)
