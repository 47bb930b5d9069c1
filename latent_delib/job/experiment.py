"""Turns a config into the objects of a job: its record, mesh, augmentation and parameters."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.data import questions
from latent_delib.data import tokenizer as tokenizers
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib import augment, lora
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS, param_axes
from latent_delib.delib.traces import latent_positions
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.job.checks import check
from latent_delib.job.record import Record
from latent_delib.machine import checkpoint
from latent_delib.nn import transformer
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.sizes import TransformerConfig, differences
from latent_delib.nn.transformer import Params
from latent_delib.weights import folder


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Holds a checked config and all that follows from it, except weights.

    record: describes the job, for comparison with checkpoints and results.
    dtype: of computations and of frozen weights.
    decoder: the decoder's folder; None for random weights.
    assistant: the assistant's folder, or None.
    start: workdir and step of the checkpoint that training begins with, or None.
    """

    config: ConfigDict
    record: Record
    aug: Augmentation
    mesh: Mesh
    dtype: Any
    tokenizer: Tokenizer
    decoder: Path | None
    assistant: Path | None
    start: tuple[str, int] | None

    @property
    def trains_whole_decoder(self) -> bool:
        """Returns whether every weight of the decoder is trained, so that no decoder is frozen."""
        method = self.config.method
        return METHODS[method.name].trains_decoder and not method.lora_rank

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """Returns the tokens of `method.prompt_end`."""
        return tuple(self.tokenizer.encode(self.config.method.prompt_end))

    @property
    def steps_end(self) -> tuple[int, ...]:
        """Returns the tokens behind the steps that latents stand for; none without a teacher."""
        return questions.steps_end(self.tokenizer) if self.config.method.distill else ()

    @property
    def adapts_start(self) -> bool:
        """Returns whether adapters are trained over the coprocessor that training begins with."""
        return self.start is not None and self.config.method.lora_rank > 0


def read(config: ConfigDict, devices: Sequence[Any] | None = None) -> Experiment:
    """Checks a config and builds its experiment on `devices`, by default all; loads no weights.

    Raises:
      UserError: the first thing found wrong, by key.
    """
    check(config)
    decoder = folder.locate(config.decoder.path) if config.decoder.path else None
    architecture = _architecture(config, decoder)
    tokenizer = _tokenizer(config, architecture)
    assistant = _assistant(config, tokenizer)
    coprocessor = _coprocessor(config, architecture, assistant)
    mesh = mesh_lib.make(config.mesh, devices)
    for each in (architecture, coprocessor or architecture):
        _check_splits(config, mesh, each)
        _check_positions(config, each)

    def model(architecture: TransformerConfig) -> transformer.Transformer:
        c = config.compute
        return build.transformer(architecture, mesh, c.dtype, c.remat, c.attention)

    return Experiment(
        config=config,
        record=_record(config, decoder, architecture, tokenizer, assistant),
        aug=Augmentation(
            transformer=model(architecture),
            method=config.method.name,
            num_latents=config.method.num_latents,
            placement=config.method.placement,
            loss_chunk=config.compute.loss_chunk,
            coprocessor=None if coprocessor is None else model(coprocessor),
            every=config.method.every,
            distill=config.method.distill,
        ),
        mesh=mesh,
        dtype=jnp.dtype(config.compute.dtype),
        tokenizer=tokenizer,
        decoder=decoder,
        assistant=assistant,
        start=build.split_start(config.method.start) if config.method.start else None,
    )


def _architecture(config: ConfigDict, decoder: Path | None) -> TransformerConfig:
    """Returns the decoder's architecture: its folder's, or the config's where it has no folder.

    The fields of the config must agree with the folder.
    """
    fields = config.decoder.architecture.to_dict()
    if decoder is None:
        if not fields:
            raise UserError(
                "config.decoder.path is empty: expected a decoder folder, "
                "or config.decoder.architecture"
            )
        return TransformerConfig.from_dict(fields, "config.decoder.architecture")
    architecture = folder.read_config(decoder)
    changed = dataclasses.asdict(architecture) | fields
    wanted = TransformerConfig.from_dict(changed, "config.decoder.architecture")
    differing = differences(architecture, wanted)
    if differing:
        raise UserError(f"config.decoder.architecture: {decoder} has {'; '.join(differing)}")
    return architecture


def tokenizer_path(config: ConfigDict) -> Path:
    """Returns the file of a config's tokenizer."""
    name = config.decoder.tokenizer
    decoder = config.decoder.path
    if name and name != "packaged":
        return Path(name)
    return folder.tokenizer_path(folder.locate(decoder if decoder and not name else "packaged"))


def _tokenizer(config: ConfigDict, architecture: TransformerConfig) -> Tokenizer:
    """Loads the config's tokenizer; the decoder must have a vector for each of its pieces."""
    tokenizer = Tokenizer(tokenizer_path(config))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise UserError(
            f"config.decoder.tokenizer: {tokenizer.path} has {tokenizer.vocab_size} pieces, "
            f"the decoder only {architecture.vocab_size} rows"
        )
    return tokenizer


