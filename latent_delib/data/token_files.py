"""Token files: `prepare` writes them, training and evaluation read them without TensorFlow.

    OUT/train/<i>/tokens         [rows, seq_len], the packed rows of source i
    OUT/validation/<i>/tokens    [N], the documents of source i one after the other, without BOS
    OUT/validation/<i>/offsets   int64 [documents + 1], where each document begins, and the end
    OUT/validation/<i>/work      int64 [documents], each document's work: an index into "works" of
                                 source i in meta.json; -1 where a document is a work of its own
    OUT/meta.json                written last: without it OUT is unfinished; holds a digest of each
                                 source's tokens
    OUT/unfinished.json          until then: what meta.json will hold, as far as it is known

Tokens are uint16 where the vocabulary fits, else int32. arrays.py says how arrays are stored.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from latent_delib.data import arrays
from latent_delib.data.order import VERSION, Order, shares
from latent_delib.data.rows import BadRecords, Document, grouped, map_in_threads, packed, segments
from latent_delib.data.tokenizer import Tokenizer, fingerprint
from latent_delib.errors import UserError, reason, store_error

FORMAT = 3
_TOGETHER = 1 << 16  # tokens of held-out text that are read at once
UNFINISHED = "unfinished.json"
KEYS = {"format", "seq_len", "tokenizer_sha256", "train", "validation"}  # in every meta.json


def read_meta(directory: str, name: str = "meta.json") -> dict | None:
    """Returns the content of meta.json, or of unfinished.json; None where there is none.

    Raises:
      UserError: the file is damaged, or another program wrote it.
    """
    found = arrays.result(arrays.folder(directory).read(name), directory)
    if found.state != "value":
        return None
    try:
        meta = json.loads(found.value)
    except ValueError:
        raise UserError(
            f"{directory}/{name}: damaged, expected JSON; prepare the token files again"
        ) from None
    if not isinstance(meta, dict) or not KEYS <= meta.keys():
        raise UserError(
            f"{directory}/{name}: not of token files; name a folder that prepare has written"
        )
    return meta


def write_meta(directory: str, meta: dict, name: str = "meta.json") -> None:
    """Writes meta.json, which marks `directory` as finished, or unfinished.json."""
    text = json.dumps(meta, indent=2).encode()
    arrays.result(arrays.folder(directory).write(name, text), directory)
    if name != UNFINISHED:
        arrays.result(arrays.folder(directory).write(UNFINISHED, None), directory)  # removes it


# Writing the sources.


def write_train(
    directory: str,
    number: int,
    documents: Iterable[np.ndarray],
    meta: dict,
    whole: bool = False,
) -> dict[str, Any]:
    """Packs documents, int32 [n] without BOS, into rows of source `number`; returns its counts.

    `whole` is as in `rows.packed`. With it, "cut" counts the documents longer than a row.
    """
    count = {"documents": 0, "tokens": 0}

    def counted() -> Iterator[np.ndarray]:
        for tokens in documents:
            count["documents"] += 1
            count["tokens"] += len(tokens)
            if whole and len(tokens) >= meta["seq_len"]:
                count["cut"] = count.get("cut", 0) + 1
            yield tokens

    rows = packed(
        counted(),
        length=meta["seq_len"],
        bos_id=meta["bos_id"],
        pad_id=meta["pad_id"],
        whole=whole,
    )
    digest = hashlib.sha256()
    path = f"{directory}/train/{number}/tokens"
    length = arrays.write_array(path, rows, meta["dtype"], 1 << 12, digest, (meta["seq_len"],))
    return {**count, "rows": length, "sha256": digest.hexdigest()}


def write_validation(
    directory: str, number: int, documents: Iterable[tuple[str, np.ndarray]], meta: dict
) -> dict[str, Any]:
    """Writes the documents of source `number`, (work, tokens) as in `Document`; returns counts."""
    offsets = [0]
    work: list[int] = []
    numbers: dict[str, int] = {}  # work -> its number, in the order in which works first appear

    def tokens() -> Iterator[np.ndarray]:
        for name, document in documents:
            offsets.append(offsets[-1] + len(document))
            work.append(numbers.setdefault(name, len(numbers)) if name else -1)
            yield document

    digest = hashlib.sha256()
    path = f"{directory}/validation/{number}"
    length = arrays.write_array(f"{path}/tokens", tokens(), meta["dtype"], 1 << 16, digest)
    arrays.write_array(f"{path}/offsets", [np.array(offsets)], "int64", 1 << 12, digest)
    arrays.write_array(f"{path}/work", [np.array(work)], "int64", 1 << 12, digest)
    return {
        "documents": len(work),
        "tokens": length,
        "works": list(numbers),
        "sha256": digest.hexdigest(),
    }


# Reading them.


class Stored(NamedTuple):
    """Names a source as it is stored.

    source: the source string of the config.
    name: SPLIT/NUMBER, the place of the source in the folder of token files.
    path: the folder of the source.
    entry: the part of meta.json that describes the source.
    """

    source: str
    name: str
    path: str
    entry: dict


def _open(
    data: Any, split: str, sources: Iterable[str], tokenizer: Tokenizer
) -> tuple[dict, list[Stored]]:
    """Checks that token files fit the config; returns meta.json, and sources of the config."""
    where = data.token_files.rstrip("/")
    meta = read_meta(where)
    if meta is None:
        raise UserError(
            f"config.data.token_files: no {where}/meta.json, which is written last; "
            f"run python -m latent_delib.prepare with --out={where} until it is done"
        )
    _check_fits(meta, where, data.seq_len, tokenizer)
    numbers = {entry["source"]: number for number, entry in enumerate(meta[split])}
    found = []
    for source in sources:
        if source not in numbers:
            raise UserError(
                f"config.data: source {source!r} is not in {where}, which has "
                f"{', '.join(map(repr, numbers))}; name sources as they were when it was prepared, "
                "or read this one as text: --config.data.token_files="
            )
        name = f"{split}/{numbers[source]}"
        found.append(Stored(source, name, f"{where}/{name}", meta[split][numbers[source]]))
    return meta, found


def _check_fits(meta: dict, where: str, seq_len: int, tokenizer: Tokenizer) -> None:
    """Raises UserError for token files of another format, row length or tokenizer."""
    if meta["format"] != FORMAT:
        raise UserError(
            f"config.data.token_files: {where} has format {meta['format']}, expected {FORMAT}; "
            "prepare them again, or use a newer latent_delib"
        )
    if meta["seq_len"] != seq_len:
        raise UserError(
            f"config.data.token_files: {where} has rows of {meta['seq_len']} tokens, "
            f"config.data.seq_len is {seq_len}; prepare them again, or set it to {meta['seq_len']}"
        )
    found = fingerprint(tokenizer.path)
    if found != meta["tokenizer_sha256"]:
        raise UserError(
            f"config.data.token_files: {where} was prepared with tokenizer sha256 "
            f"{meta['tokenizer_sha256']}, {tokenizer.path} has {found}; "
            "name that tokenizer in config.decoder.tokenizer, or prepare the token files again"
        )


def are_those_of(where: str, stored: Mapping[str, str]) -> bool:
    """Tells whether a folder holds the token files of a fingerprint (`batches.Training`)."""
    meta = read_meta(where)
    return meta is not None and _digest(meta) == stored.get("token_files/meta.json")


class Training:
    """Implements `batches.Training` with token files; reads only the wanted rows of each batch."""

    def __init__(self, data: Any, tokenizer: Tokenizer):
        self.data = data
        self.meta, self.stored = _open(data, "train", data.sources, tokenizer)
        self.num_rows = [source.entry["rows"] for source in self.stored]

    def fingerprint(self) -> dict[str, str]:
        """Returns the version of the row order, digests of meta.json and of each source in it."""
        found = {"order": VERSION, "token_files/meta.json": _digest(self.meta)}
        for i, source in enumerate(self.stored):
            found[f"sources[{i}] (token_files/{source.name})"] = _digest(source.entry)
        return found

    def batches(
        self, *, batch_size: int, seed: int, rows: np.ndarray, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Returns batches without end, as `batches.Training` does."""
        data, meta, stored = self.data, self.meta, self.stored
        shapes = [(rows_of_source, data.seq_len) for rows_of_source in self.num_rows]
        opened = [arrays.open_array(f"{s.path}/tokens", shape) for s, shape in zip(stored, shapes)]
        order = Order(seed, shares(data.weights), self.num_rows)
        bad = BadRecords(data.max_bad_records)

        def batch(step: int) -> dict[str, np.ndarray]:
            source_B, row_B = order(step * batch_size, (step + 1) * batch_size)
            places = list(zip(source_B[rows].tolist(), row_B[rows].tolist(), strict=True))
            reads = [opened[source][row].read() for source, row in places]
            tokens = np.full([len(rows), data.seq_len], meta["pad_id"], np.int32)
            for i, (source, row) in enumerate(places):
                where = f"{stored[source].path}: row {row}"
                found = _tokens(reads[i], where, meta["vocab_size"], bad)
                if found is not None:
                    tokens[i] = found
            return {"tokens": tokens, "segment": segments(tokens, meta["bos_id"], meta["pad_id"])}

        return map_in_threads(batch, itertools.count(start_step), threads=1, count=2)


