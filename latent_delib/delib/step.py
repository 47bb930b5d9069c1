"""The training step and the evaluation steps, as pure functions that the commands jit."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_delib.delib import augment
from latent_delib.delib import traces as traces_lib
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Reading
from latent_delib.machine import seeds
from latent_delib.nn.transformer import Params

# (aug, params, outputs [..., D], tokens [...] that the outputs predict) -> arrays [...].
Score = Callable[[Augmentation, Params, jax.Array, jax.Array], Any]


class TracedBatch(NamedTuple):
    """Holds the rows of a batch and their traces, int32.

    tokens, segment: the text and the document number of each token, 0 on padding, [B, T].
    at: text tokens at which the cache is augmented, [B, M].
    delay: number of tokens by which the latents of each trace are written early, [B, M].
    """

    tokens: jax.Array
    segment: jax.Array
    at: jax.Array
    delay: jax.Array


class TrainState(NamedTuple):
    """Holds what training changes.

    step: int32 scalar, optimizer steps done.
    trainable: float32 master weights.
    """

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Objective:
    """Says how the loss of a batch is computed.

    aug: the method and both models.
    num_traces: M, traces per row.
    num_ahead: A, ahead tokens per trace.
    dtype: dtype of the computation; master weights are cast to it once.
    seed: trace positions and delays are a function of the seed and of the batch's number.
    accumulation: number of equal parts into which a batch is split. Sums of loss, tokens and
      gradients are added up and divided once, so the step is that of the whole batch.
    max_delay: largest number of tokens by which a trace's latents are written before they join;
      each trace draws its number at random.
    prompt_end: tokens that end a prompt. Traces are drawn only where the text ends with them, and a
      plain decoder is trained only on the text after them. Empty: anywhere.
    steps_end: tokens that end the steps between trace and ahead tokens. Empty: there are no steps.
    """

    aug: Augmentation
    num_traces: int
    num_ahead: int
    dtype: jnp.dtype
    seed: int = 0
    accumulation: int = 1
    max_delay: int = 0
    prompt_end: tuple[int, ...] = ()
    steps_end: tuple[int, ...] = ()


def train_step(
    state: TrainState,
    frozen: Params,
    batch: dict[str, jax.Array],
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    skip_bad: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one optimizer step on the mean loss per predicted token of a batch.

    Args:
      state: donated by the jitted step.
      frozen: parameters that are not trained, in the dtype of the computation.
      batch: "tokens" and "segment", int32 [B, T].
      tx: the optimizer of `optimizer.make_optimizer`.
      skip_bad: where loss or gradient is not finite, keep weights and moments. All counters
        still advance, and with them the learning rate.

    Returns:
      The new state, and float32 scalars: loss (nats per token), tokens, grad_norm (before
      clipping).
    """
    aug, parts = objective.aug, objective.accumulation
    whole = _with_traces(objective, batch, state.step)
    frozen = augment.with_whole_tables(aug, frozen)  # before the loop over parts

    def loss_sum(trained: Params, part: TracedBatch) -> tuple[jax.Array, jax.Array]:
        # Trained tables are gathered here, so that their gradients are sharded like the tables.
        params = augment.assemble(frozen, augment.with_whole_tables(aug, trained))
        return _loss_sum(objective, params, part)

    # With respect to the cast weights, so that gradients are summed over devices in that dtype.
    trained = jax.tree.map(lambda x: x.astype(objective.dtype), state.trainable)
    if parts == 1:
        (loss, tokens), grads = jax.value_and_grad(loss_sum, has_aux=True)(trained, whole)
    else:
        (loss, tokens), grads = _sum_over_parts(loss_sum, trained, whole, parts)
    count = jnp.maximum(tokens, 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / count, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    new = TrainState(state.step + 1, trainable, opt_state)
    metrics = {"loss": loss / count, "tokens": tokens, "grad_norm": optax.tree.norm(grads)}
    if skip_bad:
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        new = _unless_bad(good, new, state)
    return new, metrics


def _sum_over_parts(
    loss_sum: Callable,
    trained: Params,
    whole: TracedBatch,
    accumulation: int,
) -> Any:
    """Adds up loss, tokens and float32 gradients over the parts of a batch, in turn."""

    def add(total: Any, part: TracedBatch) -> tuple[Any, None]:
        found = jax.value_and_grad(loss_sum, has_aux=True)(trained, part)
        return jax.tree.map(jnp.add, total, found), None

    no_loss = (jnp.zeros(()), jnp.zeros(()))
    no_grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    total, _ = jax.lax.scan(add, (no_loss, no_grads), _parts(whole, accumulation))
    return total


def _with_traces(
    objective: Objective, batch: dict[str, jax.Array], number: jax.Array
) -> TracedBatch:
    """Draws traces and delays for the text of a batch, by the seed and the batch's number."""
    o = objective
    tokens_BT, segment_BT = batch["tokens"], batch["segment"]
    key = jax.random.fold_in(seeds.key(o.seed), number)
    num_traces = min(o.num_traces, tokens_BT.shape[1] - 1)  # a plain decoder uses none
    at_BM = traces_lib.draw(key, tokens_BT, segment_BT, num_traces, o.prompt_end, o.steps_end)
    delay_BM = traces_lib.draw_delays(jax.random.fold_in(key, 1), at_BM, o.max_delay)
    return TracedBatch(tokens_BT, segment_BT, at_BM, delay_BM)


def _loss_sum(
    objective: Objective, params: Params, part: TracedBatch
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of `augment.loss` over a part of a batch."""
    return augment.loss(
        objective.aug,
        params,
        part.tokens,
        part.segment,
        part.at,
        num_ahead=objective.num_ahead,
        delay_BM=part.delay,
        prompt_end=objective.prompt_end,
        steps_end=objective.steps_end,
    )


def _parts(whole: TracedBatch, accumulation: int) -> TracedBatch:
    """Splits a batch into equal parts along a new first axis.

    Part i takes rows i, i + accumulation, ...: rows stay on the devices that hold them.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accumulation, x.shape[1]).swapaxes(0, 1)

    return jax.tree.map(split, whole)


def validation_step(
    trainable: Params,
    frozen: Params,
    batch: dict[str, jax.Array],
    number: jax.Array,
    *,
    objective: Objective,
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of a batch as `train_step` does, without a gradient.

    Args:
      trainable: float32 master weights; {} where all parameters are frozen.
      frozen, batch: as for `train_step`.
      number: number of the batch, int32; traces are drawn as in training step `number`.

    Returns:
      Σ loss in nats, and Σ tokens: float32 scalars.
    """
    whole = _with_traces(objective, batch, number)
    trained = jax.tree.map(lambda x: x.astype(objective.dtype), trainable)
    params = augment.with_whole_tables(objective.aug, augment.assemble(frozen, trained))
    losses, counts = jax.lax.map(
        partial(_loss_sum, objective, params), _parts(whole, objective.accumulation)
    )
    return jnp.sum(losses), jnp.sum(counts)


def _unless_bad(good: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Returns the new state, with the old weights and moments where the step was bad.

    Counters are always the new ones.
    """

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(keep, new, old)


def read_step(
    params: Params,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    *,
    aug: Augmentation,
    score: Score = augment.nll,
) -> tuple[Reading, Any]:
    """Reads text with the plain decoder.

    Returns:
      The `Reading`, and the score of text token t + 1 at every t, [B, T - 1]: by default -log p in
      nats, float32.
    """
    params = augment.with_whole_tables(aug, params)
    reading = augment.read_text(aug, params, tokens_BT, segment_BT)
    return reading, score(aug, params, reading.outputs[:, :-1], tokens_BT[:, 1:])


def ahead_step(
    params: Params,
    reading: Reading,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    donor_B: jax.Array | None = None,
    *,
    aug: Augmentation,
    num_ahead: int,
    delay: int = 0,
    score: Score = augment.nll,
) -> tuple[Any, jax.Array]:
    """Predicts the next A text tokens with latents after text tokens `at_BM` (Section 3.1).

    Args:
      params: parameters as in `delib.augment`.
      reading: what `read_step` returned for the same text.
      tokens_BT: int32 text.
      segment_BT: int32 document number of each token, 0 on padding.
      at_BM: int32 text tokens at which the cache is augmented.
      donor_B: index of the row whose latents each row reads; None: its own.
      aug: the method and both models.
      num_ahead: A.
      delay: number of tokens by which latents are written before they join.
      score: the score to compute for each ahead token.

    Returns:
      The scores of the ahead tokens, [B, M, A], by default -log p in nats, float32; and the weights
      of these tokens, float32 [B, M, A], 0 past the document's end.
    """
    params = augment.with_whole_tables(aug, params)
    traces = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead, delay)
    z = augment.write_latents(aug, params, reading, traces)
    if donor_B is not None:
        z = jax.tree.map(lambda x: x[donor_B], z)
    x_BMAD, _ = augment.decode(aug, params, z, reading.cache, traces)
    return score(aug, params, x_BMAD, traces.targets), traces.weights
