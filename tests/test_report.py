"""From finished runs to tables, curves and one page: also hostile, older and broken ones."""

import csv
import io
import json
import re
import runpy
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
from etils import epath

import latent_delib as ld
from latent_delib import convert, evaluate, report
from latent_delib.delib.coprocessor import Inserted
from latent_delib.job import estimate, experiment
from latent_delib.results import (
    against,
    comparisons,
    costs,
    entries,
    evaluation,
    figures,
    packed,
    published,
    runs,
    table_format,
    tables,
)
from tools import pack_results

FINGERPRINT = "ab12cd34ef56" + 52 * "0"
PROVENANCE = {
    "command": "python -m x <y>",
    "date": "2026-11-25T09:00:00+00:00",
    "hardware": "2 cores",
    "versions": {},
}
DOCS = Path(__file__).parents[1] / "docs"
HOSTILE = 'lines:<script>alert("$x$")</script>|*.txt'


def config(name="cache_augmentation", latents=8, ahead=16, **method):
    method |= {"name": name, "num_latents": latents, "placement": "after", "num_ahead": ahead}
    return {"seed": 3, "decoder": {"path": "packaged"}, "method": method}


def perplexity(folder, change, of, step: int | None = 180, sets=()):
    """Writes a perplexity.json: a change at n = 1, half of it at 2, a quarter at 4."""
    rows = [
        {
            "n": n,
            "tokens": 100,
            "decoder_ppl": 50.0,
            "augmented_ppl": 50 + change / 2 / n,
            "change_percent": change / n,
        }
        | {"change_low": change / n - 0.25, "change_high": change / n + 0.25}
        for n in (1, 2, 4)
    ]
    checkpoint = None if step is None else f"runs/{folder.name}/checkpoints/{step}"
    data = {
        "rows": rows,
        "sets": {name: {"rows": rows[:1], "documents": 2} for name in sets},
        "documents": 5,
    }
    data |= {
        "pieces": 5,
        "config": of,
        "checkpoint": checkpoint,
        "step": step,
        "fingerprint": FINGERPRINT,
    }
    write(folder / "perplexity.json", data | {"provenance": PROVENANCE})


def benchmarks(folder, values, of=None):
    """Writes a benchmarks.json. values: (benchmark, model, delay) -> value."""
    rows = [
        {
            "benchmark": b,
            "model": model,
            "metric": "acc",
            "value": value,
            "stderr": 1.0,
            "low": value - 2,
        }
        | {"high": value + 2, "documents": 200, "shots": 4, "every": 0, "delay": delay}
        for (b, model, delay), value in values.items()
    ]
    data = {
        "rows": rows,
        "config": of or config(),
        "checkpoint": f"runs/{folder.name}/checkpoints/180",
        "step": 180,
    }
    write(folder / "benchmarks.json", data | {"fingerprint": FINGERPRINT, "provenance": PROVENANCE})


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def found(tmp_path_factory, monkeypatch_module):
    """Writes runs of every kind that a table is about, and finds them from the folder above."""
    root = tmp_path_factory.mktemp("found")
    monkeypatch_module.chdir(root)
    main = epath.Path("runs/a")
    perplexity(main, -0.5, config(), sets=("packaged/validation", HOSTILE))
    for step in (120, 60):
        perplexity(main / "evaluations" / str(step), -0.25, config(), step)
    scores = {
        ("gsm8k", "decoder", 0): 10,
        ("gsm8k", "zero_shot_cot", 0): 11,
        ("gsm8k", "augmented", 0): 12.345,
    }
    benchmarks(
        main,
        scores
        | {("chain_sum", "decoder", 0): 40}
        | {("gsm8k", "augmented", d): 12 - d for d in (1, 2)},
    )
    (main / "metrics.jsonl").write_text(
        '{"step": 10, "loss": 4.5}\n{"step": 20, "loss": 4.0}\n{"step": 30, "lo'
    )
    perplexity(epath.Path("runs/b"), -1, config(latents=16))
    benchmarks(epath.Path("runs/b"), {("gsm8k", "augmented", 0): 20}, config(latents=16))
    perplexity(
        epath.Path("runs/frozen"), 0, config("decoder", 16), None
    )  # base.py's number of latents, which it has none of
    perplexity(epath.Path("runs/trained"), 0, config("decoder", 16))
    for name in ("pause_tokens", "from_scratch"):
        perplexity(epath.Path("runs") / name, 200, config(name))
    perplexity(epath.Path("runs/lora"), -0.125, config("cache_augmentation", 32, lora_rank=64))
    perplexity(epath.Path("runs/only/evaluations/60"), 2, config(ahead=4), 60)
    perplexity(epath.Path("runs/only/evaluations/90"), 1, config(ahead=4), 90)
    old = json.loads((main / "perplexity.json").read_text())
    for name in ("sets", "documents", "step", "provenance"):
        del old[name]
    old["rows"] = [
        {k: v for k, v in row.items() if k not in ("change_low", "change_high")}
        for row in old["rows"]
    ]
    write(epath.Path("runs/old/perplexity.json"), old | {"checkpoint": "runs/old/checkpoints/7"})
    return runs.find(["runs", "runs/a"])


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def by_name(found):
    return {table.name: table for table in tables.tables(found)}


@pytest.fixture(scope="module")
def out(found, tmp_path_factory):
    out = epath.Path(tmp_path_factory.mktemp("out")) / "report"
    report.write_report(tables.tables(found), figures.curves(found), None, out)
    return out


