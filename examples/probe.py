"""Shows which tokens latents help with: the change in perplexity by kind of token, as a table.

  .venv/bin/python -m examples.probe [WORKDIR] [FOLDER]
  .venv/bin/python -m examples.probe --temperature=1.05     # the control: no latents

WORKDIR holds the coprocessor ("packaged"), FOLDER works of text, *.txt (packaged/validation). The
decoder is the packaged one. To ask another question of the tokens, change `kinds`. The control
divides all logits of the decoder by a constant instead, which also makes predictions less sure.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import latent_delib as ld
from latent_delib.measure import intervals

WORKS = Path(ld.__file__).parent / "data/corpus/validation"
LENGTH = 128  # tokens of a row
ROWS = 32  # rows at once
PLACES = 16  # where latents are put, per row
AHEAD = 16
# Rows and places -> log p of the AHEAD tokens after each place, without latents and with them.
Scores = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
AFTER = {"n = 1": slice(0, 1), "n = 2 to 4": slice(1, 4), "n = 5 to 16": slice(4, 16)}


def rows_of(tokenizer: Any, work: Path) -> np.ndarray:
    """Returns the whole rows of a work, int [R, LENGTH], each with BOS first."""
    ids = np.array(tokenizer.encode(work.read_text(encoding="utf-8")), int)
    count = len(ids) // (LENGTH - 1)
    rows = np.reshape(ids[: count * (LENGTH - 1)], (count, LENGTH - 1))
    return np.insert(rows, 0, tokenizer.bos_id, axis=1)


def places_of(draw: np.random.Generator, count: int) -> np.ndarray:
    """Draws places in each row, int [count, PLACES], each with AHEAD tokens after it."""
    room = range(1, LENGTH - AHEAD)
    return np.sort([draw.choice(room, PLACES, replace=False) for _ in range(count)], axis=1)


def kinds(row: np.ndarray, at: int, rank: np.ndarray, top: np.ndarray) -> dict[str, np.ndarray]:
    """Tells of which kinds the AHEAD tokens after a place are.

    Args:
      row: int [LENGTH].
      at: the place.
      rank: int [V], of each token of the vocabulary, 0 for the most frequent.
      top: float [AHEAD], the decoder's highest probability of any token at each place: how sure
        it is, whichever token came. The probability of the token that came would not tell: where
        it is low, any model that spreads its probability more evenly is better.

    Returns:
      By name of the kind, bool [AHEAD].
    """
    last = []  # how far before the place the same token stands, at the nearest
    for token in row[at + 1 : at + 1 + AHEAD]:
        (found,) = np.nonzero(row[: at + 1] == token)
        last.append(at - found[-1] if len(found) else LENGTH)
    last = np.array(last)
    place = rank[row[at + 1 : at + 1 + AHEAD]]
    return {
        "all": np.full(AHEAD, True),
        "occurs in the last 16 tokens": last < 16,
        "occurs further back": (last >= 16) & (last < LENGTH),
        "does not occur in the text": last == LENGTH,
        "one of the 64 most frequent": place < 64,
        "one of the next 192": (place >= 64) & (place < 256),
        "rarer": place >= 256,
        "the decoder's likeliest token has p > 0.5": top > 0.5,
        "p from 0.2 to 0.5": (top <= 0.5) & (top >= 0.2),
        "p < 0.2": top < 0.2,
    }


def tempered(lm: ld.AugmentedLM, temperature: float) -> Scores:
    """Returns the control: instead of latents, all logits of the decoder are divided."""

    def score(some: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = lm.logits(some)[:, :-1]
        row = np.arange(len(some))[:, None, None]
        place = places[:, :, None] + np.arange(AHEAD)
        plain, divided = [
            np.take_along_axis(np.asarray(log_p), some[:, 1:, None], axis=-1)[row, place, 0]
            for log_p in map(jax.nn.log_softmax, (logits, logits / temperature))
        ]
        return plain, divided

    return score


def measure(lm: ld.AugmentedLM, works: list[Path], score: Scores) -> dict[str, np.ndarray]:
    """Returns for each kind the tokens and the sum of what latents add to -log p: [2, works, n]."""
    rows = {work: rows_of(lm.tokenizer, work) for work in works}
    count = np.bincount(np.concatenate([x.ravel() for x in rows.values()]), minlength=1)
    rank = np.argsort(np.argsort(-count, kind="stable"))
    draw = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for number, work in enumerate(works):
        for first in range(0, len(rows[work]), ROWS):
            some = rows[work][first : first + ROWS]
            places = places_of(draw, len(some))
            plain, augmented = map(np.asarray, score(some, places))
            top = np.asarray(jax.nn.softmax(lm.logits(some)).max(axis=-1))
            for row, places_of_row, top_T, change in zip(some, places, top, plain - augmented):
                for at, change_A in zip(places_of_row, change):
                    for kind, mask in kinds(row, at, rank, top_T[at : at + AHEAD]).items():
                        sums = found.setdefault(kind, np.zeros((2, len(works), AHEAD)))
                        sums[0, number] += mask
                        sums[1, number] += np.where(mask, change_A, 0)
    return found


def cell(tokens: np.ndarray, change: np.ndarray) -> str:
    """Returns the change in perplexity and its interval over works, from sums of each, [works]."""
    mean = 100 * np.expm1(change.sum() / tokens.sum())
    work = np.arange(len(tokens))
    found = intervals.estimate(tokens[:, None], change[:, None], work, seed=0)
    low, high = found.at_n[:, 0]
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", nargs="?", default="packaged")
    parser.add_argument("folder", nargs="?", default=str(WORKS))
    parser.add_argument("--temperature", type=float, help="the divisor of the control")
    flags = parser.parse_args()
    lm = ld.AugmentedLM(ld.load_decoder("packaged"), ld.load_coprocessor(flags.workdir))
    score = partial(lm.ahead_logprobs, ahead=AHEAD)
    if flags.temperature:
        score = tempered(lm, flags.temperature)
    found = measure(lm, sorted(Path(flags.folder).glob("*.txt")), score)
    print("| the token to be predicted | share |", " | ".join(AFTER), "|")
    print("|---|---|" + "---|" * len(AFTER))
    for kind, sums in found.items():
        cells = [cell(*sums[:, :, n].sum(axis=2)) for n in AFTER.values()]
        share = sums[0].sum() / found["all"][0].sum()
        print(f"| {kind} | {100 * share:.0f} % |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
