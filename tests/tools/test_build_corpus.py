"""The packaged corpus: works to validate on are of one size, apart from train, and licensed."""

import re

import pytest

from tools import build_corpus, extract

CORPUS = build_corpus.CORPUS
VALIDATION = sorted((CORPUS / "validation").glob("*.txt"))


def paragraph(document, i):
    return f"Paragraph {i} of document {document}: " + "some words " * 20


@pytest.mark.parametrize("documents, paragraphs", [(200, 4), (40, 40), (3, 100)])
def test_excerpts_are_beginnings_of_documents_all_over_a_work(documents, paragraphs):
    work = ["\n\n".join(paragraph(d, i) for i in range(paragraphs)) for d in range(documents)]
    found = build_corpus.excerpts(work, 25_000, 10)
    assert 25_000 - 1500 < sum(map(len, found)) <= 25_000
    places = []
    for part in found:
        (place,) = (i for i, document in enumerate(work) if document.startswith(part))
        assert part == work[place] or work[place].startswith(f"{part}\n\n")
        places.append(place)
    assert places == sorted(places)
    assert len(places) >= min(documents, 10)
    gaps = [after - before for before, after in zip(places, places[1:])]
    assert max(gaps) <= 3 * documents / len(places)


def test_a_document_of_one_paragraph_is_cut_after_a_sentence():
    work = [" ".join(f"Here is sentence number {i} of the work." for i in range(2000))]
    (part,) = build_corpus.excerpts(work, 25_000, 10)
    assert part.endswith(" of the work.") and 25_000 - 50 < len(part)


def test_a_large_excerpt_is_of_whole_documents_but_the_last():
    work = ["\n\n".join(paragraph(d, i) for i in range(20)) for d in range(100)]
    found = build_corpus.excerpts(work, 50_000, 1)
    assert sum(part in work for part in found) >= len(found) - 1 > 5


def test_a_short_work_is_kept_whole():
    work = [paragraph("a", 0) * 3, paragraph("b", 0) * 4]
    assert build_corpus.excerpts(work, 25_000, 10) == work


def keys(file):
    """Returns the long paragraphs of a file, as `extract.clean` compares them."""
    paragraphs = [p for document in extract.read(file) for p in document]
    found = {" ".join(p.split()).lower() for p in paragraphs}
    return {key for key in found if len(key) >= extract.REPEATED}


def test_works_to_validate_on_are_many_and_of_one_size():
    assert len(VALIDATION) > 40
    for file in VALIDATION:
        size = len(file.read_text(encoding="utf-8"))
        assert abs(size / build_corpus.SIZE["validation"] - 1) < 0.03, file.name


def test_no_paragraph_of_them_is_trained_on():
    trained = set()
    for folder in (build_corpus.PROSE, CORPUS / "train"):
        for file in folder.glob("*.txt"):
            trained |= keys(file)
    seen = set()
    for file in VALIDATION:
        found = keys(file)
        assert not found & trained, file.name
        assert not found & seen, file.name
        seen |= found


def test_every_work_has_its_row_and_licence():
    text = (CORPUS / "LICENSES.md").read_text(encoding="utf-8")
    folders = {split: CORPUS / split for split in ("train", "validation")}
    for split, folder in (folders | {"prose": build_corpus.PROSE}).items():
        rows = dict(re.findall(rf"(?m)^\| {split} \| `(\w[^`]*)` \|(.*)$", text))
        files = {file.stem: file for file in folder.glob("*.txt")}
        assert set(rows) == set(files)
        for work, row in rows.items():
            size, documents = files[work].stat().st_size, len(extract.read(files[work]))
            assert row.endswith(f" {size:,} | {documents:,} |"), work
    links = set(re.findall(r"\(licenses/([^)]*)\)", text))
    assert links == {file.name for file in (CORPUS / "licenses").iterdir()}
