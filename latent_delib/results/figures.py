"""Draws figures as PNG: curves of runs, with published curves dashed, and attention maps."""

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from latent_delib.errors import extra
from latent_delib.results import published
from latent_delib.results.entries import entry_of, labels
from latent_delib.results.runs import Result, Runs
from latent_delib.results.tables import AHEAD

CURVES = (1, 4, 16, 32)  # n of the panels
DASHED = {"linestyle": "--", "marker": ".", "color": "black", "linewidth": 0.8}
TICKS = (-100, -20, -5, -2, 0, 2, 5, 20, 100, 1000, 10_000)  # percent, of a logarithmic axis
LINEAR = 5  # percent, up to which such an axis is linear

Rows = Sequence[dict[str, Any]]


class Picture(NamedTuple):
    """Holds a PNG.

    name: the name of its file, without suffix.
    """

    name: str
    caption: str
    png: bytes


def pyplot() -> Any:
    """Returns matplotlib's pyplot, which draws into files.

    Raises:
      UserError: matplotlib is not installed.
    """
    with extra("report"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def curves(runs: Runs) -> list[Picture]:
    """Draws the curves for which there is something to draw."""
    pictures = []
    if any(runs.losses.values()):
        pictures.append(Picture("loss", "Training loss, nats per token", _losses(runs)))
    if runs.perplexity:
        by_n = "Change in perplexity of the n-th token ahead (Figure 3)"
        by_latents = "Change in perplexity by number of latents"
        pictures.append(Picture("change_by_n", by_n, _all_by_n(runs)))
        pictures.append(Picture("change_by_latents", by_latents, _by_latents(runs.perplexity)))
    if runs.curves:
        caption = "Change in perplexity by training step (Figure 5)"
        pictures.append(Picture("change_by_step", caption, by_step(runs.curves)))
    return pictures


def _losses(runs: Runs) -> bytes:
    figure, (axes,) = _panels(1, (9, 4.5))
    for folder, rows in runs.losses.items():
        axes.plot(*zip(*rows), label=_plain(str(folder)), linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    return _finished(figure, axes)


def by_n(rows: Rows) -> bytes:
    """Draws the change by n of one evaluation."""
    figure, (axes,) = _panels(1, (6, 4))
    _line(axes, _column(rows, "n"), rows, "augmented")
    axes.set(xlabel="n-th token ahead", ylabel="change in perplexity (%)")
    return _finished(figure, axes)


def _all_by_n(runs: Runs) -> bytes:
    figure, (axes,) = _panels(1, (9, 4.5))
    for result, words in zip(runs.perplexity, labels(list(map(entry_of, runs.perplexity)))):
        count = entry_of(result).latents
        latents = f"{count} latents, " if count else ""
        rows = result.data["rows"]
        _line(axes, _column(rows, "n"), rows, _plain(f"{result.key}: {latents}{words}"))
    for latents, by_n in published.PERPLEXITY_CHANGE.items():
        axes.plot(by_n.keys(), by_n.values(), **DASHED)
        axes.annotate(
            f"{latents}", (1, by_n[1]), xytext=(-14, -3), textcoords="offset points", fontsize=7
        )
    axes.plot([], [], label=f"published, {published.DECODER}, by latents", **DASHED)
    axes.set(xlabel="n-th token ahead", ylabel="change (%)", xscale="log")
    axes.set_xticks(AHEAD, AHEAD)
    return _finished(figure, axes)


def _by_latents(results: Sequence[Result]) -> bytes:
    """Draws a line for runs that differ only in their latents, beside the published line."""
    known = published.PERPLEXITY_CHANGE
    lines = lines_by_latents(results)
    numbers = set(known)
    for line in lines.values():
        numbers |= set(map(_num_latents, line))
    ticks = sorted(numbers)
    figure, panels = _panels(len(CURVES), (9, 6))
    for axes, n in zip(panels, CURVES):
        for words, line in lines.items():
            _line_at(axes, n, map(_num_latents, line), line, _plain(words))
        change = [by_n[n] for by_n in known.values()]
        axes.plot(known.keys(), change, label=f"published, {published.DECODER}", **DASHED)
        axes.set(title=f"n = {n}", xlabel="latents", ylabel="change (%)", xscale="log")
        axes.set_xticks(ticks, ticks)
    return _finished(figure, panels[0])


def lines_by_latents(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns lines of runs that differ only in their number of latents: "KEYS: label" -> runs.

    The runs are ordered by that number. If any line has several numbers of latents, lines with only
    one are left out.
    """
    alike: dict[tuple[str, str], list[Result]] = {}
    for result, words in zip(results, labels(list(map(entry_of, results)))):
        if entry_of(result).latents:
            alike.setdefault((result.decoder, words), []).append(result)
    lines = {}
    alone = {}
    for (_, words), line in alike.items():
        keys = " ".join(result.key for result in line)
        chosen = lines if len(set(map(_num_latents, line))) > 1 else alone
        chosen[f"{keys}: {words}"] = sorted(line, key=_num_latents)
    return lines or alone


def _num_latents(result: Result) -> int:
    return result.method["num_latents"]


def by_step(curves: Mapping[Any, Sequence[Result]]) -> bytes:
    """Draws the change by training step: a line for the evaluations of each folder."""
    figure, panels = _panels(len(CURVES), (9, 6))
    for axes, n in zip(panels, CURVES):
        for folder, results in curves.items():
            _line_at(axes, n, [result.step for result in results], results, _plain(str(folder)))
        axes.set(title=f"n = {n}", xlabel="step", ylabel="change (%)")
    return _finished(figure, panels[0])


def _line_at(axes: Any, n: int, x: Iterable[float], results: Sequence[Result], name: str) -> None:
    """Draws the change at one n of several evaluations; those that have no such n are left out."""
    at = []
    rows = []
    for place, result in zip(x, results):
        for row in result.data["rows"]:
            if row["n"] == n:
                at.append(place)
                rows.append(row)
    _line(axes, at, rows, name)


def _column(rows: Rows, key: str) -> list[Any]:
    return [row.get(key) for row in rows]


def _line(axes: Any, x: Sequence[float], rows: Rows, name: str) -> None:
    """Draws the change of each row, with its interval where every row has one."""
    low = _column(rows, "change_low")
    high = _column(rows, "change_high")
    (line,) = axes.plot(x, _column(rows, "change_percent"), marker="o", markersize=3, label=name)
    if rows and None not in low and None not in high:
        axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.vlines(x, low, high, color=line.get_color(), linewidth=0.6)  # shows a single point's


def attention(
    weights_LSU: np.ndarray, rows: Sequence[str], columns: Sequence[str], text: int, title: str
) -> bytes:
    """Draws a panel per layer: rows attend to columns. Colour shows the square root of a weight.

    Args:
      weights_LSU: float32 [layers, rows, columns], a mean over heads.
      text: how many of the columns are text; a line separates them from the others.
    """
    layers, S, U = weights_LSU.shape
    across = min(layers, 2)
    down = math.ceil(layers / across)
    size = (across * max(2.4, 0.075 * U) + 1, down * max(1.6, 0.13 * S) + 1)
    figure, panels = _panels(layers, size)
    from matplotlib.colors import PowerNorm

    for layer, axes in enumerate(panels):
        image = axes.imshow(
            weights_LSU[layer],
            norm=PowerNorm(0.5, 0, 1),
            cmap="magma",
            aspect="auto",
            interpolation="nearest",
        )
        axes.axvline(text - 0.5, color="white", linewidth=0.6)
        axes.set_title(f"layer {layer}", fontsize=8)
        axes.set_xticks(range(U), map(_plain, columns), rotation=90, fontsize=5)
        axes.set_yticks(range(S), map(_plain, rows), fontsize=5)
        axes.tick_params(
            length=0, labelleft=layer % across == 0, labelbottom=layer + across >= layers
        )
    figure.colorbar(image, ax=panels, shrink=0.6, label="attention, mean over heads")
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Makes a figure of `count` panels, two per row; size: width and height in inches."""
    across = min(count, 2)
    down = math.ceil(count / across)
    figure, panels = pyplot().subplots(
        down, across, figsize=size, layout="constrained", squeeze=False
    )
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure, list(panels.flat[:count])


def _finished(figure: Any, named: Any) -> bytes:
    """Adds one legend below all panels, that of the panel `named`, and draws the figure."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_ylabel().startswith("change"):
            _scale_changes(axes)
        axes.minorticks_off()
    lines, names = named.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.17 * len(names))
    figure.legend(lines, names, loc="outside lower left", fontsize=7, frameon=False)
    return _png(figure)


def _scale_changes(axes: Any) -> None:
    """Draws a line at zero; where changes are large, the axis is logarithmic beyond LINEAR."""
    axes.axhline(0, color="black", linewidth=0.8)
    low, high = axes.dataLim.intervaly
    if max(-low, high) > 2 * LINEAR:
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=2)
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axes.set_yticks(ticks, ticks)


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for a rare script
        figure.savefig(png, format="png", dpi=130)
    pyplot().close(figure)
    return png.getvalue()


def _plain(text: str) -> str:
    """Returns text that matplotlib draws as it is: no formulas, nothing unprintable."""
    printable = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(printable).replace("$", r"\$")
