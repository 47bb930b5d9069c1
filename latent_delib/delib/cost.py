"""Useful floating-point operations of a training step, and the peak of known devices: together, utilisation.

Useful means the operations that the method needs if nothing is computed twice:

  - the text once forward;
  - the coprocessor forward and backward, to activations and weights;
  - the decoder's traces forward and backward, to activations only where the decoder is frozen;
  - the vocabulary likewise;
  - attention on visible pairs only, without gradients of the frozen text's keys and values.

Not counted: the products that make adapters into weights, and maps between caches. A method's row says what writing
its latents costs.
"""

from latent_delib.delib import flops
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.flops import Writing
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS

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


def text_flops(aug: Augmentation, batch: int, seq_len: int) -> float:
    """Returns the FLOPs of reading the text once, without the vocabulary."""
    return flops.text(aug.transformer.config, batch * seq_len, seq_len)


def train_step_flops(aug: Augmentation, batch: int, seq_len: int, num_traces: int, num_ahead: int) -> float:
    """Returns the useful FLOPs of one step.

    Args:
      aug: the method and both models.
      batch: rows.
      seq_len: tokens per row.
      num_traces: traces per row. Each sees half of the row on average.
      num_ahead: ahead tokens per trace.
    """
    method, c = METHODS[aug.method], aug.transformer.config
    vocabulary = 2 * c.vocab_size * c.embed_dim
    text = text_flops(aug, batch, seq_len)
    if not aug.has_latents:
        return 3 * (text + batch * seq_len * vocabulary)
    passes, text_passes = (3, 3) if method.trains_decoder else (2, 1)
    traces = batch * num_traces
    writing = method.cost(_writing(aug, batch, seq_len, num_traces)).useful
    decoding = flops.traces(c, traces, _tokens_decoded(aug, num_ahead), seq_len, passes, passes)
    return text_passes * text + writing + decoding + passes * traces * num_ahead * vocabulary


def repeated_flops(aug: Augmentation, batch: int, seq_len: int, num_traces: int, num_ahead: int) -> float:
    """Returns the FLOPs of such a step beyond the useful ones, without attention among a trace's own tokens.

    The backward pass repeats products of the layers, and attention where the transformer's `remat` does not keep it.
    Where keys and values are inserted, the decoder reads as many zeros.
    """
    method, c, remat = METHODS[aug.method], aug.transformer.config, aug.transformer.remat
    text = flops.again(c, remat, batch * seq_len, seq_len) if method.trains_decoder else 0.0
    if not aug.has_latents:
        return text
    traces = batch * num_traces
    writing = method.cost(_writing(aug, batch, seq_len, num_traces)).repeated
    decoding = flops.again(c, remat, traces * _tokens_decoded(aug, num_ahead), seq_len)
    if method.writes_keys:
        zeros = traces * aug.num_latents
        decoding += flops.again(c, remat, zeros, seq_len, more_products=2, more_attention=2)
    return text + writing + decoding


def _tokens_decoded(aug: Augmentation, num_ahead: int) -> int:
    """Returns how many useful tokens of one trace the decoder reads."""
    text = num_ahead - 1 + PLACEMENTS[aug.placement].reread
    return text if METHODS[aug.method].writes_keys else aug.num_latents + text


def _writing(aug: Augmentation, batch: int, seq_len: int, num_traces: int) -> Writing:
    return Writing(
        config=aug.models.coprocessor.config,
        remat=aug.transformer.remat,
        text_tokens=batch * seq_len,
        seq_len=seq_len,
        traces=batch * num_traces,
        num_latents=aug.num_latents,
        trains_decoder=METHODS[aug.method].trains_decoder,
    )
