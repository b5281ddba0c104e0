"""What a model must not know while it streams: the reference's words and states, and what has not happened yet. A canary in each."""
import numpy as np
import pytest

import processes
from dst_smolvlm.data.schema import Turn
from dst_smolvlm.evaluation.variants import CONTROLS, HEAD_ONLY, MODEL, controlled
from dst_smolvlm.model.stream_layout import StreamLayout
from dst_smolvlm.streaming.context_strategies import STRATEGIES, make_strategy
from dst_smolvlm.streaming.recorder import observed
from dst_smolvlm.streaming.session import stream_record, stream_records
from dst_smolvlm.streaming.state_tracker import OnlineStateTracker
from dst_smolvlm.streaming.trace import TraceFrame
from dst_smolvlm.world.toy_world import make_scene

SMALL = dict(summarize_and_drop=dict(summary_max_length=16), recent_frames=dict(num_frames=8), text_long_vision_short=dict(num_frames=8))


@pytest.fixture(scope='module')
def model():
    model, layout = processes.small_model()
    return model.eval(), layout


@pytest.fixture
def read(monkeypatch):
    "All texts that any layout turns into tokens."
    texts, encode = [], StreamLayout.encode
    monkeypatch.setattr(StreamLayout, 'encode', lambda self, text: (texts.append(text), encode(self, text))[1])
    return texts


def planted(record):
    "The record with a canary in each of the reference's words, and other times of every step."
    turns = [t if t.role == 'user' else t.model_copy(update=dict(content='CANARY ' + t.content)) for t in record.turns]
    turns += [Turn(role='assistant', time=2.5, content='CANARY'), Turn(role='system', time=0., content='CANARY')]
    steps = [s.model_copy(update=dict(spans=[(k, k + 1.)])) for k, s in enumerate(record.steps)]
    return record.model_copy(update=dict(turns=turns, steps=steps))


def decided(trace, stop=None):
    previous_state = lambda f: {k: getattr(f, k) for k in TraceFrame.model_fields if not k.endswith('_ms')}
    return [previous_state(f) for f in trace.frames[:stop]]


def stream(model, record, frames, strategy='none', seed=None, **options):
    if strategy != 'none':
        options['strategy'] = make_strategy(dict(name=strategy, max_seq_len=330, reserved_seq_len=64) | SMALL.get(strategy, {}))
    return stream_record(*model, record, frames, speak_threshold=.4, max_reply_tokens=3, **options)


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('options', [{}, dict(tracker_options=None, update_threshold=.3)], ids=['filter', 'head'])
def test_the_reference_is_not_read(model, read, strategy, options):
    scene = make_scene(7, 'test')
    honest = stream(model, scene.record, scene.frames(), strategy, **options)
    assert strategy == 'none' or any(e['type'] == 'overflow' for e in honest.events), 'the strategy was not put to the test'
    read.clear()
    spoiled = stream(model, planted(scene.record), scene.frames(), strategy, **options)
    assert read and not [t for t in read if 'CANARY' in t]
    assert decided(spoiled) == decided(honest) and spoiled.events == honest.events


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_the_future_is_not_read(model, strategy):
    "Other frames, and other words of the user, from frame 30 on: the first thirty decisions are the same bit for bit."
    scene = make_scene(7, 'test')
    frames = scene.frames()
    other = frames.copy(); other[30:] = 255 - frames[30:]
    later = [*(t for t in scene.record.turns if t.time <= 14.5), Turn(role='user', time=15., content='CANARY')]
    honest = stream(model, scene.record, frames, strategy)
    spoiled = stream(model, scene.record.model_copy(update=dict(turns=later)), other, strategy)
    assert decided(spoiled, 30) == decided(honest, 30)
    assert decided(spoiled)[30:] != decided(honest)[30:], 'the frames are not looked at at all'


def test_many_at_once_see_no_more(model, read):
    scenes = [make_scene(k, 'test') for k in (7, 8)]
    traces = [list(stream_records(*model, [(change(s.record), s.frames()[:40]) for s in scenes], slots=2, speak_threshold=.4,
                                  max_reply_tokens=3)) for change in (lambda r: r, planted)]
    assert [decided(t) for t in traces[0]] == [decided(t) for t in traces[1]] and not [t for t in read if 'CANARY' in t]


def test_no_field_of_the_truth_is_left():
    "Field by field: whatever is added to a record one day must be looked at here before a stream may see it."
    record = planted(make_scene(7, 'test').record)
    seen = observed(record)
    assert 'CANARY' not in seen.model_dump_json() and all(s.spans == [] for s in seen.steps) and {t.role for t in seen.turns} <= {'user'}
    assert set(type(record).model_fields) == {'video_uid', 'dataset', 'dialogue', 'fps', 'duration', 'goal', 'knowledge', 'steps', 'turns',
                                              'video', 'view'}
    assert set(type(record.steps[0]).model_fields) == {'id', 'name', 'spans'}


@pytest.mark.parametrize('variant', [MODEL, HEAD_ONLY, *CONTROLS], ids=lambda v: v.name)
def test_no_variant_knows_more(model, read, variant):
    scene = make_scene(7, 'test')
    record, frames = controlled(variant, scene)
    stream(model, planted(record), frames, **({} if variant.use_tracker else dict(tracker_options=None, update_threshold=.3)))
    assert read and not [t for t in read if 'CANARY' in t]


def test_a_filter_hears_one_frame_after_the_other():
    "The state tracker is outside the model, and could look ahead as well."
    rng = np.random.default_rng(0)
    for _ in range(50):
        pointer = rng.dirichlet(np.ones(5)*.3, 40)
        other = pointer.copy(); other[20:] = rng.dirichlet(np.ones(5)*.3, 20)
        first, second = (OnlineStateTracker(np.zeros(4)) for _ in range(2))
        a, b = [first(p) for p in pointer], [second(p) for p in other]
        assert np.array_equal(a[:20], b[:20])
