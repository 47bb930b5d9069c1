"""Checks a caller's arguments; no value is rounded or cut to fit.

Each check raises UserError with the argument's name.
"""

import operator
import os
import reprlib
from collections.abc import Iterable
from numbers import Real
from typing import Any

from latent_delib.errors import UserError

INT32, INT64 = 2**31 - 1, 2**63 - 1  # the largest numbers of these types
SEED = 2**32 - 1  # the largest seed: jax takes 32 bits of it


def whole(name: str, value: Any, low: int, high: int = INT32) -> int:
    """Returns a whole number from low to high. numpy's integers are fine; True and 2.0 are not."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise UserError(f"{name}={reprlib.repr(value)}: expected a whole number")
    if found < low:
        raise UserError(f"{name}={found}: expected at least {low}")
    if found > high:
        raise UserError(f"{name}={found}: expected at most {high}")
    return found


def number(name: str, value: Any) -> float:
    """Returns a number, which may be infinite or NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UserError(f"{name}={reprlib.repr(value)}: expected a number")
    return float(value)


def path(name: str, value: Any) -> str:
    """Returns a path as a string, which is not empty."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name}={reprlib.repr(value)}: expected a path")
    return value


def several(name: str, value: Any) -> list[Any]:
    """Returns an iterable as a list; a single text is refused, though it can be iterated."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise UserError(f"{name}={reprlib.repr(value)}: expected a list")
    return list(value)


def token_ids(name: str, value: Any, expected: str = "a list of token ids") -> list[int]:
    """Returns a sequence of whole numbers as a list; text, bytes and truth values are refused."""
    refusal = UserError(f"{name}={reprlib.repr(value)}: expected {expected}")
    if isinstance(value, str | bytes | bytearray):
        raise refusal
    try:
        tokens = list(value)
        if any(isinstance(token, bool) for token in tokens):
            raise refusal
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise refusal from None


def end_tokens(name: str, value: Any) -> list[int]:
    """Returns the token ids of an `eos_token_id`, which is None, one number or a list."""
    if value is None:
        return []
    ids = [value] if isinstance(value, int) else value
    return token_ids(name, ids, "a token id or a list of them")


def instance(name: str, value: Any, kind: type, maker: str) -> None:
    """Raises UserError for anything but an object of one of this package's own types."""
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UserError(f"{name}: got {found}, expected a {kind.__name__}, which `{maker}` returns")
