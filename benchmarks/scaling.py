"""Compiles the published settings for TPU slices that are not here, and prints what they need.

  ./launch/setup.sh tpu
  .venv/bin/python -m benchmarks.scaling --out=runs/scaling [--only=chips]

Makes the tables of docs/scaling.md, or one of them; a row takes two to four minutes. Memory and
traffic are those of the program that the slice would run. Times are estimates from data sheets. Run
again, it goes on where it stopped.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from benchmarks import common
from configs import gemma2_2b
from latent_delib.errors import UserError
from latent_delib.job import dry_run, experiment
from latent_delib.job import plan as planning
from latent_delib.job.estimate import step_seconds
from latent_delib.job.plan import gib
from latent_delib.machine.chips import CHIPS, Chip
from latent_delib.machine.columns import markdown
from tools.collectives import collectives


class Row(NamedTuple):
    """Names a program.

    mesh: data, fsdp, traces. parts: the batch passes in as many (config.train.accumulation).
    """

    size: str
    topology: str
    mesh: tuple[int, int, int]
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
        name = f"{self.size}_{shape}_{where}"
        return name if self.remat == "attention" else f"{name}_{self.remat}"

    @property
    def rows(self) -> float:
        """Returns how many rows of a batch a chip has in work at once."""
        data, fsdp, _ = self.mesh
        return self.batch / self.parts / (data * fsdp)

    def config(self) -> ConfigDict:
        c = gemma2_2b.get_config(self.size)
        c.mesh.data, c.mesh.fsdp, c.mesh.traces = self.mesh
        c.train.update(batch_size=self.batch, accumulation=self.parts)
        c.method.update(num_latents=self.latents, num_traces=self.traces)
        c.data.seq_len = self.seq_len
        c.compute.remat = self.remat
        return c


SLICES = (
    ("v5e:4x4", (1, 16, 1), 64),
    ("v5e:16x16", (16, 16, 1), 4),
    ("v5p:4x4x4", (4, 16, 1), 4),
    ("v6e:16x16", (16, 16, 1), 2),
)
TABLES = {
    "slices": [
        Row(size, *where, latents)
        for size in ("gemma2_2b", "gemma2_9b")
        for latents in (16, 64)
        for where in SLICES
    ],
    # Two rows on a chip at once, whatever the number of chips.
    "chips": [
        Row(
            "gemma2_2b",
            topology,
            (data, 16, 1),
            1024 // (2 * 16 * data) or 1,
            16,
            batch=max(1024, 2 * 16 * data),
        )
        for topology, data in (
            ("v5p:2x2x4", 1),
            ("v5p:4x4x4", 4),
            ("v5p:4x8x8", 16),
            ("v5p:8x8x16", 64),
        )
    ],
    # The traces of a row on four chips: where chips outnumber rows, or a row does not fit on one.
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


HEAD = (
    "model | N_L | M | T | remat | slice | data x fsdp x traces | rows per chip x parts"
    " | state, GiB | needs, GiB | of | rows that fit | received, GiB | TFLOP | step, s | MFU"
)


def compiled(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Compiles the step of a config for a slice; returns what one chip needs for it.

    Returns:
      chip: its kind; received: kind of collective -> calls and bytes; and the keys of
        `dry_run.needs`.

    Raises:
      UserError: as `dry_run.dry_run` does.
    """
    exp = experiment.read(config, dry_run.slice_of(topology))
    plan = planning.make(exp)
    program = dry_run.compile_or_explain(exp, plan)
    traffic = collectives(program.as_text())
    return {
        "chip": exp.mesh.devices.flat[0].device_kind,
        "received": {kind: found._asdict() for kind, found in traffic.items()},
        **dry_run.needs(exp, plan, program),
    }


def estimate(found: dict[str, Any], rows: float, chip: Chip) -> dict[str, Any]:
    """Estimates the time per step, the utilisation, and the largest batch that fits.

    Args:
      found: as `compiled` returns it.
      rows: of a batch that a chip has in work at once.

    Returns:
      seconds: of a step; utilisation: useful FLOPs as a share of the peak; largest_rows: as
        `rows`.
    """
    memory = found["memory"]
    computed = sum(found["flops"].values())
    seconds = step_seconds(computed, received(found), memory["trainable weights"], chip)
    # Whatever is not weights, gradients or table grows in proportion to the rows.
    grows = memory["cache of the text"] + max(memory["other temporaries"], 0)
    fit = (found["memory_limit"] - memory["total"] + grows) / (grows / rows)
    return {
        "seconds": seconds,
        "utilisation": found["flops"]["useful"] / seconds / chip.peak,
        "largest_rows": max(int(fit), int(rows)),
    }


def received(found: dict[str, Any]) -> float:
    """Returns the bytes that a chip receives in a step."""
    return sum(traffic["received"] for traffic in found["received"].values())


def result(row: Row, out: Path) -> dict[str, Any]:
    """Returns what a row's program needs, or {"error": why} where it does not fit.

    Either is kept in OUT/NAME.json.
    """
    kept = out / f"{row.name}.json"
    if not kept.exists():
        print(f"== {row.name}", flush=True)
        try:
            found = compiled(row.config(), row.topology)
        except UserError as error:
            if not str(error).startswith("does not fit"):
                raise
            found = {"error": str(error)}
        out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2))
    return json.loads(kept.read_text())


def figures(found: dict[str, Any], rows: float) -> list[str]:
    """Returns a row's cells from "state, GiB" on."""
    if "error" in found:
        why = found["error"].partition(";")[0]
        return ["", why, *[""] * 6]
    estimated = estimate(found, rows, CHIPS[found["chip"]])
    memory = found["memory"]
    state = memory["frozen weights"] + memory["trainable weights"] + memory["optimizer"]
    sizes = state, memory["total"], found["memory_limit"]
    return [
        *(gib(size).removesuffix(" GiB") for size in sizes),
        str(estimated["largest_rows"]),
        gib(received(found)).removesuffix(" GiB"),
        f"{sum(found['flops'].values()) / 1e12:,.0f}",
        f"{estimated['seconds']:.2f}",
        f"{estimated['utilisation']:.1%}",
    ]


def show(rows: list[Row], out: Path) -> str:
    """Returns a table in Markdown."""
    lines = []
    for row in rows:
        data, fsdp, traces = row.mesh
        setting = [row.size, row.latents, row.traces, row.seq_len, row.remat, row.topology]
        setting += [f"{data} x {fsdp} x {traces}", f"{row.rows:g} x {row.parts}"]
        lines.append([*map(str, setting), *figures(result(row, out), row.rows)])
    return markdown(HEAD.split(" | "), lines)


def main() -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=TABLES)
    a = parser.parse_args()
    for name in [a.only] if a.only else TABLES:
        print(f"\n{name}\n\n{show(TABLES[name], a.out)}", flush=True)


if __name__ == "__main__":
    main()
