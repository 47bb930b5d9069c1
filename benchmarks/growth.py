"""Measures how the cost of a training step grows with T, M, N_L and layers, each alone, on a CPU.

  ./launch/setup.sh report             # matplotlib draws the plot
  .venv/bin/python -m benchmarks.growth [--json=runs/growth.json] [--svg=runs/growth.svg]

The second value of every axis (`--seq_len`, `--traces`, `--latents`, `--layers`) makes the base
point; all other points differ from it in one value. A step is the whole one of a coprocessor,
attention form `xla`, and the points take turns. Memory is what the compiler says that the step
needs: arguments, temporaries and outputs. FLOPs are the useful ones (`latent_delib.delib.cost`).
Growth is the exponent k of a cost that grows as x ** k, so 1 is linear. The second table has that
of the last two values.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common, step
from latent_delib.delib import cost
from latent_delib.machine.columns import markdown
from latent_delib.results import figures

PRESET = dict(
    size="small",
    dtype="float32",
    remat="dots",
    batch=1,
    ahead=8,
    seq_len=[128, 256, 512, 1024, 2048],
    traces=[8, 16, 32, 64, 128],
    latents=[4, 8, 16, 32, 64],
    layers=[1, 2, 4, 8, 16],
    svg="runs/growth.svg",
)
AXES = {"seq_len": "T", "traces": "M", "latents": "N_L", "layers": "layers"}
LINES = {  # key of a row -> (label, style)
    "ms": ("time", dict(color="#d1741f", marker="o")),
    "needs_gib": ("memory", dict(color="#1b6ca8", marker="s")),
    "gflop": ("useful FLOPs", dict(color="black", linestyle="--", linewidth=1)),
}

Row = Mapping[str, Any]


class Point(NamedTuple):
    """Holds a value of every axis."""

    seq_len: int
    traces: int
    latents: int
    layers: int


def base_of(a: argparse.Namespace) -> Point:
    """Returns the base point; ends the command if an axis has no second value, or does not rise."""
    for axis in AXES:
        values = getattr(a, axis)
        if len(values) < 2 or values != sorted(set(values)) or values[0] < 1:
            words = " ".join(map(str, values))
            sys.exit(f"--{axis} {words}: expected two or more rising numbers from 1 on")
    return Point(*(getattr(a, axis)[1] for axis in AXES))


def make(
    a: argparse.Namespace, point: Point, jobs: dict[tuple[int, int], step.Job]
) -> tuple[common.Run, dict[str, float]]:
    """Returns the step at a point, ready to be measured, with its memory and its FLOPs.

    jobs: by layers and latents, which alone decide the shapes of a job's state; one is added where
      it is missing.
    """
    config = dataclasses.replace(a.config, num_layers=point.layers)
    here = argparse.Namespace(**vars(a) | point._asdict() | {"config": config})
    shape = point.layers, point.latents
    if shape not in jobs:
        jobs[shape] = step.Job(here, point.latents)
    job = jobs[shape]
    job.a = here
    batch = dict(zip(("tokens", "segment"), common.text(here, a.batch)))
    compiled = job.compile("xla", a.remat, batch)
    aug = common.augmentation(config, point.latents, "xla", a.remat)
    useful = cost.step_flops(aug, a.batch, point.seq_len, point.traces, a.ahead).useful
    known = common.memory(compiled) | {"gflop": useful / 1e9}
    return common.calls(partial(job.advance, compiled, batch)), known


def growth(rows: Sequence[Row], key: str) -> float:
    """Returns the exponent with which a figure grows between the last two points of an axis."""
    before, last = rows[-2:]
    return math.log(last[key] / before[key]) / math.log(last["value"] / before["value"])


def table(by_axis: Mapping[str, Sequence[Row]]) -> str:
    """Returns the table of docs/performance.md."""
    head = "axis | ms per step | MiB | GFLOP | growth of time | of memory | of FLOPs"
    lines: list[list[str]] = []
    for axis, rows in by_axis.items():
        ends = rows[0], rows[-1]
        cells = [
            f"{axis}, {' to '.join(str(row['value']) for row in ends)}",
            " to ".join("{ms:.0f} ({ms_min:.0f}-{ms_max:.0f})".format(**row) for row in ends),
            " to ".join(f"{1024 * row['needs_gib']:.0f}" for row in ends),
            " to ".join(f"{row['gflop']:.1f}" for row in ends),
            *(f"{growth(rows, key):.2f}" for key in LINES),
        ]
        lines.append(cells)
    return markdown(head.split(" | "), lines)


def draw(by_axis: Mapping[str, Sequence[Row]], base: Row, path: Path) -> None:
    """Draws a panel per axis, in multiples of the base point, into an SVG."""
    plt = figures.pyplot()
    plt.rcParams["svg.hashsalt"] = "latent_delib"  # the same rows give the same bytes
    size = (12.5, 3.2)
    figure, panels = plt.subplots(1, len(by_axis), figsize=size, sharey=True, layout="constrained")
    for axes, (axis, rows) in zip(panels, by_axis.items()):
        x = [row["value"] for row in rows]
        for key, (label, style) in LINES.items():
            axes.plot(x, [row[key] / base[key] for row in rows], label=label, ms=4, **style)
        low, high = ([row[key] / base["ms"] for row in rows] for key in ("ms_min", "ms_max"))
        axes.vlines(x, low, high, color=LINES["ms"][1]["color"])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(x, x)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("multiple of the base point")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    figures.pyplot()  # refuses before any work where matplotlib is not installed
    a = common.arguments(__doc__, argv, (), PRESET, PRESET)
    a.json = a.json or Path("runs/growth.json")
    base = base_of(a)
    points = [(axis, base._replace(**{axis: value})) for axis in AXES for value in getattr(a, axis)]
    jobs: dict[tuple[int, int], step.Job] = {}
    runs, known = {}, {}
    for _, point in points:
        if point not in runs:
            print(f"compiles {point}", flush=True)
            runs[point], known[point] = make(a, point, jobs)
    print(f"times {len(runs)} steps in turns, {a.rounds} times", flush=True)
    for point, seconds in common.measure(runs, a.rounds, a.least).items():
        known[point] |= common.spread(seconds)
    rows = []
    by_axis: dict[str, list[Row]] = {}
    for axis, point in points:
        rows.append({"axis": AXES[axis], "value": getattr(point, axis), **known[point]})
        by_axis.setdefault(AXES[axis], []).append(rows[-1])
    result = common.report("growth", a, rows, base=base._asdict())
    print(table(by_axis))
    draw(by_axis, known[base], Path(a.svg))
    return result


if __name__ == "__main__":
    main()
