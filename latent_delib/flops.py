"""Useful floating-point operations of a training step, and the peak of known devices: together, utilisation.

Useful means what the method needs if nothing were computed twice: the text once forward; the coprocessor forward and
backward (activations and weights); the decoder's traces forward and backward (activations only, it is frozen); the
vocabulary likewise; attention on visible pairs only. A multiply-add counts as two.
"""

from latent_delib.delib.augment import Augmentation
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


def _attention(c: TransformerConfig, keys: float) -> float:
    """Forward FLOPs of one query's scores and sums over all layers, when global layers show it `keys` keys."""
    visible = sum(min(keys, c.window) if local else keys for local in c.is_local)
    return 4 * c.num_heads * c.head_dim * visible


def train_step_flops(
    aug: Augmentation, batch: int, seq_len: int, num_traces: int, num_ahead: int, frozen_decoder: bool
) -> float:
    """FLOPs of one step on `batch` rows of `seq_len` tokens; prefixes count with their mean length, T / 2."""
    c = aug.transformer.config
    vocabulary = 2 * c.vocab_size * c.embed_dim
    text = batch * seq_len * (_per_token(c) + _attention(c, seq_len / 2))
    if not aug.has_latents:
        return 3 * (text + batch * seq_len * vocabulary)
    traces = batch * num_traces
    inputs = aug.num_latents + num_ahead - 1 + PLACEMENTS[aug.placement].reread
    write = traces * aug.num_latents * (_per_token(c) + _attention(c, (seq_len + aug.num_latents) / 2))
    decode = traces * inputs * (_per_token(c) + _attention(c, (seq_len + inputs) / 2))
    if aug.method == "pause_tokens":
        write = 0.0
    passes = 2 if frozen_decoder else 3
    text_passes = 1 if frozen_decoder else 3
    return text_passes * text + 3 * write + passes * (decode + traces * num_ahead * vocabulary)
