"The command `python -m dst_smolvlm.records` on real files and on what is wrong with them."
import json, os, subprocess, sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from seeds import COARSE, NATIVE, PREPARED

from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.ingest import read_entries
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.data.schema import RecordError
from dst_smolvlm.records import main

REAL = Path(os.environ.get('DST_REAL', Path(__file__).resolve().parents[2]/'shared'/'real'))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f'skipped: no real annotations at {REAL}')


def command(*argv) -> int:
    "The exit status of the command."
    try: main([str(a) for a in argv])
    except SystemExit as e: return e.code
    return 0


def problems(report: Path) -> list[dict]: return json.loads(report.read_text())['problems']


@needs_real
def test_every_real_file_is_read():
    "Each gives records without an error, or is known to belong to some; the one text of statistics is no annotation."
    formats, not_read = Counter(), []
    files = [p for p in sorted(REAL.rglob('*')) if p.is_file() and p.suffix in ('.json', '.jsonl', '.csv', '.tsv', '.txt', '.zip')]
    assert len(files) > 200
    for path in files:
        entries = list(read_entries(path))
        errors = [str(p) for e in entries for p in e.problems if not p.warning]
        if errors: not_read.append((path.name, errors))
        formats.update(e.format for e in entries if e.record)
        for e in entries:
            if e.record: assert e.record.steps or e.record.turns
    assert [name for name, _ in not_read] == ['proassist_published_statistics.txt']
    assert formats == {'HoloAssist': 1442, 'CaptainCook4D': 280, 'EgoExoLearn': 60, 'Ego4D Goal-Step': 56, 'printed timeline': 17,
                       'prepared conversations': 4, 'DST': 1}


@needs_real
def test_the_levels_of_real_trees():
    step, inner = (list(read_entries(REAL/'ego4d_goalstep', level=level)) for level in ('step', 'substep'))
    assert sum(bool(e.record) for e in step) == 56
    raw = [v['segments'] for v in json.loads(next((REAL/'ego4d_goalstep').glob('*.json')).read_text())['videos']]
    lost = [sum(not s['segments'] for s in segments) for segments in raw]
    told = [int(p.why.split()[0]) for e in inner for p in e.problems if p.kind == 'no such level']
    assert sum(bool(e.record) for e in inner) == sum(n < len(s) for n, s in zip(lost, raw))
    assert told == [n for n, segments in zip(lost, raw) if 0 < n < len(segments)] and sum(told) > 500
    timeline = REAL/'proassist_format'/'holoassist_R0027-12-GoPro_timeline.txt'
    assert len(read_records(timeline, level='substep')[0].steps) > len(read_records(timeline)[0].steps)


@needs_real
def test_every_real_mismatch_is_reported(tmp_path, capsys):
    "The published cases of clips that end after their video, each replayed as a record of that clip."
    counts = REAL/'proassist_format'/'frame_count_mismatches.json'
    cases = json.loads(counts.read_text())
    clips = [PREPARED | {'video_uid': c['video_uid'], 'end_frame_idx': c['sparse_frame'], 'metadata': {'user_id': str(i)}}
             for i, c in enumerate(cases)]
    (tmp_path/'clips.jsonl').write_text('\n'.join(map(json.dumps, clips)))
    found = {}
    for policy in ('strict', 'skip', 'clip'):
        status = command('check', tmp_path/'clips.jsonl', '--lengths', counts, '--policy', policy, '--report', tmp_path/'report.json')
        past = [p for p in problems(tmp_path/'report.json') if p['kind'] == 'past the video']
        assert [p['record'] for p in past] == [f'line {i + 1}' for i in range(len(cases))] and {p['field'] for p in past} == {'duration'}
        assert [float(p['value']) for p in past] == [c['sparse_frame']/2 for c in cases]
        found[policy] = status, {p['severity'] for p in past}
    assert found == {'strict': (1, {'error'}), 'skip': (1, {'error'}), 'clip': (0, {'warning'})}
    assert command('convert', tmp_path/'clips.jsonl', '--lengths', counts, '--policy', 'clip', '--out', tmp_path/'out.jsonl') == 0
    assert [r.duration for r in read_records(tmp_path/'out.jsonl')] == [c['arrow_frames']/2 for c in cases]
    clean = [clip | {'end_frame_idx': c['arrow_frames']} for clip, c in zip(clips, cases)]
    (tmp_path/'clips.jsonl').write_text('\n'.join(map(json.dumps, clean)))
    assert command('check', tmp_path/'clips.jsonl', '--lengths', counts) == 0     # as long as their videos: nothing to report