def _assistant(config: ConfigDict, tokenizer: Tokenizer) -> Path | None:
    """Returns the assistant's folder; None without one.

    The assistant reads the decoder's tokens, so it must know each of them by the same number.
    """
    given = config.method.assistant
    if not given:
        return None
    try:
        assistant = folder.locate(given)
        theirs = Tokenizer(folder.tokenizer_path(assistant))
    except UserError as error:
        raise UserError(f"config.method.assistant: {error}") from None
    why = tokenizers.difference(tokenizer, theirs)
    if why:
        raise UserError(
            f"config.method.assistant={given}: {why}; expected a decoder with the tokenizer "
            f"{tokenizer.path}"
        )
    return assistant


def _coprocessor(
    config: ConfigDict, architecture: TransformerConfig, assistant: Path | None
) -> TransformerConfig | None:
    """Returns the coprocessor's architecture; None where it is the decoder's."""
    changed = config.method.coprocessor.to_dict()
    if assistant is not None:
        return folder.read_config(assistant)
    return build.coprocessor_config(architecture, changed) if changed else None


def _record(
    config: ConfigDict,
    decoder: Path | None,
    architecture: TransformerConfig,
    tokenizer: Tokenizer,
    assistant: Path | None,
) -> Record:
    """Returns the record of a job before its data are known and before its first step."""
    fields = architecture.to_dict()
    if decoder is None:
        random = json.dumps([fields, config.seed], sort_keys=True)
        fingerprint = hashlib.sha256(random.encode()).hexdigest()
    else:
        fingerprint = folder.fingerprint(decoder)
    of_assistant = {}
    if assistant is not None:
        of_assistant = {
            "fingerprint": folder.fingerprint(assistant),
            "architecture": folder.read_config(assistant).to_dict(),
        }
    return Record(
        config=json.loads(config.to_json_best_effort()),
        fingerprint=fingerprint,
        architecture=_plain(fields),
        data={"tokenizer": tokenizers.fingerprint(tokenizer.path)},
        assistant=_plain(of_assistant),
    )


def _plain(value: Any) -> Any:
    """Returns a value as JSON gives it back: without tuples."""
    return json.loads(json.dumps(value))


def _check_splits(config: ConfigDict, mesh: Mesh, architecture: TransformerConfig) -> None:
    """Raises UserError for heads, features or traces that the mesh does not divide."""
    positions = min(config.evaluate.positions, config.evaluate.max_length)
    for axis, key, length in (
        ("heads", "num_heads", architecture.num_heads),
        ("heads", "num_kv_heads", architecture.num_kv_heads),
        ("ffn", "ffn_dim", architecture.ffn_dim),
        ("traces", "config.method.num_traces", config.method.num_traces),
        ("traces", "config.evaluate.positions", positions),
    ):
        if length % mesh_lib.shards(mesh, axis):
            setting = mesh_lib.setting(mesh, axis)
            raise UserError(f"{setting} does not divide {key}={length}: expected a divisor of it")


def _check_positions(config: ConfigDict, architecture: TransformerConfig) -> None:
    """Raises UserError where texts and latents need more positions than a learned table has."""
    m = config.method
    moved = 0
    if METHODS[m.name].write is not None:
        moved = latent_positions(m.placement, m.num_latents)
    for key, tokens in (
        ("data.seq_len", config.data.seq_len),
        ("evaluate.max_length", config.evaluate.max_length),
    ):
        if architecture.learned_positions and tokens + moved > architecture.learned_positions:
            raise UserError(
                f"config.{key}={tokens}: with {moved} positions for latents, expected at most "
                f"{architecture.learned_positions}, the decoder's learned positions"
            )


# Parameters: the frozen ones, the trained ones, and those that training begins with.


def frozen_shapes(exp: Experiment) -> Params:
    """Returns the shapes of the frozen parameters, with dtype and shardings."""
    frozen = _decoder_shapes(exp)
    if exp.adapts_start:
        frozen |= _whole(exp)
    return _on_mesh(exp, frozen, exp.dtype)


def load_frozen(exp: Experiment) -> Params:
    """Loads the frozen parameters in the compute dtype: the decoder, as "decoder".

    The assistant is there as "assistant", if the method has one. Where adapters are trained over a
    start, its coprocessor is there too, as "coprocessor".
    """
    frozen = {"decoder": place_decoder(exp, exp.dtype)}
    if exp.assistant is not None:
        frozen["assistant"] = place_assistant(exp, exp.dtype)
    if exp.adapts_start:
        frozen |= place_start(exp, exp.dtype)
    return frozen


def _decoder_shapes(exp: Experiment) -> Params:
    """Returns the shapes of the decoder and, where there is one, of the assistant."""
    return {room: folder.shapes(model.config) for room, model in exp.aug.readers.items()}


