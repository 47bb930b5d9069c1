"""Measures perplexity at every position, by the text's cache or read again: tokens per second.

  python -m benchmarks.evaluation [--latents 16] [--batch 1] [--positions 64] [--forms ...]
      [--json=FILE]

"reused" is what `latent_delib.evaluate` does: a text is read once, and its cache serves all its
positions, some of them at a time. "again" reads the text for every such part, as a step without a
cache of its own would.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common
from latent_delib.delib.step import ahead_step, read_step

PRESET = dict(latents=[16], batch=[2], positions=64, ahead=32)


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each form, batch and number of latents."""
    rows = []
    for L, B in ((L, B) for L in a.latents for B in a.batch):
        params = common.weights(a.config, L, a.dtype)
        tokens_BT, segment_BT = common.text(a, B)
        parts = [
            jnp.tile(jnp.minimum(jnp.arange(first, first + a.positions), a.seq_len - 1), (B, 1))
            for first in range(0, a.seq_len - 1, a.positions)
        ]

        def form_of(
            name: str, L=L, params=params, tokens_BT=tokens_BT, segment_BT=segment_BT, parts=parts
        ):
            form, way = name.split(", ")
            aug = common.augmentation(a.config, L, form)
            read = partial(read_step, aug=aug)
            ahead = partial(ahead_step, aug=aug, num_ahead=a.ahead)

            def sums(nll_BMA: jax.Array, weights_BMA: jax.Array) -> jax.Array:
                return jnp.sum(nll_BMA * weights_BMA, axis=(0, 1))

            @jax.jit
            def part(params, text, at_BM):
                return sums(*ahead(params, text, tokens_BT, segment_BT, at_BM))

            @jax.jit
            def whole(params, at_BM):
                # The loss of the text is not computed again.
                text, _ = read(params, tokens_BT, segment_BT)
                return sums(*ahead(params, text, tokens_BT, segment_BT, at_BM))

            read = jax.jit(read)

            def reused():
                text, text_nll = read(params, tokens_BT, segment_BT)
                return [part(params, text, at_BM) for at_BM in parts], text_nll

            return reused if way == "reused" else lambda: [whole(params, at_BM) for at_BM in parts]

        seconds = common.measure(
            {name: common.calls(form_of(name)) for name in a.forms}, a.rounds, a.least
        )
        for name, found in seconds.items():
            row = {"latents": L, "batch": B, "form": name, **common.spread(found)}
            other, ms = seconds.get(name.replace("reused", "again")), row["ms"]
            row["tokens_per_second"] = ms and B * a.seq_len / ms * 1e3
            row["vs_again"] = common.spread(other)["ms"] / ms if ms and other else None
            rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    forms = [f"{form}, {way}" for form in common.attention_forms() for way in ("reused", "again")]
    # Fewer positions of a shorter text: reading it is as large a part as in the published setting.
    small = common.SMALL | PRESET | dict(batch=[1], positions=16)
    a = common.arguments(__doc__, argv, forms, common.PUBLISHED | PRESET, small)
    return common.report("evaluation", a, measure(a))


if __name__ == "__main__":
    main()
