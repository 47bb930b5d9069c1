"""Writes the decoder that a job has trained, as a decoder folder in its workdir."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from latent_delib import mesh as mesh_lib
from latent_delib.delib import lora
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job import parameters
from latent_delib.job.build import TRAINED
from latent_delib.job.experiment import Experiment
from latent_delib.machine import files
from latent_delib.machine.workdir import is_remote
from latent_delib.nn.transformer import Params
from latent_delib.weights import folder, tokenizer_files


def check_free(exp: Experiment, workdir: str) -> None:
    """Raises UserError if the trained decoder would replace one that no training wrote there.

    In a bucket there is none: decoders are read from local folders alone.
    """
    path = Path(workdir) / "decoder"
    if is_remote(workdir) or not METHODS[exp.aug.method].trains_decoder or not path.exists():
        return
    used = [os.path.realpath(f) for f in (exp.decoder_folder, exp.assistant_folder) if f]
    if os.path.realpath(path) in used or not (path / TRAINED).exists():
        raise UserError(
            f"--workdir={workdir}: the trained decoder would replace {path}, which is not of this "
            "training; name another workdir"
        )


def export_decoder(
    exp: Experiment, workdir: str, step: int, trainable: Params, frozen: Params | None = None
) -> None:
    """Writes WORKDIR/decoder where the decoder was trained, in whole or by adapters.

    Every device gathers one leaf at a time.

    Args:
      step: the step of the weights; stored beside them.
      trainable: the trained tree.
      frozen: the decoder under the adapters; None: it is loaded.
    """
    if "decoder" not in trainable:
        return
    tree = trainable["decoder"]
    if not exp.trains_whole_decoder:
        frozen = frozen or parameters.place_decoder(exp, exp.dtype)
        below = jax.tree.map(lambda x: x.astype(jnp.float32), frozen)
        tree = jax.jit(lora.multiply_out)(lora.join(below, tree))
    leaves = folder.by_name(tree)
    dtype = jnp.dtype(exp.config.decoder.export_dtype)
    gather = jax.jit(lambda x: x.astype(dtype), out_shardings=mesh_lib.replicated(exp.mesh))
    arrays = (np.asarray(gather(leaf)) for leaf in leaves.values())
    if jax.process_index():
        for _ in arrays:  # takes part in each gather
            pass
        return
    path = epath.Path(workdir) / "decoder"
    if is_remote(workdir):
        to_be_whole = files.uploaded_folder(path, last=TRAINED)
    else:
        to_be_whole = files.atomic_folder(Path(path), replace=True)
    with to_be_whole as partial:
        tokenizer_files.copy_tokenizer(exp.tokenizer.path, partial)
        entries = {name: (leaf.shape, dtype) for name, leaf in leaves.items()}
        folder.write_model(partial, exp.aug.decoder.config, entries, arrays)
        (partial / TRAINED).write_text(json.dumps({"step": step}) + "\n")
    print(f"trained decoder: {path}", flush=True)
