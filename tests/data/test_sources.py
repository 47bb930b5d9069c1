"""Source strings: what each form means, and what is refused before anything else is done."""

import os
import sys

import pytest
from ml_collections import ConfigDict

import latent_delib.data
from latent_delib import evaluate, prepare, train
from latent_delib.data import batches, sources
from latent_delib.errors import UserError
from tests.texts import config_data


def test_each_form():
    assert sources.parse("files:a/*.txt") == sources.Files("files", "a/*.txt")
    assert sources.parse("lines:gs://bucket/a:b") == sources.Files("lines", "gs://bucket/a:b")
    assert sources.parse("tfds:c4/en:3.0.1:train[:1%]:text") == sources.Tfds(
        "text", "c4/en:3.0.1", "train[:1%]", ("text",)
    )
    for source, meant in {
        "hf:me/notes:train:text": ("me/notes", "", "", "train", "text"),
        "hf:me/notes/en.2@main:dev:the text": ("me/notes", "en.2", "main", "dev", "the text"),
        "hf:./notes:train:text": ("./notes", "", "", "train", "text"),
        "hf:/a:b/c d:train:text": ("/a:b/c d", "", "", "train", "text"),
    }.items():
        found = sources.parse(source)
        *where, feature = meant
        assert found == sources.Hub("text", *where, (feature,))
        assert found.is_local == (meant[0][0] in "./")
    assert sources.parse("qa_steps-2:hf:me/sums:train:the question,answer,steps") == sources.Hub(
        "qa_steps-2", "me/sums", "", "", "train", ("the question", "answer", "steps")
    )
    assert sources.parse("qa:tfds:sums:train[:1%]:q,a") == sources.Tfds(
        "qa", "sums", "train[:1%]", ("q", "a")
    )
    kind, pattern = sources.parse("packaged/validation")
    assert kind == "files" and pattern.endswith("/corpus/validation/*.txt")
    sources.check_files(sources.PACKAGED)


@pytest.mark.parametrize("text", ["q.jsonl", "hf:./sums:train:q,a", "tfds:sums:train:q,a"])
def test_sources_of_questions(text):
    kinds = {"qa": (False, 0), "qa_steps": (True, 0), "qa_steps-2": (True, 2)}
    for kind, expected in kinds.items():
        source = f"{kind}:{text}"
        assert sources.has_questions(source)
        assert (sources.has_steps(source), sources.removed_steps(source)) == expected
        assert sources.source_of(source) == source
    plain = text if ":" in text else f"lines:{text}"
    assert not sources.has_questions(plain) and not sources.has_steps(plain)


def test_another_number_of_features_is_refused():
    for source, expected in {
        "qa:hf:me/sums:train:q": "features 'q', expected QUESTION,ANSWER",
        "qa:tfds:sums:train:q,a,s": "features 'q,a,s', expected QUESTION,ANSWER",
        "qa_steps:hf:me/sums:train:q,": "features 'q,', expected QUESTION,ANSWER[,STEPS]",
        "qa_steps:hf:./sums:train:q,a,s,t": "expected QUESTION,ANSWER[,STEPS]",
    }.items():
        with pytest.raises(UserError) as error:
            sources.parse(source)
        assert str(error.value).startswith(f"config.data: source {source!r}: features ")
        assert str(error.value).endswith(expected)


@pytest.mark.parametrize(
    "source",
    [
        "packaged/trian",
        "file:a.txt",
        "texts/*.txt",
        "tfds:tiny_notes",
        "hf:notes:train:text",
        "hf:me/notes:text",
        "hf:me/notes/a/b:train:text",
        "qa:hf:me/notes:question,answer",
        "qa-1:hf:me/notes:train:question,answer",
        "files:",
        "",
    ],
)
def test_another_form_is_refused(source):
    with pytest.raises(UserError) as error:
        sources.parse(source)
    assert f"unknown source {source!r}" in str(error.value)
    assert "files:GLOB, lines:GLOB, qa:GLOB" in str(error.value)
    assert "tfds:NAME:SPLIT:FEATURE, hf:OWNER/NAME" in str(error.value)


