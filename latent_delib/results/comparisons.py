"""The comparisons of Section 3 and two more: the runs and published lines of each table."""

from collections.abc import Sequence, Set
from typing import NamedTuple

from latent_delib.results import published
from latent_delib.results.entries import Entry, controls, is_control
from latent_delib.results.published import Variant

PAPER = "cache_augmentation"
SHORT = "latents in place of text"
BOTH = {"decoder", PAPER}


class Comparison(NamedTuple):
    """Describes a table that compares kinds of runs.

    lines: the published lines.
    about: the kinds that the table is about. If no run is of these, it has published lines alone.
    beside: the kinds shown with them.
    same_checkpoint: whether to show, besides decoders, only runs of the checkpoints that are in
      `about`, with latents that come at once or late.
    """

    name: str
    title: str
    lines: Sequence[Variant]
    about: Set[str]
    beside: Set[str] = BOTH
    same_checkpoint: bool = False


COMPARISONS = (
    Comparison(
        "3_pause_tokens",
        "Pause tokens (Goyal et al. 2023) against cache augmentation (Section 3)",
        published.PAUSE_TOKENS,
        {"pause_tokens", "static_tokens"},
    ),
    Comparison(
        "4_zero_shot_cot",
        "Zero-shot chain of thought against cache augmentation (Section 3)",
        published.ZERO_SHOT_COT,
        {"zero_shot_cot"},
    ),
    Comparison(
        "5_coprocessors",
        "Coprocessors from scratch and as low-rank adapters (Section 3)",
        published.COPROCESSORS,
        {"from_scratch", "lora"},
    ),
    Comparison(
        "6_last_layer",
        "Last-layer activations instead of the cache (Section 3)",
        published.LAST_LAYER,
        {"last_layer"},
    ),
    Comparison(
        "7_ahead_tokens",
        "Ahead tokens in training (Section 3)",
        published.NUM_AHEAD,
        {PAPER},
        {"decoder"},
    ),
    Comparison(
        "8_asynchronous",
        "Asynchronous coprocessor: latents that come some tokens late (Section 3)",
        published.DELAY,
        {"late"},
        same_checkpoint=True,
    ),
    Comparison(
        "9_follow_up",
        "Keys and values inserted (H1), joint training (H2), "
        "one model for both (Coda-Forno et al. 2025)",
        (),
        {"inserted", "joint", "unified"},
    ),
    Comparison(
        "10_beyond",
        "Latents one after another, coprocessors of another size, and related methods: "
        "latent tokens, Cartridges, outputs fed back (Coconut), an assistant (SoftCoT, "
        "Cache-to-Cache), and latents in place of text (gist tokens)",
        (),
        {"sequential", "resized", "latent_tokens", "cartridge", "feedback", "assistant", SHORT},
        BOTH | {"from_scratch"},  # as a coprocessor of another size begins
    ),
)


def kinds_of(entry: Entry) -> set[str]:
    """Returns the kinds of run that an entry is.

    They are its method, or its model if it has no latents, and "late" if its latents come late. The
    paper's method counts only if latents come at once, and no control is set. Where latents stand
    in place of text, the kind is SHORT alone.
    """
    if entry.model != "augmented":
        return set() if is_control(entry) else {entry.model}
    if entry.result.method.get("visible_text"):
        return {SHORT}
    kinds = {entry.method}
    if entry.delay or controls(entry.result):
        kinds.discard(PAPER)
    if entry.delay:
        kinds.add("late")
    return kinds


def is_decoder(entry: Entry) -> bool:
    return entry.model == "decoder"


def is_paper_method(entry: Entry) -> bool:
    return PAPER in kinds_of(entry)


def entries_in(comparison: Comparison, every: Sequence[Entry]) -> list[Entry]:
    """Returns the entries of `every` that belong in a table, in the same order."""
    about = [entry for entry in every if kinds_of(entry) & comparison.about]
    if not about:
        return []
    checkpoints = {entry.result.checkpoint for entry in about}
    found = []
    for entry in every:
        belongs = bool(kinds_of(entry) & (comparison.about | comparison.beside))
        if comparison.same_checkpoint and not is_decoder(entry):
            with_latents = entry.model == "augmented" and (entry.delay or not is_control(entry))
            belongs = bool(with_latents) and entry.result.checkpoint in checkpoints
        if belongs:
            found.append(entry)
    return found
