"""Computes the loss on held-out text during a training job."""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib import mesh as mesh_lib
from latent_delib.data import batches
from latent_delib.delib.step import Objective, validation_step
from latent_delib.errors import UserError
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.plan import Plan
from latent_delib.machine import distributed
from latent_delib.nn.transformer import Params

BATCHES = 8  # of `train.batch_size` rows

Placed = list[tuple[dict[str, jax.Array], np.int32]]  # batches on the mesh, with their numbers


class Validation:
    """Computes the mean loss of BATCHES batches of `data.validation`, always the same ones.

    It is the loss of training, with the same traces each time. Where the method writes latents for
    a frozen decoder, the loss of that decoder on the same ahead tokens is computed once.

    Args:
      held_out: the batches, from `read_held_out`.
      frozen, trainable: the job's parameters, on the mesh.

    Raises:
      UserError: the batches have nothing to predict.
    """

    def __init__(
        self, exp: Experiment, plan: Plan, held_out: Placed, frozen: Params, trainable: Params
    ):
        self.prompt_end = exp.config.method.prompt_end
        self.frozen = frozen
        self.batches = held_out
        objective = planning.objective(exp)
        self.sums = _compile(exp, plan, plan.state.trainable, objective)
        self.decoder_loss: float | None = None
        if exp.aug.writes_latents and "decoder" not in plan.state.trainable:
            plain = dataclasses.replace(objective, aug=exp.aug.without_latents)
            self.decoder_loss = self._mean(_compile(exp, plan, {}, plain), {})
        else:
            self._mean(self.sums, trainable)  # raises now, not in the middle of training

    def __call__(self, trainable: Params) -> dict[str, float]:
        """Returns figures for a row of metrics, in nats per token.

        validation_loss: the loss with the trained parameters.
        validation_loss_decoder: the loss of the frozen decoder alone, where it was computed.
        """
        row = {"validation_loss": self._mean(self.sums, trainable)}
        if self.decoder_loss is not None:
            row["validation_loss_decoder"] = self.decoder_loss
        return row

    def _mean(self, sums: Callable, trainable: Params) -> float:
        found = [sums(trainable, self.frozen, *batch) for batch in self.batches]
        nats, tokens = np.sum(jax.device_get(found), axis=0, dtype=np.float64)
        if not tokens:
            after = ""
            if self.prompt_end:
                after = f" after config.method.prompt_end={self.prompt_end!r}"
            raise UserError(
                f"config.data.validation: no token to predict{after}; expected more text, or "
                "config.train.validate_every=0"
            )
        return float(nats / tokens)


def _compile(exp: Experiment, plan: Plan, trainable: Params, objective: Objective) -> Callable:
    """Compiles (trainable, frozen, batch, number) -> sums over a batch, for the mesh."""
    step = partial(validation_step, objective=objective)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    jitted = jax.jit(step, out_shardings=mesh_lib.replicated(exp.mesh))
    return jitted.lower(trainable, plan.frozen, plan.batch, number).compile()


def read_held_out(exp: Experiment) -> Placed:
    """Returns BATCHES batches of held-out text, each on the mesh and with its number.

    Raises:
      UserError: validation sources are missing, empty, or not the same for all processes.
    """
    c = exp.config
    B = c.train.batch_size
    rows = batches.validation_rows(c.data, tokenizer=exp.tokenizer, count=BATCHES * B)
    digest = hashlib.sha256(rows["tokens"]).hexdigest()
    distributed.check_same(**{"validation text": digest})
    here = mesh_lib.local_rows(exp.mesh, B)
    placed = []
    for number in range(BATCHES):
        of_batch = {name: x[number * B + here] for name, x in rows.items()}
        if rows["segment"][number * B : (number + 1) * B].any():
            placed.append((mesh_lib.place_rows(exp.mesh, of_batch, B), np.int32(number)))
    return placed
