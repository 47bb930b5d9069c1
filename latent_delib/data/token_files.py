"""Token files: what `prepare` writes and training and evaluation read, without TensorFlow.

    OUT/train/<i>/tokens         [rows, seq_len], the packed rows of source i
    OUT/validation/<i>/tokens    [N], the documents of source i one after the other, without BOS
    OUT/validation/<i>/offsets   int64 [documents + 1], where each begins
    OUT/validation/<i>/work      int64 [documents], the work each is a part of: a number in meta.json's "works" of
                                 source i, or -1, where each document is a work of its own
    OUT/meta.json                written last: without it OUT is unfinished; holds a digest of each source's tokens

The arrays are zarr3, uint16 where the vocabulary fits and int32 elsewhere, on a local disk or gs://. Rows lie
in small uncompressed chunks of large files, so a row anywhere costs a read of a few kilobytes. Each chunk has a
checksum. Older formats are read too: format 1 had no checksums, and format 2 no works.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from latent_delib.data.order import VERSION, Order, shares
from latent_delib.data.rows import BadRecords, Document, pack, segments
from latent_delib.data.tokenizer import fingerprint
from latent_delib.errors import UserError, reason, store_error

FORMAT = 3
_FILE = 1 << 22  # tokens
_CODECS = [{"name": "bytes"}, {"name": "crc32c"}]  # of a chunk
_DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION")  # how tensorstore's message begins: a wrong checksum, a cut-off file
_CACHE = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def _store(path: str):
    """Returns tensorstore's name for a directory: a URL as it is, or a local path."""
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{os.path.abspath(path)}/"}


@contextlib.contextmanager
def _store_errors(path: str) -> Iterator[None]:
    """Makes of tensorstore's errors an OSError where a store or disk fails, otherwise a UserError."""
    try:
        yield
    except ValueError as error:
        raise store_error(error, path) or UserError(f"{path}: {reason(error)}") from None


def _done(future: Any, path: str) -> Any:
    """Waits for tensorstore."""
    with _store_errors(path):
        return future.result()


def _folder(directory: str) -> ts.KvStore:
    with _store_errors(directory):  # a URL of no known kind is refused at once
        return ts.KvStore.open(_store(directory)).result()


def _read(path: str, shape: tuple[int, ...]) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": _store(path), "fill_missing_data_reads": False}
    array = _done(ts.open(spec, open=True, read=True, context=_CACHE, recheck_cached_data=False), path)
    if array.shape != shape:
        raise UserError(
            f"{path}: an array of shape {list(array.shape)}, meta.json says {list(shape)}; "
            "copy the token files again, or prepare them again"
        )
    return array


def _tokens(future: Any, where: str, vocab_size: int, bad: BadRecords) -> np.ndarray | None:
    """Returns what tensorstore reads, int32; or counts it as bad and returns None.

    Bad is what is damaged or holds an id outside the vocabulary. A store that fails or a file that is gone is more.
    """
    try:
        tokens = future.result().astype(np.int32)
    except ValueError as error:
        if failed := store_error(error, where):
            raise failed from None
        if not str(error).startswith(_DAMAGED):
            raise UserError(
                f"{where}: cannot be read: {reason(error)}; copy the token files again, or prepare them again"
            ) from None
        bad(f"{where}: damaged: {reason(error)}")
        return None
    if len(outside := tokens[(tokens < 0) | (tokens >= vocab_size)]):
        bad(f"{where}: token {outside[0]}, expected one of 0 to {vocab_size - 1}")
        return None
    return tokens


