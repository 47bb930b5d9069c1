"""Shows what a text is worth to the decoder: it reads the last tokens alone, as a table.

  .venv/bin/python -m examples.recent_text [W ...]

This is a control of `lab/short_text`, whose decoder sees latents and the last 16 tokens. Here no
latents join: the decoder reads BOS and the last W tokens (16, 32 and 64) before each place. Text,
places and seed are those of the evaluation of `lab/short_text`, whose mixture and tokens
`./launch/paper.sh` makes. The table has the change in perplexity, in percent, against the decoder
that reads all text.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import latent_delib as ld
from configs import paper
from latent_delib.job import experiment
from latent_delib.measure import perplexity
from latent_delib.measure.perplexity import Sums
from latent_delib.measure.text import ValidationText, read_validation_text
from latent_delib.measure.views import View, view_of
from latent_delib.results.tables import changes

ROWS = 128  # rows at once
COLUMNS = ("n = 1", "n = 4", "n = 16", "n = 32", "mean")
Score = Callable[[np.ndarray], np.ndarray]  # tokens [R, T] -> -log p of each next one [R, T - 1]


def scorer(path: str) -> Score:
    """Returns a function that scores rows of tokens by the decoder at `path`, in nats."""
    lm = ld.AugmentedLM(ld.load_decoder(path))

    @jax.jit
    def nll(logits_RTV: jax.Array, tokens_RT: jax.Array) -> jax.Array:
        log_p_RTV = jax.nn.log_softmax(logits_RTV[:, :-1])
        return -jnp.take_along_axis(log_p_RTV, tokens_RT[:, 1:, None], axis=-1)[..., 0]

    def score(tokens_RT: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(tokens_RT), ROWS):
            some = tokens_RT[first : first + ROWS]
            parts.append(np.asarray(nll(lm.logits(some), some)))
        return np.concatenate(parts)

    return score


def places_of(text: ValidationText, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Returns the piece and the token of every place of the evaluation, int [places] each."""
    at = [view(number).at for number in range(len(text.pieces))]
    piece = np.repeat(np.arange(len(at)), list(map(len, at)))
    return piece, np.concatenate(at)


def ahead(nll: np.ndarray, at: np.ndarray, num_ahead: int) -> np.ndarray:
    """Returns -log p of the tokens after token `at` of each row, [rows, A], from [rows, T - 1]."""
    return np.take_along_axis(nll, at[:, None] + np.arange(num_ahead), axis=1)


def recent_rows(
    tokens_PT: np.ndarray, piece: np.ndarray, at: np.ndarray, recent: int, num_ahead: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of BOS, the last `recent` tokens at each place, and the tokens ahead.

    Args:
      tokens_PT: the pieces, with at least `num_ahead` tokens of padding on the right.
      piece, at: int [places].

    Returns:
      int [places, 1 + recent + A], and the same place in each row, int [places]. A place with fewer
      tokens before it has all of them, and more on the right.
    """
    first = np.maximum(at + 1 - recent, 1)
    index = first[:, None] + np.arange(recent + num_ahead)
    rows = tokens_PT[piece[:, None], index]
    bos = tokens_PT[piece, :1]
    return np.concatenate([bos, rows], axis=1), at - first + 1


def main(widths: Sequence[int]) -> None:
    exp = experiment.read(paper.get_config("lab/short_text"))
    text = read_validation_text(exp)
    piece, at = places_of(text, view_of(exp, text))
    A = exp.config.evaluate.num_ahead
    score = scorer(exp.config.decoder.path)

    lengths = text.lengths()
    tokens_PT = np.zeros((len(lengths), exp.config.evaluate.max_length + A), np.int32)
    for row, tokens in zip(tokens_PT, text.pieces):
        row[: len(tokens)] = tokens
    all_text = ahead(score(tokens_PT)[piece], at, A)
    counts = at[:, None] + 1 + np.arange(A) < lengths[piece, None]

    document = text.document[piece]
    print("| the decoder reads |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for width in widths:
        rows, at_row = recent_rows(tokens_PT, piece, at, width, A)
        alone = ahead(score(rows), at_row, A)
        sums = Sums(counts.astype(np.int64), all_text * counts, alone * counts)
        for number, source in enumerate(text.sources):
            here = text.source[document] == number
            of_source = Sums(*(x[here] for x in sums))
            work = text.work[document[here]]
            found = changes(perplexity.figures({"nll": of_source}, work, seed=0))
            cells = [str(found[column]).replace("%", "") for column in COLUMNS]
            print(f"| the last {width} tokens, {source} |", " | ".join(cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("widths", metavar="W", nargs="*", type=int, default=(16, 32, 64))
    main(parser.parse_args().widths)
