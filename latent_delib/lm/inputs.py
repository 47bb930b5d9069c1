"""Checks the arguments of `AugmentedLM`; never truncates or converts a wrong value."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib import mesh as mesh_lib
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job.build import ATTENTION, DTYPES
from latent_delib.lm.sampling import Sampler, options
from latent_delib.machine import arguments, seeds
from latent_delib.nn.attention.forms import FORMS

_END = "the decoder's table of learned positions ends there"
ATTENTION_FLAG = (
    "auto",
    f"form of attention: auto (a kernel that passed its check, else xla), {', '.join(FORMS)}",
)
Prompt = str | Sequence[int]  # text, to which BOS is added; or token ids as they are


class GenerationOptions(NamedTuple):
    """Says how prompts are continued.

    every: number of decoded tokens after which latents are asked for again. 0: they are written
      only once, at the end of the prompt.
    delay: number of tokens between asking for latents and their joining, the published simulation
      of an asynchronous coprocessor. None: they join when they are ready, and if the coprocessor
      fails, decoding goes on without new ones.
    chunk: the most tokens decoded between two yields.
    """

    max_new_tokens: int
    sampler: Sampler
    every: int = 0
    delay: int | None = 0
    chunk: int = 16


def check_options(
    max_new_tokens: int,
    every: int,
    delay: int | None,
    sampling: Mapping[str, Any],
    aug: Augmentation | None = None,
) -> GenerationOptions:
    """Returns the options with plain Python numbers.

    Args:
      sampling: fields of `Sampler`.
      aug: the model's method; None: no model is loaded yet.

    Raises:
      UserError: an option is unknown, of the wrong type or out of range, or not for this method.
    """
    max_new_tokens = arguments.whole("max_new_tokens", max_new_tokens, 1)
    known = options()
    for name in sampling:
        if name not in known:
            raise UserError(f"{name}: unknown option, expected one of {', '.join(known)}")
    sampler = Sampler(**sampling).checked()
    own, method = (aug.every, aug.method) if aug else (0, None)
    every, delay = check_joining(every, delay, own, method)
    return GenerationOptions(max_new_tokens, sampler, every or own, delay)


def check_joining(
    every: int, delay: int | None, own: int = 0, method: str | None = None
) -> tuple[int, int | None]:
    """Returns `every` and `delay` as plain Python numbers.

    Args:
      own: the number of tokens after which the model's latents recur by themselves; 0: they do not.
      method: the model's method; None: no model is loaded yet.

    Raises:
      UserError: both `every` and `own` are set; `delay` is not less than the number of tokens
        between latents; or latents would join late, but are keys, which depend on their position.
    """
    every = arguments.whole("every", every, 0)
    if own and every:
        raise UserError(
            f"every={every}: latents join again after every {own} tokens, "
            "as in training; leave it 0"
        )
    if delay is not None:
        delay = arguments.whole("delay", delay, 0)
        period = every or own
        if period and delay >= period:
            raise UserError(f"delay={delay}: expected less than every={period}")
    if delay != 0 and method and METHODS[method].writes_keys:
        given = "delay=None (--coprocessor_devices)" if delay is None else f"delay={delay}"
        raise UserError(
            f"{given}: method {method!r} writes keys, which depend on their position, so they "
            "cannot join later; leave it out"
        )
    return every, delay


def checked_dtype(dtype: Any) -> np.dtype:
    """Returns a dtype of parameters; raises UserError unless its name is in `build.DTYPES`."""
    name = getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise UserError(f"dtype={name}: expected {' or '.join(DTYPES)}")
    return jnp.dtype(name)


def check_attention(attention: str) -> None:
    """Raises UserError for an unknown form of attention."""
    if attention not in ATTENTION:
        raise UserError(f"attention={attention!r}: expected one of {', '.join(ATTENTION)}")


def random_keys(seed: int | Sequence[int], count: int) -> list[jax.Array]:
    """Returns a random key for each of `count` prompts.

    They are made from a list of seeds, or from one seed and the place of each prompt.
    """
    if np.asarray(seed, object).ndim == 0:
        base = seeds.key(arguments.whole("seed", seed, 0, arguments.SEED))
        return [jax.random.fold_in(base, i) for i in range(count)]
    given = arguments.several("seed", seed)
    if len(given) != count:
        raise UserError(f"{count} prompts, but {len(given)} seeds")
    checked = [arguments.whole(f"seed[{i}]", one, 0, arguments.SEED) for i, one in enumerate(given)]
    return [jax.random.fold_in(seeds.key(one), 0) for one in checked]


def token_ids(
    name: str, text: Prompt, tokenizer: Tokenizer, vocab_size: int, follows: bool = False
) -> list[int]:
    """Returns the tokens of a text, without BOS; token ids stay as they are.

    follows: whether the text follows another.
    """
    if isinstance(text, str):
        return tokenizer.encode_in_text(text) if follows else tokenizer.encode(text)
    ids = arguments.token_ids(name, text, "text or a list of token ids")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token {token}, expected 0 to {vocab_size - 1}")
    return ids


def check_length(name: str, length: int, new: int, max_length: int, longest: int) -> None:
    """Raises UserError for a text that is too long.

    Args:
      length: number of tokens in the text.
      new: number of tokens that are to follow.
      max_length: the most tokens of both together; at most `longest`.
      longest: `Augmentation.longest_text`.
    """
    if length + new <= max_length:
        return
    remedy = f"it, {_END}" if max_length == longest else "it, or raise max_length"
    found = f"{name}: {length} tokens and {new} after them"
    raise UserError(f"{found} are more than max_length={max_length}; shorten {remedy}")


def token_array(tokens_BT: Any, vocab_size: int, row_shards: int, longest: int) -> jax.Array:
    """Returns tokens as int32 [B, T].

    Args:
      tokens_BT: integers below `vocab_size`.
      row_shards: parts into which the rows are split.
      longest: the largest T allowed, `Augmentation.longest_text`.
    """
    tokens_BT = _integers("tokens", tokens_BT, "[B, T]")
    T = tokens_BT.shape[1]
    if T > longest:
        raise UserError(f"tokens: rows of {T}, expected at most {longest}; {_END}")
    _check_range("tokens", tokens_BT, vocab_size - 1, f"the vocabulary has {vocab_size}")
    B = len(tokens_BT)
    if B > 1 and B % row_shards:
        raise UserError(f"tokens: {B} rows do not split over {row_shards} devices")
    return jnp.asarray(tokens_BT, jnp.int32)


def position_array(
    positions_BM: Any, tokens_BT: jax.Array, ahead: int, mesh: jax.sharding.Mesh
) -> jax.Array:
    """Returns positions in a text as int32 [B, M]; `ahead` tokens follow each."""
    B, T = tokens_BT.shape
    positions_BM = _integers("positions", positions_BM, f"[{B}, M]")
    if not positions_BM.size:
        raise UserError(f"positions: of shape {positions_BM.shape}, expected at least one per row")
    if len(positions_BM) != B:
        raise UserError(f"positions: {len(positions_BM)} rows, expected {B}, as many as tokens")
    M, shards = positions_BM.shape[1], mesh_lib.shards(mesh, "traces")
    if M > 1 and M % shards:
        raise UserError(f"positions: {M} per row do not split over {shards} devices")
    if ahead >= T:
        raise UserError(f"ahead={ahead}: the text has {T} tokens, expected less")
    after = f", and {ahead} are to follow" if ahead else ""
    _check_range("positions", positions_BM, T - 1 - ahead, f"the text has {T} tokens{after}")
    return jnp.asarray(positions_BM, jnp.int32)


def _integers(name: str, value: Any, shape: str) -> np.ndarray:
    """Returns an integer array of two axes; messages name the expected `shape`."""
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
