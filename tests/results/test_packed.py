"""Packed runs, those of docs/results among them."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

import latent_delib as ld
from latent_delib.results import packed, runs, table_format, tables
from tools import pack_results

DOCS = Path(__file__).parents[2] / "docs"


def pack(workdirs, out):
    pack_results.main(SimpleNamespace(folders=list(map(str, workdirs)), out=str(out)))


@pytest.fixture(scope="module")
def workdirs(root):
    return sorted((root / "runs").iterdir())


@pytest.fixture(scope="module")
def packs(workdirs, tmp_path_factory):
    """A folder with all workdirs packed; one was packed twice."""
    packs = tmp_path_factory.mktemp("packed") / "runs"
    pack(workdirs[:4], packs)
    pack(workdirs[3:], packs)
    return packs


def test_a_run_of_the_same_name_replaces_one(workdirs, packs):
    """A run that goes on leaves its earlier pack beside the new one."""
    assert sorted(path.name for path in packs.iterdir()) == [f"{w.name}.zip" for w in workdirs]


def test_packed_runs_give_the_same_report(found, by_name, packs, monkeypatch):
    """Older runs, or a training that still writes, give other tables or losses."""
    monkeypatch.chdir(packs.parent)
    again = runs.find(["runs"])
    assert tables.tables(again) == list(by_name.values())
    assert again.losses == found.losses


def test_a_run_in_a_pack_is_found_by_its_path(packs):
    """A packed run cannot be named alone."""
    (one,) = runs.find([str(packs / "only")]).perplexity
    assert one.path == packs / "only/evaluations/90/perplexity.json"


def test_a_folder_that_is_not_there_is_refused_beside_packs(packs):
    with pytest.raises(ld.UserError, match="runs/other: no such folder"):
        runs.find([str(packs / "other")])


def test_two_workdirs_of_one_name_are_refused(workdirs, tmp_path):
    """One run silently replaces the other."""
    with pytest.raises(ld.UserError, match="two of the workdirs are called"):
        pack([workdirs[0], f"elsewhere/{workdirs[0].name}"], tmp_path)


def test_the_same_files_give_the_same_packs(workdirs, packs, tmp_path):
    """Each packing is a change in git."""
    pack(workdirs, tmp_path)
    for path in packs.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_pack_cut_short_is_named(packs, tmp_path):
    """A pack whose end is lost is passed over, or fails with a traceback."""
    (tmp_path / "only.zip").write_bytes((packs / "only.zip").read_bytes()[:-30])
    with pytest.raises(ld.UserError, match=f"{tmp_path}/only.zip: not a zip archive"):
        runs.find([str(tmp_path)])


def test_a_damaged_file_in_a_pack_is_named(packs, tmp_path):
    """A changed bit gives other figures, or a traceback."""
    damaged = bytearray((packs / "only.zip").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "only.zip").write_bytes(damaged)
    with pytest.raises(ld.UserError, match=f"{tmp_path}/only/.*: damaged"):
        for file in packed.files_in(tmp_path / "only.zip"):
            file.read()


@pytest.mark.slow
def test_the_stored_runs_open():
    """The runs that docs/results_text.md is about cannot be read."""
    found = runs.find([str(DOCS / "results" / "lab")])
    (of,) = (result for result in found.perplexity if result.path.parent.name == "overlay@0")
    row = next(row for row in of.data["rows"] if row["n"] == 16)
    assert str(table_format.change(row)) == "-0.41% [-0.55, -0.26]"
    assert (of.method["name"], of.step) == ("cache_augmentation", 8000)
    assert of.read_documents()["tokens"].shape == (141, 32)  # works, n


def test_the_figures_of_the_pages_are_drawn(tmp_path):
    """A figure of the pages cannot be drawn again from the stored runs."""
    runpy.run_path(str(DOCS / "figures" / "plots.py"))["draw"](tmp_path)
    shown = {"growth": "training steps", "results": "control: ", "works": "works of other kinds"}
    for name, words in shown.items():
        assert words in (tmp_path / f"{name}.svg").read_text()


def test_the_tables_of_the_pages_are_those_of_the_stored_runs():
    """A page shows other figures than the stored runs, or a table that is not filled in.

    All pages are in one test: each stored run is read once.
    """
    script = runpy.run_path(str(DOCS / "figures" / "tables.py"))
    for file in script["PAGES"]:
        page = file.read_text()
        assert script["filled"](page).splitlines() == page.splitlines()
        without_changes = page.count("accuracy=1 -->") + page.count("methods=1 -->")
        of_runs = page.count("n = 1 | n = 4") - page.count("| the decoder reads |")
        assert page.count("<!-- table: ") == of_runs + without_changes
