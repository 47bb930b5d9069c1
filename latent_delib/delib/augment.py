"""The three calls of the method: read the text, write latents, decode ahead tokens.

See Section 2.1 of the paper. `params` is one dict:

  decoder: layers, final_norm and `transformer.TABLES`.
  coprocessor: present for methods that write latents.
  assistant: present for methods with an assistant; of the same form as "decoder", always frozen.

`assemble` makes it from the frozen tree and the trainable one.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib import coprocessor, lora
from latent_delib.delib import loss as loss_lib
from latent_delib.delib import traces as traces_lib
from latent_delib.delib.coprocessor import Inserted, Latents, Reading
from latent_delib.delib.loss import ahead_weights, token_loss, tokens_at_a_time
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import Traces
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params, Transformer


class Models(NamedTuple):
    """Holds the decoder's architecture and the coprocessor's.

    The two differ where the coprocessor has a size of its own, or the size of an assistant.
    """

    decoder: Transformer
    coprocessor: Transformer


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Holds what stays fixed while parameters and text change.

    decoder: the decoder's transformer.
    method: a key of `methods.METHODS`.
    num_latents: N_L.
    placement: a key of `traces.PLACEMENTS`.
    loss_chunk: largest number of tokens per sequence that have logits at one time. A device holds
      logits of at most four times as many tokens.
    coprocessor: the transformer of the coprocessor and of the assistant; None: the decoder's.
    every: number of ahead tokens after which latents join again, and stay; 0: they join once.
    distill: weight in [0, 1] of the divergence from a teacher; the cross-entropy of the text has
      the rest. The teacher is the decoder that has read the whole row: steps that a trace skips,
      and text that `visible_text` hides.
    visible_text: how many of the last text tokens the decoder still sees beside latents; 0: all.
    """

    decoder: Transformer
    method: str = "cache_augmentation"
    num_latents: int = 16
    placement: str = "after"
    loss_chunk: int = 512
    coprocessor: Transformer | None = None
    every: int = 0
    distill: float = 0.0
    visible_text: int = 0

    @property
    def writes_latents(self) -> bool:
        """Tells whether the method writes latents, so that the loss is summed over traces.

        A copy made by `without_latents` gives the same answer.
        """
        return METHODS[self.method].writes_latents

    @property
    def needs_outputs(self) -> bool:
        """Tells whether training needs outputs of the text, or the gradient of its cache."""
        method = METHODS[self.method]
        trains_on_text = method.trains_decoder or not self.writes_latents
        return trains_on_text or method.reads_outputs or self.distill > 0

    @property
    def without_latents(self) -> "Augmentation":
        """Returns a copy without latents: the last text token is read again, then ahead tokens.

        Ahead tokens see no more of the text than they do with latents.
        """
        return dataclasses.replace(self, num_latents=0, placement="overlay")

    @property
    def models(self) -> Models:
        """Returns the transformers of the decoder and of the coprocessor."""
        return Models(self.decoder, self.coprocessor or self.decoder)

    @property
    def readers(self) -> dict[str, Transformer]:
        """Returns the models that read the text, each by the name of its parameters."""
        found = {"decoder": self.decoder}
        if METHODS[self.method].has_assistant:
            found["assistant"] = self.models.coprocessor
        return found

    @property
    def longest_text(self) -> int:
        """Returns the length of the longest text that, with its latents, fits learned positions.

        The smaller table of the two models decides. Without a table it is sys.maxsize.
        """
        tables = [model.config.learned_positions for model in self.models]
        if not any(tables):
            return sys.maxsize
        longest = min(filter(None, tables))
        if self.writes_latents:
            longest -= traces_lib.positions_added(self.placement, self.num_latents)
        return longest

    def count_latents(self, num_ahead: int) -> int:
        """Returns the number of latents in a trace of `num_ahead` ahead tokens, in all groups."""
        return self.num_latents * len(traces_lib.group_offsets(num_ahead, self.every))

    def reading_order(self, num_ahead: int) -> np.ndarray:
        """Returns `traces.reading_order` of this method."""
        return traces_lib.reading_order(self.num_latents, num_ahead, self.placement, self.every)

    def lay_out(
        self,
        tokens_BT: jax.Array,
        segment_BT: jax.Array,
        at_BM: jax.Array,
        num_ahead: int,
        delay_BM: jax.Array | int = 0,
        steps_end: Sequence[int] = (),
    ) -> Traces:
        """Lays out traces at text tokens `at_BM`; see `traces.lay_out`."""
        return traces_lib.lay_out(
            tokens_BT,
            segment_BT,
            at_BM,
            num_latents=self.num_latents,
            num_ahead=num_ahead,
            placement=self.placement,
            delay_BM=delay_BM,
            every=self.every,
            steps_end=steps_end,
            visible_text=self.visible_text,
        )


