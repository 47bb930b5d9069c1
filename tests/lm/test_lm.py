"""The Python interface against the dense oracle, and its calls against each other."""

import dataclasses
import logging
import time
import warnings

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib import mesh
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib.methods import param_axes
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.job import build
from latent_delib.job.record import Record
from latent_delib.lm import batching, compiled, decoding, load
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.lm.sampling import Sampler
from latent_delib.machine.checkpoint import Checkpoints

WORDS = "the cat sat on a mat and dog ran".split()
L, NEW = 4, 9  # latents; new tokens, enough for the window of 5 to leave latents and prompt behind
PROMPTS = ["the cat sat on a mat and a dog", "rain", "a", "green hills at night when the dog ran"]


FIVE, TAILS = [*PROMPTS, PROMPTS[0]], ["the mat", "on a green door", "rain fell over", "a", "a"]


class Ids(Tokenizer):
    """Its text is token ids: random weights write bytes that make no text."""

    def decode(self, ids):
        return [int(i) for i in ids]

    def decode_in_text(self, ids):
        return self.decode(ids)


@pytest.fixture(scope="module")
def decoder(decoder_folder):
    """With layers loud enough to be heard over the last token's embedding."""
    found, random = ld.load_decoder(str(decoder_folder)), np.random.default_rng(2)
    layers = jax.tree.map(
        lambda x: x + (1.5 + 0.5 * random.standard_normal(x.shape) if x.ndim == 2 else 0),
        found.params["layers"],
    )
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), found.params | {"layers": layers})
    return dataclasses.replace(
        found, params=params, tokenizer=Ids(decoder_folder / "tokenizer.model")
    )


@pytest.fixture(scope="module")
def lms(decoder):
    """By placement, with a coprocessor far from the decoder. "decoder": no coprocessor."""
    random = np.random.default_rng(0)

    def model(placement):
        start = ld.init_coprocessor(decoder, L, placement)
        params = jax.tree.map(
            lambda x: np.asarray(x + 0.1 * random.standard_normal(x.shape), np.float32),
            start.params,
        )
        return ld.AugmentedLM(decoder, dataclasses.replace(start, params=params))

    return {placement: model(placement) for placement in PLACEMENTS} | {
        "decoder": ld.AugmentedLM(decoder)
    }


@pytest.fixture(scope="module")
def recurring(decoder):
    """Two trained vectors before the prompt's last token, and before each third one after it."""
    vectors = np.random.default_rng(4).standard_normal((2, decoder.config.embed_dim))
    params = {"soft_tokens": vectors.astype(np.float32)}
    start = ld.init_coprocessor(decoder, 2, "shared")
    start = small.with_method(start, name="latent_tokens", every=3)
    return ld.AugmentedLM(decoder, dataclasses.replace(start, params=params))


@pytest.fixture(scope="module")
def text(decoder):
    """Two rows of 24 tokens, BOS first."""
    tokens = np.random.default_rng(1).integers(4, decoder.config.vocab_size, (2, 24))
    tokens[:, 0] = decoder.tokenizer.bos_id
    return tokens


def naive_logits(lm, prompt, new, delay=0):
    """Logits of what follows every token of prompt + new, float64: one dense sequence, no cache.

    `delay` tokens of `new` were decoded when the prompt's latents joined.
    """
    config, weights = lm.decoder.config, lm.decoder.params
    tokens, at = np.array(prompt + new), len(prompt) + delay - 1
    x = naive.embed(config, weights, tokens)
    if lm.coprocessor is None or at >= len(tokens):
        out = naive.forward(config, [(weights, x)], np.arange(len(x)), np.tri(len(x), dtype=bool))
        return naive.logits(config, weights, out)
    placement = lm.coprocessor.placement
    moves = L if naive.moves(placement) else 0

    P = len(prompt)
    parts = [(weights, x[:P]), (lm.coprocessor.params, lm.coprocessor.params["soft_tokens"])]
    position = np.concatenate([np.arange(P), naive.latent_position(P - 1, L, placement)])
    z = naive.forward(config, parts, position, np.tri(P + L, dtype=bool))[P:]
    kept = at + 1 if placement == "after" else at
    position = np.arange(len(tokens)) + np.where(np.arange(len(tokens)) >= kept, moves, 0)
    position = np.insert(position, kept, naive.latent_position(at, L, placement))
    visible = np.tri(len(position), dtype=bool)
    if lm.aug.visible_text:
        visible[kept:, : max(at + 1 - lm.aug.visible_text, 0)] = False
    out = naive.forward(config, [(weights, np.insert(x, kept, z, axis=0))], position, visible)
    # Up to x_at it is the plain decoder that spoke; what follows x_at comes from the last latent or
    # from x_at again.
    return np.concatenate(
        [np.full((at, config.vocab_size), np.nan), naive.logits(config, weights, out[at + L :])]
    )


def naive_greedy(lm, prompt, delay=0, every=0):
    """Latents are of the text `delay` tokens before they joined: the last ones that joined."""
    ids, new = [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)], []
    for made in range(NEW):
        asked = max(0, made - delay) // every * every if every else 0
        new.append(int(naive_logits(lm, ids + new[:asked], new[asked:], delay)[-1].argmax()))
    return new


@pytest.mark.parametrize("name", ["decoder", *PLACEMENTS])
def test_greedy_equals_a_loop_without_a_cache(lms, name):
    found = lms[name].generate(PROMPTS, NEW)
    assert found == [naive_greedy(lms[name], prompt) for prompt in PROMPTS]
    assert len(set(sum(found, []))) > NEW  # a decoder that repeats itself would show nothing


@pytest.mark.parametrize("name", ["decoder", "overlay"])
def test_bfloat16_stays_near_float64(lms, name):
    """Decoding and scoring, by the dense reading of the same weights, whose logits spread by 1."""

    def rounded(model):
        return dataclasses.replace(
            model, params=jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), model.params)
        )

    coprocessor = lms[name].coprocessor
    lm = ld.AugmentedLM(rounded(lms[name].decoder), coprocessor and rounded(coprocessor))
    assert lm.dtype == jnp.bfloat16
    new = lm.generate(PROMPTS, NEW)
    scores, _ = lm.logprobs(PROMPTS, new)
    behind = []  # how far each token's logit is from the highest one
    for prompt, tokens, score in zip(PROMPTS, new, scores):
        ids = [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)]
        logits = naive_logits(lm, ids, tokens)[len(ids) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(tokens)[:, None], axis=-1)[:, 0]
        behind.extend(logits.max(axis=-1) - chosen)
        exact = (chosen - np.log(np.exp(logits).sum(axis=-1))).sum()
        assert score == pytest.approx(exact, rel=0.05)
    assert np.mean(behind) < 0.05


