"""Finished runs in two files instead of many: how docs/results keeps them.

  runs.json  what the files of the runs say, without their rows of numbers; first what most of them say, then of each
             file only what differs
  runs.npz   the rows of numbers, as columns, and the arrays of documents.npz

A pack in a folder stands for the files it was made of, and readers see their paths: the pack in docs/results/a holds
docs/results/a/after@0/swap/perplexity.json. Every number is kept to the last bit; what is equal is kept once.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.errors import UserError
from latent_delib.machine import files

FORMAT = 1
RECORD, NUMBERS = "runs.json", "runs.npz"
RESULTS = ("perplexity.json", "benchmarks.json")
METRICS = "metrics.jsonl"
DOCUMENTS = "documents.npz"
NOT_LOOKED_INTO = ("checkpoints", "tensorboard")  # large, and hold no run
ABSENT = "(absent)"  # a key that most files have and this one has not

Rows = list[dict[str, Any]]
Arrays = dict[str, np.ndarray]


class File(NamedTuple):
    """A file of a finished run.

    path: where it is, or was before it was packed. read: returns a dict for .json, Rows for .jsonl, Arrays for .npz.
    """

    path: Path
    read: Callable[[], Any]


def files_below(folder: Path) -> Iterator[File]:
    """Finds the files of runs below a folder, packed or not, by name; the folder may itself be inside a pack."""
    if not folder.is_dir():
        yield from (file for file in _pack_above(folder) if folder in file.path.parents)
    for where, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in NOT_LOOKED_INTO and not name.startswith("."))
        for name in (*RESULTS, METRICS, DOCUMENTS):
            if name in names:
                path = Path(where) / name
                yield File(path, partial(_read_file, path))
        if RECORD in names:
            yield from _open_pack(Path(where))


def find_file(path: Path) -> File | None:
    """Returns a file of a run, packed or not; None if there is none."""
    if path.exists():
        return File(path, partial(_read_file, path))
    for file in _pack_above(path):
        if file.path == path:
            return file
    return None


def _read_file(path: Path) -> Any:
    if path.suffix == ".npz":
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    if path.suffix == ".jsonl":
        return _read_lines(path)
    return _parse(path.read_bytes(), str(path))


def _read_lines(path: Path) -> Rows:
    """Reads a JSON object per line; a last line without an end is still being written, and left out."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def _pack_above(path: Path) -> Iterator[File]:
    """Returns the files of the nearest pack in the folders above a path; none if there is no pack."""
    for folder in path.parents:
        if (folder / RECORD).exists():
            return _open_pack(folder)
    return iter(())


def _open_pack(folder: Path) -> Iterator[File]:
    """Finds the files in the pack of a folder, in the order in which they were found before.

    Raises:
      UserError: it is of a newer version, or runs.npz is missing.
    """
    record = _read_file(folder / RECORD)
    if record.get("format", 0) > FORMAT:
        raise UserError(
            f"{folder / RECORD}: format {record['format']}, expected at most {FORMAT}; use a newer latent_delib"
        )
    if not (folder / NUMBERS).exists():
        raise UserError(f"{folder / NUMBERS}: no such file; it belongs to {RECORD} beside it")
    arrays = np.load(io.BytesIO((folder / NUMBERS).read_bytes()), allow_pickle=False)
    tables = {name: _rows_of(arrays, name) for name in (RESULTS[0], METRICS)}
    for name in sorted(record["files"], key=lambda name: Path(name).parent.parts):
        yield File(folder / name, partial(_unpack, record, tables, arrays, name))


def _unpack(record: dict[str, Any], tables: dict[str, Rows], arrays: Mapping[str, np.ndarray], name: str) -> Any:
    """Returns the content of a packed file."""
    packed, kind = record["files"][name], Path(name).name
    if kind == DOCUMENTS:
        return {key: arrays[stored] for key, stored in packed.items()}
    if kind == METRICS:
        return _take(tables[kind], packed)
    content = _patched(record["common"][kind], packed)
    return _with_rows(content, lambda rows: _take(tables[kind], rows) if isinstance(rows, str) else rows)


def _take(rows: Rows, part: str) -> Rows:
    first, end = part.split(":")
    return rows[int(first) : int(end)]


