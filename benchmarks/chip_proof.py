"""Checks every form of attention against the reference, on the chip: part 1 of `benchmarks.chip`.

A row compiles one call of one form, forward and backward, and runs it with bounds in order, out of
order and in windows. Rows of the batch hold documents of unequal length, groups that see no text,
and bait: slots outside every bound, whose keys score higher than anything and whose values are
unmistakable. The reference computes in float32 what the form computes in its dtype, from the same
numbers.

Two errors are held against TOLERANCES: the root mean square, as a share of that of the reference,
and the largest, as a share of the reference's largest element. The last rows compare one whole
training step in bfloat16 with the same step in float32 by `xla`.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import common, step
from benchmarks.attention import both_passes
from latent_delib.nn.attention.blocks import shared_memory_of
from latent_delib.nn.attention.forms import KERNELS, attend, unsupported
from latent_delib.nn.attention.primitive import Bounds, within_window
from latent_delib.nn.sizes import SIZES

B, K = 2, 2
BAIT = 3  # slots at either end of the text
# By dtype, the largest errors: by root mean square, and of any element.
# TF32 or passes of bfloat16 would break the first.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2**-6, 2**-5)}
# A step in bfloat16 beside one in float32: relative errors of loss and gradient (root mean square).
# Rounding alone makes 4 % of a gradient; a kernel may make half as much again as `xla`.
LOSS, GRADIENT, MORE = 2e-3, 0.1, 1.5
HEAD_DIMS = (256, 128, 64, 32, 16)


class Layout(NamedTuple):
    """Describes M groups of S tokens after T slots of text, or after none; G queries per key head.

    Scores are some 2 times normal numbers: a softcap of 5 bends them, and one above 60 is computed
    in another way.
    """

    M: int
    S: int
    T: int
    G: int
    softcap: float = 0.0


LAYOUTS = {
    "traces": Layout(M=40, S=31, T=900, G=2, softcap=5.0),
    "long traces, no softcap": Layout(M=12, S=80, T=700, G=3),
    "text, high softcap": Layout(M=1, S=700, T=0, G=1, softcap=64.0),
}
SMALL = {"traces": Layout(M=3, S=5, T=30, G=2, softcap=5.0)}

# The step: two layers of Gemma 2 2B, with a window shorter than the text.
STEP = dict(seq_len=1024, traces=32, ahead=16, latents=16)
STEP_SMALL = dict(seq_len=48, traces=4, ahead=3, latents=2)


def rows(small: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields names of rows, and the functions that make them."""
    here = common.attention_forms()[:0:-1]  # a kernel first, without the reference
    # On a CPU our kernels are interpreted.
    ours = [name for name, kernel in KERNELS.items() if kernel.is_ours]
    forms = [*ours, "xla"] if jax.default_backend() == "cpu" else here
    layouts = SMALL if small else LAYOUTS
    for form in forms:
        for H in (64,) if small else HEAD_DIMS:
            for name in list(layouts)[: 1 if H < 64 else None]:
                for dtype in TOLERANCES:
                    if form != "xla" and unsupported(form, H, dtype):
                        continue
                    yield (
                        f"{form}, {dtype}, head dim {H}, {name}",
                        partial(compare, form, dtype, H, layouts[name]),
                    )
        if form in here:
            yield f"{form}, one step", partial(compare_step, form, small)


def compare(
    form: str, dtype: str, H: int, layout: Layout, shared_memory: int | None = None
) -> dict[str, Any]:
    """Finds the errors of the output and of each gradient, the largest over four kinds of bounds.

    A kernel cuts its blocks for `shared_memory` bytes; for those of this device if it is None.
    """
    if shared_memory is None:
        shared_memory = shared_memory_of(jax.local_devices()[0])
    kinds = (
        bounds_of(layout),
        bounds_of(layout, unsorted=True),
        bounds_of(layout, window=max(layout.T, layout.S) // 5 + 2),
        bounds_of(layout, window=layout.S // 2 + 2),  # the last tokens of a group see no text
    )
    (q, k, v, prefix), dout = jax.tree.map(lambda x: x.astype(dtype), operands(layout, H))
    exact = jax.tree.map(_widened, (q, k, v, prefix, dout))
    names = ("out", "dq", "dk", "dv")
    found = {name: (0.0, 0.0) for name in names}
    for bounds in kinds:
        out, gradients = passes(form, layout.softcap, shared_memory)(
            (q, k, v), (prefix, bounds), dout
        )
        wanted, wanted_gradients = passes("reference", layout.softcap, shared_memory)(
            exact[:3], (exact[3], bounds), exact[4]
        )
        for name, x, y in zip(names, (out, *gradients), (wanted, *wanted_gradients)):
            both = found[name], errors(x, y[..., :H])
            found[name] = tuple(np.maximum(*both).tolist())  # keeps what is not a number
    return {"form": form, "passed": within(found, TOLERANCES[dtype]), "errors": found}


def within(found: dict[str, tuple[float, float]], tolerances: tuple[float, float]) -> bool:
    """Tells whether all errors are small enough; what is not a number is not."""
    return all(
        bool(error <= most) for pair in found.values() for error, most in zip(pair, tolerances)
    )


@jax.jit
def _widened(x: jax.Array) -> jax.Array:
    """Returns x [..., H] in float32, with zeros up to the largest head dim, which change nothing.

    So one program of the reference serves every head dim: a TPU's compiler takes a minute for it.
    """
    more = max(HEAD_DIMS) - x.shape[-1]
    return jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, more)])


