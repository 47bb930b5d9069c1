"""The three calls everything is made of: read the text, write latents, decode the ahead tokens (Section 2.1).

`params` is one dict: "decoder" (layers, final_norm, embedding) and, for methods that write latents, "coprocessor".
Which of the two is trained is known to `assemble` alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from latent_delib.delib import coprocessor, lora
from latent_delib.delib import traces as traces_lib
from latent_delib.delib.coprocessor import Inserted, Latents, Models, Text
from latent_delib.delib.loss import token_nll, tokens_at_a_time
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import Traces
from latent_delib.nn import cache as cache_lib
from latent_delib.nn import transformer
from latent_delib.nn.cache import KV, Cache
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params, Transformer


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What stays fixed while parameters and text change.

    transformer: the decoder's. method: a key of `methods.METHODS`. num_latents: N_L. placement: a key of
    `traces.PLACEMENTS`. loss_chunk: tokens of a sequence whose logits exist at a time, four times as many at most on a
    device. coprocessor: its transformer, where that is not the decoder's.
    """

    transformer: Transformer
    method: str = "cache_augmentation"
    num_latents: int = 16
    placement: str = "after"
    loss_chunk: int = 512
    coprocessor: Transformer | None = None

    @property
    def has_latents(self) -> bool:
        return METHODS[self.method].write is not None

    @property
    def models(self) -> Models:
        return Models(self.transformer, self.coprocessor or self.transformer)

    def lay_out(
        self,
        tokens_BT: jax.Array,
        segment_BT: jax.Array,
        at_BM: jax.Array,
        num_ahead: int,
        delay_BM: jax.Array | int = 0,
    ) -> Traces:
        """Traces at text tokens `at_BM`; see `traces.lay_out`."""
        return traces_lib.lay_out(tokens_BT, segment_BT, at_BM, self.num_latents, num_ahead, self.placement, delay_BM)


def assemble(frozen: Params, trainable: Params) -> Params:
    """The parameters that a frozen and a trainable tree make: each room of the trainable one lies over what is below.

    Below the decoder is the frozen one; below the coprocessor one that is frozen, or else the decoder's own layers, as
    they are trained: adapters of `joint` lie over the adapted decoder's.
    """
    decoder = lora.lay_over(frozen.get("decoder", {}), trainable.get("decoder", {}))
    if "coprocessor" not in trainable:
        return {"decoder": decoder}
    own = trainable["coprocessor"]
    if "final_norm" in own:  # whole, and perhaps of another architecture
        return {"decoder": decoder, "coprocessor": own}
    below = frozen.get("coprocessor") or coprocessor.body(decoder)
    return {"decoder": decoder, "coprocessor": lora.lay_over(below, own)}


def gathered(aug: Augmentation, params: Params) -> Params:
    """The same parameters with the token table, if it is among them, gathered: once for all its uses in a step."""
    if "decoder" not in params:
        return params
    decoder = dict(params["decoder"])
    for name in transformer.TABLES:
        if name in decoder:
            decoder[name] = aug.transformer.partition.gather(decoder[name], PARAM_AXES[name])
    return params | {"decoder": decoder}


def read(aug: Augmentation, params: Params, tokens_BT: jax.Array, segment_BT: jax.Array, dtype: jnp.dtype) -> Text:
    """The plain decoder over packed text."""
    start_BT = traces_lib.document_start(segment_BT)
    position_BT = jnp.arange(tokens_BT.shape[1]) - start_BT
    x_BTD = transformer.embed(params["decoder"]["embedding"].astype(dtype), tokens_BT, aug.transformer.config)
    bounds = transformer.own_text(start_BT)
    x_BMTD, kv = aug.transformer.apply({"params": params["decoder"]}, x_BTD[:, None], position_BT[:, None], bounds)
    return Text(x_BMTD[:, 0], cache_lib.of_text(kv, position_BT))


def latents(aug: Augmentation, params: Params, text: Text, traces: Traces) -> Latents:
    """Latents of every trace."""
    write = METHODS[aug.method].write
    assert write is not None, aug.method
    return write(params, aug.models, text, traces)


def decode(aug: Augmentation, params: Params, z: Latents, cache: Cache, traces: Traces) -> tuple[jax.Array, KV]:
    """The decoder over latents and ahead tokens.

    Returns the outputs [B, M, A, D] that predict the A targets, and the keys and values of latents and tokens.
    """
    embedding_VD = params["decoder"]["embedding"].astype(cache.k.dtype)
    text = transformer.embed(embedding_VD, traces.inputs, aug.transformer.config)
    given = None
    if isinstance(z, Inserted):  # no vectors enter: what stands in their place is overwritten in every layer
        given = KV(*(jnp.moveaxis(x, 2, 0) for x in z))
        z = jnp.zeros((*text.shape[:2], aug.num_latents, text.shape[-1]), text.dtype)
    x_BMSD = jnp.concatenate([z, text], axis=2)
    out_BMSD, kv = aug.transformer.apply(
        {"params": params["decoder"]}, x_BMSD, traces.position, traces.bounds, cache, given
    )
    return out_BMSD[:, :, -traces.targets.shape[2] :], kv


def nll(aug: Augmentation, params: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p of each target [B, ...] from outputs [B, ..., D], nats, float32."""
    B, D = x.shape[0], x.shape[-1]
    table, cap = transformer.output_table(params["decoder"]), aug.transformer.config.final_softcap
    chunk = tokens_at_a_time(aug.loss_chunk, B, aug.transformer.partition.row_shards)
    return token_nll(x.reshape(B, -1, D), table, targets.reshape(B, -1), cap, chunk).reshape(targets.shape)


def loss(
    aug: Augmentation,
    params: Params,
    tokens_BT: jax.Array,
    segment_BT: jax.Array,
    at_BM: jax.Array,
    num_ahead: int,
    dtype: jnp.dtype,
    delay_BM: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """The training objective of one batch: Σ loss in nats and Σ tokens, both float32 scalars.

    With latents: cross-entropy of the ahead tokens of every trace (Section 2.3). Without: of all text.
    """
    params = gathered(aug, params)
    text = read(aug, params, tokens_BT, segment_BT, dtype)
    if not aug.has_latents:
        same_document = (segment_BT[:, 1:] == segment_BT[:, :-1]) & (segment_BT[:, 1:] > 0)
        losses = nll(aug, params, text.outputs[:, :-1], tokens_BT[:, 1:])
        weights = same_document.astype(jnp.float32)
    else:
        traces = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead, delay_BM)
        x_BMAD, _ = decode(aug, params, latents(aug, params, text, traces), text.cache, traces)
        losses, weights = nll(aug, params, x_BMAD, traces.targets), traces.weights
    return jnp.sum(losses * weights), jnp.sum(weights)