def test_files_on_another_store_are_refused():
    with pytest.raises(UserError, match="'files:s3://a/\\*': expected .* on gs://"):
        sources.parse("files:s3://a/*")
    with pytest.raises(UserError, match="'lines:gs://a/\\*\\*/b': .* on this machine"):
        sources.parse("lines:gs://a/**/b")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder" / "b").mkdir(parents=True)
    for name in ("a[1].txt", "a1.txt", ".hidden", "folder/b/b.md"):
        (tmp_path / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a[1].txt", ["a[1].txt"]),  # the file of that name, though [1] is a glob for 1
        ("a[12].txt", ["a1.txt"]),
        ("a*", ["a1.txt", "a[1].txt"]),
        ("*", ["a1.txt", "a[1].txt"]),
        ("**/a1.txt", ["a1.txt"]),
        ("**/**/*.md", ["folder/b/b.md"]),
    ],
)
def test_the_files_that_a_pattern_means(folder, pattern, names):
    found = sources.local_files(f"{folder}/{pattern}")
    found = sources.only_files("files:x", found)
    assert found == [f"{folder}/{name}" for name in names]


def test_local_files_that_are_not_there(folder):
    for name in ("folder", "folder/", "fold*"):
        source = f"lines:{folder}/{name}"
        with pytest.raises(UserError) as error:
            sources.check_files([source])
        meant = f"{folder}/folder is a folder, did you mean lines:{folder}/folder/*.txt?"
        assert str(error.value) == f"config.data: source {source!r}: {meant}"
    with pytest.raises(UserError, match=r"did you mean qa:.*/folder/\*\.jsonl\?"):
        sources.check_files([f"qa:{folder}/folder"])
    with pytest.raises(UserError, match=f"no file matches '{folder}/none'"):
        sources.check_files([f"files:{folder}/a1.txt", f"files:{folder}/none"])
    # told when they are read
    sources.check_files(["files:gs://bucket/none", "tfds:none:train:text"])


def config_of(**change):
    packaged = {"sources": ("packaged/train",), "validation": ("packaged/validation",)}
    return ConfigDict({"data": config_data(**packaged | change)})


COMMANDS = {
    "prepare": lambda config: prepare.prepare(config, "out"),
    "train": lambda config: train.train(config, "workdir"),
    "evaluate": lambda config: evaluate.evaluate(config, "workdir", "out"),
}
MISTAKES = {
    "packaged/trian": "unknown source",
    "files:no such": "no file matches 'no such'",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("source", MISTAKES)
def test_a_wrong_source_is_told_before_anything_is_done(command, source, monkeypatch, tmp_path):
    """Before TensorFlow is imported, a model described, a decoder's folder read."""
    monkeypatch.chdir(tmp_path)
    for name in ("tensorflow", "tasks"):
        monkeypatch.delattr(latent_delib.data, name, raising=False)
        monkeypatch.setitem(sys.modules, f"latent_delib.data.{name}", None)  # no import of it works
    field = "validation" if command == "evaluate" else "sources"
    with pytest.raises(UserError, match=MISTAKES[source]):
        COMMANDS[command](config_of(**{field: (source,)}))  # a config that holds nothing else
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["sources", "validation"])
def test_with_token_files_sources_need_no_files(field):
    given = {field: ("files:none",)}
    batches.check(config_of(**given, token_files="tokens").data, field)
    with pytest.raises(UserError, match="no file matches 'none'"):
        batches.check(config_of(**given).data, field)


@pytest.mark.parametrize("command, field", [("train", "sources"), ("evaluate", "validation")])
def test_a_command_checks_the_text_that_it_reads(command, field, monkeypatch):
    """And no other text: the first check ends the command here."""

    class Checked(Exception):
        pass

    def check(data, field):
        raise Checked(field)

    monkeypatch.setattr(batches, "check", check)
    with pytest.raises(Checked, match=f"^{field}$"):
        COMMANDS[command](config_of())


def test_a_pattern_finds_no_hidden_file_and_no_file_twice(tmp_path):
    for name in ("a.txt", ".a.txt", "b/c.txt", "b/.hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)

    def found(pattern):
        return sorted(os.path.relpath(path, tmp_path) for path in sources.local_files(str(pattern)))

    assert found(tmp_path / "**" / "*.txt") == ["a.txt", "b/c.txt"]
    assert found(tmp_path / ".*.txt") == [".a.txt"]
    assert found(tmp_path / ".a.txt") == [".a.txt"]
    assert found(tmp_path / "b" / ".hidden" / "*.txt") == ["b/.hidden/d.txt"]
