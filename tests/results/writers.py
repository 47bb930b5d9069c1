"""Writes the files of finished runs, as `evaluate` and `benchmark` do."""

import json

from latent_delib.results import runs, tables

FINGERPRINT = "ab12cd34ef56" + 52 * "0"
PROVENANCE = {
    "command": "python -m x <y>",
    "date": "2026-11-25T09:00:00+00:00",
    "hardware": "2 cores",
    "versions": {},
}
HOSTILE = 'lines:<script>alert("$x$")</script>|*.txt'  # the name of a source
# The label of config().
OURS = "cache augmentation, placement after, 16 ahead tokens, step 180, seed 3"


def config(name="cache_augmentation", latents=8, ahead=16, **method):
    method |= {"name": name, "num_latents": latents, "placement": "after", "num_ahead": ahead}
    return {"seed": 3, "decoder": {"path": "packaged"}, "method": method}


def ahead(change):
    """Returns rows of a perplexity.json: a change at n = 1, half of it at 2, a quarter at 4."""
    rows = []
    for n in (1, 2, 4):
        row = {"n": n, "tokens": 100, "decoder_ppl": 50.0, "augmented_ppl": 50 + change / 2 / n}
        row["change_percent"] = change / n
        row |= {"change_low": change / n - 0.25, "change_high": change / n + 0.25}
        rows.append(row)
    return rows


def perplexity(folder, change, of=None, step: int | None = 180, *, run="", **fields):
    """Writes a perplexity.json with the rows of `ahead`.

    of: its config. step: of its checkpoint; None: it has none. run: the workdir of its checkpoint,
    by default runs/ and the folder's name. fields: stand in place of those written here.
    """
    workdir = run or f"runs/{folder.name}"
    data = {
        "rows": ahead(change),
        "mean": {"change_percent": change / 2, "change_low": -1.0, "change_high": 1.0},
        "sets": {},
        "documents": 5,
        "pieces": 5,
        "config": of or config(),
        "checkpoint": None if step is None else f"{workdir}/checkpoints/{step}",
        "step": step,
        "fingerprint": FINGERPRINT,
        "provenance": PROVENANCE,
    }
    write(folder / "perplexity.json", data | fields)


def benchmarks(folder, values, of=None, *, run="", documents=200, **fields):
    """Writes a benchmarks.json of step 180. values: (benchmark, model, delay) -> value."""
    rows = []
    for (benchmark, model, delay), value in values.items():
        row = {"benchmark": benchmark, "model": model, "metric": "acc", "value": value}
        row |= {"stderr": 1.0, "low": value - 2, "high": value + 2}
        row |= {"documents": documents, "shots": 4, "every": 0, "delay": delay}
        rows.append(row)
    workdir = run or f"runs/{folder.name}"
    data = {
        "rows": rows,
        "config": of or config(),
        "checkpoint": f"{workdir}/checkpoints/180",
        "step": 180,
        "fingerprint": FINGERPRINT,
        "provenance": PROVENANCE,
    }
    write(folder / "benchmarks.json", data | fields)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def cells(table):
    """Returns the rows of a table as text."""
    return [list(map(str, row)) for row in table.rows]


def tables_of(folder) -> dict[str, list[list[str]]]:
    """Returns the rows, as text, of each table of the runs below a folder, by the table's name."""
    return {table.name: cells(table) for table in tables.tables(runs.find([str(folder)]))}
