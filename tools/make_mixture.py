"""Makes the open mixture: text to train and evaluate on, from Debian packages.

  python -m tools.make_mixture --out=runs/mixture [--budget=12e6]
      [--licences=public_domain,permissive,copyleft]

Writes OUT/train, OUT/validation and OUT/unseen, one file per work, for
`data.sources=files:OUT/train/*.txt`; MIXTURE.md, a table of the works; about.json, their digests;
licences/, each package's own words. The split is by work: validation has other works of kinds that
train has too, unseen has works further from them. A paragraph of 60 characters or more is in one
place only, in train rather than validation or unseen: more works there do not change what is
trained on. Works of prose come from the packaged corpus.
Some of the text is copyleft: read MIXTURE.md before you pass it on.

Needs Debian 12 (`apt-get update` first), groff and perl; installs nothing. The same package
versions give the same bytes.
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
from typing import NamedTuple

import latent_delib
from latent_delib.errors import UserError
from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from latent_delib.machine.files import whole
from latent_delib.machine.progress import Progress
from latent_delib.machine.provenance import provenance
from tools import extract
from tools.extract import Pages, dictionary, man_pages, manual, pods, sayings

SPLITS = ("train", "validation", "unseen")  # a paragraph that repeats stays in the first of these
LICENCES = ("public_domain", "permissive", "copyleft")
CORPUS = Path(latent_delib.__file__).parent / "data" / "corpus"
# Folders and pages that are no text to read.
NO_TEXT = "index doc-index genindex search toc tags _modules _sources changelog changes releases? "
NO_TEXT += "whatsnew news"
SKIPPED = rf"(^|/)({'|'.join(NO_TEXT.split())})([^a-z/][^/]*)?(/|$)"


class Source(NamedTuple):
    """Describes a Debian package of the mixture.

    licence: of its text, as its copyright file states it. group: of LICENCES.
    """

    licence: str
    group: str
    read: Callable[[Path], Pages] = partial(manual, drop=SKIPPED)
    split: str = "train"


def english(keep: str) -> Callable[[Path], Pages]:
    """Returns a reader of the HTML pages of one language or part, by their path below usr/share."""
    return partial(manual, keep=f"usr/share/{keep}", drop=SKIPPED)


# By package. (Not dict-foldoc: it contains a third of the Jargon File, which is unseen.)
SOURCES = {
    "ada-reference-manual-2012": Source("GPL-3+", "copyleft"),
    "apache2-doc": Source("Apache-2.0", "permissive", english("doc/apache2-doc/manual/en/.*")),
    "debian-handbook": Source(
        "GPL-2+ or CC-BY-SA-3.0", "copyleft", english("doc/debian-handbook/html/en-US/.*")
    ),
    "debian-policy": Source("GPL-2+", "copyleft"),
    "developers-reference": Source("GPL-2+", "copyleft"),
    "dict-gcide": Source("GPL-3+", "copyleft", dictionary),
    "dict-wn": Source("WordNet-3.0", "permissive", dictionary),
    "erlang-doc": Source("Apache-2.0", "permissive"),
    "freebsd-manpages": Source("BSD-2-Clause and BSD-4-Clause", "permissive", man_pages),
    "ghc-doc": Source("BSD-3-Clause", "permissive"),
    "git-doc": Source("GPL-2", "copyleft"),
    "installation-guide-amd64": Source(
        "GPL-2", "copyleft", english("doc/installation-guide-amd64/en/.*")
    ),
    "kicad-doc-en": Source("GPL-3+", "copyleft"),
    "libboost1.81-doc": Source("BSL-1.0", "permissive"),
    "libreoffice-help-en-us": Source("MPL-2.0", "copyleft"),
    "lilypond-doc-html": Source(
        "GPL-3+", "copyleft", english(r"doc/lilypond/html/Documentation/[^.]*\.html")
    ),
    "linux-doc-6.1": Source(
        "GPL-2", "copyleft", english(r"doc/linux-doc-6.1/html/(?!translations/).*")
    ),
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
    "rust-doc": Source(
        "MIT or Apache-2.0",
        "permissive",
        english(r"doc/rust-doc/html/(?!src/|core/arch|std/arch).*"),
    ),
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
    with whole(Path(out)) as folder, tempfile.TemporaryDirectory() as scratch:
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
    root, version = extract.debian(Path(scratch), package)
    documents = extract.sample(SOURCES[package].read(root), budget)
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
            content = extract.SEPARATOR.join(cleaned) + "\n"
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
    """Returns work -> (version, licence, documents) of a split: packaged prose, then packages."""
    found = {}
    for file in sorted((CORPUS / split).glob("prose_*.txt")):
        documents = file.read_text(encoding="utf-8").removesuffix("\n").split(extract.SEPARATOR)
        paragraphs = [document.split("\n\n") for document in documents]
        found[file.stem] = ("packaged corpus", "public domain", paragraphs)
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