def test_what_is_found(found):
    """Each once; of a run with evaluations only, the last; curves in the order of their steps."""
    assert [str(r.path.parent) for r in found.perplexity] == [
        f"runs/{name}"
        for name in ("a", "b", "from_scratch", "frozen", "lora", "old", "pause_tokens", "trained")
    ] + ["runs/only/evaluations/90"]
    assert [r.key for r in found.perplexity] == [f"P{i}" for i in range(1, 10)]
    assert [str(r.path) for r in found.benchmarks] == [
        "runs/a/benchmarks.json",
        "runs/b/benchmarks.json",
    ]
    steps = {str(folder): [r.step for r in results] for folder, results in found.curves.items()}
    assert steps == {"runs/a": [60, 120], "runs/only": [60, 90]}
    assert {str(f): rows for f, rows in found.losses.items()} == {"runs/a": [(10, 4.5), (20, 4.0)]}


def texts(table):
    return [[str(cell) for cell in row] for row in table.rows]


def test_perplexity_by_number_of_latents(by_name):
    table = by_name["1_perplexity"]
    rows = texts(table)
    assert table.columns == ["latents", "what", "from", "decoder, n = 1"] + [
        f"n = {n}" for n in (1, 2, 4, 8, 16, 32)
    ]
    assert rows[0] == [
        "8",
        "published, Gemma-2 2B",
        "",
        "10.96",
        "-1.53%",
        "-1.67%",
        "-1.39%",
        "-1.22%",
        "-0.85%",
        "-0.55%",
    ]
    ours = "cache augmentation, after, 16 ahead tokens, step 180, seed 3"
    changes = ["-0.50% [-0.75, -0.25]", "-0.25% [-0.50, +0.00]", "-0.12% [-0.38, +0.12]"]
    assert rows[1] == ["8", ours, "P1", "50.00", *changes, "", "", ""]
    alone = f"{HOSTILE} alone, interval over documents, whose works were not kept"
    assert rows[3] == ["8", f"{ours}: {alone}", "P1", "50.00", changes[0], "", "", "", "", ""]
    old = ["8", ours.replace("180", "7"), "P6", "50.00", "-0.50%", "-0.25%", "-0.12%", "", "", ""]
    assert old in rows, "an older file: blanks for what it does not tell"
    assert [row[0] for row in rows] == ["8"] * 6 + ["16"] * 2 + ["32", "64"]
    assert (
        "packaged (ab12cd34ef56), the published on Gemma-2 2B: compare changes in percent"
        in table.note
    )
    assert table.origins[0] == (
        "P1: runs/a/perplexity.json; checkpoint runs/a/checkpoints/180; "
        "decoder packaged (ab12cd34ef56); 5 documents; "
        "2026-11-25T09:00:00+00:00; 2 cores; python -m x <y>"
    )
    assert [origin[:2] for origin in table.origins] == ["P1", "P2", "P6", "P9"]


def test_each_source_and_each_work_has_a_row(tmp_path):
    """Where there are several; intervals say what they are over."""
    for name, over in (("new", "works"), ("one", "documents of one work")):
        perplexity(tmp_path / name, -0.5, config())
        path = tmp_path / name / "perplexity.json"
        data = json.loads(path.read_text())
        part = {"rows": data["rows"], "documents": 2, "interval_over": "documents of one work"}
        works = {work: part for work in ("novel.txt", "manual.txt")}
        data["sets"] = {
            "books": {"rows": data["rows"], "documents": 4, "works": works if name == "new" else {}}
        }
        write(path, data | {"interval_over": over})
    (table,) = (t for t in tables.tables(runs.find([str(tmp_path)])) if t.name == "11_every_method")
    what = "cache augmentation, after, 16 ahead tokens, step 180, seed 3"
    alone = "of books alone, interval over the documents of one work"
    names = [what, f"{what}: novel.txt {alone}", f"{what}: manual.txt {alone}", what]
    assert [row[1] for row in table.rows] == names
    assert (
        "95 % interval, of perplexity over works (P1); over the documents of one work (P2). Blank"
        in table.note
    )


def test_benchmarks_by_number_of_latents(by_name):
    table = by_name["2_benchmarks"]
    rows = texts(table)
    assert table.columns[3:] == ["decoder", *(f"{n} latents" for n in (4, 8, 16, 32, 64))]
    assert sum(row[2].startswith("published") for row in rows) == len(published.BENCHMARKS) == 17
    first = next(i for i, row in enumerate(rows) if row[0] == "GSM8K")
    assert rows[first][3:] == ["21.38", "22.67", "23.12", "24.72", "26.76", "31.43"]
    figures = [
        "10.00 [8.00, 12.00] B1",
        "",
        "12.35 [10.35, 14.35] B1",
        "20.00 [18.00, 22.00] B2",
        "",
        "",
    ]
    assert (
        rows[first + 1][:2] == ["GSM8K", "acc, 4-shot, 200 documents"]
        and rows[first + 1][3:] == figures
    )
    assert (
        rows[-1]
        == ["chain_sum", "acc, 4-shot, 200 documents", "frozen decoder", "40.00 [38.00, 42.00] B1"]
        + [""] * 5
    )


