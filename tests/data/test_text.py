"""Text through seqio, and `prepare`: sources, rows, order, hosts, and what is refused."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from latent_delib import prepare as prepare_command
from latent_delib.data import arrays, batches, rows, token_files
from latent_delib.data import text as reader
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import UserError
from latent_delib.machine import files, progress
from latent_delib.weights.locate import PACKAGED
from tests.texts import WORDS, config_data, config_to_prepare, equal

BOS, PAD, T = 2, 0, 16


@pytest.fixture(scope="module")
def tasks():
    from latent_delib.data import tasks

    return tasks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("\n".join(make_text(i, 40) for i in range(100)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(folder / "tokenizer.model")


def make_text(seed, words):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def decode(tokenizer, tokens):
    return sentencepiece.SentencePieceProcessor(model_file=tokenizer).decode(tokens.tolist())


def documents(tokenizer, source):
    found = reader.documents(reader.open_source(source), Tokenizer(tokenizer), rows.BadRecords(0))
    return [document.tokens for document in found]


def texts(tokenizer, source):
    return [decode(tokenizer, tokens) for tokens in documents(tokenizer, source)]


def write_files(folder, files, documents_each, start=0):
    """Writes files of documents, each marked by its own number; returns the documents in order."""
    folder.mkdir(exist_ok=True)
    documents = [f"{i + start} {make_text(i + start, 20)}" for i in range(files * documents_each)]
    for i in range(files):
        part = documents[i * documents_each : (i + 1) * documents_each]
        (folder / f"{i:02}.txt").write_text("\n\f\n".join(part) + "\n")
    return documents


def train(data, tokenizer, count, batch_size=4, seed=0, **arguments):
    text = batches.Training(data, Tokenizer(tokenizer))
    found = text.batches(batch_size=batch_size, seed=seed, **arguments)
    return list(itertools.islice(found, count))


def test_documents_of_files(tokenizer, tmp_path):
    (tmp_path / "1.txt").write_bytes(
        b"\f\n  one\n\nmore one \n\f\n\f\ntwo \f two\n\fthree\r\n\f\r\nfour\n\f\n"
    )
    (tmp_path / "2.txt").write_bytes(b"five\n")
    (tmp_path / "3.txt").write_bytes("s\u00efx \x01 \ufeff \u4e2d\n\f\n\ufeffseven".encode())
    (tmp_path / "4.txt").write_bytes(b"\n\f\n")
    expected = ["  one\n\nmore one ", "two \f two\n\fthree", "four", "five"]
    expected += ["s\u00efx \x01 \ufeff \u4e2d", "\ufeffseven"]
    assert texts(tokenizer, f"files:{tmp_path}/*.txt") == expected


def test_documents_of_lines(tokenizer, tmp_path):
    (tmp_path / "1").write_bytes(b"one\n\r\n two\r two\r\n")
    (tmp_path / "2").write_bytes(b"three")
    assert sorted(texts(tokenizer, f"lines:{tmp_path}/*")) == [" two\r two", "one", "three"]


@pytest.mark.parametrize("kind", ["files", "lines"])
@pytest.mark.parametrize("blank", ["", "\r\n"])
def test_the_mark_that_begins_a_utf_8_file_is_no_text(tokenizer, tmp_path, kind, blank):
    (tmp_path / "1").write_bytes(f"\ufeff{blank}one\r\n\f\r\ntwo".encode())
    expected = {"files": ["one", "two"], "lines": ["one", "\f", "two"]}[kind]
    assert sorted(texts(tokenizer, f"{kind}:{tmp_path}/1")) == sorted(expected)


@pytest.mark.parametrize(
    ("kind", "mark", "encoding"),
    [
        ("files", "\ufeff", "utf-16-le"),
        ("lines", "\ufeff", "utf-16-be"),
        ("lines", "", "utf-16-le"),
        ("files", "", "utf-32-be"),
    ],
)
def test_utf_16_is_refused(tokenizer, tmp_path, kind, mark, encoding):
    (tmp_path / "1").write_bytes(f"{mark}the cat sat".encode(encoding))
    reason = "not UTF-8" if mark else "NUL characters, is it UTF-16"
    unit = {"files": "document", "lines": "line"}[kind]
    with pytest.raises(UserError, match=f"{tmp_path}/1: {unit} 1: .*{reason}"):
        documents(tokenizer, f"{kind}:{tmp_path}/1")


def rows_of_task(task, count):
    """Its first rows, before seqio shuffles them."""
    dataset = task.get_dataset({"tokens": T}, "train", shuffle=False, trim_output_features=False)
    return [row["tokens"].tolist() for row in dataset.take(count).as_numpy_iterator()]


def test_rows_of_a_task_are_its_packed_documents(tasks, tokenizer, tmp_path):
    """Epoch after epoch, without padding between them."""
    write_files(tmp_path, files=1, documents_each=15)
    source = f"files:{tmp_path}/*"
    epochs = documents(tokenizer, source) * 3
    expected = rows.packed(epochs, length=T, bos_id=BOS, pad_id=PAD)
    expected = np.concatenate(list(expected)).tolist()[:-1]  # without the row that is not full
    made = reader.open_source(source), Tokenizer(tokenizer), T, rows.BadRecords(0)
    found = rows_of_task(tasks.make_task(*made, failed=[], seed=0), len(expected))
    assert found == expected and len(found) > 40


def test_each_epoch_reads_every_document_once(tasks, tokenizer, tmp_path):
    """The files in another order each time, decided by the key; some documents are bad."""
    for i in range(40):
        content = [make_text(i + k, 5).encode() for k in range((0, 1, 15, 16, 17, 40)[i % 6])]
        content = [b"\xff" if k % 13 == 12 else text for k, text in enumerate(content)]
        (tmp_path / f"{i:02}.txt").write_bytes(b"\r\n\f\n".join(content))
    source = reader.open_source(f"files:{tmp_path}/*")
    records = rows.BadRecords(999)
    read = [d.tokens.tolist() for d in reader.documents(source, Tokenizer(tokenizer), records)]
    assert len(read) > 300 and len(records.met) > 10

    def epochs(*key):
        met = rows.BadRecords(999)
        endless = tasks.endless_documents(source, Tokenizer(tokenizer), met, key)
        found = [tokens.tolist() for tokens in itertools.islice(endless, 2 * len(read))]
        assert met.met.keys() == records.met.keys()
        return found[: len(read)], found[len(read) :]

    first, second = epochs(0, 1)
    assert sorted(first) == sorted(second) == sorted(read) and first != second
    assert epochs(0, 1) == (first, second) and epochs(1, 1)[0] != first != epochs(0, 0)[0]


def test_new_files_are_seen(tokenizer, tmp_path):
    write_files(tmp_path, files=1, documents_each=2)
    source = f"files:{tmp_path}/*"
    assert len(texts(tokenizer, source)) == 2
    (tmp_path / "99.txt").write_text("late")
    assert texts(tokenizer, source)[-1] == "late"


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """The data of two sources, and its first 24 batches: more than an epoch."""
    folder = tmp_path_factory.mktemp("mixture")
    write_files(folder / "a", files=3, documents_each=5)
    write_files(folder / "b", files=1, documents_each=5)
    data = config_data((f"files:{folder}/a/*", f"files:{folder}/b/*"), (2.0, 1.0))
    return data, train(data, tokenizer, 24)


def test_batch_is_a_function_of_seed_and_step(tokenizer, mixture):
    data, straight = mixture
    assert equal(train(data, tokenizer, 8, start_step=16), straight[16:])
    assert not equal(train(data, tokenizer, 8, seed=1), straight[:8])
    for batch in straight:
        assert batch["tokens"].shape == (4, T) and batch["tokens"].dtype == np.int32
        np.testing.assert_array_equal(batch["segment"], rows.segments(batch["tokens"], BOS, PAD))


@pytest.mark.slow
def test_a_process_that_fails_ends(tokenizer, tmp_path):
    """Even with a thread of TensorFlow that has more text to read."""
    write_files(tmp_path / "a", files=2, documents_each=5)
    data = config_data((f"files:{tmp_path}/a/*",))
    program = f"""
