"""Pictures as PNG: curves of runs with the published ones dashed, a table, and where attention goes."""

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from latent_delib.results import published
from latent_delib.results.runs import Result, Runs
from latent_delib.results.tables import AHEAD, Table, labels, of

CURVES = (1, 4, 16, 32)  # n of the panels
DASHED = {"linestyle": "--", "marker": ".", "color": "black", "linewidth": 0.8}


def curves(runs: Runs) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Yields (file name without suffix, caption, what draws it) of those that there is something to draw for."""
    if any(runs.losses.values()):
        yield "loss", "Training loss, nats a token", lambda: _losses(runs)
    if runs.perplexity:
        yield "change_by_n", "Change in perplexity of the n-th token ahead (Figure 3)", lambda: _all_by_n(runs)
        yield "change_by_latents", "Change in perplexity by number of latents", lambda: _by_latents(runs)
    if runs.curves:
        yield "change_by_step", "Change in perplexity by training step (Figure 5)", lambda: by_step(runs.curves)


def _losses(runs: Runs) -> bytes:
    figure, (axes,) = _panels(1, (9, 4.5))
    for folder, rows in runs.losses.items():
        axes.plot(*zip(*rows), label=_plain(str(folder)), linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    return _finished(figure, axes)


def by_n(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draws the change by n of one evaluation."""
    figure, (axes,) = _panels(1, (6, 4))
    _line(axes, rows, [row["n"] for row in rows], "augmented")
    axes.set(xlabel="n-th token ahead", ylabel="change in perplexity (%)")
    return _finished(figure, axes)


def _all_by_n(runs: Runs) -> bytes:
    figure, (axes,) = _panels(1, (9, 4.5))
    for result, what in zip(runs.perplexity, labels(runs.perplexity)):
        latents = f"{of(result).latents} latents, " if of(result).latents else ""
        rows = result.data["rows"]
        _line(axes, rows, [row["n"] for row in rows], _plain(f"{result.key}: {latents}{what}"))
    for latents, by_n in published.PERPLEXITY_CHANGE.items():
        axes.plot(by_n.keys(), by_n.values(), **DASHED)
        axes.annotate(f"{latents}", (1, by_n[1]), xytext=(-14, -3), textcoords="offset points", fontsize=7)
    axes.plot([], [], label=f"published, {published.DECODER}, by latents", **DASHED)
    axes.set(xlabel="n-th token ahead", ylabel="change (%)", xscale="log")
    axes.set_xticks(AHEAD, AHEAD)
    return _finished(figure, axes)


def _by_latents(runs: Runs) -> bytes:
    """Draws runs that differ in their number of latents alone as a line; where there are lines, no lone points."""
    alike: dict[tuple[str, str], list[Result]] = {}
    for result, what in zip(runs.perplexity, labels(runs.perplexity)):
        if of(result).latents:
            alike.setdefault((result.decoder, what), []).append(result)
    lines = {key: results for key, results in alike.items() if len({of(r).latents for r in results}) > 1}
    alike = lines or alike
    figure, panels = _panels(len(CURVES), (9, 6))
    for axes, n in zip(panels, CURVES):
        for (_, what), results in alike.items():
            by_latents = sorted((r.method["num_latents"], i) for i, r in enumerate(results))
            rows = [(x, row) for x, i in by_latents for row in results[i].data["rows"] if row["n"] == n]
            keys = " ".join(r.key for r in results)
            _line(axes, [row for _, row in rows], [x for x, _ in rows], _plain(f"{keys}: {what}"))
        known = published.PERPLEXITY_CHANGE
        axes.plot(known.keys(), [by_n[n] for by_n in known.values()], label=f"published, {published.DECODER}", **DASHED)
        axes.set(title=f"n = {n}", xlabel="latents", ylabel="change (%)", xscale="log")
        ticks = sorted({*known, *(r.method["num_latents"] for results in alike.values() for r in results)})
        axes.set_xticks(ticks, ticks)
    return _finished(figure, panels[0])


