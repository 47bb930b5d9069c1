"""Draws docs/figures/growth.svg: what the gain grows with, from the runs stored in docs/results.

  .venv/bin/python docs/figures/growth.py

Three plots, of training steps, latents and the decoder's size: the change in perplexity of the
first, fourth and sixteenth token ahead, on works of the kinds trained on. All else in a plot is
equal; with the decoder, steps grow in proportion.
"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.results import runs

DOCS = Path(__file__).parents[1]
KIND = "files:runs/mixture/validation/*.txt"
COLOURS = {1: "#d1741f", 4: "#1b6ca8", 16: "#7a7a7a"}  # n -> colour
PLOTS = {  # label of an axis -> its values and their runs
    "training steps": {
        1000: "lab/steps_8th@0",
        2000: "lab/steps_4th@0",
        4000: "lab/steps_half@0",
        8000: "lab/overlay@0",
        32_000: "lab/steps_x4@0",
    },
    "latents": {
        4: "lab/overlay_4@0",
        8: "lab/overlay_8@0",
        16: "lab/overlay@0",
        32: "lab/overlay_32@0",
    },
    "parameters of the decoder": {
        22_944: "lab_23k/overlay@0",
        58_320: "lab_58k/overlay@0",
        164_416: "lab/overlay@0",
    },
}


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, plots = pyplot.subplots(1, 3, figsize=(9.6, 3.2), sharey=True, layout="constrained")
    results = DOCS / "results"
    found = runs.find([str(results)]).perplexity
    by_folder = {str(result.path.parent.relative_to(results)): result for result in found}
    for axes, (label, points) in zip(plots, PLOTS.items()):
        rows = {}
        for value, folder in points.items():
            rows[value] = by_folder[folder].data["sets"][KIND]["rows"]
        draw_plot(axes, label, rows)
    plots[0].set_ylabel("change in perplexity (%)")
    plots[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_plot(axes: Axes, label: str, rows: dict[int, list[dict]]) -> None:
    """Draws the change at the n of COLOURS, with its 95 % interval, by a value."""
    for n, colour in COLOURS.items():
        change, low, high = [], [], []
        for some in rows.values():
            row = some[n - 1]
            change.append(row["change_percent"])
            low.append(row["change_low"])
            high.append(row["change_high"])
        axes.plot(rows.keys(), change, color=colour, marker="o", markersize=4, label=f"n = {n}")
        axes.fill_between(rows.keys(), low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set(xlabel=label, xscale="log")
    axes.set_xticks(list(rows), [f"{value:,}" for value in rows], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(DOCS / "figures" / "growth.svg")
