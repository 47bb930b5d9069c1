"""Every mistake in an argument ends in one line that names it."""

import dataclasses

import numpy as np
import pytest
import small

import latent_delib as ld
from latent_delib.job.record import Record
from latent_delib.lm import load
from tests.prompts import NEW, PROMPTS


def refused(said, call, *args, **options):
    """A call ends in a UserError of one line that matches."""
    with pytest.raises(ld.UserError, match=said) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def lm(lms):
    return lms["after"]


OPTIONS = [
    ({"every": -1}, "every=-1: expected at least 0"),
    ({"delay": -1}, "delay=-1: expected at least 0"),
    ({"every": 2, "delay": 2}, "delay=2: expected less than every=2"),
    ({"delay": None}, "delay=None: give the coprocessor its own devices"),
    ({"max_new_tokens": 0}, "^max_new_tokens=0: expected at least 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: expected a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens=True: expected a whole number"),
    ({"batch_size": 0}, "^batch_size=0: expected at least 1"),
    ({"temperature": -0.1}, "^temperature=-0.1: expected at least 0"),
    ({"temperature": float("nan")}, "^temperature=nan: expected at least 0"),
    ({"temperature": "1"}, "temperature='1': expected a number"),
    ({"top_k": -1}, "^top_k=-1: expected at least 0"),
    ({"top_p": 0.0}, "^top_p=0.0: expected above 0, at most 1"),
    ({"top_p": 2.0}, "^top_p=2.0: expected above 0, at most 1"),
    ({"top_p": 0.9}, "^top_k=0, top_p=0.9: they need a temperature above 0"),
    (
        {"temprature": 1.0},
        "^temprature: unknown option, expected one of temperature, top_k, top_p",
    ),
    ({"seed": 2**32}, "seed=4294967296: expected at most"),
    ({"seed": "x"}, "seed='x': expected a whole number"),
    ({"seed": [1, 2]}, "1 prompts, but 2 seeds"),
    ({"stop": ["b", ""]}, "stop: holds '', expected texts that are not empty"),
    ({"stop": [3]}, "stop: holds 3, expected texts"),
]


@pytest.mark.parametrize("options, said", OPTIONS)
def test_options(lm, options, said):
    refused(said, lm.generate, ["a"], **options)


def test_a_rhythm_for_latents_that_recur(recurring):
    said = "every=2: latents .* after every 3 tokens"
    refused(said, recurring.generate, PROMPTS, NEW, every=2)


def test_a_delay_of_keys(decoder, lms):
    inserted = small.with_method(ld.init_coprocessor(decoder, 4, "overlay"), name="inserted")
    lm = ld.AugmentedLM(decoder, inserted)
    refused("^delay=1: method 'inserted' writes keys", lm.generate, ["a"], delay=1)


REFUSED_PROMPTS = [
    (None, "prompts=None: expected a list"),
    ("a cat", "prompts='a cat': expected a list"),
    (["a", ""], r"prompts\[1\] is empty"),
    ([2, 5], r"prompts\[0\]=2: expected text or a list of token ids"),
    ([b"abc"], r"prompts\[0\]=b'abc': expected text or a list of token ids"),
    ([["a"]], r"prompts\[0\]=\['a'\]: expected text or a list of token ids"),
    ([[2.7, 5.9]], r"prompts\[0\]=\[2.7, 5.9\]: expected text or a list"),
    ([[True, False]], r"prompts\[0\]=\[True, False\]: expected text or a list of token ids"),
    ([[2, 320]], r"prompts\[0\]: token 320, expected 0 to 319"),
]


@pytest.mark.parametrize("prompts, said", REFUSED_PROMPTS)
def test_prompts(lm, prompts, said):
    refused(said, lm.generate, prompts)


SCORED = [
    ([[]], ["a"], r"prompts\[0\]: holds no token, not even BOS"),
    (["a"], 3, "continuations=3: expected a list"),
    (["a"], [[-1]], r"continuations\[0\]: token -1, expected 0 to"),
    (["a", "b"], ["c"], "2 prompts, but 1 continuations"),
    (["a", "b"], ["c", ""], r"continuations\[1\] is empty"),
]


@pytest.mark.parametrize("prompts, continuations, said", SCORED)
def test_scored_text(lm, prompts, continuations, said):
    refused(said, lm.logprobs, prompts, continuations)


def test_options_of_scoring(lm):
    refused("batch_size=0: expected at least 1", lm.logprobs, ["a"], ["b"], batch_size=0)
    refused("batch_size=0: expected at least 1", lm.rolling_logprobs, ["a"], batch_size=0)
    refused("every=-1: expected at least 0", lm.rolling_logprobs, ["a"], every=-1)
    refused("texts='a cat': expected a list", lm.rolling_logprobs, "a cat")


def test_text_longer_than_max_length(decoder):
    lm = ld.AugmentedLM(decoder, max_length=20)
    said = ": 15 tokens and 6 after them are more than max_length=20; shorten it, "
    said += "or raise max_length"
    refused(r"prompts\[1\]" + said, lm.generate, ["a", [2] * 15], 6)
    refused(r"prompts\[0\]" + said, lm.logprobs, [[2] * 15], [[2] * 6])


TOKENS = [
    (None, r"tokens: object of shape \(\), expected integers \[B, T\]"),
    ([2, 5], r"tokens: int64 of shape \(2,\), expected integers \[B, T\]"),
    ([[2.0, 5.0]], "tokens: float64 of shape"),
    ([[2, 5], [2]], r"tokens: rows of unequal length, expected integers \[B, T\]"),
    ([[2, 320]], r"tokens\[0, 1\]=320: the vocabulary has 320, expected 0 to 319"),
    ([[2, -1]], r"tokens\[0, 1\]=-1: the vocabulary has 320"),
]


