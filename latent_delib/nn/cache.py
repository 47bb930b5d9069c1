"""The key-value cache: a value that goes in and comes out, never hidden state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

AXES = (None, "batch", None, "heads", None)  # logical axes of k and v


class KV(NamedTuple):
    """Holds keys and values of one call, stacked over layers: [layers, B, M, S, K, H] each."""

    k: jax.Array
    v: jax.Array


class Cache(NamedTuple):
    """Holds the keys and values of all that a transformer has read.

    Row b has `length[b]` entries, from slot 0 on.

    k, v: [layers, B, T, K, H], keys already rotated.
    position: int32 [B, T], position of every slot's entry; differs from the slot's index in packed
      rows, and after latents.
    length: int32 [B].
    """

    k: jax.Array
    v: jax.Array
    position: jax.Array
    length: jax.Array


def of_text(kv: KV, position_BT: jax.Array) -> Cache:
    """Returns the cache of one call over text (M = 1), without a copy."""
    B, T = position_BT.shape
    return Cache(kv.k[:, :, 0], kv.v[:, :, 0], position_BT, jnp.full((B,), T))


def extended(cache: Cache, more: int, length_B: jax.Array) -> Cache:
    """Returns a cache with `length_B` entries per row, and `more` slots added at the end."""
    capacity = [(0, 0), (0, more)]
    wide = [(0, 0), *capacity, (0, 0), (0, 0)]
    position = jnp.pad(cache.position, capacity)
    return Cache(jnp.pad(cache.k, wide), jnp.pad(cache.v, wide), position, length_B)


def append(cache: Cache, kv: KV, position_BS: jax.Array, count_B: jax.Array) -> Cache:
    """Appends the first `count_B` of S new tokens (M = 1) to each row of a cache.

    A row's other new tokens go to slots that the next append overwrites; tokens past the capacity
    are dropped.
    """
    B, S = position_BS.shape
    row = jnp.arange(B)[:, None]
    slot = cache.length[:, None] + jnp.arange(S)
    return Cache(
        k=cache.k.at[:, row, slot].set(kv.k[:, :, 0].astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[:, row, slot].set(kv.v[:, :, 0].astype(cache.v.dtype), mode="drop"),
        position=cache.position.at[row, slot].set(position_BS, mode="drop"),
        length=cache.length + count_B,
    )


def last_entries(cache: Cache, count: int) -> Cache:
    """Drops all but the last `count` entries of each row."""
    dropped_B = jnp.maximum(cache.length - count, 0)
    slot_BT = jnp.arange(cache.position.shape[1]) + dropped_B[:, None]
    kept = _taken(cache, jnp.minimum(slot_BT, cache.position.shape[1] - 1))
    return kept._replace(length=cache.length - dropped_B)


def by_position(cache: Cache) -> Cache:
    """Sorts the entries by position, as a window requires (`primitive.within_window`)."""
    used = jnp.arange(cache.position.shape[1]) < cache.length[:, None]
    order = jnp.argsort(jnp.where(used, cache.position, jnp.iinfo(jnp.int32).max), axis=1)
    return _taken(cache, order)


def _taken(cache: Cache, slot_BT: jax.Array) -> Cache:
    """Moves the entry of slot `slot_BT[b, t]` to slot t."""
    slot = slot_BT[None, :, :, None, None]
    return cache._replace(
        k=jnp.take_along_axis(cache.k, slot, axis=2),
        v=jnp.take_along_axis(cache.v, slot, axis=2),
        position=jnp.take_along_axis(cache.position, slot_BT, axis=1),
    )
