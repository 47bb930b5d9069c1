"""Trains a vocabulary on text files.

  python -m tools.make_vocabulary --text='runs/mixture/train/*.txt' --size=1024 --out=FILE.model

It is SentencePiece's byte-pair encoding, with a piece for every byte, for each digit, for line ends
and for tabs. The same text gives the same bytes.
"""

import glob
import io
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from etils import epath

from latent_delib.errors import UserError
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import REQUIRED

LONGEST = 25_000  # characters of a line, which have at most four bytes each


def vocabulary(texts: Iterable[Path], size: int, num_bytes: float = math.inf) -> bytes:
    """Returns a SentencePiece model.

    Args:
      texts: UTF-8 files.
      size: pieces, V.
      num_bytes: of text to learn from, roughly, at most; lines are taken evenly from all files.

    Raises:
      UserError: a file is not UTF-8.
      RuntimeError: the text does not yield so many pieces.
    """
    texts = sorted(texts)
    total = sum(text.stat().st_size for text in texts)
    every = max(1, round(total / num_bytes))
    lines = list(_lines(texts, every))  # SentencePiece would hide an error from inside
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.9999,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n", "\t"],
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        max_sentence_length=4 * LONGEST,
        num_threads=2,
        minloglevel=1,
    )  # fmt: skip
    return model.getvalue()


def _lines(texts: Iterable[Path], every: int) -> Iterator[str]:
    """Yields one in `every` of the lines that are not empty, cut where they are very long."""
    number = 0
    for text in texts:
        try:
            content = text.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"--text: {text} is not UTF-8") from None
        for line in re.split(r"[\n\f\t]+", content):
            number += bool(line)
            if line and number % every == 0:
                for start in range(0, len(line), LONGEST):
                    yield line[start : start + LONGEST]


def make_vocabulary(text: str, size: int, out: str, num_bytes: float) -> None:
    """Trains a vocabulary on the files that match `text`, and writes it to the file `out`.

    Raises:
      UserError: no file matches, or one is not UTF-8; `out` exists; `num_bytes` is below 1; the
        text does not yield so many pieces.
    """
    if not num_bytes >= 1:
        raise UserError(f"--num_bytes={num_bytes:g}: expected at least 1")
    if Path(out).exists():
        raise UserError(f"--out={out}: exists already")
    texts = [Path(path) for path in glob.glob(text)]
    if not texts:
        raise UserError(f"--text={text}: no file matches")
    try:
        model = vocabulary(texts, size, num_bytes)
    except RuntimeError as error:  # of SentencePiece
        raise UserError(f"--size={size}: {error}") from None
    files.write(epath.Path(out), model)
    print(f"{out}: {size} pieces")


if __name__ == "__main__":
    commands.run(
        lambda flags: make_vocabulary(flags.text, flags.size, flags.out, flags.num_bytes),
        __doc__,
        text=(REQUIRED, "text files, as a pattern"),
        size=(4096, "pieces"),
        out=(REQUIRED, "the file to write"),
        num_bytes=(2e7, "of text to learn from, roughly, at most; taken evenly"),
    )
