"""Draws growth.svg, results.svg and works.svg from the runs stored in docs/results.

  .venv/bin/python docs/figures/plots.py

They show the change in perplexity against the frozen decoder. Prints how many works gain.

growth.svg: what the gain grows with. Each panel changes one thing. Lines with 95 % intervals are of
seed 0; small rings are other seeds. Protocols lab_23k, lab_58k and lab have equal proportions:
1,000 tokens per parameter for the decoder, 100 predicted tokens per parameter for the coprocessor.

results.svg: the plot on the front page, the n-th token ahead on works that no model has read, for
our runs and for the paper, 16 latents each. Ours are protocol lab: the packaged decoder of 0.16 M
parameters. The paper's placement is after.

works.svg: work by work, over the next 32 tokens. A dot is one work and one seed. Each colour has
the works in its own order, by the mean of its seeds.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from latent_delib.job import plan
from latent_delib.nn.sizes import SIZES
from latent_delib.results import packed, published
from latent_delib.results.runs import PERPLEXITY
from latent_delib.results.tables import AHEAD
from latent_delib.weights import folder

FIGURES = Path(__file__).parent
RESULTS = FIGURES.with_name("results")
READ = {file.path: cache(file.read) for file in packed.files_below(RESULTS)}  # by path
LIGHT, DARK, WRONG, GREY, GREEN = "#7fb3d9", "#1b6ca8", "#d1741f", "#7a7a7a", "#3a8f4d"
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "latent_delib",  # the same runs give the same bytes
}
KINDS = {  # validation source -> title
    "files:runs/mixture/validation/*.txt": "works of the kinds trained on",
    "files:runs/mixture/unseen/*.txt": "works of other kinds",
}
KNOWN, _ = KINDS


def parameters(size: str) -> int:
    """Returns the number of a decoder's parameters."""
    return plan.count(folder.shapes(SIZES[size]))


GROWTH = {  # label of a panel's x axis -> value on it -> PROTOCOL/EXPERIMENT
    "parameters of the decoder": {
        parameters("gemma2_23k"): "lab_23k/overlay",
        parameters("gemma2_58k"): "lab_58k/overlay",
        parameters("gemma2_160k"): "lab/overlay",
    },
    "training steps": {
        1000: "lab/steps_8th",
        2000: "lab/steps_4th",
        4000: "lab/steps_half",
        8000: "lab/overlay",
        16000: "lab/steps_x2",
        32000: "lab/steps_x4",
    },
    "latents": {
        4: "lab/overlay_4",
        8: "lab/overlay_8",
        16: "lab/overlay",
        32: "lab/overlay_32",
        64: "lab/overlay_64",
    },
    # from a random start
    "layers of the coprocessor": {1: "lab/half", 2: "lab/from_scratch", 4: "lab/double"},
}
GROWTH_AT = {1: LIGHT, 4: DARK, 16: WRONG}  # n-th token ahead -> colour

LATENTS = 16
LINES = {  # evaluation in docs/results/lab -> (label, colour)
    "overlay@0": ("overlay, 8,000 steps", LIGHT),
    "steps_x4@0": ("overlay, 32,000 steps", DARK),
    "steps_x4@0/swap": ("control: latents of another document", WRONG),
    "static_tokens@0": ("control: trained vectors, no coprocessor", GREY),
    "after_x4@0": ("after, 32,000 steps; +11.5 % at n = 1", GREEN),
}
HIGHEST = 3  # percent; what is above is not drawn

DOTS = {  # label -> (evaluation of each seed, colour)
    "32,000 steps": ("lab/steps_x4@{}", DARK),
    "8,000 steps": ("lab/overlay@{}", LIGHT),
    "8,000 steps, latents of another document": ("lab/overlay@{}/swap", WRONG),
}


def draw(out: Path) -> None:
    """Draws all figures into SVGs in a folder."""
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        for name, figure in {"growth": growth(), "results": results(), "works": works()}.items():
            figure.savefig(out / f"{name}.svg", metadata={"Date": None})


def rows_of(evaluation: str) -> list[dict[str, Any]]:
    """Returns the rows of an evaluation on works of the kinds trained on, by its folder."""
    return READ[RESULTS / evaluation / PERPLEXITY]()["sets"][KNOWN]["rows"]


