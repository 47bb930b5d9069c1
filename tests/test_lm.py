"""The Python interface: against the dense oracle, and against what each call promises of the others."""

import dataclasses

import jax
import naive
import numpy as np
import pytest

import latent_delib as ld
from latent_delib import engine, train
from latent_delib.checkpoint import Checkpoints
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.tokenizer import Tokenizer

L, NEW = 4, 9  # latents; new tokens, enough for the window of 5 to leave latents and prompt behind
PROMPTS = ["the cat sat on a mat and a dog", "rain", "", "green hills at night when the dog ran"]


class Ids(Tokenizer):
    """Its text is token ids: random weights write bytes that make no text."""

    def decode(self, ids):
        return [int(i) for i in ids]


@pytest.fixture(scope="module")
def decoder(decoder_folder):
    """With layers loud enough to be heard over the embedding of the last token, or it would only repeat that."""
    found, random = ld.load_decoder(str(decoder_folder)), np.random.default_rng(2)
    layers = jax.tree.map(
        lambda x: x + (1.5 + 0.5 * random.standard_normal(x.shape) if x.ndim == 2 else 0), found.params["layers"]
    )
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), found.params | {"layers": layers})
    return dataclasses.replace(found, params=params, tokenizer=Ids(decoder_folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def lms(decoder):
    """Placement -> model; the coprocessor is far from the decoder it started from. "decoder": no coprocessor."""
    random = np.random.default_rng(0)

    def model(placement):
        start = ld.init_coprocessor(decoder, L, placement)
        params = jax.tree.map(lambda x: np.asarray(x + 0.1 * random.standard_normal(x.shape), np.float32), start.params)
        return ld.AugmentedLM(decoder, dataclasses.replace(start, params=params))

    return {placement: model(placement) for placement in PLACEMENTS} | {"decoder": ld.AugmentedLM(decoder)}


@pytest.fixture(scope="module")
def text(decoder):
    """Two rows of 24 tokens, BOS first."""
    tokens = np.random.default_rng(1).integers(4, decoder.config.vocab_size, (2, 24))
    tokens[:, 0] = decoder.tokenizer.bos_id
    return tokens


def naive_logits(lm, prompt, new, delay=0):
    """Logits of what follows every token of prompt + new, float64: one dense sequence, no cache. `delay` tokens of
    `new` were decoded when the prompt's latents joined."""
    config, weights = lm.decoder.config, lm.decoder.params
    tokens, at = np.array(prompt + new), len(prompt) + delay - 1
    x = naive.embed(config, weights, tokens)
    if lm.coprocessor is None or at >= len(tokens):
        out = naive.forward(config, [(weights, x)], np.arange(len(x)), np.tri(len(x), dtype=bool))
        return naive.logits(config, weights, out)
    after = lm.coprocessor.placement == "after"

    def latent_position(p):
        return p + 1 + np.arange(L) if after else np.maximum(p - L + 1 + np.arange(L), 0)

    P = len(prompt)
    parts = [(weights, x[:P]), (lm.coprocessor.params, lm.coprocessor.params["soft_tokens"])]
    position = np.concatenate([np.arange(P), latent_position(P - 1)])
    z = naive.forward(config, parts, position, np.tri(P + L, dtype=bool))[P:]
    kept = at + 1 if after else at
    position = np.arange(len(tokens)) + np.where(np.arange(len(tokens)) >= kept, L * after, 0)
    position = np.insert(position, kept, latent_position(at))
    out = naive.forward(config, [(weights, np.insert(x, kept, z, axis=0))], position, np.tri(len(position), dtype=bool))
    # Up to x_at it is the plain decoder that spoke; what follows x_at comes from the last latent or from x_at again.
    return np.concatenate([np.full((at, config.vocab_size), np.nan), naive.logits(config, weights, out[at + L :])])


def naive_greedy(lm, prompt, delay=0):
    ids, new = [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)], []
    for _ in range(NEW):
        new.append(int(naive_logits(lm, ids, new, delay)[-1].argmax()))
    return new


@pytest.mark.parametrize("name", ["decoder", *PLACEMENTS])
def test_greedy_equals_a_loop_without_a_cache(lms, name):
    found = lms[name].generate(PROMPTS, NEW)
    assert found == [naive_greedy(lms[name], prompt) for prompt in PROMPTS]
    assert len(set(sum(found, []))) > NEW  # a decoder that repeats itself would show nothing


@pytest.mark.parametrize("name", PLACEMENTS)
def test_delayed_latents_are_the_prompts(lms, name):
    found = lms[name].generate(PROMPTS, NEW, delay=2)
    plain = lms["decoder"].generate(PROMPTS, NEW)
    assert found == [naive_greedy(lms[name], prompt, delay=2) for prompt in PROMPTS]
    assert [f[:2] for f in found] == [p[:2] for p in plain] and found != plain


def test_without_coprocessor_is_the_decoder(lms, text):
    plain, augmented = lms["decoder"], lms["after"]
    assert augmented.generate(PROMPTS, NEW, augment=False) == plain.generate(PROMPTS, NEW)
    np.testing.assert_array_equal(augmented.logits(text), plain.logits(text))
    tails = ["the mat", "on", "rain fell", "a"]
    for ours, theirs in zip(augmented.logprobs(PROMPTS, tails, augment=False), plain.logprobs(PROMPTS, tails)):
        np.testing.assert_array_equal(ours, theirs)
    both = plain.ahead_logprobs(text, [[3], [8]], 6)
    np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(both[0], augmented.ahead_logprobs(text, [[3], [8]], 6)[0])


def test_sampling(lms):
    lm = lms["decoder"]
    greedy, drawn = lm.generate(PROMPTS, NEW), lm.generate(PROMPTS, NEW, temperature=1.0, seed=3)
    assert drawn == lm.generate(PROMPTS, NEW, temperature=1.0, seed=3)
    assert drawn != lm.generate(PROMPTS, NEW, temperature=1.0, seed=4) and drawn != greedy
    assert lm.generate(PROMPTS, NEW, temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert lm.generate(PROMPTS, NEW, temperature=1e-4, seed=3) == greedy
    even = lm.generate(PROMPTS, NEW, temperature=1e6, seed=3)  # all tokens alike: only fresh noise tells steps apart
    assert all(len(set(row)) > NEW // 2 for row in even) and len(set(map(tuple, even))) == len(even)


@pytest.mark.parametrize(
    "temperature, top_p, weights",
    [(1.0, 1.0, [4, 3, 2, 1]), (1.0, 0.6, [4, 3, 0, 0]), (0.5, 0.9, [16, 9, 4, 0]), (0.0, 1.0, [1, 0, 0, 0])],
)
def test_frequencies_of_samples(temperature, top_p, weights):
    rows, order = 20_000, [2, 0, 3, 1]
    logits = np.tile(np.log([4, 3, 2, 1])[order], (rows, 1))
    drawn = engine.sample(jax.random.key(0), jax.numpy.asarray(logits), temperature, top_p)
    expected = np.array(weights)[order] / sum(weights)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / rows, expected, atol=0.02)


def test_eos_ends_a_row_and_pads_it(decoder, lms):
    plain, tokenizer = lms["decoder"].generate(PROMPTS, NEW), Ids(decoder.tokenizer.path)
    tokenizer.eos_id = end = plain[0][3]
    found = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer)).generate(PROMPTS, NEW)

    def ended(row):
        n = row.index(end) + 1 if end in row else NEW
        return row[:n] + [tokenizer.pad_id] * (NEW - n)

    assert found == [ended(row) for row in plain]
    assert found[0] != plain[0] and any(end not in row for row in plain)


