"""Loads decoders and coprocessors for `lm.model.AugmentedLM`, and makes untrained coprocessors."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_delib import mesh as mesh_lib
from latent_delib.data import tokenizer
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib import lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.job import build, parameters
from latent_delib.job.record import SHORT, Record
from latent_delib.job.words import settings_in_words
from latent_delib.lm import inputs
from latent_delib.machine import arguments, checkpoint, seeds
from latent_delib.nn.layers import PARAM_AXES, Axes
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params, Transformer
from latent_delib.weights import exported, folder, imported, locate, tokenizer_files
from latent_delib.weights.tensors import check_shapes


@dataclasses.dataclass(frozen=True, repr=False)
class Decoder:
    """Holds a frozen decoder.

    params: {"layers", "final_norm", "embedding" [V, D]}, and other leaves of the architecture.
    fingerprint: SHA-256, hex.
    """

    config: TransformerConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.num_layers} layers of width {c.embed_dim}, vocabulary of {c.vocab_size}"
        dtype = self.params["embedding"].dtype
        return f"Decoder({sizes}, {dtype}, fingerprint {self.fingerprint[:SHORT]})"


@dataclasses.dataclass(frozen=True, repr=False)
class Coprocessor:
    """Holds a coprocessor for one decoder.

    params: without the layers that are the decoder's own (`delib.augment.assemble`).
    record: describes its method and its training, and names the path of its assistant, if any.
    fingerprint: the SHA-256 of the decoder, hex; of the trained one, where training changed it.
    assistant: the assistant's parameters, if they are loaded already.
    """

    params: Params
    record: Record
    fingerprint: str
    assistant: Params | None = None

    @property
    def method(self) -> str:
        return self.record["method.name"]

    @property
    def num_latents(self) -> int:
        return self.record["method.num_latents"]

    @property
    def placement(self) -> str:
        return self.record["method.placement"]

    @property
    def step(self) -> int | None:
        """Returns the training step; None: untrained."""
        return self.record.step

    def __repr__(self) -> str:
        dtype = jax.tree.leaves(self.params)[0].dtype
        words = [self.method, f"{self.num_latents} latents"]
        words += settings_in_words(self.record.config["method"])
        words.append("untrained" if self.step is None else f"step {self.step}")
        words += [str(dtype), f"of decoder {self.fingerprint[:SHORT]}"]
        return f"Coprocessor({', '.join(words)})"


def load_decoder(
    path: str | os.PathLike,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Decoder:
    """Loads a decoder.

    Args:
      path: a decoder folder; a folder in Hugging Face's form; a GGUF file; "hf:OWNER/NAME", a
        folder of either form on the Hub; or "packaged".
      dtype: the dtype of parameters and computation: float32 or bfloat16.
      mesh: devices of the parameters, by default the first. Each parameter is read straight onto
        its devices.

    Raises:
      UserError: files are missing, tensors do not fit, or `dtype` is neither of these.
      OSError: the disk fails, or (Outage) the Hub does not answer.
    """
    name = arguments.path("path", path)
    dtype = inputs.checked_dtype(dtype)
    mesh = mesh or build.one_device()
    arguments.instance("mesh", mesh, Mesh, "mesh.make")
    where = locate.local_path(name)
    if locate.is_theirs(where):
        return _load_theirs(where, dtype, mesh)
    locate.check_ours(where, name)
    config = folder.read_config(where)
    params = folder.load(where, config, dtype, build.decoder_shardings(mesh, config))
    own = Tokenizer(tokenizer_files.tokenizer_path(where))
    return Decoder(config, params, own, folder.fingerprint(where))


def _load_theirs(where: Path, dtype: np.dtype, mesh: Mesh) -> Decoder:
    """Loads a decoder in Hugging Face's form or GGUF, as if it had been converted first."""
    source = imported.open_source(where)
    with tempfile.TemporaryDirectory() as scratch:
        source.write_tokenizer(Path(scratch))
        own = Tokenizer(tokenizer_files.tokenizer_path(Path(scratch)))
    imported.check_vocabulary(source, own.vocab_size)
    config = source.architecture
    params, fingerprint = imported.load(source, dtype, build.decoder_shardings(mesh, config))
    return Decoder(config, params, own, fingerprint)


def load_coprocessor(
    workdir: str | os.PathLike,
    step: int | None = None,
    assistant: str | os.PathLike = "",
) -> Coprocessor:
    """Loads the coprocessor that a training job wrote, or one that was exported.

    Args:
      workdir: the job's workdir; an exported coprocessor's folder or "hf:OWNER/NAME"; "packaged".
      step: the step of the checkpoint; by default the newest that can be read.
      assistant: the assistant's path, as in `load_decoder`; by default the path in training.
        AugmentedLM loads the assistant.

    Raises:
      UserError: no such checkpoint or folder, a damaged one, or one of a method that writes no
        latents; an assistant for a coprocessor that has none.
    """
    found = _load_coprocessor(workdir, step)
    if not assistant:
        return found
    record = found.record
    if not record.assistant:
        raise UserError(
            f"assistant={assistant}: method {found.method!r} has no assistant; leave it out"
        )
    method = {**record.config["method"], "assistant": arguments.path("assistant", assistant)}
    record = dataclasses.replace(record, config={**record.config, "method": method})
    return dataclasses.replace(found, record=record)


