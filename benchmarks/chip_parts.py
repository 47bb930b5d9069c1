"""Holds the parts of `benchmarks.chip`, each run in a process of its own.

  python -m benchmarks.chip_parts --part=about [--small]      prints what the chip is, as JSON
  python -m benchmarks.chip_parts --part=PART --out=FILE --seconds=N [--small]

A process that ends gives its memory back, and one that crashes leaves the other parts alone.
A part is rows. Each is written to FILE as soon as it is there, with its error where it failed; rows
that FILE has are not made again. A row that would not end within N seconds, if it took as long as
the longest before it, is left out.
"""

import argparse
import dataclasses
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from benchmarks import chip_about, chip_proof, common, decoding, evaluation, step
from latent_delib.delib import cost, flops
from latent_delib.machine import files
from latent_delib.nn.attention.choice import brief
from latent_delib.nn.sizes import TransformerConfig

Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]

LOST = 3  # exit code where the device works no more
TRIES = 3  # a row that ended its process so often has failed
PRODUCTS = ((8192, 8192, 8192), (10240, 2304, 9216), (2048, 2304, 9216))
PRODUCTS_SMALL = ((256, 256, 256),)
# The batch to begin with, by number of latents: it fits on 80 GB, larger ones are hardly faster.
BATCH = {16: 8, 64: 4}
STEPS = common.PUBLISHED | dict(rounds=3, least=0.0, eager=False)
STEPS_SMALL = common.SMALL | dict(
    size="gemma2_test", seq_len=48, traces=4, ahead=3, rounds=1, least=0.0, eager=True
)
ROOM = 1.4  # what a step needs at batch 1, as a multiple of what it holds: 1.37 for Gemma 2 2B


# Ceilings and steps.


def steps(small: bool) -> Rows:
    """Yields products and copies at their fastest, then training steps, the main ones first."""
    for shape in PRODUCTS_SMALL if small else PRODUCTS:
        yield "product " + " x ".join(map(str, shape)), partial(product, *shape)
    yield "copy", copy
    measured = Steps(small)
    *others, fastest = common.attention_forms()[1:]
    first = [(fastest, "attention"), ("dense", "full")]
    then = [(fastest, "dots"), (fastest, "full"), (fastest, "none")]
    then += [(form, "attention") for form in others]
    for several in (first,) if small else (first, then):
        for L in (2,) if small else (64, 16):
            for form, remat in several:
                yield f"step, N_L {L}, {form}, remat {remat}", partial(measured.row, L, form, remat)


def product(rows: int, depth: int, columns: int) -> dict[str, Any]:
    """Measures bfloat16 matrix products."""
    # Random numbers: a chip draws less power for equal ones, and keeps a higher clock.
    x = jax.random.normal(jax.random.key(0), (rows, depth), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (depth, columns), jnp.bfloat16)
    run = common.calls(partial(jax.jit(jnp.matmul), x, y))
    found = common.spread(common.measure({"product": run}, 5, 0.2)["product"])
    return {"kind": "product", **found, "tflops": 2 * rows * depth * columns / found["ms"] / 1e9}


def copy() -> dict[str, Any]:
    """Measures bytes read and written in place."""
    return {"kind": "copy", "gb_per_second": decoding.bandwidth(5, 0.2) / 1e9}


