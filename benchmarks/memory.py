"""Compiles the train step for a chip that is not here, and prints what it needs; nothing is run.

  ./launch/setup.sh cuda          # or tpu
  ./launch/gpu.sh .venv/bin/python -m benchmarks.memory --target=h100 --latents 16 64 --batch 4 \
      --remat attention full

The true step: Gemma 2 2B, T 2048, M 128, A 16, bfloat16 with float32 master weights, AdamW, donated
state. `held` is the state and the frozen weights; `working` is what the compiler plans beside them.
"""

import itertools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import common
from configs import base
from latent_delib.delib import cost
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.delib.optimizer import make_optimizer
from latent_delib.delib.step import Objective, TrainState, train_step
from latent_delib.nn.attention.blocks import shared_memory_of
from latent_delib.nn.attention.choice import choose
from latent_delib.nn.layers import WHOLE
from latent_delib.nn.sizes import SIZES
from latent_delib.nn.transformer import REMAT, Transformer
from latent_delib.weights import folder

# What XLA asks a driver about a chip, for one that is not there.
DRIVER_SAYS = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: {core_memory}  shared_memory_per_block_optin: {block_memory}
  threads_per_core_limit: {threads}  core_count: {cores}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}  l2_cache_size: {cache}
  clock_rate_ghz: {clock}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 1 }}
device_description_str: "{name}"
"""


class Chip(NamedTuple):
    """Holds the fields of DRIVER_SAYS, from the makers' data sheets."""

    name: str
    major: int
    minor: int
    core_memory: int
    block_memory: int
    threads: int
    cores: int
    bandwidth: float
    cache: int
    clock: float
    memory: int


CHIPS = {
    "a100": Chip(
        "NVIDIA A100-SXM4-80GB", 8, 0, 167936, 166912, 2048, 108, 2039e9, 40 << 20, 1.41, 80 << 30
    ),
    "l4": Chip("NVIDIA L4", 8, 9, 102400, 101376, 1536, 58, 300e9, 48 << 20, 2.04, 24 << 30),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", 9, 0, 233472, 232448, 2048, 132, 3352.32e9, 50 << 20, 1.98,
        84929347584,
    ),
    "b200": Chip(
        "NVIDIA B200", 10, 0, 233472, 232448, 2048, 148, 8000e9, 126 << 20, 1.97, 180 << 30
    ),
    "rtx5090": Chip(
        "NVIDIA GeForce RTX 5090", 12, 0, 102400, 101376, 1536, 170, 1792e9, 96 << 20, 2.41,
        32 << 30,
    ),
}  # fmt: skip
TARGETS = dict.fromkeys(CHIPS, "cuda") | dict.fromkeys(("v5e", "v5p", "v6e"), "tpu")
T, M, A = 2048, 128, 16


def chip(target: str) -> NamedSharding:
    """Returns one device of a kind, which compiles and does not run."""
    # jax looks for plug-ins at the first use of a device.
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    if TARGETS[target] == "cuda":
        described = DRIVER_SAYS.format(**CHIPS[target]._asdict())
        found = topologies.get_topology_desc(
            "1x1x1", "cuda", target_config=described, topology="1x1x1"
        )
    else:
        shape = "2x2x1" if target == "v5p" else "2x2"
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{target}:{shape}")
    return NamedSharding(Mesh(np.array(found.devices[:1]), ("chip",)), PartitionSpec())


def compile_step(
    where: NamedSharding, size: str, L: int, B: int, remat: str, form: str
) -> dict[str, Any]:
    """Returns one row: seconds to compile, and GiB."""
    config, c, method = SIZES[size], base.get_config(), METHODS["cache_augmentation"]
    device = where.mesh.devices.flat[0]
    partition = WHOLE._replace(shared_memory=shared_memory_of(device))
    transformer = Transformer(config, remat, partition, choose(form, device, config, jnp.bfloat16))
    aug = Augmentation(transformer, "cache_augmentation", L)
    tx = make_optimizer(c.optimizer, c.train.steps).tx

    def start(key: jax.Array, decoder: Any) -> TrainState:
        tree = method.init(key, decoder, aug)
        tree = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        return TrainState(jnp.int32(0), tree, tx.init(tree))

    def here(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where), tree
        )

    decoder = folder.shapes(config)
    state = here(jax.eval_shape(start, jax.random.key(0), decoder))
    frozen = here({"decoder": decoder}, jnp.bfloat16)
    row = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where)
    objective = Objective(
        aug=aug,
        num_traces=M,
        num_ahead=A,
        dtype=jnp.bfloat16,
    )
    step = partial(train_step, objective=objective, tx=tx)
    began = time.perf_counter()
    step = jax.jit(step, donate_argnums=0)
    with jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh):  # jax 0.12 asks for its devices
        lowered = step.lower(state, frozen, {"tokens": row, "segment": row})
    memory = lowered.compile().memory_analysis()
    held, working = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    return {
        "latents": L,
        "batch": B,
        "form": transformer.form,
        "remat": remat,
        "compile_s": round(time.perf_counter() - began, 1),
        "held_gib": round(held, 2),
        "working_gib": round(working, 2),
        "needs_gib": round(held + working, 2),
        "tflop": round(cost.step_flops(aug, B, T, M, A).useful / 1e12, 1),
    }


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--target", default="h100", choices=TARGETS)
    parser.add_argument("--size", default="gemma2_2b", choices=SIZES)
    parser.add_argument("--latents", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--remat", nargs="+", default=["attention", "full"], choices=REMAT)
    parser.add_argument("--forms", nargs="+", default=["auto"])
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    where, rows = chip(a.target), []
    for L, B, remat, form in itertools.product(a.latents, a.batch, a.remat, a.forms):
        row = compile_step(where, a.size, L, B, remat, form)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"target": a.target, "size": a.size, "jax": jax.__version__, "rows": rows}
        a.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