@pytest.mark.parametrize("name", small.TWO_AND_SLOW)
def test_delayed_latents_are_the_prompts(lms, name):
    found = lms[name].generate(PROMPTS, NEW, delay=2)
    plain = lms["decoder"].generate(PROMPTS, NEW)
    assert found == [naive_greedy(lms[name], prompt, delay=2) for prompt in PROMPTS]
    assert [f[:2] for f in found] == [p[:2] for p in plain] and found != plain


@pytest.mark.parametrize("every, delay", [(1, 0), (5, 2)])
@pytest.mark.parametrize("name", ["after", "overlay"])
def test_latents_again_every_few_tokens(lms, name, every, delay):
    lm = lms[name]
    found = lm.continuations(PROMPTS[:3], NEW, every=every, delay=delay)
    assert [c.text for c in found] == [
        naive_greedy(lm, prompt, delay, every) for prompt in PROMPTS[:3]
    ]
    assert {c.joined for c in found} == {tuple(range(delay, NEW, every))}
    assert [c.text for c in found] != lm.generate(PROMPTS[:3], NEW, delay=delay)


@pytest.mark.parametrize("name, every, delay", [("after", 0, 0), ("overlay", 5, 2)])
def test_latents_in_place_of_text(decoder, lms, name, every, delay):
    """Once latents have joined, the decoder sees two tokens before them, whatever the length."""
    short = small.with_method(lms[name].coprocessor, visible_text=2)
    lm = ld.AugmentedLM(decoder, short)
    found = lm.generate(PROMPTS, NEW, every=every, delay=delay)
    assert found == [naive_greedy(lm, prompt, delay, every) for prompt in PROMPTS]
    assert found != lms[name].generate(PROMPTS, NEW, every=every, delay=delay)


def recurring_logits(lm, tokens, p):
    """Logits after tokens[p] and each one that follows, float64: one dense sequence."""
    soft = lm.coprocessor.params["soft_tokens"]
    where = (soft, np.array(tokens), p, lm.aug.every)
    out = naive.recurring(lm.decoder.config, lm.decoder.params, *where)
    return naive.logits(lm.decoder.config, lm.decoder.params, out)


def recurring_logprob(lm, tokens, p):
    """log p of all tokens after tokens[p]."""
    logits = recurring_logits(lm, tokens[:-1], p)
    return np.log(naive.softmax(logits))[range(len(logits)), tokens[p + 1 :]].sum()


def test_latents_that_recur_while_decoding(recurring):
    """Every token sees all groups before it, as in one sequence; scores say the same."""
    lm = recurring
    found = lm.continuations(PROMPTS, NEW)
    assert {c.joined for c in found} == {(0, 3, 6)}
    prompts = [[lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)] for prompt in PROMPTS]
    for prompt, new in zip(prompts, found):
        whole = [*prompt, *new.tokens.tolist()]
        likeliest = recurring_logits(lm, whole, len(prompt) - 1).argmax(axis=-1)
        assert likeliest[:-1].tolist() == new.tokens.tolist()
    tails = [new.tokens.tolist() for new in found]
    sums, greedy = lm.logprobs(prompts, tails)
    expected = [recurring_logprob(lm, p + tail, len(p) - 1) for p, tail in zip(prompts, tails)]
    np.testing.assert_allclose(sums, expected, rtol=1e-4)
    assert greedy.all()
    with pytest.raises(ld.UserError, match="every=2: latents .* after each 3 tokens"):
        lm.generate(PROMPTS, NEW, every=2)


@pytest.mark.slow
def test_latents_that_recur_in_a_text_that_is_read(recurring, text):
    """From its first token on, or from some position."""
    lm = recurring
    rows = [row.tolist() for row in text]
    sums = lm.rolling_logprobs(rows)
    np.testing.assert_allclose(sums, [recurring_logprob(lm, row, 0) for row in rows], rtol=1e-4)
    _, ahead = lm.ahead_logprobs(text, [[3], [8]], 7)
    expected = [recurring_logprob(lm, row[: p + 8], p) for row, p in zip(rows, (3, 8))]
    np.testing.assert_allclose(ahead.sum(axis=(1, 2)), expected, rtol=1e-4)


def test_a_head_of_its_own(decoder):
    """Tokens enter by the embeddings and leave by the head, wherever a decoder has both."""
    config = dataclasses.replace(decoder.config, untied_head=True)
    head = (
        np.random.default_rng(3)
        .standard_normal(decoder.params["embedding"].shape)
        .astype(np.float32)
    )
    untied = dataclasses.replace(decoder, config=config, params=decoder.params | {"head": head})
    lm = ld.AugmentedLM(untied, ld.init_coprocessor(untied, L))
    found = lm.generate(PROMPTS, NEW, every=5, delay=2)
    assert found == [naive_greedy(lm, prompt, 2, 5) for prompt in PROMPTS]
    sums, greedy = lm.logprobs([PROMPTS[0]], [naive_greedy(lm, PROMPTS[0])])
    assert greedy.all() and sums[0] < 0


def test_without_coprocessor_is_the_decoder(lms, text):
    plain, augmented = lms["decoder"], lms["after"]
    assert augmented.generate(PROMPTS, NEW, augment=False) == plain.generate(PROMPTS, NEW)
    np.testing.assert_array_equal(augmented.logits(text), plain.logits(text))
    for ours, theirs in zip(
        augmented.logprobs(FIVE, TAILS, augment=False), plain.logprobs(FIVE, TAILS)
    ):
        np.testing.assert_array_equal(ours, theirs)
    both = plain.ahead_logprobs(text, [[3], [8]], 6)
    np.testing.assert_array_equal(*both)
    np.testing.assert_array_equal(both[0], augmented.ahead_logprobs(text, [[3], [8]], 6)[0])


