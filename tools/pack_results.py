"""Packs finished runs into two small files, runs.json and runs.npz, as docs/results keeps them.

  python -m tools.pack_results WORKDIR [WORKDIR ...] --out=docs/results/b_cpu

Takes what `train`, `evaluate` and `benchmark` wrote below each workdir: perplexity.json, benchmarks.json, metrics.jsonl
and documents.npz. Adds it to the pack in --out, if there is one; a run of the same name is replaced. `report` makes the
same tables from the pack as from the workdirs. Every number is kept to the last bit; what is equal is kept once.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import FOLDERS, REQUIRED
from latent_delib.results import packed
from latent_delib.results.packed import ABSENT, DOCUMENTS, METRICS, NUMBERS, RECORD, RESULTS, TABLES, Arrays, File, Rows


def main(flags: Any) -> None:
    out = Path(flags.out)
    found = kept(out, flags.folders)
    for workdir in flags.folders:
        found |= below(Path(workdir))
    record, arrays = pack({name: file.read() for name, file in found.items()})
    numbers = io.BytesIO()
    np.savez_compressed(numbers, **arrays)
    files.write(out / NUMBERS, numbers.getvalue())
    files.write(out / RECORD, f"{json.dumps(record, indent=1)}\n".encode())
    print(f"wrote {out / RECORD} and {NUMBERS}: {len(found)} files of finished runs")


def kept(out: Path, workdirs: Sequence[str]) -> dict[str, File]:
    """Returns the files of the pack in `out` by their names in it, without those of runs called like a workdir.

    Raises:
      UserError: two workdirs have the same name.
    """
    replaced = set()
    for workdir in workdirs:
        run = Path(workdir).resolve().name
        if run in replaced:
            raise UserError(f"two of the workdirs are called {run!r}; pack them into two folders")
        replaced.add(run)
    found = {}
    if (out / RECORD).exists():
        for file in packed.files_below(out):
            name = file.path.relative_to(out)
            if name.parts[0] not in replaced:
                found[name.as_posix()] = file
    return found


def below(workdir: Path) -> dict[str, File]:
    """Returns the files below a workdir by the names they get in the pack; these begin with the workdir's name.

    Raises:
      UserError: there are none.
    """
    root = workdir.resolve()
    found = {file.path.relative_to(root.parent).as_posix(): file for file in packed.files_below(root)}
    if not found:
        raise UserError(f"{workdir}: holds no {', '.join((*RESULTS, METRICS))} of a finished run")
    return found


def pack(contents: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Makes the record and the arrays of a pack from the contents of files, by name."""
    tables = {kind: Numbers() for kind in TABLES}
    arrays: Arrays = {}
    record: dict[str, Any] = {}
    for name, content in contents.items():
        kind = Path(name).name
        if kind == DOCUMENTS:
            record[name] = {}
            for key, array in content.items():
                record[name][key] = add_array(arrays, f"{name}/{key}", array)
        elif kind == METRICS:
            record[name] = tables[kind].add(content)
        elif kind in TABLES:
            record[name] = packed.with_rows(content, tables[kind].add)
        else:
            record[name] = content
    common = {}
    for kind in RESULTS:
        names = [name for name in record if Path(name).name == kind]
        common[kind] = most_common([record[name] for name in names])
        for name in names:
            record[name] = difference(common[kind], record[name])
    for kind, table in tables.items():
        for key, column in table.columns().items():
            arrays[f"{kind}/{key}"] = column
    return {"format": packed.FORMAT, "common": common, "files": record}, arrays


class Numbers:
    """Collects rows of numbers; rows that come twice are kept once."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.parts: dict[str, str] = {}

    def add(self, rows: Rows) -> str:
        """Returns the part of the table that these rows are, "FIRST:END"."""
        text = json.dumps(rows)
        if text not in self.parts:
            first = len(self.rows)
            self.rows += rows
            self.parts[text] = f"{first}:{len(self.rows)}"
        return self.parts[text]

    def columns(self) -> Arrays:
        """Returns the columns: int64 where every row has an integer, otherwise float64, NaN where a row has nothing."""
        names: dict[str, None] = {}
        for row in self.rows:
            names |= dict.fromkeys(row)
        columns = {}
        for name in names:
            values = [row.get(name) for row in self.rows]
            integers = all(type(value) is int for value in values)
            columns[name] = np.array(values, np.int64 if integers else np.float64)
        return columns


def add_array(arrays: Arrays, name: str, array: np.ndarray) -> str:
    """Adds an array under a name, unless an equal one is there; returns the name it has."""
    for known, other in arrays.items():
        if array.dtype == other.dtype and np.array_equal(array, other):
            return known
    arrays[name] = array
    return name


def most_common(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns for each key the value that most of some files have; in dicts for each of their keys."""
    keys: dict[str, None] = {}
    for content in contents:
        keys |= dict.fromkeys(content)
    common = {}
    for key in keys:
        values = [content[key] for content in contents if key in content]
        if all(packed.has_parts(key, value) for value in values):
            common[key] = most_common(values)
        else:
            counted = Counter(map(json.dumps, values))
            common[key] = json.loads(counted.most_common(1)[0][0])
    return common


def difference(common: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be changed in what is common to get the content of a file."""
    changes: dict[str, Any] = {}
    for key, value in content.items():
        there = common.get(key)
        if packed.has_parts(key, value) and packed.has_parts(key, there):
            inside = difference(there, value)
            if inside:
                changes[key] = inside
        elif key not in common or value != there:
            changes[key] = value
    for key in common:
        if key not in content:
            changes[key] = ABSENT
    return changes


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        folders=(FOLDERS, "workdirs of finished runs"),
        out=(REQUIRED, "the folder of the pack"),
    )
