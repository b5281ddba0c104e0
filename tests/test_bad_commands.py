"""Whatever is wrong with a command, it says so in one line on stderr, leaves with status 2, and leaves no result."""
import json, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np, pytest

import processes
from dst_smolvlm import evaluate, stream, train
from dst_smolvlm.data.container import write_video
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny

TRAIN = [*processes.SMALL, 'output_dir=out', 'data.train_videos=2', '++train.max_steps=1', '++train.use_cpu=true']
EVALUATE = ['output_dir=out', 'data=toy', 'data.validation_videos=1', 'data.test_videos=1', 'context_strategy=drop_all',
            'eval=dst_strategy', 'eval.checkpoint=small', 'eval.workers=1', 'eval.max_reply_tokens=1', 'eval.controls=false']
STREAM = ['clip.mp4', '--steps', 'steps.json', '--checkpoint', 'small', '--out', 'out/trace.json']
RECORD = {'video_uid': 'tea', 'dataset': 'kitchen', 'duration': 6., 'steps': [{'id': 'S1', 'name': 'boil the water', 'spans': [[0, 3]]}]}


def change(path, **values): path.write_text(json.dumps(json.loads(path.read_text()) | values))

def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size//2])

def instead(usual, given): return [given if word == usual else word for word in STREAM]

def lines(printed):
    "What was printed, without progress bars."
    return [line for line in re.split('[\r\n]', printed) if not re.search(r'it/s]\s*$|^\s*$', line)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A good checkpoint and ways to spoil it, a good video and bad ones, records and steps."
    folder = tmp_path_factory.mktemp('given')
    good = save_model(*build_tiny(dict(hidden_size=32, layers=1, vision_size=32)), folder/'small')
    for name, spoil in dict(truncated=lambda c: cut(c/'model.safetensors'), no_weights=lambda c: (c/'model.safetensors').unlink(),
                            no_config=lambda c: (c/'config.json').unlink(), bert=lambda c: change(c/'config.json', model_type='bert'),
                            no_tokenizer=lambda c: (c/'tokenizer.json').unlink(), cut_tokenizer=lambda c: cut(c/'tokenizer.json'),
                            pooled=lambda c: change(c/'config.json', tokens_per_frame=0, scale_factor=4)).items():
        spoil(shutil.copytree(good, folder/name))
    write_video(folder/'clip.mp4', np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), fps=2)
    cut(Path(shutil.copy(folder/'clip.mp4', folder/'cut.mp4')))
    (folder/'steps.json').write_text('["boil the water", "pour it on"]')
    (folder/'records').mkdir()
    (folder/'records'/'good.jsonl').write_text(json.dumps(RECORD))
    (folder/'records'/'spoilt.jsonl').write_text(json.dumps(RECORD | {'video_uid': 'spoilt', 'steps': None}))
    speech = {'steps': [], 'turns': [{'role': 'user', 'time': 1., 'content': 'What now?'}]}
    (folder/'speech.jsonl').write_text(json.dumps(RECORD | speech))
    (folder/'nothing').mkdir()
    return folder


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    "A function that runs a command in the folder and checks how it refuses; the line must hold all `words`."
    monkeypatch.chdir(folder)
    def check(command, argv, *words):
        before = set(folder.rglob('*'))
        with pytest.raises(SystemExit) as stopped: command.main(argv)
        [line] = lines(capsys.readouterr().err)
        assert stopped.value.code == 2 and line.startswith('error: ')
        assert not [word for word in words if word not in line], line
        left = set(folder.rglob('*')) - before
        shutil.rmtree(folder/'out', ignore_errors=True)
        assert not {p.name for p in left} - {'out', 'config.yaml', 'evaluation', 'trainer'}       # none of these is a result
    return check


@pytest.mark.parametrize('override, words', [
    ('train.learning_rat=1', ["'train.learning_rat'", "did you mean 'train.learning_rate'"]),
    ('data=nope', ["no choice 'nope'", 'toy']),
    ('train.learning_rate', ['key=value']),
    ('--epochs', ['--epochs', 'unknown option']),
    ('+train.epochz=1', ['train.epochz', 'no such argument']),
])
def test_a_misspelt_override(refused, override, words): refused(train, ['output_dir=out', override], *words)