def validation_documents(
    data: Any, sources: Iterable[str], tokenizer: Tokenizer
) -> Iterator[Document]:
    """Implements `batches.validation_documents` for token files."""
    meta, stored = _open(data, "validation", sources, tokenizer)
    bad = BadRecords(data.max_bad_records)

    def documents() -> Iterator[Document]:
        for source, _, path, entry in stored:
            tokens = arrays.open_array(f"{path}/tokens", (entry["tokens"],))
            offsets = _numbers(f"{path}/offsets", entry["documents"] + 1)
            names = [*entry["works"], ""]  # index -1 is the last, ""
            works = [names[number] for number in _numbers(f"{path}/work", entry["documents"])]
            for i, found in _documents(tokens, offsets, path, meta["vocab_size"], bad):
                yield Document(source, works[i], found)

    return documents()


def _documents(
    tokens: Any, offsets: np.ndarray, path: str, vocab_size: int, bad: BadRecords
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the number and the tokens of each document that is not bad.

    Short documents are read together, because each read takes as long as thousands of tokens do. If
    one of them is bad, all are read again, one by one.
    """

    def size(place: tuple[int, tuple[int, int]]) -> int:
        _, (begin, end) = place
        return end - begin

    for block in grouped(enumerate(itertools.pairwise(offsets.tolist())), _TOGETHER, size):
        number, (first, _) = block[0]
        _, (_, last) = block[-1]
        reading = tokens[first:last].read()
        together = _tokens(reading, f"{path}: document {number}", vocab_size, lambda fault: None)
        for number, (begin, end) in block:
            if together is None:
                reading = tokens[begin:end].read()
                found = _tokens(reading, f"{path}: document {number}", vocab_size, bad)
            else:
                found = together[begin - first : end - first]
            if found is not None:
                yield number, found


def _tokens(
    future: Any, where: str, vocab_size: int, bad: Callable[[str], None]
) -> np.ndarray | None:
    """Returns the tokens that tensorstore reads, int32; None for bad tokens, which it counts.

    Tokens are bad if they are damaged or hold an id outside the vocabulary.

    Raises:
      OSError: the store fails.
      UserError: the file is gone.
    """
    try:
        tokens = future.result().astype(np.int32)
    except ValueError as error:
        failed = store_error(error, where)
        if failed:
            raise failed from None
        if not str(error).startswith(arrays.DAMAGED):
            raise UserError(f"{where}: cannot be read: {reason(error)}; {arrays.AGAIN}") from None
        bad(f"{where}: damaged: {reason(error)}")
        return None
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        bad(f"{where}: token {outside[0]}, expected one of 0 to {vocab_size - 1}")
        return None
    return tokens


def _numbers(path: str, length: int) -> np.ndarray:
    """Reads a whole array, int64 [length]."""
    return arrays.result(arrays.open_array(path, (length,)).read(), path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
