"""The cost of a step along four axes: the points, the exponents, the plot."""

import dataclasses
import json

import jax
import pytest

from benchmarks import common, growth
from latent_delib.delib import cost

TOY = [
    *"--size gemma2_test --ahead 3 --rounds 1 --least 0".split(),
    *"--seq_len 16 32 --traces 2 4 --latents 1 2 --layers 1 2".split(),
]
BASE = growth.Point(seq_len=32, traces=4, latents=2, layers=2)


def paths(folder):
    return [f"--json={folder}/growth.json", f"--svg={folder}/growth.svg"]


def test_exponents_are_those_between_the_last_two_points(monkeypatch, tmp_path, capsys):
    """A step of T max(M, 4) / 32 ms that needs M² N_L MiB, and as many GFLOP as it has layers."""
    made = []

    def make(a, point, jobs):
        made.append(point)
        needs = point.traces**2 * point.latents / 1024
        return point, {"needs_gib": needs, "gflop": float(point.layers)}

    def measure(runs, rounds, least):
        return {
            point: [0.001 * point.seq_len * max(point.traces, 4) / 32] * rounds for point in runs
        }

    monkeypatch.setattr(growth, "make", make)
    monkeypatch.setattr(common, "measure", measure)
    found = growth.main([*TOY, "--traces", "2", "4", "12", *paths(tmp_path)])
    assert len(made) == len(set(made)) == 6 and BASE in made
    assert all(sum(x != y for x, y in zip(point, BASE)) <= 1 for point in made)
    written = json.loads((tmp_path / "growth.json").read_text())
    assert written == found and written["base"] == BASE._asdict()
    assert [row["value"] for row in written["rows"]] == [16, 32, 2, 4, 12, 1, 2, 1, 2]
    by_axis = capsys.readouterr().out.splitlines()[-4:]
    assert by_axis == [
        "| T, 16 to 32 | 2 (2-2) to 4 (4-4) | 32 to 32 | 2.0 to 2.0 | 1.00 | 0.00 | 0.00 |",
        "| M, 2 to 12 | 4 (4-4) to 12 (12-12) | 8 to 288 | 2.0 to 2.0 | 1.00 | 2.00 | 0.00 |",
        "| N_L, 1 to 2 | 4 (4-4) to 4 (4-4) | 16 to 32 | 2.0 to 2.0 | 0.00 | 1.00 | 0.00 |",
        "| layers, 1 to 2 | 4 (4-4) to 4 (4-4) | 32 to 32 | 1.0 to 2.0 | 0.00 | 0.00 | 1.00 |",
    ]
    plot = (tmp_path / "growth.svg").read_text()
    assert all(f"<!-- {axis} -->" in plot for axis in growth.AXES.values())


@pytest.mark.parametrize("values", [["8"], ["16", "8"], ["8", "8"], ["0", "8"]])
def test_an_axis_rises(values, tmp_path):
    with pytest.raises(SystemExit, match=f"--traces {' '.join(values)}: expected two or more"):
        growth.main([*TOY, "--traces", *values, *paths(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_point_is_a_step_of_its_own_shapes():
    """Memory holds the temporaries, and the state, the frozen decoder and the batch once each."""
    a = common.arguments("", TOY, (), growth.PRESET, growth.PRESET)
    jobs = {}
    run, known = growth.make(a, BASE, jobs)
    run(2)
    [job] = jobs.values()
    assert job.state.step == 2 and job.state.trainable["coprocessor"]["soft_tokens"].shape[0] == 2
    held = sum(x.nbytes for x in jax.tree.leaves((job.state, job.frozen)))
    held += 2 * BASE.seq_len * 4  # tokens and their documents
    metrics = 2**30 * (known["needs_gib"] - known["temp_gib"]) - held
    assert 0 < metrics < 1000 and known["temp_gib"] > 0
    config = dataclasses.replace(common.ARCHITECTURES["gemma2_test"], num_layers=2)
    useful = cost.step_flops(common.augmentation(config, 2, "xla"), 1, 32, 4, 3).useful
    assert known["gflop"] == useful / 1e9


@pytest.mark.slow
def test_smallest_form(tmp_path):
    found = growth.main([*TOY, *paths(tmp_path)])
    axes = [row["axis"] for row in found["rows"]]
    assert axes == ["T", "T", "M", "M", "N_L", "N_L", "layers", "layers"]
    assert all(0 < row["ms_min"] <= row["ms"] <= row["ms_max"] for row in found["rows"])
    assert (tmp_path / "growth.json").exists() and (tmp_path / "growth.svg").exists()
