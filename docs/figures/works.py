"""Draws docs/figures/works.svg, the change in perplexity work by work, from docs/results/lab.

  .venv/bin/python docs/figures/works.py

A dot is the change of one work by one seed, over the next 32 tokens. Each colour has the works in
its own order, by the mean of its seeds. Prints how many works gain.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.results import runs
from latent_delib.results.packed import Arrays

DOCS = Path(__file__).parents[1]
KINDS = {  # validation source -> title
    "files:runs/mixture/validation/*.txt": "works of the kinds trained on",
    "files:runs/mixture/unseen/*.txt": "works of other kinds",
}
GROUPS = {  # runs of one experiment -> (label, colour)
    ("steps_x4@0", "steps_x4@1", "steps_x4@2"): ("32,000 steps", "#1b6ca8"),
    ("overlay@0", "overlay@1", "overlay@2"): ("8,000 steps", "#7fb3d9"),
    ("overlay@0/swap", "overlay@1/swap", "overlay@2/swap"): (
        "8,000 steps, latents of another document",
        "#d1741f",
    ),
}


def changes(documents: Arrays, source: str) -> dict[str, float]:
    """Returns work -> the change in perplexity over all n, in percent."""
    of_source = documents["source"] == list(documents["sources"]).index(source)
    found = {}
    for work in np.unique(documents["work"][of_source]):
        rows = of_source & (documents["work"] == work)
        gained = documents["decoder"][rows].sum() - documents["augmented"][rows].sum()
        nats = gained / documents["tokens"][rows].sum()
        found[str(documents["works"][work])] = 100 * np.expm1(-nats)
    return found


def draw(path: Path) -> None:
    """Draws the figure into an SVG."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "latent_delib"  # the same runs give the same bytes
    results = DOCS / "results" / "lab"
    folders = {}
    for result in runs.find([str(results)]).perplexity:
        folders[str(result.path.parent.relative_to(results))] = result
    figure, grid = pyplot.subplots(
        1, len(KINDS), figsize=(10.0, 3.4), sharey=True, layout="constrained", width_ratios=(3, 1)
    )
    for axes, (source, title) in zip(grid, KINDS.items(), strict=True):
        for names, (label, colour) in GROUPS.items():
            by_seed = [changes(folders[name].read_documents(), source) for name in names]
            draw_dots(axes, by_seed, label, colour)
            gaining = [sum(change < 0 for change in seed.values()) for seed in by_seed]
            print(f"{title}, {label}: of {len(by_seed[0])} works gain", *gaining)
        axes.axhline(0, color="black", linewidth=0.9)
        axes.set(xlabel=title, xticks=[])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("change in perplexity (%)")
    grid[0].legend(loc="upper left", fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_dots(axes: Axes, by_seed: list[dict[str, float]], label: str, colour: str) -> None:
    """Draws a dot for each work and seed, works in the order of their mean."""
    change = np.array([list(seed.values()) for seed in by_seed])
    change = change[:, np.argsort(change.mean(axis=0))]
    x = np.broadcast_to(np.arange(change.shape[1]), change.shape)
    axes.plot(x.ravel(), change.ravel(), "o", color=colour, ms=2.5, alpha=0.7, label=label)


if __name__ == "__main__":
    draw(DOCS / "figures" / "works.svg")
