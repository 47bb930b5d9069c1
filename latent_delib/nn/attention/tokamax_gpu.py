"""The attention primitive by tokamax's Mosaic kernels, for NVIDIA's Hopper and Blackwell.

In tokamax a query sees one range of keys per call; here it sees two. So the prefix and the groups'
own keys take one call each. In the forward pass the two outputs are merged by their log-sum-exps.
In the backward pass each call gets the output and the log-sum-exp of both together: its gradients
are then shares of the whole.

tokamax's backward pass walks all blocks but those above a causal diagonal. The own tokens are
therefore cut into sequences of about one block, each of a few whole groups.

tokamax is imported only where it is used: it is an optional extra, and needs a later Python and jax
than this package does.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_delib.errors import UserError
from latent_delib.nn.attention.layout import flat, pad_axis
from latent_delib.nn.attention.primitive import Bounds, Keys, Options

HEAD_DIMS = (64, 128, 256)
DTYPES = (jnp.bfloat16,)  # tokamax would compute float32 in TF32, or not at all
BLOCK = 128  # queries of one program


class _Source(NamedTuple):
    """Holds keys that queries can see in one call.

    keys: keys and values [b, t, K, H].
    mask: tokamax's mask.
    cut: turns [B, M, S, ...] into the call's queries [b, s, ...].
    join: undoes `cut`.
    """

    keys: Keys
    mask: Any
    cut: Callable[[jax.Array], jax.Array]
    join: Callable[[jax.Array], jax.Array]


def is_installed() -> bool:
    """Tells whether tokamax can be imported."""
    return importlib.util.find_spec("tokamax") is not None


def runs_on(device: Any) -> bool:
    """Tells whether a device is one of NVIDIA's Hopper or Blackwell chips for data centers."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability.split(".")[0] in ("9", "10")


def require() -> None:
    """Raises UserError where tokamax is not installed."""
    if not is_installed():
        raise UserError(
            "attention tokamax_gpu: tokamax is not installed; expected the extra `tokamax` of"
            " setup.py, with Python 3.12 and jax 0.11.1 or later"
        )


def forward(
    q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds, options: Options
) -> tuple[jax.Array, jax.Array]:
    """Returns attention's output [B, M, S, N, H], and every row's log-sum-exp [B, M, S, N].

    The output has the dtype of the queries, the log-sum-exp is float32.

    Arguments are those of `xla.forward`, in bfloat16. The kernel is compiled for jax's first
    device.
    """
    kernel, settings = _kernel(options.scale, options.softcap)
    outs, sums = [], []
    for source in _sources(q_BMSNH, own, prefix, bounds):
        operands = source.cut(q_BMSNH), *source.keys
        out, (top, total) = kernel(*operands, mask=source.mask, return_residuals=True, **settings)
        outs.append(source.join(out))
        # -inf for a row that sees no key of this source
        sums.append(source.join((top + jnp.log(total)).swapaxes(1, 2)))
    lse = jax.nn.logsumexp(jnp.stack(sums), axis=0)
    shares = jnp.exp(jnp.stack(sums) - lse)[..., None]
    # The output of a row that sees no key of a source may be anything.
    parts = jnp.where(shares > 0, shares * jnp.stack(outs), 0)
    return jnp.sum(parts, axis=0).astype(q_BMSNH.dtype), lse


def backward(
    q_BMSNH: jax.Array,
    own: Keys,
    prefix: Keys | None,
    bounds: Bounds,
    out_BMSNH: jax.Array,
    lse_BMSN: jax.Array,
    dout_BMSNH: jax.Array,
    options: Options,
) -> tuple[jax.Array, Keys, Keys | None]:
    """Returns the gradients of queries, own keys and values, and prefix, each like its operand.

    Arguments are those of `forward`, its results, and the gradient of the output. XLA drops the
    kernel of a gradient that is not used.
    """
    kernel, settings = _kernel(options.scale, options.softcap)
    sources = _sources(q_BMSNH, own, prefix, bounds)
    dq = jnp.zeros(q_BMSNH.shape, jnp.float32)
    dkeys = []
    for source in sources:
        call = kernel.bind(source.cut(q_BMSNH), *source.keys, mask=source.mask, **settings)
        lse = source.cut(lse_BMSN).swapaxes(1, 2)
        # tokamax takes a pair (top, total): weights are exp(score - top) / total
        residuals = lse, jnp.ones_like(lse)
        rows = source.cut(out_BMSNH), source.cut(dout_BMSNH)
        found = kernel.vjp(residuals, *rows, *call.args, **call.kwargs)
        dq += source.join(found["q"])
        dkeys.append((found["k"], found["v"]))
    d_own = jax.tree.map(sources[0].join, dkeys[0])
    return dq.astype(q_BMSNH.dtype), d_own, dkeys[1] if options.into_prefix else None


def _kernel(scale: float, softcap: float) -> tuple[Any, dict[str, Any]]:
    """Returns tokamax's attention, and the options of every call."""
    # a private module, because tokamax's public functions take no ranges: the version is pinned
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    options = {"logits_scale": scale, "logits_soft_cap": softcap or None}
    return PallasMosaicGpuFlashAttention(), options


def _sources(q_BMSNH: jax.Array, own: Keys, prefix: Keys | None, bounds: Bounds) -> list[_Source]:
    """Returns the sources: the groups' own keys, then the prefix if it is given."""
    from tokamax._src.ops.attention.base import Mask

    B, M, S = q_BMSNH.shape[:3]
    length = max(1, min(M, BLOCK // S)) * S  # tokens of a sequence of whole groups

    def cut(x: jax.Array) -> jax.Array:
        x = pad_axis(x, 1, length // S)
        return x.reshape(-1, length, *x.shape[3:])

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(B, -1, S, *x.shape[2:])[:, :M]

    def unflat(x: jax.Array) -> jax.Array:
        return x.reshape(B, M, S, *x.shape[2:])

    index = jnp.arange(length, dtype=jnp.int32)
    start = cut(bounds.own_start) + (index - index % S)
    mask = Mask(k_start=start[:, None], is_causal=True)
    sources = [_Source(jax.tree.map(cut, own), mask, cut, join)]
    if prefix is not None:
        start, stop = flat(bounds.prefix_start), flat(bounds.prefix_stop)
        mask = Mask(k_start=start[:, None], k_end=stop[:, None])
        sources.append(_Source(prefix, mask, flat, unflat))
    return sources