class Steps:
    """Measures training steps; holds one training state at a time, of one number of latents."""

    def __init__(self, small: bool):
        self.small = small
        self.jobs: dict[int, step.Job] = {}

    def row(self, L: int, form: str, remat: str) -> dict[str, Any]:
        """Measures the step with the largest batch that fits."""
        if L not in self.jobs:
            self.jobs.clear()
            gc.collect()
            self.jobs[L] = step.Job(arguments(self.small, trains=True), L)
        job = self.jobs[L]
        row = {"kind": "step", "latents": L, "form": form, "remat": remat}
        row["layers"] = job.a.config.num_layers
        # A larger batch hardly changes the dense form, which is the slowest.
        batch = 1 if self.small or form == "dense" else BATCH[L]
        while batch:
            found, most = self.measure(job, form, remat, batch)
            if found:
                return row | {"batch": batch, **found, "tflop": useful(job.a, L, batch)}
            batch = most
        return row | {"batch": 0, "ms": None}

    def measure(
        self, job: step.Job, form: str, remat: str, batch: int
    ) -> tuple[dict[str, Any] | None, int]:
        """Returns (figures, 0), or (None, the batch to try next) where this one does not fit."""
        inputs = dict(zip(("tokens", "segment"), common.text(job.a, batch)))
        began = time.perf_counter()
        try:
            compiled = job.compile(form, remat, inputs)
        except RuntimeError as error:
            if not common.out_of_memory(error):
                raise
            return None, batch // 2
        found = common.memory(compiled) | {"compile_s": time.perf_counter() - began}
        needs = found.get("needs_gib", 0) * 2**30
        # A GPU's compiler accepts what does not fit. A TPU's refuses it, and shares more memory.
        if jax.default_backend() == "gpu" and needs > common.room():
            held = compiled.memory_analysis().argument_size_in_bytes
            share = (common.room() - held) / (needs - held)  # of what grows with the batch
            return None, power_of_two(min(batch // 2, int(batch * max(share, 0))))
        run = common.calls(partial(job.advance, compiled, inputs))
        seconds = common.measure({"step": run}, job.a.rounds, job.a.least)["step"]
        return (found | common.spread(seconds), 0) if seconds else (None, batch // 2)


def arguments(small: bool, trains: bool) -> argparse.Namespace:
    """Returns the published setting, with as many layers as leave the chip room to work.

    small: what stands for it on a CPU. trains: the chip also holds a training state.
    """
    a = argparse.Namespace(**(STEPS_SMALL if small else STEPS))
    config = common.ARCHITECTURES[a.size]
    while config.num_layers > 1 and ROOM * held(config, trains) > common.room():
        config = dataclasses.replace(config, num_layers=config.num_layers // 2)
    a.config = config
    return a


def held(config: TransformerConfig, trains: bool) -> float:
    """Returns the bytes of both models in bfloat16.

    trains: the coprocessor is in float32, with its optimizer.
    """
    shapes = jax.eval_shape(lambda: common.weights(config, 16, "float32"))
    decoder, coprocessor = (
        sum(x.size for x in jax.tree.leaves(shapes[name])) for name in ("decoder", "coprocessor")
    )
    return 2 * decoder + (12 if trains else 2) * coprocessor


def useful(a: argparse.Namespace, L: int, batch: int) -> float:
    """Returns the useful TFLOP of a step."""
    aug = common.augmentation(a.config, L, "reference")
    return cost.step_flops(aug, batch, a.seq_len, a.traces, a.ahead).useful / 1e12


def power_of_two(x: int) -> int:
    """Returns the largest that is not above x; 0 for 0."""
    return 1 << (x.bit_length() - 1) if x else 0


# The PyTorch peer.


def peer(small: bool) -> Rows:
    """Yields the same steps by the peer, where torch is installed and drives this chip."""
    why = no_torch()
    for L in (2,) if small else (64, 16):
        yield f"step, N_L {L}, torch", partial(peer_row, small, L, why)


def no_torch() -> str | None:
    """Says why the peer cannot run here; None where it can."""
    if not common.has_torch():
        return "torch is not installed"
    import torch

    backend = jax.default_backend()
    if backend == "cpu" or backend == "gpu" and torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} does not drive this chip"


def peer_row(small: bool, L: int, why: str | None) -> dict[str, Any]:
    """Measures the peer's step with the largest batch that fits; why: it cannot run."""
    row = {"kind": "step", "latents": L, "form": "torch", "remat": "full"}
    if why:
        return row | {"skipped": why}
    a = arguments(small, trains=True)
    batch = 1 if small else BATCH[L] // 2
    while batch:
        try:
            found = step.measure_torch(a, L, batch)
        except RuntimeError as error:
            if not common.out_of_memory(error):
                raise
            found = {"ms": None}
        if found["ms"]:
            return row | found | {"layers": a.config.num_layers, "tflop": useful(a, L, batch)}
        empty_torch()
        batch //= 2
    return row | {"batch": 0, "ms": None}


def empty_torch() -> None:
    """Gives back what a step that did not fit has left."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Evaluation and decoding.


def use(small: bool) -> Rows:
    """Yields evaluation and decoding."""
    yield "evaluation", partial(evaluate, small)
    for batch in (1,) if small else (1, 8):
        yield f"decoding, batch {batch}", partial(decode, small, batch)


def evaluate(small: bool) -> dict[str, Any]:
    """Measures a text evaluated at every position, and counts the useful products."""
    form = common.attention_forms()[-1]
    preset = evaluation.PRESET | {"batch": [1], "forms": [f"{form}, reused"], "rounds": 1}
    if small:
        preset |= dict(latents=[2], positions=24, ahead=3)
    a = argparse.Namespace(**vars(arguments(small, trains=False)) | preset)
    [row] = evaluation.measure(a)
    c, L, T = a.config, a.latents[0], a.seq_len
    places = -(-(T - 1) // a.positions) * a.positions
    latents = flops.traces(c, places, L, T, passes=1, text_passes=1)
    ahead = flops.traces(c, places, L + a.ahead - 1, T, passes=1, text_passes=1)  # "after"
    vocabulary = 2 * c.vocab_size * c.embed_dim * (T + places * a.ahead)
    tflop = (flops.text(c, T, T) + latents + ahead + vocabulary) / 1e12
    return {"kind": "evaluation", **row, "layers": c.num_layers, "tflop": tflop}


def decode(small: bool, batch: int) -> dict[str, Any]:
    """Measures a token with latents, and the share of its time that reading would take."""
    preset = decoding.PUBLISHED | {"batch": [batch], "forms": ["latents"]}
    if small:
        preset |= dict(latents=[2], seq_len=8, new=4, size="gemma2_test", dtype="float32")
    a = argparse.Namespace(**vars(arguments(small, trains=False)) | preset)
    [row] = decoding.measure(a, decoding.bandwidth(3, 0.1))
    return {"kind": "decoding", **row, "layers": a.config.num_layers}


PARTS: dict[str, Callable[[bool], Rows]] = {
    "proof": chip_proof.rows,
    "steps": steps,
    "peer": peer,
    "use": use,
}


# One process.


def read(out: Path) -> dict[str, Any]:
    """Reads a file of results."""
    return json.loads(out.read_text())


def write(out: Path, result: dict[str, Any]) -> None:
    """Writes a file of results whole."""
    files.write(epath.Path(out), f"{json.dumps(result, indent=2)}\n".encode())


def is_done(row: dict[str, Any]) -> bool:
    """Tells whether a row is there, made or failed."""
    return "seconds" in row


def run(rows: Rows, part: str, out: Path, seconds: float) -> None:
    """Makes the rows of a part that the file has not, within so many seconds."""
    until = time.monotonic() + seconds
    result = read(out)
    kept = result["parts"].setdefault(part, {"rows": {}})
    made = kept["rows"]
    longest = max((row["seconds"] for row in made.values() if is_done(row)), default=0.0)
    left_out = []
    for name, make in rows:
        before = made.get(name, {})
        if is_done(before):
            continue
        if time.monotonic() + longest > until:
            left_out.append(name)
            continue
        began = time.monotonic()
        tries = before.get("tries", 0)
        made[name] = {"tries": tries + 1}  # what is found here, if this process ends
        write(out, result)
        if tries >= TRIES:
            why = f"its process ended {tries} times while this ran: out of time, or a crash"
            row = {"failed": why}
        else:
            row = attempt(make)
        made[name] = row | {"seconds": round(time.monotonic() - began, 2)}
        longest = max(longest, made[name]["seconds"])
        print(f"{part}: {name}: {shown(row)}", flush=True)
        write(out, result)
        if "error" in row and not device_works():
            raise SystemExit(LOST)  # another process makes the rows that follow
    kept["left_out"] = left_out
    write(out, result)


def attempt(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns a row, or the words of the error that came instead of it."""
    try:
        return make()
    except Exception as error:  # of jax, a compiler, or torch: the other rows go on
        return {"failed": brief(error), "error": type(error).__name__}
    finally:
        gc.collect()


def device_works() -> bool:
    """Tells whether the device still computes: after a fault it fails whatever it is given."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:  # of jax
        return False
    return True


def shown(row: dict[str, Any]) -> str:
    """Returns a row in one line."""
    cells = []
    for key, value in row.items():
        if value is not None and not isinstance(value, dict):
            cells.append(f"{key} {common.cell(value)}")
    return "  ".join(cells)


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--part", choices=["about", *PARTS], required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a process takes all that it sees
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    warnings.filterwarnings("error", "attention: ")  # a kernel that gives way has not been measured
    if a.part in ("about", "peer"):  # torch has the memory
        common.share_the_chip()
    if a.part == "about":
        print(json.dumps(chip_about.about(a.small)))
        return
    run(PARTS[a.part](a.small), a.part, a.out, a.seconds)


if __name__ == "__main__":
    main()
