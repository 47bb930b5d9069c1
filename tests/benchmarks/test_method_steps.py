"""The time of a step of each method."""

import json

import pytest

from benchmarks import common, methods, peer_sides


def test_each_experiment_gives_its_method_and_decoder():
    for name in methods.EXPERIMENTS:
        config, architecture = methods.job(None, name=name)
        assert config.decoder.path == "packaged"
        assert (architecture.num_layers, architecture.embed_dim) == (2, 64)
    assert methods.job(None, name="lab/cartridge")[0].method.name == "cartridge"


def test_a_row_holds_the_time_of_one_step(monkeypatch, tmp_path):
    """A turn makes several steps."""
    monkeypatch.setattr(peer_sides, "train_ours", lambda a, job: peer_sides.Work(job, 0))
    monkeypatch.setattr(
        common, "measure", lambda runs, rounds: {name: [0.4, 0.8, 0.4][:rounds] for name in runs}
    )
    file = tmp_path / "methods.json"
    result = methods.main(["lab/overlay", "--rounds=3", f"--json={file}"])
    assert json.loads(file.read_text()) == result
    (row,) = result["rows"]
    assert row["experiment"] == "lab/overlay"
    assert row["ms"] == pytest.approx(400 / peer_sides.STEPS)
    assert row["ms_max"] == pytest.approx(800 / peer_sides.STEPS)


@pytest.mark.slow
def test_a_real_step_is_timed(tmp_path):
    result = methods.main(["lab/static_tokens", "--rounds=1", f"--json={tmp_path}/methods.json"])
    assert 0 < result["rows"][0]["ms"] < 60_000
