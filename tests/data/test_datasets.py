"""Text of datasets, of TFDS and of the Hugging Face Hub; and what seqio reads of them."""

import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latent_delib.data import questions, rows
from latent_delib.data import text as reader
from latent_delib.data.tokenizer import Tokenizer
from latent_delib.errors import Outage, UserError
from latent_delib.job.preparation import prepare
from tests.fake_hub import COMMIT, environment, serving
from tests.texts import config_data, config_to_prepare

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 18  # more than are read in turns


def contents(source):
    return [text.content.decode() for text in reader.texts(reader.open_source(source))]


def error(source):
    with pytest.raises(UserError) as found:
        list(reader.texts(reader.open_source(source)))
    assert str(found.value).startswith("config.data: ") and "\n" not in str(found.value)
    return str(found.value)


# TFDS.


def store(folder, name, file_format, bodies, disable_shuffling=False, **texts):
    """`texts` are more features, of text or of lists of text."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    records = {"body": bodies, "score": list(range(len(bodies)))} | texts
    features = {"body": tfds.features.Text(), "score": tf.int64}
    for key, values in texts.items():
        text = tfds.features.Text()
        features[key] = text if isinstance(values[0], str) else tfds.features.Sequence(text)
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.2.0",
        data_dir=folder,
        split_datasets={"train": tf.data.Dataset.from_tensor_slices(records)},
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=disable_shuffling,
        file_format=file_format,
        download_config=tfds.download.DownloadConfig(num_shards=SHARDS if len(bodies) > 9 else 1),
    )


@pytest.fixture(params=["array_record", "tfrecord"])
def tfds_folder(request, tmp_path, monkeypatch):
    """$TFDS_DATA_DIR, with a dataset of four records."""
    store(tmp_path, "tiny_notes", request.param, ["one", "two", "", "three"], True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_texts_of_tfds(tfds_folder):
    for name in ("tiny_notes", "tiny_notes:1.2.0"):
        assert contents(f"tfds:{name}:train:body") == ["one", "two", "", "three"]
    assert contents("tfds:tiny_notes:train[1:2]:body") == ["two"]
    for source, message in {
        "tfds:no_such_notes:train:body": f"no dataset 'no_such_notes' in {tfds_folder}",
        "tfds:tiny_notes:9.9.9:train:body": f"no dataset 'tiny_notes:9.9.9' in {tfds_folder}",
        "tfds:tiny_notes:dev:body": "no split 'dev', tiny_notes has train",
        "tfds:tiny_notes:train[:1]+train[2:]:body": "unknown source 'tfds:tiny_notes:train[:1]+",
        "tfds:tiny_notes:train+dev:body": "unknown source 'tfds:tiny_notes:train+dev:body'",
        "tfds:tiny_notes:train[10:]:body": "source 'tfds:tiny_notes:train[10:]:body': ",
        "tfds:tiny_notes:train[1]:body": "source 'tfds:tiny_notes:train[1]:body': ",
        "tfds:tiny_notes:train:text": "no text feature 'text'; text features: body",
        "tfds:tiny_notes:train:score": "no text feature 'score'; text features: body",
    }.items():
        assert message in error(source)


def test_damaged_and_lost_files_of_tfds(tfds_folder):
    (file,) = tfds_folder.rglob("*record-0*")
    source = "tfds:tiny_notes:train:body"
    before = reader.open_source(source).fingerprint()
    file.write_bytes(file.read_bytes()[:-2])
    assert reader.open_source(source).fingerprint() != before
    assert str(file) in error(source)
    file.unlink()
    assert str(file) in error(source)
    with pytest.raises(UserError, match=f"{file}; No such file"):
        reader.open_source(source).fingerprint()


@pytest.mark.parametrize(
    ("file_format", "is_ordered"),
    [("tfrecord", False), ("tfrecord", True), ("array_record", True)],
)
def test_order_of_tfds_is_its_own(file_format, is_ordered, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    bodies = [f"document {i}" for i in range(SHARDS * 20)]
    store(tmp_path, "notes", file_format, bodies, is_ordered)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    if file_format == "tfrecord":
        dataset = tfds.load("notes", data_dir=tmp_path, split="train[10:300]", shuffle_files=False)
        expected = dataset.as_numpy_iterator()
    else:
        expected = tfds.data_source("notes", data_dir=tmp_path, split="train[10:300]")
    expected = [record["body"].decode() for record in expected]
    assert contents("tfds:notes:train[10:300]:body") == expected
    parts = reader.open_source("tfds:notes:train[10:300]:body").parts
    assert len(parts) > 10 and all(Path(part).is_file() for part in parts[1:-1])
    # Else a bad record of each half would count as one where both have the same number.
    halves = [reader.open_source(f"tfds:notes:train[{half}]:body") for half in (":30", "30:")]
    assert not set(halves[0].parts) & set(halves[1].parts)
    assert halves[0].num_bytes() > 0 < halves[1].num_bytes()


WITHOUT_TENSORFLOW = """
import sys
from latent_delib.data import text
for source in sys.argv[1:]:
    print([found.content for found in text.texts(text.open_source(source))])