def test_sampling(lms):
    lm = lms["decoder"]
    greedy, drawn = lm.generate(PROMPTS, NEW), lm.generate(PROMPTS, NEW, temperature=1.0, seed=3)
    assert drawn == lm.generate(PROMPTS, NEW, temperature=1.0, seed=3)
    assert drawn != lm.generate(PROMPTS, NEW, temperature=1.0, seed=4) and drawn != greedy
    # more than there are
    assert drawn == lm.generate(PROMPTS, NEW, temperature=1.0, seed=np.int64(3), top_k=2**40)
    numpys = {"batch_size": np.int32(16), "every": np.int64(0), "seed": np.array(3)}
    assert drawn == lm.generate(PROMPTS, np.int64(NEW), temperature=np.float32(1.0), **numpys)
    assert drawn == lm.generate(iter(PROMPTS), NEW, temperature=1.0, seed=3)
    assert lm.generate(PROMPTS, NEW, temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert lm.generate(PROMPTS, NEW, temperature=1e-4, seed=3) == greedy
    # all tokens alike: only fresh noise tells steps apart
    even = lm.generate(PROMPTS, NEW, temperature=1e6, seed=3)
    assert all(len(set(row)) > NEW // 2 for row in even) and len(set(map(tuple, even))) == len(even)
    assert lm.generate(PROMPTS, NEW, temperature=2.0, top_k=1, seed=3) == greedy


def test_a_request_has_a_seed_of_its_own(lms):
    """Its tokens depend on no other request of the batch, nor on the size of the batch."""
    lm, options = lms["after"], {"temperature": 1.0, "top_k": 50, "every": 4}
    together = lm.generate(PROMPTS, NEW, seed=[5, 6, 7, 5], **options)
    for i, seed in ((0, 5), (2, 7)):
        assert lm.generate([PROMPTS[i]], NEW, seed=[seed], **options) == [together[i]]
    again = lm.generate([*PROMPTS, PROMPTS[0]], NEW, seed=[5, 6, 7, 5, 8], batch_size=1, **options)
    assert again[:4] == together and again[4] != again[0]
    same = lm.generate([PROMPTS[0]] * 3, NEW, seed=5, **options)
    assert len(set(map(tuple, same))) == 3  # one seed for a list, and yet each draws for itself


@pytest.mark.parametrize(
    "temperature, top_k, top_p, weights",
    [
        (1.0, 0, 1.0, [4, 3, 2, 1]),
        (1.0, 0, 0.6, [4, 3, 0, 0]),
        (0.5, 0, 0.9, [16, 9, 4, 0]),
        (1.0, 3, 1.0, [4, 3, 2, 0]),
        (1.0, 3, 0.6, [4, 3, 0, 0]),
        (0.0, 0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_frequencies_of_samples(temperature, top_k, top_p, weights):
    rows, order = 20_000, [2, 0, 3, 1]
    logits = np.tile(np.log([4, 3, 2, 1])[order], (rows, 1))
    keys = jax.random.split(jax.random.key(0), rows)
    drawn = Sampler(temperature, top_k, top_p)(keys, jax.numpy.asarray(logits))
    expected = np.array(weights)[order] / sum(weights)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / rows, expected, atol=0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Least:
    """Another way of choosing tokens."""

    def __call__(self, key_B, logits_BV):
        return jax.numpy.argmin(logits_BV, axis=-1).astype(jax.numpy.int32)


def test_a_sampler_is_a_value(lms):
    """Decoding calls it, whatever it is; another option than its fields is refused."""
    lm = lms["decoder"]
    keys = jax.random.split(jax.random.key(0), 4)
    options = dict(
        aug=lm.aug, write=None, room=32, eos_id=-1, pad_id=0, stopped=lambda new: new[:, -1] < 0
    )
    *_, (new, _) = decoding.decode_in_chunks(
        lm.params, *lm._pad([[2, 5, 6, 7]] * 4), keys, GenerationOptions(1, Least()), **options
    )
    assert (new[:, 0] == np.argmin(lm.logits([[2, 5, 6, 7]])[0, -1])).all()
    with pytest.raises(ld.UserError, match="warmth: unknown option"):
        lm.generate(PROMPTS, NEW, warmth=1.0)


def test_eos_ends_a_row_and_pads_it(decoder, lms):
    plain, tokenizer = lms["decoder"].generate(PROMPTS, NEW), Ids(decoder.tokenizer.path)
    tokenizer.eos_id = end = plain[0][3]
    found = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer)).generate(PROMPTS, NEW)

    def ended(row):
        n = row.index(end) + 1 if end in row else NEW
        return row[:n] + [tokenizer.pad_id] * (NEW - n)

    assert found == [ended(row) for row in plain]
    assert found[0] != plain[0] and any(end not in row for row in plain)


def test_latents_joined_as_often_as_if_alone(decoder, lms):
    """EOS ends one row of a batch early; others go on, and get latents."""
    coprocessor, tokenizer = lms["after"].coprocessor, Ids(decoder.tokenizer.path)
    new = lms["after"].continuations(PROMPTS, NEW, every=4)
    tokenizer.eos_id = new[0].tokens[2]
    lm = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer), coprocessor)
    together = lm.continuations(PROMPTS, NEW, every=4)
    for prompt, found in zip(PROMPTS, together):
        (alone,) = lm.continuations([prompt], NEW, every=4)
        assert alone.joined == found.joined
    assert len({found.joined for found in together}) > 1


def test_latents_joined_before_a_token_that_is_end_and_padding(decoder, lms):
    """Some tokenizers pad with EOS; latents that choose it have joined all the same."""
    coprocessor, tokenizer = lms["after"].coprocessor, Ids(decoder.tokenizer.path)
    (plain,) = lms["after"].continuations(PROMPTS[:1], NEW, every=4)
    end = plain.tokens[4]
    assert end not in plain.tokens[:4]
    tokenizer.eos_id = tokenizer.pad_id = end
    lm = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer), coprocessor)
    (found,) = lm.continuations(PROMPTS[:1], NEW, every=4)
    assert found.joined == (0, 4)