from absl import flags
from ml_collections import ConfigDict
from latent_delib.data import batches
from latent_delib.data.tokenizer import Tokenizer
flags.FLAGS(["test"])
text = batches.Training(ConfigDict({data.to_dict()!r}), Tokenizer({tokenizer!r}))
found = text.batches(batch_size=4, seed=0)
next(found)
raise RuntimeError("a bug")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a bug\n")


@pytest.mark.slow
def test_another_process_reads_the_same(tokenizer, tmp_path):
    """Hosts share batches by each running the whole pipeline: it must be the same everywhere."""
    write_files(tmp_path / "a", files=20, documents_each=5)
    write_files(tmp_path / "b", files=1, documents_each=5)
    data = config_data((f"files:{tmp_path}/a/*", f"files:{tmp_path}/b/*"), (2.0, 1.0))
    program = f"""
import hashlib, itertools
from absl import flags
from ml_collections import ConfigDict
from latent_delib.data import batches
from latent_delib.data.tokenizer import Tokenizer
flags.FLAGS(["test"])
data, digest = ConfigDict({data.to_dict()!r}), hashlib.sha256()
found = batches.Training(data, Tokenizer({tokenizer!r})).batches(batch_size=4, seed=0)
for batch in itertools.islice(found, 100):
    digest.update(batch["tokens"])
found.close()
print(digest.hexdigest())
"""
    env = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env
    )
    digest = hashlib.sha256(np.stack([batch["tokens"] for batch in train(data, tokenizer, 100)]))
    assert result.stdout.strip() == digest.hexdigest()


