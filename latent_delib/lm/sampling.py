"""Chooses the next token of a text, and finds the strings that end a text.

`Sampler` is one value that takes keys and logits. To add a rule, give it a field, and use the field
in `_draw`. The field is then an argument of `AugmentedLM.generate`, a flag of the command
`generate`, and a setting that the tasks of the lm-eval harness may name.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.machine import arguments


def _option(default: Any, text: str) -> Any:
    """Returns a field of `Sampler` with its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Chooses tokens: the likeliest, or one drawn from the likeliest.

    The fields are inputs of a compiled program, so new values do not compile a new program.
    """

    temperature: float = _option(0.0, "divides the logits; 0: the likeliest token each time")
    top_k: int = _option(0, "sample from this many of the likeliest tokens; 0: from all")
    top_p: float = _option(
        1.0, "sample from the likeliest tokens that together reach this probability"
    )

    def __call__(self, key_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        """Returns a token for each row, int32 [B]."""
        likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        # A branch, because sorting a vocabulary costs more than reading a small decoder.
        draws = self.temperature > 0
        return jax.lax.cond(draws, self._draw, lambda *_: likeliest_B, key_B, logits_BV)

    def _draw(self, key_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
        """Draws a token for each row."""
        scaled_BV = logits_BV / jnp.maximum(self.temperature, 1e-6)
        p_BV = jax.nn.softmax(scaled_BV)
        sorted_BV = jnp.sort(p_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
        rank_V = jnp.arange(sorted_BV.shape[-1])
        in_top_p_BV = before_BV < self.top_p
        in_top_k_V = (rank_V < self.top_k) | (self.top_k == 0)
        among_BV = (in_top_p_BV & in_top_k_V) | (rank_V == 0)
        least_B1 = jnp.min(jnp.where(among_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        kept_BV = jnp.where(p_BV >= least_B1, scaled_BV, -jnp.inf)
        return jax.vmap(jax.random.categorical)(key_B, kept_BV).astype(jnp.int32)

    def checked(self) -> "Sampler":
        """Returns the same sampler with plain Python numbers.

        Raises:
          UserError: a field is of the wrong type or out of range; top_k or top_p where nothing is
            drawn.
        """
        temperature = arguments.number("temperature", self.temperature)
        if not temperature >= 0:
            raise UserError(f"temperature={self.temperature}: expected at least 0")
        top_k = arguments.whole("top_k", self.top_k, 0, arguments.INT64)
        top_p = arguments.number("top_p", self.top_p)
        if not 0 < top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected above 0, at most 1")
        if not temperature and (top_k or top_p < 1):
            raise UserError(f"top_k={top_k}, top_p={top_p}: they need a temperature above 0")
        top_k = min(top_k, arguments.INT32)
        return dataclasses.replace(self, temperature=temperature, top_k=top_k, top_p=top_p)


def options() -> dict[str, tuple[Any, str]]:
    """Returns each field of `Sampler` with its default and its help text."""
    fields = dataclasses.fields(Sampler)
    return {field.name: (field.default, field.metadata["help"]) for field in fields}


class Continuation(NamedTuple):
    """Holds the continuation of a prompt.

    tokens: int32 [max_new_tokens], padded after EOS. A few tokens may follow a stop string, which
      `text` does not have.
    joined: the numbers of tokens after which latents joined.
    """

    text: str
    tokens: np.ndarray
    joined: tuple[int, ...]


class Endings:
    """Ends a text before EOS, and before the first stop string to be completed.

    Stop strings that name control tokens are found as tokens, because decoded text does not show
    them.

    Args:
      stop: a text, or a list of texts.

    Raises:
      UserError: a value of the wrong type, or an empty string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Any):
        self.tokenizer = tokenizer
        self.strings = [stop] if isinstance(stop, str) else arguments.several("stop", stop)
        for text in self.strings:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop: holds {text!r}, expected texts that are not empty")
        control = tokenizer.control
        self.tokens = [control[text] for text in self.strings if text in control]
        self.tokens += tokenizer.eos_ids

    def seen(self, new_BN: np.ndarray) -> np.ndarray:
        """Tells which rows of new tokens hold an ending, bool [B]."""
        found_B = np.isin(new_BN, self.tokens).any(axis=1)
        if self.strings:
            texts = [self.tokenizer.settled(row) for row in new_BN]
            found_B |= [any(stop in text for stop in self.strings) for text in texts]
        return found_B

    def cut(self, new_N: np.ndarray) -> str:
        """Returns the text of new tokens up to the first ending."""
        return self._before(self.tokenizer.decode_in_text(self._kept(new_N)))

    def pieces(self, chunks: Iterable[np.ndarray]) -> Iterator[str]:
        """Yields the text of new tokens in pieces, as it grows.

        Joined, the pieces are `cut` of the last chunk. A piece ends before an incomplete character,
        and before the possible beginning of a stop string.

        Args:
          chunks: the new tokens so far, int32 [N], padded on the right; more in each chunk.
        """
        said = 0
        for new_N in chunks:
            text = self._before(self.tokenizer.settled(self._kept(new_N)))
            sure = len(text) - self._begun(text)
            if sure > said:
                yield text[said:sure]
                said = sure
        rest = self.cut(new_N)[said:]
        if rest:
            yield rest

    def _kept(self, new_N: np.ndarray) -> list[int]:
        """Returns the tokens before the first token that ends a text."""
        (ends,) = np.nonzero(np.isin(new_N, self.tokens))
        return new_N[: ends[0] if len(ends) else None].tolist()

    def _before(self, text: str) -> str:
        """Returns a text up to the stop string that is the first to be complete."""
        found = []
        for stop in self.strings:
            begin = text.find(stop)
            if begin >= 0:
                found.append((begin + len(stop), begin))
        return text[: min(found)[1]] if found else text

    def _begun(self, text: str) -> int:
        """Returns how many characters at the end of a text may begin a stop string."""
        longest = 0
        for stop in self.strings:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest
