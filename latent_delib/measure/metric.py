"""The metrics of an evaluation: each sums terms over tokens, and makes a figure of the sums.

A metric is one entry of METRICS. Its figures are in perplexity.json, and its sums for each document
in documents.npz. This example tells how often the n-th token ahead is the most probable token:

  def is_first_choice(logits, targets):
      return logits.argmax(axis=-1) == targets

  hits = {"hits": of_logits(is_first_choice)}
  ACCURACY = Metric("accuracy", hits, lambda sums: sums["hits"] / sums["tokens"])
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.loss import tokens_at_a_time
from latent_delib.delib.step import Score
from latent_delib.nn import transformer
from latent_delib.nn.transformer import Params


class Metric(NamedTuple):
    """Describes a figure of the n-th token ahead, under the decoder and with latents.

    name: the keys in a row of perplexity.json are decoder_NAME and augmented_NAME.
    terms: the terms that are added up over tokens, by name. Metrics may share a term by its name.
    pool: (sums by name, with the number of tokens as "tokens") -> the figure.
    """

    name: str
    terms: Mapping[str, Score]
    pool: Callable[[Mapping[str, Any]], float]


def of_logits(value: Callable[[jax.Array, jax.Array], jax.Array]) -> Score:
    """Returns the term that computes `value` from the logits of each token.

    Logits exist for as few tokens at a time as in the loss.

    Args:
      value: takes logits, float32 [..., V], and targets, int32 [...]; returns a number for each
        target.
    """

    def term(aug: Augmentation, params: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
        B, D = x.shape[0], x.shape[-1]
        table_VD = transformer.output_table(params["decoder"])
        x_RBD = jnp.moveaxis(x.reshape(B, -1, D), 1, 0)
        targets_RB = jnp.moveaxis(targets.reshape(B, -1), 1, 0)

        def of_one_column(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            x_BD, targets_B = inputs
            logits_BV = transformer.unembed(table_VD, x_BD, aug.decoder.config)
            return value(logits_BV, targets_B)

        chunk = tokens_at_a_time(aug.loss_chunk, B, aug.decoder.partition.row_shards)
        value_RB = jax.lax.map(of_one_column, (x_RBD, targets_RB), batch_size=chunk)
        return jnp.moveaxis(value_RB, 0, 1).reshape(targets.shape)

    return term


PERPLEXITY = Metric("ppl", {"nll": augment.nll}, lambda sums: np.exp(sums["nll"] / sums["tokens"]))

METRICS = (PERPLEXITY,)


def all_terms() -> dict[str, Score]:
    """Returns the terms of all metrics by name."""
    terms: dict[str, Score] = {}
    for metric in METRICS:
        terms |= metric.terms
    return terms
