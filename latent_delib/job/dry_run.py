"""What a job would need, before any of it is paid for: its true step compiled, for this machine or for a TPU slice.

The compiler for TPUs runs on any machine (`LATENT_DELIB_EXTRAS=tpu ./launch/setup.sh`): memory and collectives are
those of the program that the slice would run. Times are estimates, and say from what.
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

from latent_delib.delib import cost
from latent_delib.errors import UserError
from latent_delib.job import collectives, experiment
from latent_delib.job import plan as planning
from latent_delib.job.experiment import Experiment
from latent_delib.job.plan import Plan, gib
from latent_delib.machine import files


class Chip(NamedTuple):
    """memory: GiB that a program can use, as the compiler has it. bandwidth: of that memory, bytes/s.
    links: bytes/s that a chip receives over all its links to other chips."""

    memory: float
    bandwidth: float
    links: float


# cloud.google.com/tpu/docs: v5e, v5p, v6e.
CHIPS = {
    "TPU v5 lite": Chip(15.75, 819e9, 200e9),
    "TPU v5": Chip(95.74, 2765e9, 600e9),
    "TPU v6 lite": Chip(31.25, 1640e9, 448e9),
}
# Of the peak a step reaches half: an assumption, no chip was at hand to measure it on.
# Of the links a collective has half: rings use some directions only, and small slices have no wrap-around.
PEAK_SHARE, LINK_SHARE = 0.5, 0.5
# How the compiler says so: of a whole program, or of its temporaries alone.
OUT_OF_MEMORY = re.compile(r"(?:Used |temporaries \()([\d.]+\w)\)? (?:of|exceeds available HBM \()\s?([\d.]+\w)")


def dry_run(config: ConfigDict, workdir: str, topology: str = "") -> dict[str, Any]:
    """Compiles the step, prints what it needs, and writes the same as WORKDIR/dry_run.json; nothing is run.

    Raises:
      UserError: a mistake in the config; a topology that does not exist; a program that does not fit.
    """
    exp = experiment.read(config, slice_of(topology) if topology else None)
    plan = planning.make(exp)
    print(planning.summary(exp, plan), flush=True)
    result = {"topology": topology, "chip": exp.mesh.devices.flat[0].device_kind, "chips": exp.mesh.size}
    result |= {"mesh": dict(exp.mesh.shape)} | needs(exp, plan)
    print(show(result), flush=True)
    text = json.dumps(result | {"config": _plain(config)}, indent=2)
    files.write(epath.Path(workdir) / "dry_run.json", f"{text}\n".encode())
    return result


def slice_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice that is not here: they compile and do not run.

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
    """Compiles; memory in bytes, FLOPs and traffic of one chip, and what follows from them."""
    c, aug, chip = exp.config, exp.aug, CHIPS.get(exp.mesh.devices.flat[0].device_kind)
    began = time.perf_counter()
    try:
        compiled = planning.compile_step(exp, plan)
    except jax.errors.JaxRuntimeError as error:
        if not (found := OUT_OF_MEMORY.search(str(error))):
            raise
        raise UserError(
            f"does not fit: a chip needs {found[1]}iB of {found[2]}iB; split the batch (config.train.accumulation), "
            "shard more (config.mesh.fsdp, mesh.traces), keep less (config.compute.remat=full) or take more chips"
        ) from None
    result: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    memory = compiled.memory_analysis()
    parts = held(exp, plan)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    result["memory"] = parts | {"other temporaries": total - sum(parts.values()), "total": total}

    shape = c.data.seq_len, c.method.num_traces, c.method.num_ahead
    useful = cost.train_step_flops(aug, c.train.batch_size, *shape) / exp.mesh.size
    again = cost.repeated_flops(aug, c.train.batch_size, *shape) / exp.mesh.size
    again += (exp.mesh.shape["traces"] - 1) * cost.text_flops(aug, c.train.batch_size, shape[0]) / exp.mesh.size
    result["flops"] = {"useful": useful, "done again": again}
    result["received"] = {
        kind: traffic._asdict() for kind, traffic in collectives.collectives(compiled.as_text()).items()
    }
    if chip is not None:
        result |= estimate(exp, plan, result, chip)
    return result


def per_chip(tree: Any, dtype: Any = None) -> float:
    """Bytes on one chip of a tree that carries shardings, in `dtype` where given."""
    width = None if dtype is None else jnp.dtype(dtype).itemsize
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * (width or x.dtype.itemsize) for x in jax.tree.leaves(tree))


def held(exp: Experiment, plan: Plan) -> dict[str, float]:
    """Bytes on one chip that follow from shapes and shardings, by part."""
    c, a, mesh = exp.config, exp.aug.transformer.config, exp.mesh.shape
    rows = c.train.batch_size // c.train.accumulation / (mesh["data"] * mesh["fsdp"])
    width = jnp.dtype(exp.dtype).itemsize
    cache = 2 * a.num_layers * rows * c.data.seq_len * a.num_kv_heads * a.head_dim * width / mesh["tensor"]
    return {
        "frozen weights": per_chip(plan.frozen),
        "trainable weights": per_chip(plan.state.trainable),
        "optimizer": per_chip(plan.state.opt_state),
        "gradients, and weights cast": per_chip(plan.state.trainable, exp.dtype) * 2
        + (per_chip(plan.state.trainable) if c.train.accumulation > 1 else 0),
        "token table, gathered": (mesh["fsdp"] * mesh["traces"] > 1)
        * a.vocab_size
        * a.embed_dim
        * width
        / mesh["tensor"],
        "cache of the text": cache if exp.aug.has_latents else 0.0,
    }


def estimate(exp: Experiment, plan: Plan, found: dict[str, Any], chip: Chip) -> dict[str, Any]:
    """Seconds a step, utilisation, and the largest batch that fits."""
    c, peak = exp.config, cost.PEAK[exp.mesh.devices.flat[0].device_kind]
    compute = sum(found["flops"].values()) / (PEAK_SHARE * peak)
    links = sum(traffic["received"] for traffic in found["received"].values()) / (LINK_SHARE * chip.links)
    # Gradients, master weights and both moments are read, the last three written.
    update = 7 * per_chip(plan.state.trainable, jnp.float32) / chip.bandwidth
    step = max(compute, links) + update
    rows = c.train.batch_size // c.train.accumulation / (exp.mesh.shape["data"] * exp.mesh.shape["fsdp"])
    memory = found["memory"]
    of_rows = memory["cache of the text"] + max(memory["other temporaries"], 0)
    free = chip.memory * 2**30 - memory["total"] + of_rows
    return {
        "memory_limit": chip.memory * 2**30,
        "seconds": {"compute": compute, "links": links, "update": update, "step": step},
        "model_flops_utilisation": found["flops"]["useful"] / step / peak,
        "largest_rows": max(int(free / (of_rows / rows)), int(rows)),
    }


def show(result: dict[str, Any]) -> str:
    """The result in plain text."""
    lines = [f"compiled in {result['compile_seconds']:.1f} s; on each of {result['chips']} x {result['chip']}:"]
    limit = f" of {gib(result['memory_limit'])}" if "memory_limit" in result else ""
    for part, size in result["memory"].items():
        lines.append(f"  memory    {part:<28} {gib(size):>12}{limit if part == 'total' else ''}")
    for part, count in result["flops"].items():
        lines.append(f"  compute   {part:<28} {count / 1e12:>7.1f} TFLOP")
    for kind, traffic in result["received"].items():
        lines.append(f"  received  {kind:<28} {gib(traffic['received']):>12} in {traffic['calls']} calls")
    if "seconds" in result:
        seconds = {name: f"{value:.2f} s" for name, value in result["seconds"].items()}
        lines += [
            f"estimate: {seconds['step']} a step, {result['model_flops_utilisation']:.1%} MFU: longer of compute, "
            f"{seconds['compute']} at {PEAK_SHARE:.0%} of peak, and links, {seconds['links']} at {LINK_SHARE:.0%}; "
            f"then the update, {seconds['update']}",
            f"largest batch by proportion: {result['largest_rows']} rows on a chip at once",
        ]
    return "\n".join(lines)


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())
