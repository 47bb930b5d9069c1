"""Compiles a job's step for this machine or for a TPU slice, and prints its needs.

The compiler for TPUs runs on any machine (`./launch/setup.sh tpu`). It reports the memory of the
same program that the slice would run, if the job has the same form of attention: for a slice that
is not attached, `auto` takes its kernel (`nn.attention.choice`).
"""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import topologies
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.errors import UserError, reason
from latent_delib.job import estimate, experiment, parameters
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.plan import Plan, gib
from latent_delib.machine import chips, files

# The compiler's words for too little memory: for a whole program, or for its temporaries alone.
OUT_OF_MEMORY = re.compile(
    r"(?:Used |temporaries \()([\d.]+\w)\)? (?:of|exceeds available HBM \()\s?([\d.]+\w)"
)


def dry_run(config: ConfigDict, workdir: str, topology: str = "") -> dict[str, Any]:
    """Compiles the step, prints its needs, and writes WORKDIR/dry_run.json; runs nothing.

    Args:
      topology: the TPU slice to compile for, in the form of `slice_of`; empty: this machine.

    Raises:
      UserError: a mistake in the config, an unknown topology, a workdir that cannot be written, or
        a program that does not fit.
    """
    exp = experiment.read(config, slice_of(topology) if topology else None)
    if exp.start:
        parameters.checked_start(exp)
    files.check_writable(workdir)
    plan = planning.make(exp)
    print(planning.summary(exp, plan), flush=True)
    began = time.perf_counter()
    compiled = compile_or_explain(exp, plan)
    result = {
        "topology": topology,
        "chip": exp.mesh.devices.flat[0].device_kind,
        "chips": exp.mesh.size,
        "mesh": dict(exp.mesh.shape),
        "attention": exp.aug.decoder.form,
        "compile_seconds": time.perf_counter() - began,
        **needs(exp, plan, compiled),
    }
    print(show(result), flush=True)
    total, limit = result["memory"]["total"], result["memory_limit"]
    if limit and total > limit:  # XLA compiles for GPUs what they cannot hold
        raise does_not_fit(gib(total), gib(limit))
    print(note_on_attention(result["attention"], config, topology), end="", flush=True)
    text = json.dumps(result | {"config": exp.record.config}, indent=2)
    files.write(epath.Path(workdir) / "dry_run.json", f"{text}\n".encode())
    return result


def slice_of(topology: str) -> Sequence[Any]:
    """Returns the devices of TPU slices, to compile for; this machine need not have them.

    A device is a chip. On a TPU7x it is half a chip.

    Args:
      topology: the generation, and the number of chips along each axis of the torus: "v5e:4x4",
        "v5p:4x4x4", "v6e:16x16", "tpu7x:2x2x1". The number of several slices comes first:
        "2*v5e:4x4".
    """
    form = re.fullmatch(r"(?:([1-9]\d*)\*)?((?:v|tpu)\d\w*:\d+(?:x\d+){1,2})", topology)
    if form is None:
        raise UserError(
            f"--topology={topology}: expected a form like v5e:4x4, tpu7x:2x2x1 or 2*v6e:16x16"
        )
    count, name = form.groups()
    options: dict[str, Any] = {"num_slices": int(count)} if count else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores are one device, as on Cloud TPU
    # does not ask a metadata server which slice this machine is in
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several dry runs at once
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    jax.config.update("jax_platforms", "cpu")  # for this process; libtpu only compiles
    jax.devices()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # jax and libtpu raise several kinds
        hint = "no such slice, or libtpu is missing (./launch/setup.sh tpu)"
        raise UserError(f"--topology={topology}: {hint}: {reason(error)}") from None


def compile_or_explain(exp: Experiment, plan: Plan) -> jax.stages.Compiled:
    """Compiles the step. Raises UserError where it needs more memory than a chip has."""
    try:
        return planning.compile_step(exp, plan)
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        raise does_not_fit(f"{found[1]}iB", f"{found[2]}iB") from None


