"""Two packed rows of text, and three traces in each: one at a document's start, two near an end."""

import numpy as np

T, M, L, A = 16, 3, 3, 4
TOKENS = np.random.default_rng(0).integers(0, 97, (2, T))
SEGMENT = np.array([[1] * 9 + [2] * 7, [1] * 12 + [0] * 4])
START = np.array([[0] * 9 + [9] * 7, [0] * 12 + [12] * 4])
END = np.array([[9] * 9 + [16] * 7, [12] * 12 + [16] * 4])
AT = np.array([[2, 7, 12], [0, 9, 10]])
WEIGHTS = np.array(
    [[[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]]
)


def document_of(b, m):
    """The document that holds a trace, and where in it the trace is."""
    p = AT[b, m]
    return TOKENS[b, START[b, p] : END[b, p]], p - START[b, p]
