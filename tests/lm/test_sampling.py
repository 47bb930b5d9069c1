"""Tokens that are drawn: from the right distribution, and by seeds that decide them."""

import dataclasses

import jax
import numpy as np
import pytest

from latent_delib.lm import decoding
from latent_delib.lm.inputs import GenerationOptions
from latent_delib.lm.sampling import Sampler
from tests.prompts import NEW, PROMPTS


def draw(lm, prompts=PROMPTS, **options):
    """Returns what is drawn with seed 3, or with other options."""
    return lm.generate(prompts, NEW, **{"temperature": 1.0, "seed": 3} | options)


def test_a_seed_decides_the_tokens(lms):
    lm = lms["decoder"]
    drawn = draw(lm)
    assert drawn == draw(lm) != draw(lm, seed=4)
    assert drawn != lm.generate(PROMPTS, NEW)


def test_a_seed_does_not_depend_on_the_generator_that_jax_would_take(lms):
    drawn = draw(lms["after"], every=4)
    with jax.default_prng_impl("rbg"):
        assert draw(lms["after"], every=4) == drawn


def test_top_k_above_the_vocabulary_leaves_out_nothing(lms):
    assert draw(lms["decoder"], top_k=2**40) == draw(lms["decoder"])


def test_options_may_be_numbers_of_numpy(lms):
    lm = lms["decoder"]
    options = {"batch_size": np.int32(16), "every": np.int64(0), "temperature": np.float32(1.0)}
    for seed in (np.int64(3), np.array(3)):
        assert lm.generate(PROMPTS, np.int64(NEW), seed=seed, **options) == draw(lm)


def test_prompts_may_be_an_iterator(lms):
    assert draw(lms["decoder"], iter(PROMPTS)) == draw(lms["decoder"])


@pytest.mark.parametrize(
    "options",
    [{"top_p": 1e-6}, {"top_p": 1e-50}, {"temperature": 1e-4}, {"temperature": 2.0, "top_k": 1}],
)
def test_options_that_leave_the_likeliest_token(lms, options):
    assert draw(lms["decoder"], **options) == lms["decoder"].generate(PROMPTS, NEW)


def test_each_step_has_noise_of_its_own(lms):
    """All tokens are alike: only fresh noise tells steps apart, and prompts."""
    even = draw(lms["decoder"], temperature=1e6)
    assert all(len(set(row)) > NEW // 2 for row in even)
    assert len(set(map(tuple, even))) == len(even)


MANY = {"temperature": 1.0, "top_k": 50, "every": 4}


def test_a_request_has_a_seed_of_its_own(lms):
    """Its tokens depend on no other request of the batch, nor on the size of the batch."""
    lm = lms["after"]
    together = lm.generate(PROMPTS, NEW, seed=[5, 6, 7, 5], **MANY)
    for i, seed in ((0, 5), (2, 7)):
        assert lm.generate([PROMPTS[i]], NEW, seed=[seed], **MANY) == [together[i]]
    again = lm.generate([*PROMPTS, PROMPTS[0]], NEW, seed=[5, 6, 7, 5, 8], batch_size=1, **MANY)
    assert again[:4] == together and again[4] != again[0]


def test_equal_prompts_draw_each_for_itself(lms):
    """One seed is given for the whole list."""
    same = lms["after"].generate([PROMPTS[0]] * 3, NEW, seed=5, **MANY)
    assert len(set(map(tuple, same))) == 3


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
    """Decoding calls it, whatever it is."""
    lm = lms["decoder"]
    rows = lm._pad([[2, 5, 6, 7]] * 4)
    keys = jax.random.split(jax.random.key(0), 4)
    *_, (new, _) = decoding.decode_in_chunks(
        lm.params,
        *rows,
        keys,
        GenerationOptions(1, Least()),
        aug=lm.aug,
        write=None,
        room=32,
        eos_ids=[],
        pad_id=0,
        stopped=lambda new: new[:, -1] < 0,
    )
    assert (new[:, 0] == np.argmin(lm.logits([[2, 5, 6, 7]])[0, -1])).all()


def test_a_rule_that_was_added_keeps_its_value():
    @dataclasses.dataclass(frozen=True)
    class More(Sampler):
        min_p: float = 0.0

    assert More(temperature=1.0, min_p=0.9).checked() == More(1.0, 0, 1.0, 0.9)
