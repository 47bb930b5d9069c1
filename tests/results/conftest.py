"""Runs of every kind that a table is about, and the tables made of them. No test changes them."""

import contextlib

import pytest

from latent_delib.results import runs, tables
from tests.results.writers import FINGERPRINT, HOSTILE, ahead, benchmarks, config, perplexity, write

RUNS = [  # folder, change at n = 1, config, step
    ("a/evaluations/120", -0.25, config(), 120),
    ("a/evaluations/60", -0.25, config(), 60),
    ("b", -1, config(latents=16), 180),
    ("frozen", 0, config("decoder", 16), None),  # base.py's number of latents, which it has none of
    ("trained", 0, config("decoder", 16), 180),
    ("pause_tokens", 200, config("pause_tokens"), 180),
    ("from_scratch", 200, config("from_scratch"), 180),
    ("lora", -0.125, config(latents=32, lora_rank=64), 180),
    ("only/evaluations/60", 2, config(ahead=4), 60),
    ("only/evaluations/90", 1, config(ahead=4), 90),
]
SCORES = {  # of run a: benchmark, model, delay -> value
    ("gsm8k", "decoder", 0): 10,
    ("gsm8k", "zero_shot_cot", 0): 11,
    ("gsm8k", "augmented", 0): 12.345,
    ("gsm8k", "augmented", 1): 11,
    ("gsm8k", "augmented", 2): 10,
    ("chain_sum", "decoder", 0): 40,
}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder that holds runs/, with a run of every kind."""
    root = tmp_path_factory.mktemp("finished")
    folder = root / "runs"
    for name, change, of, step in RUNS:
        perplexity(folder / name, change, of, step)
    source = {"rows": ahead(-0.5)[:1], "documents": 2}
    sets = dict.fromkeys(("packaged/validation", HOSTILE), source)
    perplexity(folder / "a", -0.5, sets=sets)
    benchmarks(folder / "a", SCORES)
    benchmarks(folder / "b", {("gsm8k", "augmented", 0): 20}, config(latents=16))
    being_written = '{"step": 10, "loss": 4.5}\n{"step": 20, "loss": 4.0}\n{"step": 30, "lo'
    (folder / "a" / "metrics.jsonl").write_text(being_written)
    write_older(folder / "old")
    return root


def write_older(folder):
    """Writes a perplexity.json as older versions did: no step, no intervals, no provenance."""
    rows = []
    for row in ahead(-0.5):
        rows.append({name: row[name] for name in runs.FIELDS[runs.PERPLEXITY]})
    data = {"rows": rows, "pieces": 5, "config": config(), "fingerprint": FINGERPRINT}
    write(folder / "perplexity.json", data | {"checkpoint": "runs/old/checkpoints/7"})


@pytest.fixture(scope="session")
def found(root):
    """What is found below runs/ from the folder above; one of the runs is named twice."""
    with contextlib.chdir(root):
        return runs.find(["runs", "runs/a"])


@pytest.fixture(scope="session")
def by_name(found):
    return {table.name: table for table in tables.tables(found)}