def test_order_does_not_depend_on_where_the_files_lie(tokenizer, tmp_path):
    for folder in ("a", "z"):
        write_files(tmp_path / folder, files=2, documents_each=5)
    write_files(tmp_path / "b", files=1, documents_each=5, start=50)
    here, there = (
        (f"files:{tmp_path}/{folder}/*", f"files:{tmp_path}/b/*") for folder in ("a", "z")
    )
    assert equal(train(config_data(here), tokenizer, 12), train(config_data(there), tokenizer, 12))


def test_sources_are_mixed_by_weight(tokenizer, tmp_path):
    for name, word in {"a": "cat", "b": "dog"}.items():
        (tmp_path / name).write_text("\n".join([" ".join([word] * 30)] * 20))
    data = config_data((f"lines:{tmp_path}/a", f"lines:{tmp_path}/b"), (4.0, 1.0))
    tokens = np.concatenate([b["tokens"] for b in train(data, tokenizer, 100, batch_size=10)])
    share = np.mean(["cat" in decode(tokenizer, row) for row in tokens])
    assert abs(share - 0.8) < 0.05


def test_hosts_share_one_batch(tokenizer, mixture):
    """Each host keeps exactly its rows, whether they lie together or apart, from any step on."""
    data, straight = mixture
    for mine in (np.arange(2, 4), np.arange(1, 4, 2)):  # the second of two hosts
        expected = [{k: v[mine] for k, v in batch.items()} for batch in straight[3:9]]
        assert equal(train(data, tokenizer, 6, rows=mine, start_step=3), expected)


def test_training_sees_every_document(tokenizer, tmp_path):
    """Nothing is lost at the end of an epoch, at the end of a row or to the shuffling."""
    write_files(tmp_path, files=4, documents_each=5)
    source = f"files:{tmp_path}/*"
    tokens = np.concatenate(documents(tokenizer, source))
    found = np.concatenate([b["tokens"] for b in train(config_data((source,)), tokenizer, 400)])
    assert found.all(), "an endless stream has no padding"
    expected = np.bincount(tokens) / len(tokens)
    drawn = np.bincount(found[found > BOS], minlength=len(expected)) / (found > BOS).sum()
    assert set(np.unique(found)) == {BOS, *tokens.tolist()}
    np.testing.assert_allclose(drawn, expected, atol=0.02)


