"""The tables: our lines beside the published ones."""

import json
import re

import pytest
import small

from latent_delib.errors import UserError
from latent_delib.results import costs, published, runs, tables
from tests.results.writers import (
    HOSTILE,
    OURS,
    ahead,
    benchmarks,
    cells,
    config,
    perplexity,
    tables_of,
)

MEAN = "-0.25% [-1.00, +1.00]"  # as the file has it
CHANGES = ["-0.50% [-0.75, -0.25]", "-0.25% [-0.50, +0.00]", "-0.12% [-0.38, +0.12]"]  # of run a


def ours(table):
    """Returns our rows of a table of variants, as text."""
    return [row for row in cells(table) if "published" not in row[2]]


def test_the_published_line_of_perplexity(by_name):
    """The paper's figures stand in wrong columns."""
    table = by_name["1_perplexity"]
    by_n = [f"n = {n}" for n in (1, 2, 4, 8, 16, 32)]
    assert table.columns == ["latents", "what", "from", "decoder, n = 1", *by_n, "mean"]
    figures = ["10.96", "-1.53%", "-1.67%", "-1.39%", "-1.22%", "-0.85%", "-0.55%"]
    assert cells(table)[0] == ["8", "published, Gemma-2 2B", "", *figures, ""]


def test_our_lines_of_perplexity(by_name):
    """Ours do not follow the published line of as many latents, or lack a source or a blank."""
    rows = cells(by_name["1_perplexity"])
    assert [row[0] for row in rows] == ["8"] * 6 + ["16"] * 2 + ["32", "64"]
    assert rows[1] == ["8", OURS, "P1", "50.00", *CHANGES, "", "", "", MEAN]
    alone = f"{HOSTILE} alone, interval over documents, whose works were not kept"
    assert rows[3] == [
        "8",
        f"{OURS}: {alone}",
        "P1",
        "50.00",
        CHANGES[0],
        *[""] * 5,
        CHANGES[0][:6],
    ]


def test_an_older_file_has_blanks(by_name):
    """A report of older runs fails, or shows intervals that nobody measured."""
    label = OURS.replace("180", "7")
    figures = ["50.00", "-0.50%", "-0.25%", "-0.12%", "", "", "", "-0.29%"]
    assert ["8", label, "P6", *figures] in cells(by_name["1_perplexity"])


def test_a_table_says_where_its_figures_are_from(by_name):
    """A figure cannot be traced to its file, checkpoint and decoder."""
    table = by_name["1_perplexity"]
    note = "packaged (ab12cd34ef56), the published on Gemma-2 2B: compare changes in percent"
    assert note in table.note
    assert table.origins[0] == (
        "P1: runs/a/perplexity.json; checkpoint runs/a/checkpoints/180; "
        "decoder packaged (ab12cd34ef56); 5 documents; "
        "2026-11-25T09:00:00+00:00; 2 cores; python -m x <y>"
    )
    assert [origin[:2] for origin in table.origins] == ["P1", "P2", "P6", "P9"]


def test_each_source_and_each_work_has_a_row(tmp_path):
    """Several works are mixed, or one work has a row beside its source's."""
    part = {"rows": ahead(-0.5), "documents": 2, "interval_over": "documents of one work"}
    works = dict.fromkeys(("novel.txt", "manual.txt"), part)
    source = {"rows": ahead(-0.5), "documents": 4}
    several = {"books": source | {"works": works}}
    one = {"books": source | {"works": {"novel.txt": part}}}
    perplexity(tmp_path / "new", -0.5, sets=several, interval_over="works")
    perplexity(tmp_path / "one", -0.5, sets=one, interval_over="documents of one work")
    (table,) = (t for t in tables.tables(runs.find([str(tmp_path)])) if t.name == "11_every_method")
    alone = "of books alone, interval over the documents of one work"
    names = [OURS, f"{OURS}: novel.txt {alone}", f"{OURS}: manual.txt {alone}", OURS]
    assert [row[1] for row in table.rows] == names
    over = "of perplexity over works (P1); over the documents of one work (P2). Blank"
    assert f"95 % interval, {over}" in table.note


