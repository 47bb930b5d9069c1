"""A decoder's folder: read part by part onto devices, written with its fingerprint.

config.json           {"format": "latent_delib decoder 1", "architecture": {fields of
                      TransformerConfig}}
model.safetensors     the leaves of the parameter tree, by their dotted names ("layers.attn.q");
                      layers are stacked on the first axis
fingerprint.json      {"sha256": the hash of config.json and model.safetensors, one after the other,
                      "config_sha256", "model_bytes": the size of model.safetensors}, and the
                      "origin", if it was converted from a model on the Hub
tokenizer.model       a SentencePiece tokenizer; or tokenizer.json with tokenizer_config.json
chat_template.jinja   for an instruct model alone
generation_config.json
                      {"eos_token_id": the tokens that end a text}, where the source names any
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine import seeds
from latent_delib.machine.contents import by_name
from latent_delib.machine.files import read_json
from latent_delib.nn import transformer
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params
from latent_delib.weights import tensors
from latent_delib.weights.tensors import TensorFile

FORMAT = "latent_delib decoder 1"
FINGERPRINT = "fingerprint.json"
REMEDY = f"copy the folder whole, or delete {FINGERPRINT} if you changed it yourself"


def read_config(folder: Path) -> TransformerConfig:
    """Reads the architecture of a decoder folder."""
    path = folder / "config.json"
    fields = read_json(path)
    if fields.get("format") != FORMAT:
        raise UserError(f"{path}: format is {fields.get('format')!r}, expected {FORMAT!r}")
    return TransformerConfig.from_dict(fields.get("architecture", {}), f"{path}")


def config_text(config: TransformerConfig) -> bytes:
    """Returns the config.json of an architecture."""
    fields = {"format": FORMAT, "architecture": config.to_dict()}
    return (json.dumps(fields, indent=2) + "\n").encode()


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256 over config.json and model.safetensors, hex.

    Decoders with equal fingerprints are equal. `write_model` stores the fingerprint in
    fingerprint.json, so that weights are not hashed again. Older folders do not have that file: all
    their bytes are read.

    Raises:
      UserError: a file has changed since the fingerprint was stored.
    """
    path = folder / FINGERPRINT
    config = folder / "config.json"
    model = folder / "model.safetensors"
    if not path.is_file():
        return _hash(config.read_bytes(), model, model.stat().st_mtime_ns)
    stored = read_json(path)
    if not isinstance(stored.get("sha256"), str):
        raise UserError(f"{path}: sha256={stored.get('sha256')!r}, expected a string; {REMEDY}")
    if stored.get("config_sha256") != hashlib.sha256(config.read_bytes()).hexdigest():
        raise UserError(f"{config}: has changed since {FINGERPRINT} was written; {REMEDY}")
    size = model.stat().st_size
    if stored.get("model_bytes") != size:
        raise UserError(
            f"{model}: has {size} bytes, expected {stored.get('model_bytes')}; {REMEDY}"
        )
    return stored["sha256"]


def origin(folder: Path) -> dict[str, str]:
    """Returns the model on the Hub that a decoder was converted from; {} where there is none.

    "source" is its name with the commit, "dtype" the --dtype of the conversion, or "".
    """
    path = folder / FINGERPRINT
    return read_json(path).get("origin", {}) if path.is_file() else {}


@functools.lru_cache(maxsize=1)
def _hash(config: bytes, model: Path, changed: int) -> str:
    """Returns the SHA-256 of a config and a model file, hex; cached until the file changes."""
    digest = hashlib.sha256(config)
    with open(model, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


@functools.cache
def shapes(config: TransformerConfig) -> Params:
    """Returns the parameter tree of a decoder as jax.ShapeDtypeStruct, float32."""
    return jax.eval_shape(lambda: transformer.init(seeds.key(0), config))


def open_tensors(folder: Path, config: TransformerConfig) -> TensorFile:
    """Opens the weights of a decoder folder, without reading them.

    Raises:
      UserError: tensors are missing, unknown, or not of the shape that `config` says; all are
        listed.
    """
    file = TensorFile(folder / "model.safetensors")
    wanted = {name: leaf.shape for name, leaf in by_name(shapes(config)).items()}
    tensors.check_shapes(file.shapes, wanted, str(file.path), notes={})
    return file


def load(folder: Path, config: TransformerConfig, dtype: Any, shardings: Params) -> Params:
    """Reads the weights onto the devices.

    Host memory holds one device's part of one tensor at a time.

    Args:
      folder: a decoder folder.
      config: its architecture.
      dtype: dtype of the arrays.
      shardings: the sharding of every leaf.

    Raises:
      UserError: as `open_tensors`.
    """
    file = open_tensors(folder, config)

    def place(
        path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")

        def part(index: Any) -> np.ndarray:
            return file.read(name, index).astype(dtype, copy=False)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree.map_with_path(place, shapes(config), shardings)


def write_model(
    folder: Path,
    config: TransformerConfig,
    entries: Mapping[str, tuple],
    chunks: Iterable[np.ndarray],
    origin: Mapping[str, str] | None = None,
) -> None:
    """Writes a decoder's config.json, model.safetensors and fingerprint.json.

    Args:
      folder: an existing folder.
      config: the architecture.
      entries: name -> shape and dtype of every leaf.
      chunks: the data of all leaves; see `tensors.write`.
      origin: what the function `origin` is to return.
    """
    text = config_text(config)
    (folder / "config.json").write_bytes(text)
    digest = hashlib.sha256(text)
    config_sha256 = digest.hexdigest()
    tensors.write(folder / "model.safetensors", entries, chunks, digest=digest)
    stored = {
        "sha256": digest.hexdigest(),
        "config_sha256": config_sha256,
        "model_bytes": (folder / "model.safetensors").stat().st_size,
    }
    if origin:
        stored["origin"] = origin
    (folder / FINGERPRINT).write_text(json.dumps(stored, indent=2) + "\n")