@pytest.mark.parametrize("name", ["decoder", *PLACEMENTS])
def test_logprobs(lms, name):
    lm = lms[name]
    prompts = [*PROMPTS, PROMPTS[0]]
    tails = ["the mat", "on a green door", "rain fell over", "a", "a"]
    heads = [[lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)] for prompt in prompts]
    sums, greedy = lm.logprobs(prompts, tails)
    for head, tail, found in zip(heads, map(lm.tokenizer.encode, tails), sums):
        logits = naive_logits(lm, head, tail)[len(head) - 1 : -1]
        expected = np.log(naive.softmax(logits))[np.arange(len(tail)), tail].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sums.dtype == np.float32 and not greedy.any()


def test_logprobs_know_the_likeliest(decoder, lms, monkeypatch):
    lm = lms["overlay"]
    best = naive_greedy(lm, PROMPTS[0])[:3]
    known = {"best": best, "but one": [*best[:2], best[2] ^ 1]}
    encode = lm.tokenizer.encode
    monkeypatch.setattr(lm.tokenizer, "encode", lambda text: known.get(text) or encode(text))
    assert lm.logprobs([PROMPTS[0]] * 2, ["best", "but one"])[1].tolist() == [True, False]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_ahead_logprobs_and_what_follows_the_text(lms, name, text):
    lm, at, A = lms[name], np.array([[0, 3, 9], [1, 7, 9]]), 6
    plain, augmented = lm.ahead_logprobs(text, at, A)
    logp = np.asarray(jax.nn.log_softmax(lm.logits(text)))
    for b, m in np.ndindex(at.shape):
        p = at[b, m]
        ahead = text[b, p + 1 : p + 1 + A]
        np.testing.assert_allclose(plain[b, m], logp[b, np.arange(p, p + A), ahead], atol=1e-5)
        logits = naive_logits(lm, list(text[b, : p + 1]), list(ahead[:-1]))[p:]
        np.testing.assert_allclose(augmented[b, m], np.log(naive.softmax(logits))[np.arange(A), ahead], atol=1e-4)

    padded = text.copy()
    padded[:, at.max() + A + 1 :] = lm.tokenizer.pad_id
    assert (padded != text).any()
    for ours, theirs in zip(lm.ahead_logprobs(padded, at, A), (plain, augmented)):
        np.testing.assert_array_equal(ours, theirs)
    padded[:, at.max() + 1 :] = lm.tokenizer.pad_id
    latents = lm.latents(text, at)
    assert latents.shape == (*at.shape, L, lm.decoder.config.embed_dim)
    np.testing.assert_array_equal(lm.latents(padded, at), latents)


