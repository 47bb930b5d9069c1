"""Any checkpoint to a decoder folder of ours, and ours to Hugging Face's form.

  python -m latent_delib.convert --source=PATH --out=DIR [--dtype=bfloat16] [--size=NAME] [--tokenizer=PATH]
  python -m latent_delib.convert --source=PATH --out=DIR --to=huggingface

PATH is a Hugging Face folder, a GGUF file, one of Google DeepMind's Gemma checkpoints (orbax), or a decoder folder of
ours (`packaged` is one). The workdir of a training job gives its coprocessor, as a folder of its own (docs/weights.md).
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from latent_delib.data.tokenizer import Tokenizer
from latent_delib.delib import augment
from latent_delib.errors import UserError
from latent_delib.lm import load
from latent_delib.machine import checkpoint, commands, files
from latent_delib.machine.progress import Progress
from latent_delib.nn.sizes import SIZES, TransformerConfig, differences, family
from latent_delib.weights import coprocessor, deepmind, folder, gguf, huggingface, names, tensors
from latent_delib.weights.source import Source

FORMS = ("latent_delib", "huggingface")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def main(flags: Any) -> None:
    convert(flags.source, flags.out, flags.to, flags.dtype, flags.size, flags.tokenizer)


def convert(
    source: str,
    out: str,
    to: str = "latent_delib",
    dtype: str = "",
    size: str = "",
    tokenizer: str = "",
    architecture: TransformerConfig | None = None,
) -> None:
    """Converts one checkpoint; `out` appears only once whole. Host memory holds one tensor at a time.

    Args:
      to: "latent_delib" or "huggingface".
      dtype: "float32", "bfloat16", or "" for what loses nothing: bfloat16 where the source is that, float32 elsewhere.
      size: a key of SIZES that the source must have. architecture: the same for a size without a name.
      tokenizer: a tokenizer file, for sources that carry none.

    Raises:
      UserError: anything wrong with source or arguments, in most cases before a weight is read.
    """
    for name, value, allowed in (("to", to, FORMS), ("dtype", dtype, ("", *DTYPES)), ("size", size, ("", *SIZES))):
        if value not in allowed:
            raise UserError(f"--{name}={value!r}: expected one of {', '.join(filter(None, allowed))}")
    for name, value in (("source", source), ("tokenizer", tokenizer)):
        if "://" in value:
            raise UserError(f"--{name}={value}: expected a local path; download it, and name that")
    if "://" in out:
        raise UserError(f"--out={out}: expected a local path; copy it there afterwards")
    wanted = SIZES[size] if size else architecture
    where = folder.PACKAGED if source == "packaged" else Path(source)
    if (where / "checkpoints").is_dir():
        if to != "latent_delib" or dtype or size or tokenizer:
            raise UserError(f"{source}: --to, --dtype, --size and --tokenizer are of decoders, this is a coprocessor")
        return export_coprocessor(source, Path(out))
    with files.whole(Path(out)) as partial_:
        if is_ours(where):
            if tokenizer:
                raise UserError(f"--tokenizer={tokenizer}: {source} is a decoder folder of ours, which has its own")
            convert_ours(where, partial_, to, dtype, wanted)
        elif to == "huggingface":
            raise UserError(f"--to=huggingface: {source} is no decoder folder of ours; convert it to one first")
        else:
            convert_theirs(open_source(where, wanted), partial_, dtype, wanted, tokenizer)
    print(f"{out}: done", flush=True)


def is_ours(where: Path) -> bool:
    """Whether a path is a decoder folder of ours."""
    return (where / "config.json").is_file() and "format" in folder.read_json(where / "config.json")


def open_source(where: Path, wanted: TransformerConfig | None = None) -> Source:
    """Somebody's checkpoint, by what lies at the path."""
    if where.is_file():
        return gguf.open_source(where)
    if (where / "config.json").is_file():
        return huggingface.open_source(where)
    if any((where / mark).exists() for mark in deepmind.MARKS):
        return deepmind.open_source(where, wanted)
    if where.is_dir() and where.parent.name == "checkpoints" and where.name.isdigit():
        raise UserError(f"--source={where}: is inside the workdir {where.parents[1]}; name that")
    found = "is a folder with nothing known in it" if where.is_dir() else "does not exist"
    raise UserError(
        f"--source={where}: {found}; expected a GGUF file, a folder with config.json, or an orbax checkpoint of Gemma"
    )


