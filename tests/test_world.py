"""The toy world: the same everywhere, its labels exact, whatever is configured; and what is refused."""
import hashlib, importlib.util, os, subprocess, sys, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch.utils.data import DataLoader

from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.core.states import IN_PROGRESS, frame_of
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.data.schema import Step, VideoRecord, write_records
from dst_smolvlm.evaluation.baselines import baseline_trace
from dst_smolvlm.metrics.scores import score_traces
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.world.render import COLOURS, SHAPES, Part, draw_noise
from dst_smolvlm.world.replay import replay
from dst_smolvlm.world.scenes import ToyScenes, load_auxiliary_scenes, load_scenes
from dst_smolvlm.world.toy_world import SPLITS, Scene, in_hand, make_scene, render, render_frame
from dst_smolvlm.world.world_config import LIMITS, WorldConfig

root = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('bench_world', root/'bench'/'world.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

EVERYTHING = dict(length=900, uses=2, overlap=.4, mistakes=.5, questions=.5, distractors=3, passing=.6, occlusion=.2, hidden=.5)
HOUR = dict(length=7200, uses=3, palette=4, min_steps=20, max_steps=30)
ROUTES = [('train', 0, 0, {}), ('test', 7, 2, dict(palette=4, max_idle=16)), ('validation', 5, 1, dict(overlap=.5, occlusion=.4)),
          ('test', 3, 0, EVERYTHING), ('train', 2, 4, dict(identity='shape', shapes=7, max_steps=5, hidden=1., image_size=48))]


def said(scene) -> str:
    "A hash of everything that the record of a scene says."
    r = scene.record
    steps, turns = [(s.id, s.name, s.spans) for s in r.steps], [(t.role, t.time, t.content) for t in r.turns]
    facts = (r.video_uid, r.fps, r.duration, r.goal, steps, turns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def shown(scene, frames=range(0, 60, 7)) -> str:
    return hashlib.sha256(b''.join(render_frame(scene, i).tobytes() for i in frames)).hexdigest()[:16]


def all_routes(order=1) -> list[str]:
    scenes = [make_scene(i, split, WorldConfig(**knobs), seed) for split, i, seed, knobs in ROUTES[::order]]
    return [f'{said(s)} {shown(s)}' for s in scenes][::order]


# The same everywhere

@pytest.mark.parametrize('split, index, seed, knobs, kept', [
    ('train', 0, 0, {}, '2a267447667bc79f'),
    ('test', 7, 2, dict(palette=4, max_idle=16), '813a4b900247b8b7'),
    ('train', 3, 2, dict(palette=8, max_idle=12, mistakes=.3, questions=.4), '1096fac38e3ff6d5'),
    ('validation', 5, 1, dict(overlap=.5, occlusion=.4), '8c82b409a59e0099'),
    ('test', 1, 0, dict(identity='colour', max_steps=6), 'b4394d37c62531e7'),
    ('test', 2, 0, dict(length=600, max_steps=6), 'fbf0e79915995ae8'),
    ('test', 0, 0, HOUR, '4f67d1de8dfc7955')])
def test_records_are_those_of_the_published_figures(split, index, seed, knobs, kept):
    assert said(make_scene(index, split, WorldConfig(**knobs), seed)) == kept


@pytest.mark.parametrize('i, red', [
    (0, [[146, 124, 124, 148], [154, 154, 154, 154], [154, 162, 164, 154], [140, 141, 184, 139]]),
    (8, [[129, 109, 109, 131], [136, 85, 74, 136], [136, 104, 103, 136], [123, 120, 166, 122]]),
    (30, [[149, 128, 128, 155], [159, 159, 159, 159], [159, 159, 159, 159], [143, 136, 138, 145]])])
def test_pictures_are_those_of_the_published_figures(i, red):
    "The mean of red on a grid of 4 x 4: another Pillow may draw an edge elsewhere, but not much."
    grid = render_frame(make_scene(3), i)[..., 0].reshape(4, 16, 4, 16).mean((1, 3))
    np.testing.assert_allclose(grid, red, atol=3)


def test_the_same_in_another_process_and_order():
    "The other process has another PYTHONHASHSEED and makes the scenes in reverse."
    code = "import test_world; print('\\n'.join(test_world.all_routes(-1)))"
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, env=os.environ | dict(PYTHONHASHSEED='1'),
                          capture_output=True, text=True, check=True)
    assert done.stdout.split('\n')[:-1] == all_routes()


def test_a_frame_needs_no_other_frame():
    for split, index, seed, knobs in ROUTES:
        scene, fresh = (make_scene(index, split, WorldConfig(**knobs), seed) for _ in range(2))
        whole, rng = render(scene, 0, 60), np.random.default_rng(0)
        for i in rng.permutation(60).tolist():
            assert (render_frame(fresh, i) == whole[i]).all()
            make_scene(int(rng.integers(100))).frames(0, 1)                     # another scene in between
        assert (fresh.frames(17, 23) == whole[17:23]).all()
        assert fresh.frames(5, 5).shape == (0, *whole.shape[1:])


def test_threads_do_not_draw_on_each_others_frames():
    scenes = [make_scene(i) for i in range(8)]
    alone = [shown(s) for s in scenes]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(shown, scenes*4)) == alone*4