def assemble(frozen: Params, trainable: Params) -> Params:
    """Returns the parameters that a frozen and a trainable tree make together.

    Decoder leaves that are not trained come from the frozen decoder. Coprocessor leaves that are
    not trained come from the frozen coprocessor. Without a frozen coprocessor they come from the
    assistant's layers, and without an assistant from the decoder's layers, adapters included.
    """
    decoder = lora.join(frozen.get("decoder", {}), trainable.get("decoder", {}))
    params = frozen | {"decoder": decoder}
    if "coprocessor" not in trainable:
        return params
    own = trainable["coprocessor"]
    if "final_norm" in own:  # whole, and perhaps of another architecture
        return params | {"coprocessor": own}
    below = frozen.get("coprocessor") or coprocessor.body(starting_decoder_of(params))
    return params | {"coprocessor": lora.join(below, own)}


def starting_decoder_of(params: Params) -> Params:
    """Returns the decoder from which a coprocessor begins: the assistant, or else the decoder."""
    return params["assistant"] if "assistant" in params else params["decoder"]


def with_whole_tables(aug: Augmentation, params: Params) -> Params:
    """Gathers the token tables of all models that read text, so that a step does it once."""
    gather = aug.decoder.partition.gather
    gathered = dict(params)
    for reader in aug.readers:
        if reader not in params:  # it is in the other tree, the frozen or the trainable one
            continue
        tree = dict(params[reader])
        for name in transformer.TABLES:
            if name in tree:
                tree[name] = gather(tree[name], PARAM_AXES[name])
        gathered[reader] = tree
    return gathered


def read_text(
    aug: Augmentation,
    params: Params,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    outputs: bool = True,
) -> Reading:
    """Passes packed text through the plain decoder, and through an assistant if any.

    outputs: whether the decoder's outputs are needed too, not only the caches.
    """
    start_BT = traces_lib.document_start(segment_BT)
    position_BT = jnp.arange(tokens_BT.shape[1]) - start_BT
    bounds = transformer.own_text(start_BT)

    def read(reader: str, outputs: bool) -> tuple[jax.Array | None, Cache]:
        model, weights = aug.readers[reader], params[reader]
        x_BTD = transformer.embed(weights["embedding"], tokens_BT, model.config)
        inputs = x_BTD[:, None], position_BT[:, None], bounds
        x_BMTD, kv = model.apply({"params": weights}, *inputs, outputs=outputs)
        return None if x_BMTD is None else x_BMTD[:, 0], cache_lib.of_text(kv, position_BT)

    x_BTD, cache = read("decoder", outputs)
    assistant = None
    if "assistant" in aug.readers:
        _, assistant = read("assistant", outputs=False)
    return Reading(x_BTD, cache, assistant)


def write_latents(aug: Augmentation, params: Params, reading: Reading, traces: Traces) -> Latents:
    """Writes the latents of every trace by the method."""
    if not aug.num_latents:
        D = aug.decoder.config.embed_dim
        return jnp.zeros((*traces.latent_position.shape, D), reading.cache.k.dtype)
    write = METHODS[aug.method].write
    assert write is not None, aug.method
    return write(aug, params, reading, traces)


def decode(
    aug: Augmentation,
    params: Params,
    z: Latents,
    cache: Cache,
    traces: Traces,
) -> tuple[jax.Array, KV]:
    """Passes latents and ahead tokens through the decoder.

    Returns:
      The outputs [B, M, A, D] that predict the A targets, and the keys and values of latents and
      tokens.
    """
    decoder = params["decoder"]
    x_BMSD = transformer.embed(decoder["embedding"], traces.inputs, aug.decoder.config)
    bounds = traces.bounds
    given = None
    if isinstance(z, Inserted):
        given = KV(jnp.moveaxis(z.k, 2, 0), jnp.moveaxis(z.v, 2, 0))
        bounds = jax.tree.map(lambda x: x[:, :, aug.num_latents :], bounds)
    else:
        x_BMSD = jnp.concatenate([z, x_BMSD], axis=2)
    A = traces.targets.shape[2]
    if aug.every:
        order = aug.reading_order(A)
        x_BMSD = x_BMSD[:, :, order]
    variables = {"params": decoder}
    out_BMSD, kv = aug.decoder.apply(variables, x_BMSD, traces.position, bounds, cache, given)
    if aug.every:
        out_BMSD = out_BMSD[:, :, np.argsort(order)]  # latents first again
    return out_BMSD[:, :, -A:], kv