def does_not_fit(needed: str, limit: str) -> UserError:
    """Returns the error for a program that needs more memory than a chip has."""
    return UserError(
        f"does not fit: a chip needs {needed} of {limit}; split the batch "
        "(config.train.accumulation), shard more (config.mesh.fsdp, mesh.traces), "
        "keep less (config.compute.remat=full), train less (config.method.lora_rank) or take more "
        "chips; --search tries the first three"
    )


def memory_of(chip: Any) -> float | None:
    """Returns the bytes that a program can use on a chip; None where not known.

    A GPU of another machine has as many as the first one here.
    """
    known = chips.chip_of(chip).memory
    if known is None and chip.platform == "gpu":
        known = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return known


def needs(exp: Experiment, plan: Plan, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Returns the resources that a compiled step needs on one chip.

    Returns:
      memory: part -> bytes, with the total.
      memory_limit: as `memory_of` returns it.
      flops: part -> number of FLOPs.
    """
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = held(exp, plan)
    memory["other temporaries"] = total - sum(memory.values())
    memory["total"] = total
    return {
        "memory": memory,
        "memory_limit": memory_of(exp.mesh.devices.flat[0]),
        "flops": estimate.device_flops(exp),
    }


def held(exp: Experiment, plan: Plan) -> dict[str, float]:
    """Returns the bytes on one chip that follow from shapes and shardings, by part."""
    t = exp.config.train
    itemsize = jnp.dtype(exp.dtype).itemsize
    trainable = _per_chip(plan.state.trainable)
    gradients = 2 * _per_chip(plan.state.trainable, exp.dtype)
    if t.accumulation > 1:  # float32 sums of the gradients
        gradients += trainable
    gathered = 0.0
    cache = 0.0
    for reader, model in exp.aug.readers.items():
        a = model.config
        table = (plan.frozen or plan.state.trainable)[reader]["embedding"]
        vocabulary, width = table.sharding.shard_shape(table.shape)
        if width < table.shape[1]:
            gathered += vocabulary * table.shape[1] * itemsize
        if exp.aug.writes_latents:
            rows = t.batch_size // t.accumulation / mesh_lib.shards(exp.mesh, "batch")  # per chip
            entries = rows * exp.config.data.seq_len * a.num_kv_heads * a.head_dim
            cache += 2 * a.num_layers * entries * itemsize / mesh_lib.shards(exp.mesh, "heads")
    return {
        "frozen weights": _per_chip(plan.frozen),
        "trainable weights": trainable,
        "optimizer": _per_chip(plan.state.opt_state),
        "gradients, and weights cast": gradients,
        "token table, gathered": gathered,
        "cache of the text": cache,
    }


def note_on_attention(form: str, config: ConfigDict, topology: str) -> str:
    """Returns a line on the form of attention that was compiled for a slice; "" if none is due."""
    if not topology or form == "xla" or config.compute.attention != "auto":
        return ""
    return (
        f"compiled with attention {form}: with config.compute.attention=auto a job uses {form} "
        "only on chips where it has passed its check, and xla on others; to get this program, set "
        f"config.compute.attention={form}\n"
    )


def _per_chip(tree: Any, dtype: Any = None) -> float:
    """Returns the bytes on one chip of a tree that carries shardings, in `dtype` where given."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        itemsize = jnp.dtype(dtype or leaf.dtype).itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize
    return total


def show(result: dict[str, Any]) -> str:
    """Returns the result in plain text."""
    chips = f"{result['chips']} x {result['chip']}"
    lines = [f"compiled in {result['compile_seconds']:.1f} s; on each of {chips}:"]
    for part, size in result["memory"].items():
        lines.append(f"  memory    {part:<28} {gib(size):>12}")
    if result["memory_limit"]:
        lines[-1] += f" of {gib(result['memory_limit'])}"
    for part, count in result["flops"].items():
        lines.append(f"  compute   {part:<28} {count / 1e12:>7.1f} TFLOP")
    lines.append(
        "bytes moved between chips, and estimates of time: "
        "python -m benchmarks.scaling, docs/scaling.md"
    )
    return "\n".join(lines)