def test_benchmarks_by_number_of_latents(by_name):
    """A score stands under another number of latents, or a benchmark of ours is lost."""
    table = by_name["2_benchmarks"]
    rows = cells(table)
    assert table.columns[3:] == ["decoder", *(f"{n} latents" for n in (4, 8, 16, 32, 64))]
    assert sum(row[2].startswith("published") for row in rows) == len(published.BENCHMARKS) == 17
    line, mine = [row for row in rows if row[0] == "GSM8K"][:2]
    assert line[3:] == ["21.38", "22.67", "23.12", "24.72", "26.76", "31.43"]
    setting = "acc, 4-shot, 200 documents"
    scores = ["10.00 [8.00, 12.00] B1", "", "12.35 [10.35, 14.35] B1", "20.00 [18.00, 22.00] B2"]
    assert mine[1] == setting and mine[3:] == [*scores, "", ""]
    score = "40.00 [38.00, 42.00] B1"
    assert rows[-1] == ["chain_sum", setting, "frozen decoder", score, *[""] * 5]


def test_changes_of_scores(tmp_path):
    """A change is lost, or stands under another benchmark, or a run without one has a line."""
    benchmarks(tmp_path / "old", {("chain_sum", "augmented", 0): 12.0})
    assert tables_of(tmp_path)["14_score_changes"] == [["no run of ours", "", ""]]
    values = {("gsm8k", "decoder", 0): 10.0, ("gsm8k", "augmented", 0): 12.35}
    benchmarks(
        tmp_path / "new", values | {("chain_sum", "augmented", 0): 9.0}, config() | {"seed": 9}
    )
    path = tmp_path / "new" / "benchmarks.json"
    data = json.loads(path.read_text())
    data["rows"][1] |= {"change": 2.35, "change_low": 0.5, "change_high": 4.2}
    path.write_text(json.dumps(data))
    (row,) = tables_of(tmp_path)["14_score_changes"]
    assert row[1:] == ["8", "B1", "+2.35 [+0.50, +4.20]"]
    data["rows"][1]["change"] = "much"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="change='much'"):
        tables_of(tmp_path)


def test_the_table_of_pause_tokens(by_name):
    """Ours and the paper's pause tokens do not stand together."""
    rows = cells(by_name["3_pause_tokens"])
    theirs, mine = [row[:6] for row in rows if row[0].startswith("pause tokens")]
    assert theirs == ["pause tokens", "32", "published, Gemma-2 2B", "10.96", "11.63", "+6.11%"]
    assert mine[2:] == ["P7", "50.00", "150.00", "+200.00% [+199.75, +200.25]"]


def test_the_table_of_zero_shot_cot(by_name):
    """A decoder's score is shown as one of zero-shot CoT, or of a trained decoder."""
    rows = ours(by_name["4_zero_shot_cot"])
    assert [[row[0], row[2], row[6]] for row in rows[:3]] == [
        ["frozen decoder", "P4 B1", "10.00 [8.00, 12.00]"],
        ["trained decoder, step 180, seed 3", "P8", ""],
        ["zero-shot CoT", "B1", "11.00 [9.00, 13.00]"],
    ]


def test_the_table_of_coprocessors(by_name):
    """A kind of coprocessor is missing, or one of another table is there."""
    labels = [row[0] for row in ours(by_name["5_coprocessors"])]
    kinds = {label.split(",")[0] for label in labels}
    assert kinds == {"frozen decoder", "trained decoder", "cache augmentation", "from scratch"}
    assert any("adapters of rank 64" in label for label in labels)


def test_a_table_without_a_run_of_ours_says_so(by_name):
    """Its note speaks of figures of ours that are not there."""
    table = by_name["6_last_layer"]
    assert cells(table)[-1] == ["no run of ours"] + [""] * 6 and not table.note


def test_the_table_of_ahead_tokens(by_name):
    """A run trained with another number of ahead tokens is missing."""
    rows = ours(by_name["7_ahead_tokens"])
    assert any("4 ahead tokens" in row[0] and row[2] == "P9" for row in rows)


def test_the_table_of_late_latents(by_name):
    """Scores with late latents are not beside those of the same checkpoint without delay."""
    rows = ours(by_name["8_asynchronous"])[2:]
    assert [(row[0].rpartition(", ")[2], row[2], row[6]) for row in rows] == [
        ("seed 3", "P1 B1", "12.35 [10.35, 14.35]"),
        ("delay 1", "B1", "11.00 [9.00, 13.00]"),
        ("delay 2", "B1", "10.00 [8.00, 12.00]"),
    ]


def test_every_run_is_in_the_first_table(by_name):
    assert len(by_name["0_runs"].rows) == 12


def test_the_tables_of_section_3_say_so(by_name):
    """A table claims a place in the paper that it does not have."""
    of_section_3 = [name for name, table in by_name.items() if "(Section 3)" in table.title]
    assert of_section_3 == [name for name in by_name if re.match("[3-8]_", name)]