class Letters(Ids):
    """Its text has one letter per token, so that a stop string may begin and end anywhere."""

    def decode(self, ids):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def test_stop_strings_end_a_text_before_them(decoder, lms):
    tokenizer, new = Letters(decoder.tokenizer.path), 32  # more than one look at what was decoded
    lm = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer), lms["after"].coprocessor)
    whole, done = lm.generate(PROMPTS, new), []
    stop = [whole[0][19:22], whole[1][3:5]]
    found = lm.continuations(PROMPTS, new, stop=stop, progress=done.append)
    assert [c.text for c in found] == [
        min((text.partition(s)[0] for s in stop), key=len) for text in whole
    ]
    assert 3 < len(found[0].text) <= 19 and len(found[1].text) <= 3
    assert done == sorted(done) and done[-1] <= 4 * new
    one = [lm.generate(PROMPTS[:1], new, stop=strings) for strings in (stop[0], stop[:1])]
    assert one[0] == one[1] != whole[:1]
    early = lm.continuations(PROMPTS[1:2], new, stop=stop)[0]
    # and decoding ends with it
    assert early.text == found[1].text and set(early.tokens[16:]) == {tokenizer.pad_id}


def test_a_control_token_ends_a_text_that_shows_no_trace_of_it(decoder, lms):
    tokenizer = Letters(decoder.tokenizer.path)
    lm = ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=tokenizer), lms["after"].coprocessor)
    whole = [c.tokens for c in lm.continuations(PROMPTS, NEW)]
    tokenizer.control = {"<|end|>": int(whole[0][3])}
    found = lm.continuations(PROMPTS, NEW, stop=["<|end|>"])
    for ours, tokens in zip(found, whole):
        assert ours.text == tokenizer.decode(
            tokens[: min([*np.flatnonzero(tokens == whole[0][3]), NEW])]
        )
    assert len(found[0].text) <= 3


def test_devices_share_the_continuations_of_a_prompt_evenly():
    """Or one continuation is on all of them."""
    for tails, shape in (([[3], [4, 5]], (1, 4, 8)), ([[3]], (1, 1, 8))):
        group = batching.Group([2], list(range(len(tails))), (len(tails), 2))
        assert batching.pad_tails([group], tails, 1, 0, shards=4)[0].shape == shape


def test_decoding_writes_into_the_cache_in_its_place(lms, monkeypatch):
    """There is never a second copy: what a call was given is gone after it."""
    given, decode = [], compiled.decode_tokens

    def watched(params, state, cache, *args, **options):
        given.append(cache)
        return decode(params, state, cache, *args, **options)

    monkeypatch.setattr(compiled, "decode_tokens", watched)
    lms["after"].generate(PROMPTS[:1], NEW)
    assert given and all(x.is_deleted() for x in jax.tree.leaves(given))


def test_few_shapes_are_compiled(lms):
    lm = lms["decoder"]
    lm.generate(PROMPTS, NEW)
    before = compiled.prefill._cache_size(), compiled.decode_tokens._cache_size()
    lm.generate(PROMPTS[:3], NEW - 3, temperature=0.5, top_k=4, seed=8)
    lm.generate([p + " rain rain" for p in PROMPTS], NEW + 4)
    assert (compiled.prefill._cache_size(), compiled.decode_tokens._cache_size()) == before


def test_sharded_equals_one_device(decoder, lms, text):
    one, on = lms["overlay"], mesh.make({"data": 2, "fsdp": 2, "tensor": 2})
    lm = ld.AugmentedLM(decoder, one.coprocessor, on)
    out = lm.params["decoder"]["layers"]["attn"]["out"]
    assert out.sharding.shard_shape(out.shape)[1:] == (2, 16, 16)  # of 4 heads and a width of 32
    assert lm.generate(PROMPTS, NEW, every=5, delay=2) == one.generate(
        PROMPTS, NEW, every=5, delay=2
    )
    for ours, theirs in zip(lm.logprobs(FIVE, TAILS), one.logprobs(FIVE, TAILS)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    four = np.concatenate([text, text])
    np.testing.assert_allclose(
        lm.latents(four, [[3], [8]] * 2), one.latents(four, [[3], [8]] * 2), atol=1e-4
    )
    rows = lm._pad([[2, 5, 6]] * 4)
    cache = compiled.prefill(lm.params, *rows, aug=lm.aug, room=32, pad_id=0)[1].cache
    assert cache.k.shape[1:4:2] == (4, 2) and cache.k.sharding.shard_shape(cache.k.shape)[
        1:4:2
    ] == (1, 1)
    with pytest.raises(ld.UserError, match="tokens: 3 rows do not split over"):
        lm.logits(four[:3])


def test_traces_that_devices_share(decoder, lms, text):
    """Stretches of a long text are filled up; positions of your own must split."""
    one = lms["overlay"]
    lm = ld.AugmentedLM(decoder, one.coprocessor, mesh.make({"traces": 2}, jax.devices()[:2]))
    long = " ".join(PROMPTS * 2)
    np.testing.assert_allclose(
        lm.rolling_logprobs([long], every=5), one.rolling_logprobs([long], every=5), rtol=1e-5
    )
    with pytest.raises(ld.UserError, match="positions: 3 per row do not split over 2 devices"):
        lm.latents(text, [[1, 2, 3]] * len(text))


def test_no_device_holds_a_whole_model(lms):
    """A checkpoint's leaves are numpy, float32: cast before they are placed, and placed once."""
    on = mesh.make({"fsdp": 8})
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), lms["overlay"].coprocessor.params)
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        placed = load.place(on, params, jax.numpy.bfloat16, param_axes("cache_augmentation"))
    assert {(x.dtype.name, len(x.sharding.device_set)) for x in jax.tree.leaves(placed)} == {
        ("bfloat16", 8)
    }


@pytest.fixture
def beside(decoder, lms):
    """Decoder on the first device, coprocessor on the second."""
    one, other = (mesh.make({}, [device]) for device in jax.devices()[:2])
    return ld.AugmentedLM(decoder, lms["after"].coprocessor, one, other)


