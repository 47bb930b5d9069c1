"""Metrics for Weights & Biases, by a stand-in for its package."""

import sys
from types import SimpleNamespace

import jax
import pytest
import workdirs

from latent_delib import train
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.job.metrics import Metrics

pytestmark = pytest.mark.usefixtures("shared_steps")
WANDB = {"train.wandb": "a-project"}


class Refused(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package: arguments of `init`, rows and exit codes of its runs."""
    found = SimpleNamespace(Error=Refused, inits=[], rows=[], ends=[], starting_step=0)

    def init(**arguments):
        found.inits.append(arguments)
        return SimpleNamespace(starting_step=found.starting_step, log=log, finish=finish)

    def log(values, step):
        found.rows.append({"step": step} | values)

    def finish(exit_code):
        found.ends.append(exit_code)

    found.init = init
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


@pytest.mark.slow
def test_a_run_has_the_rows_of_the_job_and_goes_on_with_it(trained, make_config, tmp_path, wandb):
    workdir = tmp_path / "workdir"
    workdirs.copy_at_step_2(trained, workdir)
    train.train(make_config(WANDB), str(workdir))
    workdirs.assert_same(workdir, trained)
    assert wandb.rows == workdirs.rows_of(workdir)[2:] and wandb.ends == [0]
    train.train(make_config(WANDB | {"train.steps": 6}), str(workdir))
    assert [row["step"] for row in wandb.rows] == [3, 4, 5, 6]
    first, second = wandb.inits
    assert first["project"] == "a-project" and first["dir"] == str(workdir)
    assert first["id"] == second["id"] == (workdir / "wandb_run.txt").read_text()
    assert first["resume"] == "allow" and second["config"]["train"]["steps"] == 6
    config = workdirs.meta_of(workdir)["config"]
    assert first["config"] == config | {"train": first["config"]["train"]}


@pytest.mark.slow
def test_steps_that_are_done_again_are_not_told_again(trained, make_config, tmp_path, wandb):
    """A job that was killed in step 4 had told of step 3."""
    workdirs.copy_at_step_2(trained, tmp_path / "workdir")
    wandb.starting_step = 4
    train.train(make_config(WANDB), str(tmp_path / "workdir"))
    assert [row["step"] for row in wandb.rows] == [4]


def test_process_0_alone_has_a_run(make_config, tmp_path, wandb, monkeypatch):
    exp = experiment.read(make_config(WANDB))
    with Metrics(exp, str(tmp_path / "a"), 0, lambda step: 0.0):
        pass
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(exp, str(tmp_path / "b"), 0, lambda step: 0.0):
        pass
    assert len(wandb.inits) == 1 and (tmp_path / "a" / "wandb_run.txt").exists()
    assert not (tmp_path / "b").exists()


def test_an_error_ends_the_run_as_failed(make_config, tmp_path, wandb):
    exp = experiment.read(make_config(WANDB))
    with pytest.raises(OSError), Metrics(exp, str(tmp_path), 0, lambda step: 0.0):
        raise OSError("a bucket")
    assert wandb.ends == [1]


def test_what_is_missing_is_told_in_one_line(make_config, tmp_path, wandb, monkeypatch, capsys):
    def refuses(**_):
        raise Refused("No API key configured.\nUse `wandb login`")

    wandb.init = refuses
    with pytest.raises(UserError, match="config.train.wandb=a-project: No API key.* Use"):
        train.train(make_config(WANDB), str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = "wandb is not installed: install it with ./launch/setup.sh wandb"
    with pytest.raises(UserError, match=line):
        train.check(make_config(WANDB), str(tmp_path))  # before any text is read
    assert "compiled in" not in capsys.readouterr().out
