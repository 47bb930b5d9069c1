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
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from latent_delib.data.rows import BadRecords, Document, pack, segments
from latent_delib.errors import UserError
from latent_delib.tokenizer import fingerprint

FORMAT = 3
BLOCK = 1024  # rows in which each source has exactly its share
_FILE = 1 << 22  # tokens
_CODECS = [{"name": "bytes"}, {"name": "crc32c"}]  # of a chunk
_DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION")  # how tensorstore's message begins: a wrong checksum, a cut-off file
_CACHE = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 28}})


def _store(path: str):
    """tensorstore's name for a directory: a URL as it is, or a local path."""
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{os.path.abspath(path)}/"}


def _done(future: Any, path: str) -> Any:
    """Waits for tensorstore; a full disk or a damaged file becomes one line."""
    try:
        return future.result()
    except ValueError as error:
        raise UserError(f"{path}: {_line(error)}") from None


def _folder(directory: str) -> ts.KvStore:
    try:
        return ts.KvStore.open(_store(directory)).result()
    except ValueError as error:  # gs:///tokens
        raise UserError(f"{directory}: {_line(error)}") from None


def _line(error: ValueError) -> str:
    return re.split(r" \[[\w ]+='", str(error))[0]  # tensorstore adds its whole specification


def _read(path: str, shape: tuple[int, ...]) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": _store(path), "fill_missing_data_reads": False}
    array = _done(ts.open(spec, open=True, read=True, context=_CACHE, recheck_cached_data=False), path)
    if array.shape != shape:
        raise UserError(f"{path}: an array of shape {list(array.shape)}, its meta.json says {list(shape)}")
    return array


def _tokens(future: Any, where: str, vocab_size: int, bad: BadRecords) -> np.ndarray | None:
    """What tensorstore reads, int32; None, and counted, if that is damaged or holds an id outside the vocabulary."""
    try:
        tokens = future.result().astype(np.int32)
    except ValueError as error:
        if not str(error).startswith(_DAMAGED):  # a file that is not there is more than a bad record
            raise UserError(f"{where}: {_line(error)}") from None
        bad(f"{where}: {_line(error)}")
        return None
    if len(outside := tokens[(tokens < 0) | (tokens >= vocab_size)]):
        bad(f"{where}: token {outside[0]}, expected 0 ... {vocab_size - 1}")
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
    """The content of meta.json, or None where there is none. Raises UserError where it is another program's."""
    found = _done(_folder(directory).read("meta.json"), directory)
    if found.state != "value":
        return None
    try:
        meta = json.loads(found.value)
    except ValueError:
        raise UserError(f"{directory}/meta.json: not JSON: damaged") from None
    if (
        not isinstance(meta, dict)
        or not {"format", "seq_len", "tokenizer_sha256", "train", "validation"} <= meta.keys()
    ):
        raise UserError(f"{directory}/meta.json: not what `prepare` writes")
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
            f"config.data.token_files: no {where}/meta.json: nothing was prepared there, or it did not finish"
        )
    if not 1 <= meta["format"] <= FORMAT:
        raise UserError(f"config.data.token_files: {where} has format {meta['format']}, expected 1 ... {FORMAT}")
    if meta["seq_len"] != data.seq_len:
        raise UserError(
            f"config.data.token_files: {where} has rows of {meta['seq_len']}, config.data.seq_len is {data.seq_len}"
        )
    if (found := fingerprint(tokenizer_path)) != meta["tokenizer_sha256"]:
        raise UserError(
            f"config.data.token_files: {where} was prepared with tokenizer sha256 {meta['tokenizer_sha256']}, "
            f"{tokenizer_path} has {found}"
        )
    numbers = {entry["source"]: i for i, entry in enumerate(meta[split])}
    for source in sources:
        if source not in numbers:
            raise UserError(f"config.data: {split} source {source!r} is not in {where}, which has {', '.join(numbers)}")
    chosen = [numbers[source] for source in sources]
    return meta, [f"{where}/{split}/{i}" for i in chosen], [meta[split][i] for i in chosen]


def _permutation(size: int, *key: int) -> np.ndarray:
    """A random order of range(size), a function of `key` alone: numpy never changes Philox's raw bits."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(size), kind="stable")


def shares(weights: Iterable[float]) -> np.ndarray:
    """How many rows of a block each source has, by largest remainders: int64 [sources], the sum is BLOCK."""
    exact = np.array(list(weights)) / sum(weights) * BLOCK
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[: BLOCK - share.sum()]] += 1
    if not share.all():
        raise UserError(
            f"config.data.weights: {tuple(weights)}: in rows of {BLOCK}, {share.tolist()}: one would never be read"
        )
    return share


class Order:
    """Which row of which source is row i of the training: a pure function of (seed, i).

    Rows come in blocks in which each source has its share, in an order drawn for (seed, block). A source is read
    in epochs, each in an order drawn for (seed, source, epoch); the latest is kept, 8 bytes a row.
    """

    def __init__(self, seed: int, share: np.ndarray, rows: list[int]):
        self.seed, self.share, self.rows = seed, share, np.array(rows)
        self.epochs: dict[int, tuple[int, np.ndarray]] = {}

    def __call__(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source), each int64 [stop - start], of the rows start ... stop - 1."""
        blocks = [self._block(block) for block in range(start // BLOCK, -(-stop // BLOCK))]
        here = slice(start % BLOCK, start % BLOCK + stop - start)
        source, count = (np.concatenate(part)[here] for part in zip(*blocks, strict=True))
        epoch, row = np.divmod(count, self.rows[source])
        for s, e in sorted(set(zip(source.tolist(), epoch.tolist(), strict=True))):
            if s not in self.epochs or self.epochs[s][0] != e:
                self.epochs[s] = e, _permutation(self.rows[s], self.seed, 1, s, e)
            chosen = (source == s) & (epoch == e)
            row[chosen] = self.epochs[s][1][row[chosen]]
        return source, row

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of rows of that source before it), each int64 [BLOCK], of the rows of a block."""
        source = np.repeat(np.arange(len(self.share)), self.share)[_permutation(BLOCK, self.seed, 0, block)]
        count = np.empty_like(source)
        count[np.argsort(source, kind="stable")] = np.concatenate([np.arange(n) + block * n for n in self.share])
        return source, count


def _ahead(function: Callable[[int], dict], start: int) -> Iterator[dict]:
    """function(start), function(start + 1), ... without end; a thread works on the next two meanwhile."""
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
    """`batches.fingerprint` for token files."""
    meta, paths, entries = _open(data, tokenizer_path, "train", data.sources)
    found = {"token_files/meta.json": _digest(meta)}
    for i, (path, entry) in enumerate(zip(paths, entries, strict=True)):
        array, store = _read(f"{path}/tokens", (entry["rows"], data.seq_len)), ts.KvStore.open(_store(f"{path}/tokens"))
        names = sorted(name.decode() for name in _done(store.result().list(), path))
        wanted = range(-(-array.shape[0] // array.chunk_layout.write_chunk.shape[0]))
        if missing := {f"c/{k}/0" for k in wanted} - set(names):
            raise UserError(f"{path}/tokens/{min(missing)}: no such file")
        # a file ends with the checksum of its index, that is, of where each chunk lies and how long it is
        ends = [(name, store.result().read(name, byte_range=slice(-4, None))) for name in names]
        ends = [(name, _done(end, f"{path}/tokens/{name}").value.hex()) for name, end in ends]
        number = "/".join(path.rsplit("/", 2)[1:])  # SPLIT/NUMBER
        found[f"sources[{i}] (token_files/{number})"] = _digest([entry, ends])
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
