"""The command `report`: its refusals, and the report of a run that was really trained.

tests/results/ has the tests of what stands in a report.
"""

import contextlib
import csv
import io
import json
import sys
from types import SimpleNamespace

import jax
import pytest
from etils import epath

import latent_delib as ld
from latent_delib import convert, evaluate, report
from latent_delib.delib.coprocessor import Inserted
from latent_delib.job import estimate, experiment
from latent_delib.results import figures
from tests.results.writers import ahead, perplexity
from tests.run_command import run_command

NO_MATPLOTLIB = "matplotlib is not installed: install it with ./launch/setup.sh report"


def test_a_mistake_on_the_command_line_ends_with_its_line(tmp_path, monkeypatch):
    """A mistake gives a traceback, or files."""
    monkeypatch.chdir(tmp_path)
    perplexity(tmp_path / "runs" / "a", -1.0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def error(*words):
        return run_command("report", *words)

    assert error("nowhere", "--out=out") == "error: nowhere: no such folder"
    assert error("file", "--out=out") == "error: file: is a file, expected a folder"
    assert error("--out=out", "empty").startswith("error: empty: holds no perplexity.json, bench")
    assert error("--out=out").startswith("error: DIR is missing: ")
    assert error("runs").startswith("error: --out is missing")
    assert "folders" in error("--folders=runs", "--out=out")
    no_checkpoint = "error: empty: holds no checkpoints; run train first"
    assert error("runs", "--out=out", "--look=empty") == no_checkpoint
    assert error("runs", "--out=out", "--text=a") == "error: --text needs --look=WORKDIR"
    assert error("runs", "--out=file") == "error: file: is a file, expected a folder"
    assert not (tmp_path / "out").exists()


def test_help_names_the_folders(capsys):
    assert run_command("report", help=True) == ""
    assert "\n  DIR: folders of finished runs" in capsys.readouterr().out


def test_report_needs_matplotlib(tmp_path, monkeypatch):
    """A report fails after all its work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run_command("report", "nowhere", out=tmp_path / "out")
    assert error.startswith(f"error: {NO_MATPLOTLIB}")


def test_evaluate_leaves_out_its_figure_without_matplotlib(tmp_path, monkeypatch, capsys):
    """An evaluation fails at its end."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate.draw(epath.Path(tmp_path) / "a.png", figures.by_n, ahead(-0.5))
    assert capsys.readouterr().out.startswith(f"a.png is left out: {NO_MATPLOTLIB}")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="session")
def reported(make_config, trained, texts, once):
    """The report of a trained run, with a look into the latents of its export.

    Beside it are the evaluation, and the words that `report` prints.
    """

    def make(folder):
        convert.convert(str(trained), str(folder / "export"))
        evaluate.evaluate(make_config(), str(trained), str(folder / "evaluated"))
        flags = SimpleNamespace(
            folders=[str(trained), str(folder)],
            out=str(folder / "out"),
            look=str(folder / "export"),
            text=max(texts["validation"], key=len),
            against=str(folder / "evaluated"),
        )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            report.main(flags)
        (folder / "printed").write_text(printed.getvalue())

    return once("reported", make)


@pytest.fixture
def change(reported):
    """The change at n = 1 that `evaluate` wrote."""
    data = json.loads((reported / "evaluated" / "perplexity.json").read_text())
    return data["rows"][0]["change_percent"]


def test_a_report_says_how_many_files_it_read(reported):
    printed = (reported / "printed").read_text()
    assert "read 1 perplexity.json, 0 benchmarks.json, 1 metrics.jsonl" in printed


def test_the_tables_have_the_figures_that_evaluate_wrote(reported, change):
    table = (reported / "out" / "1_perplexity.md").read_text()
    label = "cache augmentation, placement after, 3 ahead tokens, step 4, seed 0"
    assert f"| 2 | {label} | P1 | " in table
    assert f" | {change:+.2f}%" in table


def test_a_run_equals_itself(reported):
    """--against compares other figures than those of the run."""
    table = (reported / "out" / "13_against.md").read_text()
    assert "| P1 | +0.00% [+0.00, +0.00] |" in table


def test_the_costs_are_those_of_the_training(reported, change, trained, make_config):
    """Parameters or FLOPs are counted for another model."""
    (costs,) = csv.DictReader((reported / "out" / "12_costs.csv").open())
    own = ld.load_coprocessor(str(trained)).params
    assert costs["trained parameters"] == f"{sum(x.size for x in jax.tree.leaves(own))}"
    exp = experiment.read(make_config())
    useful = estimate.device_flops(exp)["useful"] * exp.mesh.size
    assert float(costs["GFLOP per step"]) == pytest.approx(useful / 1e9)
    assert costs["steps"] == "4" and costs["n = 1"] == f"{change}"


def test_a_look_has_the_words_nearest_to_each_latent(reported):
    nearest = list(csv.reader((reported / "out" / "look_nearest.csv").open()))
    assert [row[0] for row in nearest] == ["latent", "z1", "z2"] and len(nearest[1]) == 11


def test_the_page_shows_the_curves_and_the_look(reported):
    out = reported / "out"
    page = (out / "report.md").read_text()
    assert page.count("![") == 3 + 2 and "[2 latents]" in page
    assert (out / "look_coprocessor.png").exists() and (out / "look_decoder.png").exists()


def test_a_text_too_long_or_too_short_to_look_at_is_refused(trained, texts):
    long = max(texts["validation"], key=len) * 100
    with pytest.raises(ld.UserError, match="--text: [0-9,]+ tokens with BOS, expected at most 512"):
        report.look_into(str(trained), long)
    short = "--text='the cat': .* tokens with BOS, expected at least 14"
    with pytest.raises(ld.UserError, match=short):
        report.look_into(str(trained), "the cat")


def test_a_look_at_keys_and_values_is_refused(trained, texts, monkeypatch):
    """Latents that are no vectors give a traceback."""
    monkeypatch.setattr(ld.AugmentedLM, "latents", lambda *args: Inserted(None, None))
    with pytest.raises(ld.UserError, match="writes keys and values, not vectors"):
        report.look_into(str(trained), max(texts["validation"], key=len))
