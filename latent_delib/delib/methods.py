"""The table of methods. A new variant is one row here and one short config.

A row says how its trainable tree begins and what latents it writes; everything else is shared.

  init(key, decoder, model, num_latents) -> the trainable tree, keyed as in the parameters of `delib.augment`:
      "coprocessor" for what writes latents, "decoder" where the decoder itself is trained.
  latents(params, model, cache, traces) -> z [B, M, L, D] in the dtype of the cache, from the "coprocessor" tree;
      None for a method that writes none: it then has the language-modelling loss of all text as its objective.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from latent_delib.delib import coprocessor
from latent_delib.delib.traces import Traces
from latent_delib.nn.cache import Cache
from latent_delib.nn.transformer import Params, Transformer


class Method(NamedTuple):
    """See the module's docstring."""

    init: Callable[[jax.Array, Params, Transformer, int], Params]
    latents: Callable[[Params, Transformer, Cache, Traces], jax.Array] | None


def _plain_decoder(key: jax.Array, decoder: Params, model: Transformer, num_latents: int) -> Params:
    del key, model, num_latents
    return {"decoder": decoder}


def _coprocessor(start: Callable) -> Callable:
    return lambda *args: {"coprocessor": start(*args)}


def _pause_tokens(key: jax.Array, decoder: Params, model: Transformer, num_latents: int) -> Params:
    del model
    return {"coprocessor": {"soft_tokens": coprocessor.soft_tokens(key, decoder["embedding"], num_latents)}}


def _pause_latents(params: Params, model: Transformer, cache: Cache, traces: Traces) -> jax.Array:
    return coprocessor.as_inputs(params["soft_tokens"], model, traces, cache.k.dtype)


METHODS = {
    # The decoder as it is; training it is ordinary language modelling.
    "decoder": Method(_plain_decoder, None),
    # Liu et al. 2025: the coprocessor starts from the decoder's weights, every weight trained.
    "cache_augmentation": Method(_coprocessor(coprocessor.from_decoder), coprocessor.latents),
    # The paper's own baseline: the same from a random start.
    "from_scratch": Method(_coprocessor(coprocessor.from_scratch), coprocessor.latents),
    # Goyal et al. 2023: trained vectors fed to the frozen decoder, the same whatever was read; no coprocessor.
    "pause_tokens": Method(_pause_tokens, _pause_latents),
}
