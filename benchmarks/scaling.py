"""The published settings on TPU slices that nobody here has: one dry run a row, and the table of docs/scaling.md.

  LATENT_DELIB_EXTRAS=tpu ./launch/setup.sh
  .venv/bin/python -m benchmarks.scaling --out=runs/scaling                 every row, two to four minutes each
  .venv/bin/python -m benchmarks.scaling --out=runs/scaling --only=chips    the rows of one table

Run again, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from latent_delib.job.plan import gib


class Row(NamedTuple):
    """A dry run. parts: the batch of 1024 rows passes in as many (config.train.accumulation)."""

    size: str
    topology: str
    mesh: tuple[int, int, int]  # data, fsdp, traces
    parts: int
    latents: int
    traces: int = 128
    seq_len: int = 2048
    batch: int = 1024
    remat: str = "attention"

    @property
    def name(self) -> str:
        data, fsdp, traces = self.mesh
        where = f"{self.topology.replace(':', '-')}_{data}x{fsdp}x{traces}"
        shape = f"L{self.latents}_M{self.traces}_T{self.seq_len}_B{self.batch}in{self.parts}"
        return f"{self.size}_{shape}_{where}" + (f"_{self.remat}" if self.remat != "attention" else "")

    def arguments(self) -> list[str]:
        values = {"mesh.data": self.mesh[0], "mesh.fsdp": self.mesh[1], "mesh.traces": self.mesh[2]}
        values |= {"train.accumulation": self.parts, "train.batch_size": self.batch, "data.seq_len": self.seq_len}
        values |= {"method.num_latents": self.latents, "method.num_traces": self.traces, "compute.remat": self.remat}
        return [
            f"--config=configs/{self.size}.py",
            f"--topology={self.topology}",
            *(f"--config.{k}={v}" for k, v in values.items()),
        ]


SLICES = (
    ("v5e:4x4", (1, 16, 1), 64),
    ("v5e:16x16", (16, 16, 1), 4),
    ("v5p:4x4x4", (4, 16, 1), 4),
    ("v6e:16x16", (16, 16, 1), 2),
)
TABLES = {
    "slices": [
        Row(size, *where, latents) for size in ("gemma2_2b", "gemma2_9b") for latents in (16, 64) for where in SLICES
    ],
    # Two rows on a chip at once, whatever the number of chips.
    "chips": [
        Row("gemma2_2b", topology, (data, 16, 1), 1024 // (2 * 16 * data) or 1, 16, batch=max(1024, 2 * 16 * data))
        for topology, data in (("v5p:2x2x4", 1), ("v5p:4x4x4", 4), ("v5p:4x8x8", 16), ("v5p:8x8x16", 64))
    ],
    # Traces of a row shared out over four chips: for more chips than rows, or for a row that does not fit on one.
    "traces": [
        Row("gemma2_2b", "v5e:16x16", (4, 16, 4), 16, 64),
        Row("gemma2_9b", "v5e:4x4", (1, 4, 4), 256, 64),
    ],
    # Where `attention` does not fit: each layer's input alone is kept.
    "full": [
        Row("gemma2_9b", "v5e:4x4", (1, 16, 1), 64, 16, remat="full"),
        Row("gemma2_9b", "v5e:4x4", (1, 4, 4), 256, 64, remat="full"),
        Row("gemma2_9b", "v6e:16x16", (16, 16, 1), 4, 64, remat="full"),
    ],
    "shapes": [
        Row("gemma2_2b", "v5p:4x4x4", (4, 16, 1), 16, latents, traces, seq_len)
        for latents, traces, seq_len in (
            (4, 128, 2048),
            (32, 128, 2048),
            (64, 128, 2048),
            (16, 32, 2048),
            (16, 512, 2048),
            (16, 128, 8192),
        )
    ],
}


def dry_run(row: Row, out: Path) -> dict | None:
    """Its result; None where the program does not fit, which is kept too."""
    workdir = out / row.name
    kept, failed = workdir / "dry_run.json", workdir / "error.txt"
    if not kept.exists() and not failed.exists():
        print(f"== {row.name}", flush=True)
        command = [sys.executable, "-m", "latent_delib.train", "--dry_run", f"--workdir={workdir}", *row.arguments()]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "")
            if "does not fit" not in error:
                raise SystemExit(done.stderr)
            workdir.mkdir(parents=True, exist_ok=True)
            failed.write_text(error + "\n")
    return json.loads(kept.read_text()) if kept.exists() else None


def show(rows: list[Row], out: Path) -> str:
    """A table in Markdown."""
    head = "model | N_L | M | T | remat | slice | data x fsdp x traces | rows per chip x parts | state, GiB"
    head += " | needs, GiB | of | rows that fit | received, GiB | TFLOP | step, s | MFU"
    lines = ["| " + head + " |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        found = dry_run(row, out)
        data, fsdp, traces = row.mesh
        here = row.batch // row.parts / (data * fsdp)
        cells = [
            row.size,
            row.latents,
            row.traces,
            row.seq_len,
            row.remat,
            row.topology,
            f"{data} x {fsdp} x {traces}",
            f"{here:g} x {row.parts}",
        ]
        if found is None:
            cells += [
                "",
                (out / row.name / "error.txt").read_text().partition(";")[0].removeprefix("error: "),
                *[""] * 6,
            ]
        else:
            m = found["memory"]
            state = m["frozen weights"] + m["trainable weights"] + m["optimizer"]
            received = sum(t["received"] for t in found["received"].values())
            cells += [gib(state), gib(m["total"]), gib(found["memory_limit"]), found["largest_rows"], gib(received)]
            cells += [f"{sum(found['flops'].values()) / 1e12:,.0f}", f"{found['seconds']['step']:.2f}"]
            cells += [f"{found['model_flops_utilisation']:.1%}"]
        lines.append("| " + " | ".join(str(cell).removesuffix(" GiB") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=TABLES)
    a = parser.parse_args()
    for name in [a.only] if a.only else TABLES:
        print(f"\n{name}\n\n{show(TABLES[name], a.out)}", flush=True)


if __name__ == "__main__":
    main()
