"""Products of arrays at the precision of their operands, on every platform, and softcaps.

Where nothing is asked, GPUs round float32 operands to TF32 and TPUs to bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision to ask for: the highest where the product is one of float32, else the platform's own."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns the einsum of two arrays. dtype: of the sums and the result; None for that of the operands."""
    return jnp.einsum(equation, x, y, precision=precision(x, y), preferred_element_type=dtype)


def softcapped(x: jax.Array, cap: float) -> tuple[jax.Array, jax.Array | float]:
    """Returns cap * tanh(x / cap), which stays within the cap, and its slope in x; a cap of 0 means none."""
    if not cap:
        return x, 1.0
    bent = jnp.tanh(x / cap)
    return cap * bent, 1 - jnp.square(bent)
