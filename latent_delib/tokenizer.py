"""Text to token ids and back: the one interface that commands and the Python interface share."""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from latent_delib.errors import UserError


class Tokenizer:
    """A SentencePiece model. `encode` adds no BOS: whoever starts a document or a prompt does."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer {self.path}: does not exist")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise UserError(f"tokenizer {self.path}: not a SentencePiece model ({error})") from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.pad_id: int = self._model.pad_id()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens (pad, BOS, EOS) leave no trace."""
        return self._model.decode([int(i) for i in ids])