def convert_theirs(
    source: Source, out: Path, dtype: str, wanted: TransformerConfig | None, tokenizer: str = ""
) -> None:
    """Writes a decoder folder of ours from a source; see `convert`."""
    config = source.architecture
    found = names.match(source.shapes, config, source.form, source.where)
    describe(config, wanted, source.where)
    write_tokenizer = partial(folder.copy_tokenizer, Path(tokenizer)) if tokenizer else source.write_tokenizer
    if write_tokenizer is None:
        raise UserError(f"{source.where}: has no tokenizer; give one with --tokenizer=PATH")
    if tokenizer:
        Tokenizer(tokenizer)  # one line that names what was given, not its copy
    write_tokenizer(out)
    pieces = Tokenizer(folder.tokenizer_path(out)).vocab_size
    if pieces > config.vocab_size:
        raise UserError(f"{source.where}: its tokenizer has {pieces} pieces, its token table {config.vocab_size} rows")

    leaves = folder.by_name(folder.shapes(config))
    found.sort(key=lambda t: list(leaves).index(t.leaf))  # one order of the file, whatever it was made from
    kept = {leaf: DTYPES[dtype] if dtype else np.dtype(ml_dtypes.bfloat16) for leaf in leaves}
    if not dtype:
        for t in found:  # float32 where any layer of the leaf needs it
            if source.dtypes[t.name] != DTYPES["bfloat16"]:
                kept[t.leaf] = DTYPES["float32"]
    entries = {t.leaf: (leaves[t.leaf].shape, kept[t.leaf]) for t in found}
    chunks = (t.to_ours(source.read(t.name)).astype(kept[t.leaf], copy=False) for t in found)
    folder.write_model(out, config, entries, progress(chunks, entries))


def convert_ours(where: Path, out: Path, to: str, dtype: str, wanted: TransformerConfig | None) -> None:
    """Writes a decoder folder of ours in Hugging Face's form, or in ours and another dtype."""
    folder.locate(str(where))
    config = folder.read_config(where)
    describe(config, wanted, str(where))
    file = folder.open_tensors(where, config)
    folder.copy_tokenizer(folder.tokenizer_path(where), out)

    def kept(leaf: str) -> np.dtype:
        return DTYPES[dtype] if dtype else file.dtypes[leaf]

    if to == "latent_delib":
        entries = {leaf: (file.shapes[leaf], kept(leaf)) for leaf in folder.by_name(folder.shapes(config))}
        chunks = (file.read(leaf).astype(kept(leaf), copy=False) for leaf in entries)
        return folder.write_model(out, config, entries, progress(chunks, entries))
    tokenizer = Tokenizer(folder.tokenizer_path(where))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtypes = {str(kept(leaf)) for leaf in file.shapes}
    fields = huggingface.config_json(config, "float32" if "float32" in dtypes else "bfloat16", ids)
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if (out / "tokenizer.model").is_file():
        about = huggingface.tokenizer_config(out / "tokenizer.model")
        (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    wanted_tensors = list(names.tensors(config, "huggingface"))
    entries = {t.name: (t.shape, kept(t.leaf)) for t in wanted_tensors}
    chunks = (
        t.to_theirs(file.read(t.leaf, ... if t.layer is None else t.layer)).astype(kept(t.leaf), copy=False)
        for t in wanted_tensors
    )
    tensors.write(out / "model.safetensors", entries, progress(chunks, entries), {"format": "pt"})


def export_coprocessor(workdir: str, out: Path) -> None:
    """Writes the newest coprocessor of a training job as a folder; see `weights.coprocessor`."""
    trained = load.load_coprocessor(workdir)
    if trained.architecture is not None:
        raise UserError(f"{workdir}: a resized coprocessor has no form of its own to be exported in")
    checkpoints, _, meta = checkpoint.open_for_reading(workdir, trained.step)
    checkpoints.close()
    params = trained.params
    if meta["method.lora_rank"]:  # multiplied out
        decoder = load.load_decoder(load.decoder_of(workdir, meta)).params
        params = augment.assemble({"decoder": decoder}, {"coprocessor": params})["coprocessor"]
    fields = {name: getattr(trained, name) for name in ("method", "num_latents", "placement", "step", "fingerprint")}
    coprocessor.save(out, fields, TransformerConfig.from_dict(meta["architecture"], workdir), params)
    print(f"{out}: the coprocessor of step {trained.step}", flush=True)


def describe(config: TransformerConfig, wanted: TransformerConfig | None, where: str) -> None:
    """Says what an architecture is; raises UserError where it is not the one wanted."""
    if wanted is not None and (differing := differences(config, wanted)):
        raise UserError(f"{where}: not of that size: {'; '.join(differing)}")
    size = next((name for name, size in SIZES.items() if not differences(config, size)), "of no known size")
    count = sum(leaf.size for leaf in jax.tree.leaves(folder.shapes(config)))
    print(f"{where}: {family(config)}, {size}, {count:,} parameters", flush=True)


def progress(chunks: Iterator[np.ndarray], entries: dict[str, tuple]) -> Iterator[np.ndarray]:
    """Passes chunks on and says how many of the bytes are through."""
    total = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in entries.values())
    done, say = 0, Progress("written", total, "bytes")
    for chunk in chunks:
        yield chunk
        done += chunk.nbytes
        say(done)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        source=(commands.REQUIRED, "what to convert"),
        out=(commands.REQUIRED, "the folder to write, made whole or not at all"),
        to=("latent_delib", "latent_delib or huggingface"),
        dtype=("", "float32 or bfloat16; left out, nothing is rounded"),
        size=("", "the size it must have, a key of latent_delib/nn/sizes.py; Gemma orbax folders of others need it"),
        tokenizer=("", "tokenizer.model or tokenizer.json, for sources without one"),
    )
