"""Useful floating-point operations of a training step, and the peak of known devices: together, utilisation.

Useful means what the method needs if nothing were computed twice: the text once forward; the coprocessor forward and
backward (activations and weights); the decoder's traces forward and backward (activations only where it is frozen); the
vocabulary likewise; attention on visible pairs only, without gradients of the frozen text's keys and values. A
multiply-add counts as two. Not counted: the products that make adapters into weights, and maps between caches.
"""

from latent_delib.delib import coprocessor
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.nn.sizes import TransformerConfig

# Dense bfloat16 peak of one chip, FLOP/s, from the makers' data sheets.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def _per_token(c: TransformerConfig) -> int:
    """Forward FLOPs of the layers' matrix products for one token."""
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return 2 * c.num_layers * (attention + 3 * c.embed_dim * c.ffn_dim)


def _attention(c: TransformerConfig, length: int) -> float:
    """Forward FLOPs of a query's scores and sums over all layers, the mean over its places in `length` tokens."""

    def seen(local: bool) -> float:
        window = min(c.window, length) if local else length
        return window - window**2 / (2 * length)

    return 4 * c.num_heads * c.head_dim * sum(map(seen, c.is_local))


def text_flops(aug: Augmentation, batch: int, seq_len: int) -> float:
    """FLOPs of reading the text once, without the vocabulary."""
    c = aug.transformer.config
    return batch * seq_len * (_per_token(c) + _attention(c, seq_len))


def _tokens(aug: Augmentation, num_ahead: int) -> tuple[int, int]:
    """Tokens of a trace: that the coprocessor reads, and the decoder."""
    write = METHODS[aug.method].write
    text = num_ahead - 1 + PLACEMENTS[aug.placement].reread
    by_decoder = text if write is coprocessor.inserted else aug.num_latents + text
    return 0 if write is coprocessor.unread else aug.num_latents, by_decoder


def train_step_flops(aug: Augmentation, batch: int, seq_len: int, num_traces: int, num_ahead: int) -> float:
    """FLOPs of one step on `batch` rows of `seq_len` tokens; prefixes count with their mean length, T / 2."""
    method, c = METHODS[aug.method], aug.transformer.config
    vocabulary = 2 * c.vocab_size * c.embed_dim
    text = text_flops(aug, batch, seq_len)
    if not aug.has_latents:
        return 3 * (text + batch * seq_len * vocabulary)
    traces = batch * num_traces
    written, inputs = _tokens(aug, num_ahead)
    passes, text_passes = (3, 3) if method.trains_decoder else (2, 1)

    def trace(c: TransformerConfig, tokens: int, passes: int, text_passes: int) -> float:
        over_text = text_passes * _attention(c, seq_len)
        return traces * tokens * (passes * _per_token(c) + over_text + 3 * _attention(c, tokens)) if tokens else 0.0

    of_last_layer = method.write is coprocessor.of_last_layer  # it reads the text too
    write = trace(aug.models.coprocessor.config, written, 3, 3 if method.trains_decoder or of_last_layer else 2)
    read = text_passes * text + (3 * text if of_last_layer else 0.0)
    return read + write + trace(c, inputs, passes, passes) + passes * traces * num_ahead * vocabulary


def repeated_flops(aug: Augmentation, batch: int, seq_len: int, num_traces: int, num_ahead: int) -> float:
    """FLOPs of such a step beyond the useful ones, without attention of a trace's own tokens.

    What the backward pass does again under the transformer's `remat`: products of the layers, and attention where that
    is not kept either. Latents that are written one after another take a pass over all of them each, which the backward
    pass does again in any case. Where keys and values are inserted, the decoder reads as many zeros.
    """
    remat, decoder, writer = aug.transformer.remat, aug.transformer.config, aug.models.coprocessor.config
    method, L = METHODS[aug.method], aug.num_latents

    def again(c: TransformerConfig, tokens: int, products: int = 0, attention: int = 0) -> float:
        products, attention = products + (remat not in ("none", "dots")), attention + (remat == "full")
        return batch * tokens * (products * _per_token(c) + attention * _attention(c, seq_len))

    more = again(decoder, seq_len) if method.trains_decoder else 0.0
    if not aug.has_latents:
        return more
    written, inputs = _tokens(aug, num_ahead)
    if method.write is coprocessor.of_last_layer:  # it reads the text too
        more += again(writer, seq_len)
    if method.write is coprocessor.one_after_another:
        more += again(writer, num_traces * (L - 1) * L, products=4, attention=3)
    if method.write is coprocessor.inserted:
        more += again(decoder, num_traces * L, products=2, attention=2)
    return more + again(writer, num_traces * written) + again(decoder, num_traces * inputs)
