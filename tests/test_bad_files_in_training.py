"""One bad file ends no run: it is named before the run begins, or replaced while it goes on, the same for every rank and after a kill."""
import errno, json, math, os, pickle, re, shutil, signal
from pathlib import Path

import av, numpy as np, pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback

import processes
from dst_smolvlm import features, train
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.data.probe import cache_file, count_frames, probe_videos
from dst_smolvlm.data.schema import VideoRecord, write_records
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.runs import training_run
from dst_smolvlm.training import feature_store, feature_writer
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.training.feature_writer import write_store
from dst_smolvlm.training.arguments import training_arguments
from dst_smolvlm.world import scenes as scene_module
from dst_smolvlm.world.scenes import DecodeError, ToyScenes, VideoScene, load_scenes, scene_video, split_records

CASES = Path(__file__).resolve().parents[2]/'shared'/'cases'
SMALL = [*(a for a in processes.SMALL if not a.startswith('data')), 'data=records', '++train.per_device_train_batch_size=1',
         '++train.save_strategy=steps', '++train.eval_strategy=no', 'eval.max_reply_tokens=2']
VIDEOS, FRAMES = 9, 24          # of which six are trained on, one is validation, two are test


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))


def write_mkv(path, frames):
    "A file of which the first part can be used when it is cut off: one key frame a second, 2 frames a second."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=2, options=dict(g='2', bf='0', crf='10'))
        stream.width, stream.height, stream.pix_fmt = *frames[0].shape[1::-1], 'yuv420p'
        for image in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode(None))


@pytest.fixture(scope='module')
def footage(tmp_path_factory):
    "Records with video files of noise."
    folder, rng = tmp_path_factory.mktemp('footage'), np.random.default_rng(0)
    spans = [(2., 4.), (5., 8.), (8.5, 11.)]
    records = [VideoRecord(video_uid=f'v{k}', dataset='noise', duration=(FRAMES - 1)/2, goal=f'build {k}', video=f'v{k}.mkv',
                           steps=[dict(id=f'S{i}', name=f'attach part {i}', spans=[span]) for i, span in enumerate(spans)],
                           turns=[dict(role='assistant', time=1., content=f'Now attach part {k}.')]) for k in range(VIDEOS)]
    for r in records: write_mkv(folder/r.video, rng.integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8))
    write_records(records, folder/'records.jsonl')
    return folder


@pytest.fixture
def data(footage, tmp_path): return shutil.copytree(footage, tmp_path/'data')

def of_split(folder, split='train'): return [folder/r.video for r in split_records(read_records(folder/'records.jsonl'))[split]]

def config(folder, *overrides): return compose_config([*SMALL, f'data.path={folder}/records.jsonl', '++train.use_cpu=true', *overrides])

