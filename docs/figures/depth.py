"""Draws docs/figures/depth.svg, look-ups solved by latents, from the runs stored in docs/results.

  .venv/bin/python docs/figures/depth.py

Protocol depth: a frozen decoder of two layers, and look-ups that need one to three steps.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.results import packed

DOCS = Path(__file__).parents[1]
BENCHMARKS = {"follow_1": "one step", "follow_2": "two steps", "follow_3": "three steps"}
BARS = {  # (run, model) -> (label, colour)
    ("overlay@0", "decoder"): ("frozen decoder", "#bdbdbd"),
    ("decoder@0", "decoder"): ("the decoder, trained on", "#d1741f"),
    ("static_tokens@0", "augmented"): ("16 trained vectors, no coprocessor", "#7a7a7a"),
    ("overlay_4@0", "augmented"): ("4 latents", "#b5d3ea"),
    ("overlay@0", "augmented"): ("16 latents", "#5a9fd0"),
    ("overlay_32@0", "augmented"): ("32 latents", "#1b6ca8"),
}
WIDTH = 0.8 / len(BARS)


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    results = DOCS / "results" / "depth"
    files = {file.path: file for file in packed.files_below(results)}
    for number, ((run, model), (label, colour)) in enumerate(BARS.items()):
        rows = files[results / run / "benchmarks.json"].read()["rows"]
        solved = {row["benchmark"]: row for row in rows if row["model"] == model}
        left = (number - (len(BARS) - 1) / 2) * WIDTH
        draw_bars(axes, left, [solved[name] for name in BENCHMARKS], label, colour)
    axes.set_xticks(range(len(BENCHMARKS)), BENCHMARKS.values())
    axes.set(ylabel="solved (%)", ylim=(0, 105))
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=8, frameon=True)
    figure.savefig(path, metadata={"Date": None})


def draw_bars(axes: Axes, left: float, rows: list[dict], label: str, colour: str) -> None:
    """Draws the bars of one model, with their 95 % intervals."""
    value = np.array([row["value"] for row in rows])
    low = np.array([row["low"] for row in rows])
    high = np.array([row["high"] for row in rows])
    places = np.arange(len(rows)) + left
    axes.bar(places, value, WIDTH, color=colour, label=label)
    axes.errorbar(places, value, [value - low, high - value], fmt="none", ecolor="black", lw=0.8)


if __name__ == "__main__":
    draw(DOCS / "figures" / "depth.svg")
