"""Unusable records, files that vanish, and the fingerprint of the data, on both routes."""

import errno
import itertools
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from latent_delib import prepare
from latent_delib.data import arrays, batches, rows, text, text_files, token_files
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import Outage, UserError
from tests.texts import config_data, config_to_prepare

T, PAD, CHUNK = 32, 0, 128  # rows of a chunk


def make_data(source, folder="", limit=0, **change):
    fields = {"token_files": str(folder), "seq_len": T, "max_bad_records": limit}
    return config_data((source,), **fields | change)


@pytest.fixture
def read(sources, tokenizer_path):
    """read(folder, limit, count) -> batches of 16 rows from token files."""

    def found(folder, limit=0, count=30):
        data = make_data(sources["train"], folder, limit)
        loader = batches.Training(data, Tokenizer(tokenizer_path)).batches(batch_size=16, seed=0)
        return list(itertools.islice(loader, count))

    return found


@pytest.fixture
def folder(token_folder, tmp_path):
    return Path(shutil.copytree(token_folder, tmp_path / "tokens"))


def overwrite(array, index, token):
    """A wrong token in an array that is whole: its chunk gets a new checksum."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}}
    tensorstore.open(spec).result()[index].write(token).result()


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def skipped(found, whole):
    """The distinct rows that are padding in `found`; everything else must be as in `whole`."""
    gone = set()
    for one, other in zip(found, whole, strict=True):
        padding = (one["tokens"] == PAD).all(-1)
        assert not one["segment"][padding].any()
        for key in ("tokens", "segment"):
            np.testing.assert_array_equal(one[key][~padding], other[key][~padding])
        gone |= set(map(tuple, other["tokens"][padding].tolist()))
    return gone


def test_bad_records_are_counted_once_and_named(capsys):
    bad = rows.BadRecords(20)
    for i in [*range(20), *range(20)]:
        bad(f"file: line {i}: no\nsense")
    shown = [
        f"bad record number {n}, skipped: file: line {n - 1}: no\\nsense"
        for n in (*range(1, 9), 16)
    ]
    assert (
        capsys.readouterr().out.splitlines() == shown
        and len(bad.met) == 20
        and bad.met.total() == 40
    )
    with pytest.raises(UserError) as error:
        bad("file: line 20: no sense")
    expected = "file: line 20: no sense (bad record number 21, config.data.max_bad_records is 20)"
    assert str(error.value) == f"config.data: {expected}"


def test_a_damaged_chunk_is_skipped_up_to_the_limit(token_folder, folder, read, capsys):
    whole, file = read(token_folder), folder / "train/0/tokens/c/0/0"
    flip(file, 10)
    assert len(skipped(read(folder, CHUNK), whole)) == CHUNK
    assert "bad record number 1, skipped: " in capsys.readouterr().out
    for limit in (0, CHUNK - 1):
        with pytest.raises(UserError) as error:
            read(folder, limit)
        row = (
            re.escape(f"{folder}/train/0")
            + r": row \d+: damaged: DATA_LOSS: .*c/0/0.*Digest mismatch.*"
        )
        count = rf" \(bad record number {limit + 1}, config\.data\.max_bad_records is {limit}\)"
        assert re.fullmatch(rf"config\.data: {row}{count}", str(error.value))


def test_a_token_outside_the_vocabulary_is_skipped(
    token_folder, folder, read, sources, tokenizer_path
):
    whole, vocab_size = read(token_folder), token_files.read_meta(str(folder))["vocab_size"]
    overwrite(folder / "train/0/tokens", (7, 3), vocab_size)
    overwrite(folder / "validation/0/tokens", 1, 2**16 - 1)
    assert len(skipped(read(folder, 1), whole)) == 1
    with pytest.raises(UserError, match=f"train/0: row 7: token {vocab_size}"):
        read(folder)

    def documents(folder, limit=0):
        data = make_data(sources["validation"], folder, limit)
        found = batches.validation_documents(data, tokenizer=Tokenizer(tokenizer_path))
        return [document.tokens.tolist() for document in found]

    assert documents(folder, 1) == documents(token_folder)[1:]
    with pytest.raises(UserError, match="validation/0: document 0: token 65535"):
        documents(folder)


def test_token_files_that_vanish_or_do_not_fit_their_meta(
    folder, read, sources, tokenizer_path, monkeypatch
):
    file, meta = folder / "train/0/tokens/c/0/0", folder / "meta.json"
    # a file in the cache is not missed
    monkeypatch.setattr(arrays, "_CACHE", tensorstore.Context())
    text = batches.Training(make_data(sources["train"], folder, 999), Tokenizer(tokenizer_path))
    loader = text.batches(batch_size=2, seed=0)
    next(loader)
    file.rename(folder / "elsewhere")
    with pytest.raises(UserError, match=rf"{folder}/train/0: row \d+: .*NOT_FOUND"):
        for _ in range(4):  # two batches were read ahead
            next(loader)
    # in a job that begins without it
    with pytest.raises(UserError, match=f"{folder}/train/0.* cannot be read"):
        read(folder)
    text = meta.read_text()
    meta.write_text(re.sub(r'"rows": \d+', '"rows": 3', text))
    with pytest.raises(UserError, match=r"train/0/tokens: .*meta.json says \[3, 32\]"):
        read(folder)
    meta.write_text(text[:-9])
    with pytest.raises(UserError, match=f"{meta}: damaged, expected JSON"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('UNAVAILABLE: Error reading "gs://b/t/c/0": Connection reset', Outage),
        ("DEADLINE_EXCEEDED: All 33 retry attempts failed: HTTP 503", Outage),
        ("RESOURCE_EXHAUSTED: HTTP response code: 429", Outage),
        ("ABORTED: HTTP response code: 503", Outage),
        ("CANCELLED: the request", Outage),
        ("PERMISSION_DENIED: HTTP response code: 403", PermissionError),
        ("UNAUTHENTICATED: HTTP response code: 401", PermissionError),
        ("UNKNOWN: Error reading local file [os_error_code='5']", OSError),
        ('NOT_FOUND: chunk {0} in "gs://b/t/c/0" is missing', UserError),
        ("INVALID_ARGUMENT: Invalid GCS bucket name", UserError),
        ("DATA_LOSS: Digest mismatch", None),
        ("FAILED_PRECONDITION: Requested byte range is not valid for value of size 0", None),
    ],
)
def test_what_a_failed_read_of_token_files_is(text, kind):
    """As for checkpoints: an outage (exit 69) is no mistake of the user's, and no damage."""

    def fail():
        raise ValueError(text)

    future, bad = types.SimpleNamespace(result=fail), rows.BadRecords(1)

    def kind_of(call):
        with pytest.raises((OSError, UserError)) as error:
            call()
        assert "\n" not in str(error.value)
        return type(error.value)

    assert kind_of(lambda: arrays.result(future, "gs://b/t")) == (kind or UserError)
    if kind is None:
        assert token_files._tokens(future, "gs://b/t: row 3", 9, bad) is None and len(bad.met) == 1
    else:
        assert (
            kind_of(lambda: token_files._tokens(future, "gs://b/t: row 3", 9, bad)) == kind
            and not bad.met
        )


