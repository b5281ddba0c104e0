"No command writes over what it reads, or over what it has written itself: it says so before anything runs."
import json, os, shutil
from pathlib import Path

import numpy as np, pytest

import processes
from dst_smolvlm import cache, evaluate, features, records, stream, train
from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.frames import video_length
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.streaming.trace_writer import read_trace
from dst_smolvlm.world import __main__ as world

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))
QUICK = ['eval.max_reply_tokens=1', 'context_strategy=drop_all']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save_model(*build_tiny(dict(hidden_size=32, layers=1, vision_size=32)), tmp_path_factory.mktemp('model')/'small')


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a video, steps and images, in which commands run that find no display."
    monkeypatch.chdir(tmp_path)
    for name in ('DISPLAY', 'WAYLAND_DISPLAY'): monkeypatch.delenv(name, raising=False)
    write_video('kitchen.mp4', np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8), fps=2)
    Path('steps.json').write_text('["boil the water", "pour it on"]')
    return tmp_path


def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.fixture
def refused(here, capsys):
    "A function that runs a command, which must refuse in one line with all `words` and leave every file as it was."
    def check(command, argv, *words):
        before = contents(here)
        with pytest.raises(SystemExit) as stopped: command.main([str(a) for a in argv])
        line = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and line.startswith('error: ') and '\n' not in line, line
        assert not [word for word in words if word not in line], line
        assert contents(here) == before
    return check

def streamed(checkpoint, out, *more, video='kitchen.mp4'):
    stream.main([video, '--steps', 'steps.json', '--checkpoint', str(checkpoint), '--out', out, *more, *QUICK])
    return read_trace(out)


@pytest.mark.parametrize('out, words', [
    ('kitchen.mp4', ['--out kitchen.mp4', 'VIDEO']), ('./kitchen.mp4', ['VIDEO']), ('steps.json', ['--out steps.json', '--steps']),
    ('linked.mp4', ['VIDEO']), ('hard.mp4', ['VIDEO']), ('sub/../steps.json', ['--steps'])])
def test_a_stream_may_not_replace_what_it_reads(refused, checkpoint, out, words):
    os.symlink('kitchen.mp4', 'linked.mp4'); os.link('kitchen.mp4', 'hard.mp4'); os.mkdir('sub')
    refused(stream, ['kitchen.mp4', '--steps', 'steps.json', '--checkpoint', checkpoint, '--out', out], *words)


@pytest.mark.parametrize('video, out', [('run.png', 'run'), ('run.mp4', 'run'), ('run.part', 'run'), ('run.json.mp4', 'run.json')])
def test_nor_may_what_lies_beside_its_trace(refused, checkpoint, video, out):
    os.rename('kitchen.mp4', video)
    refused(stream, [video, '--steps', 'steps.json', '--checkpoint', checkpoint, '--out', out, '--show'], 'its ', video)


def test_nor_a_file_of_the_checkpoint(refused, checkpoint):
    mine = shutil.copytree(checkpoint, 'mine')
    argv = ['kitchen.mp4', '--steps', 'steps.json', '--checkpoint', mine, '--out', 'mine/config.json']
    refused(stream, argv, 'mine/config.json', '--checkpoint')
    refused(cache, ['report', '--json', 'mine/config.json', 'model.checkpoint=mine'], '--json', 'model.checkpoint')


def test_nor_lie_among_the_images_that_it_reads(refused, checkpoint):
    "Its picture would be the next image."
    from PIL import Image
    os.mkdir('images')
    for i in range(3): Image.new('RGB', (64, 64), (i, 0, 0)).save(f'images/{i}.png')
    argv = ['images', '--steps', 'steps.json', '--checkpoint', checkpoint, 'eval.source_fps=2']
    refused(stream, [*argv, '--out', 'images/1.png'], 'images/1.png')
    refused(stream, [*argv, '--out', 'images/trace.json'], 'images/trace.json', 'folder of images')


def test_names_with_dots_have_pictures_of_their_own(here, checkpoint):
    for out in ('run.1', 'run.2', 'picture.png'):
        assert len(streamed(checkpoint, out).frames) == 6
        assert Path(f'{out}.png').read_bytes().startswith(b'\x89PNG')
    made = {name + end for name in ('run.1', 'run.2', 'picture.png') for end in ('', '.png')}
    assert {p.name for p in here.iterdir()} == {'kitchen.mp4', 'steps.json'} | made


def test_a_recording_leaves_the_video_of_its_name(here, checkpoint):
    case = CASES/'show-overwrites-video'
    if not case.is_dir(): pytest.skip(f'{case}: not found')
    for name in ('kitchen.mp4', 'steps.json'): shutil.copyfile(case/name, name)
    before = Path('kitchen.mp4').read_bytes()
    streamed(checkpoint, 'kitchen.json', '--show')
    assert Path('kitchen.mp4').read_bytes() == before
    assert video_length('kitchen.json.mp4').frames == len(read_trace('kitchen.json').frames) == video_length('kitchen.mp4').frames


