"""Where the time of a train step goes, by adding one part after another.

python -m benchmarks.parts [--small] [--json=FILE]
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import common
from configs import base
from latent_delib.delib import augment
from latent_delib.delib.step import Objective, TrainState, make_optimizer, train_step

PRESET = dict(latents=16, batch=1, remat="attention")


def main(argv: Sequence[str] | None = None) -> None:
    a = common.arguments(__doc__, argv, (), common.PUBLISHED | PRESET, common.SMALL | PRESET)
    dtype, form = jnp.dtype(a.dtype), common.attention_forms()[-1]
    aug = common.augmentation(a.config, a.latents, form, a.remat)
    tree = common.weights(a.config, a.latents, "float32")
    frozen = {"decoder": jax.tree.map(lambda x: x.astype(dtype), tree["decoder"])}
    trained = {"coprocessor": tree["coprocessor"]}
    tokens, segment = common.text(a, a.batch)
    at = common.positions(a, tokens, segment)
    tx = make_optimizer(base.get_config().optimizer, 1000).tx

    def params(trained):
        return frozen | jax.tree.map(lambda x: x.astype(dtype), trained)

    def read(trained):
        return augment.read_text(aug, params(trained), tokens, segment, dtype)

    def latents(trained):
        text = read(trained)
        traces = aug.lay_out(tokens, segment, at, a.ahead)
        return augment.write_latents(aug, params(trained), text, traces), text.cache, traces

    def loss(trained):
        return augment.loss(aug, params(trained), tokens, segment, at, a.ahead, dtype)[0]

    def decode(trained):
        z, cache, traces = latents(trained)
        return augment.decode(aug, params(trained), z, cache, traces)[0]

    state = TrainState(jnp.int32(0), trained, tx.init(trained))
    objective = Objective(
        aug=aug,
        num_traces=a.traces,
        num_ahead=a.ahead,
        dtype=dtype,
    )
    step = partial(train_step, objective=objective, tx=tx)
    parts = {
        "text": (lambda t: read(t).cache, trained),
        "+ latents": (lambda t: latents(t)[0], trained),
        "+ decoder over traces": (decode, trained),
        "+ loss": (loss, trained),
        "+ gradient": (jax.grad(loss), trained),
        "+ optimizer": (lambda s: step(s, frozen, {"tokens": tokens, "segment": segment}), state),
    }
    runs = {
        name: common.calls(partial(jax.jit(function), x)) for name, (function, x) in parts.items()
    }
    rows, before = [], 0.0
    for name, seconds in common.measure(runs, a.rounds).items():
        rows.append({"part": name, **common.spread(seconds)})
        rows[-1]["added_ms"], before = rows[-1]["ms"] - before, rows[-1]["ms"]
    common.report("parts", a, rows)


if __name__ == "__main__":
    main()