print("tensorflow" in sys.modules)
"""


def test_array_records_need_no_tensorflow(tmp_path):
    store(tmp_path, "tiny_notes", "array_record", ["one", "two"], True)
    done = run(WITHOUT_TENSORFLOW, "tfds:tiny_notes:train:body", TFDS_DATA_DIR=str(tmp_path))
    assert done == ["[b'one', b'two']", "False"]


def run(code, *arguments, **variables):
    """The lines that a process of its own prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# The Hub.


def write_dataset(folder):
    """Three files for training, with a null in each, and one for validation; returns the texts."""
    folder.mkdir(parents=True)
    texts = []
    for i in range(3):
        part = [f"document {i} {k}" for k in range(20)]
        texts += [*part, ""]
        table = pa.table({"text": [*part, None], "score": list(range(21))})
        pq.write_table(table, folder / f"train-{i:05}-of-00003.parquet")
    table = pa.table({"text": ["held out"], "score": [1]})
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    return texts


def test_texts_of_a_local_folder(tmp_path):
    folder = tmp_path / "notes"
    texts = write_dataset(folder)
    assert contents(f"hf:{folder}:train:text") == texts
    assert contents(f"hf:{folder}:test:text") == ["held out"]
    (tmp_path / "lines").mkdir()
    lines = "\n".join(json.dumps({"body": text, "score": 1}) for text in texts)
    (tmp_path / "lines" / "train.jsonl").write_text(lines)
    assert contents(f"hf:{tmp_path}/lines:train:body") == texts
    for source, words in {
        f"hf:{folder}:dev:text": "Bad split: dev. Available splits: ['train', 'test']",
        f"hf:{folder}:train:score": "no text feature 'score'; text features: text",
        f"hf:{tmp_path}/lines:train:score": "no text feature 'score'; text features: body",
        f"hf:{tmp_path}/none:train:text": f"{tmp_path}/none",
    }.items():
        assert words in error(source)


def test_a_feature_that_begins_with_null_holds_text():
    """Where the library does not know the features of JSON lines, as in some versions."""
    from latent_delib.data import hub_datasets

    class Stream(list):
        features = None

    records = [{"body": None, "score": 1}, {"body": "one", "score": 2, "note": None}]
    assert hub_datasets._texts(Stream(records)) == (["body"], [])


def test_fingerprint_and_damage_of_a_local_folder(tmp_path):
    folder = tmp_path / "notes"
    write_dataset(folder)
    before = reader.open_source(f"hf:{folder}:train:text").fingerprint()
    folder.rename(tmp_path / "elsewhere")
    source = f"hf:{tmp_path}/elsewhere:train:text"
    assert reader.open_source(source).fingerprint() == before
    file = tmp_path / "elsewhere" / "train-00002-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert reader.open_source(source).fingerprint() != before
    assert source in error(source)


CHILD = """
import datasets
import sys
from latent_delib.data import text
from latent_delib.errors import UserError
from latent_delib.job.preparation import prepare
for source in sys.argv[1:]:
    try:
        found = text.open_source(source)
        print(found.fingerprint(), [each.content.decode() for each in text.texts(found)])
    except UserError as error:
        print(error)
if not datasets.config.HF_HUB_OFFLINE:
    datasets.load_dataset("me/notes", revision="%s")
"""


def test_texts_of_the_hub(tmp_path):
    """Streamed, then from the library's cache: the same text, the same fingerprint."""
    texts = write_dataset(tmp_path / "hub" / "me" / "notes" / "data")
    # With another revision than main the library asks no other server.
    name = f"hf:me/notes@{COMMIT}"
    with serving(tmp_path / "hub") as server:
        there = environment(server, tmp_path / "cache")
        wrong = [
            f"{name}:train:score",
            f"{name}:dev:text",
            f"hf:me/notes/other@{COMMIT}:train:text",
            "hf:me/notes@other:train:text",
            "hf:me/gated:train:text",
            "hf:me/absent:train:text",
        ]
        streamed, *errors = run(CHILD % COMMIT, f"{name}:train:text", *wrong, **there)
        words = ["no text feature 'score'", "Bad split: dev", "'other' not found"]
        words += ["no revision 'other'", "HF_TOKEN", "no such dataset"]
        for line, source, expected in zip(errors, wrong, words, strict=True):
            assert line.startswith(f"config.data: source {source!r}: ") and expected in line
        assert streamed.endswith(str(texts))
    another = f"hf:me/notes@{'d' * 40}:train:text"
    sources = [f"{name}:train:text", another, "hf:me/another:train:text"]
    cached, *errors = run(CHILD % COMMIT, *sources, **there, HF_HUB_OFFLINE="1")
    assert cached == streamed
    assert (
        f"the library's cache has {COMMIT}, and the client is offline (HF_HUB_OFFLINE)" in errors[0]
    )
    assert errors[1].endswith(
        "not in the library's cache, and the client is offline (HF_HUB_OFFLINE)"
    )