@pytest.mark.parametrize("every", [0, 5])
def test_a_coprocessor_beside_the_decoder(lms, beside, monkeypatch, every):
    """Latents that come three tokens late are those of the published simulation."""
    polls = iter(range(1, 99))

    def ready(z):
        jax.block_until_ready(z)
        return next(polls) % 4 == 0

    monkeypatch.setattr(decoding, "ready", ready)
    found = beside.continuations(PROMPTS, NEW, every=every, delay=None)
    assert {c.joined for c in found} == {(3, 8) if every else (3,)}
    assert [c.text for c in found] == lms["after"].generate(PROMPTS, NEW, every=every, delay=3)
    assert beside.params["decoder"]["embedding"].devices() == {jax.devices()[0]}
    assert beside.params_beside["coprocessor"]["soft_tokens"].devices() == {jax.devices()[1]}


def test_latents_join_when_they_are_ready(lms, beside):
    """Whenever that is, what is decoded is what the simulation decodes with that delay."""

    def slowly(done):
        time.sleep(0.02)

    (found,) = beside.continuations(PROMPTS[:1], 32, delay=None, progress=slowly)
    assert len(found.joined) == 1
    assert [found.text] == lms["after"].generate(PROMPTS[:1], 32, delay=found.joined[0])
    rows = mesh.make({"data": 4}, jax.devices()[1:5])  # one prompt is fewer than its devices
    split = ld.AugmentedLM(beside.decoder, beside.coprocessor, beside.mesh, rows)
    assert len(split.continuations(PROMPTS[:1], 32, delay=None, progress=slowly)[0].joined) == 1


@pytest.mark.parametrize("fault", ["fails at once", "fails later", "never answers"])
def test_without_its_coprocessor_the_decoder_goes_on(lms, beside, monkeypatch, fault):
    """Bit for bit: the logits after the last token are the plain decoder's."""
    last, decode = [], compiled.decode_tokens

    def watched(*args, **options):
        state, cache = decode(*args, **options)
        last.append(np.asarray(state.logits))
        return state, cache

    def broken(*_):
        raise RuntimeError("the slice is gone")

    if fault == "fails at once":
        monkeypatch.setattr(decoding, "write_beside", broken)
    else:
        monkeypatch.setattr(
            decoding, "ready", broken if fault == "fails later" else lambda z: False
        )
    monkeypatch.setattr(compiled, "decode_tokens", watched)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = beside.continuations(PROMPTS, 32, every=5, delay=None)
    assert {c.joined for c in found} == {()}
    assert sum(
        "goes on without new latents: RuntimeError('the slice is gone')" in str(w.message)
        for w in said
    ) == (fault != "never answers")
    without = last[-1]
    assert [c.text for c in found] == beside.generate(PROMPTS, 32, augment=False)
    np.testing.assert_array_equal(without, last[-1])
    assert [c.text for c in found] == lms["decoder"].generate(PROMPTS, 32)


@pytest.mark.parametrize("name", ["decoder", *small.TWO_AND_SLOW])
def test_logprobs(lms, name):
    lm = lms[name]
    heads = [[lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)] for prompt in FIVE]
    sums, greedy = lm.logprobs(FIVE, TAILS)
    for head, tail, found in zip(heads, map(lm.tokenizer.encode_in_text, TAILS), sums):
        logits = naive_logits(lm, head, tail)[len(head) - 1 : -1]
        expected = np.log(naive.softmax(logits))[np.arange(len(tail)), tail].sum()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sums.dtype == np.float32 and not greedy.any()


def test_continuations_of_one_prompt_are_read_together(lms):
    """Whatever they are read with, each has the log-probability it has alone."""
    lm = lms["after"]
    pairs = [(p, t) for p in PROMPTS[:3] for t in ("the mat", "on a green door", "a")] + [
        (PROMPTS[3], "rain")
    ]
    # more than one row takes
    pairs += [(PROMPTS[1], f"{t} {u}") for t in WORDS[:5] for u in WORDS[:2]]
    done = []
    together = lm.logprobs(*zip(*pairs), batch_size=16, progress=done.append)
    alone = [lm.logprobs([p], [t]) for p, t in pairs[::4]]
    np.testing.assert_allclose(together[0][::4], [s[0] for s, _ in alone], rtol=1e-5)
    assert done == sorted(done) and done[-1] == len(pairs)
    ids = [([2, *lm.tokenizer.encode(p)], lm.tokenizer.encode_in_text(t)) for p, t in pairs]
    np.testing.assert_array_equal(lm.logprobs(*zip(*ids))[0], together[0])


@pytest.mark.parametrize(
    "name, every",
    [("decoder", 0), pytest.param("after", 0, marks=pytest.mark.slow), ("overlay", 3)],
)
def test_rolling_logprobs(lms, name, every):
    """Each stretch lies ahead of its own latents; pieces of a long text all begin with BOS."""
    lm = ld.AugmentedLM(lms[name].decoder, lms[name].coprocessor, max_length=12)
    texts, stretch = [PROMPTS[0], "rain " * 9, "", "a"], every or 11
    found = lm.rolling_logprobs(texts, every=every, batch_size=4)
    for text, logprob in zip(texts, found):
        ids, expected = lm.tokenizer.encode(text), 0.0
        for i in range(0, len(ids), 11):
            piece = [2, *ids[i : i + 11]]
            at = np.arange(0, 11, stretch)
            ahead = lm.ahead_logprobs(
                np.array([piece + [0] * (24 - len(piece))]), at[None], stretch
            )[1][0]
            expected += ahead[at[:, None] + 1 + np.arange(stretch) < len(piece)].sum()
        np.testing.assert_allclose(logprob, expected, rtol=1e-5, atol=1e-5)
    assert found[2] == 0
    ids = lm.tokenizer.encode(texts[0])
    again = lm.rolling_logprobs([ids, [2, *ids], np.array(ids)], every=every, batch_size=4)
    np.testing.assert_allclose(again, found[0], rtol=1e-6)
    plain = lms["decoder"].rolling_logprobs(texts[:1])
    assert lms[name].rolling_logprobs(texts[:1], augment=False) == plain
    once = lm.rolling_logprobs(texts, batch_size=4)
    again = lm.rolling_logprobs(texts, every=10**6, batch_size=4)
    np.testing.assert_array_equal(again, once)  # takes no room for a million tokens


