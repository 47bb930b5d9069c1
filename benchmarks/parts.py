"""Shows where the time of a train step goes, by adding one part after another.

python -m benchmarks.parts [--small] [--json=FILE]
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import common, step
from latent_delib.delib import augment

PRESET = dict(latents=16, batch=1, remat="attention")


def main(argv: Sequence[str] | None = None) -> None:
    a = common.arguments(__doc__, argv, (), common.PUBLISHED | PRESET, common.SMALL | PRESET)
    dtype, form = jnp.dtype(a.dtype), common.attention_forms()[-1]
    aug = common.augmentation(a.config, a.latents, form, a.remat)
    job = step.Job(a, a.latents)
    trained = job.start().trainable
    tokens, segment = common.text(a, a.batch)
    batch = {"tokens": tokens, "segment": segment}
    at = common.positions(a, tokens, segment)

    # Weights are arguments: what a function closes over would become a part of its program.
    def params(trained, frozen):
        return frozen | jax.tree.map(lambda x: x.astype(dtype), trained)

    def read(*trees):
        return augment.read_text(aug, params(*trees), tokens, segment)

    def latents(*trees):
        text = read(*trees)
        traces = aug.lay_out(tokens, segment, at, a.ahead)
        return augment.write_latents(aug, params(*trees), text, traces), text.cache, traces

    def loss(*trees):
        return augment.loss(aug, params(*trees), tokens, segment, at, a.ahead)[0]

    def decode(*trees):
        z, cache, traces = latents(*trees)
        return augment.decode(aug, params(*trees), z, cache, traces)[0]

    parts = {
        "text": lambda *trees: read(*trees).cache,
        "+ latents": lambda *trees: latents(*trees)[0],
        "+ decoder over traces": decode,
        "+ loss": loss,
        "+ gradient": jax.grad(loss),
    }
    runs = {}
    for name, part in parts.items():
        runs[name] = common.calls(partial(jax.jit(part), trained, job.frozen))
    whole = job.compile(form, a.remat, batch)
    runs["+ optimizer"] = common.calls(partial(job.advance, whole, batch))
    rows, before = [], 0.0
    for name, seconds in common.measure(runs, a.rounds).items():
        rows.append({"part": name, **common.spread(seconds)})
        if seconds:  # else it did not fit
            rows[-1]["added_ms"], before = rows[-1]["ms"] - before, rows[-1]["ms"]
    common.report("parts", a, rows)


if __name__ == "__main__":
    main()
