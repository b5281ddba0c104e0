"""The measures of state on random sequences: against slow definitions in words, and what must hold whatever the states are."""
from collections import Counter
from functools import partial

import numpy as np
import pytest

from dst_smolvlm.core.states import legal_ratio, state_changes
from dst_smolvlm.metrics.matching import event_prf, ratio
from dst_smolvlm.metrics.state_changes import (
    change_counts, change_sequences, count_legal, edit_distance, granular_change_accuracy, hold, segment_overlap, segment_pairs,
    segments, transition_pairs, transition_table)
from dst_smolvlm.metrics.states import OVERLAPS, TOLERANCES, count_states, relative_slot_counts, score_states
from dst_smolvlm.streaming.reference_traces import example_record
from dst_smolvlm.viz.state_strip import runs


@pytest.fixture
def rng(): return np.random.default_rng(0)

def listed(states): return [[i, *t] for i, change in state_changes(states).items() for t in change]

def random_states(rng, T, S, flicker):
    "Steps that start and end at random, some skipped; a share of cells is replaced by any state."
    spans = np.sort(rng.integers(0, 2*T + 1, (2, S)), axis=0)
    states = (np.arange(T)[:, None] >= spans[0]).astype(int) + (np.arange(T)[:, None] >= spans[1])
    return np.where(rng.random((T, S)) < flicker, rng.integers(0, 3, (T, S)), states)

def random_pair(rng):
    "Predicted and reference states, some of them real procedures, some flickering, some with holes in the prediction."
    T, S = rng.integers(0, 30), rng.integers(0, 6)
    true, pred = random_states(rng, T, S, rng.choice([0, .1])), random_states(rng, T, S, rng.choice([0, .1, 1]))
    pred = np.where(rng.random((T, S)) < .5, true, pred) if rng.random() < .3 else pred
    if rng.random() < .3: pred[rng.integers(0, T+1):] = -1                       # a trace that ends early
    if rng.random() < .2: pred[rng.random((T, S)) < .2] = -1                     # and one with holes
    return pred, true


def test_the_transition_table_lists_what_state_changes_lists(rng):
    for _ in range(100):
        states = rng.integers(0, 3, rng.integers(0, 7, 2))
        assert transition_table(states).tolist() == listed(states)


def test_transitions_are_paired_kind_by_kind(rng):
    for _ in range(50):
        p, t = rng.integers(0, 3, (2, 9, 3))
        by_kind = [{}, {}]
        for kinds, states in zip(by_kind, (p, t)):
            for frame, *kind in listed(states): kinds.setdefault(tuple(kind), []).append(frame)
        apart = sum(event_prf(frames, by_kind[1].get(kind, []), 2).tp for kind, frames in by_kind[0].items())
        assert transition_pairs(transition_table(p), transition_table(t), 9, 2) == apart


def test_the_legal_transitions_are_those_of_the_states(rng):
    for _ in range(50):
        table = transition_table(states := rng.integers(0, 3, (6, 3)))
        assert ratio(count_legal(table), len(table)) == legal_ratio(states)


def test_segments_are_the_runs_in_progress(rng):
    for _ in range(50):
        states = rng.integers(-1, 3, (12, 3))
        assert segments(states).tolist() == [[s, a, b] for s in range(3) for a, b, v in runs(states[:, s]) if v == 1]


def test_a_segment_serves_once():
    halves = segment_overlap(np.array([[0, 0, 4], [0, 6, 10]]), np.array([[0, 0, 10]]))             # one segment, predicted as two
    assert halves.tolist() == [[.4], [.4]] and segment_pairs(halves, .25) == 1
    assert [segment_pairs(np.zeros(shape), .1) for shape in ((0, 3), (3, 0), (0, 0))] == [0]*3


def change_counts_by_hand(pred, true):
    "The definition in words, on dictionaries of the steps that have a value."
    n, was = Counter(), ({}, {})
    for now in [tuple({s: int(v) for s, v in enumerate(row) if v} for row in rows) for rows in zip(pred, true)]:
        for s in {s for old, new in zip(was, now) for s in old.keys() | new.keys() if old.get(s) != new.get(s)}:
            p, t = now[0].get(s), now[1].get(s)
            n['correct' if p == t else 'missed' if p is None else 'over' if t is None else 'wrong'] += 1
        was = now
    return n['correct'], n['wrong'], n['missed'], n['over']

def test_changes_are_counted_as_the_paper_defines_them(rng):
    for _ in range(100):
        p, t = rng.integers(0, 3, (2, *rng.integers(1, 7, 2)))
        assert change_counts(p, t) == change_counts_by_hand(p, t)


def test_granular_change_accuracy_of_an_oracle_is_exactly_1():
    assert {granular_change_accuracy(n, 0, 0, 0) for n in range(1, 5000)} == {1.}


def plain_distance(a, b):
    if not a or not b: return len(a) + len(b)
    return min(plain_distance(a[1:], b) + 1, plain_distance(a, b[1:]) + 1, plain_distance(a[1:], b[1:]) + (a[0] != b[0]))

def test_edit_distance_is_the_recursive_one(rng):
    for _ in range(200):
        a, b = (rng.integers(0, 3, rng.integers(0, 6)).tolist() for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b, a) == plain_distance(a, b)


