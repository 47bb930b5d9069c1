"""The times in metrics.jsonl."""

import types

import numpy as np

from latent_delib.job import experiment, metrics


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
