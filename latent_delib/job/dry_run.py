"""Compiles a job's step for this machine or for a TPU slice, and says what it would need, before any of it is paid for.

The compiler for TPUs runs on any machine (`LATENT_DELIB_EXTRAS=tpu ./launch/setup.sh`): memory and collectives are
those of the program that the slice would run. Times are estimates.
"""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import topologies
from ml_collections import ConfigDict

from latent_delib import mesh as mesh_lib
from latent_delib.delib import cost, flops
from latent_delib.errors import UserError
from latent_delib.job import collectives, experiment
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.plan import Plan, gib
from latent_delib.machine import files


class Chip(NamedTuple):
    """Holds what the makers' pages say of a chip.

    memory: GiB that a program can use, as the compiler has it.
    bandwidth: of that memory, bytes per second.
    links: bytes per second that a chip receives over all its links to other chips.
    """

    memory: float
    bandwidth: float
    links: float


# cloud.google.com/tpu/docs: v5e, v5p, v6e.
CHIPS = {
    "TPU v5 lite": Chip(15.75, 819e9, 200e9),
    "TPU v5": Chip(95.74, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.25, 1640e9, 448e9),
}
# A step reaches half of the peak: an assumption, not measured on any chip.
PEAK_SHARE = 0.5
# A collective has half of the links: rings use some directions only, and small slices have no wrap-around.
LINK_SHARE = 0.5
# The compiler's words for too little memory: for a whole program, or for its temporaries alone.
OUT_OF_MEMORY = re.compile(r"(?:Used |temporaries \()([\d.]+\w)\)? (?:of|exceeds available HBM \()\s?([\d.]+\w)")


def dry_run(config: ConfigDict, workdir: str, topology: str = "") -> dict[str, Any]:
    """Compiles the step, prints what it needs, and writes the same to WORKDIR/dry_run.json; nothing is run.

    Args:
      topology: the TPU slice to compile for, as `slice_of` takes it; this machine's devices where it is empty.

    Raises:
      UserError: a mistake in the config; a topology that does not exist; a program that does not fit.
    """
    exp = experiment.read(config, slice_of(topology) if topology else None)
    plan = planning.make(exp)
    print(planning.summary(exp, plan), flush=True)
    result = {
        "topology": topology,
        "chip": exp.mesh.devices.flat[0].device_kind,
        "chips": exp.mesh.size,
        "mesh": dict(exp.mesh.shape),
        **needs(exp, plan),
    }
    print(show(result), flush=True)
    text = json.dumps(result | {"config": exp.record.config}, indent=2)
    files.write(epath.Path(workdir) / "dry_run.json", f"{text}\n".encode())
    return result


def slice_of(topology: str) -> Sequence[Any]:
    """Returns the devices of a TPU slice that is not here: they compile and do not run.

    Args:
      topology: generation and chips along each axis of the torus, "v5e:4x4", "v5p:4x4x4", "v6e:16x16".
    """
    if not re.fullmatch(r"v\w+:\d+(x\d+){1,2}", topology):
        raise UserError(f"--topology={topology}: expected a form like v5e:4x4, v5p:4x4x4 or v6e:16x16")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no metadata server for the slice this machine is in
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several dry runs at once
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    jax.config.update("jax_platforms", "cpu")  # arrays of this process; libtpu only compiles
    jax.devices()
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jax and libtpu raise several kinds
        hint = "no such slice, or libtpu is missing (LATENT_DELIB_EXTRAS=tpu ./launch/setup.sh)"
        raise UserError(f"--topology={topology}: {hint}: {' '.join(str(error).split())[:300]}") from None


def needs(exp: Experiment, plan: Plan) -> dict[str, Any]:
    """Compiles the step; returns what one chip needs for it, and the estimates that follow where the chip is known.

    Returns:
      compile_seconds; memory: part -> bytes; flops: part -> number; received: kind of collective -> calls and bytes;
      and the keys of `estimate`.
    """
    began = time.perf_counter()
    compiled = _compile(exp, plan)
    result = {
        "compile_seconds": time.perf_counter() - began,
        "memory": _memory(exp, plan, compiled),
        "flops": _flops(exp),
        "received": {kind: traffic._asdict() for kind, traffic in collectives.collectives(compiled.as_text()).items()},
    }
    chip = CHIPS.get(exp.mesh.devices.flat[0].device_kind)
    if chip is not None:
        result |= estimate(exp, plan, result, chip)
    return result


def _compile(exp: Experiment, plan: Plan) -> jax.stages.Compiled:
    try:
        return planning.compile_step(exp, plan)
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"does not fit: a chip needs {found[1]}iB of {found[2]}iB; split the batch (config.train.accumulation), "
            "shard more (config.mesh.fsdp, mesh.traces), keep less (config.compute.remat=full) or take more chips"
        ) from None


