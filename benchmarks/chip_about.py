"""Says what the results of `benchmarks.chip` are made on: chip, driver, versions, code."""

import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib

from benchmarks import common
from latent_delib.machine import chips
from latent_delib.nn.attention import choice


def about(small: bool) -> dict[str, Any]:
    """Says what the results are made on."""
    device = jax.local_devices()[0]
    return common.machine() | {
        "jaxlib": jaxlib.__version__,
        "driver": driver(device),
        "platform": device.platform,
        "family": choice.chip_family(device),
        "kernels": list(choice.kernels_of(device)),
        "code": choice.code_digest(),
        "plugins": installed_plugins(),
        "torch": version_of("torch"),
        "peak_tflops": (chips.chip_of(device).peak or 0) / 1e12 or None,
        "small": small or device.platform == "cpu",
    }


def installed_plugins() -> list[str]:
    """Returns the installed packages through which jax would open a GPU or TPU."""
    names = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
    return [name for name in names if version_of(name)]


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver(device: Any) -> str:
    """Returns the version of NVIDIA's driver or of libtpu, or the words of another runtime."""
    file = Path("/proc/driver/nvidia/version")
    if device.platform == "gpu" and file.exists():
        found = re.search(r"\d{3,}\.\d+(\.\d+)?", file.read_text())
        if found:
            return found[0]
    if device.platform == "gpu":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=True)
            return asked.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "unknown"
    if device.platform == "tpu" and version_of("libtpu"):
        return f"libtpu {version_of('libtpu')}"
    return " ".join(device.client.platform_version.split())