@pytest.mark.parametrize('other', [[[0, 1], [1, 1], [1, 2], [2, 2]], [[1, 0], [1, 1], [2, 1], [2, 2]]])
def test_a_tie_on_either_side_is_no_error(other):
    at_once = np.array([[0, 0], [1, 1], [2, 2]])[[0, 1, 1, 2]]
    assert edit_distance(*change_sequences(np.array(other), at_once)) == edit_distance(*change_sequences(at_once, np.array(other))) == 0


@pytest.mark.parametrize(('pause', 'score'), [(0, .25), (1, 0.)])
def test_the_wrong_order_of_steps_that_abut_costs_less(pause, score):
    "In MS-TCN's code, with one symbol for a step, it is 0 with and without a pause."
    def in_turn(*steps):
        states = np.zeros((9, 2), int)
        for k, step in enumerate(steps):
            first = 1 + k*(2 + pause)
            states[first:first+2, step], states[first+2:, step] = 1, 2
        return states
    assert 1 - edit_distance(*change_sequences(in_turn(1, 0), in_turn(0, 1)))/4 == score


def test_what_is_undefined():
    idle = np.zeros((5, 2), int)
    true = np.array([[0, 0], [1, 0], [1, 1], [2, 1], [2, 2]])
    undefined = lambda p, t: {k for k, v in score_states(count_states(p, t, 2.)).items() if v is None}
    every = set(score_states(count_states(true, true, 2.)))
    assert undefined(true, true) == set() and undefined(idle[:0], idle[:0]) == undefined(idle[:, :0], idle[:, :0]) == every
    assert undefined(idle, idle) == every - {'joint_goal_accuracy', 'slot_accuracy', 'macro_f1', 'f1_not_started'}
    assert undefined(idle, true) == undefined(idle - 1, true) == {'valid_dst_ratio'}             # nothing started, nothing predicted
    assert not any(score_states(count_states(idle - 1, true, 2.)).values())
    assert undefined(idle + 2, idle + 2) == {'f1_not_started', 'f1_in_progress', *(f'segmental_f1_{k}' for k in OVERLAPS)}
    assert relative_slot_counts(true, true) == (4., 4)


def test_scores_lie_between_0_and_1_and_rise_with_the_tolerance(rng):
    for _ in range(400):
        p, t = random_pair(rng)
        counts, order, fps = count_states(p, t, 2.), rng.permutation(p.shape[1]), rng.choice([1., 2., 29.97])
        scores = score_states(count_states(p, t, fps))
        assert all(k.startswith('state_') for k in counts)
        assert all(v is None or 0 <= v <= 1 for v in scores.values()), scores
        assert all(v in (None, 1.) for k, v in score_states(count_states(t, t, fps)).items() if k != 'valid_dst_ratio')
        assert count_states(p[:, order], t[:, order], 2.) == counts, 'the numbering of the steps matters'
        for rising in ([f'transition_f1_{k}' for k in TOLERANCES], [f'segmental_f1_{k}' for k in ('50', '25', '10')]):
            values = [scores[k] for k in rising]
            assert values == [None]*len(values) or values == sorted(values), scores


def test_a_prediction_that_stops_early_never_gains(rng):
    for _ in range(200):
        p, t = random_pair(rng)
        if not p.size: continue
        cut, whole = p.copy(), score_states(count_states(p, t, 2.))
        cut[rng.integers(0, len(p)):] = -1
        shorter = score_states(count_states(cut, t, 2.))
        for k in ('joint_goal_accuracy', 'slot_accuracy'): assert shorter[k] <= whole[k]
        relative = whole['relative_slot_accuracy']
        assert (shorter['relative_slot_accuracy'] or 0) <= (1 if relative is None else relative)
        # with five seconds more than there are frames, transitions differ by kind alone
        kinds = [Counter(tuple(kind) for _, *kind in listed(s)) for s in (hold(p), t)]
        assert count_states(p, t, 100.)['state_moves_paired_5s'] == (kinds[0] & kinds[1]).total()


def test_an_oracle_that_stops_early_loses():
    reference = example_record().states()                                            # [61, 4], the last change is at frame 54
    for end in range(len(reference)):
        cut = reference.copy()
        cut[end:] = -1
        scores = score_states(count_states(cut, reference, 2.))
        assert scores['joint_goal_accuracy'] < 1 and scores['valid_dst_ratio'] in (None, 1.)
        lost = ('granular_change_accuracy', 'edit_score', 'transition_f1_5s', 'macro_f1')
        if end <= 54: assert all(scores[k] < 1 for k in lost)


def test_counts_of_videos_add_up(rng):
    states = partial(random_states, rng, 40, 4)
    videos = [count_states(states(.05), states(0), 2.) for _ in range(5)]
    pooled = Counter()
    for c in videos: pooled.update(c)
    assert pooled['state_cells'] == 5*40*4
    for k, v in score_states(pooled).items():
        each = [s for c in videos if (s := score_states(c)[k]) is not None]
        if k not in ('macro_f1', 'granular_change_accuracy'): assert min(each) - 1e-12 <= v <= max(each) + 1e-12, k
