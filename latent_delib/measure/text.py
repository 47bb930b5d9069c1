"""Validation text: documents cut into pieces, and the work and the source of each document.

A work is a book, for instance: what holds for one work may not hold for another.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from latent_delib.data import batches
from latent_delib.data.rows import cut_pieces
from latent_delib.errors import UserError
from latent_delib.job.experiment import Experiment


class ValidationText(NamedTuple):
    """Holds the pieces of the documents of several works and sources.

    pieces: int32 [length] each, BOS first, 1 < length <= max_length.
    document: int64 [pieces], the document of each piece.
    source: int64 [documents], the source of each document.
    sources: the names of the sources.
    work: int64 [documents], the work of each document.
    works: the names of the works; "" where a document is a work of its own.
    """

    pieces: list[np.ndarray]
    document: np.ndarray
    source: np.ndarray
    sources: tuple[str, ...]
    work: np.ndarray
    works: tuple[str, ...]

    def lengths(self) -> np.ndarray:
        """Returns how many tokens each piece has, int64 [pieces]."""
        return np.array([len(piece) for piece in self.pieces])

    def source_of(self, piece: int) -> str:
        """Returns the name of a piece's source."""
        return self.sources[self.source[self.document[piece]]]

    def digest(self) -> str:
        """Returns the SHA-256, hex, of the pieces, and of the document and source of each."""
        names = np.frombuffer(repr(self.sources).encode(), np.uint8)
        sha = hashlib.sha256()
        for part in (*self.pieces, self.lengths(), self.document, self.source, names):
            sha.update(part)
        return sha.hexdigest()


def read_validation_text(exp: Experiment) -> ValidationText:
    """Reads the validation sources of a config.

    With `evaluate.max_pieces` it keeps only that many pieces of each source, evenly spread over the
    source, and the documents of these pieces.

    Raises:
      UserError: the sources are missing or hold no text.
    """
    e = exp.config.evaluate
    text = _read_all(exp)
    text = _keep(text, _spread(text, e.max_pieces))
    if not text.pieces:
        raise UserError(f"config.data.validation={text.sources}: holds no text")
    return text


def _read_all(exp: Experiment) -> ValidationText:
    """Reads every document, cut where it is longer than `evaluate.max_length`."""
    sources = tuple(exp.config.data.validation)
    pieces: list[np.ndarray] = []
    document: list[int] = []  # of each piece
    source: list[int] = []  # of each document
    work: list[int] = []  # of each document
    numbers: dict[tuple[str, str | int], int] = {}  # of works, by source and name or document
    longest = exp.config.evaluate.max_length
    for found in batches.validation_documents(exp.config.data, tokenizer=exp.tokenizer):
        cut = cut_pieces(found.tokens, longest, exp.tokenizer.bos_id)
        pieces += cut
        document += [len(source)] * len(cut)
        name = found.work or len(source)
        work.append(numbers.setdefault((found.source, name), len(numbers)))
        source.append(sources.index(found.source))
    return ValidationText(
        pieces=pieces,
        document=np.array(document, np.int64),
        source=np.array(source, np.int64),
        sources=sources,
        work=np.array(work, np.int64),
        works=tuple(name if isinstance(name, str) else "" for _, name in numbers),
    )


def _spread(text: ValidationText, most: int) -> np.ndarray:
    """Returns the numbers of `most` pieces of each source, evenly spread; 0: all of them."""
    chosen = []
    source = text.source[text.document]
    for number in range(len(text.sources)):
        there = np.flatnonzero(source == number)
        count = min(most or len(there), len(there))
        chosen.append(there[np.arange(count) * len(there) // max(count, 1)])
    return np.concatenate(chosen)


def _keep(text: ValidationText, chosen: np.ndarray) -> ValidationText:
    """Returns the chosen pieces alone, with documents and works numbered anew, without gaps."""
    documents, document = np.unique(text.document[chosen], return_inverse=True)
    works, work = np.unique(text.work[documents], return_inverse=True)
    pieces = [text.pieces[i] for i in chosen]
    return text._replace(
        pieces=pieces,
        document=document,
        source=text.source[documents],
        work=work,
        works=tuple(text.works[i] for i in works),
    )
