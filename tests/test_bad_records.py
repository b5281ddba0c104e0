"""Whatever is wrong with an annotation, the reader says so in one line with file, record and field, and raises nothing but RecordError."""
import json, os, zipfile

import pytest
from seeds import COARSE, COOKING, DST, EPIC, GOALSTEP, HOLOASSIST, NATIVE, OBJECTS, TABLE, seed_text
from test_fuzz_records import put

from dst_smolvlm.core.config import run_cli
from dst_smolvlm.data.ingest import read_entries
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.data.schema import RecordError

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
    ('dst.json', ['dst', 0, 'end_ts'], 0.5, 'dst[0].end_ts', 'ends before it starts'),
    ('dst.json', ['dst', 0, 'start_ts'], NAN, 'dst[0].start_ts', 'finite'),
    ('dst.json', ['conversation', 2, 'time'], ..., 'conversation[2].time', 'missing'),
    ('dst.json', ['conversation', 2, 'role'], 'robot', 'conversation[2].role', "'user', 'assistant'"),
    ('holoassist.json', ['events'], [], '', 'neither steps nor turns'),
    ('holoassist.json', ['events', 0, 'end'], 4.9, 'events[0].end', 'ends before it starts'),
    ('holoassist.json', ['events', 0, 'start'], NAN, 'events[0].start', 'finite'),
    ('holoassist.json', ['events', 1, 'start'], 1e10, 'events[1].start', 'less than or equal'),
    ('holoassist.json', ['events', 0, 'attributes', 'Action sentence'], ..., 'events[0].attributes.Action sentence', 'missing'),
    ('tree.json', ['dst', 'steps', 0, 'timestamps', 'end_ts'], .5, 'dst.steps[0].timestamps.end_ts', 'ends before it starts'),
    ('tree.json', ['dst', 'steps', 0, 'timestamps'], ..., 'dst.steps[0].timestamps.start_ts', 'missing'),
    ('tree.json', ['dst', 'steps', 1, 'substeps', 0, 'sub_id'], 7.5, 'dst.steps[1].substeps[0].sub_id', 'string'),
    ('generated.json', ['conversations', 0, 'conversation', 0, 'time'], None, 'conversations[0].conversation[0].time', 'number'),
    ('prepared.jsonl', ['conversation', 3, 'end'], 14, 'conversation[3].end', 'ends before it starts'),
    ('cooking.json', ['9_2', 'steps', 0, 'end_time'], -3., 'steps[0].end_time', 'ends before it starts'),
    ('egoexo.json', [1, 'start'], '1,234', '[1].start', 'decimal comma or one of thousands'),
    ('goalstep.json', ['videos', 0, 'segments', 1, 'step_category'], '', 'segments[1].step_category', 'at least 1 character'),
    ('coin.json', ['database', 'LtRSn', 'annotation', 0, 'segment', 1], 'soon', 'annotation[0].segment[1]', 'number'),
    ('coin.json', ['database', 'LtRSn', 'annotation', 0, 'segment', 1], 50., 'annotation[0].segment', 'ends before it starts'),
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
    assert 'must end in .jsonl' in refused(tmp_path, 'lines.json', f'{good}\n{good}').why
    assert 'whole record' in refused(tmp_path, 'pretty.jsonl', json.dumps(NATIVE, indent=1)).why
    assert 'surrogates' in refused(tmp_path, 'half.json', '{"stir \\ud800": {"timestamps": [1]}}').why
    assert 'occurs twice' in refused(tmp_path, 'twice.json', '{"stir": {"timestamps": [1]}, "stir": {"timestamps": [2]}}').why
    assert 'no record' in refused(tmp_path, 'empty.jsonl', '\n').why
    assert 'dictionary' in refused(tmp_path, 'list.jsonl', '[]').why


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path/'picture.jsonl').write_bytes(b'\xff\xd8\xff\xe0')
    (tmp_path/'nothing').mkdir()
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


@pytest.mark.parametrize('name, text', [('a.jsonl', ''), ('a.json', '{"videos": []}'), ('a.json', '{"database": {}}'), ('a.json', '[]'),
                                        ('a.json', '{"video_uid": "a", "conversations": []}'), ('a.csv', EPIC.split('\n')[0])])
def test_a_file_without_records(tmp_path, name, text):
    assert refused(tmp_path, name, text).kind in ('no records', 'unknown format', 'missing field', 'wrong value')


