"""Views of the validation text: the tokens that each side reads, and where latents are put.

A control of the evaluation, such as latents of another text, is a function from one view to
another. The code that adds up the values reads nothing but the cases of a view.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from latent_delib.data.sources import has_steps
from latent_delib.errors import UserError
from latent_delib.job.experiment import Experiment
from latent_delib.job.record import Record
from latent_delib.measure.text import ValidationText

# Versions of the draws in `positions` and `donors`. Version 1 ignored the length of a piece.
DRAWS = 2
# Version 2 put the latents of another document at the same place, which may be no prompt's end.
DRAWS_OF_PROMPTS = 3


class Case(NamedTuple):
    """Holds one piece as it is evaluated.

    plain: int32 [length], the piece, which the frozen decoder reads.
    at: int64 [k], the tokens of `plain` after which latents are put, ascending.
    own: int32 [length], the text that the evaluated model reads.
    own_at: int64 [k], the same positions in `own`.
    donor: int32 [length], the text whose latents are used; None: those of `own`.
    donor_at: int64 [k], the tokens of `donor` after which these latents are written.
    """

    plain: np.ndarray
    at: np.ndarray
    own: np.ndarray
    own_at: np.ndarray
    donor: np.ndarray | None = None
    donor_at: np.ndarray | None = None


View = Callable[[int], Case]  # number of a piece -> its case


def view_of(exp: Experiment, text: ValidationText) -> View:
    """Returns the view that the config's `evaluate` asks for.

    Raises:
      UserError: `swap` is set, and a source has only one document.
    """
    e = exp.config.evaluate

    def whole(number: int) -> Case:
        piece = text.pieces[number]
        if exp.prompt_end:
            at = prompt_ends(piece, exp.prompt_end, e.longer_prompt)
            if exp.steps_end and has_steps(text.source_of(number)):
                piece, at = without_steps(piece, at, exp.steps_end)
        else:
            at = positions(
                e.seed, number, len(piece), e.max_positions, e.max_length, e.longer_prompt
            )
        return Case(piece, at, piece, at)

    view: View = whole
    if e.longer_prompt:
        view = without_first_tokens(view, e.longer_prompt)
    if e.swap:
        num_positions = text.lengths()
        if exp.prompt_end:
            counts = [len(view(number).own_at) for number in range(len(text.pieces))]
            num_positions = np.array(counts)
        view = with_latents_of(view, donors(e.seed, text, num_positions), bool(exp.prompt_end))
    return view


def draws_of(record: Record) -> int:
    """Returns the version of the draws that an evaluation uses."""
    at_prompts = record["evaluate.swap"] and record["method.prompt_end"]
    return DRAWS_OF_PROMPTS if at_prompts else DRAWS


def without_first_tokens(view: View, lost: int) -> View:
    """Hides the first `lost` tokens after BOS from the evaluated model, not from the decoder."""

    def shortened(number: int) -> Case:
        case = view(number)
        own = np.delete(case.own, slice(1, 1 + lost))
        return case._replace(own=own, own_at=case.own_at - lost)

    return shortened


def with_latents_of(view: View, donor_of: np.ndarray, at_prompts: bool) -> View:
    """Gives each piece the latents of its donor, piece `donor_of[number]`.

    They are written at the piece's own positions or, with `at_prompts`, the k-th after the donor's
    k-th prompt. Where the donor is too short, they are written at its last such position.
    """

    def swapped(number: int) -> Case:
        case, other = view(number), view(donor_of[number])
        donor_at = np.minimum(case.own_at, len(other.own) - 1)
        if at_prompts:
            k = np.minimum(np.arange(len(case.own_at)), len(other.own_at) - 1)
            donor_at = other.own_at[k]
        return case._replace(donor=other.own, donor_at=donor_at)

    return swapped


def positions(
    seed: int, number: int, length: int, most: int, longest: int, first: int = 0
) -> np.ndarray:
    """Draws the tokens of a piece after which latents are put.

    The draw depends on the seed and the piece's number alone.

    Args:
      length: tokens of the piece.
      most: positions to draw in a piece of `longest` tokens. A shorter piece has its share, so that
        each token of the text is as likely as any other. 0: every token that has a next one.
      longest: tokens of the longest possible piece.
      first: the first token that may be drawn.

    Returns:
      int64 [k], ascending.
    """
    usable = max(0, length - 1 - first)
    usable_in_longest = longest - 1 - first
    if not most or most >= usable_in_longest:
        return first + np.arange(usable)
    draw = np.random.default_rng([seed, number])
    share, rest = divmod(usable * most, usable_in_longest)
    share += draw.integers(usable_in_longest) < rest  # rounded so that its mean is exact
    return first + np.sort(draw.choice(usable, share, replace=False))


def prompt_ends(piece: np.ndarray, ending: Sequence[int], first: int = 0) -> np.ndarray:
    """Returns the positions where the text so far ends with `ending`, int64 [k], ascending.

    They are at or after token `first`, and before the last token.
    """
    at = _ends_of(piece, ending)
    return at[(at >= first) & (at < len(piece) - 1)]


def _ends_of(piece: np.ndarray, ending: Sequence[int]) -> np.ndarray:
    """Returns the tokens at which `ending` ends, int64 [k], ascending."""
    last = np.arange(len(ending) - 1, len(piece))
    back = np.arange(len(ending))[::-1]
    return last[(piece[last[:, None] - back] == ending).all(axis=1)]


def without_steps(
    piece: np.ndarray, at: np.ndarray, ending: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Removes the tokens between each prompt and its answer from a piece.

    Args:
      piece: int32 [length].
      at: int64 [k], the last token of each prompt, ascending.
      ending: tokens that end the steps.

    Returns:
      The rest of the piece, and the same positions in it, but for prompts without an answer.
    """
    ends = np.append(_ends_of(piece, ending), len(piece))
    answer = ends[np.searchsorted(ends, at)] + 1
    has_answer = answer < len(piece)
    at, answer = at[has_answer], answer[has_answer]
    kept = np.ones(len(piece), bool)
    for last, first in zip(at, answer):
        kept[last + 1 : first] = False
    at = at[kept[at]]
    return piece[kept], np.cumsum(kept)[at] - 1


def donors(seed: int, text: ValidationText, num_positions: np.ndarray) -> np.ndarray:
    """Draws a donor for each piece, another piece whose latents it gets, int64 [pieces].

    The donor is of another document of the same source, so that latents differ in content and not
    in the kind of text. It has at least as many positions for latents as the piece or, if none
    has, the most. Of several that fit, the next in a random order is taken.

    num_positions: int64 [pieces].

    Raises:
      UserError: a source has only one document, or only one with positions for latents.
    """
    at_random = np.random.default_rng(seed).permutation(len(text.pieces))
    document = text.document
    source = text.source[document]
    found = np.empty(len(text.pieces), np.int64)
    for number, name in enumerate(text.sources):
        if np.count_nonzero(text.source == number) == 1:
            raise UserError(
                f"config.evaluate.swap: {name!r} of config.data.validation "
                "has one document among the pieces; expected two at least"
            )
        ring = at_random[source[at_random] == number]
        for i, piece in enumerate(ring):
            others = np.roll(ring, -i)
            others = others[document[others] != document[piece]]
            enough = np.minimum(num_positions[others], num_positions[piece])
            found[piece] = others[np.argmax(enough)]
            if num_positions[piece] and not enough.max():
                raise UserError(
                    f"config.evaluate.swap: {name!r} of config.data.validation "
                    "has one document with a prompt's end, expected two or more"
                )
    return found
