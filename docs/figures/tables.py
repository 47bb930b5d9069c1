"""Fills in the tables of PAGES from the runs stored in docs/results.

  .venv/bin/python docs/figures/tables.py

Write a table with its first column, and run this. A comment above the table names its runs:

  <!-- table: runs=a -->                      docs/results/a, each run against its frozen decoder
  <!-- table: runs=a run=NAME -->             of one run; rows then need no name
  <!-- table: runs=lab source=0 -->           of its first validation source alone
  <!-- table: runs=problems accuracy=1 -->    percent of problems solved, by the columns' benchmarks
  <!-- table: runs=hops costs=1 accuracy=1 -->    trained parameters and GFLOP per step before these
  <!-- table: methods=1 -->                   each experiment: the cost of a step, text (`lab`),
                                              questions (`hops`)

The words in the first column say which evaluation a row is: `NAME@SEED`, @0 where none is given,
and one of PHRASES. "against `NAME`" and "against its own" name another base, work by work.
A row that begins with "the same" is of the validation source of the row before. In a table of
accuracy, "without latents" is the plain decoder, and "stage K" a stage of Coconut's curriculum.

Columns on text are `n = N`, `mean` over all n, and `below / above`: at how many n the interval is
below zero, and above it.
"""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from latent_delib.measure import perplexity
from latent_delib.results import against, packed, runs
from latent_delib.results.costs import training_costs
from latent_delib.results.tables import changes

RESULTS = Path(__file__).parents[1] / "results"
PAGES = [
    RESULTS.with_name(name)
    for name in (
        "results.md",
        "results_text.md",
        "results_tables.md",
        "results_questions.md",
        "earlier_results.md",
    )
]
COMMENT = re.compile(r"<!-- table: (.*) -->")
PHRASES = {  # words of a row -> the folder of an evaluation
    "latents of another": "swap",
    "reads 32 tokens more": "longer",
    "one token late": "delay1",
    "two tokens late": "delay2",
    "three tokens late": "delay3",
    "logits divided by 1.05": "temperature",
}
STEP_MS = {
    row["experiment"]: row["ms"]
    for row in json.loads((RESULTS / "methods.json").read_text())["rows"]
}
SOURCES = {"kinds trained on": "0", "unseen": "1"}
READ = {file.path: cache(file.read) for file in packed.files_below(RESULTS)}  # by path


class Row(NamedTuple):
    """A row of a table.

    run: a folder. evaluation: a folder in it, or "". against: a folder, or "": the frozen decoder.
    source: the number of a validation source, or "": all.
    """

    run: str
    evaluation: str = ""
    against: str = ""
    source: str = ""


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(page: str) -> str:
    """Returns the page with the figures of all its tables."""
    lines = []
    settings: dict[str, str] = {}
    head: list[str] = []
    row = Row("")
    for line in page.splitlines():
        comment = COMMENT.fullmatch(line)
        if comment:
            settings = dict(word.split("=", 1) for word in comment[1].split())
            head = []
            row = Row("")
        elif not line.startswith("|"):
            settings = settings if not line else {}
        elif settings and not head:
            head = [cell.strip(" `") for cell in line.split("|")[2:-1]]
        elif settings and "---" not in line:
            words = line.split("|")[1].strip()
            row = row_of(words, settings, row)
            is_plain = "without latents" in words
            costs = []
            if "methods" in settings:
                line = f"| {words} | {' | '.join(summary(row.run))} |"
                lines.append(line)
                continue
            if "costs" in settings:
                costs = ["", ""] if is_plain else costs_of(settings["runs"], row)
            if "accuracy" in settings:
                found = accuracies(settings["runs"], row, head[len(costs) :], is_plain)
            else:
                found = cells(settings["runs"], row, head)
            found = [*costs, *found]
            line = f"| {words} | {' | '.join(found)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def row_of(words: str, settings: dict[str, str], before: Row) -> Row:
    """Reads the evaluation of a row from its words, its table's settings and the row before."""
    names = [name if "@" in name else f"{name}@0" for name in re.findall(r"`(\w+@?\w*)`", words)]
    phrases = [folder for phrase, folder in PHRASES.items() if phrase in words]
    stage = re.search(r"stage (\w+)", words)
    sources = [number for phrase, number in SOURCES.items() if phrase in words]
    run = settings.get("run") or names[0]
    evaluation = base = ""
    if phrases:
        evaluation = phrases[0]
    elif stage:
        evaluation = stage[1]
    if "against its own" in words:
        base = run
    elif "against" in words:
        base = names[1]
    source = settings.get("source", "")
    if sources:
        source = sources[0]
    elif words.startswith("the same"):
        source = before.source
    return Row(run, evaluation, base, source)