def test_tables_of_variants(by_name):
    ours = {name: [r for r in texts(by_name[name]) if "published" not in r[2]] for name in by_name}
    pause = [
        row[:6] for row in texts(by_name["3_pause_tokens"]) if row[0].startswith("pause tokens")
    ]
    assert pause[0] == ["pause tokens", "32", "published, Gemma-2 2B", "10.96", "11.63", "+6.11%"]
    assert pause[1][2:] == ["P7", "50.00", "150.00", "+200.00% [+199.75, +200.25]"]
    assert [[row[0], row[2], row[6]] for row in ours["4_zero_shot_cot"][:3]] == [
        ["frozen decoder", "P4 B1", "10.00 [8.00, 12.00]"],
        ["trained decoder, step 180, seed 3", "P8", ""],
        ["zero-shot CoT", "B1", "11.00 [9.00, 13.00]"],
    ]
    assert {row[0].split(",")[0] for row in ours["5_coprocessors"]} == {
        "frozen decoder",
        "trained decoder",
        "cache augmentation",
        "from scratch",
    }
    assert any("rank 64" in row[0] for row in ours["5_coprocessors"])
    assert (
        texts(by_name["6_last_layer"])[-1] == ["no run of ours"] + [""] * 6
        and not by_name["6_last_layer"].note
    )
    assert any("4 ahead tokens" in row[0] and row[2] == "P9" for row in ours["7_ahead_tokens"])
    late = [(row[0].rpartition(", ")[2], row[2], row[6]) for row in ours["8_asynchronous"][2:]]
    assert late == [
        ("seed 3", "P1 B1", "12.35 [10.35, 14.35]"),
        ("delay 1", "B1", "11.00 [9.00, 13.00]"),
        ("delay 2", "B1", "10.00 [8.00, 12.00]"),
    ]
    assert len(by_name["0_runs"].rows) == 12
    of_section_3 = [name for name, table in by_name.items() if "(Section 3)" in table.title]
    assert of_section_3 == [
        name for name in by_name if name[:2] in ("3_", "4_", "5_", "6_", "7_", "8_")
    ]


def test_latents_in_place_of_text_are_not_the_papers_method(tmp_path):
    """Where the decoder sees less text than its base, its figures are no figures of the paper."""
    perplexity(tmp_path / "whole", -1.0, config())
    perplexity(tmp_path / "short", 2.0, config(visible_text=16))
    found = tables.tables(runs.find([str(tmp_path)]))
    shown = [each.name for each in found if "16 tokens of the text visible" in str(texts(each))]
    assert "10_beyond" in shown
    assert not [name for name in shown if re.match("[1-9]_", name)]


def test_what_is_one_entry_and_what_is_not(tmp_path):
    """A checkpoint's perplexity and benchmarks are one; controls, texts and decoders are apart."""
    for name, more in (("joint", {}), ("swap", {"swap": True}), ("text", {})):
        of = config("joint" if name == "joint" else "cache_augmentation") | {"evaluate": more}
        of["data"] = {"validation": ["other" if name == "text" else "same"]}
        perplexity(tmp_path / "run" / name, -1.0, of)
        path = tmp_path / "run" / name / "perplexity.json"
        write(
            path,
            json.loads(path.read_text()) | {"checkpoint": f"{name == 'joint'}/checkpoints/180"},
        )
    path = tmp_path / "run" / "joint" / "benchmarks.json"
    benchmarks(
        path.parent,
        {("gsm8k", "augmented", 0): 50.0, ("gsm8k", "decoder", 0): 40.0},
        config("joint"),
    )
    write(
        path,
        json.loads(path.read_text())
        | {"fingerprint": "trained", "checkpoint": "True/checkpoints/180"},
    )
    decoder, *others = entries.entries(runs.find([str(tmp_path / "run")]))
    assert entries.label(decoder).startswith("trained decoder, of joint, without its latents")
    assert decoder.perplexity is None and decoder.scores["gsm8k"][0]["value"] == 40.0
    by_label = {
        entries.label(e).partition(",")[0] + str(e.result.path.parent.name): e for e in others
    }
    assert entries.label(by_label["cache augmentationswap"]).endswith(
        ", seed 3, latents of another text"
    )
    assert entries.label(by_label["cache augmentationtext"]).endswith(", seed 3")
    assert set(by_label) == {"jointjoint", "cache augmentationswap", "cache augmentationtext"}
    assert [r.path.name for r in by_label["jointjoint"].results] == [
        "perplexity.json",
        "benchmarks.json",
    ]
    assert by_label["jointjoint"].scores["gsm8k"][0]["value"] == 50.0


def test_a_trained_decoder_is_not_the_frozen_one(tmp_path):
    """Perplexity names the decoder compared with, benchmarks the one that was trained."""
    assert entries.writes_latents("a method of a newer version")
    perplexity(tmp_path / "latents", -1, config())
    benchmarks(tmp_path / "latents", {("gsm8k", "augmented", 0): 20})
    perplexity(tmp_path / "trained", -5, config("decoder"))
    scores = {("gsm8k", "decoder", 0): 99, ("gsm8k", "zero_shot_cot", 0): 98}
    benchmarks(tmp_path / "trained", scores, config("decoder"))
    file = tmp_path / "trained" / "benchmarks.json"
    write(file, json.loads(file.read_text()) | {"fingerprint": "trained"})
    by_name = {table.name: texts(table) for table in tables.tables(runs.find([str(tmp_path)]))}
    ours = [
        row[2:6]
        for row in by_name["2_benchmarks"]
        if row[0] == "GSM8K" and not row[2].startswith("published")
    ]
    assert ours == [
        [
            "cache augmentation, after, 16 ahead tokens, step 180, seed 3",
            "",
            "",
            "20.00 [18.00, 22.00] B1",
        ],
        ["trained decoder, step 180, seed 3", "99.00 [97.00, 101.00] B2", "", ""],
    ]
    (trained, cot, _) = by_name["0_runs"]
    assert trained[0].startswith("trained decoder") and trained[5] == "-5.00% [-5.25, -4.75]"
    assert cot[0].startswith("zero-shot CoT, trained decoder")


