"""Floating-point operations of a training step.

Useful means the operations that the method needs if nothing is computed twice:

  - the text once forward, and backward too where the decoder is trained; of the last layer only
    keys and values where no outputs are needed (`Augmentation.needs_outputs`);
  - the coprocessor forward and backward, to activations and weights;
  - the decoder's traces forward and backward, to activations only where the decoder is frozen;
  - the logits likewise, and once forward for a teacher;
  - attention on visible pairs only, without gradients of the frozen text's keys and values.

Adapters count as if the matrices beside them were trained, which is more than they need. Maps
between caches are not counted. `Method.cost` gives the cost of writing latents.
"""

from latent_delib.delib import flops
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.flops import Flops, Writing
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS


def step_flops(
    aug: Augmentation,
    batch: int,
    seq_len: int,
    num_traces: int,
    num_ahead: int,
) -> Flops:
    """Counts the FLOPs of one training step.

    Args:
      aug: the method and both models.
      batch: rows.
      seq_len: tokens per row.
      num_traces: traces per row; every position of a row is assumed to be equally likely.
      num_ahead: ahead tokens per trace.

    Returns:
      The useful FLOPs, and the FLOPs that the backward pass repeats under the transformer's
      `remat`; see `flops.recomputed`.
    """
    method = METHODS[aug.method]
    c = aug.decoder.config
    remat = aug.decoder.remat
    vocabulary = 2 * c.vocab_size * c.embed_dim
    text = flops.text(c, batch * seq_len, seq_len, aug.needs_outputs)
    text_recomputed = 0.0
    if method.trains_decoder:
        text_recomputed = flops.recomputed(c, remat, batch * seq_len, seq_len)
    if not aug.writes_latents:
        return Flops(3 * (text + batch * seq_len * vocabulary), text_recomputed)

    traces = batch * num_traces
    passes, text_passes = (3, 3) if method.trains_decoder else (2, 1)
    writing = method.cost(
        Writing(
            config=aug.models.coprocessor.config,
            remat=remat,
            text_tokens=batch * seq_len,
            seq_len=seq_len,
            traces=traces,
            num_latents=aug.num_latents,
            trains_decoder=method.trains_decoder,
        )
    )
    logit_passes = passes + 1 if aug.distill else passes
    predicting = logit_passes * traces * num_ahead * vocabulary
    tokens = decoded_tokens(aug, num_ahead)
    inserted = aug.num_latents if method.writes_keys else 0
    visible = aug.visible_text
    decoding = flops.traces(c, traces, tokens, seq_len, passes, passes, inserted, visible)
    decoding_recomputed = flops.recomputed(c, remat, traces * tokens, seq_len, visible)
    return Flops(
        text_passes * text + writing.useful + decoding + predicting,
        text_recomputed + writing.recomputed + decoding_recomputed,
    )


def decoded_tokens(aug: Augmentation, num_ahead: int) -> int:
    """Returns how many tokens of a trace the decoder reads: inputs, and latents if vectors."""
    tokens = num_ahead - 1 + PLACEMENTS[aug.placement].reread
    return tokens if METHODS[aug.method].writes_keys else tokens + aug.count_latents(num_ahead)
