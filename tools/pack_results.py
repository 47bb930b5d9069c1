"""Packs finished runs into two small files, runs.json and runs.npz, as docs/results keeps them.

  python -m tools.pack_results WORKDIR [WORKDIR ...] --out=docs/results/b_cpu

Takes what `train`, `evaluate` and `benchmark` wrote below each workdir: perplexity.json, benchmarks.json, metrics.jsonl
and documents.npz. Adds them to the pack that is in --out, if there is one; a run of the same name is replaced. `report`
makes the same tables from the pack as from the workdirs.
"""

from pathlib import Path
from typing import Any

from latent_delib.machine import commands
from latent_delib.results import packed


def main(flags: Any) -> None:
    count = packed.write_pack(flags.folders, Path(flags.out))
    print(f"wrote {flags.out}/{packed.RECORD} and {packed.NUMBERS}: {count} files of finished runs")


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        folders=(commands.FOLDERS, "workdirs of finished runs"),
        out=(commands.REQUIRED, "the folder of the pack"),
    )
