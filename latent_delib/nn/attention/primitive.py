"""The attention primitive: each query sees a range of a shared prefix, and its own group.

A query sees its own group causally. Training text has no prefix; a trace's prefix is the text up to
its position; in decoding the prefix is everything so far. Visibility is therefore three integers
per query (Liu et al. 2025, Figure 2, without ever building its mask).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.nn.products import einsum, softcapped

# keys and values: of the groups [B, M, S, K, H], or of a prefix [B, T, K, H]
Keys = tuple[jax.Array, jax.Array]


class Bounds(NamedTuple):
    """Holds the visible ranges of each query, int32 [B, M, S].

    Query i sees prefix slots prefix_start <= t < prefix_stop and own tokens own_start <= j <= i.
    """

    prefix_start: jax.Array
    prefix_stop: jax.Array
    own_start: jax.Array


def attend(
    q_BMSNH: jax.Array,
    k_BMSKH: jax.Array,
    v_BMSKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Computes attention over a prefix range and the own group.

    This form is the reference. Autodiff reaches every input.

    Args:
      q_BMSNH, k_BMSKH, v_BMSKH: the group's queries, keys and values; query head n uses key head n
        // G.
      prefix: keys and values [B, T, K, H] that all M groups of a row share, or None.
      bounds: the visible ranges. A query always sees itself.
      scale: factor on the scores.
      softcap: c in c * tanh(score / c); 0 for none.

    Returns:
      [B, M, S, N, H] in the dtype of v; scores and softmax are float32.
    """
    S = q_BMSNH.shape[2]
    weights_BMKGSU = weights(q_BMSNH, k_BMSKH, prefix, bounds, scale=scale, softcap=softcap)
    weights_BMKGSU = weights_BMKGSU.astype(v_BMSKH.dtype)
    out = einsum("BMKGSU,BMUKH->BMSKGH", weights_BMKGSU[..., -S:], v_BMSKH)
    if prefix is not None:
        out += einsum("BMKGST,BTKH->BMSKGH", weights_BMKGSU[..., :-S], prefix[1])
    return out.reshape(q_BMSNH.shape)


def weights(
    q_BMSNH: jax.Array,
    k_BMSKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Computes attention weights, float32 [B, M, K, G, S, T + S].

    The last axis holds the prefix's slots, then the own tokens. Rows add up to 1, and are 0 where
    nothing is visible. Query head n is number n % G of key head n // G.

    Arguments as for `attend`.
    """
    B, M, S, N, H = q_BMSNH.shape
    K = k_BMSKH.shape[-2]
    q = q_BMSNH.reshape(B, M, S, K, N // K, H)
    scores = einsum("BMSKGH,BMUKH->BMKGSU", q, k_BMSKH, jnp.float32)
    visible = own_in_range(bounds.own_start)
    if prefix is not None:
        k_BTKH = prefix[0]
        over_prefix = einsum("BMSKGH,BTKH->BMKGST", q, k_BTKH, jnp.float32)
        scores = jnp.concatenate([over_prefix, scores], axis=-1)
        visible = jnp.concatenate([_prefix_in_range(bounds, k_BTKH.shape[1]), visible], axis=-1)
    scores, _ = softcapped(scores * scale, softcap)
    return jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -jnp.inf), axis=-1)


def own_in_range(own_start: jax.Array) -> jax.Array:
    """Returns which own tokens each query sees, bool [..., S, S], from own_start [..., S]."""
    own = jnp.arange(own_start.shape[-1])
    return (own >= own_start[..., None]) & (own <= own[:, None])


def _prefix_in_range(bounds: Bounds, length: int) -> jax.Array:
    """Returns which of the prefix's slots each query sees, bool [B, M, S, length]."""
    slot = jnp.arange(length)
    return (slot >= bounds.prefix_start[..., None]) & (slot < bounds.prefix_stop[..., None])


def within_window(
    bounds: Bounds,
    position_BMS: jax.Array,
    prefix_position_BT: jax.Array | None,
    window: int,
) -> Bounds:
    """Narrows bounds to keys less than `window` positions back.

    Positions do not fall from one slot of a visible range to the next, so what remains is a range
    again: its start is its stop minus the number of keys that are near enough. (Slot numbers would
    not do: latents share positions.)
    """
    oldest = (position_BMS - window)[..., None]
    near = own_in_range(bounds.own_start) & (position_BMS[:, :, None, :] > oldest)
    own_start = jnp.arange(1, position_BMS.shape[-1] + 1) - near.sum(-1)
    if prefix_position_BT is None:
        return bounds._replace(own_start=own_start)
    in_range = _prefix_in_range(bounds, prefix_position_BT.shape[1])
    near = in_range & (prefix_position_BT[:, None, None, :] > oldest)
    return bounds._replace(prefix_start=bounds.prefix_stop - near.sum(-1), own_start=own_start)