def halve(path): os.truncate(path, path.stat().st_size//2)

def trainer_of(cfg, tmp_path):
    trainer = training_run.make_trainer(cfg, training_arguments(cfg, tmp_path/'trainer'))
    trainer.remove_callback(PrinterCallback)
    return trainer


class Happening(TrainerCallback):
    "What happens to the files, and to the process, at the end of a step."
    def __init__(self, events): self.events = events
    def on_step_end(self, args, state, control, **kwargs):
        for step, what, path in self.events:
            if step != state.global_step: continue
            if what == 'kill': os.kill(os.getpid(), signal.SIGKILL)
            if state.is_world_process_zero: dict(halve=halve, delete=Path.unlink, scribble=lambda p: p.write_bytes(b'\0'*999))[what](path)
            if dist.is_initialized(): dist.barrier()         # the next batch is not fetched before


def train_while(argv, events):
    "The command, and what happens meanwhile."
    make = training_run.make_trainer
    def with_events(*args):
        trainer = make(*args)
        trainer.add_callback(Happening(events))
        return trainer
    training_run.make_trainer = with_events
    train.main(argv)


def trained(out, folder, *overrides, events=(), ranks=1):
    "Exit status, or those of the ranks, and what was printed."
    argv = [*SMALL, f'data.path={folder}/records.jsonl', f'output_dir={out}', *overrides, *(['++train.use_cpu=true'] if ranks == 1 else [])]
    out.mkdir(exist_ok=True)
    status = processes.run(out/'log', train_while, argv, events, ranks=ranks, daemon=False,
                           env=dict(ACCELERATE_USE_CPU='true') if ranks > 1 else {})
    return status, '\n'.join(p.read_text() for p in sorted(out.glob('log*')))

def weights(out): return load_file(out/'checkpoint'/'model.safetensors')

def same_weights(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def curve(out):
    log = json.loads((out/'training_log.json').read_text())
    return [{k: v for k, v in h.items() if 'loss' in k} for h in log if 'loss' in h]

def replaced(log): return re.findall(r'^.*another clip takes its place$', log, re.MULTILINE)


@pytest.mark.parametrize(('ranks', 'cut', 'save', 'kill'), ((1, 7, 12, 13), (2, 4, 6, 7)))
def test_cut_off_in_the_second_epoch(footage, ranks, cut, save, kill, tmp_path):
    """Of six streams, six or three steps an epoch. The run goes on, says so once, and has learned the same until then as one with whole
    files. Killed and resumed, it ends with the same losses and weights, bit for bit, and reports nothing twice."""
    steps = [f'++train.max_steps={save + 3}', f'++train.save_steps={save}']
    one = lambda status: status if ranks == 1 else [status]*ranks
    folders = {name: shutil.copytree(footage, tmp_path/f'data-{name}') for name in ('whole', 'cut', 'killed')}
    bad = {name: of_split(folder)[0] for name, folder in folders.items()}
    status, said = trained(tmp_path/'whole', folders['whole'], *steps, ranks=ranks)
    assert status == one(0) and not replaced(said), said
    status, said = trained(tmp_path/'cut', folders['cut'], *steps, ranks=ranks, events=[(cut, 'halve', bad['cut'])])
    assert status == one(0), said
    [line] = replaced(said)
    uid, place = bad['cut'].stem, re.search(r'cut off after (\S+) s of 12.0 s \(clip (\w+), at (\S+) s\)', line)
    assert line.startswith(f'{bad["cut"]}: ') and place[2] == uid and 0 < float(place[1]) <= float(place[3]) < 12
    assert curve(tmp_path/'cut')[:cut + 1] == curve(tmp_path/'whole')[:cut + 1]           # one batch is fetched ahead
    assert curve(tmp_path/'cut') != curve(tmp_path/'whole')

    events = [(cut, 'halve', bad['killed']), (kill, 'kill', None)]
    status, said = trained(tmp_path/'killed', folders['killed'], *steps, ranks=ranks, events=events)
    assert status == one(-signal.SIGKILL) and len(replaced(said)) == 1, said
    status, said = trained(tmp_path/'killed', folders['killed'], *steps, ranks=ranks)
    assert status == one(0), said
    assert f'checkpoint-{save}' in said and not replaced(said)                           # told before, and remembered
    assert said.count(f'{bad["killed"]}: {uid}: ') == 1 and 'warning: the videos of 1 of 6 records' in said      # the probe lets it go on
    assert curve(tmp_path/'killed') == curve(tmp_path/'cut')
    assert same_weights(weights(tmp_path/'killed'), weights(tmp_path/'cut'))


@pytest.mark.parametrize('ranks', (1, 2))
def test_too_many(data, ranks, tmp_path):
    "One may fail of six. The second, which is deleted, ends the run on all ranks; the list has both. With a higher limit it goes on."
    first, second, *_ = of_split(data)
    args = ['++train.max_steps=18', '++train.save_steps=3']
    status, said = trained(tmp_path/'out', data, *args, ranks=ranks, events=[(1, 'scribble', first), (4, 'delete', second)])
    assert status == (2 if ranks == 1 else [2, 2]), said
    assert len(replaced(said)) == 2
    listed = said[said.rindex('another clip takes its place'):]
    assert f'{first}: not a readable video' in listed and f'{second}: no such video file' in listed
    assert 'error: 2 of 6 clips could not be decoded (listed above), and train.max_failed_clips=0.01 allows 1' in listed
    assert 'Traceback' not in said and not (tmp_path/'out'/'checkpoint').exists()
    status, said = trained(tmp_path/'out', data, *args, '++train.max_failed_clips=.5', ranks=ranks)
    assert status == (0 if ranks == 1 else [0, 0]), said
    assert 'goes on from' in said and (tmp_path/'out'/'checkpoint').is_dir()


def test_workers_draw_the_same(data, tmp_path):
    "What takes the place of a clip does not depend on who loads it; and how many are named neither."
    halve(of_split(data)[1])
    for name, workers in (('none', 0), ('two', 2)):
        status, said = trained(tmp_path/name, data, '++train.max_steps=12', '++train.save_strategy=no', '++train.probe=false',
                               f'++train.dataloader_num_workers={workers}')
        assert status == 0 and len(replaced(said)) == 1, said
    assert curve(tmp_path/'none') == curve(tmp_path/'two')
    assert same_weights(weights(tmp_path/'none'), weights(tmp_path/'two'))


def test_a_disk_that_is_gone(data, tmp_path):
    "With workers, too, the run ends with one line and the list, not with a traceback."
    for path in of_split(data): path.unlink()
    status, said = trained(tmp_path/'out', data, '++train.max_steps=12', '++train.probe=false', '++train.dataloader_num_workers=2')
    assert status == 2 and 'Traceback' not in said, said
    assert re.search(r'error: \d of 6 clips could not be decoded', said) and said.count('no such video file') >= 2


def test_all_that_is_missing_is_said_before_it_begins(data, tmp_path):
    "By a dry run as well. Nothing is left behind, and a user who insists may begin."
    one, two, three, *_ = of_split(data)
    one.unlink(), halve(two), write_mkv(three, np.zeros((9, 64, 64, 3), np.uint8))
    for extra in ([], ['train.dry_run=true']):
        status, said = trained(tmp_path/'out', data, '++train.max_steps=1', *extra)
        assert status == 2 and 'error: the videos of 3 of 6 records are missing, broken or too short (listed above)' in said
        assert f'{one}: {one.stem}: no such video file' in said
        assert re.search(rf'{two}: {two.stem}: \d+ frames at 2 FPS, the record needs {FRAMES} \(cut off after', said)
        assert f'{three}: {three.stem}: 9 frames at 2 FPS, the record needs {FRAMES}' in said
        assert 'set train.probe=false' in said and [p.name for p in (tmp_path/'out').rglob('*') if p.is_file()] == ['log']
    status, said = trained(tmp_path/'out', data, '++train.max_steps=1', '++train.probe=false', '++train.max_failed_clips=.9')
    assert status == 0, said


def test_every_rank_is_refused(data, tmp_path):
    of_split(data)[0].unlink()
    status, said = trained(tmp_path/'out', data, '++train.max_steps=1', ranks=2)
    assert status == [2, 2] and said.count('no such video file') == 1 and 'Traceback' not in said, said


def test_a_validation_video_is_left_out(data, tmp_path, capsys):
    "It is named once, whether its loss is asked for or it is streamed; of the others the loss is that of the others alone."
    overrides = '++train.eval_strategy=steps', '++train.eval_steps=1', '++train.eval_videos=2'
    records = [r.model_copy(update=dict(video_uid=f'{r.video_uid}{k}')) for r in read_records(data/'records.jsonl') for k in 'ab']
    write_records(records, data/'records.jsonl')                    # eighteen, of which two are validation
    trainer = trainer_of(config(data, *overrides), tmp_path)
    scenes = trainer.eval_dataset.scenes
    assert len(scenes) == 2 and scenes[0].path != scenes[1].path
    whole, streamed = trainer.evaluate(), trainer.watch.traces(trainer)
    halve(scenes[0].path)
    capsys.readouterr()
    found = trainer.evaluate(), trainer.evaluate()
    said = capsys.readouterr().out
    assert said.count('this validation video is left out') == 1 and f'{scenes[0].path}: cut off' in said
    assert whole['eval_stream_failed'] == 0 and found[0]['eval_stream_failed'] == 1
    trainer.eval_dataset.scenes = trainer.watch.scenes = scenes[1:]
    alone = trainer.evaluate()
    assert {k: v for k, v in found[0].items() if k != 'eval_stream_failed'} == {k: v for k, v in alone.items() if k != 'eval_stream_failed'}
    assert found[0]['eval_loss'] != whole['eval_loss'] and len(streamed) == 2
    scenes[1].path.unlink()
    none = trainer.evaluate()
    assert none['eval_stream_failed'] == 1 and all(math.isnan(v) for k, v in none.items() if k != 'eval_stream_failed')
    assert f'{scenes[1].path}: no such video file; this validation video is left out' in capsys.readouterr().out


def test_no_validation_video_is_left(data, tmp_path):
    "A training that chooses its best checkpoint by one ends with the last."
    [path] = of_split(data, 'validation')
    status, said = trained(tmp_path/'out', data, '++train.max_steps=2', '++train.save_steps=1', '++train.eval_strategy=steps',
                           '++train.eval_steps=1', '++train.load_best_model_at_end=true', '++train.probe=false',
                           '++train.metric_for_best_model=eval_stream_joint_goal_accuracy', '++train.early_stopping_patience=5',
                           events=[(1, 'delete', path)])
    assert status == 0 and said.count('this validation video is left out') == 1, said
    assert (tmp_path/'out'/'checkpoint').is_dir()


def test_clips_of_a_split_stream(data):
    "Those before the cut stay what they were; those after it are named by their frames, and each counts."
    scenes = load_scenes(config(data).data, 'train')
    _, layout = build_tiny()
    options = dict(image_size=64, max_seq_len=150, split_long=True, dialogues=0, auxiliary_samples=2, from_middle=0, max_failed=.2)
    rows = DSTStreamDataset(scenes, layout, **options)
    whole = [rows[k] for k in range(len(rows))]
    clips = [(start, stop) for i, start, stop, _ in rows.clips if i == 2]
    assert len(clips) >= 3 and len(rows) >= 18
    halve(scenes[2].path)
    some, _ = count_frames(scenes[2].path, 2.)
    late = {f'{scenes[2].record.uid} frames {start}-{stop - 1}' for start, stop in clips if stop > some}
    assert 0 < len(late) < len(clips)
    for k, before in enumerate(whole):
        (row,), auxiliary_samples, failed = rows[k]
        assert {f.clip for f in failed} <= late and len(auxiliary_samples) == 2
        if before[0][0]['name'] in late: assert failed[0].clip == before[0][0]['name'] and row['name'] not in late
        else: assert row['name'] == before[0][0]['name'] and torch.equal(row['pixel_values'], before[0][0]['pixel_values'])


@pytest.mark.parametrize('error', (OSError(errno.EIO, 'Input/output error'), PermissionError(errno.EACCES, 'denied'), MemoryError()))
def test_a_disk_that_fails_while_it_is_read(data, error, monkeypatch):
    "Whatever a library says in the middle of a file: replaced, at the second."
    decode = scene_module.iter_frames
    def failing(source, *args, **kwargs):
        for frame in decode(source, *args, **kwargs):
            if source.stem == bad and frame.index >= 15: raise error
            yield frame
    scenes = load_scenes(config(data).data, 'train')
    bad = scenes[0].record.uid
    monkeypatch.setattr(scene_module, 'iter_frames', failing)
    rows = DSTStreamDataset(scenes, build_tiny()[1], 64, dialogues=0, auxiliary_samples=0, from_middle=0, max_failed=.01)
    (row,), _, [failed] = rows[0]
    assert (failed.clip, failed.second) == (bad, 7.5) and type(error).__name__ in failed.why and not row['name'].startswith(bad)
    with pytest.raises(DecodeError) as raised: list(scenes[0].iter_frames())
    again = pickle.loads(pickle.dumps(raised.value))                  # as it goes from rank to rank
    assert (str(again), again.record, again.frame) == (str(raised.value), scenes[0].record, 15)


def test_how_many_may_fail():
    _, layout = build_tiny()
    allowed = lambda n, share: DSTStreamDataset(ToyScenes(length=n), layout, 64, max_failed=share).allowed_to_fail
    assert [allowed(1000, s) for s in (0., .0001, .01, 1., None)] == [0, 1, 10, 999, 0]
    assert [allowed(n, .01) for n in (1, 2, 99, 250)] == [0, 1, 1, 2]


def test_a_damaged_feature_file(tmp_path):
    "Half of it, nothing, another model's: replaced like a video, in streams, dialogues and auxiliary samples."
    model, layout = build_tiny(dict(hidden_size=32, layers=1, vision_size=32, image_size=64))
    scenes = ToyScenes('train', length=6)
    store, report = write_store(model.eval(), [scene_video(s) for s in scenes], tmp_path/'store')
    assert not report.failed
    rows = DSTStreamDataset(scenes, layout, 64, store=store, auxiliary_samples=6, dialogues=3, max_failed=.5)
    path, uid = store.path(scene_video(scenes[1]).uid), scenes[1].record.uid
    for damage in (halve, lambda p: p.write_bytes(b''), lambda p: shutil.copy(store.path(scene_video(scenes[0]).uid), p), Path.unlink):
        damage(path)
        named = set()
        for k in range(6):
            row, auxiliary_samples, failed = rows[k]
            assert (len(row), len(auxiliary_samples)) == (4, 6) and not any(x['name'].startswith(uid) for x in row + auxiliary_samples)
            named |= {(f.clip, f.why.split(': ')[0]) for f in failed}
        assert named == {(uid, str(path))}


def test_features_are_asked_for_once(data, tmp_path):
    "What is missing is listed line by line; what the command cannot write it says first, and writes the rest."
    one, two, *_ = of_split(data)
    one.unlink(), halve(two)
    argv = [*SMALL, f'data.path={data}/records.jsonl', f'features.path={tmp_path/"store"}', f'output_dir={tmp_path}']
    assert processes.run(tmp_path/'log', features.main, argv) == 1
    said = (tmp_path/'log').read_text()
    before = said[:said.index('videos written')]
    assert f'{one}: {one.stem}: no such video file' in before and f'{two}: {two.stem}: ' in before
    assert 'the videos of 2 of 9 records cannot be written; the others are' in before and f'7 of 9 videos in {tmp_path/"store"}' in said
    status, said = trained(tmp_path/'out', data, f'++train.features={tmp_path/"store"}', '++train.freeze_vision=true',
                           '++train.freeze_connector=true', '++train.max_steps=1')
    listed, _, error = said.partition('error: ')
    assert status == 2 and error.startswith('train.features: 2 of 6 videos are missing or stale (listed above), first ')
    assert f'{one}: no such video file' in listed and re.search(rf'{tmp_path}/store/{two.stem}-\w+.safetensors: no features there', listed)


def test_pictures_that_change_their_size(tmp_path, monkeypatch):
    "Each is scaled by itself, in streams and auxiliary samples."
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(64, 64)]*12 + [(48, 96)]*12]
    monkeypatch.setattr(scene_module.Video, 'frames', lambda self, start=0, stop=None: iter(images[start:stop]))
    steps = [dict(id='S', name='stir', spans=[(1., 9.)])]
    scene = VideoScene(VideoRecord(video_uid='v', dataset='d', duration=11.5, steps=steps), tmp_path/'v.ts')
    assert scene.frames(3, 5).shape == (2, 64, 64, 3) and [f.shape for f in scene.frames(11, 13)] == [(64, 64, 3), (48, 96, 3)]
    _, layout = build_tiny()
    (row,), auxiliary_samples, _ = DSTStreamDataset([scene], layout, 64, dialogues=0, auxiliary_samples=3, from_middle=0)[0]
    assert row['pixel_values'].shape == (24, 3, 64, 64) and all(g['pixels'].shape == (4, 3, 64, 64) for g in auxiliary_samples)
    assert torch.equal(row['pixel_values'][0], torch.from_numpy(images[0]).permute(2, 0, 1).float()/127.5 - 1)


