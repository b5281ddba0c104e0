"""Times and what they are worth: pooled videos, the computed clock against that of the stream, and PAUC on random streams."""
import numpy as np
import pytest

from dst_smolvlm.metrics.timing import (
    WHY_UNTIMELY, count_timeliness, decision_times, duplicates, pauc_areas, ready_spoken, score_timeliness, score_timing, time_trace)
from dst_smolvlm.streaming.reference_traces import example_record, oracle_trace
from dst_smolvlm.streaming.runner import StepResult
from dst_smolvlm.streaming.session import RealTimeClock


def video(latencies, skipped=(), overflow=(), **meta):
    "A trace of frames that took so many milliseconds."
    oracle, frames = oracle_trace(example_record()), []
    for i, ms in enumerate(latencies):
        times = dict(index=i, time=i/2, latency_ms=ms, decision_ms=ms, cache_tokens=10*(i + 1))
        frames.append(oracle.frames[0].model_copy(update=times | dict(text=None, skipped='busy' if i in skipped else None)))
    events = [dict(type='overflow', frame=i, time=i/2, dropped_tokens=5) for i in overflow]
    return oracle.model_copy(update=dict(frames=frames, meta=meta, events=events))


def test_pooling_is_not_averaging():
    slow = video([0.] + [300.]*9, skipped=[0], overflow=[4], cache_bytes_per_token=64, peak_memory_bytes=10**6)
    two = score_timing([time_trace(t) for t in (video([10.]*100), slow)])
    assert (two['latency_ms_p50'], two['latency_ms_p95'], two['overflow_ms_p50']) == (10., 300., 300.)
    assert (two['skipped'], two['overflows']) == (1, 1)
    assert (two['cache_tokens_max'], two['cache_bytes_max'], two['peak_memory_bytes']) == (1000, 6400, 10**6)
    assert two['frames_per_second'] == pytest.approx(109/(1. + 2.7))
    assert two['first_token_ms_p50'] is None and two['undefined']['first_token_ms_p50'] == 'no reply has a time'


def test_without_times_there_are_no_scores():
    untimed = score_timing([time_trace(oracle_trace(example_record()))])
    assert untimed['latency_ms_p50'] is None and untimed['skipped_share'] == 0.
    assert untimed['undefined'].keys() == {k for k, v in untimed.items() if v is None}


def test_the_computed_clock_is_that_of_the_stream():
    "On random work, light and heavy, with skipped frames."
    rng = np.random.default_rng(0)
    for _ in range(100):
        work = rng.exponential(rng.choice([200., 600.]), 40)
        share, skip = rng.random(40), set(np.flatnonzero(rng.random(40) < .1).tolist())
        clock, plain, clocked = RealTimeClock(2., 'queue'), [], []
        for i, f in enumerate(video(work, skipped=skip).frames):
            decision, delay = 0. if i in skip else work[i]*share[i], 0.
            if i not in skip: delay = clock.done(i, StepResult(0., 0., None, None, None, None, latency_ms=work[i], decision_ms=decision))
            plain.append(f.model_copy(update={'decision_ms': decision}))
            clocked.append(f.model_copy(update={'decision_ms': decision, 'delay_s': delay}))
        read = [i for i in range(40) if i not in skip]
        computed, measured = (decision_times(video([]).model_copy(update={'frames': frames})) for frames in (plain, clocked))
        assert computed[read] == pytest.approx(measured[read], abs=1e-9)


@pytest.mark.parametrize('fps', [1, 2, 3, 23.976, 29.97, 30])
def test_words_without_work_are_ready_at_their_frame(fps):
    oracle = oracle_trace(example_record(), fps)
    assert ready_spoken(oracle) == oracle.spoken


def test_pauc_on_random_streams():
    "It lies in [0, 1]; one more reply never lowers it; a delay never raises it as long as there is no next turn to be reached."
    vocabulary = 'take the red blue part box one two well done'.split()
    for seed in range(500):
        r = np.random.default_rng(seed)
        say = lambda r=r: ' '.join(r.choice(vocabulary, r.integers(1, 5)))
        turns = [(float(t), say()) for t in np.cumsum(r.uniform(.5, 8, 5))]
        replies = [(float(r.uniform(0, 40)), say()) for _ in range(8)]
        areas, more = pauc_areas(replies, turns), pauc_areas(replies + [(float(r.uniform(0, 40)), say())], turns)
        assert all(0 <= a <= 1 and b >= a - 1e-12 for a, b in zip(areas, more))
        alone = turns[:1]
        late = [(t + float(r.exponential()), text) for t, text in replies if t >= alone[0][0]]
        assert pauc_areas(late, alone)[0] <= pauc_areas(replies, alone)[0] + 1e-12
        assert pauc_areas(turns, turns) == pytest.approx([1.]*5)


def test_a_reply_too_early_or_one_turn_late_is_worth_nothing():
    turn = [(10., 'take the red part')]
    assert pauc_areas([(9.9, 'take the red part')], turn) == [0.]
    assert pauc_areas([(12., 'take the red part')], turn + [(12., 'well done')]) == [0., 0.]


@pytest.mark.parametrize(('frames', 'user', 'found'), [
    ((0, 4), [0], [4]), ((0, 4), [4], []), ((0, 8, 16), [], [8, 16]), ((0, 10), [], [])],
    ids=['the user spoke before', 'the user speaks now', 'counted from the last time', 'ten seconds are enough'])
def test_what_is_a_duplicate(frames, user, found):
    assert duplicates([(i, 'Go on.') for i in frames], {}, user, 1.) == found


def test_duplicates_go_by_words():
    assert duplicates([(9, 'Go on.'), (11, 'go  on')], {10: 'Go on!'}, [], 1.) == [11]            # one turn excuses one saying
    assert duplicates([(0, 'Go on.'), (1, 'Stop.'), (2, 'Go on.')], {}, [], 1.) == [2]
    assert duplicates([(0, '👍'), (3, '❤️'), (5, '👍')], {}, [], 1.) == [5]


def test_what_is_undefined_without_turns_or_replies():
    record, oracle = example_record(), oracle_trace(example_record())
    silent = oracle.model_copy(update={'frames': [f.model_copy(update={'text': None}) for f in oracle.frames]})
    assert score_timeliness(count_timeliness(silent, record)) == dict(pauc=0., pauc_ideal=0., duplicate_rate=None)
    mute = record.model_copy(update={'turns': []})
    scores = score_timeliness(count_timeliness(oracle, mute))
    assert scores == dict(pauc=None, pauc_ideal=None, duplicate_rate=0.) and scores.keys() == WHY_UNTIMELY.keys()
