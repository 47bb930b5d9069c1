"""Decoders and coprocessors, loaded or begun: what `lm.AugmentedLM` is made of."""

import dataclasses
import os
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
from latent_delib.delib.coprocessor import Models
from latent_delib.delib.methods import METHODS
from latent_delib.delib.traces import PLACEMENTS
from latent_delib.errors import UserError
from latent_delib.job.build import DTYPES, coprocessor_config, one_device, split_start, step_of_decoder
from latent_delib.machine import arguments, checkpoint
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params, Transformer
from latent_delib.weights import coprocessor as exported
from latent_delib.weights import folder


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A frozen decoder. params: {"layers", "final_norm", "embedding" [V, D]}; fingerprint: SHA-256, hex."""

    config: TransformerConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Coprocessor:
    """What writes latents for one decoder.

    params: what it does not have are the decoder's own layers (`delib.augment.assemble`); "soft_tokens" is [L, D].
    step: None where untrained. architecture: None where it is the decoder's.
    """

    params: Params
    method: str
    num_latents: int
    placement: str
    fingerprint: str
    step: int | None = None
    architecture: TransformerConfig | None = None


def load_decoder(path: str | os.PathLike, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Decoder:
    """A decoder folder, or "packaged"; parameters in `dtype`, which is the dtype everything computes in, float32 or
    bfloat16, read straight to where they lie on `mesh` (by default the first device).

    Raises:
      UserError: missing files, or tensors that do not fit the architecture; another dtype.
    """
    where = folder.locate(arguments.path("path", path))
    dtype = _dtype(dtype)
    config = folder.read_config(where)
    shardings = mesh_lib.parameters(mesh or one_device(), folder.shapes(config), PARAM_AXES)
    params = folder.load(where, config, dtype, shardings)
    return Decoder(config, params, Tokenizer(folder.tokenizer_path(where)), folder.fingerprint(where))


def _dtype(dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise UserError(f"dtype={getattr(dtype, '__name__', dtype)}: expected {' or '.join(DTYPES)}")
    return found


def load_coprocessor(workdir: str | os.PathLike, step: int | None = None) -> Coprocessor:
    """The coprocessor a training job wrote to `workdir`, at its newest step or at `step`; or one that was exported.

    Raises:
      UserError: no such checkpoint or folder, or a checkpoint of a method that writes no latents.
    """
    workdir = arguments.path("workdir", workdir)
    if step is not None:
        step = arguments.whole("step", step, 0)
    if (Path(workdir) / exported.FILE).is_file():
        fields, params = exported.load(Path(workdir))
        if step not in (None, fields["step"]):
            raise UserError(f"{workdir}: holds the coprocessor of step {fields['step']}, not of step {step}")
        for key, known in (("method", METHODS), ("placement", PLACEMENTS)):
            if fields[key] not in known:
                raise UserError(f"{workdir}: {key}={fields[key]!r}, expected one of {', '.join(sorted(known))}")
        del fields["format"], fields["architecture"]
        return Coprocessor(params, **fields)

    def check(meta: dict[str, Any]) -> None:
        if METHODS[meta["method.name"]].write is None:
            raise UserError(f"{workdir}: method {meta['method.name']!r} has no coprocessor")

    checkpoints, *_ = checkpoint.open_for_reading(workdir, step)
    found = checkpoints.restore_newest(step=step, check=check)
    checkpoints.close()
    assert found is not None, "open_for_reading saw one"
    meta, params = found.meta, found.trainable["coprocessor"]
    method, num_latents, placement = (meta[f"method.{key}"] for key in ("name", "num_latents", "placement"))
    if meta["method.lora_rank"] and meta["method.start"]:
        below, begun = split_start(meta["method.start"])
        params = lora.lay_over(load_coprocessor(below, begun).params, params)
    fingerprint = meta["fingerprint"]
    if METHODS[method].trains_decoder:  # it belongs to the decoder that was trained with it
        fingerprint = folder.fingerprint(folder.locate(decoder_of(workdir, meta)))
    changed = meta["config"]["method"].get("coprocessor")
    architecture = coprocessor_config(TransformerConfig(**meta["architecture"]), changed) if changed else None
    return Coprocessor(params, method, num_latents, placement, fingerprint, found.step, architecture)


def decoder_of(workdir: str, meta: dict[str, Any]) -> str:
    """The folder of the decoder that a checkpoint in `workdir` goes with: the one it trained, or the one left frozen.

    Raises:
      UserError: it is one of random weights, which has no folder; or it was trained, and is there of another step; or
        training had another tokenizer than it has.
    """
    if METHODS[meta["method.name"]].trains_decoder:
        if (there := step_of_decoder(workdir)) != meta["step"]:
            found = "not written yet" if there is None else f"of step {there}"
            raise UserError(
                f"{workdir}: the decoder trained there is {found}, the checkpoint is of step {meta['step']}; "
                "it is written when training ends"
            )
        return f"{workdir}/decoder"
    if not (path := meta["config"]["decoder"]["path"]):
        raise UserError(
            f"{workdir}: trained with config.decoder.path='', on random weights that no folder holds; "
            "train on a decoder folder"
        )
    own = folder.tokenizer_path(folder.locate(path))
    if meta["data"]["fingerprint"]["tokenizer"] != tokenizer.fingerprint(own):
        raise UserError(f"{workdir}: trained with another tokenizer than {own}, the decoder's")
    return path


def init_coprocessor(decoder: Decoder, num_latents: int = 16, placement: str = "after", seed: int = 0) -> Coprocessor:
    """An untrained coprocessor: the decoder's weights, and soft tokens from random rows of its token table.

    Raises:
      UserError: an argument of another kind or out of range.
    """
    arguments.instance("decoder", decoder, Decoder, "load_decoder")
    if placement not in PLACEMENTS:
        raise UserError(f"placement={placement!r}: expected one of {sorted(PLACEMENTS)}")
    num_latents = arguments.whole("num_latents", num_latents, 1, decoder.config.vocab_size)
    seed = arguments.whole("seed", seed, 0, arguments.INT64)
    method = "cache_augmentation"
    model = Transformer(decoder.config)
    tree = METHODS[method].init(jax.random.key(seed), decoder.params, Models(model, model), num_latents)
    return Coprocessor(tree["coprocessor"], method, num_latents, placement, decoder.fingerprint)