@pytest.mark.parametrize("tokens, said", TOKENS)
def test_tokens(lm, tokens, said):
    refused(said, lm.logits, tokens)


POSITIONS = [
    ([[1], [1]], "positions: 2 rows, expected 1, as many as tokens"),
    ([[0.5]], "positions: float64 of shape"),
    ([[-1]], r"positions\[0, 0\]=-1: the text has 2 tokens, expected 0 to 1"),
    ([[2]], r"positions\[0, 0\]=2: the text has 2 tokens, expected 0 to 1"),
]


@pytest.mark.parametrize("positions, said", POSITIONS)
def test_positions(lm, positions, said):
    refused(said, lm.latents, [[2, 5]], positions)


def test_latents_of_a_decoder(lms):
    refused("no coprocessor, so no latents", lms["decoder"].latents, [[2, 5]], [[1]])


AHEAD = [
    ([[1]], 0, "ahead=0: expected at least 1"),
    ([[0]], "1", "ahead='1': expected a whole number"),
    ([[0]], 3, "ahead=3: the text has 3 tokens, expected less"),
    (
        [[0, 1]],
        2,
        r"positions\[0, 1\]=1: the text has 3 tokens, and 2 are to follow, expected 0 to 0",
    ),
    (np.zeros((1, 0), int), 1, r"positions: of shape \(1, 0\), expected at least one per row"),
]


@pytest.mark.parametrize("positions, ahead, said", AHEAD)
def test_positions_and_tokens_ahead(lm, positions, ahead, said):
    refused(said, lm.ahead_logprobs, [[2, 5, 6]], positions, ahead)


# Before there is a model.

DECODERS = [
    ({"path": "nowhere"}, "decoder 'nowhere': .*config.json does not exist"),
    ({"path": None}, "path=None: expected a path"),
    ({"path": "gs://b/x"}, "'gs://b/x': expected a local path"),
    ({"dtype": "int8"}, "dtype=int8: expected float32 or bfloat16"),
    ({"dtype": "float99"}, "dtype=float99: expected float32 or bfloat16"),
    ({"dtype": np.float16}, "dtype=float16: expected float32 or bfloat16"),
    ({"mesh": {"data": 1}}, "mesh: got dict, expected a Mesh"),
]


@pytest.mark.parametrize("arguments, said", DECODERS)
def test_load_decoder(arguments, said):
    refused(said, ld.load_decoder, **{"path": "packaged"} | arguments)


WORKDIRS = [
    (["nowhere"], "^nowhere: holds no checkpoints"),
    ([""], "workdir='': expected a path"),
    ([3], "workdir=3: expected a path"),
    (["nowhere", "4"], "step='4': expected a whole number"),
]


@pytest.mark.parametrize("arguments, said", WORKDIRS)
def test_load_coprocessor(arguments, said):
    refused(said, ld.load_coprocessor, *arguments)


def test_a_decoder_of_random_weights():
    record = Record({"method": {"name": "static_tokens"}, "decoder": {"path": ""}}, "")
    said = "^W: trained with config.decoder.path='', on random weights that no folder holds; "
    refused(said + "train on a decoder folder", load.decoder_of, "W", record)


STARTS = [
    ({"num_latents": 0}, "num_latents=0: expected at least 1"),
    ({"num_latents": 321}, "num_latents=321: expected at most 320"),
    ({"num_latents": 2.0}, "num_latents=2.0: expected a whole number"),
    ({"placement": "beside"}, "placement='beside': expected one of"),
    ({"placement": ["after"]}, r"placement=\['after'\]: expected one of"),
    ({"seed": 2**32}, "seed=.*: expected at most"),
    ({"decoder": "packaged"}, "decoder: got str, expected a Decoder"),
]


@pytest.mark.parametrize("arguments, said", STARTS)
def test_init_coprocessor(decoder, arguments, said):
    refused(said, ld.init_coprocessor, **{"decoder": decoder, "num_latents": 2} | arguments)


MODELS = [
    ({"decoder": "packaged"}, "decoder: got str, expected a Decoder"),
    ({"coprocessor": "runs/x"}, "coprocessor: got str, expected a Coprocessor"),
    ({"mesh": {"data": 1}}, "mesh: got dict, expected a Mesh"),
    ({"max_length": 1}, "max_length=1: expected at least 2"),
    (
        {"attention": "flash"},
        "attention='flash': expected one of auto, reference, xla, pallas_gpu, pallas_tpu,"
        " tokamax_gpu",
    ),
]


@pytest.mark.parametrize("arguments, said", MODELS)
def test_augmented_lm(decoder, arguments, said):
    refused(said, ld.AugmentedLM, **{"decoder": decoder} | arguments)


def test_decoder_and_coprocessor_swapped(decoder, lm):
    said = "decoder: got Coprocessor, expected a Decoder, which `load_decoder` returns"
    refused(said, ld.AugmentedLM, lm.coprocessor, decoder)


def test_a_coprocessor_of_another_decoder(decoder, lm):
    other = dataclasses.replace(decoder, fingerprint="f" * 64)
    said = "the coprocessor belongs to the decoder .*; this one has ffffffffffff"
    refused(said, ld.AugmentedLM, other, lm.coprocessor)
