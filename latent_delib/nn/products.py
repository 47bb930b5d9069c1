"""Products of arrays at the precision of their operands, on every platform, and softcaps.

Where nothing is asked, GPUs round float32 operands to TF32 and TPUs to bfloat16.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision to ask for: the highest for float32, else the platform's own."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns the einsum of two arrays.

    dtype: of the sums and the result; None for that of the operands.
    """
    return jnp.einsum(equation, x, y, precision=precision(x, y), preferred_element_type=dtype)


def matmul(x: jax.Array, w: jax.Array, contracted: int, flat: bool = False) -> jax.Array:
    """Returns x [..., *in] times w [*in, *out], [..., *out].

    Args:
      contracted: the number of axes `in`.
      flat: computes it as one product of two matrices. CPUs want that: with more axes XLA copies
        the operands of the backward pass, transposed, an element at a time, which takes longer than
        the products. TPUs do not: there reshaping copies.
    """
    rows = x.shape[: x.ndim - contracted]
    outputs = w.shape[contracted:]
    if flat:
        size = math.prod(w.shape[:contracted])
        x = x.reshape(-1, size)
        w = w.reshape(size, -1)
        contracted = 1
    y = jnp.tensordot(x, w, contracted, precision=precision(x, w))
    return y.reshape(*rows, *outputs)


def softcapped(x: jax.Array, cap: float) -> tuple[jax.Array, jax.Array | float]:
    """Returns cap * tanh(x / cap) and its slope in x; x itself and 1 where the cap is 0."""
    if not cap:
        return x, 1.0
    bent = jnp.tanh(x / cap)
    return cap * bent, 1 - jnp.square(bent)
