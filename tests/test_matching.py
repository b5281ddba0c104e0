"""Pairs of decisions and events, and places of replies: the fast ways against every possible pairing."""
import itertools

import numpy as np
import pytest

from dst_smolvlm.metrics.matching import cheapest_places, count_matches, event_prf, match_events, match_predictions, pairing_cost


@pytest.fixture
def rng(): return np.random.default_rng(0)


def most_pairs(pred, ref, tolerance):
    "The largest number of pairs, by trying every one-to-one assignment of the shorter list."
    if len(pred) > len(ref): pred, ref = ref, pred
    return max(sum(abs(p - r) <= tolerance for p, r in zip(pred, order)) for order in itertools.permutations(ref, len(pred)))


def test_no_pairing_has_more_pairs(rng):
    for _ in range(200):
        pred, ref = (rng.choice(12, rng.integers(0, 6), replace=False).tolist() for _ in range(2))
        there, back = event_prf(pred, ref, 2), event_prf(ref, pred, 2)
        assert there.tp == most_pairs(pred, ref, 2)
        assert (there.precision, there.recall, there.f1) == (back.recall, back.precision, back.f1)       # the two change roles


def test_the_number_of_pairs_is_that_of_the_assignment(rng):
    "Sparse and dense, with tolerances from none to wider than the gaps."
    left_over = 0
    for _ in range(4000):
        length, tolerance = int(rng.integers(1, 60)), int(rng.integers(0, 6))
        pred, ref = (np.flatnonzero(rng.random(length) < share).tolist() for share in rng.random(2))
        pairs = count_matches(pred, ref, tolerance)
        assert pairs == len(match_events(pred, ref, tolerance))
        left_over += pairs < min(len(pred), len(ref))
    assert left_over > 500, 'nearly all cases can be paired completely'


@pytest.mark.parametrize('seed', range(30))
def test_the_sparse_graph_has_the_cost_of_the_full_table(seed):
    r = np.random.default_rng(seed)
    said = np.flatnonzero(r.random(40) < .8).tolist()
    ref = {int(j): text for j in r.integers(0, 40, 9) for text in ('go on', 'stop')[seed % 2:]}
    frames, cost, _ = pairing_cost(said, dict.fromkeys(said, 'go on'), ref, 40, (-3, 5))
    full, sparse = cheapest_places(frames, cost), cheapest_places(frames, cost, dense=0)
    for places in (full, sparse): assert len({row[w] for row, w in zip(frames.tolist(), places)}) == len(said)
    total = [sum(cost[a, w] for a, w in enumerate(places)) for places in (full, sparse)]
    assert total[0] == pytest.approx(total[1])


def test_no_placement_of_replies_is_cheaper(rng):
    vocabulary = 'take the red blue part well done'.split()
    say = lambda: ' '.join(rng.choice(vocabulary, rng.integers(1, 4)))
    for _ in range(50):
        gen, ref = ({int(f): say() for f in rng.choice(6, rng.integers(1, 4), replace=False)} for _ in range(2))
        said = sorted(gen)
        frames, cost, _ = pairing_cost(said, gen, ref, 6, (-2, 3))
        costs = [dict(zip(row.tolist(), values.tolist())) for row, values in zip(frames, cost)]
        least = min(sum(c.get(j, np.inf) for c, j in zip(costs, places)) for places in itertools.permutations(range(6), len(said)))
        places = cheapest_places(frames, cost)
        assert sum(cost[a, w] for a, w in enumerate(places)) == pytest.approx(least)


def test_replies_far_apart_are_matched_as_if_together():
    gen, ref = {0: 'take the red part', 40: 'well done'}, {1: 'take the red part', 41: 'well done', 20: 'go on'}
    matching = match_predictions(gen, ref, 60, (-1, 2), 1)
    assert [p[:2] for p in matching.pairs] == [(0, 1), (40, 41)] and (matching.missed, matching.redundant) == ([20], [])
