"""The table of methods. A new variant is one row here and one short config.

A row says how its trainable tree begins and what latents it writes; everything else is shared.

  init(key, decoder, models, num_latents) -> the trainable tree, keyed as in the parameters of `delib.augment`:
      "coprocessor" for what writes latents, "decoder" where the decoder itself is trained. What a coprocessor's tree
      leaves out are the decoder's own layers.
  write(params, models, text, traces) -> latents (`coprocessor.Latents`) in the dtype of the text;
      None for a method that writes none: it then has the language-modelling loss of all text as its objective.
  trains_decoder: the tree has a "decoder".
  reads_text: the latents depend on the text, so that they can be late, or another text's.
  has_matrices: the tree has matrices, so that adapters of low rank can stand in for them.
  starts_random: the coprocessor begins with random matrices, which adapters cannot stand on.
  own_size: the coprocessor may have another architecture than the decoder.
  writes_keys: the latents are keys and values that hold their position: only a placement that reads x_p again has a
      vector that predicts the next token, and no other text's latents can stand in for them.
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
    reads_text: bool = True
    has_matrices: bool = True
    starts_random: bool = False
    own_size: bool = False
    writes_keys: bool = False


def _decoder(key: jax.Array, decoder: Params, models: Models, num_latents: int) -> Params:
    del key, models, num_latents
    return {"decoder": decoder}


def _coprocessor(start: Callable) -> Callable:
    return lambda *args: {"coprocessor": start(*args)}


def _both(start: Callable) -> Callable:
    return lambda *args: _decoder(*args) | {"coprocessor": start(*args)}


METHODS = {
    # The decoder as it is; training it is ordinary language modelling.
    "decoder": Method(_decoder, None, trains_decoder=True, reads_text=False),
    # Liu et al. 2025: the coprocessor starts from the decoder's weights, every weight trained.
    "cache_augmentation": Method(_coprocessor(coprocessor.from_decoder), coprocessor.latents),
    # Their baselines: the same from a random start; reading the decoder's last-layer outputs instead of its cache.
    "from_scratch": Method(_coprocessor(coprocessor.from_scratch), coprocessor.latents, starts_random=True),
    "last_layer": Method(_coprocessor(coprocessor.from_decoder), coprocessor.of_last_layer),
    # Goyal et al. 2023: trained vectors fed to the frozen decoder, whatever was read; one vector L times, or L vectors.
    "pause_tokens": Method(
        _coprocessor(coprocessor.one_soft_token), coprocessor.unread, reads_text=False, has_matrices=False
    ),
    "static_tokens": Method(
        _coprocessor(coprocessor.only_soft_tokens), coprocessor.unread, reads_text=False, has_matrices=False
    ),
    # Coda-Forno et al. 2025: keys and values inserted in each layer (H1); decoder and coprocessor trained together
    # (H2); one model that writes its own latents (the unified baseline).
    "inserted": Method(_coprocessor(coprocessor.from_decoder), coprocessor.inserted, writes_keys=True),
    "joint": Method(_both(coprocessor.from_decoder), coprocessor.latents, trains_decoder=True),
    "unified": Method(_both(coprocessor.only_soft_tokens), coprocessor.latents, trains_decoder=True),
    # Future work of Liu et al.: latents one after another; a coprocessor of another size than the decoder.
    "sequential": Method(_coprocessor(coprocessor.from_decoder), coprocessor.one_after_another),
    "resized": Method(_coprocessor(coprocessor.resized), coprocessor.through_maps, starts_random=True, own_size=True),
}
