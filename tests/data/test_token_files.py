"""Token files: what is read is what was written, in an order that is a function of (seed, step)."""

import collections
import hashlib
import itertools
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorstore

from latent_delib.data import arrays, order, token_files
from latent_delib.data.batches import Training, validation_documents
from latent_delib.data.rows import segments
from latent_delib.errors import UserError
from tests.texts import config_data, equal, write_token_files

PAD, BOS, T, VOCAB = 0, 2, 16, 70_000
SOURCES = ("lines:a", "lines:b", "lines:c")


def make_documents(seed, count, highest=999):
    random = np.random.default_rng(seed)
    return [
        random.integers(3, highest, size).astype(np.int32) for size in random.integers(1, 60, count)
    ]


def work_of(document):
    """By its first token: of two works, or of none."""
    return ("a.txt", "", "b.txt")[int(document[0]) % 3]


def write(directory, tokenizer, train, validation, dtype="uint16"):
    about = {
        "format": token_files.FORMAT,
        "seq_len": T,
        "vocab_size": VOCAB,
        "bos_id": BOS,
        "pad_id": PAD,
        "dtype": dtype,
        "tokenizer_sha256": hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
    }
    of_works = {source: [(work_of(d), d) for d in validation[source]] for source in validation}
    return write_token_files(directory, about, train, of_works)


def tokenizer_at(path, content):
    """A tokenizer of which only the file counts."""
    path.write_bytes(content)
    return types.SimpleNamespace(path=path)


class Prepared:
    """A directory of token files, and how to read it."""

    def __init__(self, folder):
        self.directory = str(folder / "token files")
        self.tokenizer = tokenizer_at(folder / "tokenizer.model", b"a tokenizer")
        self.train = {
            source: make_documents(i, n)
            for i, (source, n) in enumerate(zip(SOURCES, (300, 200, 3)))
        }
        self.validation = {
            "lines:v": make_documents(7, 40),
            "lines:w": [np.arange(3, 70_000, dtype=np.int32)],
        }
        self.meta = write(self.directory, self.tokenizer, self.train, self.validation, "int32")

    def data(self, **change):
        fields = {"sources": SOURCES[:2], "weights": (3.0, 1.0)}
        fields |= {"validation": ("lines:v", "lines:w"), "token_files": self.directory}
        return config_data(**fields | change)

    def batches(self, count, batch_size=8, seed=0, **arguments):
        data = self.data(**{k: arguments.pop(k) for k in ("sources", "weights") if k in arguments})
        batches = Training(data, self.tokenizer).batches(
            batch_size=batch_size, seed=seed, **arguments
        )
        return list(itertools.islice(batches, count))

    def rows(self, source):
        number = SOURCES.index(source)
        spec = {
            "driver": "zarr3",
            "kvstore": f"file://{self.directory}/train/{number}/tokens/".replace(" ", "%20"),
        }
        return tensorstore.open(spec).result().read().result()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("prepared"))


def test_a_job_reads_meta_json_once_and_by_one_name(prepared, monkeypatch):
    """A bucket has objects by their names, and none called tokens//meta.json."""
    asked, read_meta = [], token_files.read_meta
    monkeypatch.setattr(
        token_files, "read_meta", lambda where: asked.append(where) or read_meta(where)
    )
    found = []
    for where in (prepared.directory, f"{prepared.directory}/"):
        text = Training(prepared.data(token_files=where), prepared.tokenizer)
        next(text.batches(batch_size=2, seed=0))
        found.append(text.fingerprint())
    assert found[0] == found[1] and asked == [prepared.directory] * 2


def test_what_a_job_reads_is_told(prepared):
    rows = [entry["rows"] for entry in prepared.meta["train"][:2]]
    text = Training(prepared.data(), prepared.tokenizer)
    assert text.amounts(4 * 8 * rows[0]) == [
        f"text lines:a: 75 % of all rows, 24 epochs of {rows[0]:,} rows",
        f"text lines:b: 25 % of all rows, {8 * rows[0] / rows[1]:.2g} epochs of {rows[1]:,} rows",
    ]


def counts(rows):
    return collections.Counter(map(tuple, rows.tolist()))


def test_rows_hold_every_token_of_every_document(prepared):
    for source, entry in zip(SOURCES, prepared.meta["train"], strict=True):
        rows, documents = prepared.rows(source), prepared.train[source]
        np.testing.assert_array_equal(rows[rows > BOS], np.concatenate(documents))
        assert (rows[:, 0] == BOS).all() and (rows[:-1] != PAD).all()
        sizes = {"documents": len(documents), "tokens": sum(map(len, documents)), "rows": len(rows)}
        assert entry == {
            "source": source,
            **sizes,
            "sha256": hashlib.sha256(rows.astype("<i4")).hexdigest(),
        }


def test_batches_hold_stored_rows_and_their_segments(prepared):
    stored = {tuple(row) for source in SOURCES[:2] for row in prepared.rows(source).tolist()}
    for batch in prepared.batches(5):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
            ("tokens", "segment"), ((8, T), np.int32)
        )
        assert {tuple(row) for row in batch["tokens"].tolist()} <= stored
        np.testing.assert_array_equal(batch["segment"], segments(batch["tokens"], BOS, PAD))


def test_batch_is_a_function_of_seed_and_step(prepared):
    straight = prepared.batches(300)
    assert equal(prepared.batches(300), straight)
    for start in (1, 127, 128, 250):  # inside, at and beyond the edge of a block
        assert equal(prepared.batches(20, start_step=start), straight[start : start + 20])
    assert not equal(prepared.batches(20, seed=1), straight[:20])