@pytest.mark.parametrize('override, words', [
    ('train.learning_rate=fast', ['train.learning_rate=fast', 'number']),
    ('train.max_seq_len=10', ['train.max_seq_len=10']),
    ('++train.optim=nope', ['train', 'nope']),
    ('+data.world.nope=1', ['data.world', 'nope']),
    ('data.world.min_idle=20', ['data.world.min_idle=20', 'max_idle']),
    ('data.train_world.max_idle=abc', ['data.train_world.max_idle=abc', 'number']),
    ('data.world.fps=0', ['data.world.fps=0', 'from 0.1']),
    ('data.world.part_size=big', ['data.world.part_size=big', 'number']),
    ('data.source=nope', ['data.source=nope', 'toy']),
    ('data.train_videos=0', ['no training video']),
    ('model.hidden_size=30', ['model', '30']), ('model.image_size=30', ['model.image_size=30', 'multiple of 64']),
])
def test_a_bad_value_for_training(refused, override, words): refused(train, [*TRAIN, override], *words)


@pytest.mark.parametrize('override, words', [
    ('eval.checkpoint=nowhere', ['nowhere', 'no checkpoint there']),
    ('eval.checkpoint=null', ['out/checkpoint', 'no checkpoint there']),
    ('eval.checkpoint=truncated', ['truncated', 'not a checkpoint']),
    ('eval.split=nope', ['nope', 'validation']),
    ('data.test_videos=0', ['test is empty']),
    ('eval.workers=many', ['eval.workers=many', 'number']),
    ('context_strategy=nope', ["no choice 'nope'", 'drop_all']),
    ('context_strategy.max_seq_len=10', ['context_strategy.max_seq_len=10']),
    ('context_strategy.max_seq_len=100000', ['context_strategy.max_seq_len=100000', 'at most']),
    ('eval.speak_threshold=often', ['eval.speak_threshold=often', 'number']),
    ('eval.device=abacus', ['eval.device=abacus', 'not there']),
    ('eval.dtype=int8', ['eval.dtype=int8', 'bfloat16']),
    ('+eval.state_tracker.bgin=1', ['eval.state_tracker.bgin', 'no such option']),
    ('eval.strategies.drop_evrything={}', ['eval.strategies.drop_evrything', 'no such strategy', 'drop_all']),
    ('eval.strategies.drop_all.num_frames=3', ['num_frames', 'drop_all has no such option']),
    ('eval.checkpoints.other=nowhere', ['eval.checkpoints.other=nowhere', 'no checkpoint there']),
    ('eval.checkpoints.model=small', ['eval.checkpoints', 'model: not a name of its own']),
    ('eval.predictions.other=nowhere.jsonl', ['nowhere.jsonl', 'No such file']),
    ('eval.predictions.oracle=small', ['eval.predictions.oracle', 'already']),
    ('eval.weights.update_f1=-1', ['eval.weights.update_f1=-1', 'at least 0']),
    ('+eval.weights.fame=1', ['eval.weights.fame', 'cannot be weighted']),
    ('+eval.weights.duplicate_rate=1', ['eval.weights.duplicate_rate', 'cannot be weighted']),
    ('eval.predictions.other=null', ['eval.predictions.other', 'name a file']),
    ('eval.window=[2,1]', ['eval.window=[2, 1]', 'seconds']),
    ('eval.window=holoasist', ['eval.window=holoasist', 'seconds', 'holoassist']),
    ('eval.tolerance_s=-1', ['eval.tolerance_s=-1', 'at least 0']),
    ('eval.bootstrap=-5', ['eval.bootstrap=-5', 'at least 0']),
    ('eval.encoder=./nowhere', ['eval.encoder=./nowhere']),
])
def test_a_bad_value_for_evaluation(refused, override, words): refused(evaluate, [*EVALUATE, override], *words)


@pytest.mark.parametrize('checkpoint, words', [
    ('small', ['hidden_size is 32', 'model.hidden_size=64']),
    ('truncated', ['not a checkpoint']),
    ('no_weights', ['not a checkpoint', 'model.safetensors']),
    ('no_tokenizer', ['not a checkpoint', 'tokenizer']),
    ('cut_tokenizer', ['not a checkpoint']),
    ('pooled', ['another size', 'heads.']),
    ('./nowhere', ['no such checkpoint folder']),
])
def test_a_bad_checkpoint(refused, checkpoint, words):
    refused(train, [*TRAIN, f'model.checkpoint={checkpoint}', 'model.hidden_size=64'], checkpoint, *words)


@pytest.mark.parametrize('key, value', [('layers', 3), ('vision_size', 64), ('image_size', 128)])
def test_a_checkpoint_of_another_size(refused, key, value):
    refused(train, [*TRAIN, 'model.checkpoint=small', f'model.{key}={value}'], f'its {key} is', f'model.{key}={value}')


@pytest.mark.parametrize('checkpoint, words', [('nothing', ['no config.json']), ('no_config', ['no config.json']), ('bert', ['bert'])])
def test_a_folder_that_is_no_checkpoint(refused, monkeypatch, checkpoint, words):
    "Its size is unknown: the library would build its default instead, of seven billion parameters."
    monkeypatch.setattr(DSTSmolVLM, 'from_pretrained', lambda *args, **kwargs: pytest.fail('a model of unknown size was built'))
    refused(stream, instead('small', checkpoint), checkpoint, *words)


