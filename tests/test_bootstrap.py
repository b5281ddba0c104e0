"""Intervals and verdicts: against the slow way, against the binomial, and what must not matter."""
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binom

from dst_smolvlm.metrics.bootstrap import (
    ONE_VIDEO, Difference, Estimate, bootstrap_scores, compare, exact_interval, interval, resample, score_intervals, swapped_differences)
from dst_smolvlm.metrics.matching import ratio

THREE = [Counter(right=r, total=t) for r, t in ((1, 2), (3, 3), (0, 5))]
BASE = [Counter(right=r, total=10) for r in (2, 5, 6, 8)]
MORE = [c + Counter(right=1) for c in BASE]
MIXED = MORE + [c + Counter(right=2) for c in BASE]


def accuracy(c): return dict(accuracy=ratio(c['right'], c['total']), note='not a number')

def estimate(counts, **options): return score_intervals(counts, accuracy, resample(len(counts)), **options)['accuracy']

def difference(a, b, **options): return compare(a, b, accuracy, resample(len(a)), **options)['accuracy']


def test_draws_have_a_seed_and_as_many_videos_as_there_are():
    weights = resample(5)
    assert (weights == resample(5)).all() and (resample(5, seed=1) != weights).any()
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=.1)


def test_scores_of_draws_are_those_of_copied_videos():
    weights = resample(3)[:50]
    drawn = [sum(([c]*int(k) for c, k in zip(THREE, row)), []) for row in weights]              # the slow way: copy, add, divide
    slow = [sum(c['right'] for c in d)/sum(c['total'] for c in d) for d in drawn]
    assert bootstrap_scores(THREE, accuracy, weights)['accuracy'].tolist() == slow


def test_the_order_of_videos_does_not_matter():
    weights, order = resample(3), [2, 0, 1]
    scores = bootstrap_scores([THREE[i] for i in order], accuracy, weights[:, order])
    assert (scores['accuracy'] == bootstrap_scores(THREE, accuracy, weights)['accuracy']).all()
    weights, order = resample(8), np.random.default_rng(0).permutation(8)
    again = compare([MIXED[i] for i in order], [(BASE*2)[i] for i in order], accuracy, weights[:, order])['accuracy']
    assert again == difference(MIXED, BASE*2)


def test_only_numbers_are_scores():
    scores = bootstrap_scores([Counter(right=1, total=2), Counter()], accuracy, [[1, 1], [0, 2]])
    assert list(scores) == ['accuracy'] and np.isnan(scores['accuracy']).tolist() == [False, True]


def test_intervals_of_few_and_equal_samples():
    assert interval([]) is None and interval(np.full(10, .3)) == (.3, .3)


@pytest.mark.parametrize(('k', 'n'), [(0, 7), (3, 7), (20, 20)])
def test_either_end_of_the_exact_interval_is_just_not_refuted(k, n):
    low, high = exact_interval(k/n, n)
    if k: assert binom.sf(k - 1, n, low) == pytest.approx(.025, abs=1e-9)
    if k < n: assert binom.cdf(k, n, high) == pytest.approx(.025, abs=1e-9)


def test_estimates_without_an_interval():
    assert estimate(THREE[:1]) == Estimate(.5, None, None, ONE_VIDEO)
    assert estimate([Counter(), Counter()]) == Estimate(None, None, None, 'undefined on these videos')


def test_the_bound_of_a_point_goes_by_the_videos_that_are_judged():
    same = estimate([Counter(right=3, total=3)]*19 + [Counter(right=1, total=1), Counter()])       # one of the 21 has nothing to judge
    assert same[:3] == (1., 1., 1.) and same.bound == pytest.approx(exact_interval(1., 20))
    assert estimate([Counter(right=3, total=3)]*5, unbounded=['accuracy']).bound is None


def test_a_point_shows_nothing_unless_its_bound_does():
    point = difference(MORE*2, BASE*2)
    assert (round(point.low, 9), round(point.high, 9), point.verdict) == (.1, .1, 'no difference shown')
    assert point.bound[0] < 0 < point.bound[1]
    all_or_nothing = [[Counter(right=right, total=10)]*8 for right in (10, 0)]
    decided = difference(*all_or_nothing)
    assert decided[:4] == (1., 1., 1., 'better') and decided.bound == pytest.approx((2*.025**(1/8) - 1, 1.))
    assert difference(*all_or_nothing, unbounded=['accuracy']).verdict == 'no difference shown'


def test_verdicts():
    assert difference(BASE, BASE)[:4] == (0., 0., 0., 'no difference shown')
    assert difference(MORE, BASE).verdict == difference(BASE, MORE).verdict == 'no difference shown'       # four videos are too few
    assert difference(MIXED, BASE*2, lower_is_better=('accuracy',)).verdict == 'worse'
    assert difference(MORE[:1], BASE[:1])[3:5] == ('no difference shown', ONE_VIDEO)
    assert difference(MORE, [Counter()]*4) == Difference(None, None, None, 'no difference shown', 'undefined on these videos')


def test_few_videos_are_swapped_in_all_ways():
    swapped = swapped_differences(MORE, BASE, accuracy)['accuracy']
    assert len(swapped) == 16 and abs(swapped).max() == pytest.approx(.1)
    assert len(swapped_differences(MIXED*2, BASE*4, accuracy, draws=100)['accuracy']) == 100


def test_a_difference_has_a_sign_and_no_unit():
    there, back = difference(MIXED, BASE*2), difference(BASE*2, MIXED)
    assert there[:3] == pytest.approx((-back.value, -back.high, -back.low))
    twice = lambda row: [Counter({k: 2*v for k, v in c.items()}) for c in row]
    assert difference(twice(MIXED), twice(BASE*2)) == there                       # ratios do not know how many frames a second has
