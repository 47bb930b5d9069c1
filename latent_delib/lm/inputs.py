"""The arguments of `AugmentedLM`, checked: nothing is cut, and nothing is taken for something else."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.lm.sampling import Sampler
from latent_delib.machine import arguments
from latent_delib.nn.attention.forms import FORMS

Prompt = str | Sequence[int]  # text, to which BOS is added; or token ids as they are


class Options(NamedTuple):
    """How prompts are continued; see `AugmentedLM.continuations`."""

    max_new_tokens: int
    sampler: Sampler
    every: int
    delay: int | None
    batch_size: int


def check_options(
    max_new_tokens: int, every: int, delay: int | None, batch_size: int, sampling: Mapping[str, Any]
) -> Options:
    """Returns the options with plain Python numbers.

    Args:
      sampling: fields of `Sampler`.

    Raises:
      UserError: one of another kind or out of range.
    """
    return Options(
        arguments.whole("max_new_tokens", max_new_tokens, 1),
        Sampler(**sampling).checked(),
        *check_rhythm(every, delay),
        arguments.whole("batch_size", batch_size, 1),
    )


def check_rhythm(every: int, delay: int | None) -> tuple[int, int | None]:
    """Returns `every` and `delay`.

    Raises:
      UserError: latents would join after the next ones are due.
    """
    every = arguments.whole("every", every, 0)
    if delay is None:
        return every, None
    delay = arguments.whole("delay", delay, 0)
    if every and delay >= every:
        raise UserError(f"delay={delay}: expected less than every={every}")
    return every, delay


def check_attention(attention: str) -> None:
    """Raises UserError for an unknown form of attention."""
    forms = ("auto", *FORMS)
    if attention not in forms:
        raise UserError(f"attention={attention!r}: expected one of {', '.join(forms)}")


def seeds_of(seed: int | Sequence[int], count: int) -> list[tuple[int, int]]:
    """Returns for each of `count` prompts a seed, and a number that tells apart prompts which share one."""
    if np.ndim(seed) == 0:
        one = arguments.whole("seed", seed, 0, arguments.INT64)
        return [(one, i) for i in range(count)]
    seeds = arguments.several("seed", seed)
    if len(seeds) != count:
        raise UserError(f"{count} prompts, but {len(seeds)} seeds")
    return [(arguments.whole(f"seed[{i}]", one, 0, arguments.INT64), 0) for i, one in enumerate(seeds)]


def token_ids(name: str, text: Prompt, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Returns the tokens of a text, without BOS; token ids stay as they are."""
    if isinstance(text, str):
        return tokenizer.encode(text)
    ids = arguments.token_ids(name, text, "text or a list of token ids")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token {token}, the vocabulary has {vocab_size}: expected 0 to {vocab_size - 1}")
    return ids


def token_array(tokens_BT: Any, vocab_size: int, row_shards: int) -> jax.Array:
    """Returns tokens as int32 [B, T].

    Args:
      row_shards: into how many parts the rows are split.
    """
    tokens_BT = _integers("tokens", tokens_BT, "[B, T]")
    _check_range("tokens", tokens_BT, vocab_size - 1, f"the vocabulary has {vocab_size}")
    B = len(tokens_BT)
    if B > 1 and B % row_shards:
        raise UserError(f"tokens: {B} rows do not split over {row_shards} devices")
    return jnp.asarray(tokens_BT, jnp.int32)


def position_array(positions_BM: Any, tokens_BT: jax.Array, ahead: int) -> jax.Array:
    """Returns positions in a text as int32 [B, M]; `ahead` tokens follow each."""
    B, T = tokens_BT.shape
    positions_BM = _integers("positions", positions_BM, f"[{B}, M]")
    if len(positions_BM) != B:
        raise UserError(f"positions: {len(positions_BM)} rows, expected {B}, as many as tokens")
    if ahead >= T:
        raise UserError(f"ahead={ahead}: the text has {T} tokens, expected less")
    after = f", and {ahead} are to follow" if ahead else ""
    _check_range("positions", positions_BM, T - 1 - ahead, f"the text has {T} tokens{after}")
    return jnp.asarray(positions_BM, jnp.int32)


def _integers(name: str, value: Any, shape: str) -> np.ndarray:
    """Returns an array of two axes; a message says `shape`."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{name}: rows of unequal length, expected integers {shape}") from None
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{name}: {array.dtype} of shape {array.shape}, expected integers {shape}")
    return array


def _check_range(name: str, array: np.ndarray, high: int, why: str) -> None:
    """Raises UserError that names the first number of an array outside 0 to `high`."""
    wrong = np.argwhere((array < 0) | (array > high))
    if len(wrong):
        at = ", ".join(map(str, wrong[0]))
        raise UserError(f"{name}[{at}]={array[tuple(wrong[0])]}: {why}, expected 0 to {high}")