def write_pack(workdirs: Sequence[str], out: Path) -> int:
    """Packs finished runs into a folder, beside the runs that its pack already holds; returns how many files it holds.

    A run has the name of its workdir there, and replaces a run of that name.

    Raises:
      UserError: a workdir is not there or holds no finished run, or two have the same name.
    """
    names = [Path(workdir).resolve().name for workdir in workdirs]
    found: dict[str, File] = {}
    for file in files_below(out) if (out / RECORD).exists() else ():
        name = file.path.relative_to(out)
        if name.parts[0] not in names:
            found[name.as_posix()] = file
    for name, workdir in zip(names, workdirs):
        if names.count(name) > 1:
            raise UserError(f"{workdir}: another of the runs is called {name!r} too; pack them into two folders")
        below = list(files_below(Path(workdir)))
        if not below:
            raise UserError(f"{workdir}: holds no {', '.join((*RESULTS, METRICS))} of a finished run")
        for file in below:
            found[(name / file.path.relative_to(workdir)).as_posix()] = file
    contents = {name: file.read() for name, file in found.items()}
    record, arrays = _pack(contents)
    numbers = io.BytesIO()
    np.savez_compressed(numbers, **arrays)
    files.write(out / NUMBERS, numbers.getvalue())
    files.write(out / RECORD, f"{json.dumps(record, indent=1)}\n".encode())
    return len(contents)


def _pack(contents: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Makes the record and the arrays of a pack from the contents of files, by name."""
    tables = {name: _Table() for name in (RESULTS[0], METRICS)}
    arrays: Arrays = {}
    packed: dict[str, Any] = {}
    for name, content in contents.items():
        kind = Path(name).name
        if kind == DOCUMENTS:
            packed[name] = {key: _add_array(arrays, f"{name}/{key}", array) for key, array in content.items()}
        elif kind == METRICS:
            packed[name] = tables[kind].add(content)
        elif kind == RESULTS[0]:
            packed[name] = _with_rows(content, tables[kind].add)
        else:
            packed[name] = content
    common = {}
    for kind in RESULTS:
        names = [name for name in packed if Path(name).name == kind]
        common[kind] = _common([packed[name] for name in names])
        packed |= {name: _difference(common[kind], packed[name]) for name in names}
    for kind, table in tables.items():
        arrays |= {f"{kind}/{key}": column for key, column in table.columns().items()}
    return {"format": FORMAT, "common": common, "files": packed}, arrays


class _Table:
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
        names = dict.fromkeys(key for row in self.rows for key in row)
        columns = {}
        for name in names:
            values = [row.get(name) for row in self.rows]
            integers = all(type(value) is int for value in values)
            columns[name] = np.array(values, np.int64 if integers else np.float64)
        return columns


def _rows_of(arrays: Mapping[str, np.ndarray], table: str) -> Rows:
    """Returns all rows of a table of a pack."""
    names = [name for name in arrays if name.startswith(f"{table}/")]
    keys = [name.partition("/")[2] for name in names]
    columns = [arrays[name].tolist() for name in names]
    rows = []
    for values in zip(*columns):
        known = [None if value != value else value for value in values]  # NaN is unlike itself
        rows.append(dict(zip(keys, known)))
    return rows


def _add_array(arrays: Arrays, name: str, array: np.ndarray) -> str:
    """Adds an array under a name, unless an equal one is there; returns the name it has."""
    for known, other in arrays.items():
        if array.dtype == other.dtype and np.array_equal(array, other):
            return known
    arrays[name] = array
    return name


def _with_rows(content: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a result with every "rows" in it changed, in the parts by source and by work too."""
    changed = {}
    for key, value in content.items():
        if key == "rows":
            value = change(value)
        elif isinstance(value, dict):
            value = _with_rows(value, change)
        changed[key] = value
    return changed


def _common(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns for each key the value that most of some files have; in dicts for each of their keys."""
    common = {}
    for key in dict.fromkeys(key for content in contents for key in content):
        values = [content[key] for content in contents if key in content]
        if all(_has_parts(key, value) for value in values):
            common[key] = _common(values)
        else:
            (most, _), *_ = Counter(json.dumps(value) for value in values).most_common(1)
            common[key] = json.loads(most)
    return common


def _has_parts(key: str, value: Any) -> bool:
    """Tells whether a value is kept key by key; the order of `sets` is that of the sources, so they are kept whole."""
    return isinstance(value, dict) and key != "sets"


def _difference(common: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be changed in what is common to get the content of a file."""
    changes: dict[str, Any] = {}
    for key, value in content.items():
        if _has_parts(key, value) and _has_parts(key, common.get(key)):
            inside = _difference(common[key], value)
            if inside:
                changes[key] = inside
        elif key not in common or value != common[key]:
            changes[key] = value
    for key in common:
        if key not in content:
            changes[key] = ABSENT
    return changes


def _patched(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a file: what is common, with its changes."""
    content = dict(common)
    for key, value in changes.items():
        if value == ABSENT:
            del content[key]
        elif _has_parts(key, value) and _has_parts(key, common.get(key)):
            content[key] = _patched(common[key], value)
        else:
            content[key] = value
    return content
