"""Measures the whole train step at true size: time, utilisation and memory of every form.

  python -m benchmarks.step [--latents 16 64] [--batch 1 2 4] [--remat attention dots]
      [--forms ...] [--json=FILE]

Weights are random, the optimizer is the real one. Forms: the dense one-sequence form (`dense`), the
package's with each form of attention, and the PyTorch peer (`peer_steps`), where torch is
installed. Useful FLOPs are those that train logs (`latent_delib.delib.cost`), the same for all.
Where numbers are missing, a form does not fit. On a CPU the peer has no flex_attention: there it
computes the same pairs by plain operations. The published setting on one GPU, with the flags it
wants:

  ./launch/gpu.sh .venv/bin/python -m benchmarks.step --json=FILE
"""

import argparse
import gc
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import common, dense
from configs import base
from latent_delib.delib import augment, cost
from latent_delib.delib.optimizer import make_optimizer
from latent_delib.delib.step import Objective, TrainState, train_step
from latent_delib.machine import chips

OPTIMIZER = base.get_config().optimizer


class Job:
    """Holds a frozen decoder, and one training state that all forms of a table advance in turn.

    The state is donated, not copied.
    """

    def __init__(self, a: argparse.Namespace, num_latents: int):
        self.a, self.num_latents, self.tx = a, num_latents, make_optimizer(OPTIMIZER, 100_000).tx
        self.frozen = {"decoder": common.weights(a.config, num_latents, a.dtype)["decoder"]}
        self.state: TrainState | None = None

    def start(self) -> TrainState:
        def init() -> TrainState:
            tree = common.weights(self.a.config, self.num_latents, "float32")
            del tree["decoder"]
            return TrainState(jnp.int32(0), tree, self.tx.init(tree))

        return jax.jit(init)()

    def compile(self, form: str, remat: str, batch: dict[str, jax.Array]) -> Any:
        """Compiles the step in one form. The dense one is the same step around another loss."""
        a, is_dense = self.a, form == "dense"
        attention = "reference" if is_dense else form
        objective = Objective(
            aug=common.augmentation(a.config, self.num_latents, attention, remat),
            num_traces=a.traces,
            num_ahead=a.ahead,
            dtype=jnp.dtype(a.dtype),
        )
        step = partial(train_step, objective=objective, tx=self.tx)
        state = jax.eval_shape(self.start)
        with mock.patch.object(augment, "loss", dense.loss if is_dense else augment.loss):
            lowered = jax.jit(step, donate_argnums=0).lower(state, self.frozen, batch)
        return lowered.compile()

    def advance(self, compiled: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        # The state is lost where memory ran out.
        if self.state is None or jax.tree.leaves(self.state.trainable)[0].is_deleted():
            self.state = self.start()
        self.state, metrics = compiled(self.state, self.frozen, batch)
        return metrics


def measure_ours(a: argparse.Namespace, L: int) -> list[dict[str, Any]]:
    job, rows = Job(a, L), []
    for B in a.batch:
        batch = dict(zip(("tokens", "segment"), common.text(a, B)))
        found, runs = {}, {}
        for form in (f for f in a.forms if f != "torch"):
            # The dense form has one policy, its own; the reference is there to compare.
            for remat in {"dense": ["full"], "reference": a.remat[:1]}.get(form, a.remat):
                try:
                    compiled = job.compile(form, remat, batch)
                except RuntimeError as error:  # a TPU's compiler refuses what does not fit
                    if not common.out_of_memory(error):
                        raise
                    found[form, remat] = {}
                    continue
                found[form, remat] = common.memory(compiled)
                if found[form, remat].get("needs_gib", 0) * 2**30 < common.room():
                    runs[form, remat] = common.calls(partial(job.advance, compiled, batch))
        seconds = common.measure(runs, a.rounds, a.least)
        for (form, remat), memory in found.items():
            row = {"latents": L, "batch": B, "form": form, "remat": remat}
            rows.append(row | common.spread(seconds.get((form, remat), ())) | memory)
    return rows


def measure_torch(a: argparse.Namespace, L: int, B: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from benchmarks.peer_steps import Peer
    from benchmarks.peer_torch import wait

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = Peer(a.config, L, a.ahead, "after", OPTIMIZER, device, compiled=not a.eager)
    batch = [torch.from_numpy(np.array(x)).long().to(device) for x in common.text(a, B)]
    run = common.calls(partial(peer.step, *batch, a.traces), wait)
    seconds = common.measure({"torch": run}, a.rounds, a.least)["torch"]
    row = {"latents": L, "batch": B, "form": "torch", "remat": "full", **common.spread(seconds)}
    del peer, run
    if device == "cuda":
        row["needs_gib"] = torch.cuda.max_memory_allocated() / 2**30
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    common.share_the_chip()
    forms = ["dense", *common.attention_forms(), *["torch"] * common.has_torch()]
    published = common.PUBLISHED | dict(
        latents=[16, 64], batch=[1, 2, 4], remat=["attention", "dots"]
    )
    small = common.SMALL | dict(latents=[16], batch=[1], remat=["attention"])
    a = common.arguments(
        __doc__, argv, forms, published, small, eager="the peer without torch.compile"
    )
    rows = []
    if "torch" in a.forms:  # first, because JAX gives no memory back
        rows += [measure_torch(a, L, B) for L in a.latents for B in a.batch]
    for L in a.latents:
        rows += measure_ours(a, L)
    peak = chips.chip_of(jax.devices()[0]).peak
    others = [row for row in rows if row["form"] in ("dense", "torch")]
    plain = {(row["latents"], row["batch"], row["form"]): row["ms"] for row in others}
    for row in rows:
        where = row["latents"], row["batch"]
        aug = common.augmentation(a.config, row["latents"], "reference")
        useful = cost.step_flops(aug, row["batch"], a.seq_len, a.traces, a.ahead).useful
        row["tflop"], row["tflops"] = useful / 1e12, row["ms"] and useful / row["ms"] / 1e9
        row["mfu"] = row["ms"] and peak and 1e12 * row["tflops"] / peak
        for other in ("dense", "torch"):
            beside = plain.get((*where, other))
            row[f"vs_{other}"] = row["ms"] and beside and beside / row["ms"]
    rows.sort(key=lambda row: (row["latents"], row["batch"]))
    return common.report("step", a, rows)


if __name__ == "__main__":
    main()
