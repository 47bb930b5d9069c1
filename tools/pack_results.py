"""Packs each finished run into a zip archive, as docs/results keeps them.

  python -m tools.pack_results WORKDIR [WORKDIR ...] --out=docs/results/lab

Takes what `train`, `evaluate` and `benchmark` wrote below each workdir: perplexity.json,
benchmarks.json, metrics.jsonl and documents.npz, of which a pack keeps the sums of each work.
Writes it as OUT/NAME.zip, where NAME is that of the workdir. `report` makes the same tables from
the packs as from the workdirs. The same files give the same pack, byte for byte.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latent_delib.errors import UserError
from latent_delib.machine import commands, files
from latent_delib.machine.command_line import FOLDERS, REQUIRED
from latent_delib.measure import perplexity
from latent_delib.results.packed import DOCUMENTS, METRICS, PACK, RESULTS, File, files_below


def main(flags: Any) -> None:
    packs: dict[str, dict[str, bytes]] = {}
    for folder in flags.folders:
        workdir = Path(folder).resolve()
        if workdir.name in packs:
            raise UserError(
                f"two of the workdirs are called {workdir.name!r}; pack them into two folders"
            )
        contents = {
            file.path.relative_to(workdir.parent).as_posix(): kept(file)
            for file in files_below(workdir)
        }
        if not contents:
            raise UserError(
                f"{folder}: holds no {', '.join((*RESULTS, METRICS))} of a finished run"
            )
        packs[workdir.name] = contents
    for name, contents in packs.items():
        pack = Path(flags.out) / (name + PACK)
        files.write(pack, archive(contents))
        print(f"wrote {pack}: {len(contents)} files")


def kept(file: File) -> bytes:
    """Returns what a pack keeps of a file: all, but of documents.npz the sums of each work."""
    if file.path.name != DOCUMENTS:
        return file.read_bytes()
    arrays = file.read()
    if "work" in arrays:  # older files have none
        arrays = perplexity.sum_works(arrays)
    return perplexity.to_npz(arrays)


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
        out=(REQUIRED, "the folder of the packs"),
    )