def test_steps_saved_by_notepad(here, checkpoint):
    case = CASES/'steps-bom'/'steps.json'
    if not case.is_file(): pytest.skip(f'{case}: not found')
    shutil.copyfile(case, 'steps.json')
    assert [s['name'] for s in streamed(checkpoint, 'trace.json').model_dump()['steps']] == json.loads(case.read_text(encoding='utf-8-sig'))


# Annotations

@pytest.fixture
def labels(here):
    "A folder of annotations."
    os.mkdir('labels')
    for name in 'ab':
        record = dict(video_uid=name, dataset='kitchen', duration=3., steps=[dict(id='S1', name='boil', spans=[[0, 1]])])
        (here/'labels'/f'{name}.jsonl').write_text(json.dumps(record) + '\n')
    (here/'labels'/'lengths.json').write_text('{"a": 3.0}')
    return 'labels'

@pytest.mark.parametrize('argv', [
    ['convert', 'labels/a.jsonl', '--out', 'labels/a.jsonl'], ['convert', 'labels', '--out', 'labels/b.jsonl'],
    ['convert', 'labels/a.jsonl', '--out', 'labels/lengths.json', '--lengths', 'labels/lengths.json'],
    ['convert', 'labels/a.jsonl', '--out', 'c.jsonl', '--report', './c.jsonl'],
    ['convert', 'labels', '--out', 'labels'],
    ['convert', 'labels/a.jsonl', '--videos', '.', '--out', 'kitchen.mp4'], ['check', 'labels', '--report', 'labels/a.jsonl'],
    ['join', 'labels/a.jsonl', '--steps', 'labels/b.jsonl', '--out', 'labels/b.jsonl']])
def test_records_may_not_replace_what_they_are_read_from(refused, labels, argv): refused(records, argv, '--', 'name')


@pytest.mark.parametrize('where', ['', 'sub/'])
@pytest.mark.parametrize('name', ['film.mp4', 'film', 'EPIC_100_video_info.csv', 'report.json', 'notes.txt', 'other.jsonl'])
def test_records_replace_nothing_but_records(refused, labels, name, where):
    "Neither what they read without being told, as a video that a record names, nor anything else of somebody's."
    other = dict(video_uid='a', conversation=[]) if name == 'other.jsonl' else dict(problems=[])
    path = Path(where, name)
    path.parent.mkdir(exist_ok=True)
    if name.startswith('film'): shutil.copyfile('kitchen.mp4', path)
    else: path.write_text('a,b\n1,2\n' if path.suffix in ('.csv', '.txt') else json.dumps(other) + '\n')
    record = json.loads(Path('labels/a.jsonl').read_text()) | dict(video=str(path))
    Path('films.jsonl').write_text(json.dumps(record) + '\n')
    refused(records, ['convert', 'films.jsonl', '--out', path], f'--out {path}', 'no records of an earlier run')
    refused(records, ['convert', 'films.jsonl', '--videos', where or '.', '--out', path], f'--out {path}', 'remove it first')
    if name != 'report.json': refused(records, ['check', 'films.jsonl', '--report', path], str(path), 'no report of an earlier run')


def test_records_may_be_written_twice_or_into_an_empty_file(here, labels):
    Path('out.jsonl').touch()
    for _ in range(2): records.main(['convert', 'labels/a.jsonl', '--out', 'out.jsonl', '--report', 'r.json'])
    assert json.loads(Path('out.jsonl').read_text())['video_uid'] == 'a'
    records.main(['convert', 'labels/a.jsonl', '--out', '/dev/null', '--report', '/dev/null'])


def test_a_report_may_be_written_twice_among_the_annotations(here, labels):
    os.remove('labels/lengths.json')
    for _ in range(2): records.main(['check', 'labels', '--report', 'labels/report.json'])
    assert json.loads(Path('labels/report.json').read_text())['problems'] == []


# Runs by a configuration

def run_of(*overrides): return ['data=records', 'data.source=replay', 'data.path=labels', 'output_dir=run', 'train.max_steps=1', *overrides]

@pytest.mark.parametrize('overrides, words', [
    (['model.checkpoint=run/checkpoint'], ['its checkpoint', 'model.checkpoint']),
    (['data.path=run/config.yaml'], ['its config.yaml', 'data.path']),
    (['output_dir=labels/run'], ['output_dir=labels/run', 'data.path=labels']), (['output_dir=labels'], ['data.path=labels'])])
def test_a_training_may_not_write_where_it_reads(refused, labels, overrides, words): refused(train, run_of(*overrides), *words)