def test_runs_of_one_name_are_not_mixed(tmp_path):
    """Another training may have had the same workdir, and other questions the same file name."""

    def run(name, seed, **fields):
        of = config() | {"seed": seed}
        perplexity(tmp_path / name / "run", -seed, of)
        values = {("test", "augmented", 0): 10.0 * seed, ("test", "decoder", 0): seed}
        benchmarks(tmp_path / name / "run", values, of)
        file = tmp_path / name / "run" / "benchmarks.json"
        content = json.loads(file.read_text())
        content["rows"] = [row | fields for row in content["rows"]]
        write(file, content)

    run("a", 1, documents=10)
    run("b", 2, documents=500)
    found = runs.find([str(tmp_path)])
    scores = {}
    for entry in entries.entries(found):
        key = entry.model, entry.perplexity and entry.perplexity["augmented_ppl"]
        scores.setdefault(key, []).extend(score["value"] for score, _ in entry.scores.values())
    assert scores == {
        ("decoder", None): [1, 2],
        ("augmented", 49.5): [10.0],
        ("augmented", 49.0): [20.0],
    }
    (table,) = (table for table in tables.tables(found) if table.name == "2_benchmarks")
    rows = [dict(zip(table.columns, row)) for row in table.rows if row[0] == "test"]
    lines = [(row["decoder"].value, row["8 latents"].value, row["setting"]) for row in rows]
    assert lines == [
        (1, 10.0, "acc, 4-shot, 10 documents"),
        (2, 20.0, "acc, 4-shot, 500 documents"),
    ]


def test_two_trained_decoders_of_one_name(tmp_path):
    for name in ("a", "b"):
        perplexity(tmp_path / name / "run", -1.0 - (name == "b"), config("decoder"))
        folder = tmp_path / name / "run"
        benchmarks(folder, {(f"of_{name}", "decoder", 0): 5.0}, config("decoder"))
        content = json.loads((folder / "benchmarks.json").read_text())
        write(folder / "benchmarks.json", content | {"fingerprint": f"trained {name}"})
    each = [set(entry.scores) for entry in entries.entries(runs.find([str(tmp_path)]))]
    assert {"of_a", "of_b"} not in each and {"of_a"} in each and {"of_b"} in each


def labels(folder):
    """Returns the words for each evaluation below a folder."""
    found = runs.find([str(folder)]).perplexity
    return entries.labels(list(map(entries.entry_of, found)))


def test_a_frozen_decoder_is_named_with_its_control(tmp_path):
    for name, lost in (("a", 0), ("b", 32)):
        of = config("decoder", 0) | {"evaluate": {"longer_prompt": lost}}
        perplexity(tmp_path / name, -1.0, of, step=None)
    first, second = labels(tmp_path)
    words = "without the first 32 tokens that the decoder reads"
    assert (first, second) == ("frozen decoder", f"frozen decoder, {words}")
    found = entries.entries(runs.find([str(tmp_path)]))
    assert [comparisons.kinds_of(entry) for entry in found] == [{"decoder"}, set()]


def test_a_frozen_decoder_is_named_with_its_prompt_end(tmp_path):
    for name, of in (("a", {}), ("b", {"prompt_end": "Answer:"})):
        perplexity(tmp_path / name, -1.0, config("decoder", 0, **of), step=None)
    assert labels(tmp_path) == ["frozen decoder", "frozen decoder, after 'Answer:'"]


def test_runs_of_another_optimizer_or_schedule_are_told_apart(tmp_path):
    for name, rate, steps in (("a", 1e-3, 180), ("b", 1e-2, 180), ("c", 1e-2, 400)):
        of = config() | {"optimizer": {"name": "adamw", "learning_rate": rate}}
        perplexity(tmp_path / name, -1.0, of | {"train": {"steps": steps}})
    perplexity(tmp_path / "d", -1.0, config(latents=4, ahead=8) | {"optimizer": {"name": "lion"}})
    first, second, third, other = labels(tmp_path)
    assert first.endswith(", optimizer.learning_rate 0.001, train.steps 180")
    assert second.endswith(", optimizer.learning_rate 0.01, train.steps 180")
    assert third.endswith(", optimizer.learning_rate 0.01, train.steps 400")
    assert "lion" not in other  # no other run has its words


def test_runs_of_another_text_or_evaluation_are_told_apart(tmp_path):
    for name, source, size in (("a", "x", 8), ("b", "y", 32)):
        of = {"data": {"sources": [source], "token_files": name, "validation": ["x"]}}
        of["evaluate"] = {"max_positions": size, "batch_size": size}
        perplexity(tmp_path / name, -1.0, config() | of)
        perplexity(tmp_path / f"frozen_{name}", -1.0, config("decoder", 0) | of, step=None)
    first, second, frozen, _ = labels(tmp_path)
    assert first.endswith(", data.sources ['x'], evaluate.max_positions 8")
    assert second.endswith(", data.sources ['y'], evaluate.max_positions 32")
    assert frozen == "frozen decoder, evaluate.max_positions 8"
    for table in tables.tables(runs.find([str(tmp_path)])):
        if table.name in ("0_runs", "11_every_method"):
            what = table.columns.index("what")
            words = {row[what] for row in table.rows}
            assert {word for word in words if word.startswith("cache")} == {first, second}


def test_what_changes_no_figure_is_not_named(tmp_path):
    """Nor is a key that an older file lacks; another decoder or dtype is."""
    for name, train, dtype in (
        ("a", {}, "float32"),
        ("b", {"validate_every": 10, "wandb": "x"}, "float32"),
        ("c", {}, "bfloat16"),
    ):
        of = config() | {"train": train, "compute": {"dtype": dtype}}
        perplexity(tmp_path / name, -1.0, of)
    *same, other = labels(tmp_path)
    assert len(set(same)) == 1 and same[0].endswith(", compute.dtype float32")
    assert other == same[0].replace("float32", "bfloat16")
    path = tmp_path / "b" / "perplexity.json"
    write(path, json.loads(path.read_text()) | {"fingerprint": "another"})
    first, second, _ = labels(tmp_path)
    assert ", of decoder " in first and ", of decoder packaged (another)" in second


def test_the_heading_of_an_evaluation_names_the_end_of_a_prompt():
    about = {"step": 4, "pieces": 2, "documents": 2, "num_works": 2}
    about |= {"interval_over": "works", "sets": {}}
    of = config(prompt_end="Answer:", distill=0.5) | {"evaluate": {}}
    heading = evaluation.as_text(about | {"config": of})
    assert ", placement after, after 'Answer:', without the steps, 2 pieces" in heading
    of = config(visible_text=8, distill=0.5) | {"evaluate": {}}
    heading = evaluation.as_text(about | {"config": of})
    assert ", placement after, 8 tokens of the text visible, 2 pieces" in heading