def _blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Regroups arrays along their first axis into blocks of `size`, the last one smaller."""
    held, count = [], 0
    for part in parts:
        held.append(part)
        count += len(part)
        while count >= size:
            whole = np.concatenate(held)
            yield whole[:size]
            held, count = [whole[size:]], count - size
    if count:
        yield np.concatenate(held)


def _write(
    path: str, parts: Iterable[np.ndarray], dtype: str, chunk: int, digest: Any, width: tuple[int, ...] = ()
) -> int:
    """Writes arrays [n, *width] as one, also to `digest`; returns its length. `chunk` tokens are read together."""
    chunk_rows = max(1, chunk // math.prod(width))
    file_rows = max(1, _FILE // math.prod(width) // chunk_rows) * chunk_rows
    codec = {"chunk_shape": [chunk_rows, *width], "codecs": _CODECS}
    metadata = {
        "shape": [1 << 48, *width],  # cut down to the true length at the end
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [file_rows, *width]}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }
    spec = {"driver": "zarr3", "kvstore": _store(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    array = _done(ts.open(spec, create=True, delete_existing=True), path)
    length = 0
    for block in _blocks(parts, file_rows):
        block = block.astype(dtype)
        digest.update(block)
        _done(array[length : length + len(block)].write(block), path)
        length += len(block)
    _done(array.resize(exclusive_max=[length, *width], resize_metadata_only=True), path)
    return length


def read_meta(directory: str) -> dict | None:
    """Returns the content of meta.json, or None where there is none. Raises UserError where it is another program's."""
    found = _done(_folder(directory).read("meta.json"), directory)
    if found.state != "value":
        return None
    try:
        meta = json.loads(found.value)
    except ValueError:
        raise UserError(f"{directory}/meta.json: damaged, expected JSON; prepare the token files again") from None
    if (
        not isinstance(meta, dict)
        or not {"format", "seq_len", "tokenizer_sha256", "train", "validation"} <= meta.keys()
    ):
        raise UserError(f"{directory}/meta.json: not of token files; name a folder that prepare has written")
    return meta


def write_meta(directory: str, meta: dict) -> None:
    """Marks `directory` as finished."""
    text = json.dumps(meta, indent=2).encode()
    _done(_folder(directory).write("meta.json", text), directory)


def write_train(directory: str, number: int, documents: Iterable[np.ndarray], meta: dict) -> dict[str, int]:
    """Packs documents (int32 [n], without BOS) into the rows of source `number`; counts what it wrote."""
    count = {"documents": 0, "tokens": 0}
    step = functools.partial(pack, length=meta["seq_len"], bos_id=meta["bos_id"], pad_id=meta["pad_id"])

    def rows():
        body = nothing = np.empty(0, np.int32)
        for tokens in documents:
            count["documents"] += 1
            count["tokens"] += len(tokens)
            complete, body = step(body, tokens)
            yield complete
        yield step(body, nothing)[0]

    path, digest = f"{directory}/train/{number}/tokens", hashlib.sha256()
    length = _write(path, rows(), meta["dtype"], 1 << 12, digest, (meta["seq_len"],))
    return {**count, "rows": length, "sha256": digest.hexdigest()}


def write_validation(
    directory: str, number: int, documents: Iterable[tuple[str, np.ndarray]], meta: dict
) -> dict[str, Any]:
    """Writes the documents of source `number` whole, (work, tokens) each as in `Document`; counts what it wrote."""
    offsets, work = [0], []
    numbers: dict[str, int] = {}  # of the works, as they come

    def tokens():
        for name, document in documents:
            offsets.append(offsets[-1] + len(document))
            work.append(numbers.setdefault(name, len(numbers)) if name else -1)
            yield document

    path, digest = f"{directory}/validation/{number}", hashlib.sha256()
    length = _write(f"{path}/tokens", tokens(), meta["dtype"], 1 << 16, digest)
    _write(f"{path}/offsets", [np.array(offsets)], "int64", 1 << 12, digest)
    _write(f"{path}/work", [np.array(work)], "int64", 1 << 12, digest)
    return {"documents": len(work), "tokens": length, "works": list(numbers), "sha256": digest.hexdigest()}


