"""Draws docs/figures/growth.svg, what the gain grows with, from the runs in docs/results.

  .venv/bin/python docs/figures/growth.py

Each panel changes one thing. Lines with 95 % intervals are of seed 0; small rings are other seeds.
Protocols lab_23k, lab_58k and lab have equal proportions: 1,000 tokens per parameter for the
decoder, 100 predicted tokens per parameter for the coprocessor.
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
    """Holds a label for the x axis, and for each value on it an experiment in docs/results."""

    label: str
    experiment_of: dict[int, str]


def count(size: str) -> int:
    """Returns the number of a decoder's parameters."""
    return sum(leaf.size for leaf in folder.by_name(folder.shapes(SIZES[size])).values())


PANELS = (
    Panel(
        "parameters of the decoder",
        {
            count("gemma2_23k"): "lab_23k/overlay",
            count("gemma2_58k"): "lab_58k/overlay",
            count("gemma2_160k"): "lab/overlay",
        },
    ),
    Panel(
        "training steps",
        {
            1000: "lab/steps_8th",
            2000: "lab/steps_4th",
            4000: "lab/steps_half",
            8000: "lab/overlay",
            16000: "lab/steps_x2",
            32000: "lab/steps_x4",
        },
    ),
    Panel(
        "latents",
        {
            4: "lab/overlay_4",
            8: "lab/overlay_8",
            16: "lab/overlay",
            32: "lab/overlay_32",
            64: "lab/overlay_64",
        },
    ),
    Panel(
        "layers of the coprocessor",  # from a random start
        {1: "lab/half", 2: "lab/from_scratch", 4: "lab/double"},
    ),
)


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, grid = pyplot.subplots(
        1, len(PANELS), figsize=(12.5, 3.2), sharey=True, layout="constrained"
    )
    for axes, panel in zip(grid, PANELS, strict=True):
        draw_panel(axes, panel)
    grid[0].set_ylabel("change in perplexity (%)")
    grid[0].legend(loc="lower left", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draws a line with 95 % intervals for each n, and rings."""
    x = list(panel.experiment_of)
    seeds = [rows_of(experiment) for experiment in panel.experiment_of.values()]
    for n, colour in COLOURS.items():
        draw_line(axes, x, [first[n] for first, *_ in seeds], n, colour)
        for each, (_, *others) in zip(x, seeds, strict=True):
            change = [rows[n]["change_percent"] for rows in others]
            axes.plot([each] * len(change), change, "o", color=colour, mfc="white", ms=3.5)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set(xlabel=panel.label, xscale="log")
    axes.set_xticks(x, [f"{each:,}" for each in x])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def rows_of(experiment: str) -> list[dict[int, dict]]:
    """Returns the rows of each seed of PROTOCOL/NAME by n, those of seed 0 first."""
    protocol, name = experiment.split("/")
    results = DOCS / "results" / protocol
    found = {}
    for result in runs.find([str(results)]).perplexity:
        folder = result.path.parent
        if folder.parent == results and folder.name.partition("@")[0] == name:
            found[folder.name] = {row["n"]: row for row in result.data["sets"][KIND]["rows"]}
    return [found[each] for each in sorted(found)]


def draw_line(axes: Axes, x: list[int], rows: list[dict], n: int, colour: str) -> None:
    """Draws the change at one n with its 95 % intervals."""
    change = np.array([row["change_percent"] for row in rows])
    low = np.array([row["change_low"] for row in rows])
    high = np.array([row["change_high"] for row in rows])
    error = [change - low, high - change]
    axes.errorbar(x, change, error, fmt="o-", color=colour, capsize=3, label=f"n = {n}")


if __name__ == "__main__":
    draw(DOCS / "figures" / "growth.svg")
