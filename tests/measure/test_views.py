"""Views of the text: where latents are put, which are lost, and whose a piece is given."""

import numpy as np
import pytest

from latent_delib.errors import UserError
from latent_delib.job import experiment
from latent_delib.measure import views
from latent_delib.measure.text import ValidationText


def test_positions_are_a_function_of_seed_and_piece():
    drawn = [views.positions(0, number, 500, 20, 500) for number in range(3)]
    for at in drawn:
        assert len(set(at)) == 20 and (np.diff(at) > 0).all() and 0 <= at.min() and at.max() < 499
    assert len({tuple(at) for at in [*drawn, views.positions(1, 0, 500, 20, 500)]}) == 4
    np.testing.assert_array_equal(drawn[1], views.positions(0, 1, 500, 20, 500))
    for most in (0, 9, 10, 11):
        assert len(views.positions(0, 0, 11, most, 11)) == min(most or 10, 10)


@pytest.mark.parametrize("length, first", [(11, 0), (8, 0), (2, 0), (8, 3), (3, 3)])
def test_every_token_is_as_likely_to_be_drawn(length, first):
    """Whatever the length of its piece; of none more than `most`."""
    most, seeds, usable = 3, 3000, max(0, length - 1 - first)
    drawn = [views.positions(seed, 5, length, most, 11, first) for seed in range(seeds)]
    assert max(map(len, drawn)) <= most
    times = np.bincount(np.concatenate(drawn).astype(int), minlength=length)
    assert not times[:first].any() and not times[first + usable :].any()
    expected = seeds * most / (10 - first)
    assert (abs(times[first : first + usable] - expected) < 5 * expected**0.5).all()


def validation_text(length, document, source):
    pieces = [np.arange(n, dtype=np.int32) for n in length]
    works = np.arange(len(source))
    return ValidationText(pieces, document, source, ("one", "other"), works, ("",) * len(source))


def test_a_donor_is_of_another_document_of_the_source_and_long_enough():
    draw = np.random.default_rng(0)
    document = draw.integers(7, size=60)
    document[:7] = np.arange(7)
    length = draw.integers(2, 9, 60)
    text = validation_text(length, document, np.array([0, 0, 0, 1, 1, 0, 1]))
    found, source = views.donors(1, text, text.lengths()), text.source[document]
    assert (
        (document[found] != document).all()
        and (source[found] == source).all()
        and len(set(found)) > 20
    )
    assert (found != views.donors(2, text, text.lengths())).any()
    for piece, donor in enumerate(found):
        fit = (document != document[piece]) & (source == source[piece])
        assert length[donor] >= min(length[piece], length[fit].max())


def test_donors_are_those_of_earlier_evaluations():
    """The draw of version 2, which stored results name, as it was on 2026-11-28."""
    document = np.array([0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5])
    text = validation_text(
        [6, 6, 2, 6, 3, 5, 4, 6, 6, 5, 6, 6, 4], document, np.array([0, 0, 0, 1, 1, 1])
    )
    assert views.DRAWS == 2
    assert views.donors(5, text, text.lengths()).tolist() == [
        3,
        3,
        4,
        0,
        6,
        1,
        0,
        10,
        7,
        7,
        8,
        8,
        7,
    ]


def test_a_document_alone_in_its_source_has_no_donor():
    text = validation_text([4, 4, 4], np.array([0, 1, 2]), np.array([0, 0, 1]))
    with pytest.raises(UserError, match="'other'"):
        views.donors(0, text, text.lengths())


def test_the_ends_of_prompts():
    """Every one before the last token, from the first allowed token on."""
    piece = np.array([0, 7, 2, 7, 2, 2, 7, 7, 2])
    assert views.prompt_ends(piece, (7,)).tolist() == [1, 3, 6, 7]
    assert views.prompt_ends(piece, (7, 2)).tolist() == [2, 4]
    assert views.prompt_ends(piece, (7,), 3).tolist() == [3, 6, 7]
    assert views.prompt_ends(piece, (9,)).tolist() == []


def test_questions_without_their_steps():
    """They go up to the next 8; a prompt within them, or without an 8 behind it, is no place."""
    piece = np.array([1, 7, 3, 3, 8, 4, 5, 7, 3, 3, 7, 3, 8, 4, 5, 7, 3])
    at = views.prompt_ends(piece, (7,))
    assert at.tolist() == [1, 7, 10, 15]
    left, places = views.without_steps(piece, at, (8,))
    assert left.tolist() == [1, 7, 4, 5, 7, 4, 5, 7, 3]
    assert places.tolist() == [1, 4]


def test_latents_of_another_question(make_config):
    """Those that were written at the end of its own prompt, wherever that is."""
    exp = experiment.read(make_config({"method.prompt_end": "a", "evaluate.swap": True}))
    (a,) = exp.prompt_end
    b = a + 1
    pieces = [[b, b, a, b, a, b], [a, b], [b, a, b], [b, b, b]]
    text = validation_text([len(piece) for piece in pieces], np.arange(4), np.zeros(4, int))
    text = text._replace(pieces=[np.array(piece) for piece in pieces])
    cases = [views.view_of(exp, text)(number) for number in range(4)]
    assert [case.own_at.tolist() for case in cases] == [[2, 4], [0], [1], []]
    for case in cases[:3]:
        assert (case.donor[case.donor_at] == a).all() and len(case.donor_at) == len(case.own_at)
        assert not np.array_equal(case.donor, case.own)
    assert views.draws_of(exp.record) == 3
    assert views.draws_of(experiment.read(make_config({"evaluate.swap": True})).record) == 2
    with pytest.raises(UserError, match="has one document with a prompt's end"):
        views.view_of(
            exp, text._replace(pieces=[np.full(3, b), *text.pieces[1:2], *[np.full(3, b)] * 2])
        )


def test_what_each_side_reads(make_config):
    """A longer prompt and swapped latents, each alone and together."""
    text = validation_text([9, 6, 9, 3], np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1]))

    def cases(**changes):
        exp = experiment.read(
            make_config({f"evaluate.{key}": value for key, value in changes.items()})
        )
        view = views.view_of(exp, text)
        return [view(number) for number in range(4)], view

    whole, view = cases()
    assert all(case.own is case.plain and case.donor is None for case in whole)
    assert whole[1].at.tolist() == whole[1].own_at.tolist() == [0, 1, 2, 3, 4]

    shortened, _ = cases(longer_prompt=3)
    assert [case.plain.tolist() for case in shortened] == [piece.tolist() for piece in text.pieces]
    assert [case.own.tolist() for case in shortened] == [
        [0, 4, 5, 6, 7, 8],
        [0, 4, 5],
        [0, 4, 5, 6, 7, 8],
        [0],
    ]
    assert [case.at.tolist() for case in shortened[:2]] == [[3, 4, 5, 6, 7], [3, 4]]
    assert [case.own_at.tolist() for case in shortened[:2]] == [[0, 1, 2, 3, 4], [0, 1]]
    assert len(shortened[3].at) == 0

    swapped, view = cases(swap=True)
    assert [len(case.donor) for case in swapped] == [6, 9, 3, 9]
    assert swapped[0].own_at.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert swapped[0].donor_at.tolist() == [0, 1, 2, 3, 4, 5, 5, 5]

    both, _ = cases(swap=True, longer_prompt=3)
    assert both[1].donor.tolist() == [0, 4, 5, 6, 7, 8]
    assert both[0].donor_at.tolist() == [0, 1, 2, 2, 2]
