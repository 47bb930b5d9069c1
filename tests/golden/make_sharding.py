"""Where every array of the published settings lies: golden tables of both Gemma 2 sizes.

python -m tests.golden.make_sharding        writes sharding_gemma2_2b.txt and sharding_gemma2_9b.txt
"""

import importlib
from pathlib import Path

import jax

from latent_delib import mesh as mesh_lib
from latent_delib.job import experiment
from latent_delib.job import plan as planning

NAMES = ("gemma2_2b", "gemma2_9b")


def path(name: str) -> Path:
    return Path(__file__).with_name(f"sharding_{name}.txt")


def table(name: str) -> str:
    """One line for each leaf of state, frozen weights and batch, on a mesh that has every axis."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.mesh.update({"data": 1, "fsdp": 2, "traces": 2, "tensor": 2})
    plan = planning.make(experiment.read(config))
    return (
        mesh_lib.table({"state": plan.state._asdict(), "frozen": plan.frozen, "batch": plan.batch})
        + "\n"
    )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for name in NAMES:
        path(name).write_text(table(name))
