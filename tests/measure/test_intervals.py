"""Confidence intervals: the bootstrap over works, resample by resample."""

import numpy as np
import pytest
from scipy import stats

from latent_delib.measure import intervals, perplexity
from latent_delib.measure.perplexity import Sums
from latent_delib.results.evaluation import HOLDS


def interval(sums, work, seed):
    return intervals.estimate(sums.tokens, sums.augmented - sums.decoder, work, seed).at_n


def test_none_where_one_of_several_works_reaches():
    """The two long documents are of one work: what they say at n = 2 holds for no other."""
    tokens = np.array([[5, 5], [5, 5], [5, 0], [5, 0]])
    sums = Sums(tokens, np.ones((4, 2)), np.array([[0.5, 0.5], [0.7, 0.7], [0.9, 0], [0.8, 0]]))
    low, high = interval(sums, np.array([0, 0, 1, 2]), 0)
    assert low[0] < high[0] < 0 and np.isnan([low[1], high[1]]).all()
    assert not np.isnan(interval(Sums(*(x[:2] for x in sums)), np.array([0, 0]), 0)).any()


def test_no_row_where_no_document_reaches():
    tokens = np.array([[3, 2, 0], [1, 0, 0]])
    decoder, augmented = np.log([2.0, 8.0, 1.0]) * tokens, np.log([2.0, 4.0, 1.0]) * tokens
    found = perplexity.figures({"nll": Sums(tokens, decoder, augmented)}, np.arange(2), 0)
    close = pytest.approx
    assert [list(row.values()) for row in found["rows"]] == [
        [1, 4, close(2), close(2), close(0), close(0), close(0)],
        [2, 2, close(8), close(4), close(-50), None, None],  # one document says nothing of others
    ]
    assert list(found["mean"].values()) == [close(-25), None, None]


def test_text_without_a_token():
    none = Sums(np.zeros((2, 3), int), np.zeros((2, 3)), np.zeros((2, 3)))
    found = perplexity.figures({"nll": none}, np.arange(2), 0)
    assert found["rows"] == [] and list(found["mean"].values()) == [None, None, None]