def _load_coprocessor(workdir: str | os.PathLike, step: int | None) -> Coprocessor:
    workdir = arguments.path("workdir", workdir)
    if step is not None:
        step = arguments.whole("step", step, 0)
    where = exported.find_export(workdir)
    if where is not None:
        return _exported(where, step)
    checkpoints, meta = checkpoint.open_for_reading(workdir, step)
    name = Record.from_meta(meta, workdir)["method.name"]
    if not METHODS[name].writes_latents:
        raise UserError(f"{workdir}: method {name!r} has no coprocessor")
    found = checkpoints.restore_newest(step=step)
    record = Record.from_meta(found.meta, workdir)
    params = found.trainable["coprocessor"]
    if record["method.lora_rank"] and record["method.start"]:
        _, meta = build.open_start(record["method.start"])
        if record.start not in ("", build.start_fingerprint(meta)):
            raise UserError(
                f"{workdir}: its adapters belong to another checkpoint than the one that is now at "
                f"{record['method.start']}"
            )
        start = _load_coprocessor(*build.split_start(record["method.start"]))
        params = lora.multiply_out(lora.join(start.params, params))
    fingerprint = record.fingerprint
    if METHODS[name].trains_decoder:  # it belongs to the decoder that was trained with it
        fingerprint = folder.fingerprint(locate.find_decoder(decoder_of(workdir, record)))
    return Coprocessor(params, record, fingerprint)


@contextlib.contextmanager
def _record_errors(where: Path) -> Iterator[None]:
    """Turns what a damaged record of an exported coprocessor raises into UserError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        file = where / exported.FILE
        raise UserError(f"{file}: record is damaged ({found}); export it again") from None


def _exported(where: Path, step: int | None) -> Coprocessor:
    fields, params = exported.load(where, step)
    with _record_errors(where):
        return _checked_export(fields, params, where)


def _checked_export(fields: dict[str, Any], params: Params, where: Path) -> Coprocessor:
    record = Record.from_meta(fields["record"], str(where))
    writing = [name for name, method in METHODS.items() if method.writes_latents]
    for key, known in (("method.name", writing), ("method.placement", PLACEMENTS)):
        if record[key] not in known:
            raise UserError(f"{where}: {key}={record[key]!r}, expected one of {sorted(known)}")
    found = Coprocessor(params, record, fields["fingerprint"])
    _check_shapes(found, where)
    return found


def _check_shapes(found: Coprocessor, where: Path) -> None:
    """Raises UserError unless a coprocessor's parameters have the shapes of its method."""
    aug = build.augmentation(found.record, TransformerConfig(**found.record.architecture))
    expected = parameters.trainable_shapes(aug)["coprocessor"]
    shapes = {name: leaf.shape for name, leaf in folder.by_name(found.params).items()}
    wanted = {name: leaf.shape for name, leaf in folder.by_name(expected).items()}
    source = f"{where}: method {found.method!r} with {found.num_latents} latents"
    check_shapes(shapes, wanted, source, notes={})


def read_record(workdir: str, step: int | None = None) -> Record:
    """Reads the record of a training job's newest checkpoint, or of `step`; reads no weights.

    Raises:
      UserError: no such checkpoint; an exported coprocessor of an older version.
    """
    where = exported.find_export(workdir)
    if where is not None:
        with _record_errors(where):
            return Record.from_meta(exported.read_fields(where, step)["record"], workdir)
    _, meta = checkpoint.open_for_reading(workdir, step)
    return Record.from_meta(meta, workdir)


