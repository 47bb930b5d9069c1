"""Converts any checkpoint to a decoder folder of ours, and ours to Hugging Face's form.

  python -m latent_delib.convert --source=PATH --out=DIR
      [--dtype=bfloat16] [--size=NAME] [--tokenizer=PATH]
  python -m latent_delib.convert --source=PATH --out=DIR --to=huggingface

PATH is a Hugging Face folder, or its name on their Hub, as hf:google/gemma-2-2b; a GGUF file; one
of Google DeepMind's Gemma checkpoints (orbax); or a decoder folder of ours (`packaged` is one). If
PATH is the workdir of a training job, its coprocessor is exported (docs/weights.md).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib import augment, lora
from latent_delib.delib.methods import METHODS
from latent_delib.errors import UserError
from latent_delib.job import build
from latent_delib.job.record import OtherRun, Record
from latent_delib.lm import load
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.progress import Progress
from latent_delib.nn.sizes import SIZES, TransformerConfig, differences, family
from latent_delib.results.card import card
from latent_delib.weights import (
    exported,
    folder,
    hub,
    huggingface,
    imported,
    locate,
    names,
    tensors,
    tokenizer_files,
)
from latent_delib.weights.source import Source
from latent_delib.weights.tensors import TensorFile

FORMS = ("latent_delib", "huggingface")


def main(flags: Any) -> None:
    convert(flags.source, flags.out, flags.to, flags.dtype, flags.size, flags.tokenizer)


def convert(
    source: str,
    out: str,
    to: str = "latent_delib",
    dtype: str = "",
    size: str = "",
    tokenizer: str = "",
) -> None:
    """Converts one checkpoint; `out` appears only when it is complete.

    Host memory holds one tensor at a time. A coprocessor, however, is held whole; if it has
    adapters, so is the model that they are added to.

    Args:
      source: a checkpoint, as in this module's docstring.
      out: the folder to write.
      to: "latent_delib" or "huggingface".
      dtype: "float32", "bfloat16", or "" to round nothing: bfloat16 stays bfloat16, everything
        else becomes float32.
      size: a key of SIZES that the source must have.
      tokenizer: a tokenizer file, for sources that carry none.

    Raises:
      UserError: anything wrong with source or arguments, in most cases before a weight is read.
    """
    choices = {
        "to": (to, FORMS),
        "dtype": (dtype, ("", *build.DTYPES)),
        "size": (size, ("", *SIZES)),
    }
    for flag, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(
                f"--{flag}={value!r}: expected one of {', '.join(filter(None, allowed))}"
            )
    files.check_free(Path(out))
    wanted = SIZES[size] if size else None
    where = locate.local_path(source)
    if (where / exported.FILE).is_file():
        raise UserError(f"--source={source}: is an exported coprocessor already; copy the folder")
    if (where / "checkpoints").is_dir():
        if to != "latent_delib" or dtype or size or tokenizer:
            raise UserError(
                f"{source}: is a coprocessor; leave out --to, --dtype, --size and --tokenizer"
            )
        return export_coprocessor(source, Path(out))
    with files.atomic_folder(Path(out)) as partial_:
        if locate.is_ours(where):
            if tokenizer:
                raise UserError(f"--tokenizer={tokenizer}: leave it out; {source} has its own")
            convert_ours(where, partial_, to, dtype, wanted)
        elif to == "huggingface":
            raise UserError(
                f"--to=huggingface: {source} is no decoder folder of ours; convert it to one first"
            )
        else:
            origin = {}
            if source.startswith(hub.PREFIX):
                origin = {"source": hub.pinned(source), "dtype": dtype}
            theirs = imported.open_source(where, wanted)
            convert_theirs(theirs, partial_, dtype, wanted, tokenizer, origin)
    print(f"{out}: done", flush=True)


def convert_theirs(
    source: Source,
    out: Path,
    dtype: str,
    wanted: TransformerConfig | None,
    tokenizer: str,
    origin: dict[str, str],
) -> None:
    """Writes a decoder folder of ours from a source.

    Args:
      source: a decoder of another form.
      out: an existing folder.
      dtype, tokenizer: as for `convert`.
      wanted: the architecture that it must have, or None.
      origin: as `folder.origin` returns it.
    """
    config = source.architecture
    entries, chunks = imported.tensors_of(source, dtype)
    describe(config, wanted, source.where)
    write_tokenizer = source.write_tokenizer
    if tokenizer:
        Tokenizer(tokenizer)  # raises an error that names the given file, not its copy
        write_tokenizer = partial(tokenizer_files.copy_tokenizer, Path(tokenizer))
    write_tokenizer(out)
    imported.check_vocabulary(source, Tokenizer(tokenizer_files.tokenizer_path(out)).vocab_size)
    folder.write_model(out, config, entries, progress(chunks, entries), origin)


def convert_ours(
    where: Path, out: Path, to: str, dtype: str, wanted: TransformerConfig | None
) -> None:
    """Writes a decoder folder of ours in Hugging Face's form, or in ours and another dtype.

    wanted: the architecture that it must have, or None.
    """
    locate.find_decoder(str(where))
    config = folder.read_config(where)
    describe(config, wanted, str(where))
    file = folder.open_tensors(where, config)
    tokenizer = tokenizer_files.tokenizer_path(where)
    tokenizer_files.copy_tokenizer(tokenizer, out)
    dtypes = dict.fromkeys(file.dtypes, np.dtype(dtype)) if dtype else file.dtypes
    if to == "huggingface":
        return _write_huggingface(file, config, dtypes, Tokenizer(tokenizer), out)
    leaves = folder.by_name(folder.shapes(config))
    entries = {leaf: (file.shapes[leaf], dtypes[leaf]) for leaf in leaves}

    def read(leaf: str) -> np.ndarray:
        return file.read(leaf).astype(dtypes[leaf], copy=False)

    folder.write_model(out, config, entries, progress(map(read, entries), entries))


def _write_huggingface(
    file: TensorFile,
    config: TransformerConfig,
    dtypes: dict[str, np.dtype],
    tokenizer: Tokenizer,
    out: Path,
) -> None:
    """Writes config.json, tokenizer_config.json and model.safetensors as `transformers` has them.

    Args:
      file: the weights of a decoder folder of ours.
      config: its architecture.
      dtypes: to write each leaf in.
      tokenizer: its tokenizer.
      out: an existing folder, which holds the tokenizer's file.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids}
    if tokenizer.pad_id in tokenizer.control.values():  # others would show in decoded text
        ids["pad_token_id"] = tokenizer.pad_id
    dtype = "float32" if np.dtype("float32") in dtypes.values() else "bfloat16"
    fields = huggingface.config_json(config, dtype, ids)
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    if (out / "tokenizer.model").is_file():
        about = tokenizer_files.sentencepiece_config(out / "tokenizer.model")
        (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    theirs = names.fused(names.tensors(config, "huggingface"))
    entries = {}
    for name, parts in theirs.items():
        entries[name] = parts[0].shape, np.result_type(*(dtypes[t.leaf] for t in parts))

    def read(name: str) -> np.ndarray:
        parts = theirs[name]
        ours = [file.read(t.leaf, ... if t.layer is None else t.layer) for t in parts]
        return parts[0].to_theirs(ours).astype(entries[name][1], copy=False)

    tensors.write(
        out / "model.safetensors", entries, progress(map(read, theirs), entries), {"format": "pt"}
    )


def export_coprocessor(workdir: str, out: Path) -> None:
    """Writes the newest coprocessor of a training job as a folder (`weights.exported`)."""
    trained = load.load_coprocessor(workdir)
    record, params = trained.record, trained.params
    if record["method.lora_rank"] and "layers" in params:  # adapters are multiplied out
        below = {"decoder": load.load_decoder(load.decoder_of(workdir, record)).params}
        below |= load.load_assistant(trained)
        params = lora.multiply_out(augment.assemble(below, {"coprocessor": params})["coprocessor"])
    method = {**record.config["method"], "lora_rank": 0, "start": ""}  # without adapters now
    whole = dataclasses.replace(record, config={**record.config, "method": method}, start="")
    fields = {"fingerprint": trained.fingerprint, "record": whole.meta()}
    architecture = TransformerConfig.from_dict(record.architecture, workdir)
    config = build.augmentation(record, architecture).models.coprocessor.config
    trains_decoder = METHODS[trained.method].trains_decoder
    decoder = f"{workdir}/decoder" if trains_decoder else record["decoder.path"]
    origin = {} if trains_decoder else origin_of(decoder)
    about = card(whole, decoder, trained.fingerprint, origin, evaluation_of(workdir, record))
    exported.save(out, fields, config, params, about)
    print(f"{out}: the coprocessor of step {trained.step}", flush=True)


def origin_of(decoder: str) -> dict[str, str]:
    """Returns the origin of a decoder (`folder.origin`); {} where it is not at its path."""
    if decoder.startswith(hub.PREFIX):
        return {"source": decoder, "dtype": ""}
    return folder.origin(locate.local_path(decoder))


def evaluation_of(workdir: str, record: Record) -> dict[str, Any] | None:
    """Returns the evaluation of a checkpoint in its workdir.

    Returns None without an evaluation, or with one of another training or of a version before 0.2.
    """
    file = epath.Path(workdir) / "perplexity.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("step") != record.step or "interval_over" not in found:
        return None
    try:
        record.require_evaluated(found, str(file))
    except OtherRun:
        return None
    return found


def describe(config: TransformerConfig, wanted: TransformerConfig | None, where: str) -> None:
    """Prints the family, size and number of parameters of an architecture.

    Raises:
      UserError: it is not the one wanted.
    """
    differing = differences(config, wanted) if wanted is not None else []
    if differing:
        raise UserError(f"{where}: unlike --size: {'; '.join(differing)}")
    fitting = [name for name, size in SIZES.items() if not differences(config, size)]
    size = fitting[0] if fitting else "of no known size"
    count = sum(leaf.size for leaf in jax.tree.leaves(folder.shapes(config)))
    print(f"{where}: {family(config)}, {size}, {count:,} parameters", flush=True)


def progress(chunks: Iterator[np.ndarray], entries: Mapping[str, tuple]) -> Iterator[np.ndarray]:
    """Yields the chunks, and prints how many of the bytes are done."""
    total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in entries.values())
    return Progress("written", total, "bytes").over(chunks, lambda chunk: chunk.nbytes)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        source=(REQUIRED, "what to convert"),
        out=(REQUIRED, "the folder to write, made whole or not at all"),
        to=("latent_delib", "latent_delib or huggingface"),
        dtype=("", "float32 or bfloat16; nothing is rounded if left out"),
        size=("", "the size that the source must have, a key of nn/sizes.py; orbax may need it"),
        tokenizer=("", "tokenizer.model or tokenizer.json, for sources without one"),
    )
