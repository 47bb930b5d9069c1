"""Draws docs/figures/results.svg, the plot on the front page, from the runs stored in docs/results.

  .venv/bin/python docs/figures/results.py

It shows the change in perplexity of the n-th token ahead on works that no model has read, for our
runs and for the paper. Ours are protocol lab: 16 latents, placement overlay, the packaged decoder
of 0.16 M parameters.
"""

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.results import published, runs
from latent_delib.results.tables import AHEAD

DOCS = Path(__file__).parents[1]
KIND = "files:runs/mixture/validation/*.txt"  # other works of the kinds trained on
LATENTS = 16
LINES = {  # evaluation -> (label, colour)
    "overlay@0": ("16 latents, 8,000 steps", "#7fb3d9"),
    "steps_x4@0": ("16 latents, 32,000 steps", "#1b6ca8"),
    "steps_x4@0/swap": ("control: latents of another document", "#d1741f"),
    "static_tokens@0": ("control: 16 trained vectors, no coprocessor", "#7a7a7a"),
}


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    results = DOCS / "results" / "lab"
    found = runs.find([str(results)]).perplexity
    by_folder = {str(result.path.parent.relative_to(results)): result for result in found}
    for folder, (label, colour) in LINES.items():
        rows = by_folder[folder].data["sets"][KIND]["rows"]
        draw_ours(axes, rows, label, colour)
    draw_published(axes)
    decorate(axes)
    figure.savefig(path, metadata={"Date": None})


def draw_ours(axes: Axes, rows: list[dict], label: str, colour: str) -> None:
    """Draws the change, with its 95 % interval, at the n of the paper's Table 1."""
    rows = [row for row in rows if row["n"] in AHEAD]
    n = [row["n"] for row in rows]
    change = [row["change_percent"] for row in rows]
    low = [row["change_low"] for row in rows]
    high = [row["change_high"] for row in rows]
    axes.plot(n, change, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axes.fill_between(n, low, high, color=colour, alpha=0.12, linewidth=0)


def draw_published(axes: Axes) -> None:
    """Draws the paper's line for the same number of latents."""
    by_n = published.PERPLEXITY_CHANGE[LATENTS]
    label = f"published: {published.DECODER}, {LATENTS} latents"
    axes.plot(by_n.keys(), by_n.values(), "s--", color="black", markersize=4, label=label)


def decorate(axes: Axes) -> None:
    axes.axhline(0, color="black", linewidth=0.9)
    axes.annotate(
        "frozen\ndecoder",
        (32, 0),
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
    axes.set(xlabel="n-th token ahead", ylabel="change in perplexity (%)", xscale="log")
    axes.set_xticks(AHEAD, AHEAD)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize=8, frameon=False)


if __name__ == "__main__":
    draw(DOCS / "figures" / "results.svg")
