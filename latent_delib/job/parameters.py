"""The parameters of a job: frozen ones, trained ones, and those that training begins with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment, lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS, param_axes
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.job.experiment import Experiment
from latent_delib.job.record import Record
from latent_delib.machine import checkpoint, seeds
from latent_delib.nn import transformer
from latent_delib.nn.transformer import Params
from latent_delib.weights import folder


def frozen_on_mesh(exp: Experiment) -> Params:
    """Returns the shapes of the frozen parameters, with dtype and shardings."""
    frozen = _decoder_shapes(exp.aug)
    if exp.adapts_start:
        frozen |= trainable_shapes(exp.aug)
    return _on_mesh(exp, frozen, exp.dtype)


def load_frozen(exp: Experiment) -> Params:
    """Loads the frozen parameters in the compute dtype, a tree for each model.

    "decoder": always.
    "assistant": if the method has one.
    "coprocessor": if training begins with a coprocessor and adds adapters to it.
    """
    frozen = {"decoder": place_decoder(exp, exp.dtype)}
    if exp.assistant_folder is not None:
        config = exp.aug.models.coprocessor.config
        shardings = build.decoder_shardings(exp.mesh, config)
        frozen["assistant"] = folder.load(exp.assistant_folder, config, exp.dtype, shardings)
    if exp.adapts_start:
        frozen |= place_start(exp, exp.dtype)
    return frozen


def _decoder_shapes(aug: Augmentation) -> Params:
    """Returns the shapes of the decoder and, where there is one, of the assistant."""
    return {reader: folder.shapes(model.config) for reader, model in aug.readers.items()}


def trainable_shapes(aug: Augmentation, rank: int = 0) -> Params:
    """Returns the shapes of a method's trainable tree, float32; `rank` as in `init_trainable`."""
    starting_decoder = augment.starting_decoder_of(_decoder_shapes(aug))
    return jax.eval_shape(init_trainable(aug, rank), seeds.key(0), starting_decoder)


def trainable_on_mesh(exp: Experiment) -> Params:
    """Returns the shapes of the trainable tree, float32, with shardings."""
    return _on_mesh(exp, trainable_shapes(exp.aug, exp.config.method.lora_rank))


def init_trainable(aug: Augmentation, rank: int) -> Callable[..., Params]:
    """Returns the function (key, decoder, start) -> trainable tree, float32.

    decoder: the decoder's tree or, where there is an assistant, the assistant's.
    start: a trained tree to begin with; `decoder` is then not read.

    Args:
      rank: the rank of adapters; 0: whole matrices are trained.
    """

    def init(key: jax.Array, decoder: Params | None, start: Params | None = None) -> Params:
        tree = start
        if tree is None:
            tree = METHODS[aug.method].init(key, decoder, aug)
        if rank:
            for i, name in enumerate(sorted(tree)):
                tree[name] = _adapters(jax.random.fold_in(key, i), tree[name], rank)
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return init


def _adapters(key: jax.Array, tree: Params, rank: int) -> Params:
    """Returns the trained part of a tree: adapters of its layers, and leaves no decoder has."""
    frozen = (*transformer.BODY, *transformer.TABLES)
    trained = {name: leaf for name, leaf in tree.items() if name not in frozen}
    if "layers" in tree:
        trained["layers"] = lora.init(key, tree["layers"], rank)
    return trained


def place_decoder(exp: Experiment, dtype: Any) -> Params:
    """Loads the decoder's weights onto the mesh in `dtype`; without a folder, draws them."""
    architecture = exp.aug.decoder.config
    shardings = build.decoder_shardings(exp.mesh, architecture)
    if exp.decoder_folder is not None:
        return folder.load(exp.decoder_folder, architecture, dtype, shardings)

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), transformer.init(key, architecture))

    return jax.jit(draw, out_shardings=shardings)(seeds.key(exp.config.seed))


def place_start(exp: Experiment, dtype: Any) -> Params:
    """Loads the whole tree that training begins with onto the mesh, in `dtype`.

    Additional soft tokens begin as copies of the last one in that tree.

    Raises:
      UserError: as `checked_start`.
    """
    _, step = exp.start
    checkpoints, latents = checked_start(exp)
    before = trainable_shapes(dataclasses.replace(exp.aug, num_latents=latents))
    wanted = {"trainable": _on_mesh(exp, before)}
    found = checkpoints.restore_newest(wanted, step=step)

    def fitted(x: jax.Array, here: jax.ShapeDtypeStruct) -> jax.Array:
        more = [(0, now - before) for before, now in zip(x.shape, here.shape, strict=True)]
        return jnp.pad(x.astype(dtype), more, mode="edge")

    here = _on_mesh(exp, trainable_shapes(exp.aug))
    fit = jax.jit(
        lambda tree: jax.tree.map(fitted, tree, here),
        out_shardings=jax.tree.map(lambda x: x.sharding, here),
    )
    return fit(found.trainable)


def checked_start(exp: Experiment) -> tuple[checkpoint.Checkpoints, int]:
    """Opens the checkpoint that training begins with, and checks it; reads no weights.

    Returns:
      The checkpoints of its run, and its number of latents.

    Raises:
      UserError: the checkpoint is missing or damaged, is of another decoder or method, has more
        soft tokens, or holds adapters.
    """
    given = f"config.method.start={exp.config.method.start}"
    checkpoints, meta = build.open_start(exp.config.method.start)
    there = Record.from_meta(meta, given)
    exp.record.require(there, "start", given)
    if there["method.lora_rank"]:
        raise UserError(f"{given}: holds adapters, expected whole weights; name another checkpoint")
    _require_room(exp, there, given)
    return checkpoints, there["method.num_latents"]


def _require_room(exp: Experiment, there: Record, given: str) -> None:
    """Raises UserError if the start's weights do not fit this method and number of latents.

    Additional soft tokens are made from the start's; additional keys and values are not.
    """
    latents = there["method.num_latents"]
    aug_before = dataclasses.replace(exp.aug, num_latents=latents)
    before = folder.by_name(trainable_shapes(aug_before))
    for name, leaf in folder.by_name(trainable_shapes(exp.aug)).items():
        shape = before[name].shape
        grows = name == "coprocessor.soft_tokens" and leaf.shape[0] > shape[0]
        if leaf.shape != shape and not grows:
            raise UserError(
                f"{given}: method.num_latents is {latents} there, {exp.aug.num_latents} here; "
                f"method {exp.aug.method!r} has weights for each latent; name another checkpoint"
            )


def _on_mesh(exp: Experiment, shapes: Params, dtype: Any = None) -> Params:
    """Returns shapes of parameters with their shardings, in `dtype` where given."""
    shardings = mesh_lib.parameters(exp.mesh, shapes, param_axes(exp.aug.method))

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)
