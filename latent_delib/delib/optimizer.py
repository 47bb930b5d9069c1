"""The optimizer of a job: clipping, scaling, weight decay and the learning rate, from optax."""

from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from latent_delib.nn.layers import INPUT_AXES


class Optimizer(NamedTuple):
    """Holds an optimizer, and the learning rate that it uses as a function of the steps done."""

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule


def _adamw(o: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(o.b1, o.b2, o.eps)


def _adafactor(o: Any) -> optax.GradientTransformation:
    """Scales as Shazeer and Stern 2018 do, by optax's defaults.

    The learning rate is relative to the root mean square of a leaf.
    """
    del o
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )


def _muon(o: Any) -> optax.GradientTransformation:
    """Makes the updates of a layer's matrices orthogonal (Jordan et al. 2024).

    Each update is about as large as Adam's are in practice (arXiv 2502.16982), so one learning rate
    serves both. Adam with Nesterov's momentum scales all other leaves.
    """

    def axes(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        inputs = INPUT_AXES.get(path[-1].key)
        if inputs is None:
            return None
        first_output = 1 + inputs  # axis 0 is "layers"
        return MuonDimensionNumbers(
            tuple(range(1, first_output)), tuple(range(first_output, leaf.ndim))
        )

    return muon(
        learning_rate=-1.0,  # the rate and the sign are applied later
        beta=o.b1,
        eps=o.eps,
        adam_b1=o.b1,
        adam_b2=o.b2,
        muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(axes, params),
        consistent_rms=0.2,
    )


# How each optimizer scales gradients, without a learning rate and without its sign. Clipping,
# weight decay and rates are the same for all.
OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}


def make_optimizer(o: Any, steps: int) -> Optimizer:
    """Makes the optimizer of a job of `steps` steps.

    Gradients are clipped by global norm and scaled, then weight decay is added. The learning rate
    warms up linearly from 0, the rate of the first step, to its peak. Then it follows a cosine to
    `final_fraction` of the peak at the last step. A job that is shorter than the warm-up ends
    within it. Soft tokens have a peak rate of their own. Soft tokens, norms and biases do not
    decay.

    Args:
      o: config.optimizer.
    """
    learning_rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=o.learning_rate,
        warmup_steps=o.warmup_steps,
        decay_steps=max(steps, o.warmup_steps + 1),
        end_value=o.learning_rate * o.final_fraction,
    )

    def decays(path: tuple, _: jax.Array) -> bool:
        return not path[-1].key.endswith(("scale", "soft_tokens", "bias"))

    ratio = o.soft_token_learning_rate / o.learning_rate

    def at_own_rate(path: tuple, update: jax.Array) -> jax.Array:
        return update * ratio if path[-1].key == "soft_tokens" else update

    tx = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        OPTIMIZERS[o.name](o),
        optax.add_decayed_weights(
            o.weight_decay, lambda params: jax.tree.map_with_path(decays, params)
        ),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(at_own_rate, updates)),
    )
    return Optimizer(tx, learning_rate)