@pytest.fixture(scope='module')
def streams():
    _, layout = build_tiny()
    return DSTStreamDataset(ToyScenes('train', 6, 2, WorldConfig(**EVERYTHING | dict(length=300, max_steps=4))), layout, 64,
                            auxiliary_samples=3)


def row_hashes(item):
    (stream, dialogue), auxiliary_samples, _ = item[0]
    tensors = [stream['input_ids'], stream['pixel_values'], stream['previous_state'], dialogue['input_ids'],
               *(g['pixels'] for g in auxiliary_samples)]
    return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_do_not_matter(streams, workers):
    here = list(DataLoader(streams, batch_size=1, collate_fn=row_hashes))
    assert list(DataLoader(streams, batch_size=1, collate_fn=row_hashes, num_workers=workers)) == here


@pytest.mark.parametrize('knobs', [
    {}, dict(image_size=96, occlusion=.4, overlap=.6), dict(image_size=33, shapes=7, part_size=30., jitter=20.),
    dict(image_size=16, light=1.), dict(part_size=1., jitter=0., fps=1.3), dict(image_size=200, shapes=7, palette=2, few_colours=.5)])
def test_fast_drawing_changes_no_pixel(knobs):
    for index in range(3):
        scene = make_scene(index, cfg=WorldConfig(**knobs))
        for i in range(0, scene.record.num_frames(), 3): assert (render_frame(scene, i) == bench.plain_frame(scene, i)).all()