def _memory(exp: Experiment, plan: Plan, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Returns bytes on one chip: the parts that are known, the rest of what the program plans, and the total."""
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    parts = held(exp, plan)
    return parts | {"other temporaries": total - sum(parts.values()), "total": total}


def held(exp: Experiment, plan: Plan) -> dict[str, float]:
    """Returns the bytes on one chip that follow from shapes and shardings, by part."""
    a = exp.aug.transformer.config
    itemsize = jnp.dtype(exp.dtype).itemsize
    trainable = per_chip(plan.state.trainable)
    gradients = 2 * per_chip(plan.state.trainable, exp.dtype)
    if exp.config.train.accumulation > 1:  # their float32 sums
        gradients += trainable
    table = (plan.frozen or plan.state.trainable)["decoder"]["embedding"]
    vocabulary, width = table.sharding.shard_shape(table.shape)
    is_split = width < table.shape[1]
    cache = 2 * a.num_layers * _rows_at_once(exp) * exp.config.data.seq_len * a.num_kv_heads * a.head_dim * itemsize
    return {
        "frozen weights": per_chip(plan.frozen),
        "trainable weights": trainable,
        "optimizer": per_chip(plan.state.opt_state),
        "gradients, and weights cast": gradients,
        "token table, gathered": vocabulary * table.shape[1] * itemsize if is_split else 0.0,
        "cache of the text": cache / mesh_lib.shards(exp.mesh, "heads") if exp.aug.has_latents else 0.0,
    }


def per_chip(tree: Any, dtype: Any = None) -> float:
    """Returns the bytes on one chip of a tree that carries shardings, in `dtype` where given."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        itemsize = jnp.dtype(dtype or leaf.dtype).itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize
    return total


def _rows_at_once(exp: Experiment) -> float:
    """Returns how many rows a chip has in work at once."""
    t = exp.config.train
    return t.batch_size // t.accumulation / mesh_lib.shards(exp.mesh, "batch")


def _flops(exp: Experiment) -> dict[str, float]:
    """Returns the FLOPs of one chip per step: those the method needs, and those done again."""
    c = exp.config
    rows = c.train.batch_size
    length = c.data.seq_len
    step = (exp.aug, rows, length, c.method.num_traces, c.method.num_ahead)
    useful, again = cost.step_flops(*step)
    again += (mesh_lib.shards(exp.mesh, "traces") - 1) * flops.text(exp.aug.transformer.config, rows * length, length)
    return {"useful": useful / exp.mesh.size, "done again": again / exp.mesh.size}


def estimate(exp: Experiment, plan: Plan, found: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """Estimates the time per step, the utilisation, and the largest batch that fits.

    Args:
      found: memory, flops and received, as `needs` has them.
    """
    peak = cost.PEAK[exp.mesh.devices.flat[0].device_kind]
    compute = sum(found["flops"].values()) / (PEAK_SHARE * peak)
    received = sum(traffic["received"] for traffic in found["received"].values())
    links = received / (LINK_SHARE * chip.links)
    # Gradients, master weights and both moments are read, the last three written.
    update = 7 * per_chip(plan.state.trainable, jnp.float32) / chip.bandwidth
    step = max(compute, links) + update

    # Whatever is not weights, gradients or table grows in proportion to the rows.
    memory = found["memory"]
    rows = _rows_at_once(exp)
    grows = memory["cache of the text"] + max(memory["other temporaries"], 0)
    limit = chip.memory * 2**30
    fit = (limit - memory["total"] + grows) / (grows / rows)
    return {
        "memory_limit": limit,
        "seconds": {"compute": compute, "links": links, "update": update, "step": step},
        "model_flops_utilisation": found["flops"]["useful"] / step / peak,
        "largest_rows": max(int(fit), int(rows)),
    }


def show(result: dict[str, Any]) -> str:
    """Returns the result in plain text."""
    lines = [f"compiled in {result['compile_seconds']:.1f} s; on each of {result['chips']} x {result['chip']}:"]
    for part, size in result["memory"].items():
        lines.append(f"  memory    {part:<28} {gib(size):>12}")
    if "memory_limit" in result:
        lines[-1] += f" of {gib(result['memory_limit'])}"
    for part, count in result["flops"].items():
        lines.append(f"  compute   {part:<28} {count / 1e12:>7.1f} TFLOP")
    for kind, traffic in result["received"].items():
        lines.append(f"  received  {kind:<28} {gib(traffic['received']):>12} in {traffic['calls']} calls")
    if "seconds" in result:
        seconds = {name: f"{value:.2f} s" for name, value in result["seconds"].items()}
        lines += [
            f"estimate: {seconds['step']} per step, {result['model_flops_utilisation']:.1%} MFU: longer of compute, "
            f"{seconds['compute']} at {PEAK_SHARE:.0%} of peak, and links, {seconds['links']} at {LINK_SHARE:.0%}; "
            f"then the update, {seconds['update']}",
            f"largest batch by proportion: {result['largest_rows']} rows per chip at once",
        ]
    return "\n".join(lines)