def bad(data, tokenizer, **arguments):
    with pytest.raises(UserError) as error:
        train(data, tokenizer, 1, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_sources(tokenizer, tmp_path):
    assert f"no file matches '{tmp_path}/none*'" in bad(
        config_data((f"files:{tmp_path}/none*",)), tokenizer
    )
    assert f"no file matches '{tmp_path}/none'" in bad(
        config_data((f"lines:{tmp_path}/none",)), tokenizer
    )

    (tmp_path / "empty").write_text("\n\f\n\n")
    for kind in ("files", "lines"):
        (tmp_path / "empty").write_text("\n\f\n\n" if kind == "files" else "\n\n")
        source = f"{kind}:{tmp_path}/empty"
        assert f"source {source!r} holds no text" in bad(config_data((source,)), tokenizer)
        with pytest.raises(UserError, match="holds no text"):
            batches.validation_documents(config_data((source,)), tokenizer=Tokenizer(tokenizer))
    (tmp_path / "one").write_text("a cat")
    source = f"files:{tmp_path}/one"
    assert f"{tmp_path}/no.model" in bad(config_data((source,)), f"{tmp_path}/no.model")


def test_a_tokenizer_must_have_bos_and_eos(tokenizer, tmp_path):
    text = str(Path(tokenizer).parent / "text")
    (tmp_path / "one").write_text("a cat")
    for name, flags in {"BOS": {"bos_id": -1}, "EOS": {"eos_id": -1}}.items():
        prefix = str(tmp_path / name)
        sentencepiece.SentencePieceTrainer.train(
            input=text,
            model_prefix=prefix,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            **flags,
        )
        message = bad(config_data((f"files:{tmp_path}/one",)), f"{prefix}.model")
        assert message == f"tokenizer {prefix}.model: names no token for {name}"


def prepare(data, tokenizer, out):
    return prepare_command.prepare(config_to_prepare(data, tokenizer), str(out))


def test_prepared_files_hold_what_text_holds(tokenizer, tmp_path, capsys, monkeypatch):
    write_files(tmp_path / "a", files=3, documents_each=5)
    write_files(tmp_path / "b", files=2, documents_each=4, start=50)
    sources = (f"files:{tmp_path}/a/*", f"files:{tmp_path}/b/*")
    data = config_data(sources, (2.0, 1.0), validation=sources[1:])
    monkeypatch.setattr(progress, "EVERY", 0.0)
    meta = prepare(data, tokenizer, tmp_path / "out")
    printed, warned = capsys.readouterr()
    has = f"{sources[1]} has 2 of its parts too, such as {tmp_path}/b/00.txt"
    assert f"warning: {sources[1]} is trained on: {has}" in warned.splitlines()
    assert warned.count("is trained on") == 1
    *_, last = re.findall(
        r"/a/\*: prepared ([\d,]+)/([\d,]+) bytes  [\d,.e+]+ bytes/s  ETA 0:00:00", printed
    )
    done, total = (int(number.replace(",", "")) for number in last)
    assert 0.9 * total < done <= total  # separators are no document's
    for entry in meta["train"]:
        assert (
            f"{entry['source']}: {entry['documents']:,} documents, {entry['tokens']:,} tokens"
            in printed
        )
    assert meta["dtype"] == "uint16" and meta == token_files.read_meta(str(tmp_path / "out"))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "out"}

    prepared = data.copy_and_resolve_references()
    prepared.token_files = str(tmp_path / "out")
    for one, other in zip(
        batches.validation_documents(data, tokenizer=Tokenizer(tokenizer)),
        batches.validation_documents(prepared, tokenizer=Tokenizer(tokenizer)),
        strict=True,
    ):
        assert (one.source, one.work) == (other.source, other.work) and one.work in (
            "00.txt",
            "01.txt",
        )
        assert (
            np.array_equal(one.tokens, other.tokens)
            and one.tokens.dtype == other.tokens.dtype == np.int32
        )
    for i, source in enumerate(sources):
        stored = (
            arrays.open_array(f"{tmp_path}/out/train/{i}/tokens", (meta["train"][i]["rows"], T))
            .read()
            .result()
        )
        text = np.concatenate(documents(tokenizer, source))
        np.testing.assert_array_equal(stored[stored > BOS], text)
        assert meta["train"][i]["tokens"] == len(text) and meta["train"][i]["rows"] == len(stored)
    assert train(prepared, tokenizer, 1)[0]["tokens"].shape == (4, T)


