"""Our own decoder folder: `config.json`, `model.safetensors`, `tokenizer.model`.

config.json holds {"format": "latent_delib decoder 1", "architecture": {fields of TransformerConfig}}. The tensors are
the leaves of the parameter tree under their dotted names, layers stacked on the first axis ("layers.attn.q").
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from latent_delib.errors import UserError
from latent_delib.nn import transformer
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params

FORMAT = "latent_delib decoder 1"
PACKAGED = Path(__file__).parent / "packaged"


def locate(path: str) -> Path:
    """The folder a decoder's path means: "packaged" is the one that comes with this package."""
    folder = PACKAGED if path == "packaged" else Path(path)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        if not (folder / name).is_file():
            raise UserError(f"decoder {path!r}: {folder / name} does not exist")
    return folder


def read_config(folder: Path) -> TransformerConfig:
    """The architecture of a decoder folder."""
    source = f"{folder / 'config.json'}"
    try:
        fields = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != FORMAT:
        raise UserError(f"{source}: format is {found!r}, expected {FORMAT!r}")
    return TransformerConfig.from_dict(fields.get("architecture", {}), source)


def fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights, hex: two decoders with the same one are the same decoder."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with open(folder / "model.safetensors", "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def shapes(config: TransformerConfig) -> Params:
    """The parameter tree of a decoder as jax.ShapeDtypeStruct, float32."""
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))


def load(folder: Path, config: TransformerConfig, place: Callable[[str, np.ndarray], Any]) -> Params:
    """Reads the weights, one tensor in host memory at a time.

    Args:
      place: puts a tensor of a dotted name where it belongs (dtype, sharding); its results are the leaves.

    Raises:
      UserError: tensors missing, unknown, or of another shape than `config` says; all are listed.
    """
    path = folder / "model.safetensors"
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(config))
    wanted = {jax.tree_util.keystr(p, simple=True, separator="."): leaf.shape for p, leaf in leaves}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            wrong = [f"missing {n} {s}" for n, s in wanted.items() if n not in found]
            wrong += [f"unknown {n} {s}" for n, s in found.items() if n not in wanted]
            wrong += [f"{n} is {found[n]}, expected {s}" for n, s in wanted.items() if found.get(n, s) != s]
            if wrong:
                raise UserError(f"{path}: " + "; ".join(wrong))
            return jax.tree.unflatten(tree, [place(name, file.get_tensor(name)) for name in wanted])
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def save(folder: Path, config: TransformerConfig, params: Params, tokenizer: Path) -> None:
    """Writes a decoder folder in the dtype of `params`; it appears under its name only once whole."""
    partial = folder.with_name(folder.name + f".tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.ascontiguousarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    save_file(tensors, partial / "model.safetensors")
    (partial / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
    fields = {"format": FORMAT, "architecture": dataclasses.asdict(config)}
    (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    shutil.copy(tokenizer, partial / "tokenizer.model")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
