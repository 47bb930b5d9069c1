"""Reads the files of finished runs: as they were written, or packed into two, as docs/results keeps them.

  runs.json  what the files say, without their rows of numbers: "common", what most results say, and "files", of each
             file what differs from that
  runs.npz   the rows of numbers, as columns, and the arrays of documents.npz

A pack in a folder stands for the files it was made of, and readers see their paths: the pack in docs/results/a holds
docs/results/a/after@0/swap/perplexity.json. `tools/pack_results.py` makes packs.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.errors import UserError

FORMAT = 1
RECORD, NUMBERS = "runs.json", "runs.npz"
RESULTS = ("perplexity.json", "benchmarks.json")
METRICS = "metrics.jsonl"
DOCUMENTS = "documents.npz"
TABLES = ("perplexity.json", METRICS)  # kinds of files whose rows are numbers
NOT_LOOKED_INTO = ("checkpoints", "tensorboard")  # large, and hold no run
ABSENT = "(absent)"  # in "files": a key of "common" that this file does not have

Rows = list[dict[str, Any]]
Arrays = dict[str, np.ndarray]


class File(NamedTuple):
    """A file of a finished run.

    path: where it is, or was before it was packed. read: returns a dict for .json, Rows for .jsonl, Arrays for .npz.
    """

    path: Path
    read: Callable[[], Any]


def files_below(folder: Path) -> Iterator[File]:
    """Finds the files of runs below a folder, packed or not, by name; the folder may be inside a pack."""
    if not folder.is_dir():
        for above in folder.parents:
            if (above / RECORD).exists():
                yield from (file for file in _open_pack(above) if folder in file.path.parents)
                break
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
    for file in files_below(path.parent):
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


def _open_pack(folder: Path) -> Iterator[File]:
    """Finds the files in the pack of a folder, in the order in which a walk would find them.

    Raises:
      UserError: it is of a newer version, or runs.npz is missing.
    """
    record = _read_file(folder / RECORD)
    found = record.get("format")
    if found != FORMAT:
        raise UserError(f"{folder / RECORD}: format={found!r}, expected {FORMAT}; use a newer latent_delib")
    if not (folder / NUMBERS).exists():
        raise UserError(f"{folder / NUMBERS}: no such file, and {RECORD} needs it; get both")
    arrays = np.load(io.BytesIO((folder / NUMBERS).read_bytes()), allow_pickle=False)
    tables = {kind: _rows(arrays, kind) for kind in TABLES}
    for name in sorted(record["files"], key=lambda name: Path(name).parent.parts):
        yield File(folder / name, partial(_unpack, record, tables, arrays, name))


def _rows(arrays: Mapping[str, np.ndarray], kind: str) -> Rows:
    """Returns the rows of all files of a kind."""
    columns = {}
    for name, values in arrays.items():
        if name.startswith(f"{kind}/"):
            known = [None if value != value else value for value in values.tolist()]  # NaN is unlike itself
            columns[name.removeprefix(f"{kind}/")] = known
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _unpack(record: dict[str, Any], tables: dict[str, Rows], arrays: Mapping[str, np.ndarray], name: str) -> Any:
    """Returns the content of a packed file."""
    packed = record["files"][name]
    kind = Path(name).name
    if kind == DOCUMENTS:
        return {key: arrays[stored] for key, stored in packed.items()}
    if kind == METRICS:
        return _part(tables[kind], packed)
    content = _patched(record["common"][kind], packed)
    if kind in TABLES:
        content = with_rows(content, partial(_part, tables[kind]))
    return content


def _part(rows: Rows, part: str) -> Rows:
    """Returns the part "FIRST:END" of rows."""
    first, end = part.split(":")
    return rows[int(first) : int(end)]


def with_rows(content: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a result with every "rows" in it changed, in the parts by source and by work too."""
    changed = {}
    for key, value in content.items():
        if key == "rows":
            value = change(value)
        elif isinstance(value, dict):
            value = with_rows(value, change)
        changed[key] = value
    return changed


def _patched(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a file: what is common, with its changes."""
    content = dict(common)
    for key, value in changes.items():
        if value == ABSENT:
            del content[key]
        elif has_parts(key, value) and has_parts(key, common.get(key)):
            content[key] = _patched(common[key], value)
        else:
            content[key] = value
    return content


def has_parts(key: str, value: Any) -> bool:
    """Tells whether a value is packed key by key. `sets` is kept whole: the order in it is that of the sources."""
    return isinstance(value, dict) and key != "sets"
