"""What a training job is before anything is materialised: shapes, where every leaf lies, and the step over them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_delib import mesh as mesh_lib
from latent_delib.delib.step import TrainState, make_optimizer, train_step
from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.job.experiment import Experiment, placed
from latent_delib.nn.layers import PARAM_AXES
from latent_delib.nn.transformer import Params
from latent_delib.weights import folder


class Plan(NamedTuple):
    """A job's step, and what it takes.

    state, frozen, batch: trees of jax.ShapeDtypeStruct that carry shardings; nothing else decides where an array lies.
    tx: the optimizer.
    step: jitted (state, frozen, batch) -> (state, metrics); the state is donated.
    """

    state: TrainState
    frozen: Params
    batch: dict[str, jax.ShapeDtypeStruct]
    tx: optax.GradientTransformation
    step: Any


def make(exp: Experiment) -> Plan:
    """Plans the job of a config on its mesh.

    Raises:
      UserError: a dimension that the mesh does not divide.
    """
    c, mesh = exp.config, exp.mesh
    if (c.train.batch_size // c.train.accumulation) % mesh_lib.row_shards(mesh):
        raise UserError(
            f"config.train.batch_size={c.train.batch_size} in {c.train.accumulation} parts does not split over the "
            f"mesh, data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}: expected a multiple of "
            f"{c.train.accumulation * mesh_lib.row_shards(mesh)}"
        )
    tx, trainable = make_optimizer(c.optimizer, c.train.steps).tx, experiment.trainable_shapes(exp)
    whole = mesh_lib.replicated(mesh)
    opt_state = mesh_lib.optimizer_state(mesh, tx, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), trainable, opt_state)
    frozen = {}
    if "embedding" not in trainable.get("decoder", {}):  # the decoder is not trained as a whole
        decoder = folder.shapes(exp.aug.transformer.config)
        shardings = mesh_lib.parameters(mesh, decoder, PARAM_AXES)
        frozen = {"decoder": placed(decoder, shardings, exp.dtype)}
    if exp.start and c.method.lora_rank:
        start = experiment.start_shapes(exp)
        frozen["coprocessor"] = placed(start, shardings_of(start), exp.dtype)
    row = jax.ShapeDtypeStruct((c.train.batch_size, c.data.seq_len), jnp.int32, sharding=mesh_lib.rows(mesh))
    step = partial(
        train_step,
        aug=exp.aug,
        tx=tx,
        seed=c.seed,
        num_traces=c.method.num_traces,
        num_ahead=c.method.num_ahead,
        max_delay=c.method.max_delay,
        accumulation=c.train.accumulation,
        dtype=exp.dtype,
        skip_bad=c.train.max_bad_steps > 0,
    )
    jitted = jax.jit(step, out_shardings=(shardings_of(state), whole), donate_argnums=0)
    return Plan(state, frozen, {"tokens": row, "segment": row}, tx, jitted)


def compile_step(exp: Experiment, plan: Plan) -> jax.stages.Compiled:
    """Compiles the step for the devices of the mesh.

    Raises:
      UserError: bfloat16 on CPUs with a tensor axis beside others, where XLA would abort the process.
    """
    tensor = exp.mesh.shape["tensor"]
    on_cpus = exp.mesh.devices.flat[0].platform == "cpu"
    if on_cpus and exp.dtype == jnp.bfloat16 and exp.mesh.size > tensor > 1:
        raise UserError(
            f"config.compute.dtype=bfloat16 with config.mesh.tensor={tensor}: XLA's compiler for CPUs aborts on it; "
            "on CPUs expected float32, or config.mesh.tensor=1"
        )
    return plan.step.lower(plan.state, plan.frozen, plan.batch).compile()


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def count(tree: Any) -> int:
    """Elements of all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Bytes of all leaves, over all devices."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def summary(exp: Experiment, plan: Plan) -> str:
    """What is about to run, and where every parameter lies."""
    c, m, state = exp.config, exp.config.method, plan.state
    shapes = f"B {c.train.batch_size} T {c.data.seq_len}"
    if exp.aug.has_latents:
        shapes += f" M {m.num_traces} L {m.num_latents} A {m.num_ahead}, placement {m.placement}"
        shapes += f", delays up to {m.max_delay}" if m.max_delay else ""
    if m.lora_rank:
        shapes += f", adapters of rank {m.lora_rank}"
    if c.train.accumulation > 1:
        shapes += f", in {c.train.accumulation} parts"
    lines = [
        f"method {m.name}: {shapes}, {c.compute.dtype}, attention {exp.aug.transformer.form}, remat {c.compute.remat}",
        f"decoder {exp.decoder or 'random'} [{exp.fingerprint[:12]}]",
        f"parameters: {count(plan.frozen):,} frozen ({gib(size(plan.frozen))}), {count(state.trainable):,} trainable "
        f"({gib(size(state.trainable))} + optimizer {gib(size(state.opt_state))}), over all devices",
        f"devices: {exp.mesh.size} x {exp.mesh.devices.flat[0].device_kind}, mesh {dict(exp.mesh.shape)}",
        f"trainable parameters and where they lie, each with its optimizer moments:\n{mesh_lib.table(state.trainable)}",
    ]
    if plan.frozen:
        lines.append(f"frozen parameters and where they lie:\n{mesh_lib.table(plan.frozen)}")
    return "\n".join(lines)
