"""The words for a method's settings: those that change something, and a fork's too."""

import pytest

from configs.base import get_config
from latent_delib.job import words

BASE = get_config().method.to_dict()


def test_every_key_has_words_or_is_given_by_the_callers():
    """A new key is printed by its bare name."""
    assert set(BASE) == {*words.PHRASES, *words.GIVEN}
    assert set(words.OF_TEXT) <= set(words.PHRASES)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ["placement after"]),
        ({"name": "decoder"}, []),
        ({"name": "decoder", "prompt_end": "A:"}, ["after 'A:'"]),
        ({"name": "a method of a newer version"}, ["placement after"]),
        (
            {"coprocessor": {"num_layers": 2, "embed_dim": 24}, "lora_rank": 4},
            [
                "placement after",
                "coprocessor of num layers 2, embed dim 24",
                "adapters of rank 4",
            ],
        ),
        (
            {"latent_penalty": 2.0, "start": "runs/a", "distill": 0.5},
            [
                "placement after",
                "distilled with weight 0.5",
                "started from runs/a",
                "latent penalty 2.0",
            ],
        ),
    ],
)
def test_settings_that_change_something_are_named(settings, expected):
    """Two runs look alike, or a line is full of settings that are off."""
    assert words.settings_in_words(BASE | settings) == expected


def test_an_older_run_lacks_keys():
    """The words of a run that knows neither `distill` nor `visible_text` are not to be had."""
    older = {"name": "cache_augmentation", "num_latents": 4, "placement": "after"}
    assert words.settings_in_words(older) == ["placement after"]
    assert words.text_in_words(older) == []


def test_words_of_the_text_alone():
    method = BASE | {"visible_text": 8, "prompt_end": "A:", "distill": 0.5}
    assert words.text_in_words(method) == ["after 'A:'", "8 tokens of the text visible"]