def test_a_training_leaves_the_configuration_of_somebody_else(refused, labels):
    os.mkdir('run')
    Path('run/config.yaml').write_text('services:\n  web: {image: nginx}\n')
    refused(train, run_of(), 'run/config.yaml', 'output_dir')


def test_features_are_not_written_over_annotations(refused, labels):
    refused(features, run_of('features.path=labels/a.jsonl', 'data.path=labels/a.jsonl'), 'features.path', 'data.path')


@pytest.mark.parametrize('name', ['scores.json', 'per_video.json', 'leaderboard.md', 'report.html'])
def test_an_evaluation_may_not_replace_the_predictions_it_scores(refused, name):
    path = Path('run', name)
    path.parent.mkdir()
    path.write_text('{"video_uid": "toy-test-2-00000", "time": 1, "text": "Hello."}\n')
    few = 'data.test_videos=1', 'data.validation_videos=0'
    refused(evaluate, ['output_dir=run', f'eval.predictions.theirs={path}', *few], f'its {name}', 'eval.predictions.theirs')


def test_a_training_leaves_a_folder_that_is_called_as_its_own(here, capsys):
    "It is renamed, whatever is in it."
    for name in ('trainer', 'checkpoint'):
        os.mkdir(name)
        Path(name, 'mine.py').write_text('mine')
    Path('training_log.json').write_text('mine')
    train.main([*processes.SMALL, 'output_dir=.', 'data.train_videos=2', '++train.max_steps=1', '++train.use_cpu=true'])
    kept = 'trainer-before-1/mine.py', 'checkpoint-before-1/mine.py', 'training_log.json-before-1'
    assert [Path(name).read_text() for name in kept] == ['mine']*3
    assert 'trainer is of no training here; it is trainer-before-1 now' in capsys.readouterr().out


def test_what_a_training_reads_may_not_lie_where_it_writes(refused, here):
    os.mkdir('trainer')
    os.rename('kitchen.mp4', 'trainer/kitchen.mp4')
    steps = [dict(id='S1', name='boil', spans=[[0, 1]])]
    record = dict(video_uid='a', dataset='kitchen', duration=3., video='trainer/kitchen.mp4', steps=steps)
    Path('r.jsonl').write_text(json.dumps(record) + '\n')
    small = [o for o in processes.SMALL if not o.startswith('data')]
    common = [*small, 'data=records', 'output_dir=.', '++train.max_steps=1', '++train.use_cpu=true', '++train.eval_strategy=no']
    refused(train, [*common, 'data.path=r.jsonl'], 'its trainer holds the video', 'trainer/kitchen.mp4')
    os.rename('r.jsonl', 'trainer/r.jsonl')
    refused(train, [*common, 'data.path=trainer/r.jsonl'], 'its trainer', 'holds data.path')


def test_a_stream_knows_its_video_by_an_address_too(refused, here, checkpoint):
    argv = ['--steps', 'steps.json', '--checkpoint', checkpoint, '--out']
    refused(stream, [f'file://{here}/kitchen.mp4', *argv, 'kitchen.mp4'], 'VIDEO')
    Path('list.m3u8').write_text('#EXTM3U\n#EXTINF:3.0,\nkitchen.mp4\n#EXT-X-ENDLIST\n')
    refused(stream, ['list.m3u8', *argv, 'kitchen.mp4'], 'VIDEO')
    Path('truth.json').write_text('[]')
    oracle = 'context_strategy=summarize_with_dst', 'context_strategy.dst_file=truth.json'
    refused(stream, ['kitchen.mp4', *argv, 'truth.json', *oracle], 'dst_file')


def test_a_file_is_no_camera(here, checkpoint):
    "Whatever its name: none of its frames is dropped."
    for name in ('webcam_kitchen.mp4', 'take=1.mp4'):
        shutil.copyfile('kitchen.mp4', name)
        trace = streamed(checkpoint, 'trace.json', video=name)
        assert trace.meta['clock'] is None and [f.skipped for f in trace.frames] == [None]*6


# Reports and samples

@pytest.mark.parametrize('name', ['report.html', 'leaderboard.md', 'scores.json', 'per_video.json'])
def test_an_evaluation_replaces_no_page_of_another(refused, checkpoint, name):
    Path(name).write_text('mine')
    refused(evaluate, ['output_dir=.', f'eval.checkpoint={checkpoint}', 'data=toy'], name, 'of no evaluation')


def test_a_sample_replaces_no_video_of_another(refused):
    os.mkdir('videos')
    shutil.copyfile('kitchen.mp4', 'videos/toy-test-0-00003.mp4')
    refused(world, ['sample', '--out', 'videos'], '--out videos', 'toy-test-0-00003.mp4', 'of no earlier sample')
    Path('videos/toy-test-0-00003.mp4').unlink()
    Path('videos/toy.jsonl').write_text('[]')
    refused(world, ['sample', '--out', 'videos'], '--out videos', 'toy.jsonl')
