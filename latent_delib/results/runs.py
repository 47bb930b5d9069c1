"""Finished runs as they lie on disk: what `train`, `evaluate` and `benchmark` wrote, found, read and checked."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_delib.errors import UserError

NUMBER, NOTHING = (int, float), type(None)  # older files leave some fields out
# Field -> its type, of every row.
ROWS = {
    "perplexity.json": {"n": int, "tokens": int, "decoder_ppl": NUMBER, "augmented_ppl": NUMBER}
    | {"change_percent": NUMBER}
    | dict.fromkeys(("change_low", "change_high"), (*NUMBER, NOTHING)),
    "benchmarks.json": {"benchmark": str, "model": str, "value": NUMBER, "metric": (str, NOTHING)}
    | dict.fromkeys(("low", "high", "shots", "documents", "every", "delay"), (*NUMBER, NOTHING)),
    "metrics.jsonl": {"step": int, "loss": NUMBER},
}
FIELDS = {"rows": list, "config": dict, "fingerprint": str, "checkpoint": (str, NOTHING), "step": (int, NOTHING)}
FIELDS |= {"sets": (dict, NOTHING), "provenance": (dict, NOTHING), "documents": (int, NOTHING)}
FIELDS |= {"interval_over": (str, NOTHING)}
NOT_LOOKED_INTO = ("checkpoints", "tensorboard")  # large, and hold no run


class Result(NamedTuple):
    """A perplexity.json or benchmarks.json: its key in the report ("P1", "B2"), where it lies, and all it says.

    data["config"]["method"] holds "name" and "num_latents"; of perplexity, data["rows"] are ordered by n.
    """

    key: str
    path: Path
    data: dict[str, Any]

    @property
    def method(self) -> dict[str, Any]:
        return self.data["config"]["method"]

    @property
    def step(self) -> int | None:
        """Returns the step of the checkpoint; older files tell it by the checkpoint's folder alone."""
        name = os.path.basename(self.data.get("checkpoint") or "")
        return int(name) if name.isdecimal() else self.data.get("step")

    @property
    def decoder(self) -> str:
        """Names the decoder that the figures are on."""
        path = self.data["config"].get("decoder", {}).get("path", "")
        return f"{path or 'unnamed'} ({self.data['fingerprint'][:12]})"


class Runs(NamedTuple):
    """All that was found, in the order of the folders given, and below each by name.

    perplexity: one a folder: its own, or, after all of these, the last of its evaluations/STEP. benchmarks: one a file.
    curves: folder -> the results of its evaluations/STEP, by step. losses: folder -> (step, loss in nats) of its
    training.
    """

    perplexity: list[Result]
    benchmarks: list[Result]
    curves: dict[Path, list[Result]]
    losses: dict[Path, list[tuple[int, float]]]


def find(folders: Sequence[str]) -> Runs:
    """Finds everything under the folders; what two of them reach counts once.

    Raises:
      UserError: a folder that is not there or holds no run; a file that is not what it should be.
    """
    found: dict[str, dict[Path, Path]] = {name: {} for name in ROWS}  # name -> real folder -> folder as it was given
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder")
        names = list(_below(Path(folder)))
        if not names:
            raise UserError(f"{folder}: holds no {', '.join(ROWS)} of a finished run")
        for path in names:
            found[path.name].setdefault(path.parent.resolve(), path.parent)

    own, curves = {}, {}
    for folder in found["perplexity.json"].values():
        result = _result(folder / "perplexity.json")
        if folder.parent.name == "evaluations" and result.step is not None:
            curves.setdefault(folder.parent.parent, []).append(result)
        else:
            own[folder] = result
    curves = {folder: sorted(results, key=lambda r: r.step) for folder, results in curves.items()}
    chosen = sorted(curves.keys() | own.keys(), key=[*own, *curves].index)
    return Runs(
        [own.get(f, curves.get(f, [None])[-1])._replace(key=f"P{i}") for i, f in enumerate(chosen, 1)],
        [_result(f / "benchmarks.json", f"B{i}") for i, f in enumerate(found["benchmarks.json"].values(), 1)],
        curves,
        {f: _losses(f / "metrics.jsonl") for f in found["metrics.jsonl"].values()},
    )


def _below(folder: Path) -> Iterator[Path]:
    for where, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in NOT_LOOKED_INTO and not name.startswith("."))
        yield from (Path(where) / name for name in ROWS if name in names)


def _result(path: Path, key: str = "") -> Result:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    _check(f"{path}:", data, FIELDS)
    _check(f"{path}: config:", data["config"], {"method": dict, "decoder": (dict, NOTHING)})
    _check(f"{path}: config.method:", data["config"]["method"], {"name": str, "num_latents": int})
    tables = {"": data}
    for source, part in (data.get("sets") or {}).items():
        _check(f"{path}: sets[{source!r}]:", part, {"rows": list, "works": (dict, NOTHING)})
        tables[f"sets[{source!r}]."] = part
        for work, found in (part.get("works") or {}).items():
            where = f"sets[{source!r}].works[{work!r}]"
            _check(f"{path}: {where}:", found, {"rows": list})
            tables[f"{where}."] = found
    for name, part in tables.items():
        for i, row in enumerate(part["rows"]):
            _check(f"{path}: {name}rows[{i}]:", row, ROWS[path.name])
    if path.name == "perplexity.json" and [row["n"] for row in data["rows"][:1]] != [1]:
        raise UserError(f"{path}: {len(data['rows'])} rows, the first not of n=1")
    return Result(key, path, data)


def _losses(path: Path) -> list[tuple[int, float]]:
    """Reads the losses; a last line without an end is of a job that is still writing it."""
    losses = []
    for i, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{i}: not JSON ({error})") from None
        _check(f"{path}:{i}:", row, ROWS["metrics.jsonl"])
        losses.append((row["step"], row["loss"]))
    return losses


def _check(where: str, data: Any, fields: dict[str, Any]) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{where} holds {type(data).__name__}, expected an object")
    for name, kind in fields.items():
        value, kinds = data.get(name), kind if isinstance(kind, tuple) else (kind,)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or isinstance(value, float) and not math.isfinite(value):
            kinds = " or ".join("nothing" if k is NOTHING else k.__name__ for k in kinds)
            raise UserError(f"{where} {name}={value!r}: expected {kinds}")
