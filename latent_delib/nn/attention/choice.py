"""Chooses the form of attention for a device.

"auto" takes a kernel only on chips on which the kernel is proven. `python -m benchmarks.chip`
proves a kernel: it compares the kernel with the reference on the chip itself. The proof is a
committed result for the chip's family, or the record that such a run leaves on this machine.
"""

import functools
import hashlib
import json
import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from latent_delib.machine import files
from latent_delib.nn.attention import tokamax_gpu
from latent_delib.nn.attention.blocks import shared_memory_of
from latent_delib.nn.attention.forms import KERNELS, attend, fall_back, unsupported
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.sizes import TransformerConfig

# Kernel -> the families of chips on which it is proven, by the results in docs/results/chip.
PROVEN: dict[str, tuple[str, ...]] = {}


def choose(form: str, device: Any, config: TransformerConfig, dtype: Any) -> str:
    """Returns the form to use on a device.

    "auto" becomes a kernel of the device's platform that is proven and compiles. Without such a
    kernel it becomes "xla"; where the platform has kernels, a warning says why. On a device that is
    not attached (compilation only), "auto" becomes the platform's first kernel. A kernel that the
    GPU cannot run becomes "xla", with a warning.

    Args:
      form: "auto", or one of `forms.FORMS`.
      device: device of jax.
      config: architecture of the model that calls the form.
      dtype: dtype of the computation.

    Raises:
      UserError: tokamax is asked for, and is not installed.
    """
    if form == "auto":
        form = _fastest(device, config, jnp.dtype(dtype))
    if form == "tokamax_gpu":
        tokamax_gpu.require()
    needs = _missing_capability(form, device)
    if needs:
        chip = f"{device.device_kind} (it needs NVIDIA's compute capability {needs})"
        return fall_back(form, chip)
    return form


def kernels_of(device: Any) -> tuple[str, ...]:
    """Returns the kernels that a device can run and that are installed, proven or not."""
    found = []
    for name in _of_platform(device):
        is_installed = name != "tokamax_gpu" or tokamax_gpu.is_installed()
        if is_installed and not _missing_capability(name, device):
            found.append(name)
    return tuple(found)


def _of_platform(device: Any) -> list[str]:
    """Returns the kernels of a device's platform."""
    platform = "cuda" if device.platform == "gpu" else device.platform
    return [name for name, kernel in KERNELS.items() if kernel.platform == platform]


def _missing_capability(form: str, device: Any) -> str | None:
    """Returns the compute capability that a device lacks for a form; None where it lacks none."""
    if form == "pallas_gpu" and not shared_memory_of(device):
        return "8.0"
    if form == "tokamax_gpu" and not tokamax_gpu.runs_on(device):
        return "9.0 or 10.0"
    return None


def chip_family(device: Any) -> str:
    """Returns the family of chips that run the same programs: "sm_90", "TPU v5 lite"."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{capability.replace('.', '')}" if capability else device.device_kind


def record_proof(kernel: str, family: str, about: dict[str, str] | None) -> Path:
    """Writes this machine's record of a kernel on a family of chips, and returns its path.

    Args:
      about: of the run that proved the kernel, the chip, the date, the version of jax and
        `code_digest`. None removes the record.
    """
    records = _records()
    of_kernel = records.setdefault(kernel, {})
    of_kernel.pop(family, None)
    if about is not None:
        of_kernel[family] = about
    path = _path()
    files.write(epath.Path(path), f"{json.dumps(records, indent=2)}\n".encode())
    return path


def is_proven(kernel: str, device: Any) -> bool:
    """Tells whether a kernel is proven on a chip.

    The proof is a result for the chip's family, or this machine's record with this version of jax
    and this code of the kernels. Where a job has several processes, such a record does not count:
    all processes must decide alike.
    """
    if chip_family(device) in PROVEN.get(kernel, ()):
        return True
    record = _records().get(kernel, {}).get(chip_family(device), {})
    is_same = record.get("jax") == jax.__version__ and record.get("code") == code_digest()
    return jax.process_count() == 1 and is_same


@functools.cache
def code_digest() -> str:
    """Returns a digest of the code of all forms of attention."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _fastest(device: Any, config: TransformerConfig, dtype: Any) -> str:
    """Returns the form that "auto" chooses on a device."""
    kernels = kernels_of(device)
    if not kernels or device not in jax.devices():
        return [*_of_platform(device), "xla"][0]
    kernel = next((name for name in kernels if is_proven(name, device)), None)
    if kernel is None:
        kind, family = device.device_kind, chip_family(device)
        chip = kind if kind == family else f"{kind} ({family})"
        remedy = "`python -m benchmarks.chip` proves it"
        if jax.process_count() > 1:
            remedy += "; a job of several processes then has to name it in compute.attention"
        names = " or ".join(kernels)
        _tell(f"attention: {names} is not proven on {chip}; using xla instead; {remedy}")
        return "xla"
    # Only the first process could compile for its device. With several processes, a kernel that
    # does not compile raises its error when the job compiles.
    why = None if jax.process_count() > 1 else _failure(kernel, device, config, dtype)
    if why:
        failed = f"attention: {kernel} does not compile for {device.device_kind}"
        _tell(f"{failed}; using xla instead: {why}")
        return "xla"
    return kernel


@functools.cache
def _failure(kernel: str, device: Any, config: TransformerConfig, dtype: Any) -> str | None:
    """Returns the compiler's message where a kernel does not compile, or None.

    The call that is compiled has whole blocks, and a forward and a backward pass.
    """
    array = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
    H = config.head_dim
    q = array((1, 4, 128, config.num_heads // config.num_kv_heads, H), dtype)
    own = array((1, 4, 128, 1, H), dtype)
    prefix = array((1, 512, 1, H), dtype)
    bounds = Bounds(*[array((1, 4, 128), jnp.int32)] * 3)
    if unsupported(kernel, H, dtype):
        return None  # each call gives this warning itself
    call = partial(attend, form=kernel, scale=config.query_scale, softcap=config.attn_softcap)
    call = partial(call, shared_memory=shared_memory_of(device))

    def both(q, k, v, prefix, bounds):
        out, pull = jax.vjp(lambda *own: call(*own, prefix, bounds), q, k, v)
        return pull(out)

    try:
        jax.jit(both).lower(q, own, own, (prefix, prefix), bounds).compile()
    except Exception as error:  # from jax, Triton or Mosaic
        return brief(error)
    return None


def brief(error: BaseException) -> str:
    """Returns the kind and the first words of an error in one line."""
    words = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {words[:300]}"


@functools.cache
def _tell(line: str) -> None:
    """Warns once per line."""
    warnings.warn(line, stacklevel=2)


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "latent_delib" / "proven.json"


def _records() -> dict[str, dict[str, dict[str, str]]]:
    """Returns this machine's records: kernel -> family -> about.

    Returns {} where their file is missing or is not JSON.
    """
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return {}
    return found if isinstance(found, dict) else {}
