"""Extracts and cleans the text of packages: manuals, man pages, POD, dictionaries, sayings, books.

The contents of a package are `Pages`: each page's name, and a function that reads its paragraphs,
so that a sample of a large package costs no more than the pages in it. `build_corpus` and
`make_mixture` use these functions; a change here changes the bytes that they write.
"""

import functools
import gzip
import hashlib
import re
import struct
import subprocess
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_delib.errors import UserError, extra
from tools.task_files import SEPARATOR

if TYPE_CHECKING:
    from lxml import html

Pages = dict[str, Callable[[], list[str]]]

SHORTEST, LONGEST = 500, 30_000  # characters of a document
REPEATED = 60  # a paragraph of at least this many characters is kept only where it is first met
ENTRIES = 200  # of a dictionary, on a page


def debian(folder: Path, package: str) -> tuple[Path, str]:
    """Unpacks a Debian package below `folder`; returns its root and version, installs nothing.

    Raises:
      UserError: the package cannot be had.
    """
    root = folder / package
    done = subprocess.run(
        ["apt-get", "download", package], cwd=folder, capture_output=True, text=True
    )
    archives = list(folder.glob(f"{package}_*.deb"))
    if done.returncode or not archives:
        reason = done.stderr.strip().splitlines()[-1:] or ["no archive came"]
        raise UserError(
            f"Debian package {package}: {reason[0]} (apt-get update brings the list of packages)"
        )
    done = subprocess.run(
        ["dpkg-deb", "--extract", archives[0], root], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"Debian package {package}: {' '.join(done.stderr.split())}")
    archives[0].unlink()
    return root, archives[0].name.split("_")[1].replace("%3a", ":")


