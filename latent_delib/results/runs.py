"""Finds, reads and checks finished runs: the files of `train`, `evaluate` and `benchmark`."""

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_delib.errors import UserError
from latent_delib.job.record import Record
from latent_delib.machine import files
from latent_delib.results import packed
from latent_delib.results.packed import DOCUMENTS, METRICS, NAMES, RESULTS, Arrays, File

PERPLEXITY, BENCHMARKS = RESULTS
NUMBER = (int, float)
# Fields that every row must have.
FIELDS = {
    PERPLEXITY: {
        "n": int,
        "tokens": int,
        "decoder_ppl": NUMBER,
        "augmented_ppl": NUMBER,
        "change_percent": NUMBER,
    },
    BENCHMARKS: {"benchmark": str, "model": str, "value": NUMBER},
    METRICS: {"step": int, "loss": NUMBER},
}
# Fields that files and rows may have; older files lack some of them.
OPTIONAL = {
    **dict.fromkeys(("checkpoint", "metric", "interval_over"), str),
    **dict.fromkeys(("mean", "sets", "works", "provenance"), dict),
    **dict.fromkeys(("step", "documents"), int),
    **dict.fromkeys(("low", "high", "change", "change_low", "change_high"), NUMBER),
    **dict.fromkeys(("shots", "every", "delay", "step_seconds"), NUMBER),
}


class Result(NamedTuple):
    """Holds a perplexity.json or benchmarks.json.

    key: its name in the report, for example "P1" or "B2".
    path: the path of the file.
    data: its content. In a perplexity.json data["rows"] are ordered by n.
    read_documents: reads the documents.npz beside it; None if there is none.
    """

    key: str
    path: Path
    data: dict[str, Any]
    read_documents: Callable[[], Arrays] | None = None

    @property
    def record(self) -> Record:
        return dataclasses.replace(Record.from_result(self.data), step=self.step)

    @property
    def method(self) -> dict[str, Any]:
        return self.data["config"]["method"]

    @property
    def checkpoint(self) -> str | None:
        return self.data.get("checkpoint")

    @property
    def step(self) -> int | None:
        """Returns the checkpoint's step; for older files it is read from the folder's name."""
        if self.data.get("step") is not None:
            return self.data["step"]
        name = os.path.basename(self.checkpoint or "")
        return int(name) if name.isdecimal() else None

    @property
    def decoder(self) -> str:
        """Returns the folder and the fingerprint of the decoder that was measured."""
        path = self.record["decoder.path"] or "unnamed"
        return f"{path} ({self.data['fingerprint'][:12]})"


class Runs(NamedTuple):
    """Holds all files found. They are in the order of the given folders, then by name.

    perplexity: one per folder. Folders with a perplexity.json of their own come first, then the
      last evaluations/STEP of folders that have only such.
    benchmarks: one per file.
    curves: folder -> the results of its evaluations/STEP, by step.
    losses: folder -> (step, loss in nats) of its training.
    step_seconds: folder -> the median over the rows of its training; older files lack it.
    """

    perplexity: list[Result]
    benchmarks: list[Result]
    curves: dict[Path, list[Result]]
    losses: dict[Path, list[tuple[int, float]]]
    step_seconds: dict[Path, float]


def find(folders: Sequence[str]) -> Runs:
    """Finds everything below the folders, packed or not; a file below two of them counts once.

    Raises:
      UserError: a folder is not there or holds no run, or a file lacks a field.
    """
    found = _files(folders)
    documents = found[DOCUMENTS]
    own: dict[Path, Result] = {}
    curves: dict[Path, list[Result]] = {}
    for place, file in found[PERPLEXITY].items():
        beside = documents[place].read if place in documents else None
        result = _result(file, beside)
        folder = file.path.parent
        if folder.parent.name == "evaluations" and result.step is not None:
            curves.setdefault(folder.parent.parent, []).append(result)
        else:
            own[folder] = result
    for results in curves.values():
        results.sort(key=lambda result: result.step)
    last = {folder: results[-1] for folder, results in curves.items() if folder not in own}
    losses: dict[Path, list[tuple[int, float]]] = {}
    step_seconds: dict[Path, float] = {}
    for file in found[METRICS].values():
        rows = file.read()
        for number, row in enumerate(rows, 1):
            _check(f"{file.path}:{number}", row, FIELDS[METRICS])
        losses[file.path.parent] = [(row["step"], row["loss"]) for row in rows]
        seconds = [row["step_seconds"] for row in rows if row.get("step_seconds")]
        if seconds:
            step_seconds[file.path.parent] = statistics.median(seconds)
    return Runs(
        _numbered("P", [*own.values(), *last.values()]),
        _numbered("B", [_result(file) for file in found[BENCHMARKS].values()]),
        curves,
        losses,
        step_seconds,
    )


def _files(folders: Sequence[str]) -> dict[str, dict[Path, File]]:
    """Returns kind of file -> folder, with links resolved -> the file found there."""
    found: dict[str, dict[Path, File]] = {name: {} for name in NAMES}
    for folder in folders:
        below = list(packed.files_below(Path(folder)))
        if not below and not Path(folder).is_dir():
            why = files.NOT_A_FOLDER if Path(folder).exists() else "no such folder"
            raise UserError(f"{folder}: {why}")
        if not below:
            raise UserError(f"{folder}: holds no {', '.join(FIELDS)} of a finished run")
        for file in below:
            found[file.path.name].setdefault(file.path.parent.resolve(), file)
    return found


def _numbered(letter: str, results: Iterable[Result]) -> list[Result]:
    return [result._replace(key=f"{letter}{number}") for number, result in enumerate(results, 1)]


def _result(file: File, read_documents: Callable[[], Arrays] | None = None) -> Result:
    data = file.read()
    where = str(file.path)
    _check(where, data, {"rows": list, "config": dict, "fingerprint": str})
    _check(f"{where}: config", data["config"], {"method": dict})
    _check(f"{where}: config.method", data["config"]["method"], {"name": str, "num_latents": int})
    _check_part(where, data, FIELDS[file.path.name])
    rows = data["rows"]
    if file.path.name == PERPLEXITY and (not rows or rows[0]["n"] != 1):
        raise UserError(f"{where}: {len(rows)} rows, expected the first to be of n=1")
    return Result("", file.path, data, read_documents)


def _check_part(where: str, part: Any, fields: dict[str, Any]) -> None:
    """Checks the rows of a result, and the rows of its parts on each source and each work."""
    _check(where, part, {"rows": list})
    for number, row in enumerate(part["rows"]):
        _check(f"{where}: rows[{number}]", row, fields)
    for section in ("sets", "works"):
        for name, inside in (part.get(section) or {}).items():
            _check_part(f"{where}: {section}[{name!r}]", inside, fields)


def _check(where: str, data: Any, fields: dict[str, Any]) -> None:
    """Raises UserError unless an object has these fields, each of its type.

    Fields of OPTIONAL may be missing. A number must be finite.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: holds {type(data).__name__}, expected an object")
    for name, kind in (OPTIONAL | fields).items():
        value = data.get(name)
        if value is None and name not in fields:
            continue
        expected = "a finite number" if kind is NUMBER else kind.__name__
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kind) or isinstance(value, bool) or not is_finite:
            raise UserError(f"{where}: {name}={value!r}: expected {expected}")
