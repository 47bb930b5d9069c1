"""Writes the vocabulary inside a GGUF as the files it was made from: tokenizer.json, or a SentencePiece model.

The reference is llama.cpp's reading of the same keys (llama-vocab.cpp). Like it, and unlike some tokenizer.json of the
same models (Qwen's composes accents first), the files written here take text as it is.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latent_delib.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> expressions that cut a text into words; each one cuts the pieces that those before it left.
_WORDS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "smollm": [r"\p{N}", _GPT2],
}


class _Vocabulary(NamedTuple):
    """Holds a vocabulary.

    ids: token -> 0, 1, ..., in order. types: of every token. special: "bos", "eos", "pad" -> token, where there is one.
    """

    ids: dict[str, int]
    types: list[int]
    special: dict[str, str]


class _Keys:
    """Reads the tokenizer.ggml keys of a GGUF, each checked when it is asked for."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        self._metadata = metadata
        self._source = source

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self._source}: tokenizer.ggml.{key}: {message}")

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """Returns the value of a key, which is of type `kind`; where it is missing, `default` if that is given."""
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is ...:
            raise self.error(key, "is missing")
        if value is not default and type(value) is not kind:  # a bool is no int
            raise self.error(key, f"is {type(value).__name__}, expected {kind.__name__}")
        return value

    def list_of(self, kind: type, key: str, length: int | None = None) -> list:
        """Returns the list of a key; its entries are of type `kind`, and of this number where it is given."""
        values = self.get(key, list)
        for i, value in enumerate(values):
            if type(value) is not kind:
                raise self.error(key, f"entry {i} is {type(value).__name__}, expected {kind.__name__}")
        if length not in (None, len(values)):
            raise self.error(key, f"has {len(values)} entries for {length} tokens")
        return values


def write(metadata: Mapping[str, Any], folder: Path, source: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json, or tokenizer.model, into an existing folder.

    Args:
      metadata: all keys of the GGUF and their values: str, int, float, bool and lists of these.
      folder: an existing folder.
      source: the GGUF's path, for messages.

    Raises:
      UserError: a key is missing, or does not describe a vocabulary of a known kind.
    """
    keys = _Keys(metadata, source)
    writers = {"gpt2": _write_byte_level_bpe, "llama": _write_sentencepiece}
    model = keys.get("model", str)
    if model not in writers:
        raise keys.error("model", f"is {model!r}, expected one of {', '.join(writers)}")
    writers[model](keys, _vocabulary(keys), folder)


def _vocabulary(keys: _Keys) -> _Vocabulary:
    tokens = keys.list_of(str, "tokens")
    types = list(keys.list_of(int, "token_type", len(tokens)))
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token:
            raise keys.error("tokens", f"entry {i} is empty")
        if token in ids:
            raise keys.error("tokens", f"entries {ids[token]} and {i} are both {token!r}")
        if not _NORMAL <= types[i] <= _BYTE:
            raise keys.error("token_type", f"entry {i} is {types[i]}, expected 1 to 6")
        ids[token] = i
    special = {}
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("pad", "padding_token_id")):
        i = keys.get(key, int, None)
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            raise keys.error(key, f"is {i}, expected one of {len(tokens)} tokens")
        if types[i] != _UNKNOWN:  # some files call them normal, and text could spell them
            types[i] = _CONTROL
        special[name] = tokens[i]
    return _Vocabulary(ids, types, special)


def _write_byte_level_bpe(keys: _Keys, vocabulary: _Vocabulary, folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    ids = vocabulary.ids
    pre = keys.get("pre", str, "default")
    if pre not in _WORDS:
        raise keys.error("pre", f"is {pre!r}, expected one of {', '.join(_WORDS)}")
    merges = [tuple(merge.split(" ")) for merge in keys.list_of(str, "merges")]
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not {*merge, "".join(merge)} <= ids.keys():
            raise keys.error("merges", f"entry {i} is {' '.join(merge)!r}, expected two tokens that make a third")
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    words = [pre_tokenizers.Split(tokenizers.Regex(expression), "isolated") for expression in _WORDS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = []
    for token, kind in zip(ids, vocabulary.types):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            added.append(tokenizers.AddedToken(token, normalized=False, special=kind != _USER_DEFINED))
    tokenizer.add_tokens(added)  # at once: each call goes over all tokens added so far
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    config = {f"{name}_token": vocabulary.special.get(name) for name in ("bos", "eos", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_sentencepiece(keys: _Keys, vocabulary: _Vocabulary, folder: Path) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    ids, types = vocabulary.ids, vocabulary.types
    scores = keys.list_of(float, "scores", len(ids))
    if not all(map(math.isfinite, scores)):
        raise keys.error("scores", "holds numbers that are not finite")
    unknown = [token for token, kind in zip(ids, types) if kind == _UNKNOWN]
    if len(unknown) != 1:
        raise keys.error("token_type", f"has {len(unknown)} entries of type {_UNKNOWN} (unknown), expected 1")
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(ids, scores, types):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(ids)
    trainer.byte_fallback = _BYTE in types
    for name, token in (vocabulary.special | {"unk": unknown[0]}).items():
        setattr(trainer, f"{name}_piece", token)  # the library finds them by these names
        setattr(trainer, f"{name}_id", ids[token])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.add_dummy_prefix = keys.get("add_space_prefix", bool, True)
    content = model.SerializeToString(deterministic=True)
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise keys.error("tokens", f"no SentencePiece vocabulary ({error})") from None
    (folder / "tokenizer.model").write_bytes(content)
