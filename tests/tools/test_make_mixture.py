"""The mixture: which work goes where, that no paragraph stands in two splits, and bad input."""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latent_delib.errors import UserError
from tests.launch.pretend import program
from tools import extract, make_mixture
from tools.make_mixture import Work
from tools.mixture_sources import SOURCES, Source

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tests read it, and write nothing into it."""
    where = tmp_path_factory.mktemp("mixture")
    make_mixture.write_mixture(where, CHOSEN, WORKS)
    return where


def test_a_paragraph_that_is_trained_on_is_not_evaluated(folder):
    ours, held = ((folder / path).read_text() for path in ("train/ours.txt", "validation/held.txt"))
    assert SHARED.strip() in ours and SHARED.strip() not in held
    assert own("c").strip() in held


@pytest.mark.slow
def test_works_outside_train_do_not_change_it(folder, tmp_path):
    (tmp_path / "alone").mkdir()
    make_mixture.write_mixture(tmp_path / "alone", {"ours": CHOSEN["ours"]}, WORKS)
    alone, beside = ((path / "train/ours.txt").read_text() for path in (tmp_path / "alone", folder))
    assert alone == beside


def test_what_is_written(folder):
    about, table = (
        json.loads((folder / "about.json").read_text()),
        (folder / "MIXTURE.md").read_text(),
    )
    files = {
        str(f.relative_to(folder))
        for split in make_mixture.SPLITS
        for f in (folder / split).iterdir()
    }
    assert set(about["sha256"]) == files
    for name, digest in about["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        split, work = name.removesuffix(".txt").split("/")
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {split} | {work} |"))
        assert row.endswith(f" {(folder / name).stat().st_size:,} |")
    assert "| validation | held | 2.0 | GPL-2 |" in table
    assert "| train | prose_emma | tools/prose | public domain |" in table
    assert "| validation | prose_persuasion | packaged corpus | public domain |" in table
    assert {"train/prose_emma.txt", "validation/prose_persuasion.txt"} <= files
    assert (folder / "licences/ours.txt").read_text() == "All of it is free."
    assert not (folder / "licences/held.txt").exists()


def test_the_prose_of_the_packaged_corpus_stays_as_it_is(folder):
    same = {
        "train/prose_emma.txt": make_mixture.PROSE / "prose_emma.txt",
        "validation/prose_lincoln_addresses.txt": make_mixture.CORPUS
        / "validation/prose_lincoln_addresses.txt",
    }
    for path, packaged in same.items():
        assert (folder / path).read_bytes() == packaged.read_bytes()


@pytest.mark.slow
def test_a_work_of_which_nothing_is_left_is_named(tmp_path):
    works = WORKS | {"other": Work("3.0", "", [[own("c")]])}
    with pytest.raises(UserError, match=r"other 3\.0"):
        make_mixture.write_mixture(tmp_path, CHOSEN, works)


# Every package holds a page, its copyright and, with the name of a dictionary, that.
FAKES = {
    "apt-get": 'touch "$2_9.9_all.deb"',
    "dpkg-deb": """
file=${2##*/} && name=${file%%_*} && doc=$3/usr/share/doc/$name && mkdir -p "$doc"
echo "$name is free." >"$doc/copyright"
words=$(for i in {1..40}; do echo -n "$name $i is a word of this work. "; done)
echo "<html><body><p>$words</p></body></html>" >"$doc/page.html"
case $name in dict-*) echo -e "$name\\n   $words" | gzip >"$doc/$name.dict.dz" ;; esac
""",
    "groff": "exit 1",
    "pod2text": "exit 1",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Puts programs on PATH that pretend to fetch and to unpack Debian packages."""
    for name, text in FAKES.items():
        program(tmp_path / "bin" / name, text)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")


def test_a_package_is_read_and_removed(packages, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    work = make_mixture.read_package("sbcl-doc", str(scratch), 10**6)
    ((paragraph,),) = work.documents
    assert (work.version, work.copyright) == ("9.9", "sbcl-doc is free.\n")
    assert paragraph.startswith("sbcl-doc 1 is a word")
    assert not list(scratch.iterdir())
    with pytest.raises(UserError, match="perl-doc 9.9"):  # it has no POD
        make_mixture.read_package("perl-doc", str(scratch), 10**6)


def test_a_held_out_work_has_a_budget_of_its_own(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "sample", lambda pages, budget: [[str(budget)]])
    for package, budget in ("sbcl-doc", 10**6), ("bind9-doc", make_mixture.HELD_OUT):
        assert make_mixture.read_package(package, str(tmp_path), 10**6).documents == [[str(budget)]]
    assert make_mixture.read_package("bind9-doc", str(tmp_path), 1000).documents == [["1000"]]


def test_every_source_is_of_a_known_split_and_group():
    assert {source.split for source in SOURCES.values()} == set(make_mixture.SPLITS)
    assert {source.group for source in SOURCES.values()} == set(make_mixture.LICENCES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mit", 1e6), "--licences: 'mit'.*public_domain,permissive,copyleft"),
        (("permissive", 10), "--budget=10: .* 500"),
        (("permissive", float("nan")), "--budget=nan"),
        (("permissive", float("inf")), "--budget=inf"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_mixture.make_mixture(str(tmp_path / "out"), *arguments)


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="apt-get"):
        make_mixture.make_mixture(str(tmp_path / "out"), "permissive", 1e6)
    assert not (tmp_path / "out").exists()


def test_the_whole_way(packages, tmp_path, monkeypatch):
    """Packages of one group of licences; the same bytes again."""
    names = "sbcl-doc", "bind9-doc", "dict-devil", "dict-jargon"
    monkeypatch.setattr(make_mixture, "SOURCES", {name: SOURCES[name] for name in names})
    monkeypatch.setattr(make_mixture, "ProcessPoolExecutor", ThreadPoolExecutor)
    folders = tmp_path / "one", tmp_path / "two"
    for out in folders:
        make_mixture.make_mixture(str(out), "public_domain", 1e6)
    one, _ = folders
    found = {path.name for split in make_mixture.SPLITS for path in (one / split).glob("[!p]*.txt")}
    assert found == {"sbcl-doc.txt", "dict-devil.txt", "dict-jargon.txt"}
    assert (one / "train/sbcl-doc.txt").read_text().startswith("sbcl-doc 1 is a word")
    assert "| unseen | dict-devil | 9.9 | public domain | 1 |" in (one / "MIXTURE.md").read_text()
    assert (one / "licences/dict-devil.txt").read_text() == "dict-devil is free.\n"
    first, second = (json.loads((out / "about.json").read_text())["sha256"] for out in folders)
    assert first == second


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "tools.make_mixture", f"--out={tmp_path / 'out'}"]
    done = subprocess.run([*command, "--licences=mit"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "--licences: 'mit'" in done.stderr
