"""Products of arrays at the precision of their operands, on every platform, and softcaps.

By default, GPUs round float32 operands to TF32, and TPUs round them to bfloat16.
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

    dtype: dtype of the sums and of the result; None for the operands' dtype.
    """
    return jnp.einsum(equation, x, y, precision=precision(x, y), preferred_element_type=dtype)


def matmul(x: jax.Array, w: jax.Array, contracted: int, flat: bool = False) -> jax.Array:
    """Returns x [..., *in] times w [*in, *out], [..., *out].

    Args:
      contracted: number of axes `in`, which are summed over.
      flat: compute the result as one product of two matrices. This is faster on CPUs: with more
        axes XLA transposes the operands of the backward pass, one element at a time, which takes
        longer than the products themselves. It is not faster on TPUs, where reshaping copies.
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