@pytest.mark.parametrize("cached", ["", "d" * 40])
def test_a_hub_that_does_not_answer(cached, monkeypatch):
    import datasets

    def load(*_, **options):
        if cached:
            return types.SimpleNamespace(hash=cached)
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(Outage, match=f"cache.*{cached}, and the Hub does not answer"):
        reader.open_source(f"hf:me/notes@{COMMIT}:train:text")


# prepare, and seqio.


def test_finished_token_files_do_not_ask_the_hub_again(tmp_path, tokenizer_path, monkeypatch):
    """A training ends when the dataset gets a commit, or the Hub is out of reach."""
    write_dataset(tmp_path / "notes")
    local = reader.open_source(f"hf:{tmp_path}/notes:train:text")
    asked = []
    monkeypatch.setattr(reader, "open_source", lambda source: asked.append(source) or local)
    source = "hf:me/notes:train:text"
    config = config_to_prepare(
        config_data((source,), validation=(source,), seq_len=32), tokenizer_path
    )
    first = prepare(config, str(tmp_path / "out"))
    assert asked and first["train"][0]["documents"] > 0
    asked.clear()
    assert prepare(config, str(tmp_path / "out")) == first and not asked
    config.data.sources = ("hf:me/others:train:text",)
    with pytest.raises(UserError, match="train is .*me/notes.* there and .*me/others.* here"):
        prepare(config, str(tmp_path / "out"))


def test_prepare_writes_the_same_each_time(tmp_path, tokenizer_path):
    write_dataset(tmp_path / "notes")
    train, test = ((f"hf:{tmp_path}/notes:{split}:text",) for split in ("train", "test"))
    config = config_to_prepare(config_data(train, validation=test, seq_len=32), tokenizer_path)
    metas = [prepare(config, str(tmp_path / out)) for out in ("a", "b", "a")]
    assert metas[0] == metas[1] == metas[2]
    assert metas[0]["train"][0]["documents"] == 60  # those without text are left out
    assert metas[0]["validation"][0]["works"] == []  # each is its own


@pytest.mark.parametrize("kind", ["tfds", "hf"])
def test_seqio_reads_what_the_reader_reads(kind, tokenizer_path, tmp_path, monkeypatch):
    from latent_delib.data import tasks

    if kind == "hf":
        write_dataset(tmp_path / "notes")
        source = f"hf:{tmp_path}/notes:train:text"
    else:
        store(tmp_path, "notes", "array_record", [f"document {i}" for i in range(SHARDS * 20)])
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        source = "tfds:notes:train:body"
    found = reader.open_source(source)
    path = str(tokenizer_path)
    bad = rows.BadRecords(0)
    read = [document.tokens.tolist() for document in reader.documents(found, Tokenizer(path), bad)]
    endless = tasks.endless_documents(found, Tokenizer(path), bad, (0, 0))
    shuffled = [tokens.tolist() for tokens in itertools.islice(endless, len(read))]
    assert sorted(shuffled) == sorted(read) and len(read) > 50
    assert (shuffled == read) == (found.cycle == 1)


def test_a_bad_record_of_the_hub_is_one_in_every_epoch(tokenizer_path, tmp_path):
    from latent_delib.data import tasks

    for number in range(5):
        lines = [json.dumps({"text": f"a cat {number} {i}"}) for i in range(3)]
        if number == 1:
            lines[1] = json.dumps({"text": "a \0 cat"})
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(lines))
    found, bad = reader.open_source(f"hf:{tmp_path}:train:text"), rows.BadRecords(1)
    endless = tasks.endless_documents(found, Tokenizer(tokenizer_path), bad, (0, 0))
    epochs = [[t.tolist() for t in itertools.islice(endless, 14)] for _ in range(3)]
    assert epochs[0] == epochs[1] == epochs[2] and len(found.parts) == 5
    assert list(bad.met) == [
        f"hf:{tmp_path}:train:text, file 2: record 2: "
        "holds NUL characters, is it UTF-16? convert the file to UTF-8"
    ]


