"""Text to token ids and back: one interface for commands, data and the Python interface."""

import hashlib
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from latent_delib.data import chat
from latent_delib.errors import UserError
from latent_delib.machine import arguments
from latent_delib.machine.files import read_json, read_text

# Separates documents. It is BOS where a vocabulary names none (Qwen's), and EOS too where it names
# neither (GPT-2's).
_SEPARATOR = "<|endoftext|>"
GENERATION = "generation_config.json"  # beside a tokenizer; Hugging Face's name
_LONGEST = 1 << 20  # characters that a library is given as one text
_NO_TEXT = "\u00ff"  # byte 255, as byte-level vocabularies spell it; UTF-8 text never has this byte


def files(path: str | Path) -> list[Path]:
    """Returns a tokenizer's files: one model, or tokenizer.json and tokenizer_config.json.

    Raises:
      UserError: one of the files does not exist, or is a folder.
    """
    path = Path(path)
    found = [path]
    if path.suffix == ".json":
        found.append(path.with_name("tokenizer_config.json"))
    for file in found:
        if file.is_dir():
            raise UserError(
                f"tokenizer {file}: is a folder; name its tokenizer.model or tokenizer.json"
            )
        if not file.is_file():
            raise UserError(f"tokenizer {file}: does not exist")
    return found


def fingerprint(path: str | Path) -> str:
    """Returns the SHA-256 of a tokenizer's files, hex. Equal hashes mean equal tokenizers."""
    digest = hashlib.sha256()
    for file in files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def difference(own: "Tokenizer", other: "Tokenizer") -> str:
    """Returns a message on the first difference between two tokenizers; "" if there is none.

    `other` must spell each token of `own` alike. It may have more tokens, and files of another
    form.
    """
    if other.vocab_size < own.vocab_size:
        return f"{other.path} has {other.vocab_size} pieces, not {own.vocab_size}"
    for token in range(own.vocab_size):
        here, there = own.spell(token), other.spell(token)
        if here != there:
            return f"token {token} of {other.path} is {there!r}, not {here!r}"
    return ""


class _Model(NamedTuple):
    """Holds a tokenizer as a library reads it from the files.

    encode: texts -> the ids of each.
    bos_id, eos_id, pad_id, no_text_id: None where the files name no such token.
    runs: tokens that the library decodes together where they follow each other: as one text, or as
      no text at all.
    """

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    spell: Callable[[int], str]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    no_text_id: int | None
    control: dict[str, int]
    runs: frozenset[int] = frozenset()