def test_one_frame_may_be_missing(data):
    "As in decoding."
    [record] = [r for r in read_records(data/'records.jsonl') if r.video_uid == 'v0']
    for more, wrong in ((0, False), (1, False), (2, True)):
        asked = record.model_copy(update=dict(duration=record.duration + more/2))
        assert bool(probe_videos([(asked, data/record.video)])) == wrong
        try: list(VideoScene(asked, data/record.video).iter_frames()); decoded = True
        except DecodeError: decoded = False
        assert decoded == (not wrong)


def test_probe_is_cached_by_content(data, monkeypatch):
    "An unchanged file is not opened again; a changed one is, and so is one at another rate or that was found wrong."
    records = read_records(data/'records.jsonl')
    pairs, opened = [(r, data/r.video) for r in records], []
    monkeypatch.setattr('dst_smolvlm.data.probe.count_frames', lambda path, fps: opened.append(path.name) or count_frames(path, fps))
    assert probe_videos(pairs + pairs, bar=False) == [] and sorted(opened) == sorted(r.video for r in records)
    opened.clear()
    assert probe_videos(pairs) == [] and not opened
    shutil.copy(data/'v1.mkv', data/'v0.mkv')
    os.utime(data/'v2.mkv', ns=(1, 1))
    halve(data/'v3.mkv')
    for _ in range(2): assert [e.record for e in probe_videos(pairs)] == ['v3']
    assert opened == [*opened[:3], 'v3.mkv'] and set(opened) == {'v0.mkv', 'v2.mkv', 'v3.mkv'}
    opened.clear()
    slow = [(r.model_copy(update=dict(fps=1.)), path) for r, path in pairs[4:5]]
    assert probe_videos(slow) == [] and opened == ['v4.mkv']
    cache_file().chmod(0o400), cache_file().parent.chmod(0o500)            # not writable, which only costs time
    try: assert [e.record for e in probe_videos(pairs[3:5])] == ['v3']
    finally: cache_file().parent.chmod(0o700)