def _files(root: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    """Yields the path below `root` and the file, for each file of such a name; no links."""
    for file in sorted(root.rglob(pattern)):
        if file.is_file() and not file.is_symlink():
            yield file.relative_to(root).as_posix(), file


# HTML.

BLOCKS = set(
    "address article aside blockquote body center dd details div dl dt fieldset figure footer "
    "header h1 h2 h3 h4 h5 h6 hr li main ol p pre section table tbody tr ul".split()
)
DROPPED = set("button form head img nav noscript script style svg".split())
CHROME = set(  # classes and ids
    "bottomlang comments_section contents fancy_toc footer headerlink imgcontainer indexterm "
    "mainmenu menu navfooter navheader page-header path permalink quickview searchmenu sidebar "
    "submenu tagline toc toctree-wrapper top toplang up viewcode-link".split()
)
LEFTOVER = re.compile(
    r"This page (is part|last modified) .*|Previous: .*|See also:?|[a-z]+(-[a-z]+)+:", re.IGNORECASE
)


def lxml_html() -> Any:
    """Returns the module; raises UserError where it is not installed."""
    with extra("mixture"):
        from lxml import html
    return html


def within(element: "html.HtmlElement") -> list[str]:
    """Returns the blocks of text inside an element, in order, without navigation."""
    blocks: list[str] = []
    line: list[str] = []

    def close() -> None:
        words = " ".join("".join(line).split())
        if words:
            blocks.append(words)
        line.clear()

    def walk(parent: "html.HtmlElement") -> None:
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


def block(element: "html.HtmlElement") -> list[str]:
    """Returns the blocks of a block element: code as it is, a line per list item or table row."""
    if element.tag == "pre":
        lines = [line.rstrip() for line in element.text_content().expandtabs().split("\n")]
        code = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        return [code] if code.strip() else []
    if element.tag == "table":
        lines = []
        for row in element.iter("tr"):
            cells = [" ".join(within(cell)) for cell in row.xpath("./td|./th")]
            if "\n" in "".join(cells):  # a table that lays out code or lists
                return within(element)
            lines.append(" | ".join(filter(None, cells)).replace(": | ", ": "))
        text = "\n".join(filter(None, lines))
        numbers = sum(map(str.isdigit, text)) > 0.2 * len(text)
        return [text] if text and not numbers else []
    if element.tag in ("ul", "ol"):
        linked = sum(len(link.text_content()) for link in element.iter("a"))
        if linked > 0.9 * len(element.text_content().strip()):  # a table of contents
            return []
        items = [within(item) for item in element if item.tag == "li"]
        texts = []
        for first, *rest in filter(None, items):
            texts += [f"- {first}", *rest]
        has_only_lines = all(len(item) < 2 for item in items)
        return ["\n".join(texts)] if texts and has_only_lines else texts
    return within(element)


# Where the text of a page is: the first of these that the page has.
MAIN = ("//*[@role='main']", "//main", "//article", "//div[@id='content']", "/html/body")


def manual(root: Path, keep: str = ".*", drop: str = "$^", ending: str = ".html") -> Pages:
    """Returns the HTML pages below `root`.

    Args:
      root: of an unpacked package.
      keep: a pattern that matches the whole path of a page below `root`.
      drop: a pattern that matches nowhere in it.
      ending: of the names of the pages.
    """
    pages: Pages = {}
    for name, file in _files(root, f"*{ending}"):
        if re.fullmatch(keep, name) and not re.search(drop, name):
            pages[name] = functools.partial(_page, file)
    return pages


def _page(file: Path) -> list[str]:
    source = file.read_bytes()
    encoding = "utf-8" if b"utf-8" in source[:1500].lower() else "iso-8859-1"
    html = lxml_html()
    tree = html.fromstring(source, parser=html.HTMLParser(encoding=encoding, remove_comments=True))
    for xpath in MAIN:
        found = tree.xpath(xpath)
        if found:
            return [block for block in within(found[0]) if not LEFTOVER.fullmatch(block)]
    return []


# Other kinds of text.

WIDE = "9999"  # characters of a line: a paragraph is one


def man_pages(root: Path) -> Pages:
    """Returns every man page, set by groff without its head and foot."""
    pages: Pages = {}
    for _, file in _files(root, "*.gz"):
        if file.parent.name.startswith("man"):
            pages[file.name] = functools.partial(_man_page, file)
    return pages


def _man_page(file: Path) -> list[str]:
    source = gzip.decompress(file.read_bytes())
    if source.startswith(b".so "):  # another name of a page
        return []
    command = ["groff", "-mandoc", "-t", "-Kutf8", "-Tutf8", "-P-cbou"]
    command += [f"-rLL={WIDE}n", "-rHY=0", "-dAD=l"]
    done = subprocess.run(command, input=source, capture_output=True)
    text = done.stdout.decode(errors="replace")
    text = re.sub(r"(?<=\S) {3,}", "  ", text)  # columns of tables, set wide apart
    text = re.sub(r"(?m)^ *[\u2500-\u257f][ \u2500-\u257f]*\n", "", text)  # rules between rows
    return blocks(text)[1:-1]


def pods(root: Path) -> Pages:
    """Returns every page of Perl's Plain Old Documentation."""
    return {file.name: functools.partial(_pod, file) for _, file in _files(root, "*.pod")}


def _pod(file: Path) -> list[str]:
    done = subprocess.run(["pod2text", "-u", f"--width={WIDE}", file], capture_output=True)
    return blocks(done.stdout.decode())


def blocks(text: str) -> list[str]:
    """Returns the paragraphs of a set page: between empty lines, without the margin they share."""
    found = []
    for part in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.rstrip() for line in part.split("\n") if line.strip()]
        margin = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        found.append("\n".join(line[margin:] for line in lines))
    return [block for block in found if block]


def dictionary(root: Path) -> Pages:
    """Returns a dictionary in dictd's format, ENTRIES per page.

    A headword begins a line, its meaning is indented.
    """
    (file,) = root.rglob("*.dict.dz")
    text = gzip.decompress(file.read_bytes()).decode(errors="replace")
    entries = re.split(r"\n(?=\S)", text)
    firsts = range(0, len(entries), ENTRIES)
    return {
        f"{first:08}": functools.partial(_entries, entries[first : first + ENTRIES])
        for first in firsts
    }


def _entries(entries: Sequence[str]) -> list[str]:
    found = []
    for entry in entries:
        parts = re.split(r"\n\s*\n", re.sub(r"\s*\[1913 Webster\]", "", entry))
        found.append("\n".join(" ".join(part.split()) for part in parts if part.strip()))
    return found


def sayings(root: Path) -> Pages:
    """Returns the files of fortune(6): sayings with a line of "%" between them."""
    pages: Pages = {}
    for index in sorted(root.rglob("*.dat")):
        file = index.with_suffix("")
        if file.is_file():
            pages[index.stem] = functools.partial(_sayings, file)
    return pages