class Tokenizer:
    """Wraps a SentencePiece model, or a Hugging Face `tokenizer.json` where the path ends in .json.

    Padding is never read, so its id may be any that differs from BOS and that no text yields. The
    first of these that differs from BOS is taken:
      1. the files' own pad (Qwen's does not differ: it is the document separator, BOS here);
      2. EOS (Llama has no pad);
      3. another control token (SmolLM2's base model has one token for BOS and EOS, and no pad);
      4. a byte that no text has (GPT-2 has one control token).

    Attributes:
      vocab_size: the highest id + 1.
      bos_id, eos_id, pad_id: ids that text never becomes, even where it spells the token.
      eos_ids: all tokens that end a text of the model: eos_id, and those of the file
        generation_config.json beside the tokenizer, if any. An instruct model has several.
      control: spelling of a control token -> its id.
      spell: id -> the token's spelling, which is not readable text where the token holds bytes.
      chat_template: the content of chat_template.jinja beside the files; None without that file.

    Raises:
      UserError: a file is missing or broken; no token serves as BOS, as EOS or as padding.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        *_, names_tokens = files(path)
        read_model = _read_json if self.path.suffix == ".json" else _read_sentencepiece
        self._model = model = read_model(self.path)

        def required(name: str, value: int | None) -> int:
            if value is None:
                raise UserError(f"tokenizer {names_tokens}: names no token for {name}")
            return value

        self.spell = model.spell
        self.vocab_size = model.vocab_size
        self.control = model.control
        template = self.path.with_name(chat.FILE)
        self.chat_template = read_text(template) if template.is_file() else None
        self.bos_id = required("BOS", model.bos_id)
        self.eos_id = required("EOS", model.eos_id)
        self.eos_ids = [self.eos_id, *_further_ends(self.path.with_name(GENERATION))]
        pads = [model.pad_id, self.eos_id, *sorted(self.control.values()), model.no_text_id]
        usable = [pad for pad in pads if pad not in (None, self.bos_id)]
        self.pad_id = required("padding", usable[0] if usable else None)
        self._adds_space = model.decode(2 * self.encode("a")) == "a a"

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without BOS; the caller adds BOS where it belongs.

        A text of more than 2^20 characters is divided, to bound memory: after a line break, else
        before a space. The parts are tokenized separately, so tokens there may differ.

        Raises:
          UserError: `text` is not a str, or not Unicode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Returns `encode` of each text. Other threads of Python run meanwhile."""
        texts = list(texts)
        for text in texts:
            _check(text)
        short = [text if len(text) <= _LONGEST else "" for text in texts]
        found = self._model.encode(short)
        for i, text in enumerate(texts):
            if len(text) > _LONGEST:
                first, *later = _divided(text)
                found[i] = self.encode(first)
                for part in later:
                    found[i] += self.encode_in_text(part)
        return found

    def encode_in_text(self, text: str) -> list[int]:
        """Returns the token ids that a text has after a line break.

        Some vocabularies (Llama 2's) put a space before each text that is encoded alone; these ids
        are without it.
        """
        if not self._adds_space:
            return self.encode(text)
        line_break = self.encode("\n")
        ids = self.encode("\n" + text)
        if ids[: len(line_break)] != line_break:
            return self.encode(text)
        return ids[len(line_break) :]

    def decode_in_text(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids that follow other text.

        If `encode` adds a space before a text, `decode` drops a space at the start of a text. This
        function keeps that space.
        """
        if not self._adds_space:
            return self.decode(ids)
        return self.decode([*self.encode("a"), *ids]).removeprefix("a")

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the token ids of a conversation, up to where the model's next message begins.

        The ids are a whole prompt: the template writes BOS where the model wants it. Only the
        template writes control tokens: a message that spells a control token holds it as text.

        Args:
          messages: dicts {"role": TEXT, "content": TEXT}; the template defines the roles.

        Raises:
          UserError: the model has no chat template; messages have another form; the template
            refuses them.
        """
        conversation = chat.checked("messages", messages)
        if self.chat_template is None:
            raise UserError(
                f"tokenizer {self.path}: has no {chat.FILE} beside it, so its model cannot chat; "
                "convert an instruct model (again, if an older version converted it)"
            )
        tokens = {"bos_token": self.spell(self.bos_id), "eos_token": self.spell(self.eos_id)}
        text = chat.render(self.chat_template, chat.marked(conversation, self.control), tokens)
        longest_first = sorted(self.control, key=len, reverse=True)
        control = "|".join(map(re.escape, longest_first))
        ids: list[int] = []
        for part in re.split(f"({control})", text):
            if part in self.control:
                ids.append(self.control[part])
            else:
                ids += self.encode(part.replace(chat.MARK, ""))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids.

        Control tokens, padding and ids beyond the vocabulary become no text.
        """
        found = arguments.token_ids("ids", ids)
        for token in found:
            if token < 0:
                raise UserError(f"ids: token {token}, expected at least 0")
        kept = [token for token in found if token < self.vocab_size and token != self.pad_id]
        return self._model.decode(kept)

    def settled(self, ids: Sequence[int]) -> str:
        """Returns `decode_in_text` of ids, without any end that later tokens may still change.

        Such an end exists because a character may be spread over several tokens.
        """
        kept = arguments.token_ids("ids", ids)
        leave_open = self._model.runs.union(self.control.values())
        while kept and (kept[-1] in leave_open or kept[-1] >= self.vocab_size):
            kept.pop()
        return self.decode_in_text(kept).rstrip("\ufffd")  # stands for part of a character


def _check(text: str) -> None:
    """Raises UserError unless a text is a str of Unicode."""
    if not isinstance(text, str):
        raise UserError(f"text={reprlib.repr(text)}: expected a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text: character {error.start} is {text[error.start]!a}, which is not Unicode"
        ) from None


def _divided(text: str) -> Iterator[str]:
    """Yields parts of a text, each shorter than _LONGEST: up to a line break, else to a space."""
    start = 0
    while len(text) - start >= _LONGEST:
        end = start + _LONGEST - 1
        after_line = text.rfind("\n", start, end) + 1
        before_space = text.rfind(" ", start + 1, end)
        cuts = [cut for cut in (after_line, before_space, end) if cut > start]
        yield text[start : cuts[0]]
        start = cuts[0]
    yield text[start:]


def _further_ends(file: Path) -> list[int]:
    """Returns the eos_token_id of a generation_config.json, as a list; [] without the file."""
    if not file.is_file():
        return []
    return arguments.end_tokens(f"{file}: eos_token_id", read_json(file).get("eos_token_id"))


def _read_sentencepiece(path: Path) -> _Model:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError(f"tokenizer {path}: not a SentencePiece model ({error})") from None

    def known(token_id: int) -> int | None:
        return None if token_id < 0 else token_id

    size = model.vocab_size()
    return _Model(
        encode=lambda texts: [model.encode(text) for text in texts],
        decode=model.decode,
        spell=model.id_to_piece,
        vocab_size=size,
        bos_id=known(model.bos_id()),
        eos_id=known(model.eos_id()),
        pad_id=known(model.pad_id()),
        no_text_id=None,
        control={model.id_to_piece(i): i for i in range(size) if model.is_control(i)},
    )


def _read_json(path: Path) -> _Model:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        line = " ".join(str(error).split())
        raise UserError(f"tokenizer {path}: not a tokenizer.json ({line})") from None
    model.encode_special_tokens = True  # text that spells a control token is text
    model.no_truncation()
    model.no_padding()

    source = path.with_name("tokenizer_config.json")
    config = read_json(source)

    if model.token_to_id(_SEPARATOR) is not None and config.get("bos_token") is None:
        config["bos_token"] = _SEPARATOR
        if config.get("eos_token") is None:
            config["eos_token"] = _SEPARATOR

    def token_id(key: str) -> int | None:
        value = config.get(key)
        if value is None:
            return None
        token = value.get("content") if isinstance(value, dict) else value
        found = model.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise UserError(
                f"tokenizer {source}: {key} is {reprlib.repr(value)}, expected a token of {path}"
            )
        model.add_special_tokens([token])  # or text could spell it, if the file does not mark it
        return found

    # Python's other threads run during a batch, not during a single `encode`.
    encode_batch = model.encode_batch_fast
    bos_id = token_id("bos_token")
    eos_id = token_id("eos_token")
    pad_id = token_id("pad_token")
    of_bytes = [model.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    is_byte_level = isinstance(model.decoder, tokenizers.decoders.ByteLevel)
    # Read after the calls of `token_id`, which add control tokens that the file does not mark.
    added = model.get_added_tokens_decoder()
    return _Model(
        encode=lambda texts: [each.ids for each in encode_batch(texts, add_special_tokens=False)],
        decode=lambda ids: model.decode(ids, skip_special_tokens=True),
        spell=lambda token: model.id_to_token(token) or "",
        vocab_size=max(model.get_vocab().values(), default=-1) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        no_text_id=model.token_to_id(_NO_TEXT) if is_byte_level else None,
        control={token.content: i for i, token in added.items() if token.special},
        runs=frozenset(i for i in of_bytes if i is not None),
    )
