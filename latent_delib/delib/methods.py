"""The table of methods. A new variant is one row here, a short config, and its lines in the tests.

A row says how the trainable tree begins, which latents the method writes, and what the writing
costs. Everything else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from latent_delib.delib import coprocessor, flops, mapped
from latent_delib.delib.coprocessor import Latents, Reading
from latent_delib.delib.flops import Flops, Writing
from latent_delib.delib.traces import Traces
from latent_delib.nn.layers import PARAM_AXES, Axes
from latent_delib.nn.transformer import BODY, Params

if TYPE_CHECKING:
    from latent_delib.delib.augment import Augmentation


class Method(NamedTuple):
    """Holds all that other modules need to know about a method.

    init_coprocessor: (key, decoder, aug) -> the coprocessor's tree before the first step. Layers
      that it lacks are those of the decoder. None: nothing but the decoder is trained.
    write: (aug, params, reading, traces) -> latents in the dtype of the decoder's cache. None: the
      method writes none, and its objective is the language-modelling loss of the text (with
      `method.prompt_end`, of the tokens that follow prompts).
    cost: FLOPs of writing the latents of one step.
    axes: logical axes of the method's own parameters, by leaf name; no layer has these names. The
      axes are keys of `mesh.WEIGHTS`, or None. Each parameter is one array of "coprocessor". It
      decays unless its name ends in "scale", "bias" or "soft_tokens" (`delib.optimizer`).
    trains_decoder: the decoder itself is trained.
    reads_text: the latents depend on the text. Only such latents can be late, or be swapped for
      latents of another text; and only if they are not keys.
    reads_outputs: the latents depend on the decoder's outputs, not only on its cache.
    has_matrices: matrices are trained. Only then can low-rank adapters replace them.
    starts_random: the coprocessor begins with random matrices. Adapters then need `method.start`,
      the checkpoint of a trained one.
    own_size: the coprocessor may have another architecture than the decoder, so adapters cannot
      build on the decoder's layers.
    has_assistant: another frozen decoder, the assistant, reads the text too. The coprocessor has
      the assistant's architecture and begins from it: `init_coprocessor` gets the assistant in
      place of the decoder, and leaves that the coprocessor's tree lacks are the assistant's layers.
    writes_keys: the latents are keys and values, which hold their position. So they can neither be
      late nor be replaced by latents of another text, and only a placement that reads x_p again
      has an output that predicts the next token.
    recurs: the latents join again after every `every` ahead tokens, and stay. They must be vectors
      that do not depend on the text.
    """

    init_coprocessor: Callable[[jax.Array, Params, Augmentation], Params] | None
    write: Callable[[Augmentation, Params, Reading, Traces], Latents] | None
    cost: Callable[[Writing], Flops]
    axes: Mapping[str, Axes] = {}
    trains_decoder: bool = False
    reads_text: bool = True
    reads_outputs: bool = False
    has_matrices: bool = True
    starts_random: bool = False
    own_size: bool = False
    has_assistant: bool = False
    writes_keys: bool = False
    recurs: bool = False

    def init(self, key: jax.Array, decoder: Params, aug: Augmentation) -> Params:
        """Returns the trainable tree before the first step.

        It has a "decoder" where the decoder is trained, and a "coprocessor" where there is one, as
        in the parameters of `delib.augment`.

        Raises:
          ValueError: a parameter of the method is a tree, not one array.
        """
        tree = {"decoder": decoder} if self.trains_decoder else {}
        if self.init_coprocessor is not None:
            tree["coprocessor"] = self.init_coprocessor(key, decoder, aug)
        for name, leaf in tree.get("coprocessor", {}).items():
            if isinstance(leaf, Mapping) and name not in BODY:
                raise ValueError(f"parameter {name!r} of the coprocessor: expected one array")
        return tree

    @property
    def writes_latents(self) -> bool:
        """Tells whether the method writes latents; otherwise it trains a language model."""
        return self.write is not None


def param_axes(method: str) -> Mapping[str, Axes]:
    """Returns the logical axes of every parameter of a method and of its decoder, by leaf name.

    Raises:
      ValueError: a parameter of the method has the name of a layer's.
    """
    own = coprocessor.AXES | METHODS[method].axes
    taken = sorted(own.keys() & PARAM_AXES.keys())
    if taken:
        raise ValueError(f"method {method!r}: {taken} are parameters of layers; use other names")
    return PARAM_AXES | own


# Fields of methods whose latents are trained weights that do not depend on the text.
_VECTORS: dict[str, Any] = dict(cost=flops.no_pass, reads_text=False, has_matrices=False)
METHODS = {
    # The decoder alone; its training is ordinary language modelling.
    "decoder": Method(
        init_coprocessor=None,
        write=None,
        cost=flops.no_pass,
        trains_decoder=True,
        reads_text=False,
    ),
    # Liu et al. 2025: the coprocessor starts from the decoder's weights, every weight is trained.
    "cache_augmentation": Method(
        coprocessor.init_from_decoder,
        coprocessor.write_in_one_pass,
        cost=flops.one_pass,
    ),
    # Baselines of Liu et al.: a random start; reading the decoder's last-layer outputs, not its
    # cache.
    "from_scratch": Method(
        coprocessor.init_from_scratch,
        coprocessor.write_in_one_pass,
        cost=flops.one_pass,
        starts_random=True,
    ),
    "last_layer": Method(
        coprocessor.init_from_decoder,
        coprocessor.write_from_last_layer,
        cost=flops.pass_over_text_too,
        reads_outputs=True,
    ),
    # Goyal et al. 2023: trained vectors, whatever the text; one vector L times, or L vectors.
    "pause_tokens": Method(
        coprocessor.init_one_soft_token,
        coprocessor.write_soft_tokens,
        **_VECTORS,
    ),
    "static_tokens": Method(
        coprocessor.init_soft_tokens,
        coprocessor.write_soft_tokens,
        **_VECTORS,
    ),
    # Sun et al. 2025 (latent tokens): trained vectors that recur among the tokens. Tokens see all
    # vectors before them, and keep their positions.
    "latent_tokens": Method(
        coprocessor.init_soft_tokens,
        coprocessor.write_soft_tokens,
        recurs=True,
        **_VECTORS,
    ),
    # Eyuboglu et al. 2025 (Cartridges): trained keys and values in each layer, whatever the text.
    "cartridge": Method(
        coprocessor.init_cartridge,
        coprocessor.write_cartridge,
        axes=coprocessor.CARTRIDGE_AXES,
        writes_keys=True,
        **_VECTORS,
    ),
    # Coda-Forno et al. 2025: keys and values inserted in each layer (H1); decoder and coprocessor
    # trained together (H2); one model that writes its own latents (the unified baseline). With
    # adapters, the coprocessor of "joint" has those of the decoder too, and adds its own.
    "inserted": Method(
        coprocessor.init_from_decoder,
        coprocessor.write_keys_and_values,
        cost=flops.one_pass,
        writes_keys=True,
    ),
    "joint": Method(
        coprocessor.init_from_decoder,
        coprocessor.write_in_one_pass,
        cost=flops.one_pass,
        trains_decoder=True,
    ),
    "unified": Method(
        coprocessor.init_soft_tokens,
        coprocessor.write_in_one_pass,
        cost=flops.one_pass,
        trains_decoder=True,
    ),
    # Xu et al. 2025 (SoftCoT), Fu et al. 2025 (Cache-to-Cache): the coprocessor starts from another
    # pretrained decoder, and reads the cache which that decoder keeps of the text.
    "assistant": Method(
        mapped.init_from_assistant,
        mapped.write_by_assistant,
        cost=flops.pass_of_assistant_too,
        axes=mapped.OUT_AXES,
        has_assistant=True,
    ),
    # Hao et al. 2024 (Coconut): the trained decoder's own outputs, fed back as its next inputs.
    "feedback": Method(
        coprocessor.init_one_soft_token,
        coprocessor.write_feedback,
        cost=flops.pass_per_thought,
        trains_decoder=True,
    ),
    # Future work of Liu et al.: latents one after another; a coprocessor of another size.
    "sequential": Method(
        coprocessor.init_from_decoder,
        coprocessor.write_one_after_another,
        cost=flops.pass_per_latent,
    ),
    "resized": Method(
        mapped.init_resized,
        mapped.write_through_maps,
        cost=flops.one_pass,
        axes=mapped.MAP_AXES,
        own_size=True,
    ),
}
