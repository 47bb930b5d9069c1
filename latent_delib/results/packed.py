"""Reads the files of finished runs, as they were written or packed, one zip archive per run.

A file in a pack has the path that it would have if the pack were unpacked in its folder:
docs/results/a/after@0.zip holds docs/results/a/after@0/swap/perplexity.json.
`tools/pack_results.py` makes packs.
"""

import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_delib.errors import UserError

PACK = ".zip"
RESULTS = ("perplexity.json", "benchmarks.json")
METRICS = "metrics.jsonl"
DOCUMENTS = "documents.npz"
NAMES = (*RESULTS, METRICS, DOCUMENTS)
SKIPPED = ("checkpoints", "tensorboard")  # large, and hold no run

DAMAGE = (zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, ValueError)

Arrays = dict[str, np.ndarray]


class File(NamedTuple):
    """Names a file of a finished run.

    path: the file's path, or the path that it would have if it were not packed.
    read_bytes: returns its content, packed or not.
    """

    path: Path
    read_bytes: Callable[[], bytes]

    def read(self) -> Any:
        """Returns the content: .json a dict, .jsonl a list of dicts, .npz arrays by name.

        Raises:
          UserError: the content is not JSON, or damaged.
        """
        try:
            content = self.read_bytes()
            if self.path.suffix == ".npz":
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    return dict(arrays)
        except DAMAGE as error:
            raise UserError(f"{self.path}: damaged ({error})") from None
        if self.path.suffix == ".jsonl":
            return _parse_lines(content, str(self.path))
        return _parse(content, str(self.path))


def files_below(folder: Path) -> Iterator[File]:
    """Finds the files of runs below a folder, packed or not; the folder may be inside a pack."""
    if not folder.is_dir():
        for run in (folder, *folder.parents):
            pack = Path(f"{run}{PACK}")
            if pack.is_file():
                for file in files_in(pack):
                    if folder in file.path.parents:
                        yield file
                return
    for where, inside, names in os.walk(folder):
        shown = [name for name in inside if not name.startswith(".")]
        inside[:] = sorted(set(shown).difference(SKIPPED))
        for name in NAMES:
            if name in names:
                path = Path(where) / name
                yield File(path, path.read_bytes)
        for name in sorted(name.removesuffix(PACK) for name in names if name.endswith(PACK)):
            yield from files_in(Path(where) / (name + PACK))


def files_in(pack: Path) -> Iterator[File]:
    """Finds the files in a pack, in the order in which a walk would find them.

    Raises:
      UserError: it is not a zip archive.
    """
    try:
        with zipfile.ZipFile(pack) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{pack}: not a zip archive ({error})") from None
    for name in sorted(names, key=lambda name: Path(name).parent.parts):
        path = pack.parent / name
        if path.name in NAMES:
            yield File(path, partial(_unpack, pack, name))


def _unpack(pack: Path, name: str) -> bytes:
    with zipfile.ZipFile(pack) as archive:
        return archive.read(name)


def _parse_lines(content: bytes, where: str) -> list[dict[str, Any]]:
    """Reads a JSON object per line, but no last line that is still being written."""
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return [_parse(line, f"{where}:{number}") for number, line in enumerate(lines, 1)]


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