def test_a_folder_that_may_not_be_read(data, monkeypatch):
    "Or a disk that is not there just now: said, and not believed the next time."
    pairs, stat = [(r, data/r.video) for r in read_records(data/'records.jsonl')[:2]], Path.stat
    def refuse(self, **kwargs):
        if self.name == 'v1.mkv': raise PermissionError(errno.EACCES, 'Permission denied')
        return stat(self, **kwargs)
    monkeypatch.setattr(Path, 'stat', refuse)
    assert [str(e) for e in probe_videos(pairs)] == [f'{data/"v1.mkv"}: v1: not readable (Permission denied)']
    monkeypatch.setattr(Path, 'stat', stat)
    assert probe_videos(pairs) == []


@pytest.mark.parametrize('content', (b'', b'\0'*5000, b'not a video', None, 'folder', 'sound'))
def test_what_is_no_video(data, content, tmp_path):
    path, [record, *_] = tmp_path/'x.mkv', read_records(data/'records.jsonl')
    if content == 'folder': path.mkdir()
    elif content == 'sound':
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('aac', rate=8000, layout='mono')
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), 'fltp', 'mono')
            frame.sample_rate = 8000
            for packet in (*stream.encode(frame), *stream.encode(None)): container.mux(packet)
    elif content is not None: path.write_bytes(content)
    [error] = probe_videos([(record, path)])
    assert error.record == record.uid and error.file == str(path) and str(error).count(str(path)) == 1, str(error)


