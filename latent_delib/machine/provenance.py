"""Where a figure comes from: written beside every result."""

import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


def provenance(computed: bool = True) -> dict[str, Any]:
    """The command, the date (UTC, ISO 8601), the hardware, and the versions that a result was made with.

    computed: by jax; to ask for its devices would take an accelerator from another job.
    """
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"hardware": hardware()} if computed else {}),
        "versions": {package: metadata.version(package) for package in ("latent_delib", "jax", "flax", "numpy")},
    }


def hardware() -> str:
    """What the job runs on: number and kind of its devices; a CPU's cores and model."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform != "cpu":
        return f"{count} x {device.device_kind}"
    cores = len(_lines("processor"))
    model = next(iter(_lines("model name")), "CPU")
    return f"{cores} cores of {model}" + (f", as {count} devices" if count > 1 else "")


def _lines(key: str) -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)]