@cache
def passes(form: str, softcap: float, shared_memory: int) -> Callable:
    """Returns a form's forward and backward pass, jitted.

    It maps (operands, (prefix, bounds), gradient of the output) to (output, gradients of the
    operands).
    """
    settings = dict(form=form, scale=2.0, softcap=softcap, shared_memory=shared_memory)
    return both_passes(partial(attend, **settings))["both"]


def errors(found: jax.Array, wanted: jax.Array) -> tuple[float, float]:
    """Returns the error by root mean square, and of the worst element; NaN where one is NaN.

    Both are shares of the reference's, and absolute where the reference is 0 throughout.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    apart = np.abs(found - wanted)
    rms, largest = np.sqrt(np.mean(wanted**2)), np.abs(wanted).max()
    return float(np.sqrt(np.mean(apart**2)) / (rms or 1)), float(apart.max() / (largest or 1))


def operands(layout: Layout, H: int) -> tuple[tuple, jax.Array]:
    """Draws q, k, v and prefix, and the output's gradient.

    Queries are positive, so the bait's keys score highest. A query's product with another key is of
    the size of a normal number, whatever the head dim.
    """
    key = jax.random.split(jax.random.key(0), 6)
    M, S, T, G, _ = layout
    q = jnp.abs(jax.random.normal(key[0], (B, M, S, K * G, H)))
    k = H**-0.5 * jax.random.normal(key[1], (B, M, S, K, H))
    v = jax.random.normal(key[2], (B, M, S, K, H))
    prefix = None
    if T:
        ends = np.r_[:BAIT, T - BAIT : T]
        text_k = H**-0.5 * jax.random.normal(key[3], (B, T, K, H))
        text_v = jax.random.normal(key[4], (B, T, K, H))
        prefix = text_k.at[:, ends].set(1e3), text_v.at[:, ends].set(1e6)
    return (q, k, v, prefix), jax.random.normal(key[5], q.shape)


def bounds_of(layout: Layout, *, unsorted: bool = False, window: int | None = None) -> Bounds:
    """Draws two unequal documents per row, and groups anywhere in them; some see no text."""
    rng = np.random.default_rng(1)
    M, S, T = layout.M, layout.S, layout.T
    own = np.broadcast_to(np.arange(S), (B, M, S))
    if T:
        middle = rng.integers(T // 3, T // 2, (B, 1))
        at = rng.integers(BAIT, T - BAIT, (B, M))
        if not unsorted:
            at = np.sort(at, axis=1)
        start = np.where(at >= middle, middle, BAIT)
        without = slice(0, M // 2, 2)
        at[:, without] = start[:, without]
        own_start = np.minimum(own, rng.integers(0, 3, own.shape))
        prefix_start, prefix_stop = (np.broadcast_to(x[..., None], own.shape) for x in (start, at))
        position = (at - start)[..., None] + own
        slot = np.arange(T)
        prefix_position = jnp.asarray(slot - np.where(slot >= middle, middle, BAIT))
    else:
        middle = rng.integers(S // 3, S // 2 + 1, (B, M, 1))
        own_start = np.where(own >= middle, middle, 0)
        prefix_start = prefix_stop = np.zeros_like(own)
        position = own - own_start
        prefix_position = None
    bounds = Bounds(*(jnp.asarray(x, jnp.int32) for x in (prefix_start, prefix_stop, own_start)))
    if window is None:
        return bounds
    return within_window(bounds, jnp.asarray(position, jnp.int32), prefix_position, window)


def compare_step(form: str, small: bool) -> dict[str, Any]:
    """Finds how far loss and gradient in bfloat16 are from those in float32 by `xla`."""
    loss, gradient = one_step("xla", "float32", small)
    runs = {name: one_step(name, "bfloat16", small) for name in (form, "xla")}
    apart = {name: float(_apart(found, gradient)) for name, (_, found) in runs.items()}
    loss_error = abs(runs[form][0] / loss - 1)
    most = GRADIENT if form == "xla" else min(GRADIENT, MORE * apart["xla"])
    return {
        "form": form,
        "passed": bool(loss_error <= LOSS and apart[form] <= most),
        "loss_error": loss_error,
        "gradient_error": apart[form],
        "gradient_error_of_xla": apart["xla"],
    }


@cache
def one_step(form: str, dtype: str, small: bool) -> tuple[float, Any]:
    """Returns the loss, and Adam's first moment after one step: the gradient but for a factor."""
    config = SIZES["gemma2_test"]
    if not small:
        config = dataclasses.replace(
            SIZES["gemma2_2b"], num_layers=2, vocab_size=32_000, window=256
        )
    a = argparse.Namespace(**(STEP_SMALL if small else STEP), config=config, dtype=dtype)
    job = step.Job(a, a.latents)
    batch = dict(zip(("tokens", "segment"), common.text(a, 2)))
    metrics = job.advance(job.compile(form, "attention", batch), batch)
    return float(metrics["loss"]), optax.tree.get(job.state.opt_state, "mu")


@jax.jit
def _apart(found: Any, wanted: Any) -> jax.Array:
    """Returns the root mean square of a tree's error, as a share of that of the tree."""
    difference = jax.tree.map(jnp.subtract, found, wanted)
    return optax.global_norm(difference) / optax.global_norm(wanted)