def test_a_bootstrap_over_documents():
    """Resample by resample; and the right width for means of a normal."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(0, 9, (400, 2))
    tokens[0] = 9
    decoder = draw.normal(3, 1, tokens.shape) * tokens
    augmented = decoder + draw.normal(-0.01, 0.05, tokens.shape) * tokens
    found = interval(Sums(tokens, decoder, augmented), np.arange(400), 11)
    resample, changes = np.random.default_rng(11), []
    for _ in range(2000):
        drawn = resample.integers(400, size=400)
        changes.append((augmented - decoder)[drawn].sum(0) / tokens[drawn].sum(0))
    for n, column in enumerate(np.transpose(changes)):
        reach = np.count_nonzero(tokens[:, n])  # many have no token
        np.testing.assert_allclose(found[:, n], ends(column, units=reach), rtol=1e-9)
    each, mean = (augmented - decoder)[:, 0], tokens[:, 0].mean()
    # of a ratio of sums
    spread = np.std(each - tokens[:, 0] * each.sum() / tokens[:, 0].sum()) / mean / 400**0.5
    assert (found[1] - found[0])[0] == pytest.approx(100 * 2 * 1.96 * spread, rel=0.1)


def test_whole_works_are_drawn():
    """The same draws one by one; of documents that do not lie work by work."""
    draw = np.random.default_rng(4)
    work = draw.permutation(np.repeat([7, 2, 9, 4], [1, 5, 2, 12]))
    tokens = draw.integers(1, 9, (20, 1))
    decoder = draw.normal(3, 1, tokens.shape) * tokens
    augmented = decoder + draw.normal(0, 0.5, tokens.shape) * tokens
    found = interval(Sums(tokens, decoder, augmented), work, 11)
    resample, changes = np.random.default_rng(11), []
    documents = [np.flatnonzero(work == name) for name in (2, 4, 7, 9)]
    for _ in range(2000):
        drawn = np.concatenate([documents[w] for w in resample.integers(4, size=4)])
        changes.append((augmented - decoder)[drawn].sum(0) / tokens[drawn].sum(0))
    np.testing.assert_allclose(found, ends(changes, units=4), rtol=1e-9)


def test_the_mean_over_n():
    """The same draws one by one, each with the mean of its changes in percent."""
    draw = np.random.default_rng(5)
    tokens = draw.integers(1, 9, (30, 3))
    change = draw.normal(0, 0.3, tokens.shape) * tokens
    found = intervals.estimate(tokens, change, np.arange(30), 11)
    resample, means = np.random.default_rng(11), []
    for _ in range(2000):
        drawn = resample.integers(30, size=30)
        means.append(np.expm1(change[drawn].sum(0) / tokens[drawn].sum(0)).mean())
    expected = np.expm1(ends(np.log1p(means), units=30) / 100)  # `ends` takes nats
    np.testing.assert_allclose(np.expm1(found.mean / 100), expected, rtol=1e-3)
    width = found.at_n[1] - found.at_n[0]
    assert found.mean[1] - found.mean[0] < 0.8 * width.mean()  # the n are independent here
    same = np.repeat(tokens[:, :1], 3, axis=1), np.repeat(change[:, :1], 3, axis=1)
    alike = intervals.estimate(*same, np.arange(30), 11)  # and here they are one
    np.testing.assert_allclose(alike.mean, alike.at_n[:, 0], atol=0.01)


def ends(changes, units):
    """The ends of an interval in percent, from the changes of its resamples in nats."""
    wide = stats.t.ppf(0.975, units - 1) * (units / (units - 1)) ** 0.5
    level = stats.norm.cdf([-wide, wide])
    return 100 * np.expm1(np.quantile(changes, level, axis=0))


@pytest.mark.slow
def test_intervals_hold_as_often_as_they_say():
    """In 95 % of cases, though few works are read, of unlike numbers of documents."""
    works = 8
    draw = np.random.default_rng(works)
    held = []
    for seed in range(200):
        size = draw.integers(2, 9, works)
        work = np.repeat(np.arange(works), size)
        tokens = draw.integers(50, 200, (len(work), 1))
        of_works = np.repeat(draw.normal(0.01, 0.02, works), size)
        change = of_works + draw.normal(0, 0.04, len(work))
        found = intervals.estimate(tokens, change[:, None] * tokens, work, seed)
        low, high = found.at_n[:, 0]
        held.append(low <= 100 * np.expm1(0.01) <= high)
    assert 0.91 <= np.mean(held) <= 0.985  # two standard errors and more each side


@pytest.mark.slow
@pytest.mark.parametrize("works, percent", [*HOLDS.items(), (5, 91)])
def test_few_works_hold_as_often_as_readers_are_told(works, percent):
    """Of equal size, with normal changes; to four standard errors of the simulation."""
    draw = np.random.default_rng(works)
    cases = 1500
    tokens = np.full((works, 1), 100)
    held = 0
    for seed in range(cases):
        change = draw.normal(0, 1e-3, (works, 1)) * tokens
        low, high = intervals.estimate(tokens, change, np.arange(works), seed).at_n[:, 0]
        held += low <= 0 <= high
    share = percent / 100
    assert held / cases == pytest.approx(share, abs=4 * (share * (1 - share) / cases) ** 0.5)


def test_works_with_opposite_effects_tell_nothing_of_a_third():
    """One work gains, one loses: over works the change is unsure, over documents it is zero."""
    tokens = np.full((80, 1), 100)
    decoder = 4.0 * tokens
    effect = np.repeat([-0.02, 0.03], [60, 20]) + np.random.default_rng(0).normal(0, 0.005, 80)
    sums = Sums(tokens, decoder, decoder + effect[:, None] * tokens)
    work = np.repeat([0, 1], [60, 20])
    (row,) = perplexity.figures({"nll": sums}, work, 0)["rows"]
    assert intervals.unit(work) == "works"
    assert row["change_low"] < -1.8 and row["change_high"] > 2.8
    (over_documents,) = perplexity.figures({"nll": sums}, np.arange(80), 0)["rows"]
    assert intervals.unit(np.arange(80)) == "documents"
    assert over_documents["change_high"] < 0, "a bootstrap over documents is sure of a gain"
    of_first = Sums(*(x[work == 0] for x in sums))
    (novel,) = perplexity.figures({"nll": of_first}, work[work == 0], 0)["rows"]
    assert intervals.unit(work[work == 0]) == "documents of one work"
    assert novel["change_high"] < -1.7


def test_sums_of_works_give_the_same_intervals():
    """Of each source too; the documents of a source with a single work stay apart."""
    draw = np.random.default_rng(0)
    work = np.array([0, 0, 1, 1, 1, 2, 3, 3, 3])
    source = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    tokens = draw.integers(1, 9, (9, 2))
    arrays = {"source": source, "work": work, "works": np.array(list("abcd")), "tokens": tokens}
    arrays |= {"decoder": draw.normal(9, 1, (9, 2)), "augmented": draw.normal(9, 1, (9, 2))}
    summed = perplexity.sum_works(arrays)
    assert sorted(summed["work"]) == [0, 1, 2, 3, 3, 3] and summed["works"] is arrays["works"]
    assert perplexity.sum_works(summed)["tokens"].tolist() == summed["tokens"].tolist()

    def intervals_of(arrays, chosen):
        sums = Sums(*(arrays[name][chosen] for name in Sums._fields))
        return interval(sums, arrays["work"][chosen], 0)

    for number in (0, 1):
        expected = intervals_of(arrays, source == number)
        found = intervals_of(summed, summed["source"] == number)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    expected = intervals_of(arrays, slice(None))
    np.testing.assert_allclose(intervals_of(summed, slice(None)), expected, rtol=1e-12)
