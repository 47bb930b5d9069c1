"""Compiles a training step once per process, which is most of what a tiny job does."""

import contextlib
import copy
import json
from collections.abc import Iterator

import jax
import pytest

from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment

COMPILED: dict[tuple, jax.stages.Compiled] = {}
# Keys of the config that are not in the program.
OUTSIDE = {
    "data": ("sources", "weights", "validation", "token_files", "max_bad_records"),
    "train": (
        "log_every",
        "validate_every",
        "wandb",
        "checkpoint_every",
        "keep",
        "keep_every",
        "keep_best",
        "profile_at",
        "max_bad_steps",
    ),
    "method": ("start",),
}


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Lets jobs inside share the steps that are the same program."""
    compile_step = planning.compile_step

    def shared(exp: Experiment, plan: planning.Plan) -> jax.stages.Compiled:
        key = (program(exp), planning.train_step)
        if key not in COMPILED:
            COMPILED[key] = compile_step(exp, plan)
        return COMPILED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "compile_step", shared)
        yield


def program(exp: Experiment) -> str:
    """Returns what a job's step depends on, as text."""
    config = copy.deepcopy(exp.record.config)
    del config["evaluate"], config["decoder"]
    for room, names in OUTSIDE.items():
        for name in names:
            del config[room][name]
    skips = exp.config.train.max_bad_steps > 0
    return json.dumps(
        [config, exp.record.architecture, exp.adapts_start, skips, str(exp.mesh)], sort_keys=True
    )
