"""Says how a result was made; this is written beside every result."""

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "flax", "numpy")


def provenance(computed: bool = True) -> dict[str, Any]:
    """Returns the command, date (UTC, ISO 8601), hardware, versions and commit behind a result.

    Args:
      computed: whether jax computed it. If not, the hardware is left out: asking jax for its
        devices would take an accelerator from another job.
    """
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if computed:
        found["hardware"] = hardware()
    ours = sys.modules["latent_delib"].__version__  # a checkout need not be installed
    others = {package: metadata.version(package) for package in PACKAGES}
    found["versions"] = {"latent_delib": ours} | others
    found["commit"] = commit()
    return found


def commit() -> str:
    """Returns the git commit of this checkout, with "-dirty" if tracked files were changed.

    It is "" outside a checkout, as for an installed package, and where git does not answer.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return ""
    describe = "describe --always --dirty --abbrev=40 --exclude=*".split()
    command = ["git", "-C", checkout, *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def hardware() -> str:
    """Returns number and kind of the job's devices; for a CPU, its cores and model."""
    device = jax.devices()[0]
    count = jax.device_count()
    if device.platform != "cpu":
        return f"{count} x {device.device_kind}"
    cores = len(_cpu_values("processor"))
    model = next(iter(_cpu_values("model name")), "CPU")
    split = f", as {count} devices" if count > 1 else ""
    return f"{cores} cores of {model}{split}"


def _cpu_values(key: str) -> list[str]:
    """Returns the values of a key in /proc/cpuinfo, one per core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    found = [line for line in text.splitlines() if line.startswith(key)]
    return [line.partition(":")[2].strip() for line in found]