def test_a_url_of_no_known_kind():
    with pytest.raises(UserError, match='^s4://nowhere/tokens: .*unsupported URL scheme "s4"'):
        token_files.read_meta("s4://nowhere/tokens")


def test_what_a_failed_read_of_text_is():
    from latent_delib.data.tensorflow import tf

    def failed(kind):
        with pytest.raises(Exception) as found, text_files.reading(["lines:gs://b/a"]):
            raise kind(None, None, "the cause [Op:ReadFile]")
        return found.value

    assert isinstance(failed(tf.errors.UnavailableError), Outage)
    assert isinstance(failed(tf.errors.DeadlineExceededError), Outage)
    assert (
        str(failed(tf.errors.NotFoundError)) == "config.data: reading 'lines:gs://b/a': the cause"
    )
    assert isinstance(failed(tf.errors.InvalidArgumentError), tf.errors.InvalidArgumentError)


def test_a_disk_that_fails_while_text_is_read(sources, tokenizer_path, monkeypatch):
    """It stays an OSError on its way through TensorFlow."""
    calls = []
    encode = text.tokens_of

    def fails_later(*args):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(errno.EIO, "Input/output error", "file")
        return encode(*args)

    monkeypatch.setattr(text, "tokens_of", fails_later)
    data = make_data(sources["train"], "")
    loader = batches.Training(data, Tokenizer(tokenizer_path)).batches(batch_size=4, seed=0)
    with pytest.raises(OSError, match="Input/output error") as error:
        for _ in range(10_000):
            next(loader)
    assert error.value.errno == errno.EIO


