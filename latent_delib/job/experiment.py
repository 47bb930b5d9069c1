"""Turns a config into the objects of a job: its record, mesh, augmentation and parameters."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.data import questions
from latent_delib.data import tokenizer as tokenizer_lib
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.job.checks import check, replaces_steps
from latent_delib.job.preparation import check_vectors, tokenizer_of
from latent_delib.job.record import Record
from latent_delib.nn import transformer
from latent_delib.nn.sizes import TransformerConfig, differences
from latent_delib.weights import folder, locate, tokenizer_files


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Holds a checked config and all that follows from it, except weights.

    record: describes the job, for comparison with checkpoints and results.
    dtype: the dtype of computations and of frozen weights.
    decoder_folder: None for random weights.
    assistant_folder: None without an assistant.
    start: workdir and step of the checkpoint that training begins with, or None.
    """

    config: ConfigDict
    record: Record
    aug: Augmentation
    mesh: Mesh
    dtype: Any
    tokenizer: Tokenizer
    decoder_folder: Path | None
    assistant_folder: Path | None
    start: tuple[str, int] | None

    @property
    def trains_whole_decoder(self) -> bool:
        """Returns whether every weight of the decoder is trained, so that no decoder is frozen."""
        method = self.config.method
        return METHODS[method.name].trains_decoder and not method.lora_rank

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """Returns the tokens of `method.prompt_end`."""
        return tuple(self.tokenizer.encode_in_text(self.config.method.prompt_end))

    @property
    def steps_end(self) -> tuple[int, ...]:
        """Returns the tokens that end the written steps, if latents replace them; else none."""
        return questions.steps_end(self.tokenizer) if replaces_steps(self.config.method) else ()

    @property
    def adapts_start(self) -> bool:
        """Returns whether adapters are trained over the coprocessor that training begins with."""
        return self.start is not None and self.config.method.lora_rank > 0


def read(config: ConfigDict, devices: Sequence[Any] | None = None) -> Experiment:
    """Checks a config and builds its experiment on `devices`, by default all; loads no weights.

    Raises:
      UserError: the first mistake found; the message names its key.
    """
    check(config)
    decoder = locate.find_decoder(config.decoder.path) if config.decoder.path else None
    architecture = _architecture(config, decoder)
    tokenizer = _tokenizer(config, architecture)
    assistant = _assistant(config, tokenizer)
    record = _record(config, decoder, architecture, tokenizer, assistant)
    if config.method.start and config.method.lora_rank:
        with suppress(UserError):  # `parameters.checked_start` says why, once the start is needed
            _, meta = build.open_start(config.method.start)
            record = dataclasses.replace(record, start=build.start_fingerprint(meta))
    mesh = mesh_lib.make(config.mesh, devices)

    def model(architecture: TransformerConfig) -> transformer.Transformer:
        c = config.compute
        return build.transformer(architecture, mesh, c.dtype, c.remat, c.attention)

    aug = build.augmentation(record, architecture, model)
    aug = dataclasses.replace(aug, loss_chunk=config.compute.loss_chunk)
    _check_splits(config, mesh, architecture, "the decoder")
    if aug.coprocessor is not None:
        owner = "the coprocessor" if assistant is None else "the assistant"
        _check_splits(config, mesh, aug.coprocessor.config, owner)
    _check_positions(config, aug)
    return Experiment(
        config=config,
        record=record,
        aug=aug,
        mesh=mesh,
        dtype=jnp.dtype(config.compute.dtype),
        tokenizer=tokenizer,
        decoder_folder=decoder,
        assistant_folder=assistant,
        start=build.split_start(config.method.start) if config.method.start else None,
    )


def _architecture(config: ConfigDict, decoder: Path | None) -> TransformerConfig:
    """Returns the decoder's architecture, from its folder or, without a folder, from the config.

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


def _tokenizer(config: ConfigDict, architecture: TransformerConfig) -> Tokenizer:
    """Loads the config's tokenizer; raises UserError if the decoder has too few vectors for it."""
    tokenizer = Tokenizer(tokenizer_of(config))
    check_vectors(tokenizer, architecture.vocab_size)
    return tokenizer


def _assistant(config: ConfigDict, tokenizer: Tokenizer) -> Path | None:
    """Returns the assistant's folder; None without one.

    The assistant reads the decoder's tokens, so it must know each of them by the same number.
    """
    given = config.method.assistant
    if not given:
        return None
    try:
        assistant = locate.find_decoder(given)
        theirs = Tokenizer(tokenizer_files.tokenizer_path(assistant))
    except UserError as error:
        raise UserError(f"config.method.assistant: {error}") from None
    why = tokenizer_lib.difference(tokenizer, theirs)
    if why:
        raise UserError(
            f"config.method.assistant={given}: {why}; expected a decoder with the tokenizer "
            f"{tokenizer.path}"
        )
    return assistant


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
        architecture=fields,
        data={"tokenizer": tokenizer_lib.fingerprint(tokenizer.path)},
        assistant=of_assistant,
    )


def _check_splits(
    config: ConfigDict, mesh: Mesh, architecture: TransformerConfig, owner: str
) -> None:
    """Raises UserError for heads, features or traces that the mesh does not divide."""
    e = config.evaluate
    at_once = "positions" if e.positions <= e.max_length else "max_length"
    for axis, key, length in (
        ("heads", f"{owner}'s num_heads", architecture.num_heads),
        ("heads", f"{owner}'s num_kv_heads", architecture.num_kv_heads),
        ("ffn", f"{owner}'s ffn_dim", architecture.ffn_dim),
        ("traces", "config.method.num_traces", config.method.num_traces),
        ("traces", f"config.evaluate.{at_once}", e[at_once]),
    ):
        if length % mesh_lib.shards(mesh, axis):
            setting = mesh_lib.setting(mesh, axis)
            raise UserError(f"{setting} does not divide {key}={length}: expected a divisor of it")


def _check_positions(config: ConfigDict, aug: Augmentation) -> None:
    """Raises UserError where texts and latents need more positions than a learned table has."""
    for key, tokens in (
        ("data.seq_len", config.data.seq_len),
        ("evaluate.max_length", config.evaluate.max_length),
    ):
        if tokens > aug.longest_text:
            raise UserError(
                f"config.{key}={tokens}: expected at most {aug.longest_text}, the models' learned "
                "positions minus those that latents take"
            )
