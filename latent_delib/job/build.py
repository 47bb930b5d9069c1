"""Builds models for a mesh, and finds the checkpoint or the decoder that another job wrote."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError, store_errors
from latent_delib.job.record import Record
from latent_delib.machine import checkpoint, files
from latent_delib.machine.checkpoint import Checkpoints
from latent_delib.nn.attention.blocks import shared_memory_of
from latent_delib.nn.attention.choice import choose
from latent_delib.nn.attention.forms import FORMS
from latent_delib.nn.layers import PARAM_AXES, Partition
from latent_delib.nn.sizes import TransformerConfig, family
from latent_delib.nn.transformer import Params, Transformer
from latent_delib.weights import exported, folder

DTYPES = ("float32", "bfloat16")  # of parameters and of the computation
ATTENTION = ("auto", *FORMS)  # values of config.compute.attention
TRAINED = "trained.json"  # in the folder of a decoder that a job has trained: {"step": N}


def one_device() -> Mesh:
    """Returns the mesh of this process's first device."""
    return mesh_lib.make({}, jax.local_devices()[:1])


@functools.cache
def partition(mesh: Mesh) -> Partition:
    """Returns the division of work over a mesh.

    Each mesh has one such object, so that equal models compile once.
    """
    return Partition(
        constrain=mesh_lib.constrain(mesh),
        gather=mesh_lib.gather(mesh),
        product=mesh_lib.product(mesh),
        split=mesh_lib.split(mesh),
        row_shards=mesh_lib.shards(mesh, "batch"),
        shared_memory=shared_memory_of(mesh.devices.flat[0]),
    )


def transformer(
    config: TransformerConfig, mesh: Mesh, dtype: Any, remat: str = "none", form: str = "auto"
) -> Transformer:
    """Returns a model that divides its work over a mesh, with attention that fits the devices.

    Args:
      config: the model's architecture.
      dtype: the dtype it computes in.
      remat: a key of `nn.transformer.REMAT`.
      form: the form of attention, one of ATTENTION.
    """
    attention = choose(form, mesh.devices.flat[0], config, dtype)
    return Transformer(config, remat, partition(mesh), attention)


def decoder_shardings(mesh: Mesh, config: TransformerConfig) -> Params:
    """Returns the sharding of every leaf of a decoder, or of an assistant, on a mesh."""
    return mesh_lib.parameters(mesh, folder.shapes(config), PARAM_AXES)


def own_architecture(record: Record, decoder: TransformerConfig) -> TransformerConfig | None:
    """Returns the architecture of a run's coprocessor; None where it is the decoder's.

    It is that of the assistant, or differs from the decoder's in some fields.
    """
    if record.assistant:
        return TransformerConfig(**record.assistant["architecture"])
    changed = record["method.coprocessor"]
    if not changed:
        return None
    fields = dataclasses.asdict(decoder) | changed
    if "query_scale" not in changed and decoder.query_scale == decoder.head_dim**-0.5:
        fields["query_scale"] = 0.0  # it follows from the coprocessor's head_dim
    own = TransformerConfig.from_dict(fields, "config.method.coprocessor")
    try:
        family(own)  # an export names the weights as the family does
    except UserError as error:
        raise UserError(f"config.method.coprocessor: {error}") from None
    return own


def augmentation(
    record: Record,
    decoder: TransformerConfig,
    model: Callable[[TransformerConfig], Transformer] = Transformer,
) -> Augmentation:
    """Returns the method of a run, with its models, which `model` makes of their architectures."""
    own = own_architecture(record, decoder)
    return Augmentation(
        decoder=model(decoder),
        method=record["method.name"],
        num_latents=record["method.num_latents"],
        placement=record["method.placement"],
        coprocessor=None if own is None else model(own),
        every=record["method.every"],
        distill=record["method.distill"],
        visible_text=record["method.visible_text"],
    )


def longest_text(record: Record) -> int:
    """Returns how long a text the models of a run can read, `Augmentation.longest_text`."""
    decoder = TransformerConfig.from_dict(record.architecture, "decoder")
    return augmentation(record, decoder).longest_text


def split_start(path: str) -> tuple[str, int]:
    """Returns the workdir and the step of WORKDIR/checkpoints/STEP."""
    workdir, _, step = path.rstrip("/").rpartition("/checkpoints/")
    if not workdir or not step.isdigit():
        raise UserError(f"config.method.start={path}: expected WORKDIR/checkpoints/STEP")
    return workdir, int(step)


def open_start(path: str) -> tuple[Checkpoints, dict]:
    """Returns the checkpoints and the meta of WORKDIR/checkpoints/STEP, config.method.start.

    Raises:
      UserError: the checkpoint is missing or damaged.
    """
    workdir, step = split_start(path)
    try:
        return checkpoint.open_for_reading(workdir, step)
    except UserError as error:
        reason = str(error).removeprefix(f"{workdir}: ")
        raise UserError(f"config.method.start={path}: {reason}") from None


def start_fingerprint(meta: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a checkpoint's meta, hex. Equal training gives equal checkpoints."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def require_decoder(workdir: str, method: str) -> None:
    """Raises UserError if `workdir` is an export and `method` trained the decoder as well."""
    if METHODS[method].trains_decoder and exported.find_export(workdir) is not None:
        raise UserError(
            f"{workdir}: an export has no decoder, and method {method!r} trained one; "
            "name the training's workdir"
        )


def step_of_decoder(workdir: str) -> int | None:
    """Returns the step of the trained decoder in `workdir`; None without one."""
    file = epath.Path(workdir) / "decoder" / TRAINED
    with store_errors(file):
        return files.read_json(file)["step"] if file.exists() else None
