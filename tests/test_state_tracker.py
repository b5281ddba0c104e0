"""The state tracker on random pointers, from nearly certain to nearly uniform: causal, deterministic, without favourites, and legal but
for the two corrections that it documents."""
import numpy as np
import pytest

from dst_smolvlm.core.states import transitions
from dst_smolvlm.streaming.state_tracker import OnlineStateTracker


@pytest.fixture
def rng(): return np.random.default_rng(1)

def track(pointer, **options):
    "The states [T, S] of a new tracker over `pointer` [T, S+1]."
    tracker = OnlineStateTracker([0]*(len(pointer[0]) - 1), **options)
    return np.stack([tracker(p) for p in pointer])

def random_pointer(rng, S, T=80):
    "Frames of which each is held for a while, so that steps are truly begun and completed; some are certain, some are nearly uniform."
    looks = rng.dirichlet([rng.choice([.05, .3, 2.])]*(S + 1), T)
    return np.repeat(looks, rng.integers(1, 6, T), axis=0)[:T]

def clear_pointer(shown, S, noise=0., seed=2):
    "Frames that clearly show a step, or S for none, each with a little noise."
    rows = np.eye(S + 1)[shown]*.94 + .02 + noise*np.random.default_rng(seed).dirichlet([.3]*(S + 1), len(shown))
    return rows/rows.sum(1, keepdims=True)

def followed(shown, S):
    "States [T, S] if every frame is followed: the definition for a pointer that never errs."
    states, state = [], np.zeros(S, np.int8)
    for step in shown:
        state[state == 1] = 2
        if step < S: state[step] = 1
        states.append(state.copy())
    return np.stack(states)


# ---- short stories ------------------------------------------------------------------------------------------------------------------

def tell(shown):
    "Track what is shown of two steps (0, 1, or None for nothing) → a circle for each step: empty, half or full."
    states = track(clear_pointer([2 if s is None else s for s in shown], 2))
    return [''.join('○◐●'[x] for x in row) for row in states]

@pytest.mark.parametrize('shown, states', [
    ([None, 0, 0, 0, None, 1, 1, 1, None], '○○ ◐○ ◐○ ◐○ ●○ ●◐ ●◐ ●◐ ●●'),
    ([1, 0, 0, 0, None], '○◐ ◐○ ◐○ ◐○ ●○'),                      # a first glance at the wrong step is taken back
    ([0, 0, 0, None, 0, 0, None], '◐○ ◐○ ◐○ ●○ ◐○ ◐○ ●○'),        # hidden for one frame
    ([0, 0, 0, None, None, None, None, 0], '◐○ ◐○ ◐○ ●○ ●○ ●○ ●○ ●○'),      # too late to be undone
    ([0, 0, 0, 1, 1, 1, None], '◐○ ◐○ ◐○ ●◐ ●◐ ●◐ ●●'),             # one step after another, without a pause
    ([None, 0, None, None, None], '○○ ◐○ ●○ ●○ ●○')])              # one clear idle frame: the known weakness
def test_a_story_as_it_is_told(shown, states): assert tell(shown) == states.split()


def test_a_part_that_only_looks_like_a_step_begins_none():
    assert track([[.6, .0, .4]]*4 + [[0., 0., 1.]])[-1].tolist() == [0, 0]


def test_the_second_part_is_taken_before_the_first_is_put_down():
    overlap = [[.9, .05, .05]]*3 + [[.48, .48, .04]]*2 + [[.05, .9, .05]]*3 + [[.05, .05, .9]]
    assert track(overlap)[3:].tolist() == [[1, 1], [1, 1], [2, 1], [2, 1], [2, 1], [2, 2]]


