"""What tests of text share: words to make it of, and when batches are equal."""

import numpy as np

WORDS = (
    "the cat sat on a mat and a dog ran to the door when rain fell over green hills at night"
).split()


def equal(one, other):
    """Tells whether two lists of batches hold the same tokens and segments."""
    return all(
        np.array_equal(a[k], b[k])
        for a, b in zip(one, other, strict=True)
        for k in ("tokens", "segment")
    )
