"""Runs what is shown to be run: the README's block of Python, and the notebook."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "examples" / "tour.ipynb"
RUN = "import sys, run, test_examples; test_examples.check(run.main(sys.argv[1]))"


def test_the_block_of_the_readme_runs_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    variables = {}
    exec(block, variables)
    assert variables["lm"].coprocessor.step == 32_000
    assert len(capsys.readouterr().out) > 4  # the text that it generates


@pytest.fixture(scope="module")
def notebook():
    return json.loads(TOUR.read_text(encoding="utf-8"))


def test_the_notebook_lies_as_it_was_run(notebook):
    """It is of format 4.5, small, readable in a diff, and holds the outputs of one run in order."""
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert TOUR.stat().st_size < 300_000
    assert (
        TOUR.read_text(encoding="utf-8")
        == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    )
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code[1:])
    assert kinds(notebook).count("display_data") == 2


@pytest.mark.slow
def test_the_notebook_shows_what_it_says(notebook, tmp_path):
    """In a process of its own, with the devices that it asks for."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests")))
    out = tmp_path / "tour.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", RUN, out], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert kinds(json.loads(out.read_text(encoding="utf-8"))) == kinds(notebook)


@pytest.mark.slow
def test_latents_take_the_place_of_written_steps():
    """New questions of another seed than the one that is shown."""
    from examples import hops

    shares = hops.main(seed=1, count=32)
    in_steps, guessed, with_latents = shares.values()
    assert min(in_steps, with_latents) >= 0.9
    assert guessed <= 0.1


@pytest.mark.parametrize("argument", ["--seed=one", "one"])
def test_a_seed_that_is_no_number(argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hops", argument])
    with pytest.raises(SystemExit, match=f"error: .*{argument}.*(expected a whole|--help)"):
        runpy.run_module("examples.hops", run_name="__main__")


def test_the_kinds_of_tokens_of_the_probe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import probe

    at = 40
    row = np.arange(1000, 1000 + probe.LENGTH)  # no token twice, but for these
    row[at + 1] = row[at - 15]
    row[at + 2] = row[at - 16]
    row[at + 4] = row[at + 3]  # not before the place
    rank = np.full(2000, 300)
    rank[row[at + 1]], rank[row[at + 2]] = 63, 64
    found = probe.kinds(row, at, rank, np.array([0.6, 0.2, 0.1] + [0.5] * 13))
    groups = np.array(list(found.values())).astype(int)
    np.testing.assert_array_equal(groups[0], 1)
    for three in np.split(groups[1:], 3):
        np.testing.assert_array_equal(three.sum(axis=0), 1)
    assert [name for name in found if found[name][0]] == [
        "all",
        "occurs in the last 16 tokens",
        "one of the 64 most frequent",
        "the decoder's likeliest token has p > 0.5",
    ]
    second = groups[:, 1].nonzero()[0].tolist()
    third = groups[:, 2].nonzero()[0].tolist()
    assert (second, third) == ([0, 2, 5, 8], [0, 3, 6, 9])


def test_the_rows_of_recent_text(monkeypatch):
    """By a score that tells which tokens were read: their sum, and the token to be predicted."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import recent_text

    def score(tokens):
        return 1000 * np.cumsum(tokens[:, :-1], axis=1) + tokens[:, 1:]

    tokens = np.random.default_rng(0).integers(1, 100, (3, 12))
    tokens[:, 0] = 7  # BOS
    piece, at, A = np.array([0, 0, 2, 2]), np.array([0, 5, 3, 8]), 3
    expected = recent_text.ahead(score(tokens)[piece], at, A)
    np.testing.assert_array_equal(expected[1], score(tokens)[0, 5:8])
    for recent in (8, 4):
        rows, place = recent_text.recent_rows(tokens, piece, at, recent, A)
        assert rows.shape == (4, 1 + recent + A)
        unread = [1000 * tokens[p, 1 : max(a + 1 - recent, 1)].sum() for p, a in zip(piece, at)]
        found = recent_text.ahead(score(rows), place, A)
        np.testing.assert_array_equal(found, expected - np.array(unread)[:, None])


def kinds(notebook):
    """Returns the kinds of all outputs, in order."""
    return [
        output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", [])
    ]


def check(tour):
    """Checks the variables that the cells leave."""
    B, T, A = tour["B"], tour["T"], tour["AHEAD"]
    assert tour["cache"].k.shape == tour["cache"].v.shape == (2, 1, T, 2, 16)
    assert tour["unchanged"].sum() == 60

    # The decoder's log-probabilities are those of its logits; training made the untrained
    # coprocessor better.
    places = tour["places"]
    assert tour["without"].shape == (B, places.shape[1], A)
    for n in range(A):
        expected = np.take_along_axis(tour["of_next"], places + n, axis=1)
        np.testing.assert_allclose(tour["without"][..., n], expected, rtol=0, atol=1e-3)
    untrained, trained = tour["curves"].values()
    assert untrained.shape == trained.shape == (A,)
    assert trained.mean() < 1
    assert trained[:4].mean() < untrained[:4].mean() - 1

    # Until latents join, the text is the decoder's.
    assert tour["z"].shape == (4, 3, 16, 64)
    decoder, prompt, again, late = [
        tour["tokenizer"].encode(text) for text in tour["continued"].values()
    ]
    assert late[:4] == decoder[:4]
    assert again[:8] == prompt[:8]
    assert decoder != prompt != late

    for call, rows in (
        (tour["written"], 16),
        (tour["decoded"], 16 + 1 + tour["end"] - tour["at"] - 2),
    ):
        assert call.weights.shape == (2, 4, rows, tour["at"] + 1 + rows)
        np.testing.assert_allclose(call.weights.sum(axis=-1), 1, rtol=1e-4)
    assert [len(row) for row in tour["nearest"]] == [5] * 16
