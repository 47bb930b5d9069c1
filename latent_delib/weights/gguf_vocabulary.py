"""Writes the vocabulary inside a GGUF as the tokenizer files that it was made from.

The files are tokenizer.json or a SentencePiece model, and two that only some models have: the chat
template, and the tokens that end a text. The reference is llama.cpp's reading of the same keys
(llama-vocab.cpp). As in llama.cpp, text is not normalized first; the original tokenizer.json of
some models does so (Qwen's composes accents).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latent_delib.errors import UserError
from latent_delib.machine import arguments
from latent_delib.weights.tokenizer_files import CHAT_TEMPLATE, write_end_tokens

# Besides EOS: the end of a turn, and of a message to a tool.
_ENDS = ("eot_token_id", "eom_token_id")
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> regular expressions that cut a text into words, applied one after the other.
_WORDS = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2],
    "llama-bpe": [_LLAMA3],
    "qwen2": [_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")],
    "smollm": [r"\p{N}", _GPT2],
}


class _Vocabulary(NamedTuple):
    """Holds a vocabulary.

    ids: token -> 0, 1, ..., in order.
    types: the type of every token.
    special: "bos", "eos", "pad" -> token, where the vocabulary names one.
    """

    ids: dict[str, int]
    types: list[int]
    special: dict[str, str]


def write(metadata: Mapping[str, Any], folder: Path, source: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json, or tokenizer.model, into an existing folder.

    Args:
      metadata: all keys of the GGUF and their values: str, int, float, bool and lists of these.
      folder: an existing folder.
      source: the GGUF's path, for messages.

    Raises:
      UserError: a key is missing, or does not describe a vocabulary of a known kind.
    """
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    writers = {"gpt2": _write_byte_level_bpe, "llama": _write_sentencepiece}
    try:
        write_files = _one_of(writers, "model", keys["model"])
        write_files(keys, _vocabulary(keys), folder)
        ends = [keys[name] for name in _ENDS if name in keys]
        write_end_tokens(folder, arguments.token_ids("eot_token_id", ends))
        if "tokenizer.chat_template" in metadata:
            template = metadata["tokenizer.chat_template"]
            (folder / CHAT_TEMPLATE).write_text(template, "utf-8")
    except KeyError as error:
        raise UserError(f"{source}: tokenizer.ggml.{error.args[0]} is missing") from None
    except OSError:  # a full disk
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(
            f"{source}: tokenizer.ggml holds no vocabulary of a known kind: {error}"
        ) from None


def _one_of(known: Mapping[str, Any], key: str, value: Any) -> Any:
    """Returns the entry of `known` that a key's value names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{key} is {value!r:.40}, expected one of {', '.join(known)}")
    return known[value]


def _vocabulary(keys: Mapping[str, Any]) -> _Vocabulary:
    tokens, types = keys["tokens"], list(keys["token_type"])
    ids = {token: i for i, token in enumerate(tokens)}
    if not len(ids) == len(tokens) == len(types):
        raise ValueError(
            f"{len(tokens)} tokens, {len(ids)} of them different, "
            f"{len(types)} entries in token_type"
        )
    special = {}
    keys_of = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    for name, key in keys_of.items():
        i = keys.get(key)
        if i is None:
            continue
        if not 0 <= i < len(tokens):
            raise ValueError(f"{key} is {i}, expected one of {len(tokens)} tokens")
        if types[i] != _UNKNOWN:  # some files call it a normal token, which text could spell
            types[i] = _CONTROL
        special[name] = tokens[i]
    return _Vocabulary(ids, types, special)


def _write_byte_level_bpe(keys: Mapping[str, Any], vocabulary: _Vocabulary, folder: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pre = keys.get("pre", "default")
    merges = [tuple(merge.split(" ")) for merge in keys["merges"]]
    bpe = models.BPE(vocabulary.ids, merges, ignore_merges=pre == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(bpe)
    regexes = map(tokenizers.Regex, _one_of(_WORDS, "pre", pre))
    words = [pre_tokenizers.Split(regex, "isolated") for regex in regexes]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    added = []
    for token, kind in zip(vocabulary.ids, vocabulary.types):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED
            added.append(tokenizers.AddedToken(token, normalized=False, special=special))
    tokenizer.add_tokens(added)  # in one call, because each goes over all tokens added so far
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    config = {f"{name}_token": vocabulary.special.get(name) for name in ("bos", "eos", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_sentencepiece(keys: Mapping[str, Any], vocabulary: _Vocabulary, folder: Path) -> None:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    ids, types, special = vocabulary
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(ids, keys["scores"], types, strict=True):
        # llama.cpp's converter spells spaces of user-defined pieces as spaces (Gemma has some).
        piece = token.replace(" ", "\u2581") if kind == _USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=kind)
        if kind == _UNKNOWN:
            special["unk"] = token
    if "unk" not in special:
        raise ValueError(f"no token is of type {_UNKNOWN} (unk)")
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(ids)
    trainer.byte_fallback = _BYTE in types
    for name, token in special.items():
        setattr(trainer, f"{name}_piece", token)  # the library finds the token by this name
        setattr(trainer, f"{name}_id", ids[token])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.add_dummy_prefix = keys.get("add_space_prefix", True)
    content = model.SerializeToString(deterministic=True)
    sentencepiece.SentencePieceProcessor(model_proto=content)  # raises if `content` is no model
    (folder / "tokenizer.model").write_bytes(content)
