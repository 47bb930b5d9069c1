"""The times in metrics.jsonl."""

import types

import jax
import numpy as np
import pytest

from latent_delib.delib import cost
from latent_delib.job import experiment, metrics
from latent_delib.machine import chips


def collecting(config, tmp_path, rows):
    """Metrics of a run that begins; its rows go into a list."""
    exp = experiment.read(config)
    found = metrics.Metrics(exp, str(tmp_path / "workdir"), 0, lambda step: 1.0)
    found.logs = [types.SimpleNamespace(write=rows.append)]
    return found


def test_the_times_of_all_rows_add_up(make_config, tmp_path, monkeypatch):
    """Rows are slow to write here, and this time counts too."""
    now = 0.0
    rows = []

    def slow(row):
        nonlocal now
        rows.append(row)
        now += 5

    clock = types.SimpleNamespace(perf_counter=lambda: now, time=lambda: now)
    monkeypatch.setattr(metrics, "time", clock)
    exp = experiment.read(make_config({"train.log_every": 1}))
    found = metrics.Metrics(exp, str(tmp_path / "workdir"), 0, lambda step: 2.0 * step)
    found.logs = [types.SimpleNamespace(write=slow)]
    found.begin_row(0)
    for step in (1, 2, 3):
        now += 1
        found.push(step, {"loss": np.float32(5), "tokens": 8.0, "grad_norm": 1.0})
    found.flush()
    assert [row["step_seconds"] for row in rows] == [2, 6, 5]
    assert sum(row["step_seconds"] for row in rows) == now - 5  # the last row's writing is left
    assert [row["learning_rate"] for row in rows] == [0, 2, 4]


def test_a_validation_splits_the_time_between_rows(make_config, tmp_path, monkeypatch):
    """The row of the step before is still pending when a validation waits for its own step."""
    now = 0.0
    rows = []
    clock = types.SimpleNamespace(perf_counter=lambda: now, time=lambda: now)
    monkeypatch.setattr(metrics, "time", clock)

    def wait(values):  # for the step that is running
        nonlocal now
        now += 2

    monkeypatch.setattr(metrics.jax, "block_until_ready", wait)
    found = collecting(make_config({"train.log_every": 1}), tmp_path, rows)
    found.begin_row(0)
    now += 2
    found.push(1, {"loss": 4.0, "tokens": 8.0, "grad_norm": 1.0})
    with found.paused(None):
        now += 100
    found.push(2, {"loss": 4.0, "tokens": 8.0, "grad_norm": 1.0}, {"validation_loss": 3.0})
    found.flush()
    assert [row["step_seconds"] for row in rows] == [2, 2]
    assert rows[1]["validation_loss"] == 3.0 and "validation_loss" not in rows[0]


def test_utilisation_is_that_of_all_devices(make_config, tmp_path, monkeypatch):
    now = 0.0
    rows = []
    clock = types.SimpleNamespace(perf_counter=lambda: now, time=lambda: now)
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(metrics.chips, "chip_of", lambda device: chips.Chip(peak=1e9))
    config = make_config({"train.log_every": 1})
    found = collecting(config, tmp_path, rows)
    found.begin_row(0)
    now += 2
    found.push(1, {"loss": 4.0, "tokens": 8.0, "grad_norm": 1.0})
    found.flush()
    useful = cost.step_flops(experiment.read(config).aug, 8, 32, 4, 3).useful  # of the tiny config
    possible = 2 * 1e9 * jax.device_count()
    assert jax.device_count() == 8
    np.testing.assert_allclose(rows[0]["model_flops_utilisation"], useful / possible)


def test_figures_of_a_step_without_a_row_go_into_the_next(make_config, tmp_path):
    rows = []
    config = make_config({"train.log_every": 1, "train.max_bad_steps": 1})
    found = collecting(config, tmp_path, rows)
    bad = {"loss": float("nan"), "tokens": 8.0, "grad_norm": 1.0}
    found.push(1, bad, {"validation_loss": 3.0})
    found.push(2, bad | {"loss": 4.0})
    found.push(3, bad | {"loss": 4.0})
    found.flush()
    assert [row.get("validation_loss") for row in rows] == [3.0, None]


def test_a_row_is_the_mean_over_the_tokens_of_its_steps(make_config, tmp_path, monkeypatch):
    """A validation takes none of their time."""
    now = 0.0
    rows = []
    clock = types.SimpleNamespace(perf_counter=lambda: now, time=lambda: now)
    monkeypatch.setattr(metrics, "time", clock)
    found = collecting(make_config({"train.log_every": 2}), tmp_path, rows)
    found.begin_row(0)
    for step, (loss, tokens) in enumerate([(4.0, 10.0), (1.0, 30.0)], start=1):
        now += 2
        with found.paused(None):
            now += 100
        found.push(step, {"loss": loss, "tokens": tokens, "grad_norm": 1.0})
    found.flush()
    (row,) = rows
    assert (row["loss"], row["step_seconds"]) == (1.75, 2)
    assert row["tokens_per_second"] == 8 * 32 / 2


def test_an_error_leaves_the_rows_on_the_store(make_config, tmp_path, monkeypatch):
    """A store's copy of metrics.jsonl may be old when an error ends the job."""
    monkeypatch.setattr(metrics, "is_remote", lambda workdir: True)
    monkeypatch.setattr(metrics.files.Copy, "update", lambda self: None)  # the store is slow
    exp = experiment.read(make_config({"train.log_every": 1}))
    values = {"loss": 4.0, "tokens": 8.0, "grad_norm": 1.0}
    with (
        pytest.raises(OSError),
        metrics.Metrics(exp, str(tmp_path), 0, lambda step: 1.0) as found,
    ):
        found.begin_row(0)
        found.push(1, values)
        found.push(2, values)
        raise OSError("a bucket")
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert '"step": 1' in line
