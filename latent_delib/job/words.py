"""The settings of a method in words, as logs, tables and model cards give them."""

from collections.abc import Mapping
from typing import Any

from latent_delib.delib.methods import METHODS
from latent_delib.job.record import BEFORE

# Key of `method` -> its phrase, given its value. A key that is neither here nor in GIVEN, such as
# one that a fork has added, is named as it is.
PHRASES = {
    "placement": "placement {}",
    "every": "again after each {} tokens",
    "assistant": "assistant {}",
    "coprocessor": "coprocessor of {}",
    "lora_rank": "adapters of rank {}",
    "max_delay": "trained for delays up to {}",
    "prompt_end": "after {!r}",
    "visible_text": "{} tokens of the text visible",
    "distill": "distilled with weight {:g}",
    "start": "started from {}",
}
# The name and the sizes, which each caller gives in its own way.
GIVEN = ("name", "num_latents", "num_traces", "num_ahead")
# The keys that change which tokens of a text are predicted, and how much of it the decoder sees.
OF_TEXT = ("prompt_end", "visible_text")


def settings_in_words(method: Mapping[str, Any]) -> list[str]:
    """Says in words all settings of a method but its name and sizes.

    A setting that changes nothing is left out.

    method: the keys of a config's `method`; older runs lack some.
    """
    found = []
    for key in sorted(method.keys() - GIVEN, key=_order):
        value = method[key]
        if value == BEFORE.get(f"method.{key}"):
            continue
        if key == "placement" and not writes_latents(method["name"]):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in value.items())
        phrase = PHRASES.get(key, key.replace("_", " ") + " {}")
        found.append(phrase.format(value))
    return found


def _order(key: str) -> tuple[int, str]:
    """Sorts keys as in PHRASES, then all other keys by name."""
    known = list(PHRASES)
    return known.index(key) if key in known else len(known), key


def text_in_words(method: Mapping[str, Any]) -> list[str]:
    """Says in words where a method predicts, and how much of the text its decoder sees."""
    of_text = {key: method[key] for key in OF_TEXT if key in method}
    return settings_in_words(of_text)


def writes_latents(name: str) -> bool:
    """Tells whether a method writes latents; an unknown method counts as one that does."""
    method = METHODS.get(name)
    return method is None or method.writes_latents