def test_every_evaluation_is_there(tmp_path):
    """The same figures once, others of the checkpoint beside them; also by a workdir's names."""
    for name, change in (("run", -1.0), ("run/decoder", -1.0), ("run/samples", -2.0)):
        perplexity(tmp_path / name, change, config())
        path = tmp_path / name / "perplexity.json"
        write(path, json.loads(path.read_text()) | {"checkpoint": "run/checkpoints/180"})
    found = entries.entries(runs.find([str(tmp_path)]))
    assert [
        (" ".join(r.key for r in e.results), e.perplexity["change_percent"]) for e in found
    ] == [
        ("P1 P2", -1.0),
        ("P3", -2.0),
    ]


def test_late_latents_are_the_asynchronous_table_and_controls_are_in_none(tmp_path):
    for name, evaluated in (("run", {}), ("late", {"delay": 2}), ("swap", {"swap": True})):
        perplexity(tmp_path / name, -1.0, config() | {"evaluate": evaluated})
        path = tmp_path / name / "perplexity.json"
        write(path, json.loads(path.read_text()) | {"checkpoint": "run/checkpoints/180"})
    by_name = {table.name: texts(table) for table in tables.tables(runs.find([str(tmp_path)]))}
    ours = {name: [row[0] for row in rows if "P" in row[2]] for name, rows in by_name.items()}
    what = "cache augmentation, after, 16 ahead tokens, step 180, seed 3"
    assert ours["8_asynchronous"] == [what, f"{what}, delay 2"] and ours["7_ahead_tokens"] == [what]
    assert ours["0_runs"] == [what, f"{what}, latents of another text", f"{what}, delay 2"]
    assert [row[1] for row in by_name["1_perplexity"] if row[2]] == [what]


def test_costs(tmp_path):
    """Of files alone: no decoder is there; in older ones the config has a part of its sizes."""
    of = config(num_traces=4) | {"train": {"batch_size": 2}, "data": {"seq_len": 32}}
    of["decoder"] = {"path": "nowhere", "architecture": {"num_layers": 2}}
    architecture = small.GEMMA.to_dict()
    for name, text, more in (
        ("old", "seen", {}),
        ("run/evaluations/60", "seen", {"architecture": architecture}),
        ("run/other", "unseen", {"architecture": architecture}),
    ):
        of["data"] = {"seq_len": 32, "validation": [text]}
        perplexity(tmp_path / name, -1.0, of)
        path = tmp_path / name / "perplexity.json"
        checkpoint = f"{name.partition('/')[0]}/checkpoints/180"
        write(path, json.loads(path.read_text()) | {"checkpoint": checkpoint} | more)
    metrics = {"step": 10, "loss": 4.5, "step_seconds": 0.25}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    table = costs.table(runs.find([str(tmp_path)]))
    old, unseen, seen = [dict(zip(table.columns, row)) for row in table.rows]
    assert old["trained parameters"] == old["ms per step"] == ""
    assert seen["trained parameters"] == unseen["trained parameters"] != ""
    assert [str(row["ms per step"]) for row in (unseen, seen)] == ["", "250"]
    what = "cache augmentation, after, 16 ahead tokens, step 180, seed 3"
    assert [seen["what"], unseen["what"]] == [f"{what}, on seen", f"{what}, on unseen"]


def test_the_step_of_an_export():
    """A folder's name may be a number; of older files it tells the step."""
    for data, step in (({"checkpoint": "shared/2", "step": 9}, 9), ({"checkpoint": "w/7"}, 7)):
        assert runs.Result("", Path("x"), data).step == step


def test_runs_of_different_text_or_size_are_no_line(tmp_path):
    for latents in (8, 16):
        for text in ("seen", "unseen"):
            of = config(latents=latents) | {"data": {"validation": [text]}}
            perplexity(tmp_path / f"{latents}{text}", -1.0, of)
    for layers, latents in ((1, 8), (2, 16)):
        of = config("resized", latents, coprocessor={"num_layers": layers}) | {
            "data": {"validation": ["seen"]}
        }
        perplexity(tmp_path / f"resized{layers}", -1.0, of)

    def lines():
        found = figures.lines_by_latents(runs.find([str(tmp_path)]).perplexity)
        return {
            name.partition(": ")[2]: [r.method["num_latents"] for r in line]
            for name, line in found.items()
        }

    rest = "16 ahead tokens, step 180, seed 3, on"
    what = f"cache augmentation, after, {rest}"
    assert lines() == {f"{what} seen": [8, 16], f"{what} unseen": [8, 16]}
    for folder in tmp_path.glob("16*"):
        (folder / "perplexity.json").unlink()
    alone = lines()
    assert alone[f"resized, after, num layers 1, {rest} seen"] == [8]
    assert alone[f"resized, after, num layers 2, {rest} seen"] == [16]