def test_works_are_files_told_from_each_other(tokenizer, tmp_path):
    """By the shortest path that does it; each line is a work of its own, in any file."""
    for name in ("one/a.txt", "two/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("A cat.\n\f\nA mat.\n")

    def works(source):
        found = reader.documents(
            reader.open_source(source), Tokenizer(tokenizer), rows.BadRecords(0)
        )
        return [document.work for document in found]

    assert works(f"files:{tmp_path}/*/a.txt") == ["one/a.txt"] * 2 + ["two/a.txt"] * 2
    assert works(f"files:{tmp_path}/one/*") == ["a.txt"] * 2
    assert set(works(f"lines:{tmp_path}/one/*")) == {""}


def test_prepare_overwrites_nothing(tokenizer, tmp_path, capsys):
    write_files(tmp_path / "a", files=2, documents_each=3)
    data, out = config_data((f"files:{tmp_path}/a/*",)), tmp_path / "out"
    meta = prepare(data, tokenizer, f"{out}/")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()
    assert prepare(data, tokenizer, out) == meta
    assert "already prepared" in capsys.readouterr().out
    (extra := tmp_path / "a" / "extra.txt").write_text("One more document.")
    with pytest.raises(UserError, match="the text of files:"):
        prepare(data, tokenizer, out)
    extra.unlink()
    data.seq_len = 32
    with pytest.raises(UserError, match="seq_len is 16 there and 32 here"):
        prepare(data, tokenizer, out)
    data.seq_len, data.validation = T, ("packaged/validation",)
    with pytest.raises(UserError, match="validation is "):
        prepare(data, tokenizer, out)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match="exists, but holds no token files"):
        prepare(data, tokenizer, out)


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != files.LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_interrupted_prepare_goes_on_after_the_last_whole_source(tokenizer, tmp_path, capsys):
    for name in "abcd":
        write_files(tmp_path / name, files=2, documents_each=3, start=ord(name))
    sources = [f"files:{tmp_path}/{name}/*" for name in "abcd"]
    data = config_data(sources[:3], (1.0, 1.0, 1.0), validation=sources[3:])
    prepare(data, tokenizer, tmp_path / "straight")

    out, bad_file = tmp_path / "out", tmp_path / "c" / "99.txt"
    bad_file.write_bytes(b"bad \xff")
    with pytest.raises(UserError, match="99.txt: document 1: not UTF-8"):
        prepare(data, tokenizer, out)
    assert token_files.read_meta(str(out)) is None
    before = contents(out)
    bad_file.unlink()
    (tmp_path / "b" / "late.txt").write_text("one more cat")

    other = config_data(sources[:2], (1.0, 1.0), validation=sources[3:])
    with pytest.raises(UserError, match=r"unfinished .* \(whole sources: 2\): train is "):
        prepare(other, tokenizer, out)
    assert contents(out) == before

    written = out / "train" / "0" / "tokens" / "zarr.json"
    when = written.stat().st_mtime_ns
    capsys.readouterr()
    prepare(data, tokenizer, out)
    printed = capsys.readouterr().out
    assert f"{sources[0]}: was prepared before" in printed
    assert f"{sources[1]}: was prepared before" not in printed  # its text has changed
    assert written.stat().st_mtime_ns == when
    prepare(data, tokenizer, tmp_path / "new")
    assert contents(out) == contents(tmp_path / "new") != contents(tmp_path / "straight")


