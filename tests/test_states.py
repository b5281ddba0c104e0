"""Step states against a plain count, on random occurrences and on a long video."""
import numpy as np
import pytest

from dst_smolvlm.core.states import (
    COMPLETED, IN_PROGRESS, NOT_STARTED, apply_transitions, frame_of, frame_times, legal_ratio, state_changes, states_at, states_from_spans)


@pytest.mark.parametrize('fps', [1, 2, 10, 24, 29.97])
def test_the_time_of_a_frame_belongs_to_it_and_the_next_number_to_the_next(fps):
    times = frame_times(500, fps)
    assert [frame_of(t, fps) for t in times] == list(range(500))
    assert [frame_of(np.nextafter(t, np.inf), fps) for t in times] == list(range(1, 501))


def counted(occurrences, t, repeats):
    "How many occurrences have been opened at time `t`, and how many closed?"
    occurrences = [o for o in occurrences if o[0] >= 0]
    if repeats == 'merge' and occurrences: occurrences = [(min(o[0] for o in occurrences), max(o[1] for o in occurrences))]
    opened, closed = (sum(o[k] <= t for o in occurrences) for k in (0, 1))
    if opened > closed: return IN_PROGRESS
    return COMPLETED if opened else NOT_STARTED


@pytest.mark.parametrize('repeats', ['merge', 'reopen'])
def test_painting_agrees_with_counting(repeats):
    "Occurrences overlap, touch, begin at the same time, last no time at all or are skipped, and the times are in no order."
    rng = np.random.default_rng(0)
    for _ in range(30):
        some = [[(a, a + int(rng.integers(0, 4))) for a in rng.integers(-1, 12, rng.integers(0, 4)).tolist()] for _ in range(5)]
        times = rng.permutation(30)/2
        np.testing.assert_array_equal(states_at(some, times, repeats), [[counted(step, t, repeats) for step in some] for t in times])


@pytest.fixture(scope='module')
def occurrences():
    "Two hours with 200 steps, each done three times."
    edges = np.sort(np.random.default_rng(0).uniform(0, 7200, (200, 6)).round(1), axis=1)
    return [[(a, b), (c, d), (e, f)] for a, b, c, d, e, f in edges.tolist()]


def test_a_long_video(occurrences):
    states = states_from_spans(occurrences, fps=2, num_frames=14401, repeats='reopen')
    in_progress = [sum(frame_of(b, 2) - frame_of(a, 2) for a, b in step) for step in occurrences]
    assert (states == IN_PROGRESS).sum(axis=0).tolist() == in_progress
    assert legal_ratio(states, repeats='reopen') == 1. and legal_ratio(states) < 1


def test_the_changes_rebuild_a_long_video_from_its_middle(occurrences):
    states = states_from_spans(occurrences, fps=2, num_frames=14401, repeats='reopen')
    changes, state = state_changes(states[5000:], states[4999]), states[4999]
    for i, expected in enumerate(states[5000:]):
        state = apply_transitions(state, changes.get(i, []))
        assert (state == expected).all()
