"""Runs the notebook tour.ipynb and stores its outputs and plots in it; no Jupyter is needed.
Needs matplotlib (./launch/setup.sh report).

.venv/bin/python examples/run.py [NOTEBOOK]        NOTEBOOK: write there instead
"""

import base64
import contextlib
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOUR = Path(__file__).with_name("tour.ipynb").resolve()


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Runs the code cells in order, fills in their outputs, and returns their variables."""
    warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
    variables: dict[str, Any] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), variables)
        cell["execution_count"] = count
        cell["outputs"] = [stream(printed.getvalue())] if printed.getvalue() else []
        cell["outputs"] += [plot(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
    return variables


def stream(text: str) -> dict[str, Any]:
    """Returns printed text as an output of a cell."""
    return {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}


def plot(figure: plt.Figure) -> dict[str, Any]:
    """Returns a figure as an output of a cell: a PNG in base64."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90, metadata={"Software": None})
    data = base64.b64encode(picture.getvalue()).decode()
    return {"data": {"image/png": data}, "metadata": {}, "output_type": "display_data"}


def main(out: str = str(TOUR)) -> dict[str, Any]:
    """Runs the tour in its own folder, writes it to `out`, and returns its variables."""
    out = os.path.abspath(out)
    os.chdir(TOUR.parent)
    notebook = json.loads(TOUR.read_text(encoding="utf-8"))
    variables = run(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    Path(out).write_text(f"{text}\n", encoding="utf-8")
    return variables


if __name__ == "__main__":
    main(*sys.argv[1:])
