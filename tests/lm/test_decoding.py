"""Decoding against a loop without a cache, and the endings of a text."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from naive_decoding import chosen_logprobs, naive_generate, naive_logits, recurring_logits

import latent_delib as ld
from latent_delib.delib.traces import PLACEMENTS, Placement
from latent_delib.lm import compiled
from tests.prompts import NEW, PROMPTS, Ids, ids_of


@pytest.mark.parametrize("name", ["decoder", *small.TWO_AND_SLOW])
def test_greedy_equals_a_loop_without_a_cache(lms, name):
    found = lms[name].generate(PROMPTS, NEW)
    assert found == naive_generate(lms[name], PROMPTS, NEW)
    assert len(set(sum(found, []))) > NEW  # a decoder that repeats itself would show nothing


def test_a_placement_may_end_before_the_text_goes_on(decoder, monkeypatch):
    """Latents at the positions of the next token alone: generation follows what scoring says."""
    at_the_next = Placement(lambda L: np.ones(L, int), shift=lambda L: L, reread=0)
    monkeypatch.setitem(PLACEMENTS, "at the next", at_the_next)
    start = ld.init_coprocessor(decoder, 3, "at the next")
    lm = ld.AugmentedLM(decoder, start)
    _, greedy = lm.logprobs(PROMPTS, lm.generate(PROMPTS, NEW))
    assert greedy.all()


@pytest.mark.parametrize("name", [pytest.param("decoder", marks=pytest.mark.slow), "overlay"])
def test_bfloat16_stays_near_float64(lms, name):
    """Decoding and scoring, by the dense reading of the same weights, whose logits spread by 1."""

    def rounded(model):
        params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), model.params)
        return dataclasses.replace(model, params=params)

    coprocessor = lms[name].coprocessor
    lm = ld.AugmentedLM(rounded(lms[name].decoder), coprocessor and rounded(coprocessor))
    assert lm.dtype == jnp.bfloat16
    new = lm.generate(PROMPTS, NEW)
    scores, _ = lm.logprobs(PROMPTS, new)
    behind = []  # how far each token's logit is from the highest one
    for prompt, tokens, score in zip(PROMPTS, new, scores):
        ids = ids_of(lm, prompt)
        logits = naive_logits(lm, ids, tokens)[len(ids) - 1 : -1]
        behind.extend(logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens])
        assert score == pytest.approx(chosen_logprobs(logits, tokens).sum(), rel=0.05)
    assert np.mean(behind) < 0.05


@pytest.mark.parametrize("name", small.TWO_AND_SLOW)
def test_delayed_latents_are_the_prompts(lms, name):
    found = lms[name].generate(PROMPTS, NEW, delay=2)
    plain = lms["decoder"].generate(PROMPTS, NEW)
    assert found == naive_generate(lms[name], PROMPTS, NEW, delay=2)
    assert [f[:2] for f in found] == [p[:2] for p in plain] and found != plain


@pytest.mark.parametrize("every, delay", [(1, 0), (5, 2)])
@pytest.mark.parametrize("name", ["after", "overlay"])
def test_latents_again_every_few_tokens(lms, name, every, delay):
    lm = lms[name]
    found = lm.continuations(PROMPTS[:3], NEW, every=every, delay=delay)
    texts = [c.text for c in found]
    assert texts == naive_generate(lm, PROMPTS[:3], NEW, delay, every)
    assert {c.joined for c in found} == {tuple(range(delay, NEW, every))}
    assert texts != lm.generate(PROMPTS[:3], NEW, delay=delay)


@pytest.mark.parametrize(
    "name, every, delay",
    [("after", 0, 0), pytest.param("overlay", 5, 2, marks=pytest.mark.slow)],
)
def test_latents_in_place_of_text(decoder, lms, name, every, delay):
    """Once latents have joined, the decoder sees two tokens before them, whatever the length."""
    short = small.with_method(lms[name].coprocessor, visible_text=2)
    lm = ld.AugmentedLM(decoder, short)
    found = lm.generate(PROMPTS, NEW, every=every, delay=delay)
    assert found == naive_generate(lm, PROMPTS, NEW, delay, every)
    assert found != lms[name].generate(PROMPTS, NEW, every=every, delay=delay)


def test_latents_that_recur_while_decoding(recurring):
    """Every token sees all groups before it, as in one sequence."""
    found = recurring.continuations(PROMPTS, NEW)
    assert {c.joined for c in found} == {(0, 3, 6)}
    for prompt, continuation in zip(PROMPTS, found):
        ids, new = ids_of(recurring, prompt), continuation.tokens.tolist()
        likeliest = recurring_logits(recurring, ids + new, len(ids) - 1).argmax(axis=-1)
        assert likeliest[:-1].tolist() == new


@pytest.mark.slow
def test_a_head_of_its_own(decoder):
    """Tokens enter by the embeddings and leave by the head, wherever a decoder has both."""
    config = dataclasses.replace(decoder.config, untied_head=True)
    head = np.random.default_rng(3).standard_normal(decoder.params["embedding"].shape)
    params = decoder.params | {"head": head.astype(np.float32)}
    untied = dataclasses.replace(decoder, config=config, params=params)
    lm = ld.AugmentedLM(untied, ld.init_coprocessor(untied, 4))
    found = lm.generate(PROMPTS, NEW, every=5, delay=2)
    assert found == naive_generate(lm, PROMPTS, NEW, delay=2, every=5)
    sums, greedy = lm.logprobs(PROMPTS[:1], naive_generate(lm, PROMPTS[:1], NEW))
    assert greedy.all() and sums[0] < 0


def test_without_latents_it_is_the_decoder_that_continues(lms):
    expected = lms["decoder"].generate(PROMPTS, NEW)
    assert lms["after"].generate(PROMPTS, NEW, augment=False) == expected


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

    def programs():
        return compiled.prefill._cache_size(), compiled.decode_tokens._cache_size()

    lm.generate(PROMPTS, NEW)
    before = programs()
    lm.generate(PROMPTS[:3], NEW - 3, temperature=0.5, top_k=4, seed=8)
    lm.generate([p + " rain rain" for p in PROMPTS], NEW + 4)
    assert programs() == before


# Where a text ends.


def speaking(decoder, coprocessor, tokenizer=Ids, **fields):
    """Returns a model with a tokenizer of its own, some of whose fields are changed."""
    own = tokenizer(decoder.tokenizer.path)
    for name, value in fields.items():
        setattr(own, name, value)
    return ld.AugmentedLM(dataclasses.replace(decoder, tokenizer=own), coprocessor)


def test_each_eos_ends_a_row_and_pads_it(decoder, lms):
    plain = lms["decoder"].generate(PROMPTS, NEW)
    other = next(row for row in plain if plain[0][3] not in row)
    ends = [plain[0][3], other[6]]
    lm = speaking(decoder, None, eos_ids=ends)
    found = lm.continuations(PROMPTS, NEW)
    for row, one in zip(plain, found):
        n = next((i for i, token in enumerate(row) if token in ends), NEW)
        assert one.text == row[:n]
        assert one.tokens.tolist() == row[: n + 1] + [lm.tokenizer.pad_id] * (NEW - n - 1)
    assert len(found[0].text) <= 3 and len(found[plain.index(other)].text) <= 6


def test_latents_joined_as_often_as_if_alone(decoder, lms):
    """EOS ends one row of a batch early; others go on, and get latents."""
    plain = lms["after"].continuations(PROMPTS, NEW, every=4)
    lm = speaking(decoder, lms["after"].coprocessor, eos_ids=[plain[0].tokens[2]])
    together = [c.joined for c in lm.continuations(PROMPTS, NEW, every=4)]
    for prompt, joined in zip(PROMPTS, together):
        (alone,) = lm.continuations([prompt], NEW, every=4)
        assert alone.joined == joined
    assert len(set(together)) > 1


def test_latents_joined_before_a_token_that_is_end_and_padding(decoder, lms):
    """Some tokenizers pad with EOS; latents that choose it have joined all the same."""
    (plain,) = lms["after"].continuations(PROMPTS[:1], NEW, every=4)
    end = plain.tokens[4]
    assert end not in plain.tokens[:4]
    lm = speaking(decoder, lms["after"].coprocessor, eos_ids=[end], pad_id=end)
    (found,) = lm.continuations(PROMPTS[:1], NEW, every=4)
    assert found.joined == (0, 4)


class Letters(Ids):
    """Its text has one letter per token, so that a stop string may begin and end anywhere."""

    def decode(self, ids):
        return "".join(chr(97 + int(i) % 26) for i in ids)


LONG = 32  # new tokens: more than one look at what was decoded


@pytest.fixture(scope="module")
def letters(decoder, lms):
    return speaking(decoder, lms["after"].coprocessor, Letters)


@pytest.fixture(scope="module")
def whole(letters):
    """Texts of LONG letters."""
    return letters.generate(PROMPTS, LONG)


@pytest.fixture(scope="module")
def stop(whole):
    """Strings from the first text and from the second."""
    return [whole[0][19:22], whole[1][3:5]]


def test_stop_strings_end_a_text_before_them(letters, whole, stop):
    def ended(text):
        return min((text.partition(string)[0] for string in stop), key=len)

    found = letters.generate(PROMPTS, LONG, stop=stop)
    assert found == [ended(text) for text in whole]
    assert 3 < len(found[0]) <= 19 and len(found[1]) <= 3


def test_one_stop_string_needs_no_list(letters, whole, stop):
    (found,) = letters.generate(PROMPTS[:1], LONG, stop=stop[0])
    assert [found] == letters.generate(PROMPTS[:1], LONG, stop=stop[:1]) != whole[:1]


def test_decoding_ends_with_the_last_text(letters, stop):
    """The second text ends within the first 16 tokens: behind them nothing is decoded."""
    together = letters.generate(PROMPTS, LONG, stop=stop)
    (alone,) = letters.continuations(PROMPTS[1:2], LONG, stop=stop)
    assert alone.text == together[1]
    assert set(alone.tokens[16:]) == {letters.tokenizer.pad_id}


def test_progress_of_texts_that_stop(letters, stop):
    """It never goes back, nor beyond the number of tokens."""
    done = []
    letters.generate(PROMPTS, LONG, stop=stop, progress=done.append)
    assert done == sorted(done) and done[-1] <= len(PROMPTS) * LONG


def test_a_control_token_ends_a_text_that_shows_no_trace_of_it(decoder, letters):
    plain = [c.tokens for c in letters.continuations(PROMPTS, NEW)]
    end = int(plain[0][3])
    lm = speaking(decoder, letters.coprocessor, Letters, control={"<|end|>": end})
    found = lm.generate(PROMPTS, NEW, stop=["<|end|>"])
    for text, tokens in zip(found, plain):
        assert text == lm.tokenizer.decode(itertools.takewhile(lambda token: token != end, tokens))
    assert len(found[0]) <= 3