def trainable_shapes(exp: Experiment) -> Params:
    """Returns the shapes of the trainable tree, float32, with shardings."""
    begun_from = augment.begun_from(_decoder_shapes(exp))
    init = init_trainable(exp.aug, exp.config.method.lora_rank)
    return _on_mesh(exp, jax.eval_shape(init, jax.random.key(0), begun_from))


def init_trainable(aug: Augmentation, rank: int) -> Callable[..., Params]:
    """Returns the function (key, decoder, start) -> trainable tree, float32.

    decoder is the assistant, where there is one. start is such a tree without adapters, or None;
    with it, the decoder is not used. rank is that of adapters; 0 trains all.
    """

    def init(key: jax.Array, decoder: Params | None, start: Params | None = None) -> Params:
        tree = start
        if tree is None:
            tree = METHODS[aug.method].init(key, decoder, aug.models, aug.num_latents)
        if rank:
            for i, room in enumerate(sorted(tree)):
                tree[room] = _adapters(jax.random.fold_in(key, i), tree[room], rank)
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return init


def _adapters(key: jax.Array, tree: Params, rank: int) -> Params:
    """Returns the trained part of a decoder or coprocessor: adapters, and all but its body."""
    frozen = (*transformer.BODY, *transformer.TABLES)
    trained = {name: leaf for name, leaf in tree.items() if name not in frozen}
    if "layers" in tree:
        trained["layers"] = lora.init(key, tree["layers"], rank)
    return trained


def place_decoder(exp: Experiment, dtype: Any) -> Params:
    """Loads the decoder's weights onto the mesh in `dtype`, or draws them without a folder."""
    architecture = exp.aug.transformer.config
    shardings = mesh_lib.parameters(exp.mesh, folder.shapes(architecture), PARAM_AXES)
    if exp.decoder is not None:
        return folder.load(exp.decoder, architecture, dtype, shardings)

    def draw(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), transformer.init(key, architecture))

    return jax.jit(draw, out_shardings=shardings)(jax.random.key(exp.config.seed))


def place_assistant(exp: Experiment, dtype: Any) -> Params:
    """Loads the assistant's weights onto the mesh in `dtype`, where those of a decoder lie."""
    architecture = exp.aug.models.coprocessor.config
    shardings = mesh_lib.parameters(exp.mesh, folder.shapes(architecture), PARAM_AXES)
    return folder.load(exp.assistant, architecture, dtype, shardings)


def place_start(exp: Experiment, dtype: Any) -> Params:
    """Loads the tree that training begins with onto the mesh, in `dtype`: all that was trained.

    Raises:
      UserError: the checkpoint is missing or damaged, is of another decoder, method or number of
        trained vectors, or holds adapters.
    """
    given = f"config.method.start={exp.config.method.start}"
    workdir, step = exp.start
    try:
        checkpoints, _, meta = checkpoint.open_for_reading(workdir, step)
    except UserError as error:
        raise UserError(f"{given}: {str(error).removeprefix(f'{workdir}: ')}") from None
    with contextlib.closing(checkpoints):
        there = Record.from_meta(meta, given)
        exp.record.require(there, "start", given)
        _require_same_vectors(exp, there, given)
        wanted = {"trainable": _on_mesh(exp, _whole(exp))}
        found = checkpoints.restore_newest(wanted, step=step)
    return jax.tree.map(lambda x: x.astype(dtype), found.trainable)


def _require_same_vectors(exp: Experiment, there: Record, given: str) -> None:
    """Raises UserError for a start of another number of latents, where each is a vector of its own.

    A method that trains one vector for all of them may go on with another number.
    """
    latents = there["method.num_latents"]
    if _whole(exp, latents) != _whole(exp):
        raise UserError(
            f"{given}: method.num_latents is {latents} there, {exp.aug.num_latents} here; "
            f"method {exp.aug.method!r} trains a vector for each; name another checkpoint"
        )


def _whole(exp: Experiment, num_latents: int | None = None) -> Params:
    """Returns the shapes of the config's trainable tree without adapters.

    num_latents: N_L; by default the config's.
    """
    count = num_latents or exp.aug.num_latents

    def init(key: jax.Array, decoder: Params) -> Params:
        return METHODS[exp.aug.method].init(key, decoder, exp.aug.models, count)

    return jax.eval_shape(init, jax.random.key(0), augment.begun_from(_decoder_shapes(exp)))


def _on_mesh(exp: Experiment, shapes: Params, dtype: Any = None) -> Params:
    """Returns shapes of parameters with their shardings, in `dtype` where given."""
    shardings = mesh_lib.parameters(exp.mesh, shapes, param_axes(exp.aug.method))
    return placed(shapes, shardings, dtype)


def placed(shapes: Any, shardings: Any, dtype: Any = None) -> Any:
    """Returns shapes that carry shardings, in `dtype` where given."""

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)
