"""Whatever is wrong with an annotation, the reader says so in one line with file, record and field, and raises nothing but RecordError."""
import json

import pytest
from seeds import DST, HOLOASSIST, NATIVE, OBJECTS
from test_fuzz_records import put

from dst_smolvlm.config import run_cli
from dst_smolvlm.records import RecordError, read_records

KINDS = {'a.jsonl': NATIVE, 'dst.json': DST, 'holoassist.json': HOLOASSIST}


def refused(folder, name, text):
    "The RecordError for a file of this text."
    (folder/name).write_text(text, encoding='utf-8')
    with pytest.raises(RecordError) as caught: read_records(folder/name)
    assert str(caught.value).startswith(str(folder/name)) and '\n' not in str(caught.value)
    return caught.value


NAN = float('nan')
@pytest.mark.parametrize('name, path, value, field, why', [
    ('a.jsonl', ['steps'], None, 'steps', 'list'),
    ('a.jsonl', ['duration'], ..., 'duration', 'missing'),
    ('a.jsonl', ['steps', 0, 'spans', 0, 0], 1e10, 'steps[0].spans[0][0]', 'less than or equal'),
    ('a.jsonl', ['step'], [], 'step', 'unknown field'),
    ('a.jsonl', ['steps', 0, 'colour'], 'red', 'steps[0].colour', 'unknown field'),
    ('a.jsonl', ['steps', 0, 'spans', 0], [3, 1], 'steps[0].spans[0]', 'ends before it starts'),
    ('a.jsonl', ['steps', 0, 'spans', 0], [1], 'steps[0].spans[0][1]', 'missing'),
    ('a.jsonl', ['steps', 0, 'spans', 0, 1], NAN, 'steps[0].spans[0][1]', 'finite'),
    ('a.jsonl', ['steps', 0, 'name'], '', 'steps[0].name', 'at least 1 character'),
    ('a.jsonl', ['turns', 0, 'time'], '0:00:01', 'turns[0].time', 'number'),
    ('a.jsonl', ['turns', 0, 'time'], float('inf'), 'turns[0].time', 'finite'),
    ('a.jsonl', ['turns', 0, 'role'], 'DST_UPDATE', 'turns[0].role', "'user', 'assistant' or 'system'"),
    ('a.jsonl', ['duration'], 0, 'duration', 'greater than 0'),
    ('a.jsonl', ['duration'], 6_000_000, 'duration', 'less than or equal'),
    ('a.jsonl', ['fps'], -2, 'fps', 'greater than 0'),
    ('a.jsonl', ['video_uid'], 7, 'video_uid', 'string'),
    ('dst.json', ['dst'], [], 'dst', 'at least 1'),
    ('dst.json', ['dst', 0, 'end_ts'], 0.5, 'dst[0].end_ts', 'ends before it starts'),
    ('dst.json', ['dst', 0, 'start_ts'], NAN, 'dst[0].start_ts', 'finite'),
    ('dst.json', ['conversation', 2, 'time'], ..., 'conversation[2].time', 'missing'),
    ('dst.json', ['conversation', 2, 'role'], 'robot', 'conversation[2].role', "'user', 'assistant'"),
    ('dst.json', ['end_frame_idx'], 0, 'end_frame_idx', 'greater than 0'),
    ('holoassist.json', ['events'], [], 'events', 'no steps'),
    ('holoassist.json', ['events', 0, 'end'], 4.9, 'events[0].end', 'ends before it starts'),
    ('holoassist.json', ['events', 0, 'start'], NAN, 'events[0].start', 'finite'),
    ('holoassist.json', ['events', 1, 'start'], 1e10, 'events[1].start', 'less than or equal'),
    ('holoassist.json', ['events', 0, 'label'], 'Coarse', 'events[0].label', 'unknown label'),
    ('holoassist.json', ['events', 0, 'attributes', 'Action sentence'], ..., 'events[0].attributes.Action sentence', 'missing'),
    ('holoassist.json', ['events', 1, 'attributes', 'Transcription'], None, 'events[1].attributes.Transcription', 'string'),
    ('holoassist.json', ['videoMetadata', 'duration', 'raw'], '62.5', 'videoMetadata.duration.raw', 'must be a time such as 0:01:02.5'),
    ('tree.json', ['dst', 'steps', 0, 'timestamps', 'end_ts'], .5, 'dst.steps[0].timestamps.end_ts', 'ends before it starts'),
    ('tree.json', ['dst', 'steps', 0, 'timestamps'], ..., 'dst.steps[0].timestamps.start_ts', 'missing'),
    ('tree.json', ['dst', 'steps', 1, 'substeps', 0, 'sub_id'], 7, 'dst.steps[1].substeps[0].sub_id', 'string'),
    ('generated.json', ['conversations', 0, 'conversation', 0, 'time'], None, 'conversations[0].conversation[0].time', 'number'),
    ('prepared.jsonl', ['conversation', 3, 'end'], 14, 'conversation[3].end', 'ends before it starts'),
    ('prepared.jsonl', ['end_frame_idx'], ..., 'end_frame_idx', 'missing'),
    ('cooking.json', ['9_2', 'steps', 0, 'end_time'], -3., 'steps[0].end_time', 'ends before it starts'),
    ('goalstep.json', ['videos', 0, 'segments', 1, 'step_category'], '', 'segments[1].step_category', 'at least 1 character'),
    ('coin.json', ['database', 'LtRSn', 'annotation', 0, 'segment', 1], 'soon', 'annotation[0].segment[1]', 'float'),
    ('egoexo.json', [1, 'duration'], 61., '[1].duration', 'another length'),
])
def test_one_wrong_field(tmp_path, name, path, value, field, why):
    error = refused(tmp_path, name, json.dumps(put(OBJECTS[name], path, value)))
    assert error.field == field and why in error.why
    named = {'dst.json': 'toy', 'holoassist.json': 'lamp', 'tree.json': 'car', 'generated.json': 'bus', 'cooking.json': '9_2',
             'goalstep.json': 'grp-1', 'coin.json': 'LtRSn', 'egoexo.json': 'egoexo'}
    assert error.record == named.get(name, 'line 1')


