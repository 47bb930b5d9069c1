"""Measures time and peak memory of converting and loading a decoder of random weights.

  .venv/bin/python -m benchmarks.loading --size=gemma2_2b --folder=DIR [--json=FILE]

Writes a Hugging Face folder of bfloat16 weights to DIR (twice its size is needed on disk), then
runs each form in a process of its own: ours, tensor by tensor, beside the plain way that holds the
whole model.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from latent_delib.nn.sizes import SIZES
from latent_delib.weights import huggingface, locate, names, tensors

PLAIN = """
import jax, numpy as np, sys
from pathlib import Path
from safetensors.numpy import load_file, save_file
from latent_delib.weights import huggingface, names
source = huggingface.open_source(Path(sys.argv[1]))
theirs, leaves = load_file(Path(sys.argv[1]) / "model.safetensors"), {}
for t in names.match(source.shapes, source.architecture, "huggingface", "plain"):
    leaves.setdefault(t.leaf, []).append(t.to_ours(theirs[t.name]))
Path(sys.argv[2]).mkdir()
save_file({n: np.stack(x) if n.startswith("layers.") else x[0] for n, x in leaves.items()},
          Path(sys.argv[2]) / "model.safetensors")
"""
LOAD = """
import jax.numpy as jnp, latent_delib, sys
decoder = latent_delib.load_decoder(sys.argv[1], jnp.bfloat16)
"""


def write_random(where: Path, size: str) -> int:
    """Writes a Hugging Face folder of random weights; returns the bytes of its tensors."""
    config = SIZES[size]
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps(huggingface.config_json(config, "bfloat16", {})))
    shutil.copy(locate.PACKAGED / "tokenizer.model", where)
    bfloat16, random = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    wanted = list(names.tensors(config, "huggingface"))
    count = sum(int(np.prod(t.shape)) for t in wanted)
    block = 1 << 22  # small: Linux counts what this process has held to the peak of those it starts
    chunks = (
        (random.random(min(block, count - i), np.float32) - 0.5).astype(bfloat16)
        for i in range(0, count, block)
    )
    tensors.write(
        where / "model.safetensors", {t.name: (t.shape, bfloat16) for t in wanted}, chunks
    )
    return 2 * count


def measure(*arguments: str) -> tuple[float, float]:
    """Returns seconds and peak resident GiB of a Python process, its libraries included."""
    began = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="smollm2_135m", choices=SIZES)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    hf, ours, back, plain = (a.folder / name for name in ("hf", "ours", "back", "plain"))
    size = write_random(hf, a.size)
    largest = max(2 * int(np.prod(t.shape)) for t in names.tensors(SIZES[a.size], "huggingface"))
    convert = ("-m", "latent_delib.convert")
    there = (f"--source={hf}", f"--out={ours}", f"--size={a.size}")
    back_again = (f"--source={ours}", f"--out={back}", "--to=huggingface")
    forms = {
        "the libraries alone": ("-c", "import latent_delib.convert"),
        "convert: Hugging Face to ours": (*convert, *there),
        "the plain way: all in memory": ("-c", PLAIN, str(hf), str(plain)),
        "convert: ours to Hugging Face": (*convert, *back_again),
        "load_decoder, bfloat16, one device": ("-c", LOAD, str(ours)),
    }
    rows = []
    for form, arguments in forms.items():
        seconds, peak = measure(*arguments)
        rows.append({"form": form, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)})
        for unneeded in (plain, back):
            shutil.rmtree(unneeded, ignore_errors=True)
    print(f"{a.size}: {size / 2**30:.2f} GiB of weights, largest tensor {largest / 2**30:.2f} GiB")
    print(f"{platform.machine()}, {os.cpu_count()} cores")
    for row in rows:
        print(f"{row['form']:<36} {row['seconds']:>7.1f} s {row['peak_gib']:>7.2f} GiB at most")
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"size": a.size, "bytes": size, "largest": largest, "rows": rows}
        a.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