def test_a_bad_record_is_named(tmp_path, tokenizer_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a cat"}\n{"text": "a \\u0000 cat"}\n')
    found = reader.open_source(f"hf:{tmp_path}:train:text")
    *_, bad = reader.texts(found)
    ((_, fault),) = reader.tokens_of(found, [bad], Tokenizer(tokenizer_path))
    assert fault.startswith(f"hf:{tmp_path}:train:text, file 1: record 2: holds NUL")


# Questions.

SUMS = [
    ("What is 3 + 4?", ["3 + 4", "is 7,"], "7"),
    ("What is 2 + 2 + 1?", ["2 + 2 is 4", "4 + 1 is 5"], "5"),
]
OF_GSM8K = ["\n".join(steps) + f"\n#### {answer}" for _, steps, answer in SUMS]
ASKED = ("qa", "qa_steps", "qa_steps-1")


def write_sums(folder):
    """The same questions as a file of ours, and as the dataset in folder / "sums"."""
    (folder / "sums").mkdir()
    with open(folder / "ours.jsonl", "w") as ours, open(folder / "sums/train.jsonl", "w") as sums:
        for (question, steps, answer), whole in zip(SUMS, OF_GSM8K):
            row = {"question": question, "answer": answer, "steps": steps}
            print(json.dumps(row), file=ours)
            named = {"q": question, "whole": whole, "answer": answer, "steps": steps, "score": 1}
            print(json.dumps(named), file=sums)


def test_questions_of_a_local_folder(tmp_path):
    """Answers in GSM8K's form, and steps in a feature: the token files of a file of questions."""
    write_sums(tmp_path)
    data = f"hf:{tmp_path}/sums:train"
    named = {f"{kind}:{tmp_path}/ours.jsonl": kind for kind in ASKED}
    named |= {f"{kind}:{data}:q,whole": kind for kind in ASKED}
    named |= {f"{kind}:{data}:q,answer,steps": kind for kind in ASKED[1:]}
    named[f"qa:{data}:q,answer"] = "qa"
    config = config_to_prepare(config_data(tuple(named), seq_len=64), "packaged")
    meta = prepare(config, str(tmp_path / "tokens"))
    for split in ("train", "validation"):
        found = {kind: set() for kind in ASKED}
        for entry in meta[split]:
            assert entry["documents"] == len(SUMS)
            found[named[entry["source"]]].add(entry["sha256"])
        digests = set.union(*found.values())
        assert [len(each) for each in found.values()] == [1, 1, 1] and len(digests) == len(ASKED)
    assert all(entry["whole"] for entry in meta["train"])
    assert len({entry["text"] for entry in meta["train"]}) == len(named)


def test_questions_of_tfds(tmp_path, monkeypatch):
    """Text, and lists of text, of which TFDS gives bytes."""
    asked, steps, answers = map(list, zip(*SUMS))
    texts = {"whole": OF_GSM8K, "answer": answers, "steps": steps}
    store(tmp_path, "sums", "array_record", asked, True, **texts)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for features in ("body,whole", "body,answer,steps"):
        lines = contents(f"qa_steps:tfds:sums:train:{features}")
        found = [questions.read(line.encode(), True) for line in lines]
        assert [(each.question, each.answer.strip()) for each in found] == [
            (question, answer) for question, _, answer in SUMS
        ]
        assert [each.steps.split() for each in found] == [" ".join(s).split() for s in steps]
    source = "qa_steps:tfds:sums:train:body,steps"
    assert "no text feature 'steps'; text features: answer, body, whole" in error(source)
    assert "no text feature 'score'; text features: answer, body, whole, steps" in error(
        f"{source[:-5]}answer,score"
    )


def test_features_that_hold_no_questions(tmp_path, tokenizer_path):
    write_sums(tmp_path)
    source = f"qa_steps:hf:{tmp_path}/sums:train"
    for features, words in {
        "q,score": "no text feature 'score'; text features: q, whole, answer",
        "q,steps": "no text feature 'steps'; text features: q, whole, answer",
        "q,answer,score": "no text feature 'score'; text features: q, whole, answer, steps",
        "question,answer": "no text feature 'question'; text features: q, whole, answer",
    }.items():
        assert (
            error(f"{source}:{features}")
            == f"config.data: source {f'{source}:{features}'!r}: {words}"
        )
    found = reader.open_source(f"{source}:q,answer")  # there is no ####
    first = next(reader.texts(found))
    ((_, fault),) = reader.tokens_of(found, [first], Tokenizer(tokenizer_path))
    assert fault.startswith(f"{source}:q,answer, file 1: record 1: 'steps' is '', expected text")