def test_load_coprocessor_is_what_was_trained(make_config, decoder, tmp_path, monkeypatch):
    saved, save = {}, Checkpoints.save

    def watched(self, step, trainable, *rest):
        saved[step] = jax.tree.map(np.asarray, trainable)
        save(self, step, trainable, *rest)

    monkeypatch.setattr(Checkpoints, "save", watched)
    train.train(make_config({"method.placement": "overlay"}), str(tmp_path))
    assert sorted(saved) == [2, 4]
    for step, wanted in ((None, 4), (2, 2)):
        found = ld.load_coprocessor(str(tmp_path), step)
        assert (found.method, found.num_latents, found.placement) == ("cache_augmentation", 2, "overlay")
        assert (found.step, found.fingerprint) == (wanted, decoder.fingerprint)
        jax.tree.map(np.testing.assert_array_equal, found.params, saved[wanted]["coprocessor"])
    assert ld.AugmentedLM(decoder, found).latents([[2, 5, 7]], [[1]]).shape == (1, 1, 2, decoder.config.embed_dim)


MISTAKES = {
    "no decoder": (lambda lm, d: ld.load_decoder("nowhere"), "decoder 'nowhere': .*config.json does not exist"),
    "no checkpoint": (lambda lm, d: ld.load_coprocessor("nowhere"), "--workdir=nowhere: holds no checkpoints"),
    "placement": (lambda lm, d: ld.init_coprocessor(d, 2, "before"), "placement='before': expected one of"),
    "no latents": (lambda lm, d: ld.init_coprocessor(d, 0), "num_latents=0: expected 1 to 320"),
    "many latents": (lambda lm, d: ld.init_coprocessor(d, 321), "num_latents=321: expected 1 to 320"),
    "another decoder": (
        lambda lm, d: ld.AugmentedLM(dataclasses.replace(d, fingerprint="f" * 64), lm.coprocessor),
        "coprocessor belongs to decoder .*, this decoder is ffffffffffff",
    ),
    "no coprocessor": (lambda lm, d: ld.AugmentedLM(d).latents([[2, 5]], [[1]]), "no coprocessor, so no latents"),
    "one row": (lambda lm, d: lm.logits([2, 5]), r"tokens: int64 of shape \(2,\), expected integers \[B, T\]"),
    "floats": (lambda lm, d: lm.logits([[2.0, 5.0]]), "tokens: float64 of shape"),
    "token 320": (lambda lm, d: lm.logits([[2, 320]]), "tokens: from 2 to 320, the vocabulary has 320"),
    "token -1": (lambda lm, d: lm.logits([[2, -1]]), "tokens: from -1 to 2, the vocabulary has 320"),
    "rows of positions": (
        lambda lm, d: lm.latents([[2, 5]], [[1], [1]]),
        r"int64 of shape \(2, 1\), expected integers \[1, M",
    ),
    "half a position": (lambda lm, d: lm.latents([[2, 5]], [[0.5]]), "positions: float64 of shape"),
    "position -1": (lambda lm, d: lm.latents([[2, 5]], [[-1]]), "positions: from -1 to -1 .* the text has 2"),
    "position 2": (lambda lm, d: lm.latents([[2, 5]], [[2]]), "positions: from 2 to 2 with 0 ahead tokens"),
    "no ahead token": (lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], [[1]], 2), "positions: .* with 2 ahead tokens"),
    "ahead 0": (lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], [[1]], 0), "ahead=0: expected at least 1"),
    "no prompt": (lambda lm, d: lm.generate([]), "no prompts were given"),
    "no new token": (lambda lm, d: lm.generate(["a"], 0), r"max_new_tokens=0 \(at least 1\)"),
    "delay": (lambda lm, d: lm.generate(["a"], delay=-1), r"delay=-1 \(at least 0\)"),
    "temperature": (lambda lm, d: lm.generate(["a"], temperature=-0.1), r"temperature=-0.1 \(at least 0\)"),
    "top_p 0": (lambda lm, d: lm.generate(["a"], top_p=0.0), r"top_p=0.0 \(above 0, at most 1\)"),
    "top_p 2": (lambda lm, d: lm.generate(["a"], top_p=2.0), r"top_p=2.0 \(above 0, at most 1\)"),
    "continuations": (lambda lm, d: lm.logprobs(["a", "b"], ["c"]), "2 prompts, but 1 continuations"),
    "empty continuation": (lambda lm, d: lm.logprobs(["a", "b"], ["c", ""]), "continuation 1 is empty"),
    "nothing to score": (lambda lm, d: lm.logprobs([], []), "no prompts were given"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(lms, decoder, name):
    mistake, message = MISTAKES[name]
    with pytest.raises(ld.UserError, match=message) as caught:
        mistake(lms["after"], decoder)
    assert "\n" not in str(caught.value)


def test_a_trained_decoder_has_no_coprocessor(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, {"decoder": np.zeros(2)}, {"mu": np.zeros(2)}, {"method.name": "decoder"})
    checkpoints.close()
    with pytest.raises(ld.UserError, match="method 'decoder' has no coprocessor"):
        ld.load_coprocessor(str(tmp_path))
