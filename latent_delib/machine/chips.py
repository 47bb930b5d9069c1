"""Figures of accelerators from their makers' data sheets, by JAX's names of the devices."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Holds the figures of one device; None where no data sheet was read.

    peak: FLOP/s of dense bfloat16.
    memory: bytes that a program can use, according to the compiler.
    bandwidth: bytes per second of its memory.
    links: bytes per second that it receives over all its links to other chips.
    """

    peak: float | None = None
    memory: float | None = None
    bandwidth: float | None = None
    links: float | None = None


# TPUs: docs.cloud.google.com/tpu/docs, the pages v4, v5e, v5p, v6e and tpu7x. The pages add up both
# directions of links; half of the sum is received. The page of v4 has the bisection of a pod
# instead: 24 TB/s over the 512 links that cut a torus of 16 x 16 x 16; a chip has six links. A
# TPU7x is two devices, which share its figures.
CHIPS = {
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA A100-PCIE-40GB": Chip(312e12),
    "NVIDIA A100 80GB PCIe": Chip(312e12),
    "NVIDIA L4": Chip(121e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H100 PCIe": Chip(756e12),
    "NVIDIA H200": Chip(989e12),
    "NVIDIA B200": Chip(2250e12),
    "NVIDIA GeForce RTX 4090": Chip(165e12),
    "NVIDIA GeForce RTX 5090": Chip(209e12),
    "TPU v4": Chip(275e12, 30.75 * 2**30, 1200e9, 281e9),
    "TPU v5 lite": Chip(197e12, 15.75 * 2**30, 819e9, 200e9),
    "TPU v5": Chip(459e12, 95.74 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 31.25 * 2**30, 1638e9, 400e9),
    "TPU7x": Chip(2307e12 / 2, 94.75 * 2**30, 7380e9 / 2, 1200e9 / 2 / 2),
}


def chip_of(device: Any) -> Chip:
    """Returns the figures of a JAX device."""
    return CHIPS.get(device.device_kind, Chip())