def test_runs_against_one_of_them(tmp_path, capsys):
    """Paired over works: a difference that is the same in each has no width."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 50, (6, 4))
    decoder, before = tokens * draw.normal(4, 1, (6, 1)), tokens * draw.normal(4, 1, (6, 1))
    sums = {
        "base": (tokens, before),
        "worse": (tokens, before + 0.1 * tokens),
        "worse, to n = 2": (tokens[:, :2], before[:, :2] + 0.1 * tokens[:, :2]),
        "other text": (tokens + 1, before),
        "other decoder": (tokens, before),
        "opposite": (tokens, before + np.repeat([-0.1, 0.3], [4, 2])[:, None] * tokens),
    }
    # A decoder is the same where only a machine's rounding differs.
    changed = {"other decoder": 2.0, "worse": 1 + 3e-5}
    for name, (counts, augmented) in sums.items():
        perplexity(tmp_path / name, -1.0, config())
        path = tmp_path / name / "perplexity.json"
        write(path, json.loads(path.read_text()) | {"interval_over": "works"})
        np.savez(
            tmp_path / name / "documents.npz",
            source=np.zeros(6, int),
            work=np.repeat([0, 1], [4, 2]),
            tokens=counts,
            decoder=decoder[:, : counts.shape[1]] * changed.get(name, 1.0),
            augmented=augmented,
        )
    perplexity(tmp_path / "without", -1.0, config())
    table = against.compare(runs.find([str(tmp_path)]), str(tmp_path / "base"))
    same, opposite, worse, near = table.rows
    mixed = opposite[3]
    assert mixed.low == pytest.approx(100 * np.expm1(-0.1)) and mixed.high == pytest.approx(
        100 * np.expm1(0.3)
    )
    assert ", of perplexity over works." in table.note
    assert [str(cell) for cell in same[3:]] == ["+0.00% [+0.00, +0.00]"] * 3 + [""] * 3
    assert [str(cell) for cell in worse[3:]] == ["+10.52% [+10.52, +10.52]"] * 3 + [""] * 3
    assert [str(cell) for cell in near[3:]] == ["+10.52% [+10.52, +10.52]"] * 2 + [""] * 4
    assert (
        len(table.origins) == 4 and "opposite" in table.origins[1] and "worse" in table.origins[2]
    )
    why = f"its frozen decoder's perplexity differs from that of {tmp_path / 'base'}"
    left_out = f"warning: left out {tmp_path / 'other decoder'}: {why}\n"
    assert capsys.readouterr().err == left_out
    pack = tmp_path / "packed" / "runs"
    pack_results.main(
        SimpleNamespace(folders=[str(tmp_path / name) for name in sums], out=str(pack))
    )
    capsys.readouterr()
    again = against.compare(runs.find([str(pack)]), str(pack / "base"))
    assert [list(map(str, row[3:])) for row in again.rows] == [
        list(map(str, row[3:])) for row in table.rows
    ]
    with zipfile.ZipFile(pack / "opposite.zip") as archive:
        packed_sums = np.load(io.BytesIO(archive.read("opposite/documents.npz")))
    assert len(packed_sums["tokens"]) == 2, "a pack has the sums of each work"
    with pytest.raises(ld.UserError, match="without: holds no documents.npz"):
        against.compare(runs.find([str(tmp_path)]), str(tmp_path / "without"))


def test_an_older_run_without_works_is_paired_over_documents(tmp_path):
    sums = {"tokens": np.ones((4, 1)), "decoder": np.ones((4, 1)), "augmented": np.ones((4, 1))}
    works = {"source": np.zeros(4, int), "work": np.repeat([0, 1], 2)}
    for name, arrays in (("base", sums | works), ("older", sums)):
        perplexity(tmp_path / name, -1.0, config())
        np.savez(tmp_path / name / "documents.npz", **arrays)
    found = runs.find([str(tmp_path)])
    pair = against.pair_of(sums | works, found.perplexity[1])
    assert pair.source is None and pair.work.tolist() == [0, 1, 2, 3]
    table = against.compare(found, str(tmp_path / "base"))
    assert "over documents, whose works were not kept" in table.note and len(table.rows) == 2


def test_published_figures_agree_with_each_other():
    """What the paper gives twice is written down twice here."""
    for line in (
        published.AUGMENTED_32,
        *published.COPROCESSORS[:2],
        published.NUM_AHEAD[2],
        published.DELAY[0],
    ):
        assert published.BENCHMARKS["gsm8k"].scores[line.latents] == line.gsm8k
    change = 100 * (published.AUGMENTED_32.ppl / published.FROZEN.ppl - 1)
    assert published.PERPLEXITY_CHANGE[32][1] == pytest.approx(change, abs=0.01)
    assert published.BENCHMARKS["gsm8k"].scores[0] == published.FROZEN.gsm8k
    for by_n in published.PERPLEXITY_CHANGE.values():
        assert tuple(by_n) == tables.AHEAD


def test_markdown_and_csv(by_name, out):
    table = by_name["1_perplexity"]
    markdown = (out / "1_perplexity.md").read_text()
    assert markdown == table_format.markdown(table)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(table.columns) + 1}, (
        "a name's | is escaped"
    )
    rows = list(csv.reader(io.StringIO((out / "1_perplexity.csv").read_text())))
    assert rows[0][4:7] == ["n = 1", "n = 1 low", "n = 1 high"] and "n = 32 low" not in rows[0]
    assert rows[2][4:7] == ["-0.5", "-0.75", "-0.25"] and rows[1][4:7] == ["-1.53", "", ""]
    assert {len(row) for row in rows} == {len(table.columns) + 6}


def test_the_page_has_every_table_and_figure(out, by_name):
    page = (out / "report.md").read_text()
    assert all(f"**{table.title}**" in page for table in by_name.values())
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert pictures == [
        f"{name}.png" for name in ("loss", "change_by_n", "change_by_latents", "change_by_step")
    ]
    assert page.count("python -m x <y>") == 10, "each origin once"


def test_files(out, by_name):
    names = {f"{name}.{form}" for name in by_name for form in ("md", "csv")} | {"report.md"}
    names |= {
        f"{name}.png" for name in ("loss", "change_by_n", "change_by_latents", "change_by_step")
    }
    assert {path.name for path in out.iterdir()} == names
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_same_runs_give_the_same_bytes(found, out, by_name):
    again = runs.find(["runs"])
    assert figures.by_step(again.curves) == (out / "change_by_step.png").read_bytes()
    assert tables.tables(again) == list(by_name.values())


def test_packed_runs_give_the_same_report(found, by_name, tmp_path, monkeypatch):
    """Older ones, and a training that still writes, too. A run of the same name replaces one."""
    workdirs = [str(path) for path in Path("runs").resolve().iterdir()]
    monkeypatch.chdir(tmp_path)
    for some in (workdirs[:4], workdirs[3:]):
        pack_results.main(SimpleNamespace(folders=some, out="runs"))
    packs = {Path("runs", f"{Path(workdir).name}.zip") for workdir in workdirs}
    assert set(Path("runs").iterdir()) == packs
    again = runs.find(["runs"])
    assert tables.tables(again) == list(by_name.values())
    assert again.losses == found.losses
    (one,) = runs.find(["runs/only"]).perplexity
    assert str(one.path) == "runs/only/evaluations/90/perplexity.json"
    with pytest.raises(ld.UserError, match="runs/other: no such folder"):
        runs.find(["runs/other"])
    twice = [workdirs[0], f"elsewhere/{Path(workdirs[0]).name}"]
    with pytest.raises(ld.UserError, match="two of the workdirs are called"):
        pack_results.main(SimpleNamespace(folders=twice, out="runs"))
    contents = {pack: pack.read_bytes() for pack in packs}
    pack_results.main(SimpleNamespace(folders=workdirs, out="runs"))
    assert {pack: pack.read_bytes() for pack in packs} == contents, "the same files, the same packs"
    Path("runs/only.zip").write_bytes(contents[Path("runs/only.zip")][:-30])
    with pytest.raises(ld.UserError, match="runs/only.zip: not a zip archive"):
        runs.find(["runs"])
    damaged = bytearray(contents[Path("runs/only.zip")])
    damaged[len(damaged) // 2] ^= 1
    Path("runs/only.zip").write_bytes(damaged)
    with pytest.raises(ld.UserError, match="runs/only/.*: damaged"):
        for file in packed.files_in(Path("runs/only.zip")):
            file.read()


def test_the_stored_runs_open(tmp_path):
    """The runs that docs/results_text.md is about, and the figures of all of them."""
    found = runs.find([str(DOCS / "results" / "lab")])
    (of,) = (result for result in found.perplexity if result.path.parent.name == "overlay@0")
    row = next(row for row in of.data["rows"] if row["n"] == 16)
    assert str(table_format.change(row)) == "-0.41% [-0.55, -0.26]"
    assert (of.method["name"], of.step, of.read_documents()["tokens"].shape) == (
        "cache_augmentation",
        8000,
        (141, 32),  # works
    )
    runpy.run_path(str(DOCS / "figures" / "plots.py"))["draw"](tmp_path)
    shown = {"growth": "training steps", "results": "control: ", "works": "works of other kinds"}
    for name, words in shown.items():
        assert words in (tmp_path / f"{name}.svg").read_text()


def test_the_tables_of_the_pages_are_those_of_the_stored_runs():
    """Of all pages in one test: each stored run is read once."""
    script = runpy.run_path(str(DOCS / "figures" / "tables.py"))
    for file in script["PAGES"]:
        page = file.read_text()
        assert script["filled"](page).splitlines() == page.splitlines()
        without_changes = page.count("accuracy=1 -->") + page.count("methods=1 -->")
        of_runs = page.count("n = 1 | n = 4") - page.count("| the decoder reads |")
        assert page.count("<!-- table: ") == of_runs + without_changes


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("perplexity.json", "{", "perplexity.json: not JSON"),
        ("perplexity.json", b"\xff", "perplexity.json: not JSON"),
        ("perplexity.json", "[]", "perplexity.json: holds list, expected an object"),
        ("perplexity.json", {"rows": None}, "perplexity.json: rows=None: expected list"),
        ("perplexity.json", {"rows": []}, "perplexity.json: 0 rows"),
        ("perplexity.json", {"rows": [{"n": 1}]}, r"rows\[0\]: tokens=None: expected int"),
        (
            "perplexity.json",
            {"rows": [3]},
            r"perplexity.json: rows\[0\]: holds int, expected an object",
        ),
        ("perplexity.json", {"config": {}}, "perplexity.json: config: method=None: expected dict"),
        ("perplexity.json", {"fingerprint": 3}, "perplexity.json: fingerprint=3: expected str"),
        ("perplexity.json", {"sets": {"x": {}}}, r"perplexity.json: sets\['x'\]: rows=None"),
        (
            "perplexity.json",
            {"sets": {"x": 3}},
            r"perplexity.json: sets\['x'\]: holds int, expected an object",
        ),
        ("perplexity.json", {"sets": [3]}, r"perplexity.json: sets=\[3\]: expected dict"),
        ("perplexity.json", {"checkpoint": 3}, "perplexity.json: checkpoint=3: expected str"),
        ("perplexity.json", {"documents": True}, "perplexity.json: documents=True: expected int"),
        (
            "perplexity.json",
            {"sets": {"x": {"rows": [], "works": {"y": {"rows": [{"n": "1"}]}}}}},
            r"perplexity.json: sets\['x'\]: works\['y'\]: rows\[0\]: n='1': expected int",
        ),
        (
            "benchmarks.json",
            {"rows": [{"benchmark": "x"}]},
            r"benchmarks.json: rows\[0\]: model=None",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step"\n', "metrics.jsonl:2: not JSON"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": NaN}\n',
            "metrics.jsonl:1: loss=nan: expected a finite number",
        ),
    ],
)
def test_broken_files_are_named(found, tmp_path, name, content, message):
    folder = epath.Path(tmp_path / "run")
    folder.mkdir()
    if isinstance(content, dict):
        write(folder / name, json.loads(epath.Path(f"runs/a/{name}").read_text()) | content)
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ld.UserError, match=message) as caught:
        runs.find([str(folder)])
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_the_command_line(found, tmp_path, monkeypatch, capsys):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.delitem(sys.modules, "latent_delib.report", raising=False)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module("latent_delib.report", run_name="__main__")
        return str(exit_.value.code)

    (tmp_path / "empty").mkdir()
    out = f"--out={tmp_path / 'out'}"
    assert error("nowhere", out) == "error: nowhere: no such folder"
    assert f"{__file__}: is a file, expected a folder" in error(__file__, out)
    assert "empty: holds no perplexity.json, benchmarks.json" in error(out, tmp_path / "empty")
    assert error(out).startswith("error: DIR is missing: ")
    assert error("runs").startswith("error: --out is missing")
    assert "folders" in error("--folders=runs", out)
    assert (
        error("runs", out, f"--look={tmp_path}")
        == f"error: {tmp_path}: holds no checkpoints; train it first"
    )
    assert error("runs", out, "--text=a") == "error: --text needs --look=WORKDIR"
    (tmp_path / "file").write_text("")
    in_file = tmp_path / "file"
    said = error("runs", f"--out={in_file}")
    assert said == f"error: {in_file}: is a file, expected a folder"
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", ["report", "--help"])
    monkeypatch.delitem(sys.modules, "latent_delib.report", raising=False)
    runpy.run_module("latent_delib.report", run_name="__main__")
    assert "\n  DIR: folders of finished runs" in capsys.readouterr().out


def test_a_key_of_a_fork_is_in_the_label(tmp_path):
    """Runs that differ in nothing else can be told apart."""
    for penalty in (1.0, 2.0):
        perplexity(epath.Path(tmp_path) / f"run{penalty}", -1.0, config(latent_penalty=penalty))
    labels = [entries.label(e) for e in entries.entries(runs.find([str(tmp_path)]))]
    assert [label.partition("latent penalty ")[2] for label in labels] == ["1.0", "2.0"]


def test_a_key_of_a_fork_at_its_value_in_older_runs_is_not_in_the_label(tmp_path, monkeypatch):
    """A run of the fork without the change stands on one line with the runs before it."""
    monkeypatch.setitem(entries.BEFORE, "method.latent_penalty", 0.0)
    for name, more in (("old", {}), ("new", {"latent_penalty": 0.0})):
        perplexity(epath.Path(tmp_path) / name, -1.0, config(**more))
    labels = {entries.label(e) for e in entries.entries(runs.find([str(tmp_path)]))}
    assert len(labels) == 1 and "penalty" not in labels.pop()


def test_without_matplotlib(found, tmp_path, monkeypatch, capsys):
    """`report` refuses at once; `evaluate` leaves out its figure and keeps the table."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = "matplotlib is not installed: install it with ./launch/setup.sh report"
    flags = SimpleNamespace(
        folders=["nowhere"], out=str(tmp_path / "out"), look="", text=report.TEXT
    )
    with pytest.raises(ld.UserError, match=line):
        report.main(flags)
    evaluate.draw(epath.Path(tmp_path) / "a.png", figures.by_n, found.perplexity[0].data["rows"])
    assert capsys.readouterr().out.startswith(f"a.png is left out: {line}")
    assert not list(tmp_path.iterdir())


