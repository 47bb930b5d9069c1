"""Train state, train step and evaluation steps: pure functions, jitted by the commands that call them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_delib.delib import augment, traces
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Text
from latent_delib.nn.transformer import Params


class TrainState(NamedTuple):
    """What training changes. step: int32 scalar, optimizer steps done. trainable: float32 master weights."""

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState


def learning_rate(o: Any, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to `final_fraction` of it at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, o.learning_rate, o.warmup_steps, max(steps, o.warmup_steps + 1), o.learning_rate * o.final_fraction
    )


def make_optimizer(o: Any, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by global norm; soft tokens have a peak rate of their own. `o` is config.optimizer."""

    def is_named(name: str, path: tuple) -> bool:
        return path[-1].key == name

    def decayed(params: Params) -> Params:
        return jax.tree.map_with_path(lambda p, _: not p[-1].key.endswith(("scale", "soft_tokens", "_bias")), params)

    def soft_token_rate(updates: Params, params: Params | None) -> Params:
        del params
        ratio = o.soft_token_learning_rate / o.learning_rate
        return jax.tree.map_with_path(lambda p, u: u * ratio if is_named("soft_tokens", p) else u, updates)

    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate(o, steps)),
        optax.stateless(soft_token_rate),
    )


def train_step(
    state: TrainState,
    frozen: Params,
    batch: dict[str, jax.Array],
    *,
    aug: Augmentation,
    tx: optax.GradientTransformation,
    seed: int,
    num_traces: int,
    num_ahead: int,
    accumulation: int,
    dtype: jnp.dtype,
    max_delay: int = 0,
    skip_bad: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean loss over all ahead tokens of the batch.

    Args:
      frozen: parameters that are not trained, in `dtype`.
      batch: "tokens" and "segment", int32 [B, T].
      accumulation: the batch passes in this many equal parts; sums of loss, tokens and gradients are added up and
        divided once, so the step is that of the whole batch whatever the parts hold.
      dtype: of the computation; master weights are cast to it once.
      max_delay: latents of a trace are written up to so many tokens before they join, drawn at random.
      skip_bad: where loss or gradient is not finite, weights and moments stay; counters, so the learning rate, go on.

    Returns:
      The new state, and float32 scalars: loss (nats a token), tokens, grad_norm (before clipping).
    """
    tokens_BT, segment_BT = batch["tokens"], batch["segment"]
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    at_BM = traces.draw(key, segment_BT, min(num_traces, tokens_BT.shape[1] - 1))  # a plain decoder uses none
    delay_BM = traces.draw_delays(jax.random.fold_in(key, 1), at_BM, max_delay)

    frozen = augment.gathered(aug, frozen)  # before the loop over parts

    def loss_sum(trained: Params, part: tuple[jax.Array, ...]):
        *text, delay_BM = part
        return augment.loss(aug, augment.assemble(frozen, trained), *text, num_ahead, dtype, delay_BM)

    # Differentiated where it is cast: gradients, and their sums over devices, have the dtype of the computation.
    trained = jax.tree.map(lambda x: x.astype(dtype), state.trainable)
    sums = jax.value_and_grad(loss_sum, has_aux=True)
    whole = (tokens_BT, segment_BT, at_BM, delay_BM)
    if accumulation == 1:
        (loss, tokens), grads = sums(trained, whole)
    else:
        # Part i takes rows i, i + accumulation, ...: rows stay on the devices that hold them.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, x.shape[1]).swapaxes(0, 1), whole)
        zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.trainable))
        ((loss, tokens), grads), _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, sums(trained, part)), None), zeros, parts
        )
    tokens = jnp.maximum(tokens, 1.0)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / tokens, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": loss / tokens, "tokens": tokens, "grad_norm": optax.global_norm(grads)}
    if skip_bad:
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

        trainable, opt_state = jax.tree.map(keep, (trainable, opt_state), (state.trainable, state.opt_state))
    return TrainState(state.step + 1, trainable, opt_state), metrics


def read_step(
    params: Params, tokens_BT: jax.Array, segment_BT: jax.Array, *, aug: Augmentation, dtype: jnp.dtype
) -> tuple[Text, jax.Array]:
    """What the plain decoder makes of text, and its -log p of text token t + 1 at every t, float32 [B, T - 1]."""
    params = augment.gathered(aug, params)
    text = augment.read(aug, params, tokens_BT, segment_BT, dtype)
    return text, augment.nll(aug, params, text.outputs[:, :-1], tokens_BT[:, 1:])


def ahead_step(
    params: Params,
    text: Text,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    from_B: jax.Array | None = None,
    *,
    aug: Augmentation,
    num_ahead: int,
    delay: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """With latents after text tokens `at_BM`: -log p of the next A text tokens, and their weights (0 past the
    document's end); float32 [B, M, A] each (Section 3.1).

    Args:
      from_B: the row whose latents a row is given instead of its own. delay: latents are written so many tokens before.
    """
    params = augment.gathered(aug, params)
    marks = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead, delay)
    z = augment.latents(aug, params, text, marks)
    if from_B is not None:
        z = jax.tree.map(lambda x: x[from_B], z)
    x_BMAD, _ = augment.decode(aug, params, z, text.cache, marks)
    return augment.nll(aug, params, x_BMAD, marks.targets), marks.weights
