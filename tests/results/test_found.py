"""What is found below folders, and files that are refused."""

from pathlib import Path

import pytest

import latent_delib as ld
from latent_delib.results import runs
from tests.results.writers import benchmarks, perplexity


def test_each_perplexity_is_found_once(found):
    """A run in two of the folders counts twice, or one with evaluations only is lost."""
    names = ("a", "b", "from_scratch", "frozen", "lora", "old", "pause_tokens", "trained")
    folders = [str(result.path.parent) for result in found.perplexity]
    assert folders == [*(f"runs/{name}" for name in names), "runs/only/evaluations/90"]
    assert [result.key for result in found.perplexity] == [f"P{i}" for i in range(1, 10)]


def test_each_benchmark_is_found_once(found):
    """A run in two of the folders counts twice."""
    files = [str(result.path) for result in found.benchmarks]
    assert files == ["runs/a/benchmarks.json", "runs/b/benchmarks.json"]


def test_curves_are_in_the_order_of_their_steps(found):
    """A curve goes from step 120 to step 60, as their names are sorted."""
    assert set(found.curves) == {Path("runs/a"), Path("runs/only")}
    assert [each.step for each in found.curves[Path("runs/a")]] == [60, 120]
    assert [each.step for each in found.curves[Path("runs/only")]] == [60, 90]


def test_a_loss_that_is_still_being_written_is_left_out(found):
    """The report of a run that still trains fails."""
    assert found.losses == {Path("runs/a"): [(10, 4.5), (20, 4.0)]}


def test_the_step_of_an_export():
    """A folder's name may be a number; of older files it tells the step."""
    for data, step in (({"checkpoint": "shared/2", "step": 9}, 9), ({"checkpoint": "w/7"}, 7)):
        assert runs.Result("", Path("x"), data).step == step


def refusal(folder):
    """Returns the one line that refuses the file in a folder, from the file's name on."""
    with pytest.raises(ld.UserError) as caught:
        runs.find([str(folder)])
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("perplexity.json", b"{", "perplexity.json: not JSON"),
        ("perplexity.json", b"\xff", "perplexity.json: not JSON"),
        ("perplexity.json", b"[]", "perplexity.json: holds list, expected an object"),
        ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step"\n', "metrics.jsonl:2: not JSON"),
        (
            "metrics.jsonl",
            b'{"step": 1, "loss": NaN}\n',
            "metrics.jsonl:1: loss=nan: expected a finite number",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    """Nobody can tell which of many files is broken."""
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rows": None}, "rows=None: expected list"),
        ({"rows": []}, "0 rows"),
        ({"rows": [{"n": 1}]}, "rows[0]: tokens=None: expected int"),
        ({"rows": [3]}, "rows[0]: holds int, expected an object"),
        ({"config": {}}, "config: method=None: expected dict"),
        ({"fingerprint": 3}, "fingerprint=3: expected str"),
        ({"sets": {"x": {}}}, "sets['x']: rows=None"),
        ({"sets": {"x": 3}}, "sets['x']: holds int, expected an object"),
        ({"sets": [3]}, "sets=[3]: expected dict"),
        ({"checkpoint": 3}, "checkpoint=3: expected str"),
        ({"documents": True}, "documents=True: expected int"),
        (
            {"sets": {"x": {"rows": [], "works": {"y": {"rows": [{"n": "1"}]}}}}},
            "sets['x']: works['y']: rows[0]: n='1': expected int",
        ),
    ],
)
def test_a_wrong_field_is_named(tmp_path, fields, message):
    """A file that another program wrote gives a wrong table, or a traceback."""
    perplexity(tmp_path, -0.5, **fields)
    assert refusal(tmp_path).startswith(f"perplexity.json: {message}")


def test_a_wrong_row_of_benchmarks_is_named(tmp_path):
    """A file that another program wrote gives a wrong table, or a traceback."""
    benchmarks(tmp_path, {}, rows=[{"benchmark": "x"}])
    assert refusal(tmp_path).startswith("benchmarks.json: rows[0]: model=None")
