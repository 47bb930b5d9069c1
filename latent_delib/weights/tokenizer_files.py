"""Finds the tokenizer in a decoder's folder, ours or Hugging Face's; copies it with its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_delib.errors import UserError
from latent_delib.machine import arguments
from latent_delib.machine.files import read_json, read_text

# Hugging Face's names
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def tokenizer_path(folder: Path, remedy: str = "put one there") -> Path:
    """Returns the tokenizer's path in a folder, ours or Hugging Face's.

    If both are there, it is tokenizer.model, unless that lacks tokens which the model was given
    later: see `_lacks_tokens`.

    Raises:
      UserError: neither is there (the message gives the remedy), or tokenizer.model is not a
        SentencePiece model.
    """
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder}: has no tokenizer, neither {' nor '.join(TOKENIZERS)}; {remedy}")
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

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from None
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


def tokenizer_writer(folder: Path) -> Callable[[Path], None]:
    """Returns the function that copies a folder's tokenizer into another folder.

    The function raises UserError as `tokenizer_path`.
    """
    remedy = "put one there, or give one to `convert` with --tokenizer=PATH"
    return lambda out: copy_tokenizer(tokenizer_path(folder, remedy), out)


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Copies a tokenizer to a decoder folder, with the files that belong to it, if they exist.

    These are tokenizer_config.json, for a tokenizer.json; the model's chat template; and the tokens
    that end its texts.
    """
    write_end_tokens(folder, end_tokens(path.parent))
    template = chat_template(path.parent)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, "utf-8")
    is_json = path.suffix == ".json"
    shutil.copyfile(path, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
    config = path.parent / "tokenizer_config.json"
    if is_json and config.is_file():
        shutil.copyfile(config, folder / "tokenizer_config.json")


def end_tokens(folder: Path) -> list[int]:
    """Returns the token ids that end a text of the model in a Hugging Face folder.

    They are the `eos_token_id` of config.json and of generation_config.json, where these exist.

    Raises:
      UserError: one of them is neither a number nor a list of numbers.
    """
    found = []
    for file in (folder / GENERATION, folder / "config.json"):
        if file.is_file():
            stored = read_json(file).get("eos_token_id")
            found += arguments.end_tokens(f"{file}: eos_token_id", stored)
    return list(dict.fromkeys(found))


def write_end_tokens(folder: Path, tokens: list[int]) -> None:
    """Writes the tokens that end a text into a decoder folder, if there are any."""
    if tokens:
        text = json.dumps({"eos_token_id": tokens}) + "\n"
        (folder / GENERATION).write_text(text)


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