def test_logprobs_know_the_likeliest(lms):
    lm = lms["overlay"]
    best = naive_greedy(lm, PROMPTS[0])[:3]
    but_one = [*best[:2], best[2] ^ 1]
    _, greedy = lm.logprobs(FIVE, [best, *TAILS[1:4], but_one])
    assert greedy.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("name", ["after", "overlay"])
def test_ahead_logprobs_and_what_follows_the_text(lms, name, text):
    lm, at, A = lms[name], np.array([[0, 3, 9], [1, 7, 9]]), 6
    plain, augmented = lm.ahead_logprobs(text, at, A)
    logp = np.asarray(jax.nn.log_softmax(lm.logits(text)))
    for b, m in np.ndindex(at.shape):
        p = at[b, m]
        ahead = text[b, p + 1 : p + 1 + A]
        np.testing.assert_allclose(plain[b, m], logp[b, np.arange(p, p + A), ahead], atol=1e-5)
        logits = naive_logits(lm, list(text[b, : p + 1]), list(ahead[:-1]))[p:]
        np.testing.assert_allclose(
            augmented[b, m], np.log(naive.softmax(logits))[np.arange(A), ahead], atol=2e-4
        )

    padded = text.copy()
    padded[:, at.max() + A + 1 :] = lm.tokenizer.pad_id
    assert (padded != text).any()
    for ours, theirs in zip(lm.ahead_logprobs(padded, at, A), (plain, augmented)):
        np.testing.assert_array_equal(ours, theirs)
    padded[:, at.max() + 1 :] = lm.tokenizer.pad_id
    latents = lm.latents(text, at)
    assert latents.shape == (*at.shape, L, lm.decoder.config.embed_dim)
    np.testing.assert_array_equal(lm.latents(padded, at), latents)


def test_load_coprocessor_is_what_was_trained(trained, decoder):
    for step, wanted in ((None, 4), (2, 2), (np.int64(2), 2)):
        found = ld.load_coprocessor(trained, step)
        assert (found.method, found.num_latents, found.placement) == (
            "cache_augmentation",
            2,
            "after",
        )
        assert (found.step, found.fingerprint) == (wanted, decoder.fingerprint)
        checkpoints = Checkpoints(str(trained), read_only=True)
        saved = checkpoints.restore_newest(step=wanted).trainable["coprocessor"]
        jax.tree.map(np.testing.assert_array_equal, found.params, saved)
    assert ld.AugmentedLM(decoder, found).latents([[2, 5, 7]], [[1]]).shape == (
        1,
        1,
        2,
        decoder.config.embed_dim,
    )
    inside = trained / "checkpoints" / "4"
    with pytest.raises(ld.UserError, match="inside the workdir"):
        ld.load_coprocessor(inside)


