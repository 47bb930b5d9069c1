"""Scores given text, with latents and without: logits, log-probabilities.

Every function is compiled once for each shape.
"""

from functools import partial

import jax
import jax.numpy as jnp

from latent_delib.delib import augment, step
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.lm.batching import one_segment, round_up
from latent_delib.nn import transformer
from latent_delib.nn.transformer import Params


@partial(jax.jit, static_argnames=("aug",))
def score_vocabulary(
    params: Params,
    tokens_BT: jax.Array,
    *,
    aug: Augmentation,
) -> jax.Array:
    """Returns the plain decoder's logits, float32 [B, T, V]."""
    reading = augment.read_text(aug, params, tokens_BT, jnp.ones_like(tokens_BT))
    table_VD = transformer.output_table(params["decoder"])
    return transformer.unembed(table_VD, reading.outputs, aug.decoder.config)


@partial(jax.jit, static_argnames=("aug",))
def write_latents_at(
    params: Params,
    tokens_BT: jax.Array,
    at_BM: jax.Array,
    *,
    aug: Augmentation,
) -> Latents:
    """Writes latents after text tokens `at_BM`, [B, M, L, D]."""
    segment_BT = jnp.ones_like(tokens_BT)
    reading = augment.read_text(aug, params, tokens_BT, segment_BT)
    traces = aug.lay_out(tokens_BT, segment_BT, at_BM, num_ahead=1)
    return augment.write_latents(aug, params, reading, traces)


@partial(jax.jit, static_argnames=("aug", "ahead"))
def score_ahead(
    params: Params,
    tokens_BT: jax.Array,
    at_BM: jax.Array,
    *,
    aug: Augmentation,
    ahead: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns log p of the next `ahead` text tokens, by the decoder and with latents.

    Each is float32 [B, M, A].
    """
    segment_BT = jnp.ones_like(tokens_BT)
    reading, text_nll = step.read_step(params, tokens_BT, segment_BT, aug=aug)
    index = at_BM[..., None] + jnp.arange(ahead)
    decoder_BMA = -jnp.take_along_axis(text_nll[:, None], index, axis=2)
    if not aug.writes_latents:
        return decoder_BMA, decoder_BMA
    nll_BMA, _ = step.ahead_step(
        params, reading, tokens_BT, segment_BT, at_BM, aug=aug, num_ahead=ahead
    )
    return decoder_BMA, -nll_BMA


@partial(jax.jit, static_argnames=("aug",))
def score_tails(
    params: Params,
    text_BT: jax.Array,
    length_B: jax.Array,
    tails_BMA: jax.Array,
    *,
    aug: Augmentation,
) -> tuple[jax.Array, jax.Array]:
    """Scores M continuations of each prompt, token by token.

    A prompt is read once. Its continuations are traces at its last token, all with the same
    latents. Without latents, a trace begins by reading that token again.

    Args:
      text_BT: prompts, padded on the right.
      length_B: their lengths.
      tails_BMA: continuations, padded on the right.

    Returns:
      log p of every token, float32 [B, M, A], and whether it is the likeliest, bool [B, M, A].
    """
    table_VD = transformer.output_table(params["decoder"])
    config = aug.decoder.config
    segment_BT = one_segment(text_BT, length_B)
    reading = augment.read_text(aug, params, text_BT, segment_BT)
    B, M, A = tails_BMA.shape
    last_B1 = length_B[:, None] - 1
    if not aug.writes_latents:
        aug = aug.without_latents
    one_trace = aug.lay_out(text_BT, segment_BT, last_B1, A)
    z = augment.write_latents(aug, params, reading, one_trace)
    traces = aug.lay_out(text_BT, segment_BT, jnp.broadcast_to(last_B1, (B, M)), A)
    reread = PLACEMENTS[aug.placement].reread
    traces = traces._replace(
        inputs=jnp.concatenate([traces.inputs[..., :reread], tails_BMA[..., :-1]], axis=2),
        targets=tails_BMA,
    )
    z = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, M, *x.shape[2:])), z)
    x_BMAD, _ = augment.decode(aug, params, z, reading.cache, traces)

    def one(x_BMD: jax.Array, target_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BMV = transformer.unembed(table_VD, x_BMD, config)
        picked_BM = jnp.take_along_axis(logits_BMV, target_BM[..., None], axis=-1)[..., 0]
        logprob_BM = picked_BM - jax.nn.logsumexp(logits_BMV, axis=-1)
        return logprob_BM, jnp.argmax(logits_BMV, axis=-1) == target_BM

    # One token at a time, to hold only its logits.
    by_token = (jnp.moveaxis(x_BMAD, 2, 0), jnp.moveaxis(tails_BMA, 2, 0))
    logprobs, greedy = jax.lax.map(lambda pair: one(*pair), by_token)
    return jnp.moveaxis(logprobs, 0, 2), jnp.moveaxis(greedy, 0, 2)


@partial(jax.jit, static_argnames=("aug", "stretch", "shards"))
def score_text(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    aug: Augmentation,
    stretch: int,
    shards: int,
) -> jax.Array:
    """Returns log p of all tokens but the first of each row, summed, float32 [B].

    Latents join after the first token and again after each `stretch` tokens. Each stretch is a
    trace, as in generation. Without latents it is the decoder's log p.

    Args:
      length_B: number of tokens in each row, before padding.
      stretch: at most T - 1.
      shards: parts into which traces are split.
    """
    segment_BT = one_segment(tokens_BT, length_B)
    reading, nll = step.read_step(params, tokens_BT, segment_BT, aug=aug)
    B, T = tokens_BT.shape
    if not aug.writes_latents:
        return -jnp.sum(nll * (segment_BT[:, 1:] > 0), axis=1)
    at = jnp.arange(0, T - 1, stretch)
    # Traces that are computed at once have about as many tokens as the text, at most.
    traces_at_once = min(len(at), max(1, T // (aug.count_latents(stretch) + stretch)))
    if traces_at_once > 1:
        traces_at_once = round_up(traces_at_once, shards)
    # Place T - 1 has no ahead tokens, so it has no weight.
    at = jnp.pad(at, (0, -len(at) % traces_at_once), constant_values=T - 1)

    def some(at_M: jax.Array) -> jax.Array:
        at_BM = jnp.broadcast_to(at_M, (B, traces_at_once))
        more, weights = step.ahead_step(
            params, reading, tokens_BT, segment_BT, at_BM, aug=aug, num_ahead=stretch
        )
        return -jnp.sum(more * weights, axis=(1, 2))

    return jnp.sum(jax.lax.map(some, at.reshape(-1, traces_at_once)), axis=0)
