"""Where a continuation ends before it has all its tokens."""

import dataclasses
from typing import Any

import numpy as np

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.machine import arguments


@dataclasses.dataclass(frozen=True)
class Endings:
    """Stop strings, before the first of which a text ends.

    tokens: the control tokens among them, which decoded text does not show.
    """

    tokenizer: Tokenizer
    strings: list[str]
    tokens: list[int]

    def seen(self, new_BN: np.ndarray) -> np.ndarray:
        """Tells which rows of new tokens hold an ending, bool [B]."""
        found_B = np.isin(new_BN, self.tokens).any(axis=1)
        if self.strings:
            texts = [self.tokenizer.decode(row) for row in new_BN]
            found_B |= [any(stop in text for stop in self.strings) for text in texts]
        return found_B

    def cut(self, new_N: np.ndarray) -> str:
        """Returns the text of new tokens up to the first ending."""
        (at,) = np.nonzero(np.isin(new_N, self.tokens))
        text = self.tokenizer.decode(new_N[: at[0] if len(at) else None].tolist())
        found = [text.find(stop) for stop in self.strings]
        return text[: min((i for i in found if i >= 0), default=None)]


def endings(tokenizer: Tokenizer, stop: Any) -> Endings:
    """Returns the endings that a stop string, or a list of them, means.

    Raises:
      UserError: another kind of value, or an empty string.
    """
    strings = [stop] if isinstance(stop, str) else arguments.several("stop", stop)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise UserError(f"stop: holds {text!r}, expected texts that are not empty")
    return Endings(tokenizer, strings, [tokenizer.control[s] for s in strings if s in tokenizer.control])