def test_loading_says_nothing(trained):
    """Orbax warns of a folder that is only read, and of options that follow from that."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("absl").addHandler(handler)
    try:
        ld.load_coprocessor(trained)
    finally:
        logging.getLogger("absl").removeHandler(handler)
    assert [record.getMessage() for record in said if record.levelno > logging.INFO] == []


def test_what_is_loaded_shows_itself_in_one_line(decoder, lms):
    of = decoder.fingerprint[:12]
    assert (
        repr(decoder)
        == f"Decoder(4 layers of width 32, vocabulary of 320, float32, fingerprint {of})"
    )
    said = "Coprocessor(cache_augmentation, 4 latents 'after', untrained, float32, "
    said += f"of decoder {of})"
    assert repr(lms["after"].coprocessor) == said
    assert repr(lms["after"]) == f"AugmentedLM({decoder}, {lms['after'].coprocessor})"
    record = dataclasses.replace(lms["after"].coprocessor.record, step=7)
    assert "step 7" in repr(dataclasses.replace(lms["after"].coprocessor, record=record))


def test_the_package_shows_its_interface(monkeypatch):
    monkeypatch.delattr(ld, "mesh", raising=False)  # as before anybody has imported it
    assert ld.mesh is mesh and dir(ld) == sorted(ld.__all__)
    assert not hasattr(ld, "meshes")


def test_attention_is_a_choice(decoder, lms, text):
    """In the decoder, in a coprocessor of its own size, and in both beside the decoder."""
    start = small.with_method(lms["overlay"].coprocessor, coprocessor={"num_layers": 2})
    lm = ld.AugmentedLM(decoder, start, None, build.one_device(), attention="reference")
    for aug in (lm.plain, lm.aug, lm.aug_beside):
        assert aug.transformer.form == "reference" and aug.coprocessor in (None, lm.aug.coprocessor)
    assert lm.aug.coprocessor.form == "reference"
    assert lms["overlay"].aug.transformer.form == "xla"  # what "auto" is on a CPU
    found = ld.AugmentedLM(decoder, attention="reference").logits(text)
    expected = lms["decoder"].logits(text)
    assert (found != expected).any()  # on 24 tokens the other form runs
    np.testing.assert_allclose(found, expected, atol=1e-4)


MISTAKES = {
    "no decoder": (
        lambda lm, d: ld.load_decoder("nowhere"),
        "decoder 'nowhere': .*config.json does not exist",
    ),
    "no checkpoint": (
        lambda lm, d: ld.load_coprocessor("nowhere"),
        "^nowhere: holds no checkpoints",
    ),
    "random weights": (
        lambda lm, d: load.decoder_of(
            "W", Record({"method": {"name": "static_tokens"}, "decoder": {"path": ""}}, "")
        ),
        "^W: trained with config.decoder.path='', on random weights that no folder holds; "
        "train on a decoder folder",
    ),
    "no path": (lambda lm, d: ld.load_decoder(None), "path=None: expected a path"),
    "empty path": (lambda lm, d: ld.load_coprocessor(""), "workdir='': expected a path"),
    "a decoder far away": (
        lambda lm, d: ld.load_decoder("gs://b/x"),
        "decoder 'gs://b/x': expected a local folder",
    ),
    "int8": (
        lambda lm, d: ld.load_decoder("packaged", "int8"),
        "dtype=int8: expected float32 or bfloat16",
    ),
    "float99": (
        lambda lm, d: ld.load_decoder("packaged", "float99"),
        "dtype=float99: expected float32 or bfloat16",
    ),
    "float16": (
        lambda lm, d: ld.load_decoder("packaged", np.float16),
        "dtype=float16: expected float32 or bfloat16",
    ),
    "no workdir": (lambda lm, d: ld.load_coprocessor(3), "workdir=3: expected a path"),
    "step": (
        lambda lm, d: ld.load_coprocessor("nowhere", "4"),
        "step='4': expected a whole number",
    ),
    "swapped": (
        lambda lm, d: ld.AugmentedLM(lm.coprocessor, d),
        "decoder: got Coprocessor, expected a Decoder, which `load_decoder` returns",
    ),
    "no Decoder": (
        lambda lm, d: ld.AugmentedLM("packaged"),
        "decoder: got str, expected a Decoder",
    ),
    "no Coprocessor": (
        lambda lm, d: ld.AugmentedLM(d, "runs/x"),
        "coprocessor: got str, expected a Coprocessor",
    ),
    "attention": (
        lambda lm, d: ld.AugmentedLM(d, attention="flash"),
        "attention='flash': expected one of auto, reference, xla, pallas_gpu, pallas_tpu,"
        " tokamax_gpu",
    ),
    "no room": (lambda lm, d: ld.AugmentedLM(d, max_length=1), "max_length=1: expected at least 2"),
    "begun of a path": (
        lambda lm, d: ld.init_coprocessor("packaged", 2),
        "decoder: got str, expected a Decoder",
    ),
    "half a latent": (
        lambda lm, d: ld.init_coprocessor(d, 2.0),
        "num_latents=2.0: expected a whole number",
    ),
    "seed of a coprocessor": (
        lambda lm, d: ld.init_coprocessor(d, 2, seed=2**32),
        "seed=.*: expected at most",
    ),
    "placement": (
        lambda lm, d: ld.init_coprocessor(d, 2, "beside"),
        "placement='beside': expected one of",
    ),
    "two placements": (
        lambda lm, d: ld.init_coprocessor(d, 2, ["after"]),
        r"placement=\['after'\]: expected one of",
    ),
    "no positions": (
        lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], np.zeros((1, 0), int), 1),
        r"positions: of shape \(1, 0\), expected at least one per row",
    ),
    "no latents": (lambda lm, d: ld.init_coprocessor(d, 0), "num_latents=0: expected at least 1"),
    "many latents": (
        lambda lm, d: ld.init_coprocessor(d, 321),
        "num_latents=321: expected at most 320",
    ),
    "another decoder": (
        lambda lm, d: ld.AugmentedLM(dataclasses.replace(d, fingerprint="f" * 64), lm.coprocessor),
        "coprocessor belongs to decoder .*, this decoder is ffffffffffff",
    ),
    "no coprocessor": (
        lambda lm, d: ld.AugmentedLM(d).latents([[2, 5]], [[1]]),
        "no coprocessor, so no latents",
    ),
    "one row": (
        lambda lm, d: lm.logits([2, 5]),
        r"tokens: int64 of shape \(2,\), expected integers \[B, T\]",
    ),
    "floats": (lambda lm, d: lm.logits([[2.0, 5.0]]), "tokens: float64 of shape"),
    "token 320": (
        lambda lm, d: lm.logits([[2, 320]]),
        r"tokens\[0, 1\]=320: the vocabulary has 320, expected 0 to 319",
    ),
    "token -1": (lambda lm, d: lm.logits([[2, -1]]), r"tokens\[0, 1\]=-1: the vocabulary has 320"),
    "ragged": (
        lambda lm, d: lm.logits([[2, 5], [2]]),
        r"tokens: rows of unequal length, expected integers \[B, T\]",
    ),
    "no tokens": (
        lambda lm, d: lm.logits(None),
        r"tokens: object of shape \(\), expected integers \[B, T\]",
    ),
    "rows of positions": (
        lambda lm, d: lm.latents([[2, 5]], [[1], [1]]),
        "positions: 2 rows, expected 1, as many as tokens",
    ),
    "half a position": (lambda lm, d: lm.latents([[2, 5]], [[0.5]]), "positions: float64 of shape"),
    "position -1": (
        lambda lm, d: lm.latents([[2, 5]], [[-1]]),
        r"positions\[0, 0\]=-1: the text has 2 tokens, expected 0 to 1",
    ),
    "position 2": (
        lambda lm, d: lm.latents([[2, 5]], [[2]]),
        r"positions\[0, 0\]=2: the text has 2 tokens, expected 0 to 1",
    ),
    "no ahead token": (
        lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], [[0, 1]], 2),
        r"positions\[0, 1\]=1: the text has 3 tokens, and 2 are to follow, expected 0 to 0",
    ),
    "ahead 3": (
        lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], [[0]], 3),
        "ahead=3: the text has 3 tokens, expected less",
    ),
    "ahead text": (
        lambda lm, d: lm.ahead_logprobs([[2, 5]], [[0]], "1"),
        "ahead='1': expected a whole number",
    ),
    "ahead 0": (
        lambda lm, d: lm.ahead_logprobs([[2, 5, 6]], [[1]], 0),
        "ahead=0: expected at least 1",
    ),
    "axes": (lambda lm, d: ld.AugmentedLM(d, mesh={"data": 1}), "mesh: got dict, expected a Mesh"),
    "axes of a decoder": (
        lambda lm, d: ld.load_decoder("packaged", mesh={"data": 1}),
        "mesh: got dict, expected a Mesh",
    ),
    "empty prompt": (lambda lm, d: lm.generate(["a", ""]), r"prompts\[1\] is empty"),
    "no token": (
        lambda lm, d: lm.logprobs([[]], ["a"]),
        r"prompts\[0\]: holds no token, not even BOS",
    ),
    "token id": (
        lambda lm, d: lm.generate([[2, 320]]),
        r"prompts\[0\]: token 320, the vocabulary has 320",
    ),
    "bytes": (
        lambda lm, d: lm.generate([b"abc"]),
        r"prompts\[0\]=b'abc': expected text or a list of token ids",
    ),
    "half tokens": (
        lambda lm, d: lm.generate([[2.7, 5.9]]),
        r"prompts\[0\]=\[2.7, 5.9\]: expected text or a list",
    ),
    "truths": (
        lambda lm, d: lm.generate([[True, False]]),
        r"prompts\[0\]=\[True, False\]: expected text or a list of token ids",
    ),
    "letters": (
        lambda lm, d: lm.generate([["a"]]),
        r"prompts\[0\]=\['a'\]: expected text or a list of token ids",
    ),
    "one prompt of ids": (
        lambda lm, d: lm.generate([2, 5]),
        r"prompts\[0\]=2: expected text or a list of token ids",
    ),
    "no prompt": (lambda lm, d: lm.generate(None), "prompts=None: expected a list"),
    "a number": (lambda lm, d: lm.logprobs(["a"], 3), "continuations=3: expected a list"),
    "continued token": (
        lambda lm, d: lm.logprobs(["a"], [[-1]]),
        r"continuations\[0\]: token -1, the vocabulary",
    ),
    "long prompt": (
        lambda lm, d: ld.AugmentedLM(d, max_length=20).generate(["a", [2] * 15], 6),
        r"prompts\[1\]: 15 tokens and 6 after them are more than max_length=20; "
        "shorten it, or raise max_length",
    ),
    "long continuation": (
        lambda lm, d: ld.AugmentedLM(d, max_length=20).logprobs([[2] * 15], [[2] * 6]),
        r"prompts\[0\]: 15 tokens and 6 after them are more than max_length=20",
    ),
    "every": (lambda lm, d: lm.generate(["a"], every=-1), "every=-1: expected at least 0"),
    "late": (
        lambda lm, d: lm.generate(["a"], every=2, delay=2),
        "delay=2: expected less than every=2",
    ),
    "rolling": (
        lambda lm, d: lm.rolling_logprobs(["a"], every=-1),
        "every=-1: expected at least 0",
    ),
    "rolling batch": (
        lambda lm, d: lm.rolling_logprobs(["a"], batch_size=0),
        "batch_size=0: expected at least 1",
    ),
    "scored batch": (
        lambda lm, d: lm.logprobs(["a"], ["b"], batch_size=0),
        "batch_size=0: expected at least 1",
    ),
    "no device": (
        lambda lm, d: lm.generate(["a"], delay=None),
        "delay=None: give the coprocessor its own devices",
    ),
    "one prompt": (lambda lm, d: lm.generate("a cat"), "prompts='a cat': expected a list"),
    "one text": (lambda lm, d: lm.rolling_logprobs("a cat"), "texts='a cat': expected a list"),
    "no temperature": (
        lambda lm, d: lm.generate(["a"], temperature=float("nan")),
        "^temperature=nan: expected at least 0",
    ),
    "warm": (
        lambda lm, d: lm.generate(["a"], temperature="1"),
        "temperature='1': expected a number",
    ),
    "stop": (
        lambda lm, d: lm.generate(["a"], stop=["b", ""]),
        "stop: holds '', expected texts that are not empty",
    ),
    "stop token": (lambda lm, d: lm.generate(["a"], stop=[3]), "stop: holds 3, expected texts"),
    "seed": (
        lambda lm, d: lm.generate(["a"], seed=2**32),
        "seed=4294967296: expected at most",
    ),
    "seed text": (lambda lm, d: lm.generate(["a"], seed="x"), "seed='x': expected a whole number"),
    "seeds": (lambda lm, d: lm.generate(["a"], seed=[1, 2]), "1 prompts, but 2 seeds"),
    "top_k": (lambda lm, d: lm.generate(["a"], top_k=-1), "^top_k=-1: expected at least 0"),
    "batch": (lambda lm, d: lm.generate(["a"], batch_size=0), "^batch_size=0: expected at least 1"),
    "no new token": (lambda lm, d: lm.generate(["a"], 0), "^max_new_tokens=0: expected at least 1"),
    "half a token": (
        lambda lm, d: lm.generate(["a"], 2.5),
        "max_new_tokens=2.5: expected a whole number",
    ),
    "yes": (lambda lm, d: lm.generate(["a"], True), "max_new_tokens=True: expected a whole number"),
    "delay": (lambda lm, d: lm.generate(["a"], delay=-1), "delay=-1: expected at least 0"),
    "keys that are late": (
        lambda lm, d: ld.AugmentedLM(
            d, small.with_method(ld.init_coprocessor(d, L, "overlay"), name="inserted")
        ).generate(["a"], delay=1),
        "^delay=1: method 'inserted' writes keys",
    ),
    "temperature": (
        lambda lm, d: lm.generate(["a"], temperature=-0.1),
        "^temperature=-0.1: expected at least 0",
    ),
    "top_p 0": (
        lambda lm, d: lm.generate(["a"], top_p=0.0),
        "^top_p=0.0: expected above 0, at most 1",
    ),
    "top_p of nothing drawn": (
        lambda lm, d: lm.generate(["a"], top_p=0.9),
        "^top_k=0, top_p=0.9: they need a temperature above 0",
    ),
    "top_p 2": (
        lambda lm, d: lm.generate(["a"], top_p=2.0),
        "^top_p=2.0: expected above 0, at most 1",
    ),
    "unknown option": (
        lambda lm, d: lm.generate(["a"], temprature=1.0),
        "^temprature: unknown option, expected one of temperature, top_k, top_p",
    ),
    "continuations": (
        lambda lm, d: lm.logprobs(["a", "b"], ["c"]),
        "2 prompts, but 1 continuations",
    ),
    "empty continuation": (
        lambda lm, d: lm.logprobs(["a", "b"], ["c", ""]),
        r"continuations\[1\] is empty",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(lms, decoder, name):
    mistake, message = MISTAKES[name]
    with pytest.raises(ld.UserError, match=message) as caught:
        mistake(lms["after"], decoder)
    assert "\n" not in str(caught.value)


def test_a_trained_decoder_has_no_coprocessor(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    record = Record({"method": {"name": "decoder"}, "seed": 0}, "", step=1)
    checkpoints.save(
        1, {"trainable": {"decoder": np.zeros(2)}, "optimizer": {"mu": np.zeros(2)}}, record.meta()
    )
    checkpoints.close()
    with pytest.raises(ld.UserError, match="method 'decoder' has no coprocessor"):
        ld.load_coprocessor(str(tmp_path))
