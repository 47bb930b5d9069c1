"""All runs compared with one of them, work by work."""

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import latent_delib as ld
from latent_delib.results import against, runs
from tests.results.writers import cells, perplexity
from tools import pack_results

# The runs that can be compared with the base: on its text, and of its decoder.
COMPARED = ("base", "opposite", "worse", "worse, to n = 2")
DOCUMENTS = [4, 2]  # of each work


def write(folder, tokens, decoder, augmented):
    """Writes an evaluation of two works."""
    perplexity(folder, -1.0, interval_over="works")
    sums = {"tokens": tokens, "decoder": decoder, "augmented": augmented}
    work = np.repeat([0, 1], DOCUMENTS)
    np.savez(folder / "documents.npz", source=np.zeros(6, int), work=work, **sums)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, the runs to compare with it, and runs that cannot be compared."""
    folder = tmp_path_factory.mktemp("against")
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 50, (6, 4))
    decoder, base = tokens * draw.normal(4, 1, (6, 1)), tokens * draw.normal(4, 1, (6, 1))
    worse = base + 0.1 * tokens
    by_work = np.repeat([-0.1, 0.3], DOCUMENTS)[:, None]
    write(folder / "base", tokens, decoder, base)
    write(folder / "worse", tokens, decoder * (1 + 3e-5), worse)  # the rounding of a machine
    write(folder / "worse, to n = 2", tokens[:, :2], decoder[:, :2], worse[:, :2])
    write(folder / "opposite", tokens, decoder, base + by_work * tokens)
    write(folder / "other text", tokens + 1, decoder, base)
    write(folder / "other decoder", tokens, 2 * decoder, base)
    perplexity(folder / "without", -1.0)
    return folder


@pytest.fixture(scope="module")
def packs(folder, tmp_path_factory):
    """The same runs, packed."""
    packs = tmp_path_factory.mktemp("packed") / "runs"
    workdirs = [str(workdir) for workdir in folder.iterdir()]
    pack_results.main(SimpleNamespace(folders=workdirs, out=str(packs)))
    return packs


def compare(folder, base="base"):
    """Returns the table of the runs below a folder against one of them."""
    return against.compare(runs.find([str(folder)]), str(folder / base))


NONE = "+0.00% [+0.00, +0.00]"
WORSE = "+10.52% [+10.52, +10.52]"


def changes(table):
    """Returns the changes of each run at n = 1, 2, 4, 8, 16, 32 and their mean, as text, by run."""
    return {name: row[3:] for name, row in zip(COMPARED, cells(table), strict=True)}


def test_a_difference_that_is_the_same_in_each_work_has_no_width(folder):
    """Works that differ among themselves widen the interval of a difference."""
    found = changes(compare(folder))
    assert found["base"] == [*[NONE] * 3, *[""] * 3, NONE]
    assert found["worse"] == [*[WORSE] * 3, *[""] * 3, WORSE]


def test_an_interval_is_over_works(folder):
    """Intervals draw documents, and are too narrow where works differ."""
    table = compare(folder)
    first = table.rows[COMPARED.index("opposite")][3]
    assert first.low == pytest.approx(100 * np.expm1(-0.1))
    assert first.high == pytest.approx(100 * np.expm1(0.3))
    assert ", of perplexity over works." in table.note


def test_runs_are_compared_as_far_as_both_go(folder):
    """A run with fewer ahead tokens is not compared at all."""
    found = changes(compare(folder))
    assert found["worse, to n = 2"] == [*[WORSE] * 2, *[""] * 4, WORSE]


def test_another_text_and_another_decoder_are_left_out(folder, capsys):
    """Runs that cannot be compared are, or one is left out without a word."""
    origins = compare(folder).origins
    for name, origin in zip(COMPARED, origins, strict=True):
        assert f"/{name}/perplexity.json" in origin
    why = f"its frozen decoder's perplexity differs from that of {folder / 'base'}"
    assert capsys.readouterr().err == f"warning: left out {folder / 'other decoder'}: {why}\n"


def test_packed_runs_give_the_same_changes(folder, packs):
    assert changes(compare(packs)) == changes(compare(folder))


def test_a_pack_has_the_sums_of_each_work(packs):
    """Packs grow with the number of documents."""
    with zipfile.ZipFile(packs / "opposite.zip") as archive:
        sums = np.load(io.BytesIO(archive.read("opposite/documents.npz")))
    assert len(sums["tokens"]) == len(DOCUMENTS)


def test_a_base_without_documents_is_refused(folder):
    with pytest.raises(ld.UserError, match="without: holds no documents.npz"):
        compare(folder, "without")


def test_an_older_run_without_works_is_paired_over_documents(tmp_path):
    """An older run cannot be compared, or its documents are taken for works of another run."""
    sums = {"tokens": np.ones((4, 1)), "decoder": np.ones((4, 1)), "augmented": np.ones((4, 1))}
    base = sums | {"source": np.zeros(4, int), "work": np.repeat([0, 1], 2)}
    for name, arrays in (("base", base), ("older", sums)):
        perplexity(tmp_path / name, -1.0)
        np.savez(tmp_path / name / "documents.npz", **arrays)
    _, older = runs.find([str(tmp_path)]).perplexity
    pair = against.pair_of(base, older)
    assert pair.source is None and pair.work.tolist() == [0, 1, 2, 3]
    table = compare(tmp_path)
    assert "over documents, whose works were not kept" in table.note and len(table.rows) == 2
