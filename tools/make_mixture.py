"""The open mixture: text to train and to evaluate on, out of Debian packages, each with its licence.

  python -m tools.make_mixture --out=runs/mixture [--licences=public_domain,permissive,copyleft] [--budget=12e6]

Writes OUT/train, OUT/validation and OUT/unseen, one file a work, for `data.sources=files:OUT/train/*.txt`; MIXTURE.md,
a table of what is in it; about.json, its digests; licences/, each package's own words. The split is by work: validation
has other works of kinds that train has too, unseen has works further from them. A paragraph of 60 characters or more
stands in one place only, in validation or unseen rather than train. Works of prose come from the packaged corpus.
Some of it is copyleft: look at MIXTURE.md before you pass it on.

Needs Debian 12 (`apt-get update` first), groff and perl; installs nothing. The same versions of packages give the same
bytes.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import latent_delib
from latent_delib.errors import UserError
from latent_delib.machine import commands
from latent_delib.machine.files import whole
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from tools import extract
from tools.extract import Pages, dictionary, man_pages, manual, pods, sayings

SPLITS = ("validation", "unseen", "train")  # in the order in which a paragraph that is met again goes
LICENCES = ("public_domain", "permissive", "copyleft")
CORPUS = Path(latent_delib.__file__).parent / "data" / "corpus"
# Folders and pages that are no text to read.
NO_TEXT = "index doc-index genindex search toc tags _modules _sources changelog changes releases? whatsnew news"
SKIPPED = rf"(^|/)({'|'.join(NO_TEXT.split())})([^a-z/][^/]*)?(/|$)"


class Source(NamedTuple):
    """A Debian package of the mixture. licence: of its text, as its copyright file states it; group: of LICENCES."""

    licence: str
    group: str
    read: Callable[[Path], Pages] = partial(manual, drop=SKIPPED)
    split: str = "train"


def english(keep: str) -> Callable[[Path], Pages]:
    """The HTML pages of one language or part, by their path below usr/share."""
    return partial(manual, keep=f"usr/share/{keep}", drop=SKIPPED)


# Package -> what it is. (Not dict-foldoc: a third of the Jargon File, which is unseen, stands in it.)
SOURCES = {
    "ada-reference-manual-2012": Source("GPL-3+", "copyleft"),
    "apache2-doc": Source("Apache-2.0", "permissive", english("doc/apache2-doc/manual/en/.*")),
    "debian-handbook": Source("GPL-2+ or CC-BY-SA-3.0", "copyleft", english("doc/debian-handbook/html/en-US/.*")),
    "debian-policy": Source("GPL-2+", "copyleft"),
    "developers-reference": Source("GPL-2+", "copyleft"),
    "dict-gcide": Source("GPL-3+", "copyleft", dictionary),
    "dict-wn": Source("WordNet-3.0", "permissive", dictionary),
    "erlang-doc": Source("Apache-2.0", "permissive"),
    "freebsd-manpages": Source("BSD-2-Clause and BSD-4-Clause", "permissive", man_pages),
    "ghc-doc": Source("BSD-3-Clause", "permissive"),
    "git-doc": Source("GPL-2", "copyleft"),
    "installation-guide-amd64": Source("GPL-2", "copyleft", english("doc/installation-guide-amd64/en/.*")),
    "kicad-doc-en": Source("GPL-3+", "copyleft"),
    "libboost1.81-doc": Source("BSL-1.0", "permissive"),
    "libreoffice-help-en-us": Source("MPL-2.0", "copyleft"),
    "lilypond-doc-html": Source("GPL-3+", "copyleft", english(r"doc/lilypond/html/Documentation/[^.]*\.html")),
    "linux-doc-6.1": Source("GPL-2", "copyleft", english(r"doc/linux-doc-6.1/html/(?!translations/).*")),
    "llvm-14-doc": Source("Apache-2.0 with LLVM exceptions", "permissive"),
    "manpages": Source("GPL-2+ and others", "copyleft", man_pages),
    "manpages-dev": Source("GPL-2+ and others", "copyleft", man_pages),
    "maxima-doc": Source("GPL-2", "copyleft", english("doc/maxima-doc/html/.*")),
    "nodejs-doc": Source("MIT", "permissive"),
    "octave-doc": Source("GPL-3+", "copyleft"),
    "openjdk-17-doc": Source("GPL-2 with Classpath exception", "copyleft"),
    "perl-doc": Source("GPL-1+ or Artistic", "copyleft", pods),
    "postgis-doc": Source("GPL-2+", "copyleft"),
    "postgresql-doc-15": Source("PostgreSQL", "permissive"),
    "python-django-doc": Source("BSD-3-Clause", "permissive"),
    "python-pandas-doc": Source("BSD-3-Clause", "permissive"),
    "python-scipy-doc": Source("BSD-3-Clause", "permissive"),
    "python-sklearn-doc": Source("BSD-3-Clause", "permissive"),
    "python-sqlalchemy-doc": Source("MIT", "permissive"),
    "python-sympy-doc": Source("BSD-3-Clause", "permissive"),
    "python3.11-doc": Source("PSF-2", "permissive"),
    "qtbase5-doc-html": Source("LGPL-3 or GPL-2", "copyleft"),
    "racket-doc": Source("LGPL-2.1+", "copyleft"),
    "rust-doc": Source("MIT or Apache-2.0", "permissive", english(r"doc/rust-doc/html/(?!src/|core/arch|std/arch).*")),
    "sagemath-doc": Source("GPL-2+", "copyleft", english("doc/sagemath/html/en/.*")),
    "sbcl-doc": Source("public domain", "public_domain"),
    "sqlite3-doc": Source("public domain", "public_domain"),
    "swi-prolog-doc": Source("BSD-2-Clause", "permissive"),
    "vim-doc": Source("Vim", "permissive"),
    "bind9-doc": Source("MPL-2.0", "copyleft", split="validation"),
    "debian-reference-en": Source("GPL-2+", "copyleft", split="validation"),
    "postfix-doc": Source("EPL-2.0 or IPL-1.0", "permissive", split="validation"),
    "python-tornado-doc": Source("Apache-2.0", "permissive", split="validation"),
    "anarchism": Source("GPL-2", "copyleft", split="unseen"),
    "dict-devil": Source("public domain", "public_domain", dictionary, "unseen"),
    "dict-jargon": Source("public domain", "public_domain", dictionary, "unseen"),
    "fortunes": Source("BSD-4-Clause collection", "permissive", sayings, "unseen"),
}


class Work(NamedTuple):
    """documents: as they are read, not yet cleaned; each is its paragraphs. copyright: what the package says of it."""

    version: str
    copyright: str
    documents: list[list[str]]


def make_mixture(out: str, licences: str, budget: float) -> None:
    """Writes the mixture to the folder `out`, whole or not at all.

    Args:
      licences: groups of LICENCES, with commas between. budget: characters of a work, about, at most.

    Raises:
      UserError: `out` is there already; an unknown group; a program or package that is not to be had; one without text.
    """
    groups = licences.split(",")
    if unknown := sorted(set(groups) - set(LICENCES)):
        raise UserError(f"--licences: {unknown[0]!r}, expected some of {','.join(LICENCES)}")
    if not extract.SHORTEST <= budget < math.inf:
        raise UserError(f"--budget={budget:g}: expected at least {extract.SHORTEST} characters, and a number")
    for program in ("apt-get", "dpkg-deb", "groff", "pod2text"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not installed; Debian's apt, dpkg, groff and perl are needed")
    chosen = {package: source for package, source in SOURCES.items() if source.group in groups}
    with whole(Path(out)) as folder, tempfile.TemporaryDirectory() as scratch:
        progress = Progress("read", len(chosen), "packages")
        works: dict[str, Work] = {}
        with ProcessPoolExecutor() as pool:
            for package, work in zip(chosen, pool.map(partial(read, scratch=scratch, budget=int(budget)), chosen)):
                works[package] = work
                progress(len(works))
        write(folder, chosen, works)
    print((Path(out) / "MIXTURE.md").read_text())


def read(package: str, scratch: str, budget: int) -> Work:
    """Fetches a package of SOURCES and reads it; what it was unpacked to is removed."""
    root, version = extract.debian(Path(scratch), package)
    documents = extract.sample(SOURCES[package].read(root), budget)
    notice = root / "usr/share/doc" / package / "copyright"
    text = (
        notice.read_text(encoding="utf-8", errors="replace") if notice.is_file() else ""
    )  # a link into a package it needs
    shutil.rmtree(root)
    if not documents:
        raise UserError(f"Debian package {package} {version}: no text was found in it")
    return Work(version, text, documents)


def write(folder: Path, chosen: dict[str, Source], works: dict[str, Work]) -> None:
    """Cleans the works, split after split, and writes all files."""
    for name in (*SPLITS, "licences"):
        (folder / name).mkdir()
    seen: set[str] = set()
    rows, digests, sizes = [], {}, dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        texts: dict[str, tuple[list[list[str]], str, str]] = {}  # work -> documents, version, licence
        for file in sorted((CORPUS / split).glob("prose_*.txt")):
            packaged = file.read_text(encoding="utf-8").removesuffix("\n").split(extract.SEPARATOR)
            texts[file.stem] = [text.split("\n\n") for text in packaged], "packaged corpus", "public domain"
        for package, source in chosen.items():
            if source.split == split:
                texts[package] = works[package].documents, works[package].version, source.licence
        for name, (documents, version, licence) in texts.items():
            content = extract.SEPARATOR.join(cleaned := list(extract.clean(documents, seen))) + "\n"
            if not cleaned:
                raise UserError(f"{name} {version}: nothing is left of its text that does not stand elsewhere")
            (folder / split / f"{name}.txt").write_text(content, encoding="utf-8")
            digests[f"{split}/{name}.txt"] = hashlib.sha256(content.encode()).hexdigest()
            sizes[split] += (size := len(content.encode()))
            rows.append(f"| {split} | {name} | {version} | {licence} | {len(cleaned):,} | {size:,} |")
    for package, work in works.items():
        if work.copyright:
            (folder / "licences" / f"{package}.txt").write_text(work.copyright, encoding="utf-8")
    totals = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    table = [
        "# The mixture",
        "",
        f"Bytes of text: {totals}. Made by `tools.make_mixture`; `licences/` has the packages' own words.",
        "",
        "| split | work | version | licence | documents | bytes |",
        "| --- | --- | --- | --- | ---: | ---: |",
        *rows,
    ]
    (folder / "MIXTURE.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    about = {"sha256": digests, "provenance": provenance(computed=False)}
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def main(flags: Any) -> None:
    make_mixture(flags.out, flags.licences, flags.budget)


if __name__ == "__main__":
    commands.run(
        main,
        __doc__,
        out=(commands.REQUIRED, "the folder to write"),
        licences=(",".join(LICENCES), "which groups of licences to take, with commas between"),
        budget=(12e6, "characters taken of each work, about, at most"),
    )