@pytest.mark.parametrize('argv, words', [
    (['data=records'], ['data.path', 'missing']),
    (['data=records', 'data.path=nowhere.jsonl'], ['nowhere.jsonl', 'no such file']),
    (['data=records', 'data.path=records'], ['records/spoilt.jsonl', 'line 1', 'steps']),
    (['data=records', 'data.path=records/good.jsonl'], ['good.jsonl', 'tea', 'video', 'missing']),
    (['data=records', 'data.source=replay', 'data.path=speech.jsonl'], ['speech.jsonl', 'tea', 'steps', 'dst_smolvlm.records join']),
    (['data=records', 'data.source=replay', 'data.path=records/good.jsonl', 'data.policy=cut'], ['policy=cut', 'strict, skip, clip']),
    (['data=records', 'data.source=replay', 'data.path=records/good.jsonl', 'data.level=part'], ['level=part', 'substep']),
    (['data=holoassist', 'data.path=nowhere'], ['nowhere', 'no such file']),
    (['data=holoassist', 'data.path=nothing'], ['nothing', 'holds no annotation']),
    (['data=dst_sample', 'data.path=steps.json'], ['steps.json', 'known format']),
])
def test_bad_data(refused, argv, words): refused(train, [o for o in TRAIN if not o.startswith('data')] + argv, *words)


@pytest.mark.parametrize('video, words', [('gone.mp4', ['gone.mp4', 'no such video file']), ('cut.mp4', ['cut.mp4']),
                                          ('steps.json', ['steps.json', 'no']), ('nothing', ['nothing', 'source_fps'])])
def test_a_bad_video(refused, video, words): refused(stream, instead('clip.mp4', video), *words)


@pytest.mark.parametrize('steps, words', [
    ('[]', ['field steps', 'at least one']), ('["tea", ""]', ['field steps']), ('{"goal": "tea"}', ['field steps']), ('7', ['field steps']),
    ('["tea"', ['not JSON']),
    ('{"steps": ["tea"], "stepz": 1}', ['unknown field stepz']),
    ('{"steps": ["tea"], "goal": 7}', ['field goal']),
    ('{"steps": ["tea"], "turns": null}', ['field turns']),
    ('{"steps": ["tea"], "turns": [{"time": 1}]}', ['field turns[0]']),
    ('{"steps": ["tea"], "turns": [{"time": 1, "content": ""}]}', ['field turns[0]']),
    ('{"steps": ["tea"], "turns": [{"time": NaN, "content": "What now?"}]}', ['field turns[0]']),
])
def test_bad_steps(refused, folder, steps, words):
    (folder/'bad.json').write_text(steps)
    refused(stream, instead('steps.json', 'bad.json'), 'bad.json', *words)


@pytest.mark.parametrize('argv, words', [
    ([], ['VIDEO', '--steps', 'usage']),
    (['clip.mp4', '--steps'], ['--steps', 'value is missing']),
    (instead('steps.json', 'gone.json'), ['gone.json', 'no such steps file']),
    ([*STREAM, 'eval.fps=fast'], ['eval.fps=fast', 'number']),
    ([*STREAM, 'eval.fps=0'], ['fps=0', 'positive']),
    (instead('out/trace.json', 'clip.mp4/trace.json'), ['clip.mp4']),
])
def test_arguments_of_stream(refused, argv, words): refused(stream, argv, *words)


@pytest.mark.parametrize('command, argv', [
    (train, [*TRAIN, 'model.checkpoint=small', 'model.hidden_size=64']),
    (evaluate, [*EVALUATE, 'eval.checkpoint=nothing']),
    (stream, instead('clip.mp4', 'cut.mp4'))])
def test_nothing_else_is_printed(folder, tmp_path, monkeypatch, command, argv):
    "Not by the libraries' own loggers either, which write past Python's stderr of the day."
    monkeypatch.chdir(folder)
    assert processes.run(tmp_path/'log', command.main, argv) == 2
    [line] = lines((tmp_path/'log').read_text())
    assert line.startswith('error: ')


def test_from_another_folder(folder, tmp_path):
    "As it is typed: only the line, and nothing where the trace should be."
    argv = [folder/'cut.mp4', '--steps', folder/'steps.json', '--checkpoint', folder/'small', '--out', 'trace.json']
    done = subprocess.run([sys.executable, '-m', 'dst_smolvlm.stream', *map(str, argv)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f'error: {folder/"cut.mp4"}: ')
    assert not list(tmp_path.iterdir())