@pytest.mark.parametrize('name, before, after, line, why', [
    ('epic.csv', 'open door,open', '"open door,open', 'line 2', 'not a row of a table'),
    ('epic.csv', 'open door,open', 'take knife, and plate,open', 'line 2', '11 fields, the header has 10'),
    ('epic.csv', '00:00:03.37', '00:00:00.00', 'line 2.stop_timestamp', 'ends before it starts'),
    ('epic.csv', ',open door,open', '', 'line 2', '8 fields, the header has 10'),
    ('epic.csv', 'open door', '', 'line 2.narration', 'at least 1'),
    ('fine.csv', ',clap hand', '', 'line 2', '5 fields, the header has 6'),
    ('fine.csv', '84,111', '84,83', 'line 2.end_frame', 'ends before it starts'),
    ('table.tsv', '53.6', 'soon', 'line 2.end_ts', 'number'),
    ('coarse.txt', '\tattempt to screw chassis', '', 'line 1', '2 fields, 3 are needed'),
    ('coarse.txt', '000007554\tattempt', '6000\tattempt', 'line 1', 'ends before it starts'),
    ('printed.txt', '66.2s', '6.2s', 'line 2', 'ends before it starts'),
])
def test_one_wrong_line(tmp_path, name, before, after, line, why):
    text = seed_text(name)
    assert before in text
    error = refused(tmp_path, name, text.replace(before, after, 1))
    assert error.field == line and why in error.why


def test_a_bad_row_spoils_only_its_video(tmp_path):
    (tmp_path/'epic.csv').write_text(EPIC.replace('open door,open', '"open door,open'))
    assert [bool(e.record) for e in read_entries(tmp_path/'epic.csv')] == [False, True]


def test_a_bad_length_is_not_used(tmp_path):
    "A recording of which a companion says no length ends with its last annotation, and the companion's line is named."
    lengths = 'recording_id,environment_id,person_id,duration(min),duration(sec)\n9_2,5,3,0.67,40.2\n9_3,5,3,0.67,n/a\n'
    (tmp_path/'annotation_json').mkdir()
    (tmp_path/'metadata').mkdir()
    (tmp_path/'metadata'/'video_information.csv').write_text(lengths)
    for name in ('cooking.json', 'errors.json'): (tmp_path/'annotation_json'/name).write_text(seed_text(name))
    good, bad = read_entries(tmp_path/'annotation_json')
    assert (good.record.duration, bad.record.duration) == (40.2, 12.5)
    assert "metadata/video_information.csv line 3: duration(sec) = 'n/a'" in str(bad.problems[0]) and bad.problems[0].warning


def test_one_odd_video_path_spoils_nothing_else(tmp_path):
    lines = [NATIVE | {'video_uid': str(i), 'video': video} for i, video in enumerate(('a.mp4', 'x'*300, 'a\x00b.mp4'))]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    entries = list(read_entries(tmp_path/'a.jsonl', look=True))
    assert [(bool(e.record), [p.kind for p in e.problems]) for e in entries] == [(True, ['no video'])]*3


def test_what_several_formats_may_look_like(tmp_path):
    "Nulls, a byte order mark, Windows' line ends, capitals, a list instead of one object."
    texts = {'bom.jsonl': '\ufeff' + json.dumps(NATIVE) + '\r\n', 'null.json': json.dumps(DST | {'inferred_goal': None, 'clip_idx': None}),
             'list.json': json.dumps([HOLOASSIST]), 'caps.tsv': TABLE.upper().replace('\n', '\r\n'), 'blank.txt': '\n' + COARSE,
             'quoted.tsv': TABLE.replace('Attach interior and', '"Bus" and'), 'semi.json': json.dumps(GOALSTEP).replace('[]', 'null')}
    for name, text in texts.items():
        (tmp_path/name).write_text(text, newline='')
        [record] = read_records(tmp_path/name)
        assert record.steps, name


def test_turns_that_no_frame_hears_are_reported(tmp_path):
    turns = [{'role': 'user', 'time': t, 'content': 'Hm?'} for t in (-50., 0., 6.3)]
    (tmp_path/'a.jsonl').write_text(json.dumps(NATIVE | {'turns': turns, 'duration': 6.2}))
    [entry] = read_entries(tmp_path/'a.jsonl')
    assert [(p.field, p.warning) for p in entry.problems] == [('turns[0].time', True), ('turns[2].time', True)] and entry.record


def test_a_level_that_a_format_lacks(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(COOKING))
    [entry] = read_entries(tmp_path/'a.json', level='action')
    assert entry.record is None and 'CaptainCook4D has no level action' in str(entry.problems[0])


def test_pipes_and_huge_files_are_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path/'pipe.json')
    with pytest.raises(RecordError, match='not a file'): read_records(tmp_path/'pipe.json')
    monkeypatch.setattr('dst_smolvlm.data.files.LARGEST_FILE', 1000)
    with zipfile.ZipFile(tmp_path/'bomb.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.json', ' '*1_000_000)
    with pytest.raises(RecordError, match='larger than'): read_records(tmp_path/'bomb.zip')
