"""NVIDIA's chips: the shared memory of each, and the blocks that fit into it."""

from typing import Any, NamedTuple

import jax.numpy as jnp

# Bytes of shared memory that one program may have, on these chips and by compute capability (CUDA
# programming guide). Every chip that runs the kernels has at least LEAST.
H100, A100, L4 = 227 * 1024, 163 * 1024, 99 * 1024
SHARED_MEMORY = {
    "8.0": A100,
    "8.6": L4,
    "8.7": A100,
    "8.9": L4,
    "9.0": H100,
    "10.0": H100,
    "12.0": L4,
}
LEAST = L4


class Blocks(NamedTuple):
    """Holds the block sizes of a kernel.

    rows, keys: number per block.
    warps: number per program.
    stages: number of stages of the load pipeline.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# Blocks by head dim, and by the shared memory that they need, the largest first. XLA can compile
# each of them for a chip with this much. Compiled for an H100, none spills registers, and products
# overlap.
BFLOAT16 = {
    "forward": {
        64: {L4: Blocks(128, 64, 8, 3)},
        128: {L4: Blocks(128, 64, 8, 3)},
        256: {A100: Blocks(128, 64, 8, 2), L4: Blocks(64, 32, 8, 2)},
    },
    "query_gradient": {
        64: {L4: Blocks(128, 64, 8, 2)},
        128: {L4: Blocks(128, 64, 8, 2)},
        256: {H100: Blocks(128, 32, 8, 2), A100: Blocks(64, 64, 8, 2), L4: Blocks(64, 32, 8, 1)},
    },
    "own_gradient": {
        64: {L4: Blocks(64, 64, 8, 2)},
        128: {L4: Blocks(64, 64, 8, 2)},
        256: {A100: Blocks(32, 64, 8, 2), L4: Blocks(32, 32, 4, 2)},
    },
}
FLOAT32 = {
    64: {L4: Blocks(32, 32, 8, 1)},
    128: {L4: Blocks(32, 32, 8, 1)},
    256: {A100: Blocks(32, 32, 8, 1), L4: Blocks(32, 16, 8, 1)},
}


def shared_memory_of(device: Any) -> int:
    """Returns the bytes of shared memory that one program may have on a device.

    Returns LEAST for a chip that is not listed, and for other devices, which interpret the kernels.
    Returns 0 for a GPU that cannot run the kernels: one below compute capability 8.0, or not
    NVIDIA's.
    """
    if device.platform not in ("gpu", "cuda"):
        return LEAST
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return 0
    return SHARED_MEMORY.get(capability, LEAST)


def fitting(kernel: str, head_dim: int, dtype: Any, shared_memory: int) -> Blocks:
    """Returns the largest blocks of a kernel that fit into shared memory.

    Args:
      kernel: a key of BFLOAT16.
      head_dim: H, one of `gpu.HEAD_DIMS`.
      dtype: dtype of the operands, bfloat16 or float32.
      shared_memory: bytes, at least LEAST.
    """
    by_head_dim = FLOAT32 if dtype == jnp.float32 else BFLOAT16[kernel]
    by_memory = by_head_dim[max(head_dim, 64)]
    return next(cut for needed, cut in by_memory.items() if needed <= shared_memory)