def nll(aug: Augmentation, params: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p of each target [B, ...] from outputs [B, ..., D]: nats, float32.

    Training uses `training_loss` instead.
    """
    return token_loss(*_loss_inputs(aug, params, x, targets)).reshape(targets.shape)


def training_loss(
    aug: Augmentation,
    params: Params,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher: jax.Array | None = None,
) -> jax.Array:
    """Returns the sum of `loss.token_loss` times weights [B, ...], a float32 scalar.

    Args:
      x: outputs [B, ..., D].
      targets, weights: [B, ...].
      teacher: the teacher's outputs, in the shape of x; None where `aug.distill` is 0.
    """
    x_BRD, table_VD, target_BR, softcap, chunk = _loss_inputs(aug, params, x, targets)
    weight_BR = weights.reshape(target_BR.shape)
    shards = aug.decoder.partition.row_shards
    if teacher is not None:
        teacher = teacher.reshape(x_BRD.shape)
    return loss_lib.summed_loss(
        x_BRD, table_VD, target_BR, weight_BR, softcap, chunk, aug.distill, teacher, shards
    )


def _loss_inputs(aug: Augmentation, params: Params, x: jax.Array, targets: jax.Array) -> tuple:
    """Returns the arguments of `loss.token_loss`, with the tokens of each row in one sequence."""
    B, D = x.shape[0], x.shape[-1]
    table_VD = transformer.output_table(params["decoder"])
    chunk = tokens_at_a_time(aug.loss_chunk, B, aug.decoder.partition.row_shards)
    return (
        x.reshape(B, -1, D),
        table_VD,
        targets.reshape(B, -1),
        aug.decoder.config.final_softcap,
        chunk,
    )


def loss(
    aug: Augmentation,
    params: Params,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    num_ahead: int,
    delay_BM: jax.Array | int = 0,
    prompt_end: Sequence[int] = (),
    steps_end: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array]:
    """Returns the training objective of one batch: Σ loss in nats, and Σ tokens.

    Both are float32 scalars. With latents the loss is `loss.token_loss` of the ahead tokens of
    every trace, each weighted by `loss.ahead_weights` (Section 2.3). Without latents it is the
    cross-entropy of all text after prompts.

    Args:
      params: parameters, after `with_whole_tables` where a mesh splits them.
      tokens_BT: int32 text.
      segment_BT: int32 document number of each token, 0 on padding.
      at_BM: int32 text tokens at which the cache is augmented.
      num_ahead: A, ahead tokens per trace.
      delay_BM: see `traces.lay_out`.
      prompt_end: tokens that end a prompt, for the loss without latents; empty: all text counts.
      steps_end: see `traces.first_ahead`.
    """
    reading = read_text(aug, params, tokens_BT, segment_BT, outputs=aug.needs_outputs)
    if not aug.writes_latents:
        return _text_loss(aug, params, reading, tokens_BT, segment_BT, prompt_end)
    traces = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead, delay_BM, steps_end)
    z = write_latents(aug, params, reading, traces)
    outputs, _ = decode(aug, params, z, reading.cache, traces)
    teacher = teacher_outputs(reading, traces) if aug.distill else None
    weights = traces.weights * ahead_weights(num_ahead)
    total = training_loss(aug, params, outputs, traces.targets, weights, teacher)
    return total, jnp.sum(weights)


def _text_loss(
    aug: Augmentation,
    params: Params,
    reading: Reading,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    prompt_end: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """Returns Σ cross-entropy in nats and Σ tokens of all text after prompts, as `loss` does."""
    one_more = [(0, 0), (0, 1)]
    targets_BT = jnp.pad(tokens_BT[:, 1:], one_more)
    next_segment_BT = jnp.pad(segment_BT[:, 1:], one_more)
    counts_BT = (segment_BT == next_segment_BT) & (segment_BT > 0)
    counts_BT &= traces_lib.follows_prompt(tokens_BT, segment_BT, prompt_end)
    weights_BT = counts_BT.astype(jnp.float32)
    total = training_loss(aug, params, reading.outputs, targets_BT, weights_BT)
    return total, jnp.sum(weights_BT)


def teacher_outputs(reading: Reading, traces: Traces) -> jax.Array:
    """Returns the decoder's outputs [B, M, A, D] that predict the ahead tokens from the text.

    The decoder has read all text before them, but no latents. This includes steps that a trace
    skips, and text that it does not see.
    """
    B, T, D = reading.outputs.shape
    before_BR = jnp.minimum(traces.ahead - 1, T - 1).reshape(B, -1)
    found_BRD = jnp.take_along_axis(reading.outputs, before_BR[..., None], axis=1)
    return found_BRD.reshape(*traces.ahead.shape, D)
