"""Finds the folder of a decoder. Reads no weights, and needs no JAX."""

from pathlib import Path

from latent_delib.errors import UserError
from latent_delib.machine.files import read_json
from latent_delib.weights import hub
from latent_delib.weights.tokenizer_files import tokenizer_path

PACKAGED = Path(__file__).parent / "packaged"


def local_path(path: str) -> Path:
    """Returns the local path that a decoder's path means.

    "packaged" comes with this package; "hf:OWNER/NAME" is on the Hugging Face Hub.

    Raises:
      UserError: the path is in a store; or as `hub.download`.
      OSError: as `hub.download`.
    """
    if "://" in path:
        raise UserError(f"{path!r}: expected a local path; download it, and name that")
    return PACKAGED if path == "packaged" else hub.download(path)


def is_ours(path: Path) -> bool:
    """Returns whether a path is a decoder folder of ours."""
    config = path / "config.json"
    return config.is_file() and "format" in read_json(config)


def is_theirs(path: Path) -> bool:
    """Returns whether a path is a file, such as GGUF, or a folder in Hugging Face's form."""
    config = path / "config.json"
    return path.is_file() or (config.is_file() and "model_type" in read_json(config))


def find_decoder(path: str) -> Path:
    """Returns the decoder folder of ours that a path means.

    Raises:
      UserError, OSError: as `local_path` and `check_ours`.
    """
    folder = local_path(path)
    check_ours(folder, path)
    return folder


def check_ours(folder: Path, path: str) -> None:
    """Raises UserError unless `folder` is a decoder folder of ours; `path` is for messages."""
    if folder.is_file():
        raise UserError(
            f"decoder {path!r}: is a file; expected a decoder folder "
            "(latent_delib.convert makes one from a GGUF file)"
        )
    if is_theirs(folder):
        raise UserError(
            f"decoder {path!r}: is not converted yet; run latent_delib.convert --source={path} "
            "--out=DIR, and name DIR (only load_decoder reads it as it is)"
        )
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = folder / "decoder"
            remedy = f"; did you mean {inside}?" if inside.is_dir() else ""
            raise UserError(f"decoder {path!r}: {folder / name} does not exist{remedy}")
    tokenizer_path(folder)
