"""Sweeps and calibration on random probabilities: against sklearn, against all thresholds, and what must hold whatever they are."""
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dst_smolvlm.metrics.calibration import bin_frames, count_calibration, frame_labels, reliability_figure, score_calibration
from dst_smolvlm.metrics.matching import event_prf
from dst_smolvlm.metrics.thresholds import best_threshold, f1_figure, pr_auc, pr_curve, pr_figure, sweep_thresholds
from dst_smolvlm.streaming.reference_traces import example_record, example_trace, oracle_trace


@pytest.fixture(scope='module')
def update_curve():
    "The changes of state of the running example: probabilities, events and curve within a second."
    probs, events = [example_trace().update_probs], [oracle_trace(example_record()).update_frames()]
    return probs, events, pr_curve(probs, events, 2)


def detector(videos, frames=600, sharp=1., seed=0):
    "Probabilities and events drawn with exactly these; it reports log-odds `sharp` times as large."
    r = np.random.default_rng(seed)
    p = 1/(1 + np.exp(-(r.normal(-6, 1.2, (videos, frames)) + 7*(r.random((videos, frames)) < .02))))
    hits = r.random(p.shape) < p
    return list(p**sharp/(p**sharp + (1 - p)**sharp)), [np.flatnonzero(h).tolist() for h in hits]


def test_recall_only_grows_as_the_threshold_falls():
    for seed in range(300):
        r = np.random.default_rng(seed)
        curve = pr_curve([r.random(30)], [np.flatnonzero(r.random(30) < .2).tolist()], int(r.integers(0, 4)))
        assert (np.diff(curve.tp) >= 0).all() and (np.diff(curve.fn) <= 0).all()


def test_a_curve_holds_the_scores_of_every_threshold():
    for seed in range(30):
        r = np.random.default_rng(seed)
        probs, events = r.random(40).round(1), np.flatnonzero(r.random(40) < .2).tolist()
        curve = pr_curve([probs], [events], 2)
        for k, t in enumerate(curve.thresholds):
            one = event_prf(np.flatnonzero(probs >= t), events, 2)
            assert (curve.tp[k], curve.fp[k], curve.fn[k]) == (one.tp, one.fp, one.fn)


@pytest.mark.parametrize('decimals', [1, 2])
def test_without_tolerance_the_area_is_that_of_sklearn(decimals):
    for seed in range(100):
        r = np.random.default_rng(seed)
        p, y = r.random(60).round(decimals), r.random(60) < .15            # rounded: many equal probabilities
        if not y.any(): continue
        area = pr_auc(pr_curve([p], [np.flatnonzero(y).tolist()], 0))
        assert area == pytest.approx(average_precision_score(y, p))


def test_200_thresholds_give_the_area_of_thousands():
    probs, events = detector(20)
    every = np.unique(np.concatenate(probs))
    assert len(every) > 10000 and len(sweep_thresholds(probs)) <= 200
    assert pr_auc(pr_curve(probs, events, 2)) == pytest.approx(pr_auc(pr_curve(probs, events, 2, every[::9])), abs=.005)


def test_nothing_to_sweep():
    five = [np.array([.9, .2, .8, .1, .6])]
    assert len(sweep_thresholds([])) == 0
    assert pr_auc(pr_curve(five, [[]], 1)) is None and pr_auc(pr_curve([], [], 1)) is None
    assert best_threshold(pr_curve([np.array([np.nan])], [[]], 1)) is None


def test_the_range_of_the_best_threshold_ends_where_the_score_falls(update_curve):
    probs, events, curve = update_curve
    best = best_threshold(curve)
    def f1(t): return pr_curve(probs, events, 2, [t]).f1[0]
    assert min(f1(t) for t in (best.low + 1e-6, (best.low + best.high)/2, best.high)) >= best.f1 - .01
    assert f1(best.low) < best.f1 - .01


def test_an_oracle_has_the_best_score_at_1():
    oracle = oracle_trace(example_record())
    assert best_threshold(pr_curve([oracle.update_probs], [oracle.update_frames()], 0))[:2] == (1., 1.)
    assert bin_frames([oracle.update_probs], [oracle.update_frames()]).ece == 0.


def test_figures_of_what_has_no_curve(update_curve):
    probs, events, _ = update_curve
    at_zero = pr_curve([np.zeros(3)], [[0, 1, 2]], 0)                      # all fire at the only threshold: nothing lies above 0
    assert best_threshold(at_zero) == (0., 1., 0., 0.)
    for rows in ({}, {'nothing': pr_curve(probs, [[]], 1)}, {'$_^': at_zero}):
        for draw in (pr_figure, f1_figure): draw(rows).canvas.draw()
    for rows in ({}, {'nothing': bin_frames([], [])}, {'$_^': bin_frames(probs, events)}): reliability_figure(rows).canvas.draw()


def test_bins_of_equal_mass():
    rng = np.random.default_rng(0)
    assert bin_frames([rng.random(100), rng.random(50)], [[3], []], equal='mass').n.tolist() == [10.]*15
    probs, events = detector(80, sharp=2.2)
    assert bin_frames(probs, events, equal='mass').ece == pytest.approx(bin_frames(probs, events).ece, abs=.01)


def test_added_counts_give_the_calibration_of_all_frames():
    probs, events = detector(80, sharp=2.2)
    pooled = Counter()
    for p, e in zip(probs, events): pooled.update(count_calibration(p, e, 'update'))
    scores, (p, y) = score_calibration(pooled, 'update'), frame_labels(probs, events)
    rate = scores['update_base_rate']
    assert scores['update_ece'] == pytest.approx(bin_frames(probs, events).ece, abs=1e-9)
    assert scores['update_brier'] == pytest.approx(((p - y)**2).mean(), abs=1e-9)
    assert ((rate - y)**2).mean() == pytest.approx(rate*(1 - rate), abs=1e-9)            # knowing the base rate only
