"""A decoder's folder: read part by part onto devices, written with its fingerprint.

config.json           {"format": "latent_delib decoder 1", "architecture": {fields of
                      TransformerConfig}}
model.safetensors     the leaves of the parameter tree, by their dotted names ("layers.attn.q");
                      layers are stacked on the first axis
fingerprint.json      {"sha256": the hash of config.json and model.safetensors, one after the other,
                      "config_sha256", "model_bytes": the size of model.safetensors}
tokenizer.model       a SentencePiece tokenizer; or tokenizer.json with tokenizer_config.json
chat_template.jinja   for an instruct model alone
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine.contents import by_name
from latent_delib.machine.files import read_json, read_text
from latent_delib.nn import transformer
from latent_delib.nn.sizes import TransformerConfig
from latent_delib.nn.transformer import Params
from latent_delib.weights import hub, tensors
from latent_delib.weights.tensors import TensorFile

FORMAT = "latent_delib decoder 1"
FINGERPRINT = "fingerprint.json"
REMEDY = f"copy the folder whole, or delete {FINGERPRINT} if you changed it yourself"
PACKAGED = Path(__file__).parent / "packaged"
CHAT_TEMPLATE = "chat_template.jinja"  # Hugging Face's name
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def local_path(path: str) -> Path:
    """Returns the local path that a decoder's path means.

    "packaged" comes with this package; "hf:OWNER/NAME" is on the Hugging Face Hub.

    Raises:
      UserError: the path is in a store, or the Hub does not give the model.
    """
    if "://" in path:
        raise UserError(f"decoder {path!r}: expected a local folder; download it, and name that")
    return PACKAGED if path == "packaged" else hub.download(path)


def is_ours(path: Path) -> bool:
    """Returns whether a path is a decoder folder of ours."""
    config = path / "config.json"
    return config.is_file() and "format" in read_json(config)


def is_theirs(path: Path) -> bool:
    """Returns whether a path is a GGUF file, or a folder in Hugging Face's form."""
    config = path / "config.json"
    return path.is_file() or (config.is_file() and "model_type" in read_json(config))


def find_decoder(path: str) -> Path:
    """Returns the decoder folder of ours that a path means.

    Raises:
      UserError: as `local_path` and `check_ours`.
    """
    folder = local_path(path)
    check_ours(folder, path)
    return folder


def check_ours(folder: Path, path: str) -> None:
    """Raises UserError unless `folder` is a decoder folder of ours; `path` is for messages."""
    if is_theirs(folder):
        raise UserError(
            f"decoder {path!r}: expected a folder that latent_delib.convert has made from it; "
            "only load_decoder reads it unconverted"
        )
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = folder / "decoder"
            remedy = f"; did you mean {inside}?" if inside.is_dir() else ""
            raise UserError(f"decoder {path!r}: {folder / name} does not exist{remedy}")
    tokenizer_path(folder)


def tokenizer_path(folder: Path) -> Path:
    """Returns the tokenizer's path in a folder, ours or Hugging Face's.

    If both are there, it is tokenizer.model, unless that lacks tokens which the model was given
    later: see `_lacks_tokens`.
    """
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: has no tokenizer, neither {' nor '.join(TOKENIZERS)}")
    if len(found) > 1 and _lacks_tokens(found[0]):
        return found[1]
    return found[0]


def _lacks_tokens(path: Path) -> bool:
    """Tells whether tokenizer.model lacks tokens that the files beside it use.

    These are another BOS or EOS in tokenizer_config.json, and added tokens of the chat template.
    """
    from sentencepiece import SentencePieceProcessor

    config_path = path.with_name("tokenizer_config.json")
    if not config_path.is_file():
        return False
    config = read_json(config_path)

    def spelling(token: Any) -> Any:
        return token.get("content") if isinstance(token, dict) else token

    model = SentencePieceProcessor(model_file=str(path))
    pieces = set(model.id_to_piece(list(range(model.vocab_size()))))
    for name, own in (("bos_token", model.bos_id()), ("eos_token", model.eos_id())):
        wanted = spelling(config.get(name))
        if wanted is not None and (own < 0 or wanted != model.id_to_piece(own)):
            return True
    template = chat_template(path.parent) or ""
    added = config.get("added_tokens_decoder")
    entries = list(added.values()) if isinstance(added, dict) else []
    listed = read_json(path.with_name("tokenizer.json")).get("added_tokens")
    entries += listed if isinstance(listed, list) else []  # `transformers` 5 lists them here alone
    tokens = {token for token in map(spelling, entries) if isinstance(token, str)}
    return any(token in template for token in tokens - pieces)