def cells(folder: str, row: Row, head: list[str]) -> list[str]:
    """Returns the change in percent by the columns that `head` names."""
    ours = find(RESULTS / folder / row.run, row.evaluation)
    data = ours.data
    if row.against:
        part = paired(ours, RESULTS / folder / row.against, row.source)
    elif row.source:
        part = data["sets"][data["config"]["data"]["validation"][int(row.source)]]
    else:
        part = data
    if "mean" in head and "mean" not in part:
        part = part | {"mean": mean_of(ours, row.source)}
    rows = part["rows"]
    values = {name: str(cell).replace("%", "") for name, cell in changes(part).items()}
    below = sum((each["change_high"] or 0) < 0 for each in rows)  # None: not known
    above = sum((each["change_low"] or 0) > 0 for each in rows)
    values["below / above"] = f"{below} / {above}"
    return [values[name] for name in head]


def mean_of(ours: runs.Result, source: str) -> dict:
    """Returns the mean of the changes over n, on one source or on all, as `evaluate` computes it.

    Files from before 2026-12-03 do not have it.
    """
    arrays = ours.read_documents()
    chosen = arrays["source"] == int(source) if source else slice(None)
    sums = perplexity.Sums(*(arrays[name][chosen] for name in perplexity.Sums._fields))
    seed = ours.data["config"]["evaluate"]["seed"]
    return perplexity.figures({"nll": sums}, arrays["work"][chosen], seed)["mean"]


def summary(run: str) -> list[str]:
    """Returns what a step of an experiment costs, and what it gains on text and questions, by seed.

    On text it is the mean of the changes at n = 1 to 32, on works of the kinds trained on.
    """
    name = run.partition("@")[0]
    costs, on_text, on_questions = ["", ""], [], []
    for seed in range(3):
        row = Row(f"{name}@{seed}")
        if RESULTS / "lab" / row.run / "perplexity.json" in READ:
            data = find(RESULTS / "lab" / row.run, "").data
            known = data["sets"][data["config"]["data"]["validation"][0]]["rows"]
            on_text.append(f"{perplexity.mean_change(known):+.2f}")
            costs = costs_of("lab", row)
        if RESULTS / "hops" / row.run / "benchmarks.json" in READ:
            (solved,) = accuracies("hops", row, ["hops.test"], is_plain=False)
            on_questions.append(solved.partition(" ")[0])
            costs = costs if any(costs) else costs_of("hops", row)
    seconds = STEP_MS.get(f"lab/{name}", STEP_MS.get(f"hops/{name}", math.nan))
    return [*costs, f"{seconds:.0f}", " / ".join(on_text), " / ".join(on_questions)]


def costs_of(folder: str, row: Row) -> list[str]:
    """Returns the trained parameters of a run and the GFLOP of a step."""
    trained, flops = training_costs(find(RESULTS / folder / row.run, ""))
    return [f"{trained:,}", f"{flops / 1e9:.1f}"]


def accuracies(folder: str, row: Row, benchmarks: list[str], is_plain: bool) -> list[str]:
    """Returns the percentage that a run solves of each benchmark, with its interval."""
    rows = READ[RESULTS / folder / row.run / row.evaluation / "benchmarks.json"]()["rows"]
    latents = "decoder" if is_plain or "decoder" in row.run else "augmented"
    values = {}
    for each in rows:
        if each["model"] == latents:
            values[each["benchmark"]] = (
                f"{each['value']:.1f} [{each['low']:.1f}, {each['high']:.1f}]"
            )
    return [values.get(name, "") for name in benchmarks]


def find(run: Path, evaluation: str) -> runs.Result:
    """Returns an evaluation of a run."""
    folder = run / evaluation
    data = READ[folder / "perplexity.json"]()
    return runs.Result("", folder, data, READ.get(folder / packed.DOCUMENTS))


def paired(ours: runs.Result, base: Path, source: str) -> dict:
    """Compares two evaluations work by work, on one source or on all."""
    pair = against.pair_of(READ[base / packed.DOCUMENTS](), ours)
    chosen = pair.source == int(source) if source else slice(None)
    sums = perplexity.Sums(*(x[chosen] for x in pair.sums))
    return perplexity.figures({"nll": sums}, pair.work[chosen], seed=0)


if __name__ == "__main__":
    main()
