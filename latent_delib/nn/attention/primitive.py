"""The attention primitive: each query sees a range of a shared prefix, and its own group.

A query sees its own group causally. Training text has no prefix; a trace's prefix is the text up to
its position; in decoding the prefix is everything so far. Visibility is therefore three integers
per query. The mask of Liu et al. 2025, Figure 2, is never built.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.nn.products import einsum, softcapped

# keys and values: of the groups [B, M, U, K, H], or of a prefix [B, T, K, H]
Keys = tuple[jax.Array, jax.Array]


class Bounds(NamedTuple):
    """Holds the visible ranges of each query, int32 [B, M, S].

    Query i sees prefix slots prefix_start <= t < prefix_stop and own tokens own_start <= j <= i.
    Where its group has more keys (U) than queries (S), it sees own_start <= j <= U - S + i.
    """

    prefix_start: jax.Array
    prefix_stop: jax.Array
    own_start: jax.Array


class Options(NamedTuple):
    """Holds the static arguments of a form other than the reference.

    scale, softcap: as for `attend`.
    shared_memory: bytes of shared memory into which blocks of our GPU kernels must fit.
    interpret: run our kernels as ordinary JAX, on any platform.
    into_prefix: compute the gradient of the prefix too, where the form has it.
    """

    scale: float
    softcap: float
    shared_memory: int
    interpret: bool = False
    into_prefix: bool = False


def attend(
    q_BMSNH: jax.Array,
    k_BMUKH: jax.Array,
    v_BMUKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Computes attention over a range of the prefix and over each query's own group.

    This form is the reference. It is differentiable in every input.

    Args:
      q_BMSNH, k_BMUKH, v_BMUKH: queries of each group's last S tokens, and keys and values of all
        its U tokens. Query head n uses key head n // G.
      prefix: keys and values [B, T, K, H] that all M groups of a row share, or None.
      bounds: the visible ranges. A query always sees itself.
      scale: factor on the scores.
      softcap: c in c * tanh(score / c); 0 for none.

    Returns:
      [B, M, S, N, H] in the dtype of v; scores and softmax are float32.
    """
    U = k_BMUKH.shape[2]
    seen = weights(q_BMSNH, k_BMUKH, prefix, bounds, scale=scale, softcap=softcap)
    seen = seen.astype(v_BMUKH.dtype)
    out = einsum("BMKGSU,BMUKH->BMSKGH", seen[..., -U:], v_BMUKH, jnp.float32)
    if prefix is not None:
        out += einsum("BMKGST,BTKH->BMSKGH", seen[..., :-U], prefix[1], jnp.float32)
    return out.astype(v_BMUKH.dtype).reshape(q_BMSNH.shape)


def weights(
    q_BMSNH: jax.Array,
    k_BMUKH: jax.Array,
    prefix: Keys | None,
    bounds: Bounds,
    *,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Computes attention weights, float32 [B, M, K, G, S, T + U].

    The last axis holds the prefix's slots, then own tokens. The weights of a query add up to 1;
    those of keys that it does not see are 0. Query head n is entry n % G of key head n // G.

    Arguments are those of `attend`.
    """
    B, M, S, N, H = q_BMSNH.shape
    U, K = k_BMUKH.shape[2:4]
    q = q_BMSNH.reshape(B, M, S, K, N // K, H)
    scores = einsum("BMSKGH,BMUKH->BMKGSU", q, k_BMUKH, jnp.float32)
    visible = own_in_range(bounds.own_start, U)
    if prefix is not None:
        k_BTKH = prefix[0]
        over_prefix = einsum("BMSKGH,BTKH->BMKGST", q, k_BTKH, jnp.float32)
        scores = jnp.concatenate([over_prefix, scores], axis=-1)
        visible = jnp.concatenate([_prefix_in_range(bounds, k_BTKH.shape[1]), visible], axis=-1)
    scores, _ = softcapped(scores * scale, softcap)
    return jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -jnp.inf), axis=-1)


def delta_of(out: jax.Array, dout: jax.Array) -> jax.Array:
    """Returns the sum of out * dout over features, float32 [B, M, S, N].

    The gradient of a score is its weight * (the gradient of the weight - this sum).

    Args:
      out, dout: the output of attention and its gradient, [B, M, S, N, H].
    """
    return einsum("...H,...H->...", out.astype(jnp.float32), dout.astype(jnp.float32))


def own_in_range(own_start: jax.Array, length: int) -> jax.Array:
    """Returns which of a group's `length` tokens each query sees, bool [..., S, length].

    own_start: [..., S]; the queries belong to the group's last S tokens.
    """
    own = jnp.arange(length)
    query = own[length - own_start.shape[-1] :]
    return (own >= own_start[..., None]) & (own <= query[:, None])


def _prefix_in_range(bounds: Bounds, length: int) -> jax.Array:
    """Returns which of the prefix's slots each query sees, bool [B, M, S, length]."""
    slot = jnp.arange(length)
    return (slot >= bounds.prefix_start[..., None]) & (slot < bounds.prefix_stop[..., None])


def within_window(
    bounds: Bounds,
    position_BMU: jax.Array,
    prefix_position_BT: jax.Array | None,
    window: int,
) -> Bounds:
    """Narrows bounds to keys less than `window` positions back.

    position_BMU: positions of each group's tokens; the queries belong to the last S of them.

    Positions never decrease within a visible range, so the near keys are a range again: it has the
    same stop, and starts at the stop minus the number of near keys. Slot numbers cannot replace
    positions, because latents share positions.
    """
    U = position_BMU.shape[-1]
    S = bounds.own_start.shape[-1]
    query = jnp.arange(U - S, U)
    oldest = (position_BMU[:, :, U - S :] - window)[..., None]
    near = own_in_range(bounds.own_start, U) & (position_BMU[:, :, None, :] > oldest)
    own_start = query + 1 - near.sum(-1)
    if prefix_position_BT is None:
        return bounds._replace(own_start=own_start)
    in_range = _prefix_in_range(bounds, prefix_position_BT.shape[1])
    near = in_range & (prefix_position_BT[:, None, None, :] > oldest)
    return bounds._replace(prefix_start=bounds.prefix_stop - near.sum(-1), own_start=own_start)
