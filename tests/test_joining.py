"""Which steps a dialogue takes when several records tell of its video, and which lists of lengths are refused."""
import pytest

from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.loading import find_steps, join_records, read_lengths
from dst_smolvlm.data.schema import RecordError, Step, Turn, VideoRecord

EARLY, LATE = ([Step(id='S1', name='boil the water', spans=[span])] for span in ((0., 3.), (9., 12.)))
TALK = VideoRecord(video_uid='assembly_9011', dataset='assembly101', duration=40., dialogue='no_talk_0',
                   turns=[Turn(role='assistant', time=0., content='First boil the water.')])
TIMED = VideoRecord(video_uid='assembly_9011', dataset='assembly101', duration=42., steps=EARLY)


def changed(record, **fields): return record.model_copy(update=fields)

def join(talk, *records):
    by_uid = {uid: [r for r in records if r.view_uid == uid] for uid in dict.fromkeys(r.view_uid for r in records)}
    return join_records(talk, find_steps(talk, by_uid))


LEFT, RIGHT = (changed(TIMED, view=view) for view in ('left', 'right'))


def test_a_view_takes_its_own_steps_else_those_of_the_recording():
    seen_from_right = changed(TALK, view='right')
    assert join(seen_from_right, LEFT, changed(RIGHT, steps=LATE)).steps == LATE
    assert join(seen_from_right, TIMED).steps == EARLY


def test_without_a_view_all_views_must_agree():
    assert join(TALK, LEFT, RIGHT).steps == EARLY
    with pytest.raises(RecordError, match='steps for assembly_9011.left and assembly_9011.right'):
        join(TALK, LEFT, changed(RIGHT, steps=LATE))


@pytest.mark.parametrize('name, there, steps', [
    ('two', [('one', EARLY), ('two', LATE)], LATE),
    ('three', [('one', EARLY), ('two', LATE), ('', LATE)], LATE),
    ('three', [('one', EARLY)], EARLY)])
def test_a_dialogue_takes_its_own_else_those_of_no_dialogue_else_what_all_agree_on(name, there, steps):
    records = [changed(RIGHT, dialogue=dialogue, steps=these) for dialogue, these in there]
    assert join(changed(TALK, view='right', dialogue=name), *records).steps == steps


def test_dialogues_that_differ_are_refused():
    with pytest.raises(RecordError, match='steps for assembly_9011.right.one and assembly_9011.right.two'):
        join(changed(TALK, view='right'), changed(RIGHT, dialogue='one'), changed(RIGHT, dialogue='two', steps=LATE))


def test_two_names_that_are_its_beginning_are_refused():
    with pytest.raises(RecordError, match='steps for assembly_9011 and assembly'):
        join(changed(TALK, video_uid='assembly_9011__cam1'), TIMED, changed(TIMED, video_uid='assembly'))


@pytest.mark.parametrize('text', [
    '{"car": "long"}', '{"car": true}', '[]', '', 'video_uid,duration\ncar,-1', 'video_uid,duration\ncar', 'video_uid,price\ncar,1',
    'video_uid,duration\ncar,1\ncar,2', 'video_uid,duration,duration\ncar,1,2', 'video_uid,duration\n,1'])
def test_lengths_that_are_refused_are_named(tmp_path, text):
    (tmp_path/'wrong.csv').write_text(text)
    with pytest.raises(InputError, match='wrong.csv'): read_lengths(tmp_path/'wrong.csv')


def test_a_length_may_be_said_twice_if_it_is_the_same(tmp_path):
    (tmp_path/'twice.csv').write_text('video_uid,duration\ncar,60\nlamp,4\ncar,0:01:00')
    assert read_lengths(tmp_path/'twice.csv') == dict(car=60., lamp=4.)
