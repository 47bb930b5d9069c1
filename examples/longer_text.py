"""Shows whether latents or 32 more tokens of text help more, by the length of the text, as a table.

  .venv/bin/python -m examples.longer_text [WORKDIR] [FOLDER]

WORKDIR holds the coprocessor ("packaged"), FOLDER works of text, *.txt (packaged/validation). The
decoder is the packaged one. At the same places it predicts tokens from a text, from the text and
latents, and from the text with the 32 tokens before it. The table has the change in perplexity
against the last of these, in percent, with a 95 % interval over works.
"""

import sys
from pathlib import Path

import numpy as np

import latent_delib as ld
from examples.probe import PLACES, ROWS, WORKS, cell, rows_of

MORE = 32  # tokens
AHEAD = 4
SHOWN = (1, 4)  # n
# Tokens of text before a place: from, to.
LENGTHS = ((0, 15), (16, 31), (32, 63), (64, 91), (0, 91))


def measure(lm: ld.AugmentedLM, works: list[Path]) -> np.ndarray:
    """Sums over the places of each length of text and each work.

    Returns:
      float64 [lengths, 3, works, AHEAD]: how many places; how much more -log p is from the text
      than from the longer text; and the same with latents.
    """
    found = np.zeros((len(LENGTHS), 3, len(works), AHEAD))
    draw = np.random.default_rng(0)
    for number, work in enumerate(works):
        rows = rows_of(lm.tokenizer, work)
        for first in range(0, len(rows), ROWS):
            longer = rows[first : first + ROWS]
            text = np.delete(longer, range(1, 1 + MORE), axis=1)
            last = range(text.shape[1] - AHEAD)  # the text's last token: BOS, or any that has room
            at = np.sort([draw.choice(last, PLACES, replace=False) for _ in text], axis=1)
            from_longer, _ = lm.ahead_logprobs(longer, at + MORE, AHEAD)
            plain, augmented = lm.ahead_logprobs(text, at, AHEAD)
            for group, (low, high) in enumerate(LENGTHS):
                chosen = (at >= low) & (at <= high)
                found[group, 0, number] += chosen.sum()
                for side, log_p in enumerate((plain, augmented), 1):
                    more_nll = np.asarray(from_longer - log_p)[chosen]
                    found[group, side, number] += more_nll.sum(axis=0)
    return found


def main(workdir: str = "packaged", folder: str = str(WORKS)) -> None:
    lm = ld.AugmentedLM(ld.load_decoder("packaged"), ld.load_coprocessor(workdir))
    found = measure(lm, sorted(Path(folder).glob("*.txt")))
    columns = [f"{side}, n = {n}" for side in ("without latents", "with latents") for n in SHOWN]
    print("| tokens of text | share |", " | ".join(columns), "|")
    print("|---|---|" + "---|" * len(columns))
    for (low, high), (count, plain, augmented) in zip(LENGTHS, found):
        cells = []
        for change in (plain, augmented):
            cells += [cell(count[:, n - 1], change[:, n - 1]) for n in SHOWN]
        share = 100 * count.sum() / found[-1, 0].sum()
        print(f"| {low} to {high} | {share:.0f} % |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
