"""Text out of packages: what stays of a page of each kind, what a sample holds, and cleaning."""

import gzip
import os
import shutil
import struct
import zlib

import pytest

from latent_delib.errors import UserError
from tests.launch.pretend import program
from tools import extract

HTML = """<html><head><meta charset="utf-8"><title>Left out</title></head><body>
<nav>Home | Up</nav>
<div role="main"><h1>Queues</h1><p>A queue holds   what
waits.</p><pre>
def put(x):
    return x   \n</pre>
<ul><li>first</li><li>second</li></ul><table><tr><th>name</th><td>meaning</td></tr></table>
<ul><li><a href="a.html">Contents of a chapter</a></li></ul></div>
<footer>Copyright</footer></body></html>"""


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        gzip.compress(text.encode()) if path.suffix in (".gz", ".dz") else text.encode()
    )
    return path


def test_a_manuals_pages(tmp_path):
    write(tmp_path / "html/queue.html", HTML)
    write(tmp_path / "html/plain.html", "<html><body><p>No main part.</p></body></html>")
    write(tmp_path / "html/index.html", HTML)
    write(tmp_path / "html/old.htm", "<html><body><p>A short ending.</p></body></html>")
    (tmp_path / "html/folder.html").mkdir()
    (tmp_path / "html/link.html").symlink_to(tmp_path / "html/queue.html")
    pages = extract.manual(tmp_path, keep="html/.*", drop="index")
    assert list(pages) == ["html/plain.html", "html/queue.html"]
    assert pages["html/plain.html"]() == ["No main part."]
    assert list(extract.manual(tmp_path, ending=".htm")) == ["html/old.htm"]
    assert pages["html/queue.html"]() == [
        "Queues",
        "A queue holds what waits.",
        "def put(x):\n    return x",
        "- first\n- second",
        "name | meaning",
    ]


@needs("groff")
def test_a_man_page_is_set_a_paragraph_a_line(tmp_path):
    text = ".TH TEST 1\n.SH NAME\ntest \\- a page\n.SH DESCRIPTION\n" + "one two three\n" * 60
    write(tmp_path / "man/man1/test.1.gz", text + ".PP\n.nf\nint x;\n    int y;\n.fi\n")
    write(tmp_path / "man/man1/other.1.gz", ".so man1/test.1\n")
    write(
        tmp_path / "man/man1/table.1.gz", ".TH T 1\n.SH A\n.TS\nallbox;\nl l.\nname\tmeaning\n.TE\n"
    )
    pages = extract.man_pages(tmp_path)
    assert pages["other.1.gz"]() == []
    assert pages["table.1.gz"]() == ["A\n       │name │ meaning │"]
    name, description, code = pages["test.1.gz"]()
    assert "test - a page" in name and description.count("one two three") == 60
    assert len(description.splitlines()) == 2  # its heading, and one line
    assert code == "int x;\n    int y;"


@needs("pod2text")
def test_a_page_of_pod(tmp_path):
    write(tmp_path / "a.pod", "=head1 NAME\n\nperl - C<code> and B<words>\n\n  $x = 1;\n\n=cut\n")
    (name, code) = extract.pods(tmp_path)["a.pod"]()
    assert "code" in name and "<" not in name and code == "$x = 1;"


def test_a_dictionary_and_sayings(tmp_path):
    write(
        tmp_path / "x.dict.dz",
        "Abase\n   To lower.\n   [1913 Webster]\n\n   Syn: degrade.\nAbate\n   To\n   lessen.\n",
    )
    (page,) = extract.dictionary(tmp_path).values()
    assert page() == ["Abase To lower.\nSyn: degrade.", "Abate To lessen."]
    write(tmp_path / "fun", "One.\n\t-- A\n%\nTwo.\n%\n")
    write(tmp_path / "fun.dat", "")
    assert extract.sayings(tmp_path)["fun"]() == ["One.\n    -- A", "Two.", ""]


def test_text_files(tmp_path):
    write(tmp_path / "doc/rules.txt", "  Rules\n\n  One.\n    Two.\n")
    write(tmp_path / "doc/law.gz", "All are equal.\n")
    write(tmp_path / "doc/other", "Not wanted.\n")
    pages = extract.texts(tmp_path, r"doc/(rules\.txt|law.*)")
    assert {name: page() for name, page in pages.items()} == {
        "doc/law.gz": ["All are equal."],
        "doc/rules.txt": ["Rules", "One.\n  Two."],
    }


def test_a_commentary(tmp_path):
    books = '<title>Ruth</title> <div sID="1"/> Of <hi>love</hi> &amp; bread. ', "<chapter/>Job"
    packs = [zlib.compress(book.encode()) for book in books]
    (tmp_path / "ot.bzz").write_bytes(packs[0] + b"gap" + packs[1])
    index = struct.pack("<III", 0, len(packs[0]), len(books[0]))
    index += struct.pack("<III", len(packs[0]) + 3, len(packs[1]), len(books[1]))
    (tmp_path / "ot.bzs").write_bytes(index)
    first, second = extract.commentary(tmp_path).values()
    assert first() == ["Ruth", "Of love & bread."] and second() == ["Job"]


def test_a_sample_is_of_the_names_and_reads_no_more_than_it_keeps():
    read = []

    def page(name, size):
        def paragraphs():
            read.append(name)
            return [name * size]

        return paragraphs

    pages = {name: page(name, 700) for name in "abcdefgh"} | {"z": page("z", 10)}
    some = extract.sample(pages, 2000)
    assert len(some) == 3 and len(read) <= 4  # one may be too short
    assert some == extract.sample(dict(reversed(pages.items())), 2000)[::-1]
    assert len(extract.sample(pages, 10**6)) == 8


def test_cleaning_keeps_a_long_paragraph_where_it_is_first_met():
    long, seen = "word " * 200, set()
    first, second = extract.clean(
        [[long, "short one"], [long, "x" * 600 + "\u200b", "short one"]], seen
    )
    assert first == long.strip() + "\n\nshort one"
    assert second == "x" * 600 + "\n\nshort one"
    assert list(extract.clean([["too short"]], set())) == []
    assert all(
        len(part) <= extract.LONGEST
        for part in extract.clean([["y" * 400 + str(i) for i in range(300)]], set())
    )


def test_a_package_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    program(tmp_path / "bin/apt-get", "echo 'E: Unable to locate package nothing' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match="package nothing: .*Unable to locate"):
        extract.debian(tmp_path, "nothing")
