"""Packs finished runs into one archive, runs.zip, as docs/results keeps them.

  python -m tools.pack_results WORKDIR [WORKDIR ...] --out=docs/results/lab

Takes what `train`, `evaluate` and `benchmark` wrote below each workdir: perplexity.json,
benchmarks.json, metrics.jsonl and documents.npz. Adds it to the archive in --out, if there is one;
a run of the same name is replaced. `report` makes the same tables from the archive as from the
workdirs. The same files give the same archive, byte for byte.
"""

import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latent_delib.errors import UserError
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import FOLDERS, REQUIRED
from latent_delib.results.packed import METRICS, PACK, RESULTS, files_below, files_in


def main(flags: Any) -> None:
    pack = Path(flags.out) / PACK
    added: dict[str, bytes] = {}
    runs: set[str] = set()
    for folder in flags.folders:
        workdir = Path(folder).resolve()
        if workdir.name in runs:
            raise UserError(
                f"two of the workdirs are called {workdir.name!r}; pack them into two folders"
            )
        runs.add(workdir.name)
        below = list(files_below(workdir))
        if not below:
            raise UserError(
                f"{folder}: holds no {', '.join((*RESULTS, METRICS))} of a finished run"
            )
        for file in below:
            added[file.path.relative_to(workdir.parent).as_posix()] = file.read_bytes()
    contents = kept(pack, runs) | added
    files.write(pack, archive(contents))
    print(f"wrote {pack}: {len(contents)} files of finished runs")


def kept(pack: Path, replaced: Collection[str]) -> dict[str, bytes]:
    """Returns the files of a pack by name, without those of replaced runs; none without a pack."""
    found: dict[str, bytes] = {}
    if not pack.exists():
        return found
    for file in files_in(pack):
        name = file.path.relative_to(pack.parent)
        if name.parts[0] not in replaced:
            found[name.as_posix()] = file.read_bytes()
    return found


def archive(contents: Mapping[str, bytes]) -> bytes:
    """Returns a zip archive of files by name, each with the date that `ZipInfo` has by default."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        for name in sorted(contents):
            opened.writestr(zipfile.ZipInfo(name), contents[name], zipfile.ZIP_LZMA)
    return content.getvalue()


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        folders=(FOLDERS, "workdirs of finished runs"),
        out=(REQUIRED, "the folder of the pack"),
    )
