"""Draws method.svg, the three calls of the method, and placements.svg, where latents stand.

python docs/figures/method.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent
FROZEN, FROZEN_EDGE = "#d3e3f5", "#2f6db0"
TRAINED, TRAINED_EDGE = "#fcdcb8", "#cf6a08"
TOKEN, TOKEN_EDGE = "#f2f2f0", "#8c8c88"
GRADIENT = "#b02a2a"
INK, QUIET = "#222222", "#5f5f5f"
LAYERS = 4
ROW = 0.62  # height of a layer
TOP = LAYERS * ROW

TEXT = ["The", "cat", "sat", "on", "the"]
AHEAD = ["mat", "and", "the", "dog"]
LATENTS = ["$z_1$", "$z_2$", "$z_3$", "$z_4$"]
SOFT = ["$s_1$", "$s_2$", "$s_3$", "$s_4$"]

ABOVE = {"ha": "center", "va": "bottom"}  # text over a point
BELOW = {"ha": "center", "va": "top"}

plt.rcParams.update(
    {"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.hashsalt": "latent_delib"}
)


def box(axes, x, y, width, height, face, edge, text="", style="-"):
    """Draws one rounded box whose lower left corner is (x, y)."""
    corners = "round,pad=0,rounding_size=0.1"
    look = {"facecolor": face, "edgecolor": edge, "linewidth": 1.1, "linestyle": style}
    axes.add_patch(FancyBboxPatch((x, y), width, height, corners, **look))
    middle = (x + width / 2, y + height / 2 - 0.02)
    axes.text(*middle, text, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(axes, *points, color=INK, style="-", width=1.4):
    """Draws a line through the points with a head at the last one."""
    *way, last = points
    look = {"color": color, "linestyle": style, "linewidth": width}
    axes.plot(*zip(*way), **look)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    axes.add_patch(FancyArrowPatch(way[-1], last, **head, **look))


def layers(axes, x, columns, face, edge):
    """Draws one transformer: a cell per token and layer."""
    for column in range(columns):
        for layer in range(LAYERS):
            box(axes, x + column + 0.08, layer * ROW + 0.06, 0.84, ROW - 0.12, face, edge)


def chips(axes, x, y, words, face, edge, style="-"):
    """Draws a row of tokens or vectors, one per column."""
    for column, word in enumerate(words):
        box(axes, x + column + 0.08, y, 0.84, 0.56, face, edge, word, style)


def heading(axes, x, name, task, color):
    """Writes what a call is, above it."""
    x = x + 0.08
    axes.text(x, TOP + 2.42, name, fontsize=12.5, fontweight="bold", color=color, va="bottom")
    axes.text(x, TOP + 2.3, task, fontsize=9.5, color=QUIET, va="top")


def note(axes, x, y, text, color=QUIET, **options):
    """Writes a small remark."""
    axes.text(x, y, text, fontsize=9, color=color, linespacing=1.25, **options)


def blank(axes, width, low, high):
    """Sets the limits and hides the axes."""
    axes.set_xlim(0, width)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_method():
    """Returns the figure of the three calls: text, augment, decode."""
    figure, axes = plt.subplots(figsize=(12.6, 5.0), layout="constrained")
    read, augment, decode = 0.2, 7.7, 14.4
    inputs, outputs = -0.98, TOP + 0.42

    heading(axes, read, "1  decoder", "reads the text once, keeps its cache", FROZEN_EDGE)
    layers(axes, read, 5, FROZEN, FROZEN_EDGE)
    chips(axes, read, inputs, TEXT, TOKEN, TOKEN_EDGE)
    note(axes, read + 2.5, TOP + 0.16, "key-value cache of the text", FROZEN_EDGE, **ABOVE)

    heading(axes, augment, "2  coprocessor", "writes latents in one pass", TRAINED_EDGE)
    layers(axes, augment, 4, TRAINED, TRAINED_EDGE)
    chips(axes, augment, inputs, SOFT, TRAINED, TRAINED_EDGE)
    chips(axes, augment, outputs, LATENTS, TRAINED, TRAINED_EDGE)
    note(axes, augment + 2, inputs - 0.18, "soft tokens", TRAINED_EDGE, **BELOW)

    heading(axes, decode, "3  decoder", "goes on from text and latents", FROZEN_EDGE)
    layers(axes, decode, 7, FROZEN, FROZEN_EDGE)
    chips(axes, decode, inputs, LATENTS, TRAINED, TRAINED_EDGE)
    chips(axes, decode + 4, inputs, AHEAD[:3], TOKEN, TOKEN_EDGE)
    chips(axes, decode + 3, outputs, AHEAD, "white", TOKEN_EDGE, "--")
    note(axes, decode + 2, inputs - 0.18, "latents, as embeddings", TRAINED_EDGE, **BELOW)
    note(axes, decode + 5.5, inputs - 0.18, "tokens ahead", **BELOW)
    note(axes, decode + 5, outputs + 0.68, "predictions and their loss", **ABOVE)
    note(axes, decode + 1.5, TOP + 0.16, "latents extend the cache", TRAINED_EDGE, **ABOVE)

    # The cache: layer by layer to the coprocessor, and past it to the decoder's second call.
    for layer in range(LAYERS):
        height = (layer + 0.5) * ROW
        arrow(axes, (read + 5.05, height), (augment, height), color=FROZEN_EDGE, width=1.1)
    middle = (read + 5 + augment) / 2
    note(axes, middle, TOP + 0.1, "layer $l$ reads\nlayer $l$", FROZEN_EDGE, **ABOVE)
    over, gap = TOP + 1.5, decode - 0.85
    arrow(
        axes,
        (read + 2.5, TOP + 0.62),
        (read + 2.5, over),
        (gap, over),
        (gap, TOP / 2),
        (decode, TOP / 2),
        color=FROZEN_EDGE,
    )
    note(axes, middle - 1.6, over + 0.1, "the same cache", FROZEN_EDGE, va="bottom")

    # The latents: out of the coprocessor, into the decoder.
    out, side = outputs + 0.28, decode - 1.7
    arrow(
        axes,
        (augment + 4.05, out),
        (side, out),
        (side, inputs + 0.28),
        (decode, inputs + 0.28),
        color=TRAINED_EDGE,
    )

    # The gradient: back through the frozen decoder, to the trained parameters only.
    low, side = inputs - 1.05, decode + 7.35
    arrow(
        axes,
        (decode + 7.0, out),
        (side, out),
        (side, low),
        (augment + 2, low),
        (augment + 2, low + 0.45),
        color=GRADIENT,
        style=(0, (4, 2.5)),
    )
    remark = "gradient, through the frozen decoder, to the coprocessor and its soft tokens alone"
    note(axes, decode - 1.2, low - 0.12, remark, GRADIENT, **BELOW)

    # The legend.
    box(axes, read + 0.08, low - 0.25, 0.5, 0.42, FROZEN, FROZEN_EDGE)
    note(axes, read + 0.72, low - 0.04, "frozen", va="center", color=INK)
    box(axes, read + 2.18, low - 0.25, 0.5, 0.42, TRAINED, TRAINED_EDGE)
    note(axes, read + 2.82, low - 0.04, "trained", va="center", color=INK)

    blank(axes, decode + 7.6, low - 0.75, TOP + 3.2)
    return figure


def draw_placements():
    """Returns the figure of the placements: the positions of 5 tokens of text and 3 latents."""
    figure, axes = plt.subplots(figsize=(9.2, 4.3), layout="constrained")
    latents = ["$z_1$", "$z_2$", "$z_3$"]
    text = ["$x_1$", "$x_2$", "$x_3$", "$x_4$", "$x_5$"]
    ahead = ["$y_1$", "$y_2$", "$y_3$"]
    # Per placement: its height, then rows of (first position, names, colours), bottom row first.
    token = (TOKEN, TOKEN_EDGE)
    vector = (TRAINED, TRAINED_EDGE)
    rows = {
        "after": (4.2, [[(1, text, token), (6, latents, vector), (9, ahead, token)]]),
        "before": (
            2.6,
            [[(1, text[:4], token), (5, latents, vector), (8, text[4:], token), (9, ahead, token)]],
        ),
        "overlay": (
            0.3,
            [
                [(1, text[:4], token), (5, text[4:], token), (6, ahead, token)],
                [(3, latents, vector)],
            ],
        ),
    }
    predicts = {"after": 8, "before": 8, "overlay": 5}
    for name, (base, stack) in rows.items():
        axes.text(0.1, base + 0.28, name, fontsize=11.5, fontweight="bold", va="center", color=INK)
        for level, row in enumerate(stack):
            for first, names, (face, edge) in row:
                chips(axes, first + 1, base + 0.68 * level, names, face, edge)
        column = predicts[name] + 1.5
        note(axes, column + 1.2, base - 0.24, "predicts", va="center", color=INK)
        arrow(
            axes,
            (column, base - 0.02),
            (column, base - 0.24),
            (column + 1, base - 0.24),
            (column + 1, base - 0.02),
        )
    for position in range(1, 12):
        note(axes, position + 1.5, 5.35, str(position), ha="center", va="center")
    note(axes, 0.1, 5.35, "position", va="center")
    axes.plot([2, 13], [5.08, 5.08], color=TOKEN_EDGE, linewidth=0.8)
    blank(axes, 13.2, -0.2, 5.6)
    return figure


def main():
    for name, draw in {"method": draw_method, "placements": draw_placements}.items():
        draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
