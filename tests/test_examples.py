"""What is shown to be run: the README's block of Python, and the cells of the notebook under examples/, in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "examples" / "tour.ipynb"
CHECK = "import test_examples\n\ntest_examples.check(globals())"


def test_the_block_of_the_readme_runs_as_it_stands(trained, decoder_folder):
    """But for the decoder and the workdir, which are small ones here."""
    text = (PATH.parents[1] / "README.md").read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    code = block.replace('"packaged"', repr(str(decoder_folder))).replace('"runs/quickstart"', repr(str(trained)))
    assert code.count(str(decoder_folder)) == code.count(str(trained)) == 1
    left = {}
    exec(code, left)
    assert left["ld"].mesh.make({"data": -1, "tensor": 2}).size == 8
    assert left["lm"].coprocessor.step == 4


@pytest.fixture(scope="module")
def notebook():
    return json.loads(PATH.read_text(encoding="utf-8"))


def test_form(notebook):
    """A notebook of format 4.5 for any Python kernel, stripped of what running it adds, and readable as it lies."""
    assert sorted(notebook) == ["cells", "metadata", "nbformat", "nbformat_minor"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        rest = {"code": {"execution_count": None, "outputs": []}, "markdown": {}}[cell["cell_type"]]
        assert cell == {key: cell[key] for key in ("cell_type", "id", "source")} | {"metadata": {}} | rest
        assert cell["source"] == "".join(cell["source"]).splitlines(keepends=True)
    assert PATH.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.slow
def test_its_cells_run_and_show_what_they_say(notebook, tmp_path):
    """In a process of their own: with the devices and flags that they ask for."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "tour.py").write_text("\n\n".join([*cells, CHECK]), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"MPLBACKEND": "Agg", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, tmp_path / "tour.py"]
    done = subprocess.run(command, cwd=PATH.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def check(tour):
    """Of the variables that the cells leave."""
    B, T, A = tour["B"], tour["T"], tour["AHEAD"]
    assert tour["cache"].k.shape == tour["cache"].v.shape == (4, 1, T, 2, 64)
    assert tour["unchanged"].sum() == 60

    # The decoder's log-probabilities are those of its logits; training made the untrained coprocessor better.
    places = tour["places"]
    assert tour["without"].shape == (B, places.shape[1], A)
    for n in range(A):
        expected = np.take_along_axis(tour["of_next"], places + n, axis=1)
        np.testing.assert_allclose(tour["without"][..., n], expected, rtol=0, atol=1e-3)
    untrained, trained = tour["curves"].values()
    assert untrained.shape == trained.shape == (A,)
    assert trained.mean() < 1 and trained[:4].mean() < untrained[:4].mean() - 1

    # Until latents join, tokens are the decoder's.
    assert tour["z"].shape == (4, 3, 8, 192)
    decoder, prompt, again, late = tour["continued"].values()
    assert [x.joined for x in (decoder, prompt, again, late)] == [(), (0,), (0, 8, 16, 24), (4,)]
    assert (late.tokens[:4] == decoder.tokens[:4]).all() and (again.tokens[:8] == prompt.tokens[:8]).all()

    for call, rows in ((tour["written"], 8), (tour["decoded"], 8 + 1 + tour["end"] - tour["at"] - 2)):
        assert call.weights.shape == (4, 4, rows, tour["at"] + 1 + rows)
        np.testing.assert_allclose(call.weights.sum(axis=-1), 1, rtol=1e-4)
    assert [len(row) for row in tour["nearest"]] == [5] * 8
    assert tour["plt"].get_fignums() == [1, 2]
