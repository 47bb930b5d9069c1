"""The files of a report: each table and figure, and the page of all of them."""

import csv
import io
import re

import pytest
from etils import epath

from latent_delib import report
from latent_delib.results import figures, runs, table_format, tables

PICTURES = ("loss", "change_by_n", "change_by_latents", "change_by_step")


@pytest.fixture(scope="module")
def out(found, tmp_path_factory):
    out = epath.Path(tmp_path_factory.mktemp("out")) / "report"
    report.write_report(tables.tables(found), figures.curves(found), None, out)
    return out


def test_markdown(by_name, out):
    """A | in a name breaks the line of a table."""
    table = by_name["1_perplexity"]
    markdown = (out / "1_perplexity.md").read_text()
    assert markdown == table_format.markdown(table)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.columns) + 1}


def test_csv(by_name, out):
    """Numbers are rounded, or an interval has no columns of its own."""
    rows = list(csv.reader(io.StringIO((out / "1_perplexity.csv").read_text())))
    head, first, second = rows[:3]
    assert head[4:7] == ["n = 1", "n = 1 low", "n = 1 high"] and "n = 32 low" not in head
    assert first[4:7] == ["-1.53", "", ""] and second[4:7] == ["-0.5", "-0.75", "-0.25"]
    assert {len(row) for row in rows} == {
        len(by_name["1_perplexity"].columns) + 8
    }  # and both ends at three n, and of the mean


def test_the_page_has_every_table_and_figure(out, by_name):
    page = (out / "report.md").read_text()
    assert all(f"**{table.title}**" in page for table in by_name.values())
    assert re.findall(r"\]\((.*?)\)", page) == [f"{name}.png" for name in PICTURES]
    assert page.count("python -m x <y>") == 10, "each origin once"


def test_every_table_and_figure_has_its_files(out, by_name):
    tables_ = [f"{name}.{form}" for name in by_name for form in ("md", "csv")]
    pictures = [f"{name}.png" for name in PICTURES]
    assert {path.name for path in out.iterdir()} == {*tables_, *pictures, "report.md"}
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_same_runs_give_the_same_bytes(root, out, by_name, monkeypatch):
    """Each report is a change in git."""
    monkeypatch.chdir(root)
    again = runs.find(["runs"])
    assert figures.by_step(again.curves) == (out / "change_by_step.png").read_bytes()
    assert tables.tables(again) == list(by_name.values())