def finish(axes: Axes, label: str, ticks: Sequence[int]) -> None:
    """Draws the line of the frozen decoder, and a logarithmic x axis."""
    axes.axhline(0, color="black", linewidth=0.9)
    axes.set(xlabel=label, xscale="log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def growth() -> pyplot.Figure:
    """Draws what the gain grows with."""
    figure, grid = pyplot.subplots(1, len(GROWTH), figsize=(12.5, 3.2), sharey=True)
    for axes, (label, experiments) in zip(grid, GROWTH.items(), strict=True):
        ticks = list(experiments)
        seeds = [rows_of_seeds(experiment) for experiment in experiments.values()]
        for n, colour in GROWTH_AT.items():
            draw_growth(axes, ticks, [first[n] for first, *_ in seeds], n, colour)
            for tick, (_, *others) in zip(ticks, seeds, strict=True):
                change = [rows[n]["change_percent"] for rows in others]
                axes.plot([tick] * len(change), change, "o", color=colour, mfc="white", ms=3.5)
        finish(axes, label, ticks)
    grid[0].set_ylabel("change in perplexity (%)")
    grid[0].legend(loc="lower left")
    return figure


def rows_of_seeds(experiment: str) -> list[dict[int, dict]]:
    """Returns the rows of each seed of PROTOCOL/EXPERIMENT by n, those of seed 0 first."""
    found = []
    for seed in range(3):
        run = f"{experiment}@{seed}"
        if RESULTS / run / PERPLEXITY in READ:
            found.append({row["n"]: row for row in rows_of(run)})
    return found


def draw_growth(axes: Axes, x: list[int], rows: list[dict], n: int, colour: str) -> None:
    """Draws the change at one n with its 95 % intervals."""
    change = np.array([row["change_percent"] for row in rows])
    low = np.array([row["change_low"] for row in rows])
    high = np.array([row["change_high"] for row in rows])
    error = [change - low, high - change]
    axes.errorbar(x, change, error, fmt="o-", color=colour, capsize=3, label=f"n = {n}")


def results() -> pyplot.Figure:
    """Draws the plot on the front page: our change at the n of the paper's Table 1, and its own."""
    figure, axes = pyplot.subplots(figsize=(7.2, 4.0))
    for evaluation, (label, colour) in LINES.items():
        rows = [row for row in rows_of(f"lab/{evaluation}") if row["n"] in AHEAD]
        rows = [row for row in rows if row["change_percent"] < HIGHEST]
        at = [row["n"] for row in rows]
        change = [row["change_percent"] for row in rows]
        low = [row["change_low"] for row in rows]
        high = [row["change_high"] for row in rows]
        axes.plot(at, change, color=colour, marker="o", ms=4, linewidth=1.8, label=label)
        axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
    by_n = published.PERPLEXITY_CHANGE[LATENTS]
    label = f"published: {published.DECODER}, after"
    axes.plot(by_n.keys(), by_n.values(), "s--", color="black", ms=4, label=label)
    finish(axes, "n-th token ahead", AHEAD)
    place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate("frozen\ndecoder", (32, 0), fontsize=8, **place)
    axes.set_ylabel("change in perplexity (%)")
    axes.legend(loc="upper right")
    return figure


def works() -> pyplot.Figure:
    """Draws a dot for each work and seed, and prints how many works gain."""
    figure, grid = pyplot.subplots(
        1, len(KINDS), figsize=(10.0, 3.4), sharey=True, width_ratios=(3, 1)
    )
    for axes, (source, title) in zip(grid, KINDS.items(), strict=True):
        for label, (evaluation, colour) in DOTS.items():
            by_seed = [changes(evaluation.format(seed), source) for seed in range(3)]
            change = np.array(by_seed)
            change = change[:, np.argsort(change.mean(axis=0))]
            x = np.broadcast_to(np.arange(change.shape[1]), change.shape)
            axes.plot(x.ravel(), change.ravel(), "o", color=colour, ms=2.5, alpha=0.7, label=label)
            print(f"{title}, {label}: of {change.shape[1]} works gain", *(change < 0).sum(axis=1))
        axes.axhline(0, color="black", linewidth=0.9)
        axes.set(xlabel=title, xticks=[])
    grid[0].set_ylabel("change in perplexity (%)")
    grid[0].legend(loc="upper left")
    return figure


def changes(evaluation: str, source: str) -> list[float]:
    """Returns the change in perplexity of each work over all n, in percent."""
    documents = READ[RESULTS / evaluation / packed.DOCUMENTS]()
    of_source = documents["source"] == list(documents["sources"]).index(source)
    found = []
    for work in np.unique(documents["work"][of_source]):
        rows = of_source & (documents["work"] == work)
        gained = documents["decoder"][rows].sum() - documents["augmented"][rows].sum()
        nats = gained / documents["tokens"][rows].sum()
        found.append(100 * np.expm1(-nats))
    return found


if __name__ == "__main__":
    draw(FIGURES)
