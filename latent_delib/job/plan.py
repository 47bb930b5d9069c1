"""Plans a training job before any array is made: shapes, shardings, and the step over them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from latent_delib import mesh as mesh_lib
from latent_delib.delib.optimizer import Optimizer, make_optimizer
from latent_delib.delib.step import Objective, TrainState, train_step
from latent_delib.errors import UserError
from latent_delib.job import parameters
from latent_delib.job.experiment import Experiment
from latent_delib.job.words import settings_in_words
from latent_delib.nn.transformer import Params


class Plan(NamedTuple):
    """Holds a job's step, and the shapes of all that it takes.

    state, frozen, batch: trees of jax.ShapeDtypeStruct with shardings; nothing else decides on
      which devices an array is.
    optimizer: the optimizer and the learning rate that it uses.
    step: jitted (state, frozen, batch) -> (state, metrics); the state is donated.
    """

    state: TrainState
    frozen: Params
    batch: dict[str, jax.ShapeDtypeStruct]
    optimizer: Optimizer
    step: Any


def make(exp: Experiment) -> Plan:
    """Plans the job of a config on its mesh.

    Raises:
      UserError: the mesh does not divide a dimension, or the rows of each part of a batch.
    """
    c = exp.config
    split = mesh_lib.shards(exp.mesh, "batch")
    if (c.train.batch_size // c.train.accumulation) % split:
        raise UserError(
            f"config.train.batch_size={c.train.batch_size} in {c.train.accumulation} parts "
            f"does not split over {mesh_lib.setting(exp.mesh, 'batch')}: "
            f"expected a multiple of {c.train.accumulation * split}"
        )
    optimizer = make_optimizer(c.optimizer, c.train.steps)
    trainable = parameters.trainable_on_mesh(exp)
    whole = mesh_lib.replicated(exp.mesh)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        trainable,
        mesh_lib.optimizer_state(exp.mesh, optimizer.tx, trainable),
    )
    row = jax.ShapeDtypeStruct(
        (c.train.batch_size, c.data.seq_len), jnp.int32, sharding=mesh_lib.rows(exp.mesh)
    )
    step = partial(
        train_step,
        objective=objective(exp),
        tx=optimizer.tx,
        skip_bad=c.train.max_bad_steps > 0,
    )
    return Plan(
        state=state,
        frozen={} if exp.trains_whole_decoder else parameters.frozen_on_mesh(exp),
        batch={"tokens": row, "segment": row},
        optimizer=optimizer,
        step=jax.jit(step, out_shardings=(shardings_of(state), whole), donate_argnums=0),
    )


def objective(exp: Experiment) -> Objective:
    """Returns the loss that the job's config names."""
    c = exp.config
    return Objective(
        aug=exp.aug,
        num_traces=c.method.num_traces,
        num_ahead=c.method.num_ahead,
        dtype=exp.dtype,
        seed=c.seed,
        accumulation=c.train.accumulation,
        max_delay=c.method.max_delay,
        prompt_end=exp.prompt_end,
        steps_end=exp.steps_end,
    )


def compile_step(exp: Experiment, plan: Plan) -> jax.stages.Compiled:
    """Compiles the step for the devices of the mesh.

    Raises:
      UserError: as `check_dtype`.
    """
    check_dtype(exp)
    return plan.step.lower(plan.state, plan.frozen, plan.batch).compile()


def check_dtype(exp: Experiment) -> None:
    """Raises UserError for bfloat16 on CPUs with a tensor axis among others: XLA aborts on it."""
    heads = mesh_lib.shards(exp.mesh, "heads")
    on_cpus = exp.mesh.devices.flat[0].platform == "cpu"
    if on_cpus and exp.dtype == jnp.bfloat16 and exp.mesh.size > heads > 1:
        setting = mesh_lib.setting(exp.mesh, "heads")
        raise UserError(
            f"config.compute.dtype=bfloat16 with {setting}: XLA's compiler for CPUs aborts on it; "
            "expected float32, or config.mesh.tensor=1"
        )


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of every leaf."""
    return jax.tree.map(lambda x: x.sharding, tree)


def count(tree: Any) -> int:
    """Returns the number of elements of all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Returns the bytes of all leaves, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def summary(exp: Experiment, plan: Plan) -> str:
    """Returns the lines that a job prints first: its shapes, and each parameter's sharding."""
    trainable = plan.state.trainable
    kind = exp.mesh.devices.flat[0].device_kind
    lines = [
        f"method {exp.config.method.name}: {_shapes(exp)}",
        f"decoder {exp.decoder_folder or 'random'} [{exp.record.fingerprint[:12]}]",
        f"parameters: {count(plan.frozen):,} frozen ({gib(size(plan.frozen))}), "
        f"{count(trainable):,} trainable ({gib(size(trainable))} + "
        f"optimizer {gib(size(plan.state.opt_state))}), over all devices",
        f"devices: {exp.mesh.size} x {kind}, mesh {dict(exp.mesh.shape)}",
        "trainable parameters and their shardings; their optimizer moments have the same:",
        mesh_lib.table(trainable),
    ]
    if exp.assistant_folder is not None:
        lines.insert(2, f"assistant {exp.assistant_folder} [{exp.record['method.assistant'][:12]}]")
    if plan.frozen:
        lines += ["frozen parameters and their shardings:", mesh_lib.table(plan.frozen)]
    return "\n".join(lines)


def _shapes(exp: Experiment) -> str:
    """Returns one line: the sizes of a step, by the axis letters, and its settings."""
    c = exp.config
    m = c.method
    sizes = f"B {c.train.batch_size} T {c.data.seq_len}"
    if exp.aug.writes_latents:
        sizes += f" M {m.num_traces} L {m.num_latents} A {m.num_ahead}"
    parts = [sizes, *settings_in_words(m.to_dict())]
    if c.train.accumulation > 1:
        parts.append(f"in {c.train.accumulation} parts")
    parts.append(c.compute.dtype)
    parts.append(f"attention {exp.aug.decoder.form}")
    parts.append(f"remat {c.compute.remat}")
    return ", ".join(parts)