def test_the_length_of_a_video_file_counts(tmp_path, capsys):
    write_video(tmp_path/'tea.mp4', np.zeros((8, 48, 64, 3), np.uint8), fps=2)     # 4 s; the record has 6
    records = [NATIVE | {'video': 'tea.mp4'}, NATIVE | {'video': 'gone.mp4', 'video_uid': 'b'}]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    assert command('check', tmp_path/'a.jsonl', '--report', tmp_path/'r.json') == 1
    assert [(p['kind'], p['field'], p['severity']) for p in problems(tmp_path/'r.json')] == [
        ('past the video', 'duration', 'error'), ('no video', 'video', 'warning')]
    assert command('convert', tmp_path/'a.jsonl', '--out', tmp_path/'b.jsonl') == 1 and not (tmp_path/'b.jsonl').exists()
    assert command('convert', tmp_path/'a.jsonl', '--out', tmp_path/'b.jsonl', '--policy', 'skip') == 0
    assert [r.video_uid for r in read_records(tmp_path/'b.jsonl')] == ['b']
    assert command('convert', tmp_path/'a.jsonl', '--policy', 'clip', '--out', tmp_path/'b.jsonl') == 0
    assert [r.duration for r in read_records(tmp_path/'b.jsonl')] == [4., 6.]
    (tmp_path/'tea.tsv').write_text('type\tid\tstart_ts\tend_ts\tname\nstep\tS1\t0\t3\tboil\n')
    assert command('convert', tmp_path/'tea.tsv', '--videos', tmp_path, '--out', tmp_path/'c.jsonl') == 0
    assert read_records(tmp_path/'c.jsonl')[0].duration == 4.                      # a table does not say it; the video does
    (tmp_path/'lengths.json').write_text('{"tea": 5}')
    both = '--videos', tmp_path, '--lengths', tmp_path/'lengths.json'
    assert command('convert', tmp_path/'tea.tsv', *both, '--out', tmp_path/'c.jsonl') == 0
    assert read_records(tmp_path/'c.jsonl')[0].duration == 5.                      # what the user says wins


def test_words_and_steps_are_joined(tmp_path, capsys):
    uid = 'assembly_nusar-2021_action_both_9011__HMC_2111'
    (tmp_path/'words.jsonl').write_text('\n'.join(json.dumps(PREPARED | {'video_uid': u}) for u in (uid, 'other')))
    (tmp_path/f"{uid.split('__')[0]}.txt").write_text(COARSE)
    (tmp_path/'others.txt').write_text(COARSE)
    steps = tmp_path/f"{uid.split('__')[0]}.txt"
    assert command('check', tmp_path/'words.jsonl') == 0 and 'join THIS --steps ANNOTATION' in capsys.readouterr().out
    join = 'join', tmp_path/'words.jsonl', '--steps', steps, '--out', tmp_path/'out.jsonl'
    assert command(*join) == 1 and not (tmp_path/'out.jsonl').exists()
    assert f"{tmp_path/'words.jsonl'}: other.talk_some_1: no steps for this video" in capsys.readouterr().out
    assert command(*join, '--policy', 'skip') == 0
    [record] = read_records(tmp_path/'out.jsonl')
    assert (record.video_uid, len(record.steps), len(record.turns)) == (uid, 2, 1)
    assert command('check', tmp_path/'out.jsonl') == 0
    others = '--steps', tmp_path/'others.txt', '--out', tmp_path/'none.jsonl', '--policy', 'skip'
    assert command('join', tmp_path/'words.jsonl', *others) == 1
    assert not (tmp_path/'none.jsonl').exists() and 'no record' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['{', '[]', '{"tea": "long"}', '{"tea": -1}', '{"tea": 1e9}', '['*100_000,
                                  '[{"video_uid": "a", "arrow_frames": 1' + '0'*400 + '}]'])
