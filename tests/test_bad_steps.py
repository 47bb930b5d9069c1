"""Losses and gradients that are not finite, too little memory, a store that takes no metrics."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workdirs

from latent_delib import train
from latent_delib.errors import UserError
from latent_delib.job import experiment, plan
from latent_delib.job.metrics import Metrics
from latent_delib.machine import files, saved_steps

pytestmark = pytest.mark.usefixtures("shared_steps")


def wait_for(workdir, step):
    """A save may be under way when a job ends with an error."""
    for _ in range(1000):
        if step in saved_steps.whole_steps(str(workdir)):
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(make_config, tmp_path):
    """The rate of the first step is 0; the weights of the second are beyond float32."""
    config = make_config(
        {"optimizer.learning_rate": 1e38, "train.checkpoint_every": 1, "train.keep": 4}
    )
    with pytest.raises(UserError, match="step 3: .* nan, .* step 2 is saved"):
        train.train(config, str(tmp_path))
    wait_for(tmp_path, 2)
    assert saved_steps.whole_steps(str(tmp_path)) == {1, 2}


def test_steps_that_are_not_finite_are_skipped_up_to_a_limit(
    trained, make_config, tmp_path, monkeypatch, capsys
):
    """Frozen weights are NaN in the third step and in the fifth."""
    workdirs.copy_at_step_2(trained, workdir := tmp_path / "workdir")
    true = plan.train_step

    def step(state, frozen, *args, **kwargs):
        bad = (state.step == 2) | (state.step == 4)
        return true(
            state, jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), frozen), *args, **kwargs
        )

    monkeypatch.setattr(plan, "train_step", step)
    config = make_config(
        {"train.checkpoint_every": 1, "train.keep": 4, "train.max_bad_steps": 1, "train.steps": 6}
    )
    with pytest.raises(UserError, match="step 5: .* config.train.max_bad_steps=1"):
        train.train(config, str(workdir))
    wait_for(workdir, 4)
    said = capsys.readouterr().out
    assert "train.steps changed from 4 to 6" in said
    assert "step 3: the loss is nan" in said and "skipped, 1 of" in said
    _, two = workdirs.everything(workdir, 2)
    _, three = workdirs.everything(workdir, 3)
    last, four = workdirs.everything(workdir)
    assert last == 4
    for name in two:
        if "count" in name:
            assert (two[name], three[name], four[name]) == (2, 3, 4)
        else:
            np.testing.assert_array_equal(two[name], three[name], err_msg=name)
            assert np.isfinite(four[name]).all() and (four[name] != three[name]).any(), name
    rows = workdirs.rows_of(workdir)
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert (
        "bad_steps" not in rows[1]
        and rows[2]["bad_steps"] == 1
        and np.isfinite(rows[2]["grad_norm"])
    )


@pytest.mark.parametrize("start, saved", [(2, "step 2 is saved"), (0, "nothing is saved yet")])
def test_a_gradient_that_is_not_finite_ends_the_run_too(make_config, tmp_path, start, saved):
    """A step's loss is of the weights before it: bad ones would be saved before a loss shows."""
    metrics = Metrics(experiment.read(make_config()), str(tmp_path), start, lambda step: 0.0)
    metrics.push(start + 1, {"loss": 5.0, "tokens": 8.0, "grad_norm": np.inf})
    with pytest.raises(UserError, match=f"step {start + 1}: .* inf; {saved}"):
        metrics.flush()


class Store:
    """A file on a store; the first `failures` writes fail."""

    def __init__(self, failures):
        self.failures, self.content, self.answers = failures, None, threading.Event()

    def __str__(self):
        return "gs://bucket/run/metrics.jsonl"

    def write_bytes(self, content):
        self.answers.wait()
        if self.failures:
            self.failures -= 1
            raise RuntimeError("503 later")
        self.content = content


@pytest.mark.parametrize("failures", [0, 2, 99])
def test_a_store_that_does_not_take_metrics_ends_nothing(capsys, failures, tmp_path):
    """Nor does one that is slow: the training goes on beside it."""
    store = Store(failures)
    path = tmp_path / "metrics.jsonl"
    path.touch()
    copy = files.Copy(path, store)
    for step in range(1, 5):
        with path.open("a") as file:
            file.write(f"{step}\n")
        copy.update()
        if step == 2:  # two lines came while the store was silent
            store.answers.set()
        if step in (2, 3):
            copy.copying.join()
    copy.close()
    warnings = capsys.readouterr().err.splitlines()
    if failures < 99:
        assert store.content == b"1\n2\n3\n4\n"
        assert len(warnings) == bool(failures)
    else:
        assert len(warnings) == 2
        assert all(str(store) in line and "503 later" in line for line in warnings)


def test_steps_without_a_prompt_do_not_end_a_run_that_has_seen_one(make_config, tmp_path):
    """By chance the last steps may hold no prompt; the run must reach its end all the same."""
    exp = experiment.read(make_config({"train.log_every": 1, "train.steps": 3}))
    with Metrics(exp, str(tmp_path), 0, lambda step: 0.1) as seen:
        for step, tokens in enumerate((6, 0, 0), 1):
            seen.push(step, {"loss": 2.0, "tokens": tokens, "grad_norm": 1.0})
        seen.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_text_without_the_end_of_a_prompt_ends_the_run(make_config, tmp_path):
    config = make_config({"method.prompt_end": "no text goes on like this", "train.log_every": 2})
    expected = "step 2: no token .* since step 0: .*method.prompt_end='no"
    with pytest.raises(UserError, match=expected):
        train.train(config, str(tmp_path))
