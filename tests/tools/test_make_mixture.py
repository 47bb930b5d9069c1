"""The mixture: which work goes where, that no paragraph stands in two splits, and bad input."""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from latent_delib.errors import UserError
from tools import extract, make_mixture
from tools.make_mixture import SOURCES, Source, Work

SHARED = "The same paragraph stands in two works, and is long enough to be noticed. " * 8
CHOSEN = {
    "ours": Source("MIT", "permissive"),
    "held": Source("GPL-2", "copyleft", split="validation"),
    "other": Source("GFDL", "copyleft", split="unseen"),
}


def own(letter):
    return "".join(f"{letter}{i} is a word of this work. " for i in range(40))


WORKS = {
    "ours": Work("1.0", "All of it is free.", [[SHARED, own("a")], [own("b")]]),
    "held": Work("2.0", "", [[own("c"), SHARED]]),
    "other": Work("3.0", "Copy it.", [[own("d")]]),
}


@pytest.fixture
def folder(tmp_path):
    make_mixture.write_mixture(tmp_path, CHOSEN, WORKS)
    return tmp_path


def test_a_paragraph_of_an_evaluated_work_is_not_trained_on(folder):
    held, ours = ((folder / path).read_text() for path in ("validation/held.txt", "train/ours.txt"))
    assert SHARED.strip() in held and SHARED.strip() not in ours
    assert len(ours.split(extract.SEPARATOR)) == 2


def test_what_is_written(folder):
    about, table = json.loads((folder / "about.json").read_text()), (folder / "MIXTURE.md").read_text()
    files = {str(f.relative_to(folder)) for split in make_mixture.SPLITS for f in (folder / split).iterdir()}
    assert set(about["sha256"]) == files
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        split, work = name.removesuffix(".txt").split("/")
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {split} | {work} |"))
        assert row.endswith(f" {(folder / name).stat().st_size:,} |")
    assert "| validation | held | 2.0 | GPL-2 |" in table
    assert {"train/prose_emma.txt", "validation/prose_persuasion.txt"} <= files  # of the packaged corpus
    assert (folder / "licences/ours.txt").read_text() == "All of it is free."
    assert not (folder / "licences/held.txt").exists()


def test_the_prose_of_the_packaged_corpus_stays_as_it_is(folder):
    for path in ("train/prose_emma.txt", "validation/prose_lincoln_addresses.txt"):
        assert (folder / path).read_bytes() == (make_mixture.CORPUS / path).read_bytes()


def test_a_work_of_which_nothing_is_left_is_named(tmp_path):
    works = WORKS | {"other": Work("3.0", "", [[own("c")]])}
    with pytest.raises(UserError, match=r"other 3\.0: none of its text is its own"):
        make_mixture.write_mixture(tmp_path, CHOSEN, works)


def test_a_package_is_read_and_removed(tmp_path, monkeypatch):
    def debian(folder, package):
        root = folder / package
        page = root / "usr/share/doc/sbcl/sbcl.html/page.html"
        page.parent.mkdir(parents=True)
        page.write_text(f"<html><body><p>{own('e')}</p></body></html>")
        return root, "9.9"

    monkeypatch.setattr(extract, "debian", debian)
    work = make_mixture.read_package("sbcl-doc", str(tmp_path), 10**6)
    assert (work.version, work.documents) == ("9.9", [[own("e").strip()]])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="vim-doc 9.9: no text"):
        monkeypatch.setattr(extract, "debian", lambda folder, package: (debian(folder, "x")[0].parent, "9.9"))
        monkeypatch.setitem(SOURCES, "vim-doc", Source("Vim", "permissive", extract.pods))
        make_mixture.read_package("vim-doc", str(tmp_path), 10**6)


def test_every_source_is_of_a_known_split_and_group():
    assert {source.split for source in SOURCES.values()} == set(make_mixture.SPLITS)
    assert {source.group for source in SOURCES.values()} == set(make_mixture.LICENCES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mit", 1e6), "--licences: 'mit', expected some of public_domain,permissive,copyleft"),
        (("permissive", 10), "--budget=10: expected at least 500 characters"),
        (("permissive", float("nan")), "--budget=nan"),
        (("permissive", float("inf")), "--budget=inf"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_mixture.make_mixture(str(tmp_path / "out"), *arguments)


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get is not installed"):
        make_mixture.make_mixture(str(tmp_path / "out"), "permissive", 1e6)
    assert not (tmp_path / "out").exists()


def test_the_whole_way(tmp_path, monkeypatch):
    """With packages of one group, or of all; the same bytes again."""

    def debian(folder, package):
        page = folder / package / f"usr/share/doc/{package}/page.html"
        page.parent.mkdir(parents=True)
        page.write_text(f"<html><body><p>{own(package[1])}</p></body></html>")
        (page.parent / "copyright").write_text(f"{package} is free.")
        return folder / package, "1.0"

    monkeypatch.setattr(extract, "debian", debian)
    monkeypatch.setattr(shutil, "which", str)
    monkeypatch.setattr(make_mixture, "SOURCES", CHOSEN)
    monkeypatch.setattr(make_mixture, "ProcessPoolExecutor", ThreadPoolExecutor)
    for out in ("one", "two"):
        make_mixture.make_mixture(str(tmp_path / out), "permissive,copyleft", 1e6)
    assert (tmp_path / "one/train/ours.txt").read_text() == own("u").strip() + "\n"
    assert "| validation | held | 1.0 | GPL-2 | 1 |" in (tmp_path / "one/MIXTURE.md").read_text()
    assert (tmp_path / "one/licences/held.txt").read_text() == "held is free."
    first, second = (json.loads((tmp_path / out / "about.json").read_text())["sha256"] for out in ("one", "two"))
    assert first == second

    make_mixture.make_mixture(str(tmp_path / "three"), "permissive", 1e6)
    assert not (tmp_path / "three/validation/held.txt").exists() and (tmp_path / "three/train/ours.txt").exists()
