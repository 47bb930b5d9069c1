"""Perplexity of the n-th token ahead as a plain sum over all log-probabilities."""

import numpy as np

A, MAX = 4, 32  # evaluate.num_ahead and evaluate.max_length of the tiny config


def cut(documents, length, bos=2):
    """Pieces of at most `length` tokens, each of one document and begun by BOS."""
    return [[bos, *d[i : i + length - 1]] for d in documents for i in range(0, len(d), length - 1)]


def ahead_logprobs(lm, pieces):
    """log p of the next A tokens after every token, plain and with latents: [pieces, MAX, A]."""
    text = np.zeros((len(pieces), MAX + A), np.int32)
    for row, piece in zip(text, pieces):
        row[: len(piece)] = piece
    found = lm.ahead_logprobs(text, np.tile(np.arange(MAX), (len(pieces), 1)), A)
    return [np.asarray(logprobs) for logprobs in found]


def pooled(logprobs, pieces, chosen):
    """The table from log-probabilities after the chosen tokens of each piece."""
    rows = []
    for n in range(1, A + 1):
        counted = [
            (b, t) for b, piece in enumerate(pieces) for t in chosen[b] if t < len(piece) - n
        ]
        plain, ours = (
            np.exp(-np.mean([x[b, t, n - 1] for b, t in counted], dtype=np.float64))
            for x in logprobs
        )
        rows.append([n, len(counted), plain, ours, 100 * (ours / plain - 1)])
    return rows


def everywhere(pieces):
    return [range(len(piece)) for piece in pieces]


def naive_rows(lm, pieces):
    """The table, from log-probabilities after every token of every piece."""
    return pooled(ahead_logprobs(lm, pieces), pieces, everywhere(pieces))