def test_a_trained_run_from_end_to_end(make_config, trained, texts, tmp_path, capsys, monkeypatch):
    """What `train` and `evaluate` really write, and a look into the latents of its export."""
    convert.convert(str(trained), str(tmp_path / "export"))
    evaluate.evaluate(make_config(), str(trained), str(tmp_path / "evaluated"))
    text = max(texts["validation"], key=len)
    flags = SimpleNamespace(
        folders=[str(trained), str(tmp_path)],
        out=str(tmp_path / "out"),
        look=str(tmp_path / "export"),
        text=text,
        against=str(tmp_path / "evaluated"),
    )
    report.main(flags)
    out = tmp_path / "out"
    assert "read 1 perplexity.json, 0 benchmarks.json, 1 metrics.jsonl" in capsys.readouterr().out
    change = json.loads((tmp_path / "evaluated" / "perplexity.json").read_text())["rows"][0][
        "change_percent"
    ]
    table = (out / "1_perplexity.md").read_text()
    assert "| 2 | cache augmentation, after, 3 ahead tokens, step 4, seed 0 | P1 | " in table
    assert f" | {change:+.2f}%" in table
    assert "| P1 | +0.00% [+0.00, +0.00] |" in (out / "13_against.md").read_text()
    (costs,) = csv.DictReader((out / "12_costs.csv").open())
    own = ld.load_coprocessor(str(trained)).params
    assert costs["trained parameters"] == f"{sum(x.size for x in jax.tree.leaves(own))}"
    exp = experiment.read(make_config())
    useful = estimate.step_flops(exp)["useful"] * exp.mesh.size
    assert float(costs["GFLOP per step"]) == pytest.approx(useful / 1e9)
    assert costs["steps"] == "4" and costs["n = 1"] == f"{change}"
    nearest = list(csv.reader((out / "look_nearest.csv").open()))
    assert [row[0] for row in nearest] == ["latent", "z1", "z2"] and len(nearest[1]) == 11
    page = (out / "report.md").read_text()
    assert page.count("![") == 3 + 2 and "[2 latents]" in page
    assert (out / "look_coprocessor.png").exists() and (out / "look_decoder.png").exists()
    with pytest.raises(ld.UserError, match="--text: [0-9,]+ tokens with BOS, expected at most 512"):
        report.look_into(str(trained), text * 100)
    with pytest.raises(
        ld.UserError, match="--text='the cat': .* tokens with BOS, expected at least 14"
    ):
        report.look_into(str(trained), "the cat")
    monkeypatch.setattr(ld.AugmentedLM, "latents", lambda *args: Inserted(None, None))
    with pytest.raises(ld.UserError, match="writes keys and values, not vectors"):
        report.look_into(str(trained), text)
