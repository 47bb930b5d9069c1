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


# Numbers of float32 rows that a CPU multiplies faster in the forms below than in XLA's usual one
# (docs/performance.md has figures): by a weight, and by a table of vectors.
FEW_FOR_WEIGHT = range(8, 25)
FEW_FOR_TABLE = range(2, 33)


def matmul(
    x: jax.Array, w: jax.Array, contracted: int, flat: bool = False, dtype: Any = None
) -> jax.Array:
    """Returns x [..., *in] times w [*in, *out], [..., *out].

    Args:
      contracted: number of axes `in`, which are summed over.
      flat: compute the result as one product of two matrices. This is faster on CPUs: with more
        axes XLA transposes the operands of the backward pass, one element at a time, which takes
        longer than the products themselves. It is not faster on TPUs, where reshaping copies.
      dtype: dtype of the result; None for the operands' dtype.
    """
    rows = x.shape[: x.ndim - contracted]
    outputs = w.shape[contracted:]
    if flat:
        size = math.prod(w.shape[:contracted])
        x = x.reshape(-1, size)
        w = w.reshape(size, -1)
        contracted = 1
        if len(x) in FEW_FOR_WEIGHT and jnp.result_type(x, w) == jnp.float32:
            # XLA computes a product of a transposed x by another library (Eigen instead of YNN).
            x_DR = jax.lax.optimization_barrier(x.T)
            return einsum("DR,DF->RF", x_DR, w).reshape(*rows, *outputs)
    how = {"precision": precision(x, w), "preferred_element_type": dtype}
    y = jnp.tensordot(x, w, contracted, **how)
    return y.reshape(*rows, *outputs)


def table_product(x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Returns x [..., D] times every vector of a table, float32 [..., V]."""

    def usual(x: jax.Array, table_VD: jax.Array) -> jax.Array:
        return einsum("...D,VD->...V", x, table_VD, jnp.float32)

    def table_first(x: jax.Array, table_VD: jax.Array) -> jax.Array:
        x_RD = x.reshape(-1, x.shape[-1])
        # Without the barrier XLA would exchange the operands.
        y_VR = jax.lax.optimization_barrier(einsum("VD,RD->VR", table_VD, x_RD))
        return y_VR.T.reshape(*x.shape[:-1], -1)

    rows = math.prod(x.shape[:-1])
    if rows in FEW_FOR_TABLE and jnp.result_type(x, table_VD) == jnp.float32:
        return jax.lax.platform_dependent(x, table_VD, cpu=table_first, default=usual)
    return usual(x, table_VD)


def softcapped(x: jax.Array, cap: float) -> tuple[jax.Array, jax.Array | float]:
    """Returns cap * tanh(x / cap) and its slope in x; x itself and 1 where the cap is 0."""
    if not cap:
        return x, 1.0
    bent = jnp.tanh(x / cap)
    return cap * bent, 1 - jnp.square(bent)
