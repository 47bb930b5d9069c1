"""Which runs stand together in a table, and beside which published lines: the comparisons of Section 3 and two more."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from latent_delib.results import published
from latent_delib.results.entries import Entry, controls
from latent_delib.results.published import Variant


def is_decoder(entry: Entry) -> bool:
    return entry.model == "decoder"


def is_late(entry: Entry) -> bool:
    return bool(entry.delay)


def is_paper_method(entry: Entry) -> bool:
    """Tells whether an entry is cache augmentation as the paper has it: no control, and latents that come at once."""
    is_control = any(controls(entry.result).values())
    return entry.method == "cache_augmentation" and not is_control and not is_late(entry)


def made_by(*methods: str) -> Callable[[Entry], bool]:
    return lambda entry: entry.method in methods


class Comparison(NamedTuple):
    """A table of Section 3's comparisons, or of a kind like them.

    lines: the published ones. about: tells whether a table is about an entry; without one it has published lines only.
    beside: tells whether an entry stands beside those; gets all the entries that the table is about.
    """

    name: str
    title: str
    lines: Sequence[Variant]
    about: Callable[[Entry], bool]
    beside: Callable[[Entry, list[Entry]], bool]


def decoder_and_paper_method(entry: Entry, about: list[Entry]) -> bool:
    del about
    return is_decoder(entry) or is_paper_method(entry)


def the_decoder(entry: Entry, about: list[Entry]) -> bool:
    del about
    return is_decoder(entry)


def same_checkpoint(entry: Entry, about: list[Entry]) -> bool:
    """Tells whether an entry is the decoder, or one of the checkpoints that a table is about, on time."""
    checkpoints = [each.result.checkpoint for each in about]
    return is_decoder(entry) or (is_paper_method(entry) and entry.result.checkpoint in checkpoints)


def or_from_scratch(entry: Entry, about: list[Entry]) -> bool:
    """Adds the coprocessors that begin with random weights, as one of another size does."""
    return decoder_and_paper_method(entry, about) or entry.method == "from_scratch"


COMPARISONS = (
    Comparison(
        "3_pause_tokens",
        "Pause tokens (Goyal et al. 2023) against cache augmentation",
        published.PAUSE_TOKENS,
        made_by("pause_tokens", "static_tokens"),
        decoder_and_paper_method,
    ),
    Comparison(
        "4_zero_shot_cot",
        "Zero-shot chain of thought against cache augmentation",
        published.ZERO_SHOT_COT,
        lambda entry: entry.model == "zero_shot_cot",
        decoder_and_paper_method,
    ),
    Comparison(
        "5_coprocessors",
        "Coprocessors from scratch and as low-rank parts",
        published.COPROCESSORS,
        made_by("from_scratch", "lora"),
        decoder_and_paper_method,
    ),
    Comparison(
        "6_last_layer",
        "Last-layer activations instead of the cache",
        published.LAST_LAYER,
        made_by("last_layer"),
        decoder_and_paper_method,
    ),
    Comparison(
        "7_ahead_tokens",
        "Ahead tokens in training",
        published.NUM_AHEAD,
        is_paper_method,
        the_decoder,
    ),
    Comparison(
        "8_asynchronous",
        "Asynchronous coprocessor: latents that come some tokens late",
        published.DELAY,
        is_late,
        same_checkpoint,
    ),
    Comparison(
        "9_follow_up",
        "Keys and values inserted (H1), joint training (H2), one model for both (Coda-Forno et al. 2025)",
        (),
        made_by("inserted", "joint", "unified"),
        decoder_and_paper_method,
    ),
    Comparison(
        "10_beyond",
        "Latents one after another, and coprocessors of another size",
        (),
        made_by("sequential", "resized"),
        or_from_scratch,
    ),
)