@given(st.integers(0, 2**63), st.integers(0, 9000), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_noise_is_that_of_the_generator(seed, n, before):
    ours, numpys = (np.random.default_rng(seed) for _ in range(2))
    for rng in (ours, numpys): rng.normal(size=before)
    assert (draw_noise(ours, n)//draw_noise.__globals__['_PALETTE'].shape[0] == numpys.integers(13, size=n, dtype=np.uint8)).all()


# Labels are exact

@st.composite
def worlds(draw):
    "Entries of a world with enough parts for every split."
    pair = lambda low, high: sorted(draw(st.tuples(st.integers(low, high), st.integers(low, high))))
    idle, carry, steps = pair(0, 16), pair(1, 12), pair(2, 12)
    names = ('overlap', 'mistakes', 'questions', 'passing', 'hidden', 'random_order')
    shares = {name: draw(st.sampled_from([0., .3, 1.])) for name in names}
    return shares | dict(
        min_idle=idle[0], max_idle=idle[1], min_carry=carry[0], max_carry=carry[1], min_steps=steps[0], max_steps=steps[1],
        length=draw(st.sampled_from([0, 0, 700])), uses=draw(st.integers(1, 3)), distractors=draw(st.integers(0, 3)),
        fps=draw(st.sampled_from([2., 1.3, 30., .5])))


@given(worlds(), st.integers(0, 50), st.sampled_from(SPLITS))
@settings(max_examples=25, deadline=None, phases=(Phase.generate,), suppress_health_check=[HealthCheck.too_slow])
def test_labels_are_exact_in_any_world(knobs, index, split):
    cfg = WorldConfig(**knobs)
    scene = make_scene(index, split, cfg)
    record, states, fps = scene.record, scene.record.states(), cfg.fps
    assert VideoRecord.from_json(record.to_json()) == record                      # a record like any other
    assert len(states) == record.num_frames() == (cfg.length or len(states))
    assert (states[-1] == 2).all() and len(states) <= 700                           # the last completion is seen
    assert len({s.name for s in record.steps}) == len(record.steps) <= cfg.max_steps
    assert [s.name for s in record.steps] == [f'put the {p} in box {b}' for p, b in zip(scene.parts, scene.boxes)]
    assert not {p for *_, p in scene.wrong} & set(scene.parts) and not {p.part for p in scene.lying} & set(scene.parts)
    passing = np.zeros(len(states), bool)
    for p in scene.passing: passing[frame_of(p.start, fps):frame_of(p.end, fps)] = True
    first_seen = set()
    for i, state in enumerate(states):
        t = i/fps
        held, steps = in_hand(scene, t), np.flatnonzero(state == IN_PROGRESS)
        assert [h.part for h in held] == [scene.parts[k] for k in steps] + [p for a, b, p in scene.wrong if a <= t < b]
        assert [h.box for h in held][:len(steps)] == [scene.boxes[k] for k in steps] and all(0 <= h.share < 1 for h in held)
        assert not (held and passing[i])
        for k, h in zip(steps, held):
            assert h.seen or k in first_seen                                        # what is taken was seen once
            first_seen.add(k)
    for turn in record.turns:                                                       # who speaks speaks of the state at that frame
        state = states[frame_of(turn.time, fps)]
        if turn.role == 'assistant' and 'Next, ' in turn.content: assert not (state == IN_PROGRESS).any()
        if turn.content.endswith('All steps are done.'): assert (state == 2).all()


def test_a_step_is_known_from_what_was_done_before():
    "A tracker that sees the part which is taken, and remembers, is never wrong where parts come back."
    returned = 0
    for index in range(30):
        scene, done = make_scene(index, cfg=WorldConfig(uses=3, palette=2, max_steps=12, overlap=.5)), set()
        for k in np.argsort([s.spans[0][0] for s in scene.record.steps]).tolist():
            assert k == min(j for j, part in enumerate(scene.parts) if part == scene.parts[k] and j not in done)
            returned += any(scene.parts[j] == scene.parts[k] for j in done)
            done.add(k)
        for i in range(scene.record.num_frames()):
            held = [h.part for h in in_hand(scene, i/2)]
            assert len(set(held)) == len(held)                                      # nobody holds one part twice
    assert returned > 30


@pytest.mark.parametrize('knobs', [
    dict(distractors=4), dict(passing=1.), dict(hidden=1.), dict(occlusion=.8), dict(part_size=5.), dict(image_size=32)])
def test_what_only_the_pictures_show_leaves_the_record_alone(knobs):
    for index in range(4):
        plain, other = make_scene(index, 'test'), make_scene(index, 'test', WorldConfig(**knobs))
        assert (said(plain), plain.wrong, plain.seed, plain.boxes) == (said(other), other.wrong, other.seed, other.boxes)
        every = range(plain.record.num_frames())
        assert plain.fingerprint() != other.fingerprint() and shown(plain, every) != shown(other, every)


def test_only_pauses_show_who_passes():
    plain, other = make_scene(3), make_scene(3, cfg=WorldConfig(passing=1.))
    differ = [i for i in range(plain.record.num_frames()) if (render_frame(plain, i) != render_frame(other, i)).any()]
    assert differ == [i for p in other.passing for i in range(frame_of(p.start, 2), frame_of(p.end, 2))] != []


def test_hidden_parts_cannot_be_told_apart():
    "After its first frame, a hidden part leaves no trace in the pictures."
    scene = make_scene(3, cfg=WorldConfig(hidden=1., mistakes=0., overlap=0.))
    swapped = replace(scene, parts=[Part('white', 'star')]*len(scene.parts))
    differ = {i for i in range(scene.record.num_frames()) if (render_frame(scene, i) != render_frame(swapped, i)).any()}
    assert differ == {frame_of(s.spans[0][0], 2) for s in scene.record.steps}


def test_no_composition_in_two_splits():
    for knobs in (dict(palette=4), EVERYTHING, dict(uses=3, palette=4, min_steps=6), dict(length=600, palette=4, max_steps=11)):
        drawn = lambda split: {frozenset(make_scene(i, split, WorldConfig(**knobs), seed).parts) for i in range(60) for seed in (0, 9)}  # noqa: B023
        seen = {split: drawn(split) for split in SPLITS}
        assert not seen['train'] & seen['validation'] and not seen['train'] & seen['test'] and not seen['validation'] & seen['test']


def test_a_long_video_is_drawn_frame_by_frame():
    scene = make_scene(0, 'test', WorldConfig(**HOUR, passing=1., distractors=2))
    assert scene.record.num_frames() == 7200 and max(map(len, scene.timeline[1])) <= 3 and len(scene.passing) > 100
    render_frame(scene, 0)
    tracemalloc.start()
    render_frame(scene, 7199)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20*scene.config.image_size**2*3                                    # bytes: a few frames, not thousands


def test_a_clock_is_worth_little_in_long_videos():
    def update_f1(knobs):
        records = [make_scene(i, 'test', WorldConfig(palette=4, max_idle=16, **knobs)).record for i in range(8)]
        return score_traces([baseline_trace('clock', r) for r in records], records)['update_f1']
    short, long = update_f1({}), update_f1(dict(length=600, min_steps=6, max_steps=11))
    assert long < .3 < short


def test_replay_has_distractors_too():
    spans = dict(boil=[(2., 9.), (14., 17.)], pour=[(8., 12.)], skip=[])
    record = VideoRecord(video_uid='tea', dataset='example', duration=60., steps=[Step(id=n, name=n, spans=s) for n, s in spans.items()])
    scene = replay(record, WorldConfig(distractors=2, passing=1., hidden=1.))
    assert (scene.record.states() == record.states()).all() and scene.lying and scene.passing
    assert all(p.start >= 17 or p.end <= 2 for p in scene.passing)                   # not between the first and the last time of a step
    assert not {p.part for p in scene.lying} & set(scene.parts)
    seen = {i: [h.seen for h in in_hand(scene, i/2)] for i in (4, 5, 16, 17)}
    assert seen == {4: [True], 5: [False], 16: [False, True], 17: [False, False]}
    many = record.model_copy(update={'steps': [Step(id=str(k), name=f'step {k}', spans=[(k, k + 2.)]) for k in range(56)]})
    assert not replay(many, WorldConfig(shapes=7, distractors=2)).lying               # every part is in use


# What is refused

@pytest.mark.parametrize('name', LIMITS)
def test_every_entry_has_limits(name):
    low, high = LIMITS[name]
    for value in (low - 1, high + 1, 'x', True, None, float('nan'), [1]):
        with pytest.raises(InputError, match=f'data.world.{name}='): WorldConfig(**{name: value})
    if type(getattr(WorldConfig, name)) is int:
        with pytest.raises(InputError, match='a whole number'): WorldConfig(**{name: float(low)})


def test_no_entry_is_without_limits():
    assert {f.name for f in fields(WorldConfig)} == {*LIMITS, 'identity'}


@pytest.mark.parametrize('knobs, why', [
    (dict(length=247), 'data.world.length=247'), (dict(max_idle=99_000), 'more than 100000'), (dict(min_carry=8), 'max_carry=7'),
    (dict(palette=1, min_steps=3), 'data.world.min_steps=3'),
    (dict(palette=2, uses=2, min_steps=11, max_steps=11), 'data.world.min_steps=11'),
    (dict(palette=1, shapes=1, min_steps=1), 'one is kept')])
def test_worlds_that_cannot_be(knobs, why):
    with pytest.raises(InputError, match=why): make_scene(0, cfg=WorldConfig(**knobs))


def test_just_long_enough():
    "The longest video that the entries allow has the shortest length that is not refused."
    knobs = dict(min_idle=5, max_idle=5, min_carry=4, max_carry=4, min_steps=3, max_steps=3, mistakes=1.)
    shortest = 5 + 5 + 1 + 3*(4 + 5 + 12)
    for index in range(20): assert make_scene(index, cfg=WorldConfig(length=shortest, **knobs)).record.num_frames() == shortest
    with pytest.raises(InputError): WorldConfig(length=shortest - 1, **knobs)


# The variants of conf/data

def check_long(scene): assert scene.record.num_frames() == 600

def check_hour(scene): assert scene.record.num_frames() == 7200 and len(set(scene.parts)) < len(scene.parts)

def check_hidden(scene): assert len(scene.hidden) == len(scene.parts) + len(scene.wrong)

def check_small(scene): assert scene.config.part_size < WorldConfig.part_size

def check_crowded(scene): assert len(scene.lying) == 2


@pytest.mark.parametrize('name, check', [('toy_long', check_long), ('toy_hour', check_hour), ('toy_hidden', check_hidden),
                                         ('toy_small', check_small), ('toy_crowded', check_crowded)])
def test_variants(name, check):
    toy, cfg = (compose_config([f'data={n}']).data for n in ('toy', name))
    assert cfg.name == name and set(cfg) == set(toy)
    for split in ('validation', 'test'):
        scenes = load_scenes(cfg, split)
        for i in range(min(len(scenes), 20)): check(scenes[i])
    for scenes in (load_scenes(cfg, 'train'), load_auxiliary_scenes(cfg)):
        assert max(scenes[i].record.num_frames() for i in range(40)) < 450           # training videos stay short


def test_the_default_is_the_demo():
    "What the published figures rest on is written out in toy.yaml; entries that it does not name are off."
    named = compose_config(['data=toy']).data.world
    rest = {f.name: f.default for f in fields(WorldConfig) if f.name not in named}
    assert rest == dict(length=0, uses=1, distractors=0, passing=0., hidden=0.)


def test_records_of_long_videos_are_read_back(tmp_path):
    scene = make_scene(0, 'test', WorldConfig(**HOUR))
    write_records([scene.record], tmp_path/'hour.jsonl')
    assert read_records(tmp_path/'hour.jsonl') == [scene.record]


def test_any_part_in_any_box():
    record = VideoRecord(video_uid='x', dataset='toy', duration=4., steps=[Step(id='S1', name='put', spans=[(0., 4.)])])
    shots = [render_frame(Scene(record, [Part(c, s)], [1], config=WorldConfig(jitter=0.)), 4).tobytes() for c in COLOURS for s in SHAPES]
    assert len(set(shots)) == len(shots)
