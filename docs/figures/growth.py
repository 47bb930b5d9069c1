"""Draws docs/figures/growth.svg, the gain by the decoder's size, from the runs in docs/results.

  .venv/bin/python docs/figures/growth.py

Protocols lab_23k, lab_58k and lab have equal proportions: 1,000 tokens per parameter for the
decoder, 100 predicted tokens per parameter for the coprocessor.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.nn.sizes import SIZES
from latent_delib.results import runs
from latent_delib.weights import folder

DOCS = Path(__file__).parents[1]
KIND = "files:runs/mixture/validation/*.txt"  # other works of the kinds trained on
SIZE_OF = {"lab_23k": "gemma2_23k", "lab_58k": "gemma2_58k", "lab": "gemma2_160k"}
COLOURS = {1: "#7fb3d9", 4: "#1b6ca8", 16: "#d1741f"}  # of the n-th token ahead


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    figure, axes = pyplot.subplots(figsize=(6.0, 3.2), layout="constrained")
    parameters = [count(size) for size in SIZE_OF.values()]
    rows = [rows_of(protocol) for protocol in SIZE_OF]
    for n, colour in COLOURS.items():
        draw_line(axes, parameters, [row[n] for row in rows], n, colour)
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set(xlabel="parameters of the decoder", ylabel="change in perplexity (%)", xscale="log")
    axes.set_xticks(parameters, [f"{each:,}" for each in parameters])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def count(size: str) -> int:
    """Returns the number of a decoder's parameters."""
    return sum(leaf.size for leaf in folder.by_name(folder.shapes(SIZES[size])).values())


def rows_of(protocol: str) -> dict[int, dict]:
    """Returns the rows of a protocol's `overlay`, seed 0, by n."""
    results = DOCS / "results" / protocol
    for result in runs.find([str(results)]).perplexity:
        if result.path.parent == results / "overlay@0":
            return {row["n"]: row for row in result.data["sets"][KIND]["rows"]}
    raise FileNotFoundError(f"{results}: holds no overlay@0")


def draw_line(axes: Axes, parameters: list[int], rows: list[dict], n: int, colour: str) -> None:
    """Draws the change at one n with its 95 % intervals."""
    change = np.array([row["change_percent"] for row in rows])
    low = np.array([row["change_low"] for row in rows])
    high = np.array([row["change_high"] for row in rows])
    error = [change - low, high - change]
    axes.errorbar(parameters, change, error, fmt="o-", color=colour, capsize=3, label=f"n = {n}")


if __name__ == "__main__":
    draw(DOCS / "figures" / "growth.svg")
