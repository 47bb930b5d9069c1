"""The table of methods. A new variant is one row here and one short config.

A row says how its trainable tree begins and what latents it writes; everything else is shared.

  init(key, decoder, models, num_latents) -> the trainable tree, keyed as in the parameters of `delib.augment`:
      "coprocessor" for what writes latents, "decoder" where the decoder itself is trained. What a coprocessor's tree
      leaves out are the decoder's own layers.
  write(params, models, text, traces) -> latents (`coprocessor.Latents`) in the dtype of the text;
      None for a method that writes none: it then has the language-modelling loss of all text as its objective.
  trains_decoder: whether the tree has a "decoder".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from latent_delib.delib import coprocessor
from latent_delib.delib.coprocessor import Latents, Models, Text
from latent_delib.delib.traces import Traces
from latent_delib.nn.transformer import Params


class Method(NamedTuple):
    """See the module's docstring."""

    init: Callable[[jax.Array, Params, Models, int], Params]
    write: Callable[[Params, Models, Text, Traces], Latents] | None
    trains_decoder: bool = False


def _decoder(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    del key, models, num_latents
    return {"decoder": decoder}


def _coprocessor(start: Callable) -> Callable:
    return lambda *args: {"coprocessor": start(*args)}


def _both(start: Callable) -> Callable:
    return lambda *args: _decoder(*args) | {"coprocessor": start(*args)}


METHODS = {
    # The decoder as it is; training it is ordinary language modelling.
    "decoder": Method(_decoder, None, trains_decoder=True),
    # Liu et al. 2025: the coprocessor starts from the decoder's weights, every weight trained.
    "cache_augmentation": Method(_coprocessor(coprocessor.from_decoder), coprocessor.latents),
    # Their baselines: the same from a random start; reading the decoder's last-layer outputs instead of its cache.
    "from_scratch": Method(_coprocessor(coprocessor.from_scratch), coprocessor.latents),
    "last_layer": Method(_coprocessor(coprocessor.from_decoder), coprocessor.of_last_layer),
    # Goyal et al. 2023: trained vectors fed to the frozen decoder, whatever was read; one vector L times, or L vectors.
    "pause_tokens": Method(_coprocessor(coprocessor.one_soft_token), coprocessor.unread),
    "static_tokens": Method(_coprocessor(coprocessor.only_soft_tokens), coprocessor.unread),
    # Coda-Forno et al. 2025: keys and values inserted in each layer (H1); decoder and coprocessor trained together
    # (H2); one model that writes its own latents (the unified baseline).
    "inserted": Method(_coprocessor(coprocessor.from_decoder), coprocessor.inserted),
    "joint": Method(_both(coprocessor.from_decoder), coprocessor.latents, trains_decoder=True),
    "unified": Method(_both(coprocessor.only_soft_tokens), coprocessor.latents, trains_decoder=True),
    # Future work of Liu et al.: latents one after another; a coprocessor of another size than the decoder.
    "sequential": Method(_coprocessor(coprocessor.from_decoder), coprocessor.one_after_another),
    "resized": Method(_coprocessor(coprocessor.resized), coprocessor.through_maps),
}
