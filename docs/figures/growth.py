"""Draws docs/figures/growth.svg, what the gain grows with, from the runs in docs/results.

  .venv/bin/python docs/figures/growth.py

Each panel changes one thing. Protocols lab_23k, lab_58k and lab have equal proportions: 1,000
tokens per parameter for the decoder, 100 predicted tokens per parameter for the coprocessor.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.nn.sizes import SIZES
from latent_delib.results import runs
from latent_delib.weights import folder

DOCS = Path(__file__).parents[1]
KIND = "files:runs/mixture/validation/*.txt"  # other works of the kinds trained on
COLOURS = {1: "#7fb3d9", 4: "#1b6ca8", 16: "#d1741f"}  # of the n-th token ahead


class Panel(NamedTuple):
    """Holds a label for the x axis, and for each value on it a run in docs/results."""

    label: str
    run_of: dict[int, str]


def count(size: str) -> int:
    """Returns the number of a decoder's parameters."""
    return sum(leaf.size for leaf in folder.by_name(folder.shapes(SIZES[size])).values())


PANELS = (
    Panel(
        "parameters of the decoder",
        {
            count("gemma2_23k"): "lab_23k/overlay@0",
            count("gemma2_58k"): "lab_58k/overlay@0",
            count("gemma2_160k"): "lab/overlay@0",
        },
    ),
    Panel(
        "training steps",
        {
            1000: "lab/steps_8th@0",
            2000: "lab/steps_4th@0",
            4000: "lab/steps_half@0",
            8000: "lab/overlay@0",
            32000: "lab/steps_x4@0",
        },
    ),
    Panel(
        "latents",
        {
            4: "lab/overlay_4@0",
            8: "lab/overlay_8@0",
            16: "lab/overlay@0",
            32: "lab/overlay_32@0",
            64: "lab/overlay_64@0",
        },
    ),
)


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, grid = pyplot.subplots(
        1, len(PANELS), figsize=(10.0, 3.2), sharey=True, layout="constrained"
    )
    for axes, panel in zip(grid, PANELS, strict=True):
        draw_panel(axes, panel)
    grid[0].set_ylabel("change in perplexity (%)")
    grid[0].legend(loc="lower left", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draws a line with 95 % intervals for each n."""
    x = list(panel.run_of)
    rows = [rows_of(run) for run in panel.run_of.values()]
    for n, colour in COLOURS.items():
        draw_line(axes, x, [row[n] for row in rows], n, colour)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set(xlabel=panel.label, xscale="log")
    axes.set_xticks(x, [f"{each:,}" for each in x])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def rows_of(run: str) -> dict[int, dict]:
    """Returns the rows of a run, PROTOCOL/NAME@SEED, by n."""
    protocol, name = run.split("/")
    results = DOCS / "results" / protocol
    for result in runs.find([str(results)]).perplexity:
        if result.path.parent == results / name:
            return {row["n"]: row for row in result.data["sets"][KIND]["rows"]}
    raise FileNotFoundError(f"{results}: holds no {name}")


def draw_line(axes: Axes, x: list[int], rows: list[dict], n: int, colour: str) -> None:
    """Draws the change at one n with its 95 % intervals."""
    change = np.array([row["change_percent"] for row in rows])
    low = np.array([row["change_low"] for row in rows])
    high = np.array([row["change_high"] for row in rows])
    error = [change - low, high - change]
    axes.errorbar(x, change, error, fmt="o-", color=colour, capsize=3, label=f"n = {n}")


if __name__ == "__main__":
    draw(DOCS / "figures" / "growth.svg")
