"""Process 0 looks at files and tells the others, so that all processes of a job decide alike."""

from collections.abc import Callable
from typing import Any

import jax

from latent_delib.errors import UserError
from latent_delib.machine import distributed


def is_first() -> bool:
    """Tells whether this is process 0."""
    return jax.process_index() == 0


def on_first(look: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function on process 0 alone, and returns its result, something JSON can hold, on every process.

    Every process must call this; `look` must not wait for another process.

    Raises:
      UserError: `look` does; then on every process.
    """
    answer = _answer(look, *arguments) if is_first() else {}
    answer = distributed.from_first(answer)
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    return answer["result"]


def _answer(look: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    try:
        return {"result": look(*arguments)}
    except UserError as error:
        return {"mistake": str(error)}