def test_wrong_lengths(tmp_path, capsys, text):
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE))
    (tmp_path/'lengths.json').write_text(text)
    assert command('check', tmp_path/'a.jsonl', '--lengths', tmp_path/'lengths.json') == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'lengths.json' in err
    assert command('check', tmp_path/'a.jsonl', '--lengths', tmp_path/'gone.json') == 2


def test_an_interrupted_check_leaves_no_report(tmp_path, monkeypatch):
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE))
    def stopped(*args, **kwargs): yield from read_entries(*args, **kwargs); raise KeyboardInterrupt
    monkeypatch.setattr('dst_smolvlm.records.read_entries', stopped)
    assert command('check', tmp_path/'a.jsonl', '--report', tmp_path/'report.json') == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.jsonl']


def test_outputs_in_the_folder_that_is_read(tmp_path, capsys):
    "The path of a video is right from wherever the records lie; a second run does not take records for results, or results for records."
    (tmp_path/'in').mkdir()
    write_video(tmp_path/'in'/'tea.mp4', np.zeros((13, 48, 64, 3), np.uint8), fps=2)
    (tmp_path/'in'/'a.jsonl').write_text(json.dumps(NATIVE | {'video': 'tea.mp4'}))
    convert = 'convert', tmp_path/'in', '--out', tmp_path/'in'/'sub'/'all.jsonl', '--report', tmp_path/'in'/'report.json'
    for _ in range(2):
        assert command(*convert) == 0
        assert [r.video for r in read_records(tmp_path/'in'/'sub')] == ['../tea.mp4']
        assert command('check', tmp_path/'in'/'sub', '--report', tmp_path/'r.json') == 0 and problems(tmp_path/'r.json') == []
        assert command(*convert) == 2 and 'remove it first' in capsys.readouterr().err       # as if it were an annotation of the user's
        (tmp_path/'in'/'sub'/'all.jsonl').unlink()
    assert command('convert', tmp_path/'in'/'a.jsonl', '--out', tmp_path/'x', '--report', tmp_path/'x') == 2
    assert command('convert', tmp_path/'in'/'a.jsonl', '--out', tmp_path) == 2 and 'holds PATHS' in capsys.readouterr().err


def joined(tmp_path, words, steps) -> tuple[int, dict]:
    "The exit status of a join of words in a folder with steps in another one, and what came of them by their names."
    for name, items in (('words', words), ('steps', steps)):
        (tmp_path/name).mkdir(exist_ok=True)
        (tmp_path/name/'a.jsonl').write_text('\n'.join(map(json.dumps, items)))
    out = tmp_path/'out.jsonl'
    status = command('join', tmp_path/'words', '--steps', tmp_path/'steps', '--out', out, '--report', tmp_path/'r.json')
    return status, {r.uid: r for r in read_records(out)} if status == 0 else {}


def test_a_dialogue_gets_the_steps_of_its_own(tmp_path):
    words = [NATIVE | dict(dialogue=d, steps=[]) for d in ('d1', 'd2')]
    boil, pour = ([dict(id='S1', name=name, spans=[[1., 2.]])] for name in ('boil', 'pour'))
    own = [NATIVE | dict(dialogue='d1', steps=boil, turns=[]), NATIVE | dict(dialogue='d2', steps=pour, turns=[])]
    status, records = joined(tmp_path, words, own)
    assert status == 0 and {uid: r.steps[0].name for uid, r in records.items()} == {'tea.d1': 'boil', 'tea.d2': 'pour'}
    assert joined(tmp_path, [NATIVE | dict(dialogue='d3', steps=[])], own)[0] == 1
    [problem] = [p for p in problems(tmp_path/'r.json') if p['severity'] == 'error']
    assert (problem['record'], problem['why']) == ('tea.d3', 'steps for tea.d1 and tea.d2')
    assert len(joined(tmp_path, words, [NATIVE | dict(steps=boil, turns=[])])[1]) == 2 # those of no dialogue are of all