def test_latents_in_place_of_text_are_not_the_papers_method(tmp_path):
    """Where the decoder sees less text than its base, its figures are no figures of the paper."""
    perplexity(tmp_path / "whole", -1.0)
    perplexity(tmp_path / "short", 2.0, config(visible_text=16))
    by_name = tables_of(tmp_path)
    shown = [name for name in by_name if "16 tokens of the text visible" in str(by_name[name])]
    assert "10_beyond" in shown
    assert not [name for name in shown if re.match("[1-9]_", name)]


def test_late_latents_of_another_method_are_beside_those_without_delay(tmp_path):
    for name, evaluated in (("run", {}), ("late", {"delay": 2}), ("swap", {"swap": True})):
        perplexity(tmp_path / name, -1.0, config("lora") | {"evaluate": evaluated}, run="run")
    perplexity(tmp_path / "other", -1.0, config("lora"))
    rows = [row for row in tables_of(tmp_path)["8_asynchronous"] if "P" in row[2]]
    assert len(rows) == 2 and rows[1][0] == f"{rows[0][0]}, delay 2"


def test_late_latents_are_the_asynchronous_table_and_controls_are_in_none(tmp_path):
    """A control is shown as a run of the paper's method."""
    for name, evaluated in (("run", {}), ("late", {"delay": 2}), ("swap", {"swap": True})):
        perplexity(tmp_path / name, -1.0, config() | {"evaluate": evaluated}, run="run")
    by_name = tables_of(tmp_path)

    def mine(name):
        return [row[0] for row in by_name[name] if "P" in row[2]]

    assert mine("8_asynchronous") == [OURS, f"{OURS}, delay 2"]
    assert mine("7_ahead_tokens") == [OURS]
    assert mine("0_runs") == [OURS, f"{OURS}, latents of another text", f"{OURS}, delay 2"]
    assert [row[1] for row in by_name["1_perplexity"] if row[2]] == [OURS]


@pytest.fixture(scope="module")
def cost_lines(tmp_path_factory):
    """The lines of a run's two evaluations, and of one whose file lacks the decoder's sizes."""
    folder = tmp_path_factory.mktemp("costs")
    of = config(num_traces=4) | {"train": {"batch_size": 2}}
    of["decoder"] = {"path": "nowhere", "architecture": {"num_layers": 2}}
    seen, unseen = ({"seq_len": 32, "validation": [text]} for text in ("seen", "unseen"))
    sizes = {"architecture": small.GEMMA.to_dict()}
    perplexity(folder / "old", -1.0, of | {"data": seen}, run="old")
    perplexity(folder / "run/evaluations/60", -1.0, of | {"data": seen}, run="run", **sizes)
    perplexity(folder / "run/other", -1.0, of | {"data": unseen}, run="run", **sizes)
    metrics = {"step": 10, "loss": 4.5, "step_seconds": 0.25}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    table = costs.table(runs.find([str(folder)]))
    return [dict(zip(table.columns, row)) for row in table.rows]


def test_costs_need_no_decoder(cost_lines):
    """Costs are blank where a file has the sizes, or made up where an older one lacks them."""
    old, unseen, seen = cost_lines
    assert old["trained parameters"] == old["ms per step"] == ""
    assert seen["trained parameters"] == unseen["trained parameters"] != ""


def test_the_step_time_stands_beside_the_evaluation_in_its_workdir(cost_lines):
    """The step time of a training is lost, or shown for an evaluation elsewhere."""
    _, unseen, seen = cost_lines
    assert [str(row["ms per step"]) for row in (unseen, seen)] == ["", "250"]


def test_costs_name_the_text(cost_lines):
    """Two evaluations of a run on different text look alike."""
    _, unseen, seen = cost_lines
    assert [seen["what"], unseen["what"]] == [f"{OURS}, on seen", f"{OURS}, on unseen"]


def test_published_figures_agree_with_each_other():
    """What the paper gives twice is written down in two ways here."""
    gsm8k = published.BENCHMARKS["gsm8k"].scores
    lines = [published.AUGMENTED_32, published.NUM_AHEAD[2], published.DELAY[0]]
    for line in [*lines, *published.COPROCESSORS[:2]]:
        assert gsm8k[line.latents] == line.gsm8k
    change = 100 * (published.AUGMENTED_32.ppl / published.FROZEN.ppl - 1)
    assert published.PERPLEXITY_CHANGE[32][1] == pytest.approx(change, abs=0.01)
    assert gsm8k[0] == published.FROZEN.gsm8k
    for by_n in published.PERPLEXITY_CHANGE.values():
        assert tuple(by_n) == tables.AHEAD