# ---- what always holds --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trial', range(60))
def test_causal_deterministic_and_without_favourites(trial):
    "Steps in another order have the same states in that order; two steps that are shown equally are in equal states."
    rng, S = np.random.default_rng(trial), (1, 2, 5, 30)[trial % 4]
    frames = random_pointer(rng, S)
    states, cut, order = track(frames), int(rng.integers(1, 80)), rng.permutation(S)
    assert np.array_equal(states[:cut], track(np.concatenate([frames[:cut], random_pointer(rng, S)]))[:cut])
    assert np.array_equal(states, track(frames))
    assert np.array_equal(track(frames[:, [*order, S]]), states[:, order])
    twins = np.concatenate([frames[:, :1], frames], axis=1)/(1 + frames[:, :1])
    first, second = track(twins)[:, :2].T
    assert np.array_equal(first, second)


def corrections(states, established, undo_frames):
    "How many completions were undone and how many beginnings taken back; fails at any other illegal transition."
    began, ended, counts = {}, {}, [0, 0]
    for i, (old, new) in enumerate(zip(np.concatenate([np.zeros_like(states[:1]), states]), states)):
        for s, was, now in transitions(old, new):
            if (was, now) == (0, 1): began[s] = i
            elif (was, now) == (1, 2): ended[s] = i
            elif (was, now) == (2, 1):
                assert i - ended[s] <= undo_frames
                counts[0] += 1
            elif (was, now) == (1, 0):
                assert i - began[s] < established and (new == 1).any()
                counts[1] += 1
            else: raise AssertionError((i, s, was, now))
    return counts

def test_legal_but_for_the_two_corrections(rng):
    "What was completed longer ago is never resurrected; the check keeps its own account of when a step began and ended."
    total = np.zeros(2, int)
    for trial in range(120):
        options = dict(established=int(rng.integers(0, 5)), undo_frames=int(rng.integers(0, 5)))
        total += corrections(track(random_pointer(rng, (1, 2, 5, 30)[trial % 4]), **options), **options)
    assert (total > 20).all()


def test_nothing_completed_begins_anew_under_pure_noise():
    rng = np.random.default_rng(0)
    noisy = track([rng.dirichlet([.4]*5) for _ in range(300)])
    assert not ((noisy[:-1] == 2) & (noisy[1:] == 0)).any()


@pytest.mark.parametrize('undo_frames', range(5))
def test_a_step_goes_on_after_a_gap_that_can_be_undone_and_no_longer_one(undo_frames):
    for gap in range(1, 8):
        shown = [0]*4 + [2]*gap + [0]*3
        states = track(clear_pointer(shown, 2, noise=.03), undo_frames=undo_frames)[:, 0]
        assert states.tolist() == [1]*4 + [2]*gap + [1 if gap <= undo_frames else 2]*3


@pytest.mark.parametrize('S', [1, 30])
def test_one_step_and_thirty_are_found_at_the_very_frame(rng, S):
    shown = [x for s in rng.permutation(S).tolist() for x in [S]*4 + [s]*6] + [S]*4
    assert np.array_equal(track(clear_pointer(shown, S, noise=.05)), followed(shown, S))


# ---- restart ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trial', range(20))
def test_restart_touches_only_what_differs(trial):
    "In the tracker's own state, at every frame, it changes nothing; where all of the state differs, it equals a new tracker."
    frames = np.random.default_rng(trial).dirichlet([.3]*5, 60)
    plain, restarted = OnlineStateTracker([0]*4), OnlineStateTracker([0]*4)
    for p in frames:
        restarted.restart(restarted.state)
        assert np.array_equal(plain(p), restarted(p))
    other = (plain.state + 1) % 3
    plain.restart(other)
    new = OnlineStateTracker(other)
    for p in frames: assert np.array_equal(plain(p), new(p))


def test_restart_copies_what_it_is_given():
    "Step 1 is completed for good, step 2 in progress and not yet established; the array that was given stays as it is."
    tracker = OnlineStateTracker([1, 0])
    tracker.restart([2, 1])
    frames = np.array([[.9, .05, .05], [.05, .9, .05], [.05, .05, .9]])
    assert [tracker(p).tolist() for p in frames] == [[2, 2], [2, 1], [2, 2]]
    given = np.array([0, 1])
    tracker.restart(given)
    tracker([.9, .05, .05])
    assert given.tolist() == [0, 1]
