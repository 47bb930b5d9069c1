"""Layouts of tokens that the forms of attention share.

The tokens of all groups of a row form one sequence, and heads that share keys are neighbours.
"""

import jax
import jax.numpy as jnp


def flat(x: jax.Array) -> jax.Array:
    """Reshapes [B, M, S, ...] to [B, M * S, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def by_head(x: jax.Array, K: int) -> jax.Array:
    """Reshapes [B, M, S, N, ...] to [B, M * S, K, G, ...]."""
    return flat(x).reshape(x.shape[0], -1, K, x.shape[3] // K, *x.shape[4:])


def pad_axis(x: jax.Array, axis: int, unit: int) -> jax.Array:
    """Appends zeros along an axis, up to a multiple of `unit`."""
    more = -x.shape[axis] % unit
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])