def by_step(curves: Mapping[Any, Sequence[Result]]) -> bytes:
    """Draws the change by training step, of one evaluation after another in each folder."""
    figure, panels = _panels(len(CURVES), (9, 6))
    for axes, n in zip(panels, CURVES):
        for folder, results in curves.items():
            rows = [(r.step, row) for r in results for row in r.data["rows"] if row["n"] == n]
            _line(axes, [row for _, row in rows], [step for step, _ in rows], _plain(str(folder)))
        axes.set(title=f"n = {n}", xlabel="step", ylabel="change (%)")
    return _finished(figure, panels[0])


def _line(axes: Any, rows: Sequence[dict[str, Any]], x: Sequence[float], name: str) -> None:
    """Draws the change of each row, with its interval where every row has one."""
    (line,) = axes.plot(x, [row["change_percent"] for row in rows], marker="o", markersize=3, label=name)
    low, high = ([row.get(key) for row in rows] for key in ("change_low", "change_high"))
    if rows and None not in low and None not in high:
        axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.vlines(x, low, high, color=line.get_color(), linewidth=0.6)  # all there is to see of a single point


def table(table: Table) -> bytes:
    """Draws the rows of a table; its notes are in the other forms."""
    cells = [[_plain(str(c)) for c in row] for row in [table.columns, *table.rows]]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    figure, (axes,) = _panels(1, (max(6, 0.085 * sum(widths)), 0.27 * len(cells) + 0.5))
    axes.set_axis_off()
    axes.set_title(_plain(table.title), loc="left", fontsize=10)
    drawn = axes.table(cells, colWidths=[w / sum(widths) for w in widths], bbox=(0, 0, 1, 1), cellLoc="left", edges="B")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (row, _), cell in drawn.get_celld().items():
        cell.set_edgecolor("black" if row == 0 else "lightgray")
        cell.set_text_props(weight="bold" if row == 0 else "normal")
    return _png(figure)


def attention(attention: Any, title: str) -> bytes:
    """Draws a panel per layer: rows attend to columns, the mean over heads. Colours go by the root of the weight."""
    from matplotlib.colors import PowerNorm

    layers, _, S, U = attention.weights.shape
    across = min(layers, 2)
    down = math.ceil(layers / across)
    figure, panels = _panels(layers, (across * max(2.4, 0.075 * U) + 1, down * max(1.6, 0.13 * S) + 1))
    for l, axes in enumerate(panels):
        mean_SU = attention.weights[l].mean(axis=0)
        image = axes.imshow(mean_SU, norm=PowerNorm(0.5, 0, 1), cmap="magma", aspect="auto", interpolation="nearest")
        axes.axvline(attention.text - 0.5, color="white", linewidth=0.6)  # text on the left, the trace on the right
        axes.set_title(f"layer {l}", fontsize=8)
        axes.set_xticks(range(U), map(_plain, attention.columns), rotation=90, fontsize=5)
        axes.set_yticks(range(S), map(_plain, attention.rows), fontsize=5)
        axes.tick_params(length=0, labelleft=l % across == 0, labelbottom=l + across >= layers)
    figure.colorbar(image, ax=panels, shrink=0.6, label="attention, mean over heads")
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def _panels(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(count, 2)
    figure, panels = pyplot.subplots(
        math.ceil(count / across), across, figsize=size, layout="constrained", squeeze=False
    )
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure, list(panels.flat[:count])


def _finished(figure: Any, named: Any) -> bytes:
    """Adds one legend below all panels of curves. Changes: the frozen decoder's zero, and logarithms beyond 5 %."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_ylabel().startswith("change"):
            axes.axhline(0, color="black", linewidth=0.8)
            low, high = axes.dataLim.intervaly
            if max(-low, high) > 10:
                axes.set_yscale("symlog", linthresh=5, linscale=2)
                ticks = [t for t in (-100, -20, -5, -2, 0, 2, 5, 20, 100, 1000, 10_000) if low <= t <= high]
                axes.set_yticks(ticks, ticks)
        axes.minorticks_off()
    lines, names = named.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.17 * len(names))
    figure.legend(lines, names, loc="outside lower left", fontsize=7, frameon=False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a token may be of any script: a box stands for it
        figure.savefig(png := io.BytesIO(), format="png", dpi=130)
    pyplot.close(figure)
    return png.getvalue()


def _plain(text: str) -> str:
    """Makes text that matplotlib draws as it stands: no formulas, nothing unprintable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).replace("$", r"\$")
