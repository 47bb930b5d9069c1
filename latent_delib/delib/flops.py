"""Floating-point operations of a transformer's layers, and of writing latents.

A multiply-add counts as two.
"""

from typing import NamedTuple

from latent_delib.nn.sizes import TransformerConfig


def per_token(c: TransformerConfig) -> int:
    """Returns the forward FLOPs of the layers' matrix products for one token."""
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    matrices = 2 if c.plain_mlp else 3
    return 2 * c.num_layers * (attention + matrices * c.embed_dim * c.ffn_dim)


def per_token_beyond_cache(c: TransformerConfig) -> int:
    """Returns the part of `per_token` that the keys and values of the layers do not need.

    This part is the products of the last layer, except those that make its keys and values.
    """
    keys_and_values = 4 * c.embed_dim * c.num_kv_heads * c.head_dim
    return per_token(c) // c.num_layers - keys_and_values


def attention(
    c: TransformerConfig,
    length: int,
    visible: int = 0,
    layers: slice = slice(None),
) -> float:
    """Returns the forward FLOPs of one query's attention in all layers, or in `layers`.

    The figure is the mean over all positions of the query among `length` tokens. The query sees
    the last `visible` tokens before it; 0: all of them.
    """

    def keys_seen(is_local: bool) -> float:
        window = min(c.window if is_local else length, visible or length, length)
        return window - window**2 / (2 * length)

    return 4 * c.num_heads * c.head_dim * sum(map(keys_seen, c.is_local[layers]))


def text(c: TransformerConfig, tokens: int, seq_len: int, outputs: bool = True) -> float:
    """Returns the forward FLOPs of reading `tokens` tokens, in rows of `seq_len`, once.

    outputs: False if keys and values alone are computed.
    """
    each = per_token(c) + attention(c, seq_len)
    if not outputs:
        each -= per_token_beyond_cache(c) + attention(c, seq_len, layers=slice(-1, None))
    return tokens * each


def traces(
    c: TransformerConfig,
    count: int,
    length: int,
    seq_len: int,
    passes: int,
    text_passes: int,
    inserted: int = 0,
    visible: int = 0,
) -> float:
    """Returns the FLOPs of passing traces through the layers.

    Args:
      c: architecture of the layers.
      count: number of traces.
      length: number of tokens of one trace, which see each other causally.
      seq_len: tokens per row of text; the count is the mean over all places of a trace in a row.
      passes: number of passes over the matrix products: 1 for forward alone, 2 with the gradient of
        the inputs, 3 with the gradient of the weights too.
      text_passes: passes of attention over the text: 3 if the text's keys and values have a
        gradient, otherwise 2.
      inserted: keys and values per layer that stand before the tokens; every token sees them all.
      visible: number of text tokens that a trace sees; 0: all before it.
    """
    if not length:
        return 0.0
    over_text = text_passes * attention(c, seq_len, visible)
    over_inserted = 3 * 4 * c.num_layers * c.num_heads * c.head_dim * inserted
    per_query = passes * per_token(c) + over_text + over_inserted + 3 * attention(c, length)
    return count * length * per_query


def recomputed(
    c: TransformerConfig,
    remat: str,
    tokens: int,
    seq_len: int,
    visible: int = 0,
) -> float:
    """Returns the FLOPs that a backward pass computes again under `remat`.

    Every `remat` but "none" and "dots" repeats the products of the layers; "full" repeats attention
    too. Attention among a trace's own tokens is not counted.
    """
    repeated = 0.0
    if remat not in ("none", "dots"):
        repeated += per_token(c)
    if remat == "full":
        repeated += attention(c, seq_len, visible)
    return tokens * repeated


class Writing(NamedTuple):
    """Describes the writing of latents in one training step.

    config: the coprocessor's architecture.
    remat: see `nn.transformer.REMAT`.
    text_tokens, traces: number in all rows.
    trains_decoder: whether the text's keys and values have a gradient.
    """

    config: TransformerConfig
    remat: str
    text_tokens: int
    seq_len: int
    traces: int
    num_latents: int
    trains_decoder: bool


class Flops(NamedTuple):
    """Holds the FLOPs of a step or of a part.

    useful: the FLOPs needed if nothing were computed twice.
    recomputed: the FLOPs that the backward pass computes again.
    """

    useful: float
    recomputed: float


# The cost of writing latents: one function per way of writing, named by the rows of `METHODS`.


def no_pass(w: Writing) -> Flops:
    """Counts the cost, 0, of latents that are trained vectors, or trained keys and values."""
    del w
    return Flops(0.0, 0.0)


def one_pass(w: Writing) -> Flops:
    """Counts one pass over the soft tokens of all traces, forward and backward."""
    text_passes = 3 if w.trains_decoder else 2
    return Flops(
        traces(w.config, w.traces, w.num_latents, w.seq_len, passes=3, text_passes=text_passes),
        recomputed(w.config, w.remat, w.traces * w.num_latents, w.seq_len),
    )


def pass_over_text_too(w: Writing) -> Flops:
    """Counts a coprocessor that first reads the text itself, with a gradient through this pass."""
    latents = one_pass(w._replace(trains_decoder=True))
    return Flops(
        latents.useful + 3 * text(w.config, w.text_tokens, w.seq_len),
        latents.recomputed + recomputed(w.config, w.remat, w.text_tokens, w.seq_len),
    )


def pass_of_assistant_too(w: Writing) -> Flops:
    """Counts an assistant that reads the text once, and one pass of a coprocessor of its size."""
    latents = one_pass(w)
    reading = text(w.config, w.text_tokens, w.seq_len, outputs=False)
    return latents._replace(useful=latents.useful + reading)


def pass_per_latent(w: Writing) -> Flops:
    """Counts latents that are written one after another.

    Under the remat "full" the backward pass repeats the steps, and in each of them its layers.
    """
    latents = one_pass(w)
    times = 2 if w.remat == "full" else 1
    return latents._replace(recomputed=times * latents.recomputed)


def pass_per_thought(w: Writing) -> Flops:
    """Counts one pass over each latent but the last, whose output is not used."""
    return pass_per_latent(w._replace(num_latents=w.num_latents - 1))
