"""Holds what the benchmarks share: presets, forms that take turns under one clock, the table."""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_delib.delib import traces
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.methods import METHODS
from latent_delib.lm import decoding
from latent_delib.machine.columns import aligned
from latent_delib.nn import transformer
from latent_delib.nn.attention.blocks import shared_memory_of
from latent_delib.nn.attention.choice import kernels_of
from latent_delib.nn.attention.primitive import Bounds
from latent_delib.nn.layers import WHOLE
from latent_delib.nn.sizes import SIZES, TransformerConfig
from latent_delib.nn.transformer import REMAT, Params, Transformer

# "small": a Gemma 2 that two CPU cores train. No window is shorter than the text, as published.
ARCHITECTURES = SIZES | {
    "small": dataclasses.replace(
        SIZES["gemma2_3m"], embed_dim=256, ffn_dim=1024, window=SIZES["gemma2_2b"].window
    )
}
# The setting of Liu et al. 2025, Section 2.3, and what stands for it on a CPU.
PUBLISHED = dict(size="gemma2_2b", dtype="bfloat16", seq_len=2048, traces=128, ahead=16)
SMALL = dict(size="small", dtype="float32", seq_len=512, traces=64, ahead=16)

Run = Callable[[int], Any]  # makes so many calls and waits for the last


