"""The order of training: a permutation of the rows of each source, whose values never change."""

import itertools
import math

import numpy as np
import pytest

from latent_delib.data import order
from latent_delib.data.order import permute
from latent_delib.errors import UserError

LARGE = 10**12  # rows of which no list can be made


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 255, 257, 1000, 1024, 4097, 100_000])
def test_every_row_has_a_place_of_its_own(size):
    places = permute(np.arange(size), size, 3, 1, 0, 0)
    assert places.dtype == np.int64
    np.testing.assert_array_equal(np.sort(places), np.arange(size))


def test_the_order_stays_what_it_is():
    """A run resumes on any later version: these numbers must not change, or order.VERSION must."""
    assert order.VERSION == "2"
    assert permute(np.arange(10), 10, 0).tolist() == TEN
    assert permute(np.arange(4), LARGE, 5, 1, 2, 3).tolist() == OF_LARGE
    source, row = order.Order(5, order.shares([2, 1]), [1000, 7])(1020, 1028)
    assert (source.tolist(), row.tolist()) == MIXED


TEN = [1, 3, 9, 7, 0, 5, 6, 2, 4, 8]
OF_LARGE = [381690097806, 456308155194, 889537556196, 358313853233]
MIXED = ([0, 0, 1, 0, 0, 0, 1, 0], [332, 151, 4, 577, 67, 694, 6, 553])


def test_each_part_of_the_key_gives_another_order():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**62, 0, 0)]
    orders = [permute(np.arange(100), 100, *key) for key in keys]
    same = [np.mean(one == other) for one, other in itertools.combinations(orders, 2)]
    assert max(same) < 0.1  # by chance 0.01


def test_each_index_may_have_a_key_of_its_own():
    index, epoch = np.tile(np.arange(20), 3), np.repeat(np.arange(3), 20)
    each = [permute(np.arange(20), 20, 7, number) for number in range(3)]
    np.testing.assert_array_equal(permute(index, 20, 7, epoch), np.concatenate(each))


def test_all_orders_of_few_rows_are_equally_frequent():
    """Chi-square, in standard deviations from what chance gives."""
    for size, times in ((2, 2000), (3, 1000), (4, 300)):
        every = math.factorial(size)
        key = np.repeat(np.arange(every * times), size)
        index = np.tile(np.arange(size), every * times)
        orders = permute(index, size, 9, key).reshape(-1, size)
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == every
        chi_square = np.sum((counts - times) ** 2 / times)
        assert abs(chi_square - (every - 1)) < 4 * math.sqrt(2 * (every - 1))


@pytest.mark.parametrize("size", [1000, 1 << 14, 30_000])
def test_the_order_looks_random(size):
    index, buckets = np.arange(size), 10
    places = permute(index, size, 11, 1, 0, 0)
    assert np.mean(np.abs(places - index)) / size == pytest.approx(1 / 3, abs=0.03)
    assert abs(np.corrcoef(places, index)[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 4 / math.sqrt(size)
    assert np.mean(np.diff(places) > 0) == pytest.approx(0.5, abs=0.04)
    found, _, _ = np.histogram2d(index, places, bins=buckets)
    expected, freedom = size / buckets**2, (buckets - 1) ** 2
    assert abs(np.sum((found - expected) ** 2 / expected) - freedom) < 4 * math.sqrt(2 * freedom)


def test_rows_do_not_depend_on_how_they_are_asked_for():
    def ask(*stops):
        mixed = order.Order(1, order.shares([5, 2, 1]), [LARGE, 3000, 3])
        parts = [mixed(start, stop) for start, stop in itertools.pairwise((0, *stops))]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    whole = ask(4000)
    for stops in ((7, 1023, 1024, 4000), range(160, 4001, 160)):
        np.testing.assert_array_equal(ask(*stops), whole)


def test_any_step_of_a_huge_source_is_reached_at_once():
    """Without a list of its rows, which would be 8 TB."""
    mixed = order.Order(0, order.shares([1]), [LARGE])
    source, row = mixed(LARGE + 5, LARGE + 13)
    assert not source.any() and len(set(row.tolist())) == 8
    assert (row >= 0).all() and (row < LARGE).all()


def test_epochs_of_each_source():
    """A source of 5 rows is read whole before any row comes again, each time in another order."""
    source, row = order.Order(4, order.shares([3, 1]), [100_000, 5])(0, 3 * order.BLOCK)
    large, small = row[source == 0], row[source == 1]
    assert len(set(large.tolist())) == len(large)
    epochs = small[: len(small) // 5 * 5].reshape(-1, 5)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(5), (len(epochs), 1)))
    assert len(set(map(tuple, epochs.tolist()))) > 60  # of 120


def test_shares_by_largest_remainders():
    assert order.shares([1, 1, 1]).tolist() == [342, 341, 341]
    assert order.shares([0.7, 0.2, 0.1]).tolist() == [717, 205, 102]
    for weight, found in ((0.1, "0.0001"), (0.9, "0.0009")):  # the second would round to 1/1024
        with pytest.raises(
            UserError, match=rf"weights=\(1000\.0, {weight}\).*1/1024.*, found {found} of it"
        ):
            order.shares([1000.0, weight])