def sentencepiece_config(path: Path) -> dict[str, Any]:
    """Returns the tokenizer_config.json with which `transformers` reads a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = SentencePieceProcessor(model_file=str(path))
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    # The classes differ in whether a space is put before a text.
    class_name = "LlamaTokenizer" if proto.normalizer_spec.add_dummy_prefix else "GemmaTokenizer"
    fields = {"tokenizer_class": class_name, "add_bos_token": True}
    for name in ("bos", "eos", "unk", "pad"):
        i = getattr(model, f"{name}_id")()
        if i >= 0:
            fields[f"{name}_token"] = model.id_to_piece(i)
    return fields


def tokenizer_writer(folder: Path) -> Callable[[Path], None] | None:
    """Returns a function that copies a folder's tokenizer into another folder, if it has one."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    return functools.partial(copy_tokenizer, tokenizer_path(folder))


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copies a tokenizer to a decoder folder, with the files that belong to it, if they exist.

    These are tokenizer_config.json, for a tokenizer.json, and the model's chat template.
    """
    template = chat_template(path.parent)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, "utf-8")
    is_json = path.suffix == ".json"
    shutil.copyfile(path, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
    config = path.parent / "tokenizer_config.json"
    if is_json and config.is_file():
        shutil.copyfile(config, folder / "tokenizer_config.json")


def chat_template(folder: Path) -> str | None:
    """Returns the chat template in a folder; None where there is none.

    The template has a file of its own. Older releases of `transformers` wrote it into
    tokenizer_config.json instead: one template, or several with names, of which "default" is used.

    Raises:
      UserError: the file is not UTF-8; tokenizer_config.json holds no such template, but something
        else.
    """
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return read_text(file)
    config = folder / "tokenizer_config.json"
    stored = read_json(config).get("chat_template") if config.is_file() else None
    several = stored if isinstance(stored, list) else []
    for entry in several:
        if isinstance(entry, dict) and entry.get("name") == "default":
            stored = entry.get("template")
    if stored is not None and not isinstance(stored, str):
        raise UserError(
            f'{config}: chat_template: expected a text, or several, one of them "default"'
        )
    return stored


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
            f"{model}: has {size} bytes, {stored.get('model_bytes')} in {FINGERPRINT}; {REMEDY}"
        )
    return stored["sha256"]


@functools.lru_cache(maxsize=1)
def _hash(config: bytes, model: Path, changed: int) -> str:
    """Returns the SHA-256 of a config and a model file, hex; cached until the file changes."""
    digest = hashlib.sha256(config)
    with open(model, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


@functools.cache
def shapes(config: TransformerConfig) -> Params:
    """Returns the parameter tree of a decoder as jax.ShapeDtypeStruct, float32."""
    return jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))


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


def load(
    folder: Path, config: TransformerConfig, dtype: Any, shardings: Params | None = None
) -> Params:
    """Reads the weights onto the devices.

    Host memory holds one device's part of one tensor at a time.

    Args:
      folder: a decoder folder.
      config: its architecture.
      dtype: dtype of the arrays.
      shardings: the sharding of every leaf; None: all on the first device.

    Raises:
      UserError: as `open_tensors`.
    """
    file = open_tensors(folder, config)
    tree = shapes(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, tree)

    def place(
        path: tuple, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")

        def part(index: Any) -> np.ndarray:
            return file.read(name, index).astype(dtype, copy=False)

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return jax.tree.map_with_path(place, tree, shardings)


def write_model(
    folder: Path,
    config: TransformerConfig,
    entries: Mapping[str, tuple],
    chunks: Iterable[np.ndarray],
) -> None:
    """Writes a decoder's config.json, model.safetensors and fingerprint.json.

    Args:
      folder: an existing folder.
      config: the architecture.
      entries: name -> shape and dtype of every leaf.
      chunks: the data of all leaves; see `tensors.write`.
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
    (folder / FINGERPRINT).write_text(json.dumps(stored, indent=2) + "\n")