@pytest.fixture
def bad_text(tmp_path):
    """Lines in two files of which two are not UTF-8."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "1").write_bytes(
        b"\xff the cat\n" + (b"the cat sat on a mat " * 5 + b"\n") * 20
    )
    (tmp_path / "text" / "2").write_bytes(
        (b"a dog ran to the door " * 5 + b"\n") * 20 + b"caf\xe9 cat \x00\n"
    )
    return f"lines:{tmp_path}/text/*"


def test_bad_text_is_skipped_up_to_the_limit(bad_text, tokenizer_path, tmp_path, capsys):
    tokenizer, where = Tokenizer(tokenizer_path), f"{tmp_path}/text"

    def train(limit):
        data = make_data(bad_text, "", limit)
        loader = batches.Training(data, tokenizer).batches(batch_size=4, seed=0)
        return list(itertools.islice(loader, 40))

    found = train(2)
    lines = sorted(line.partition("skipped: ")[2] for line in capsys.readouterr().out.splitlines())
    assert lines == [f"{where}/1: line 1: not UTF-8 text", f"{where}/2: line 21: not UTF-8 text"]
    good = {*itertools.chain(*(b["tokens"].flat for b in found))}
    source = make_data(bad_text, "", 2)
    documents = [
        document.tokens for document in batches.validation_documents(source, tokenizer=tokenizer)
    ]
    assert len(documents) == 40 and good == {2, *np.concatenate(documents).tolist()}
    resumed = batches.Training(source, tokenizer).batches(batch_size=4, seed=0, start_step=39)
    np.testing.assert_array_equal(next(resumed)["tokens"], found[39]["tokens"])
    for limit in (0, 1):
        with pytest.raises(UserError, match=rf"{where}/.: line \d+: not UTF-8.*is {limit}\)$"):
            train(limit)
        with pytest.raises(UserError, match=rf"is {limit}\)$"):
            data = make_data(bad_text, "", limit)
            list(batches.validation_documents(data, tokenizer=tokenizer))


def test_a_source_of_nothing_else_holds_no_text(tokenizer_path, tmp_path):
    (tmp_path / "1").write_bytes(b"\xff\n" * 9)
    with pytest.raises(UserError, match="holds no text"):
        data = make_data(f"lines:{tmp_path}/1", "", 99)
        batches.Training(data, Tokenizer(tokenizer_path)).batches(batch_size=4, seed=0)


@pytest.mark.parametrize("special", [2, PAD])
def test_text_that_becomes_bos_or_padding_is_bad(special):
    def encode_batch(texts):
        return [[9, special if len(text) > 5 else 9] for text in texts]

    tokenizer = types.SimpleNamespace(bos_id=2, pad_id=PAD, encode_batch=encode_batch)
    reader = types.SimpleNamespace(source="lines:f", unit="line")
    read = [text.Text(b"short", "f", 1), text.Text(b"longer\n", "f", 2)]
    (good, no_fault), (bad, fault) = text.tokens_of(reader, read, tokenizer)
    assert good.tolist() == [9, 9] and not no_fault
    assert not len(bad)
    assert fault == "f: line 2: the tokenizer turns its text into BOS or padding"


def test_prepare_says_where_it_looks_before_a_store_keeps_it_waiting(
    sources, tokenizer_path, monkeypatch, capsys
):
    def look(out):
        raise Outage(103, "UNAVAILABLE", out)

    monkeypatch.setattr(token_files, "read_meta", look)
    config = config_to_prepare(make_data(sources["train"]), tokenizer_path)
    with pytest.raises(Outage):
        prepare.prepare(config, "gs://bucket/tokens")
    assert capsys.readouterr().out == "looking for token files in gs://bucket/tokens\n"


def test_prepare_counts_what_it_skips(bad_text, tokenizer_path, tmp_path, capsys):
    def run(limit, name):
        data = make_data(bad_text, "", limit, validation=(f"lines:{tmp_path}/text/2",))
        return prepare.prepare(config_to_prepare(data, tokenizer_path), str(tmp_path / name))

    meta = run(2, "out")
    assert [meta[split][0]["skipped"] for split in ("train", "validation")] == [2, 1]
    assert [meta[split][0]["documents"] for split in ("train", "validation")] == [40, 20]
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())
    said = capsys.readouterr().out.splitlines()
    assert said[-2].endswith(", 2 skipped") and said[-1].endswith(", 1 skipped")
    with pytest.raises(UserError, match=r"is 1\)$"):
        run(1, "another")
    assert not (tmp_path / "another" / "meta.json").exists()


@pytest.mark.parametrize("kind", ["lines", "files"])
def test_text_that_vanishes_during_a_run_is_named(kind, tokenizer_path, tmp_path):
    for i in range(3):
        (tmp_path / str(i)).write_text("\n".join(["the cat sat on a mat"] * 300))
    data = make_data(f"{kind}:{tmp_path}/*")
    loader = batches.Training(data, Tokenizer(tokenizer_path)).batches(batch_size=64, seed=0)
    next(loader)
    (tmp_path / "1").unlink()
    expected = (
        f"config.data: reading '{kind}:{tmp_path}/*': {tmp_path}/1; No such file or directory"
    )
    with pytest.raises(UserError) as error:
        for _ in range(500):
            next(loader)
    assert str(error.value) == expected


def test_a_store_that_fails_during_a_run_is_an_outage(tokenizer_path, tmp_path, monkeypatch):
    """TensorFlow, through which rows come, keeps no exception of the reader's."""
    (tmp_path / "1").write_text("the cat sat on a mat\n" * 300)
    data = make_data(f"lines:{tmp_path}/1")
    loader = batches.Training(data, Tokenizer(tokenizer_path)).batches(batch_size=64, seed=0)
    next(loader)

    def fail(path):
        raise TimeoutError(110, "Connection timed out", path)

    monkeypatch.setattr(text_files, "open_file", fail)
    with pytest.raises(Outage, match="Connection timed out"):
        for _ in range(500):
            next(loader)