def decoder_of(workdir: str, record: Record, moved: str = "") -> str:
    """Returns the folder of a checkpoint's decoder: the one it trained, or the frozen one.

    Args:
      record: the record of a checkpoint in `workdir`.
      moved: where the frozen decoder is now; "": at the path that training gave.

    Raises:
      UserError: the decoder's weights are random, so no folder holds them; the job trained the
        decoder, and its folder is of another step or `workdir` is an export; training used another
        tokenizer than the decoder's; the decoder is not there; or `moved` is another decoder.
    """
    build.require_decoder(workdir, record["method.name"])
    if METHODS[record["method.name"]].trains_decoder:
        if moved:
            raise UserError(f"--decoder={moved}: {workdir} has a decoder that it trained itself")
        there = build.step_of_decoder(workdir)
        if there != record.step:
            found = "not written yet" if there is None else f"of step {there}"
            raise UserError(
                f"{workdir}: its checkpoint is of step {record.step}, its decoder {found}; "
                "the decoder is written at the end of the training"
            )
        return f"{workdir}/decoder"
    if moved:
        found = folder.fingerprint(locate.find_decoder(moved))
        if found != record.fingerprint:
            raise UserError(
                f"--decoder={moved}: has fingerprint {found[:SHORT]}; the decoder of {workdir} "
                f"has {record.fingerprint[:SHORT]}"
            )
    path = moved or record["decoder.path"]
    if not path:
        raise UserError(
            f"{workdir}: trained with config.decoder.path='', "
            "on random weights that no folder holds; train on a decoder folder"
        )
    try:
        where = locate.find_decoder(path)
    except UserError as error:
        remedy = "if it is elsewhere, generate and benchmark take --decoder=PATH"
        raise UserError(f"{error}; {remedy}") from None
    own = tokenizer_files.tokenizer_path(where)
    if record["decoder.tokenizer"] != tokenizer.fingerprint(own):
        raise UserError(f"{workdir}: trained with another tokenizer than {own}, the decoder's")
    return path


def init_coprocessor(
    decoder: Decoder,
    num_latents: int = 16,
    placement: str = "after",
    seed: int = 0,
) -> Coprocessor:
    """Returns an untrained coprocessor of a decoder.

    It has the decoder's weights, and soft tokens from random rows of the token table.

    Raises:
      UserError: an argument is of the wrong type or out of range.
    """
    arguments.instance("decoder", decoder, Decoder, "load_decoder")
    if placement not in list(PLACEMENTS):
        raise UserError(f"placement={placement!r}: expected one of {sorted(PLACEMENTS)}")
    num_latents = arguments.whole("num_latents", num_latents, 1, decoder.config.vocab_size)
    seed = arguments.whole("seed", seed, 0, arguments.SEED)
    name = "cache_augmentation"
    aug = Augmentation(Transformer(decoder.config), name, num_latents, placement)
    tree = METHODS[name].init(seeds.key(seed), decoder.params, aug)
    method = {"name": name, "num_latents": num_latents, "placement": placement}
    record = Record({"method": method}, decoder.fingerprint)
    return Coprocessor(tree["coprocessor"], record, decoder.fingerprint)


def augmentation(
    decoder: Decoder,
    coprocessor: Coprocessor | None,
    mesh: Mesh,
    attention: str,
) -> Augmentation:
    """Returns both models as they run on a mesh.

    Raises:
      UserError: the coprocessor belongs to another decoder.
    """
    arguments.instance("mesh", mesh, Mesh, "mesh.make")
    dtype = decoder.params["embedding"].dtype
    model = partial(build.transformer, mesh=mesh, dtype=dtype, form=attention)
    if coprocessor is None:
        return Augmentation(model(decoder.config), "decoder", 0)
    arguments.instance("coprocessor", coprocessor, Coprocessor, "load_coprocessor")
    if coprocessor.fingerprint != decoder.fingerprint:
        theirs = coprocessor.fingerprint[:SHORT]
        this = decoder.fingerprint[:SHORT]
        raise UserError(
            f"the coprocessor belongs to the decoder with fingerprint {theirs}; this one has {this}"
        )
    return build.augmentation(coprocessor.record, decoder.config, model)


def load_assistant(
    coprocessor: Coprocessor,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Params:
    """Returns {"assistant": parameters}, loaded if need be; {} without an assistant.

    Raises:
      UserError: the assistant's path holds no decoder, or another one.
    """
    record = coprocessor.record
    if not record.assistant:
        return {}
    if coprocessor.assistant is not None:
        return {"assistant": coprocessor.assistant}
    path, fingerprint = record.config["method"]["assistant"], record["method.assistant"]
    remedy = "name its folder: load_coprocessor(..., assistant=PATH)"
    try:
        found = load_decoder(path, dtype, mesh)
    except UserError as error:
        raise UserError(f"the coprocessor's assistant: {error}; {remedy}") from None
    if found.fingerprint != fingerprint:
        theirs, this = fingerprint[:SHORT], found.fingerprint[:SHORT]
        raise UserError(
            f"the coprocessor's assistant has fingerprint {theirs}; {path} has {this}; {remedy}"
        )
    return {"assistant": found.params}


def place(mesh: Mesh, params: Params, dtype: Any, axes: Mapping[str, Axes] = PARAM_AXES) -> Params:
    """Puts parameters onto the devices of a mesh.

    They are cast and moved one by one, and need not all fit one device.
    """
    shardings = mesh_lib.parameters(mesh, params, axes)

    def put(x: Any, sharding: Any) -> jax.Array:
        return jax.device_put(x.astype(dtype, copy=False), sharding)

    return jax.tree.map(put, params, shardings)