def two_cameras(tmp_path):
    "One recording by two cameras, as records that say which."
    source = CASES/'two-camera-views'
    if source.is_dir():
        records = [VideoRecord.from_json(line) for line in (source/'records.jsonl').read_text().splitlines()]
        for r in records: shutil.copy(source/r.video, tmp_path)
        return [r.model_copy(update=dict(view=Path(r.video).stem)) for r in records]
    return pytest.skip(f'{source}: not found')


def test_two_cameras_are_two_streams(tmp_path):
    "Of one video, so in the same split; the store has a file for each."
    records = two_cameras(tmp_path)
    write_records(records, tmp_path/'records.jsonl')
    status, said = trained(tmp_path/'out', tmp_path, '++train.max_steps=2', '++train.save_strategy=no')
    assert status == 0 and ', 2 streams of 1 video;' in said, said
    cfg = config(tmp_path, f'features.path={tmp_path/"store"}')
    store, report = feature_writer.build_store(cfg)
    assert not report.failed and list(store) == [f'P90_01.{r.view}' for r in records]
    cam1, cam2 = (store[uid] for uid in store)
    assert (len(cam1), len(cam2)) == (9, 8) and not torch.equal(cam1[:8], cam2)
    rows = DSTStreamDataset(load_scenes(cfg.data, 'train'), build_tiny()[1], 64, store=store, dialogues=0, auxiliary_samples=0,
                            from_middle=0)
    assert [rows[k][0][0]['frame_tokens'].shape[0] for k in range(2)] == [9, 8]


def test_cameras_without_a_name_are_refused(tmp_path):
    "One file cannot hold the features of both."
    records = [VideoRecord(video_uid='v', dataset='d', duration=2., video=f'{k}.mp4', steps=[dict(id='S', name='stir')]) for k in 'ab']
    for r in records: write_video(tmp_path/r.video, np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match='two cameras are told apart by the field view'):
        feature_store.FeatureStore(tmp_path, 'e', [scene_module.Video(r, tmp_path/r.video) for r in records])
