"""Layouts of tokens that the forms of attention share.

All groups lie in one sequence, and the heads that share keys lie together.
"""

import jax
import jax.numpy as jnp


def flat(x: jax.Array) -> jax.Array:
    """Lays [B, M, S, ...] out as [B, M * S, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def by_head(x: jax.Array, K: int) -> jax.Array:
    """Lays [B, M, S, N, ...] out as [B, M * S, K, G, ...]."""
    return flat(x).reshape(x.shape[0], -1, K, x.shape[3] // K, *x.shape[4:])


def pad(x: jax.Array, axis: int, unit: int) -> jax.Array:
    """Appends zeros along an axis, up to a whole number of units."""
    more = -x.shape[axis] % unit
    return jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])