def _open(data, tokenizer_path: str, split: str, sources: Iterable[str]) -> tuple[dict, list[str], list[dict]]:
    """Checks that a directory fits the config; returns its meta, and path and meta entry of each source."""
    where = data.token_files.rstrip("/")
    meta = read_meta(where)
    if meta is None:
        raise UserError(
            f"config.data.token_files: no {where}/meta.json, which is written last; "
            f"run python -m latent_delib.prepare with --out={where} to its end"
        )
    if not 1 <= meta["format"] <= FORMAT:
        raise UserError(
            f"config.data.token_files: {where} has format {meta['format']}, expected 1 to {FORMAT}; "
            "prepare the token files with this version, or use a newer one"
        )
    if meta["seq_len"] != data.seq_len:
        raise UserError(
            f"config.data.token_files: {where} has rows of {meta['seq_len']} tokens, config.data.seq_len is "
            f"{data.seq_len}; prepare token files of that length, or change it"
        )
    if (found := fingerprint(tokenizer_path)) != meta["tokenizer_sha256"]:
        raise UserError(
            f"config.data.token_files: {where} was prepared with tokenizer sha256 {meta['tokenizer_sha256']}, "
            f"{tokenizer_path} has {found}; use that one (config.decoder.tokenizer), or prepare with this one"
        )
    numbers = {entry["source"]: i for i, entry in enumerate(meta[split])}
    field = "sources" if split == "train" else "validation"
    for source in sources:
        if source not in numbers:
            raise UserError(
                f"config.data.{field}: {source!r} is not in {where}, which has {', '.join(map(repr, numbers))}; "
                "name sources as they were when it was prepared"
            )
    chosen = [numbers[source] for source in sources]
    return meta, [f"{where}/{split}/{i}" for i in chosen], [meta[split][i] for i in chosen]


def _ahead(function: Callable[[int], dict], start: int) -> Iterator[dict]:
    """Yields function(start), function(start + 1), ... without end; a thread works on the next two meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending = collections.deque(pool.submit(function, start + k) for k in range(2))
        for step in itertools.count(start + 2):
            yield pending.popleft().result()
            pending.append(pool.submit(function, step))


def train_batches(data, *, batch_size, seed, tokenizer_path, rows, start_step):
    """`batches.train_batches` for token files: reads these rows of each batch and no others."""
    meta, paths, entries = _open(data, tokenizer_path, "train", data.sources)
    arrays = [_read(f"{path}/tokens", (e["rows"], data.seq_len)) for path, e in zip(paths, entries, strict=True)]
    order = Order(seed, shares(data.weights), [entry["rows"] for entry in entries])
    bad = BadRecords(data.max_bad_records)

    def batch(step):
        places = list(zip(*(x[rows].tolist() for x in order(step * batch_size, (step + 1) * batch_size)), strict=True))
        reads = [arrays[source][row].read() for source, row in places]
        tokens = np.full([len(rows), data.seq_len], meta["pad_id"], np.int32)
        for i, ((source, row), read) in enumerate(zip(places, reads, strict=True)):
            if (found := _tokens(read, f"{paths[source]}: row {row}", meta["vocab_size"], bad)) is not None:
                tokens[i] = found
        return {"tokens": tokens, "segment": segments(tokens, meta["bos_id"], meta["pad_id"])}

    return _ahead(batch, start_step)


def validation_documents(data, *, tokenizer_path):
    """`batches.validation_documents` for token files."""
    meta, paths, entries = _open(data, tokenizer_path, "validation", data.validation)
    bad = BadRecords(data.max_bad_records)

    def documents():
        for source, path, entry in zip(data.validation, paths, entries, strict=True):
            tokens = _read(f"{path}/tokens", (entry["tokens"],))
            offsets = _done(_read(f"{path}/offsets", (entry["documents"] + 1,)).read(), path)
            works = _works(path, entry)
            for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
                found = _tokens(tokens[begin:end].read(), f"{path}: document {i}", meta["vocab_size"], bad)
                if found is not None:
                    yield Document(source, works[i], found)

    return documents()


def _works(path: str, entry: dict) -> list[str | None]:
    """The work of each document of a validation source, as in `Document`."""
    if "works" not in entry:
        return [None] * entry["documents"]
    names = [*entry["works"], ""]  # -1 is the last
    return [names[number] for number in _done(_read(f"{path}/work", (entry["documents"],)).read(), path)]


def data_fingerprint(data, *, tokenizer_path):
    """`batches.fingerprint` for token files: of meta.json alone, however many files there are."""
    meta, paths, entries = _open(data, tokenizer_path, "train", data.sources)
    found = {"order": VERSION, "token_files/meta.json": _digest(meta)}
    for i, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        number = "/".join(path.rsplit("/", 2)[1:])  # SPLIT/NUMBER
        found[f"sources[{i}] (token_files/{number})"] = _digest(entry)
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
