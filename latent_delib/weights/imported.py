"""Turns a decoder of another form into our form: tensors for a folder, or arrays on devices."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_delib.errors import UserError
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params
from latent_delib.weights import deepmind, folder, gguf, huggingface, names, tensors
from latent_delib.weights.source import Source

Entries = Mapping[str, tuple[tuple[int, ...], np.dtype]]


def open_source(where: Path, wanted: TransformerConfig | None = None) -> Source:
    """Opens a decoder of another form; its files show which form it is.

    Args:
      where: a GGUF file, a folder in Hugging Face's form, or an orbax checkpoint of Gemma.
      wanted: the architecture of an orbax checkpoint; None: the known size that fits.

    Raises:
      UserError: there is nothing of these forms, or the decoder is damaged or not supported.
    """
    if where.is_file():
        return gguf.open_source(where)
    if (where / "config.json").is_file():
        return huggingface.open_source(where)
    if any((where / mark).exists() for mark in deepmind.MARKS):
        return deepmind.open_source(where, wanted)
    if where.is_dir() and where.parent.name == "checkpoints" and where.name.isdigit():
        raise UserError(f"{where}: is inside the workdir {where.parents[1]}; name that")
    found = "is a folder without a known decoder" if where.is_dir() else "does not exist"
    raise UserError(
        f"{where}: {found}; expected a GGUF file, a folder with config.json, "
        "an orbax checkpoint of Gemma, or hf:OWNER/NAME"
    )


def tensors_of(source: Source, dtype: str = "") -> tuple[Entries, Iterator[np.ndarray]]:
    """Returns the tensors of a source as a decoder folder of ours holds them.

    Args:
      source: a decoder of another form.
      dtype: "float32", "bfloat16", or "" to round nothing. Then a leaf is bfloat16 if all its
        layers are, else float32.

    Returns:
      Name -> shape and dtype of every leaf, in order; and the data of the leaves in that order,
      read one tensor of the source at a time.

    Raises:
      UserError: tensors are missing, unknown or of a wrong shape.
    """
    config = source.architecture
    found = names.match(source.shapes, config, source.form, source.where)
    leaves = folder.by_name(folder.shapes(config))
    order = list(leaves)
    found.sort(key=lambda t: order.index(t.leaf))  # one order, whatever the form of the source
    kept = dict.fromkeys(leaves, np.dtype(dtype or "bfloat16"))
    if not dtype:
        for t in found:
            if source.dtypes[t.name] != np.dtype("bfloat16"):
                kept[t.leaf] = np.dtype("float32")
    entries = {t.leaf: (leaves[t.leaf].shape, kept[t.leaf]) for t in found}

    def read(t: names.Tensor) -> np.ndarray:
        return t.to_ours(source.read(t.name)).astype(kept[t.leaf], copy=False)

    return entries, map(read, found)


def check_vocabulary(source: Source, pieces: int) -> None:
    """Raises UserError if a tokenizer has more pieces than the source's token table has rows."""
    rows = source.architecture.vocab_size
    if pieces > rows:
        raise UserError(
            f"{source.where}: its tokenizer has {pieces} pieces, its token table {rows} rows; "
            "`convert` takes another with --tokenizer=PATH"
        )


def load(source: Source, dtype: Any, shardings: Params) -> tuple[Params, str]:
    """Reads a source onto the devices, as `folder.load` reads a folder that was made from it.

    Host memory holds one leaf at a time, with all of its layers.

    Args:
      source: a decoder of another form.
      dtype: dtype of the arrays.
      shardings: the sharding of every leaf.

    Returns:
      The parameters, and the fingerprint that such a folder would have.
    """
    entries, chunks = tensors_of(source)
    digest = hashlib.sha256(folder.config_text(source.architecture))
    digest.update(tensors.header(entries))
    placed = []
    for name, sharding in folder.by_name(shardings).items():
        leaf = _next_leaf(*entries[name], chunks)
        digest.update(tensors.raw(leaf))
        placed.append(_place(leaf, dtype, sharding))
    return jax.tree.unflatten(jax.tree.structure(shardings), placed), digest.hexdigest()


def _next_leaf(shape: tuple[int, ...], dtype: np.dtype, chunks: Iterator[np.ndarray]) -> np.ndarray:
    """Returns the next leaf, joined from chunks that each hold some of its layers."""
    leaf = np.empty(shape, dtype)
    flat = leaf.reshape(-1)
    done = 0
    while done < flat.size:
        chunk = next(chunks)
        flat[done : done + chunk.size] = chunk.reshape(-1)
        done += chunk.size
    return leaf


def _place(leaf: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts a leaf onto the devices, by its sharding."""
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: leaf[index].astype(dtype, copy=False)
    )
