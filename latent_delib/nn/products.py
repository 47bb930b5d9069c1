"""Products of arrays at the precision of their operands, on every platform, and softcaps.

Where nothing is asked, GPUs round float32 operands to TF32 and TPUs to bfloat16.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """Returns the precision to ask for: the highest where the product is one of float32, else the platform's own."""
    return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """Returns the einsum of two arrays. dtype: of the sums and the result; None for that of the operands."""
    return jnp.einsum(equation, x, y, precision=precision(x, y), preferred_element_type=dtype)


def matmul(x: jax.Array, w: jax.Array, contracted: int) -> jax.Array:
    """Returns x [..., *in] times w [*in, *out], [..., *out]; `in` are the last `contracted` axes of x.

    It is one product of two matrices. With more axes XLA for CPUs writes transposed copies of the operands in the
    backward pass, an element at a time.
    """
    rows, inputs = x.shape[: x.ndim - contracted], x.shape[x.ndim - contracted :]
    outputs = w.shape[contracted:]
    y = einsum("RI,IO->RO", x.reshape(math.prod(rows), -1), w.reshape(math.prod(inputs), -1))
    return y.reshape(*rows, *outputs)


def softcapped(x: jax.Array, cap: float) -> tuple[jax.Array, jax.Array | float]:
    """Returns cap * tanh(x / cap), which stays within the cap, and its slope in x; a cap of 0 means none."""
    if not cap:
        return x, 1.0
    bent = jnp.tanh(x / cap)
    return cap * bent, 1 - jnp.square(bent)