@pytest.mark.parametrize("hosts", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_hosts_share_one_batch(prepared, hosts):
    """Each host reads exactly its rows, whether they lie together or apart, from any step on."""
    whole = prepared.batches(150, start_step=3)
    for rows in (
        np.array_split(np.arange(8), hosts),
        [np.arange(host, 8, hosts) for host in range(hosts)],
    ):
        for mine in rows:
            expected = [{k: v[mine] for k, v in batch.items()} for batch in whole]
            assert equal(prepared.batches(150, rows=mine, start_step=3), expected)


def test_each_row_once_an_epoch(prepared):
    rows = prepared.rows("lines:a")
    only = {"sources": ("lines:a",), "weights": (1.0,), "batch_size": 1}
    stream = np.concatenate([b["tokens"] for b in prepared.batches(3 * len(rows), **only)])
    epochs = [stream[: len(rows)], stream[len(rows) : 2 * len(rows)], stream[2 * len(rows) :]]
    assert all(counts(epoch) == counts(rows) for epoch in epochs)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations([rows, *epochs], 2))


def test_each_block_holds_each_source_by_its_weight(prepared):
    first = counts(prepared.rows("lines:a"))
    tokens = np.concatenate([b["tokens"] for b in prepared.batches(3, batch_size=order.BLOCK)])
    of_first = np.array([tuple(row) in first for row in tokens.tolist()]).reshape(3, -1)
    np.testing.assert_array_equal(of_first.sum(1), order.BLOCK * 3 // 4)
    assert 0.6 < of_first[0, :100].mean() < 0.9, "the sources of a block are not mixed"


def test_a_source_smaller_than_a_batch_repeats(prepared):
    rows = prepared.rows("lines:c")
    (batch,) = prepared.batches(1, batch_size=4 * len(rows), sources=("lines:c",), weights=(2.0,))
    assert counts(batch["tokens"]) == counts(np.repeat(rows, 4, axis=0))


def test_validation_documents_come_back_whole_and_in_order(prepared):
    found = list(validation_documents(prepared.data(), tokenizer=prepared.tokenizer))
    expected = [(source, d) for source, documents in prepared.validation.items() for d in documents]
    assert [d.source for d in found] == [source for source, _ in expected]
    assert [d.work for d in found] == [work_of(document) for _, document in expected]
    assert {d.work for d in found} == {"a.txt", "", "b.txt"}
    assert all(
        d.tokens.dtype == np.int32 and np.array_equal(d.tokens, b)
        for d, (_, b) in zip(found, expected)
    )


def test_arrays_of_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "_FILE", 100)
    parts = [np.full((n, 3), n, np.int32) for n in (1, 90, 0, 2, 33)]
    digest = hashlib.sha256()
    assert arrays.write_array(str(tmp_path / "x"), parts, "uint16", 10, digest, (3,)) == 126
    assert len(list((tmp_path / "x" / "c").iterdir())) == 4  # of 33 rows
    found = arrays.open_array(str(tmp_path / "x"), (126, 3)).read().result()
    assert found.dtype == np.uint16 and digest.digest() == hashlib.sha256(found).digest()
    np.testing.assert_array_equal(found, np.concatenate(parts))


def test_a_disk_that_takes_nothing_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(NotADirectoryError, match="Not a directory: '.*file/x'") as error:
        arrays.write_array(
            str(tmp_path / "file" / "x"), [np.zeros(3)], "int32", 8, hashlib.sha256()
        )
    assert "\n" not in str(error.value)


def test_bad_directories(prepared, tmp_path):
    def message(tokenizer=prepared.tokenizer, **change):
        with pytest.raises(UserError) as error:
            Training(prepared.data(**change), tokenizer)
        return str(error.value)

    (tmp_path / "unfinished" / "train").mkdir(parents=True)
    for directory in ("missing", "unfinished"):
        assert f"no {tmp_path / directory}/meta.json" in message(
            token_files=str(tmp_path / directory)
        )
    assert f"rows of {T} tokens, config.data.seq_len is 8" in message(seq_len=8)
    other = tokenizer_at(tmp_path / "other.model", b"another")
    assert all(
        hashlib.sha256(b).hexdigest() in message(other) for b in (b"a tokenizer", b"another")
    )
    other.path.unlink()
    assert str(other.path) in message(other)
    assert "'lines:z' is not in" in message(sources=("lines:a", "lines:z"))
    with pytest.raises(UserError, match="'lines:a' is not in .*'lines:v', 'lines:w'"):
        validation_documents(prepared.data(validation=("lines:a",)), tokenizer=prepared.tokenizer)
    (tmp_path / "old").mkdir()
    token_files.write_meta(str(tmp_path / "old"), prepared.meta | {"format": 0})
    assert f"has format 0, expected {token_files.FORMAT}" in message(
        token_files=str(tmp_path / "old")
    )
    token_files.write_meta(str(tmp_path / "old"), {"name": "another program's"})
    assert "old/meta.json: not of token files" in message(token_files=str(tmp_path / "old"))


def test_token_files_are_read_without_tensorflow_and_jax(prepared):
    program = f"""
import pathlib, sys, types
from ml_collections import ConfigDict
from latent_delib.data import batches
data = ConfigDict({prepared.data().to_dict()!r})
tokenizer = types.SimpleNamespace(path=pathlib.Path({str(prepared.tokenizer.path)!r}))
next(batches.Training(data, tokenizer).batches(batch_size=2, seed=0))
next(batches.validation_documents(data, tokenizer=tokenizer))
print(sorted({{"tensorflow", "seqio", "tensorflow_datasets", "jax"}} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