def decode(*args: Any, **options: Any) -> tuple[np.ndarray, list[decoding.Joined]]:
    """Continues a batch of prompts to its end; returns the last value of `decode_in_chunks`."""
    *_, last = decoding.decode_in_chunks(*args, **options)
    return last


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser of flags, whose --help shows a module's docstring as it is."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def arguments(
    doc: str | None,
    argv: Sequence[str] | None,
    forms: Sequence[str],
    published: Mapping[str, Any],
    small: Mapping[str, Any],
    **switches: str,
) -> argparse.Namespace:
    """Reads the command line: every key of a preset is a flag.

    switches: flags that are off unless given, with their help.
    """
    parser = command_line(doc)
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.add_argument(
        "--small", action="store_true", help="the form for two CPU cores; the default without a GPU"
    )
    preset = small if "--small" in argv or jax.default_backend() == "cpu" else published
    choices = {
        "size": sorted(ARCHITECTURES),
        "dtype": ["bfloat16", "float32"],
        "remat": sorted(REMAT),
    }
    for name, value in preset.items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        nargs = "+" if several else None
        parser.add_argument(
            f"--{name}", type=kind, nargs=nargs, default=value, choices=choices.get(name)
        )
    for name, meaning in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    parser.add_argument(
        "--forms", nargs="+", choices=forms, default=list(forms), help="which to run"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of every form")
    parser.add_argument(
        "--least",
        type=float,
        default=0.3,
        help="seconds a measurement lasts at least, by calling again",
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    a = parser.parse_args(argv)
    a.argv, a.config = argv, ARCHITECTURES[a.size]
    return a


def attention_forms() -> list[str]:
    """Returns the forms of attention that this platform has; the last is what `auto` prefers."""
    return ["reference", "xla", *reversed(kernels_of(jax.local_devices()[0]))]


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def augmentation(
    config: TransformerConfig,
    num_latents: int,
    form: str,
    remat: str = "none",
    placement: str = "after",
) -> Augmentation:
    partition = WHOLE._replace(shared_memory=shared_memory_of(jax.local_devices()[0]))
    return Augmentation(
        Transformer(config, remat, partition, form), num_latents=num_latents, placement=placement
    )


def weights(config: TransformerConfig, num_latents: int, dtype: str) -> Params:
    """Makes a decoder of random weights and a coprocessor that starts from it, in `dtype`."""

    @jax.jit
    def start(key: jax.Array) -> Params:
        decoder = transformer.init(key, config)
        aug = augmentation(config, num_latents, "xla")
        trained = METHODS["cache_augmentation"].init(key, decoder, aug)
        return jax.tree.map(lambda x: x.astype(dtype), {"decoder": decoder} | trained)

    return start(jax.random.key(0))


def text(a: argparse.Namespace, batch: int) -> tuple[jax.Array, jax.Array]:
    """Draws tokens and their segments, int32 [B, T] each: every row one document."""
    tokens = np.random.default_rng(0).integers(0, a.config.vocab_size, (batch, a.seq_len))
    return jnp.asarray(tokens, jnp.int32), jnp.ones((batch, a.seq_len), jnp.int32)


def positions(a: argparse.Namespace, tokens_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """Draws sorted trace positions [B, M]."""
    return traces.draw(jax.random.key(0), tokens_BT, segment_BT, a.traces)


def attention_flops(config: TransformerConfig, bounds: Bounds, backward: bool) -> float:
    """Counts a global layer's useful FLOPs of attention by `bounds`, a multiply-add as two.

    Forward, two products a visible pair: scores and sums. Backward, two more over the prefix, whose
    keys and values get no gradient (of the weights, of q), and four over the own group. Scores
    computed again do not count: so does `latent_delib.delib.cost` for the step.
    """
    S = bounds.own_start.shape[-1]
    prefix = float(np.sum(np.asarray(bounds.prefix_stop - bounds.prefix_start, np.float64)))
    own = float(np.sum(np.arange(1, S + 1) - np.asarray(bounds.own_start, np.float64)))
    products = (4 * prefix + 6 * own) if backward else (2 * prefix + 2 * own)
    return 2 * config.num_heads * config.head_dim * products


def calls(function: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> Run:
    """Returns a form to measure, from a function that dispatches one call."""

    def run(count: int) -> None:
        for _ in range(count):
            out = function()
        wait(out)

    return run


def measure(runs: Mapping[str, Run], rounds: int, least: float = 0.0) -> dict[str, list[float]]:
    """Returns the seconds of a call, `rounds` times for each form; none where memory ran out.

    The forms take turns, so that a busy machine meets all of them alike.
    """
    counts, seconds = {}, {name: [] for name in runs}
    for name, run in runs.items():
        try:
            run(3)  # compiles, and lets clocks and caches settle
        except RuntimeError as error:  # jax's and torch's are
            if not out_of_memory(error):
                raise
            continue
        began = time.perf_counter()
        run(1)
        counts[name] = max(1, math.ceil(least / (time.perf_counter() - began)))
    for _ in range(rounds):
        for name, count in counts.items():
            began = time.perf_counter()
            runs[name](count)
            seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def out_of_memory(error: BaseException) -> bool:
    """Tells whether an error is of too little memory: jax's or torch's, compiling or running.

    The small memory inside a core does not count: a kernel that needs more of it is wrong.
    """
    if re.search("shared memory|memory space (vmem|smem)", str(error), re.IGNORECASE):
        return False
    return bool(re.search("RESOURCE_EXHAUSTED|out of memory|Ran out of memory", str(error)))


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Returns median, least and most, in milliseconds; None where there is no measurement."""
    if not seconds:
        return dict.fromkeys(("ms", "ms_min", "ms_max"))
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return {"ms": 1e3 * middle, "ms_min": 1e3 * low, "ms_max": 1e3 * high}


def memory(compiled: Any) -> dict[str, float]:
    """Returns GiB of a compiled function: all that it needs, and its temporaries alone."""
    m = compiled.memory_analysis()
    if m is None:
        return {}
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    needed = m.argument_size_in_bytes + m.temp_size_in_bytes + outputs
    return {"needs_gib": needed / 2**30, "temp_gib": m.temp_size_in_bytes / 2**30}


def room() -> float:
    """Returns the bytes that JAX may hold on the device; infinite where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)


def share_the_chip() -> None:
    """Lets JAX take memory as it needs it, and nearly all: PyTorch uses the same chip."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def machine() -> dict[str, Any]:
    """Says what the numbers are made on."""
    found = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    if "torch" in sys.modules:
        import torch

        found["torch"] = torch.__version__
        found["torch_device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(
    name: str, a: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **measured: Any
) -> dict[str, Any]:
    """Prints the table, writes it where --json says, and returns what was written."""
    settings = {k: v for k, v in vars(a).items() if k not in ("json", "argv", "config")}
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *a.argv])
    result = {
        "benchmark": name,
        "command": command,
        **machine(),
        "settings": settings,
        **measured,
        "rows": list(rows),
    }
    print(command)
    print(f"{result['device']}, {result['processor']}, {result['cores']} cores, ", end="")
    print(f"load {result['load']:.1f}, jax {result['jax']}, {result['date']}")
    print("  ".join(f"{k} {v}" for k, v in settings.items() if k not in ("forms", "small")))
    for key, value in measured.items():
        print(f"{key}: {cell(value)}")
    print(table(rows), flush=True)
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table whose columns are the keys of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns]
    named = set()
    for row in rows:
        lines.append([cell(row.get(key)) for key in columns])
        named |= {key for key, value in row.items() if isinstance(value, str)}
    return "\n".join(aligned(lines, left=named))


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