def test_two_steps_with_one_id(tmp_path):
    assert 'two steps have the id S1' in str(refused(tmp_path, 'a.jsonl', json.dumps(NATIVE | {'steps': NATIVE['steps']*2})))


def test_broken_json_names_the_line(tmp_path):
    good = json.dumps(NATIVE)
    assert refused(tmp_path, 'a.jsonl', f'{good}\n\n{good[:50]}\n').record == 'line 3'
    assert 'not JSON' in refused(tmp_path, 'dst.json', json.dumps(DST)[:-9]).why
    assert 'not JSON' in refused(tmp_path, 'deep.json', '['*200_000).why
    assert 'known format' in refused(tmp_path, 'list.json', '[1, 2]').why
    assert 'surrogates' in refused(tmp_path, 'half.json', '{"stir \\ud800": {"timestamps": [1]}}').why
    assert 'occurs twice' in refused(tmp_path, 'twice.json', '{"stir": {"timestamps": [1]}, "stir": {"timestamps": [2]}}').why
    assert 'no record' in refused(tmp_path, 'empty.jsonl', '\n').why
    assert 'dictionary' in refused(tmp_path, 'list.jsonl', '[]').why


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path/'picture.jsonl').write_bytes(b'\xff\xd8\xff\xe0')
    (tmp_path/'nothing').mkdir()
    (tmp_path/'folder.json').mkdir()
    whys = {'gone.jsonl': 'no such file', 'picture.jsonl': 'not a readable text', 'nothing': 'holds no annotation'}
    for name, why in whys.items():
        with pytest.raises(RecordError, match=why): read_records(tmp_path/name)


def test_one_bad_file_in_a_folder_is_named(tmp_path):
    for name, data in KINDS.items(): (tmp_path/name).write_text(json.dumps(data))
    assert [r.video_uid for r in read_records(tmp_path)] == ['tea', 'toy', 'lamp']
    bad = tmp_path/'b.json'
    bad.write_text(json.dumps(put(HOLOASSIST, ['events', 0, 'start'], None)))
    with pytest.raises(RecordError, match='events.0..start') as caught: read_records(tmp_path)
    assert caught.value.file == str(bad)


def test_a_command_says_it_in_one_line(tmp_path, capsys):
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE | {'steps': [], 'turns': []}))
    with pytest.raises(SystemExit) as stopped: run_cli(lambda argv: read_records(argv[0]))([str(tmp_path/'a.jsonl')])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == '' and err.count('\n') == 1 and err.startswith('error: ') and 'steps' in err
