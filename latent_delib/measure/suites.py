"""Suites of benchmarks: reads the table of them, and finds the rows that --benchmarks names."""

import hashlib
from pathlib import Path
from typing import Any

from etils import epath

from latent_delib.errors import UserError
from latent_delib.machine.command_line import ROOT, run_file
from latent_delib.measure.scores import BenchmarkRow

QUESTIONS_PREFIX = "qa:"  # begins the name of a file of questions


def read_table(path: str) -> dict[str, Any]:
    """Reads a file in the form of configs/benchmarks.py; looks in ROOT if it is not found here."""
    for found in (Path(path), ROOT / path):
        if found.is_file():
            table = run_file(str(found))
            lacking = {"PUBLISHED", "OFFLINE", "COT"} - table.keys()
            if lacking:
                raise UserError(f"--table={path}: lacks {', '.join(sorted(lacking))}")
            for name, row in (table["PUBLISHED"] | table["OFFLINE"]).items():
                lacking = {"shots", "metric"} - row.keys()
                if lacking:
                    raise UserError(f"--table={path}: {name} lacks {', '.join(sorted(lacking))}")
            return table
    raise UserError(f"--table={path}: no such file")


def listed(names: str) -> list[str]:
    """Returns the different names of a list with commas."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def choose(table: dict[str, Any], benchmarks: str) -> dict[str, BenchmarkRow]:
    """Returns the rows of the table that --benchmarks names, in its order.

    Each says its task, and its set: "published", "offline" or "questions".
    """
    sets: dict[str, dict[str, BenchmarkRow]] = {"published": {}, "offline": {}}
    for each, rows in sets.items():
        for name, row in table[each.upper()].items():
            rows[name] = {"set": each, "task": name} | row
    for name, row in (sets["published"] | sets["offline"]).items():
        sets[name] = {name: row}
    chosen: dict[str, BenchmarkRow] = {}
    for name in listed(benchmarks):
        if name.startswith(QUESTIONS_PREFIX):
            stem = Path(name.removeprefix(QUESTIONS_PREFIX)).stem
            if stem in sets or stem in chosen:
                raise UserError(
                    f"--benchmarks={name}: another benchmark has this name; rename the file"
                )
            row = {"set": "questions", "task": name}
            chosen[stem] = row | {"shots": 0, "metric": "exact_match"}
            continue
        if name not in sets:
            raise UserError(
                f"--benchmarks={name}: no such benchmark; there are {', '.join(sets)}, qa:FILE"
            )
        chosen |= sets[name]
    if not chosen:
        raise UserError(f"--benchmarks is empty; there are {', '.join(sets)}")
    return chosen


def task_digest(row: BenchmarkRow, folder: str) -> str | None:
    """Returns the SHA-256 of a task's files, hex; None for one of the harness's own.

    Args:
      row: a row that `choose` returned.
      folder: the folder that `make_tasks` wrote.
    """
    if row["set"] == "published":
        return None
    if row["set"] == "questions":
        files_of_task = [epath.Path(row["task"].removeprefix(QUESTIONS_PREFIX))]
    else:
        files_of_task = sorted(epath.Path(folder).glob(f"{row['task']}.*"))
    total = hashlib.sha256()
    for file in files_of_task:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