def _sayings(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8", errors="replace").expandtabs(4)
    return [saying.strip("\n") for saying in re.split(r"\n%\n", text)]


def texts(root: Path, keep: str) -> Pages:
    """Returns the plain text files whose whole path below `root` matches `keep`, packed or not."""
    pages: Pages = {}
    for name, file in _files(root, "*"):
        if re.fullmatch(keep, name):
            pages[name] = functools.partial(_text, file)
    return pages


def _text(file: Path) -> list[str]:
    source = file.read_bytes()
    if file.suffix in (".gz", ".dz"):
        source = gzip.decompress(source)
    return blocks(source.decode(errors="replace"))


def commentary(root: Path) -> Pages:
    """Returns a commentary in the format of SWORD, a book or chapter of the Bible per page.

    The text is packed by zlib; an index has the place and size of each pack.
    """
    pages: Pages = {}
    for index in sorted(root.rglob("*t.?zs")):
        packs = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        records = struct.iter_unpack("<III", index.read_bytes())
        for number, (start, size, _) in enumerate(records):
            pack = packs[start : start + size]
            pages[f"{index.stem}{number:04}"] = functools.partial(_commentary, pack)
    return pages


def _commentary(pack: bytes) -> list[str]:
    text = zlib.decompress(pack).decode()
    parts = re.split(r"</?(?:div|title|list|item|row|lb)\b[^>]*>", text)
    html = lxml_html()
    lines = [" ".join(html.fromstring(f"<p>{part}</p>").text_content().split()) for part in parts]
    return [line for line in lines if line]


# Files of the corpus and of the mixture.


def read(file: Path) -> list[list[str]]:
    """Returns the documents of a file, each a list of paragraphs."""
    documents = file.read_text(encoding="utf-8").removesuffix("\n").split(SEPARATOR)
    return [document.split("\n\n") for document in documents]


# Cleaning.


def sample(pages: Pages, budget: int) -> list[list[str]]:
    """Returns whole pages, roughly `budget` characters in all, in the order given.

    They are chosen by the hash of their names.
    """
    chosen: dict[str, list[str]] = {}
    size = 0
    for name in sorted(pages, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size >= budget:
            break
        paragraphs = pages[name]()
        length = sum(map(len, paragraphs))
        if length >= SHORTEST:
            chosen[name] = paragraphs
            size += length
    return [chosen[name] for name in pages if name in chosen]


def plain(paragraph: str) -> str:
    """Removes trailing blanks, and control, format, private-use and separator characters."""
    paragraph = unicodedata.normalize("NFC", paragraph).replace("\u00a0", " ")
    unwanted = ("Cc", "Cf", "Co", "Zl", "Zp")
    paragraph = "".join(
        c for c in paragraph if c == "\n" or unicodedata.category(c) not in unwanted
    )
    return re.sub(r" +$", "", paragraph, flags=re.MULTILINE).strip("\n")


def pieces(paragraphs: list[str]) -> tuple[list[str], str]:
    """Returns the pieces between which a document may be cut, and the text that joins them.

    They are its paragraphs, or the sentences of its only one.
    """
    if len(paragraphs) == 1:
        return re.split(r"(?<=[a-z]{2}[.!?]) (?=[A-Z])", paragraphs[0]), " "
    return paragraphs, "\n\n"


def pack(pieces: list[str], joint: str) -> Iterator[str]:
    """Joins pieces into few documents of about equal length, within LONGEST if every piece is."""
    size = len(joint.join(pieces))
    share = size / max(1, -(-size // LONGEST))
    document: list[str] = []
    length = 0
    for piece in pieces:
        if document and length + len(piece) > min(LONGEST, share + 500):
            yield joint.join(document)
            document = []
            length = 0
        document.append(piece)
        length += len(piece) + len(joint)
    yield joint.join(document)


def clean(documents: Iterable[list[str]], seen: set[str]) -> Iterator[str]:
    """Yields documents without odd characters and repeated paragraphs; cuts long ones."""
    for document in documents:
        kept = []
        for paragraph in map(plain, document):
            key = " ".join(paragraph.split()).lower()
            if key and (len(key) < REPEATED or key not in seen):
                kept.append(paragraph)
            seen.add(key)
        for part in pack(*pieces(kept)):
            if len(part) >= SHORTEST:
                yield part