def fingerprint(data, tokenizer_path):
    return batches.Training(data, Tokenizer(tokenizer_path)).fingerprint()


def append(path):
    path.write_bytes(path.read_bytes() + b"x")


CHANGES = {
    "renamed": lambda path: path.rename(path.with_name("2")),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "first byte": lambda path: flip(path, 0),
    "last byte": lambda path: flip(path, -1),
    "appended": append,
    "removed": lambda path: path.unlink(),
    "added": lambda path: path.with_name("9").write_bytes(b"new file"),
    "emptied": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_of_text(change, tokenizer_path, tmp_path):
    for name in ("0", "1"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "1").write_text(name * 200_000)
    before = fingerprint(make_data(f"lines:{tmp_path}/a/*/*"), tokenizer_path)
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    batches.check_fingerprint(
        before, fingerprint(make_data(f"lines:{tmp_path}/b/*/*/*"), tokenizer_path)
    )
    assert fingerprint(make_data(f"files:{tmp_path}/a/*/*"), tokenizer_path) != before
    CHANGES[change](tmp_path / "a" / "1" / "1")
    with pytest.raises(UserError, match=r": sources\[0\] changed; "):
        batches.check_fingerprint(
            before, fingerprint(make_data(f"lines:{tmp_path}/a/*/*"), tokenizer_path)
        )


def test_a_run_of_the_older_packing_does_not_go_on(tokenizer_path, tmp_path):
    """seqio packs questions whole; older versions cut them, so their rows were others."""
    (tmp_path / "q.jsonl").write_text('{"question": "A?", "answer": "B"}\n')
    found = fingerprint(make_data(f"qa:{tmp_path}/q.jsonl"), tokenizer_path)
    of_older = {name: value for name, value in found.items() if "packing" not in name}
    assert len(of_older) == len(found) - 1
    with pytest.raises(UserError, match=r": packing of sources\[0\] new; "):
        batches.check_fingerprint(of_older, found)


def test_fingerprint_of_token_files_reads_meta_json_alone(
    folder, sources, tokenizer_path, tmp_path
):
    """At the published scale there are 50,000 files; each chunk has a checksum for its reading."""
    before = fingerprint(make_data(sources["train"], folder), tokenizer_path)
    assert set(before) == {
        "tokenizer",
        "order",
        "token_files/meta.json",
        "sources[0] (token_files/train/0)",
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "meta.json", elsewhere)
    batches.check_fingerprint(
        before, fingerprint(make_data(sources["train"], elsewhere), tokenizer_path)
    )
    (elsewhere / "meta.json").unlink()
    with pytest.raises(UserError, match=f"no {elsewhere}/meta.json"):
        fingerprint(make_data(sources["train"], elsewhere), tokenizer_path)


def test_a_checkpoint_of_another_order_is_not_trained_on(folder, sources, tokenizer_path):
    found = fingerprint(make_data(sources["train"], folder), tokenizer_path)
    with pytest.raises(UserError, match="order changed; this version reads .* in another order"):
        batches.check_fingerprint(found | {"order": "3"}, found)
    of_text = fingerprint(make_data(sources["train"], ""), tokenizer_path)
    with pytest.raises(UserError, match="order of text new; this version reads"):
        batches.check_fingerprint({k: v for k, v in of_text.items() if "order" not in k}, of_text)
    text = {"tokenizer": found["tokenizer"], "sources[0]": "of text"}
    with pytest.raises(UserError, match="token_files is set: .* leave it empty"):
        batches.check_fingerprint(text, found)
    with pytest.raises(UserError, match="token_files is empty: .* give --text"):
        batches.check_fingerprint(found, text)


def test_fingerprint_of_other_contents_and_another_tokenizer(folder, sources, tokenizer_path):
    data = make_data(sources["train"], folder)
    before = fingerprint(data, tokenizer_path)
    meta = token_files.read_meta(str(folder))
    meta["train"][0]["sha256"] = "0" * 64
    token_files.write_meta(str(folder), meta)
    with pytest.raises(
        UserError,
        match=r"on: sources\[0\] \(token_files/train/0\) changed, token_files/meta.json changed",
    ):
        batches.check_fingerprint(before, fingerprint(data, tokenizer_path))
    text = {"tokenizer": "1", "sources[0]": "2"}
    with pytest.raises(
        UserError, match=r": tokenizer changed, sources\[0\] gone, sources\[1\] new; "
    ):
        batches.check_fingerprint(text, {"tokenizer": "3", "sources[1]": "2"})
