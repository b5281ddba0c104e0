"""Whatever is wrong with an annotation, the reader says so in one line with file, record and field, and raises nothing but RecordError."""
import copy, json

import pytest
from hypothesis import given, settings, strategies as st

from dst_smolvlm.config import InputError, run_cli
from dst_smolvlm.records import RecordError, read_records

NATIVE = {'video_uid': 'tea', 'dataset': 'kitchen', 'duration': 6.0, 'steps': [{'id': 'S1', 'name': 'boil the water', 'spans': [[0, 3]]}],
          'turns': [{'role': 'assistant', 'time': 0, 'content': 'First boil the water.'}]}
DST = {'video_uid': 'toy', 'dataset': 'assembly', 'fps': 2, 'end_frame_idx': 20, 'inferred_goal': 'Assemble a toy',
       'conversation': [{'role': 'system', 'content': 'Help.'},
                        {'role': 'DST_UPDATE', 'content': [{'id': 'S1', 'transition': 'start'}], 'time': 1.0},
                        {'role': 'assistant', 'content': 'Take the wheel.', 'time': 1.0}],
       'dst': [{'type': 'step', 'id': 'S1', 'name': 'attach the wheel', 'start_ts': 1.0, 'end_ts': 4.5}]}
LENGTH = {'duration': {'raw': '00:01:02.50', 'seconds': 62}}
HOLOASSIST = {'video_name': 'lamp', 'taskType': 'assemble lamp', 'videoMetadata': LENGTH, 'events': [
    {'label': 'Coarse grained action', 'start': 5.0, 'end': 9.0, 'attributes': {'Action sentence': 'The student takes the foot.'}},
    {'label': 'Conversation', 'start': 4.0, 'end': 5.0,
     'attributes': {'Conversation Purpose': 'instructor-start-conversation_other', 'Transcription': 'Take it.'}}]}
KINDS = {'a.jsonl': NATIVE, 'dst.json': DST, 'holoassist.json': HOLOASSIST}


def put(data, path, value):
    "A copy of `data` with `value` at `path`, or with the last key of the path gone where `value` is `...`."
    data = copy.deepcopy(data)
    *parents, last = path
    at = data
    for key in parents: at = at[key]
    if value is ...: del at[last]
    else: at[last] = value
    return data


def refused(folder, name, text):
    "The RecordError for a file of this text."
    (folder/name).write_text(text, encoding='utf-8')
    with pytest.raises(RecordError) as caught: read_records(folder/name)
    assert str(caught.value).startswith(str(folder/name)) and '\n' not in str(caught.value)
    return caught.value


@pytest.mark.parametrize('name', KINDS)
def test_good_ones_are_read(tmp_path, name):
    (tmp_path/name).write_text(json.dumps(KINDS[name]))
    [record] = read_records(tmp_path/name)
    assert len(record.steps) == len(record.turns) == 1


NAN = float('nan')
@pytest.mark.parametrize('name, path, value, field, why', [
    ('a.jsonl', ['steps'], [], 'steps', 'at least 1'),
    ('a.jsonl', ['steps'], ..., 'steps', 'missing'),
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
    ('dst.json', ['end_frame_idx'], ..., 'end_frame_idx', 'missing'),
    ('holoassist.json', ['events'], [], 'events', 'no steps'),
    ('holoassist.json', ['events', 0, 'end'], 4.9, 'events[0].end', 'ends before it starts'),
    ('holoassist.json', ['events', 0, 'start'], NAN, 'events[0].start', 'finite'),
    ('holoassist.json', ['events', 0, 'label'], 'Coarse', 'events[0].label', 'unknown label'),
    ('holoassist.json', ['events', 0, 'attributes', 'Action sentence'], ..., 'events[0].attributes.Action sentence', 'missing'),
    ('holoassist.json', ['events', 1, 'attributes', 'Transcription'], None, 'events[1].attributes.Transcription', 'string'),
    ('holoassist.json', ['videoMetadata', 'duration', 'raw'], '62.5', 'videoMetadata.duration.raw', 'pattern'),
])
def test_one_wrong_field(tmp_path, name, path, value, field, why):
    error = refused(tmp_path, name, json.dumps(put(KINDS[name], path, value)))
    assert error.field == field and why in error.why
    assert error.record == {'a.jsonl': 'line 1', 'dst.json': 'toy', 'holoassist.json': 'lamp'}[name]


def test_two_steps_with_one_id(tmp_path):
    assert 'two steps have the id S1' in str(refused(tmp_path, 'a.jsonl', json.dumps(NATIVE | {'steps': NATIVE['steps']*2})))


def test_broken_json_names_the_line(tmp_path):
    good = json.dumps(NATIVE)
    assert refused(tmp_path, 'a.jsonl', f'{good}\n\n{good[:50]}\n').record == 'line 3'
    assert 'not JSON' in refused(tmp_path, 'dst.json', json.dumps(DST)[:-9]).why
    assert 'not JSON' in refused(tmp_path, 'deep.json', '['*200_000).why
    assert 'no field' in refused(tmp_path, 'list.json', '[1, 2]').why
    assert 'no record' in refused(tmp_path, 'empty.jsonl', '\n').why
    assert 'dictionary' in refused(tmp_path, 'list.jsonl', '[]').why


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path/'picture.jsonl').write_bytes(b'\xff\xd8\xff\xe0')
    (tmp_path/'nothing').mkdir()
    (tmp_path/'folder.json').mkdir()
    whys = {'gone.jsonl': 'no such file', 'picture.jsonl': 'not a readable text file', 'nothing': 'without .json'}
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
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE | {'steps': []}))
    with pytest.raises(SystemExit) as stopped: run_cli(lambda argv: read_records(argv[0]))([str(tmp_path/'a.jsonl')])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == '' and err.count('\n') == 1 and err.startswith('error: ') and 'steps' in err


def places(data, path=()):
    "Every path into a JSON value."
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children: yield from ([*path, key], *places(value, (*path, key)))


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400) | st.just(...),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=4)

@settings(max_examples=600, deadline=None)
@given(st.data())
def test_anything_anywhere(tmp_path_factory, data):
    "Any value at any place gives a good record or an InputError; a good record has states and turns."
    name = data.draw(st.sampled_from(list(KINDS)))
    value = data.draw(anything)
    spoilt = put(KINDS[name], data.draw(st.sampled_from(list(places(KINDS[name])))), value)
    file = tmp_path_factory.getbasetemp()/name
    try: file.write_text(json.dumps(spoilt))
    except TypeError: return    # an ellipsis inside a list is no JSON
    try: [record] = read_records(file)
    except InputError as e: assert '\n' not in str(e)
    else:
        assert record.states(fps=1).shape == (record.num_frames(1), len(record.steps))
        record.turns_at(), record.to_json()
