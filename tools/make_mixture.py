"""Makes the open mixture: text to train and evaluate on, from Debian packages.

  python -m tools.make_mixture --out=runs/mixture [--budget=12e6]
      [--licences=public_domain,permissive,copyleft]

Writes OUT/train, OUT/validation and OUT/unseen, one file per work, for
`data.sources=files:OUT/train/*.txt`; MIXTURE.md, a table of the works; about.json, their digests;
licences/, each package's own words. The split is by work: validation has other works of kinds that
train has too, unseen has works further from them. A paragraph of 60 characters or more is kept
once: if train has it, validation and unseen lose it, so works added to these two never change
train. Prose to train on comes from tools/prose, other prose from the packaged corpus.
Some of the text is copyleft: read MIXTURE.md before you pass it on.

Needs Debian 12 (`apt-get update` first), groff and perl; installs nothing. The same package
versions give the same bytes.
"""

import hashlib
import json
import math
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from latent_delib.data.sources import CORPUS
from latent_delib.errors import UserError
from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import atomic_folder
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from tools import extract
from tools.mixture_sources import SOURCES, Source
from tools.task_files import SEPARATOR

SPLITS = ("train", "validation", "unseen")  # a paragraph that repeats stays in the first of these
LICENCES = ("public_domain", "permissive", "copyleft")
HELD_OUT = 400_000  # characters of a work outside train, roughly, at most: all weigh about alike
PROSE = Path(__file__).with_name("prose")


class Work(NamedTuple):
    """Holds a package's text.

    copyright: its copyright file. documents: not yet cleaned; each is a list of paragraphs.
    """

    version: str
    copyright: str
    documents: list[list[str]]


def make_mixture(out: str, licences: str, budget: float) -> None:
    """Writes the mixture to the folder `out`, whole or not at all.

    Args:
      out: the folder.
      licences: groups of LICENCES, with commas between.
      budget: characters of a work, roughly, at most.

    Raises:
      UserError: `out` exists; an unknown group; a program or package that is missing; a package
        without text.
    """
    groups = licences.split(",")
    unknown = sorted(set(groups) - set(LICENCES))
    if unknown:
        raise UserError(f"--licences: {unknown[0]!r}, expected some of {','.join(LICENCES)}")
    if not extract.SHORTEST <= budget < math.inf:
        raise UserError(
            f"--budget={budget:g}: expected at least {extract.SHORTEST} characters, and a number"
        )
    for program in ("apt-get", "dpkg-deb", "groff", "pod2text"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not installed; Debian's apt, dpkg, groff and perl are needed"
            )
    chosen = {package: source for package, source in SOURCES.items() if source.group in groups}
    with atomic_folder(Path(out)) as folder, tempfile.TemporaryDirectory() as scratch:
        progress = Progress("read", len(chosen), "packages")
        works: dict[str, Work] = {}
        with ProcessPoolExecutor() as pool:
            found = pool.map(partial(read_package, scratch=scratch, budget=int(budget)), chosen)
            for package, work in zip(chosen, found):
                works[package] = work
                progress(len(works))
        write_mixture(folder, chosen, works)
    print((Path(out) / "MIXTURE.md").read_text())


def read_package(package: str, scratch: str, budget: int) -> Work:
    """Fetches a package of SOURCES and reads it; removes the unpacked folder."""
    source = SOURCES[package]
    if source.split != "train":
        budget = min(budget, HELD_OUT)
    root, version = extract.debian(Path(scratch), package)
    documents = extract.sample(source.read(root), budget)
    notice = root / "usr/share/doc" / package / "copyright"
    text = ""
    if notice.is_file():  # otherwise it is a link into a package that this one needs
        text = notice.read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(root)
    if not documents:
        raise UserError(f"Debian package {package} {version}: no text was found in it")
    return Work(version, text, documents)


def write_mixture(folder: Path, chosen: dict[str, Source], works: dict[str, Work]) -> None:
    """Cleans the works, split after split, and writes all files."""
    for name in (*SPLITS, "licences"):
        (folder / name).mkdir()
    seen: set[str] = set()
    sizes = dict.fromkeys(SPLITS, 0)
    rows, digests = [], {}
    for split in SPLITS:
        for name, (version, licence, documents) in _works_of(split, chosen, works).items():
            cleaned = list(extract.clean(documents, seen))
            if not cleaned:
                raise UserError(f"{name} {version}: all of its text is in other works too")
            content = SEPARATOR.join(cleaned) + "\n"
            path = f"{split}/{name}.txt"
            (folder / path).write_text(content, encoding="utf-8")
            size = len(content.encode())
            digests[path] = hashlib.sha256(content.encode()).hexdigest()
            sizes[split] += size
            rows.append(
                f"| {split} | {name} | {version} | {licence} | {len(cleaned):,} | {size:,} |"
            )
    for package, work in works.items():
        if work.copyright:
            (folder / "licences" / f"{package}.txt").write_text(work.copyright, encoding="utf-8")
    totals = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    made = "Made by `tools.make_mixture`; `licences/` has the packages' own words."
    table = [
        "# The mixture",
        "",
        f"Bytes of text: {totals}. {made}",
        "",
        "| split | work | version | licence | documents | bytes |",
        "| --- | --- | --- | --- | ---: | ---: |",
        *rows,
    ]
    (folder / "MIXTURE.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    about = {"sha256": digests, "provenance": provenance(computed=False)}
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _works_of(
    split: str, chosen: dict[str, Source], works: dict[str, Work]
) -> dict[str, tuple[str, str, list[list[str]]]]:
    """Returns work -> (version, licence, documents) of a split: prose of ours, then packages."""
    found = {}
    folder, label = CORPUS / split, "packaged corpus"
    if split == "train":
        folder, label = PROSE, "tools/prose"
    for file in sorted(folder.glob("prose_*.txt")):
        found[file.stem] = (label, "public domain", extract.read(file))
    for package, source in chosen.items():
        if source.split == split:
            work = works[package]
            found[package] = (work.version, source.licence, work.documents)
    return found


if __name__ == "__main__":
    commands.run(
        lambda flags: make_mixture(flags.out, flags.licences, flags.budget),
        __doc__,
        out=(REQUIRED, "the folder to write"),
        licences=(",".join(LICENCES), "which groups of licences to take, with commas between"),
        budget=(12e6, "characters taken from each work, roughly, at most"),
    )