def test_a_killed_prepare_goes_on(tokenizer, tmp_path):
    write_files(tmp_path / "short", files=1, documents_each=3)
    write_files(tmp_path / "long", files=4, documents_each=9000)
    out = tmp_path / "out"
    sources = (f"files:{tmp_path}/short/*", f"files:{tmp_path}/long/*")
    command = [sys.executable, "-m", "latent_delib.prepare", "--config=quickstart", f"--out={out}"]
    command += [f"--config.data.sources={sources}", "--config.data.weights=(1.0, 1.0)"]
    command += [f"--config.data.validation={sources[:1]}"]
    command += [f"--config.decoder.tokenizer={tokenizer}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    unfinished = out / token_files.UNFINISHED
    whole = '"sha256"'
    while not (unfinished.exists() and whole in unfinished.read_text().partition("long")[0]):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "meta.json").exists()

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{sources[0]}: was prepared before" in again.stdout
    assert f"{sources[1]}: was prepared before" not in again.stdout
    command[4] = f"--out={tmp_path}/straight"
    subprocess.run(command, capture_output=True, check=True)
    assert contents(out) == contents(tmp_path / "straight")


def test_a_prepare_that_finished_nothing_binds_nobody(tokenizer, tmp_path):
    """After a wrong text, the right one is prepared in the same folder."""
    write_files(tmp_path / "a", files=1, documents_each=3)
    write_files(tmp_path / "b", files=1, documents_each=3)
    (tmp_path / "a" / "99.txt").write_bytes(b"bad \xff")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(config_data((f"files:{tmp_path}/a/*",)), tokenizer, out)
    meta = prepare(config_data((f"files:{tmp_path}/b/*",)), tokenizer, out)
    assert token_files.read_meta(str(out)) == meta
    assert not (out / token_files.UNFINISHED).exists()


def test_text_that_changes_while_it_is_prepared_is_refused(tokenizer, tmp_path, monkeypatch):
    write_files(tmp_path / "a", files=2, documents_each=3)
    data, out = config_data((f"files:{tmp_path}/a/*",)), tmp_path / "out"
    write_train = token_files.write_train

    def write_while_the_text_grows(*args):
        counts = write_train(*args)
        with (tmp_path / "a" / "00.txt").open("a") as file:
            file.write(" and a half-written w")
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "write_train", write_while_the_text_grows)
        with pytest.raises(UserError, match="changed while it was read; run this again"):
            prepare(data, tokenizer, out)
    prepare(data, tokenizer, out)


def test_a_tokenizer_with_too_many_tokens_is_told_before_the_text_is_read(tokenizer, tmp_path):
    write_files(tmp_path / "a", files=1, documents_each=3)
    (tmp_path / "config.json").write_text('{"format": "x", "architecture": {"vocab_size": 99}}')
    for changes in ({"path": str(tmp_path)}, {"architecture": {"vocab_size": 99}}):
        config = config_to_prepare(config_data((f"files:{tmp_path}/a/*",)), tokenizer)
        config.decoder.update(changes)
        with pytest.raises(UserError, match=r"tokenizer.model has \d+ pieces, .* only 99$"):
            prepare_command.prepare(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_jobs_do_not_write_the_same_token_files(tokenizer, tmp_path):
    write_files(tmp_path / "a", files=1, documents_each=3)
    out = tmp_path / "out"
    with files.locked(str(out), "it"), pytest.raises(UserError, match="out: in use by another job"):
        prepare(config_data((f"files:{tmp_path}/a/*",)), tokenizer, out)
    assert [path.name for path in out.iterdir()] == [files.LOCK]


def test_packaged_text():
    packaged = PACKAGED / "tokenizer.model"
    data = config_data(("packaged/train",), validation=("packaged/validation",))
    assert train(data, packaged, 1)[0]["tokens"].shape == (4, T)
    document = next(batches.validation_documents(data, tokenizer=Tokenizer(packaged)))
    assert (document.source, document.work) == ("packaged/validation", "alpine-doc.txt")
    assert len(decode(str(packaged), document.tokens).split()) > 20