def test_what_else_a_join_takes_over(tmp_path):
    "A video only from the same view: with another name, or of another camera, it may be another one."
    (tmp_path/'steps').mkdir()
    write_video(tmp_path/'steps'/'tea.mp4', np.zeros((13, 48, 64, 3), np.uint8), fps=2)
    timed = NATIVE | dict(knowledge='Boil it.', video='tea.mp4', turns=[])
    words = [NATIVE | dict(steps=[]), NATIVE | dict(steps=[], view='left'), NATIVE | dict(steps=[], video_uid='tea-2', knowledge='Mine.')]
    status, records = joined(tmp_path, words, [timed])
    assert status == 0 and {uid: (r.knowledge, r.video) for uid, r in records.items()} == {
        'tea': ('Boil it.', 'steps/tea.mp4'), 'tea.left': ('Boil it.', None), 'tea-2': ('Mine.', None)}
    assert [(p['record'], p['why']) for p in problems(tmp_path/'r.json') if p['kind'] == 'joined by its beginning'] == [
        ('tea-2', 'takes the steps of tea, with which its name begins')]


def test_clipping_in_a_join_is_reported(tmp_path, capsys):
    (tmp_path/'words.jsonl').write_text(json.dumps(PREPARED))
    (tmp_path/'truck.tsv').write_text('type\tid\tstart_ts\tend_ts\tname\nstep\tS1\t0\t90\tboil\n')
    (tmp_path/'lengths.json').write_text('{"truck": 12}')
    files = 'words.jsonl', '--steps', 'truck.tsv', '--lengths', 'lengths.json', '--out', 'out.jsonl'
    args = 'join', *(a if a.startswith('--') else tmp_path/a for a in files)
    assert command(*args) == 1
    assert command(*args, '--policy', 'clip', '--report', tmp_path/'r.json') == 0
    assert {(p['kind'], p['severity']) for p in problems(tmp_path/'r.json')} == {('past the video', 'warning')}
    [record] = read_records(tmp_path/'out.jsonl')
    assert record.duration == 12. and record.steps[0].spans == [(0., 12.5)]
    assert command('check', tmp_path/'words.jsonl', '--lengths', tmp_path/'lengths.json') == 0
    (tmp_path/'lengths.json').write_text('{"car": 12}')
    assert command('check', tmp_path/'words.jsonl', '--lengths', tmp_path/'lengths.json') == 0
    assert 'none of the 1 lengths' in capsys.readouterr().out


def test_two_shapes_of_one_recording(tmp_path):
    "The same once more is left out with a warning; the same name with other content is an error."
    from seeds import COOKING, COOKING_STEPS
    (tmp_path/'a.json').write_text(json.dumps(COOKING))
    (tmp_path/'b.json').write_text(json.dumps([{'recording_id': '9_2', 'is_error': False, 'step_annotations': COOKING_STEPS}]))
    assert len(read_records(tmp_path)) == 1
    (tmp_path/'b.json').write_text(json.dumps([{'recording_id': '9_2', 'is_error': False, 'step_annotations': COOKING_STEPS[:1]}]))
    with pytest.raises(RecordError, match='the same name as in'): read_records(tmp_path)


def test_a_mixed_file_is_one_file(tmp_path, capsys):
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, (NATIVE, PREPARED, NATIVE | {'video_uid': 'b'}))))
    assert command('check', tmp_path/'a.jsonl') == 0
    rows = {line[:24].strip(): line.split()[-6:] for line in capsys.readouterr().out.split('\n') if line[:1].isalpha()}
    assert rows['native'][:2] == ['1', '2'] and rows['prepared conversations'][:2] == ['1', '1'] and rows['all'][:2] == ['1', '3']


@pytest.mark.parametrize('module', ('records', 'data.loading', 'core.parallel'))
def test_annotations_are_read_without_the_heavy_libraries(module):
    "A command that looks at a file of annotations answers at once: what computes or draws takes seconds to import."
    code = f'import sys, dst_smolvlm.{module}; print(*sys.modules)'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert {'torch', 'transformers', 'matplotlib', 'accelerate'}.isdisjoint(said.split())
