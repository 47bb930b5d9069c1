"""Computes the terms of every token, a batch at a time: frozen decoder and evaluated model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.step import Score, ahead_step, read_step
from latent_delib.errors import UserError
from latent_delib.job.experiment import Experiment
from latent_delib.measure.metric import all_terms
from latent_delib.measure.views import Case
from latent_delib.nn.transformer import Params

PlacedText = tuple[jax.Array, jax.Array]  # tokens and segments, int32 [B, T] each


class Steps(NamedTuple):
    """Holds the jitted `read_step` and `ahead_step`; no shape depends on the text."""

    read: Callable[..., Any]
    ahead: Callable[..., Any]


class Sides(NamedTuple):
    """Holds the parameters of the two models that are compared.

    plain: parameters of the frozen decoder, and of the assistant, which reads the same text.
    own: parameters of the evaluated model.
    decoder_is_trained: whether the decoder of the evaluated model was trained.
    """

    plain: Params
    own: Params
    decoder_is_trained: bool


class Values(NamedTuple):
    """Holds the terms of a batch on the host. Each field is a dict: name of a term -> array.

    plain: [B, T - 1], each next token of `Case.plain`, under the frozen decoder.
    own: [B, T - 1], each next token of `Case.own`, under the evaluated model without latents.
    ahead: [B, k, A], ahead tokens with latents after `Case.own_at`; None: no latents.
    """

    plain: dict[str, np.ndarray]
    own: dict[str, np.ndarray]
    ahead: dict[str, np.ndarray] | None

    def of(self, row: int) -> "Values":
        """Returns the values of one row."""
        return jax.tree.map(lambda x: x[row], self)


def jit_steps(exp: Experiment) -> Steps:
    """Jits the steps for the config's mesh; equal experiments in a process share them.

    Raises:
      UserError: a batch does not split over the mesh.
    """
    e = exp.config.evaluate
    shards = mesh_lib.shards(exp.mesh, "batch")
    if e.batch_size % shards:
        raise UserError(
            f"config.evaluate.batch_size={e.batch_size} does not split over {shards} devices"
        )
    terms = tuple(all_terms().items())
    return _jitted(exp.aug, exp.mesh, e.num_ahead, e.delay, e.temperature, terms)


@functools.cache
def _jitted(
    aug: Augmentation,
    mesh: Mesh,
    num_ahead: int,
    delay: int,
    temperature: float,
    terms: tuple[tuple[str, Score], ...],
) -> Steps:
    def score(aug: Augmentation, *arguments: Any) -> dict[str, jax.Array]:
        if temperature != 1:
            aug, *arguments = at_temperature(temperature, aug, *arguments)
        return {name: term(aug, *arguments) for name, term in terms}

    whole = mesh_lib.replicated(mesh)
    read = functools.partial(read_step, aug=aug, score=score)
    ahead = functools.partial(ahead_step, aug=aug, num_ahead=num_ahead, delay=delay, score=score)
    return Steps(jax.jit(read, out_shardings=(None, whole)), jax.jit(ahead, out_shardings=whole))


def at_temperature(
    temperature: float, aug: Augmentation, params: Params, x: jax.Array, targets: jax.Array
) -> tuple[Augmentation, Params, jax.Array, jax.Array]:
    """Returns the arguments of a `Score` changed so that the logits are divided by a temperature.

    The logits are cap * tanh(x . table / cap), so the outputs x and the softcap are divided by the
    temperature. In bfloat16 a temperature near 1 would be rounded to 1, so x becomes float32.
    """
    config = aug.decoder.config
    scaled = dataclasses.replace(config, final_softcap=config.final_softcap / temperature)
    aug = dataclasses.replace(aug, decoder=aug.decoder.clone(config=scaled))
    return aug, params, x.astype(jnp.float32) / temperature, targets


def sides_of(frozen: Params, trainable: Params) -> Sides:
    """Returns the two sides: the frozen decoder, and the model with a trained tree in it."""
    own = augment.assemble(frozen, trainable)
    plain = {name: weights for name, weights in frozen.items() if name != "coprocessor"}
    return Sides(plain, own, "decoder" in trainable)


def values_of(exp: Experiment, steps: Steps, sides: Sides, cases: Sequence[Case]) -> Values:
    """Computes a batch of cases on both sides.

    A text is read once, and a second time where the evaluated model has another decoder or another
    text. Its cache is then used for all its positions, `evaluate.positions` at a time. So the
    device holds the cache of batch_size x max_length tokens, and batch_size x positions traces. The
    host holds batch_size x max_length x num_ahead values. Every process gets all values.
    """
    donors = [case.donor for case in cases if case.donor is not None]
    text = _place_text(exp, [case.plain for case in cases] + donors)
    reading, plain = steps.read(sides.plain, *text)
    own = plain
    another_text = any(case.own is not case.plain for case in cases)
    if another_text:
        text = _place_text(exp, [case.own for case in cases] + donors)
    if another_text or sides.decoder_is_trained:
        reading, own = steps.read(sides.own, *text)
    parts = []
    if exp.aug.writes_latents:
        parts = _with_latents(exp, steps, sides.own, reading, text, cases)
    # Fetched only now: the device already has all its work.
    plain, own, parts = jax.device_get((plain, own, parts))
    ahead = None
    if parts:
        ahead = jax.tree.map(lambda *some: np.concatenate(some, axis=1), *parts)
    return Values(plain, own, ahead)


def _with_latents(
    exp: Experiment,
    steps: Steps,
    params: Params,
    reading: Any,
    text: PlacedText,
    cases: Sequence[Case],
) -> list[dict[str, jax.Array]]:
    """Computes the terms with latents, some positions at a time: [B, M, A] each.

    Args:
      params: the parameters of the evaluated model.
      reading: the result of `steps.read` for the text.
      text: the texts of the cases, and then of their donors.
    """
    at_once = _positions_at_once(exp)
    positions = _positions(exp, cases, at_once)
    donor_B = None  # the row whose latents a row gets; None: its own
    if cases[0].donor is not None:
        rows = np.arange(exp.config.evaluate.batch_size)
        rows[: len(cases)] += len(cases)  # the donors follow the cases
        donor_B = _place_rows(exp, rows)
    parts = []
    for first in range(0, positions.shape[1], at_once):
        at_BM = _place_rows(exp, positions[:, first : first + at_once])
        part, _ = steps.ahead(params, reading, *text, at_BM, donor_B)
        parts.append(part)
    return parts


def _positions_at_once(exp: Experiment) -> int:
    """Returns how many positions of a piece are computed together: at most as many as are drawn."""
    e = exp.config.evaluate
    at_once = min(e.positions, e.max_length)
    if not e.max_positions:
        return at_once
    shards = mesh_lib.shards(exp.mesh, "traces")
    return min(at_once, math.ceil(e.max_positions / shards) * shards)


def _positions(exp: Experiment, cases: Sequence[Case], at_once: int) -> np.ndarray:
    """Returns where each row's latents are written, int32 [B, a multiple of `at_once`].

    The rows of the donors follow the rows of the cases. Free entries hold T - 1, a position without
    ahead tokens.
    """
    e = exp.config.evaluate
    most = max(len(case.own_at) for case in cases)
    columns = max(1, math.ceil(most / at_once)) * at_once
    positions = np.full((e.batch_size, columns), e.max_length - 1, np.int32)
    for row, case in enumerate(cases):
        positions[row, : len(case.own_at)] = case.own_at
        if case.donor_at is not None:
            positions[len(cases) + row, : len(case.donor_at)] = case.donor_at
    return positions


def _place_text(exp: Experiment, pieces: Sequence[np.ndarray]) -> PlacedText:
    """Places the tokens and segments of a batch on the devices, padded."""
    shape = (exp.config.evaluate.batch_size, exp.config.evaluate.max_length)
    tokens = np.full(shape, exp.tokenizer.pad_id, np.int32)
    segment = np.zeros(shape, np.int32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = piece
        segment[row, : len(piece)] = 1
    return _place_rows(exp, tokens), _place_rows(exp, segment)


def _place_rows(exp: Experiment, x: np.ndarray) -> jax.Array:
    """Places the rows of a batch on the devices that compute them."""
    B = exp.config.evaluate.batch_size
    return mesh_lib.place_rows(exp.mesh, x[mesh_lib.local_rows(exp.mesh, B)], B)
