"""The store of frame features: killed, shared among processes, given broken videos, and read by many. It is never wrong."""
import os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, psutil, pytest, torch
from safetensors import safe_open
from torch.utils.data import DataLoader

import processes
from dst_smolvlm import features
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.core.hashing import hash_video
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.data.schema import VideoRecord, write_records
from dst_smolvlm.model.configuration import DSTSmolVLMConfig
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny
from dst_smolvlm.training import feature_store, feature_writer
from dst_smolvlm.training.feature_store import FeatureStore, encoder_fingerprint, file_name, write_tokens
from dst_smolvlm.training.feature_writer import write_store
from dst_smolvlm.world.scenes import Video, load_scenes
from dst_smolvlm.world.toy_world import make_scene

# Nothing here rests on the defaults of conf/.
MODEL = ['model=tiny', 'model.hidden_size=32', 'model.layers=1', 'model.vision_size=32', 'model.image_size=64', 'train.seed=0']
WORLD = dict(min_steps=3, max_steps=4, min_idle=3, max_idle=12, mistakes=.1, image_size=64, fps=2.)      # 25 to 80 frames
VIDEOS = 48
TOY = [*MODEL, 'data=toy', 'data.seed=0', 'data.train_videos=99', f'features.toy_videos={VIDEOS}', 'data.train_world=null',
       *(f'data.world.{k}={v}' for k, v in WORLD.items()),
       'features.dtype=bfloat16', 'features.compute_dtype=float32', 'features.device=cpu']
SAMPLE = Path(__file__).parent.parent/'data'


def content(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}

def files(folder):
    "The whole files with their inodes and times: a file that was written again has others, even if it says the same."
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path(folder).glob('*.safetensors')}

def temporary(folder): return list(Path(folder).glob('.*.tmp'))

def written(log): return sum(int(n) for n in re.findall(r'(\d+) videos written', log.read_text()))

def command(folder, base=TOY): return [*base, f'features.path={folder}']


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The store that nobody interrupted, and the seconds a video took."
    folder = tmp_path_factory.mktemp('whole')
    assert processes.run(folder/'log', features.main, command(folder/'store')) == 0, (folder/'log').read_text()
    assert written(folder/'log') == len(files(folder/'store')) == VIDEOS
    times = sorted(when for _, when in files(folder/'store').values())
    return folder/'store', (times[-1] - times[0])/(VIDEOS - 1)/1e9


def test_killed_at_20_random_moments(whole, tmp_path):
    "While it starts, and while it writes: what was whole stays as it was, what was in hand is done again, and the bytes are the same."
    (reference, per_video), store, log, rng = whole, tmp_path/'store', tmp_path/'log', random.Random(0)
    in_hand = 0
    for kill in range(20):
        before = files(store) if store.exists() else {}
        process, some = processes.start(log, features.main, command(store)), len(before) + rng.randrange(3)
        if kill % 5 == 0: time.sleep(rng.uniform(0, .6))
        else:
            while process.is_alive() and (len(files(store)) < some or not temporary(store)): time.sleep(.001)
            time.sleep(rng.uniform(0, per_video))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f'the store was finished before kill {kill + 1}: {log.read_text()}'
        if not store.exists(): continue
        assert before.items() <= files(store).items()
        for name in files(store): assert (store/name).read_bytes() == (reference/name).read_bytes()
        assert len(temporary(store)) <= 1
        in_hand += len(temporary(store))
    before = files(store)
    assert 8 <= len(before) < VIDEOS and in_hand >= 8                   # or the moments were no good
    assert processes.run(log, features.main, command(store)) == 0, log.read_text()
    assert before.items() <= files(store).items() and written(log) == VIDEOS - len(before)
    assert content(store) == content(reference)                         # and nothing temporary is left


def kill_at(argv, name, after):
    "The command, which kills itself before or after the third call of a function of `os`."
    calls, original = [], getattr(os, name)
    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == 3 and not after: os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(os, name, call)
    features.main(argv)


@pytest.mark.parametrize('name, after, done', [('fsync', False, 2), ('replace', False, 2), ('replace', True, 3)])
def test_killed_at_the_worst_moments(whole, tmp_path, name, after, done):
    "Before the file is on the disk, before it has its name, and just after."
    store, log = tmp_path/'store', tmp_path/'log'
    assert processes.run(log, kill_at, command(store), name, after) == -signal.SIGKILL
    assert (len(files(store)), len(temporary(store))) == (done, 3 - done)
    before = files(store)
    assert processes.run(log, features.main, command(store)) == 0, log.read_text()
    assert written(log) == VIDEOS - done and before.items() <= files(store).items()
    assert content(store) == content(whole[0])


def test_interrupted(tmp_path):
    "Ctrl-C leaves nothing half-written."
    store, log = tmp_path/'store', tmp_path/'log'
    process = processes.start(log, features.main, command(store))
    while process.is_alive() and len(files(store)) < 2: time.sleep(.001)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130 and 'interrupted' in log.read_text()
    assert not temporary(store) and 2 <= len(files(store)) < VIDEOS


def test_two_ranks(whole, tmp_path):
    "They share the videos and write the store that one writes."
    store = tmp_path/'store'
    assert processes.run(tmp_path/'log', features.main, command(store), ranks=2) == [0, 0]
    logs = [tmp_path/'log0', tmp_path/'log1']
    assert 'process 2 of 2 on cpu' in logs[1].read_text()
    assert sum(map(written, logs)) == VIDEOS and all(map(written, logs))
    assert content(store) == content(whole[0])


def test_accelerate_launch(whole, tmp_path):
    "Two processes by the launcher itself, which may use several threads each."
    store = tmp_path/'store'
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '-m', 'dst_smolvlm.features']
    env = os.environ | dict(OMP_NUM_THREADS='2')
    done = subprocess.run([*launch, *command(store)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f'process {r} of 2 on cpu' for r in (1, 2)} == set(re.findall(r'process \d of \d on \w+', done.stdout))
    assert sum(int(n) for n in re.findall(r'(\d+) videos written', done.stdout)) == VIDEOS
    assert content(store) == content(whole[0])


def test_the_survivor_takes_over(whole, tmp_path):
    "Of two processes that were started by themselves, one is killed with a video in its hands."
    store, log = tmp_path/'store', tmp_path/'log'
    killed, survivor = (processes.start(tmp_path/name, features.main, command(store)) for name in ('killed', 'log'))
    mine = lambda: [p for p in temporary(store) if p.suffixes[-2] == f'.{killed.pid}']
    while killed.is_alive() and not mine(): time.sleep(.001)
    killed.kill()
    survivor.join(60)
    assert (killed.exitcode, survivor.exitcode) == (-signal.SIGKILL, 0), log.read_text()
    assert content(store) == content(whole[0])


def records_with(tmp_path, **changes):
    "The committed sample in a folder of its own, with other files for some of its videos."
    records = read_records(SAMPLE/'toy.jsonl')[:4]
    for r in records: shutil.copy(SAMPLE/r.video, tmp_path)
    for r, (name, data) in zip(records, changes.items()):
        r.video = f'{name}.mp4'
        if data is not None: (tmp_path/r.video).write_bytes(data)
    write_records(records, tmp_path/'records.jsonl')
    return records, [*MODEL, 'data=records', f'data.path={tmp_path/"records.jsonl"}', f'features.path={tmp_path/"store"}']


@pytest.mark.parametrize('ranks', [1, 2])
def test_broken_videos(tmp_path, ranks):
    "Each is named at the end, the others are written, and when they are mended only they are written."
    half = (SAMPLE/'toy-test-0-00001.mp4').read_bytes()
    records, argv = records_with(tmp_path, missing=None, half=half[:len(half)//2])
    status = processes.run(tmp_path/'log', features.main, argv, ranks=ranks)
    assert status == (1 if ranks == 1 else [1, 0])                      # one process tells of it, when all are done
    said = (tmp_path/('log' if ranks == 1 else 'log0')).read_text()
    assert f'{records[0].video_uid}: {tmp_path/"missing.mp4"}: no such video file' in said
    assert f'{records[1].video_uid}: {tmp_path/"half.mp4"}: not a readable video' in said and 'error: 2 videos failed' in said
    before = files(tmp_path/'store')
    assert len(before) == 2 and not temporary(tmp_path/'store') and len(list((tmp_path/'store').glob('*.error'))) == 2

    for name, r in zip(('missing', 'half'), read_records(SAMPLE/'toy.jsonl')): shutil.copy(SAMPLE/r.video, tmp_path/f'{name}.mp4')
    assert processes.run(tmp_path/'log', features.main, argv) == 0, (tmp_path/'log').read_text()
    assert written(tmp_path/'log') == 2 and before.items() <= files(tmp_path/'store').items()
    assert sorted(content(tmp_path/'store')) == sorted(['.lock', *(file_name(r.video_uid) for r in records)])


def test_a_stale_file_is_never_used(tmp_path):
    "The same length and date, but another video; another rate; another record; other weights: each is written again, once."
    records, argv = records_with(tmp_path)
    model = build_tiny(dict(hidden_size=32, layers=1, vision_size=32, image_size=64))[0].eval()
    folder, source = tmp_path/'store', tmp_path/records[0].video
    videos = lambda: [Video(r, tmp_path/r.video) for r in read_records(tmp_path/'records.jsonl')]
    def write(model=model):
        store, report = write_store(model, videos(), folder)
        assert not store.missing() and not report.failed
        return report.written, report.replaced
    assert write() == (4, 0) and write() == (0, 0)

    data, stat = bytearray(source.read_bytes()), source.stat()
    data[-1] ^= 1                                                       # in the table of contents, in a name that nobody reads
    source.write_bytes(data)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FeatureStore(folder, encoder_fingerprint(model), videos()).missing().keys() == {records[0].video_uid}
    assert write() == (1, 1)
    shorter = dict(duration=records[0].duration - 2)
    for change, changed in ((dict(fps=1.), 1), (shorter, 1), ({}, 1), (shorter, 0)):      # fewer of the same frames are there already
        write_records([records[0].model_copy(update=change), *records[1:]], tmp_path/'records.jsonl')
        assert write() == (changed, changed)
    with torch.no_grad(): model.model.vision_model.post_layernorm.bias[0] += 1e-3
    assert write() == (4, 4)
    model.config.text_config.num_attention_heads = 2                    # says nothing of the frames
    assert write() == (0, 0)


def test_large_files_are_known_by_blocks(tmp_path):
    "The first and the last byte count, and the length."
    path = tmp_path/'large'
    path.write_bytes(random.Random(0).randbytes(9*2**20 + 7))
    known = {hash_video(path)}
    for at in (0, -1):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        (tmp_path/'other').write_bytes(data)
        known.add(hash_video(tmp_path/'other'))
    (tmp_path/'other').write_bytes(path.read_bytes()[:-1])
    assert len(known | {hash_video(tmp_path/'other')}) == 4


def test_numbers_that_do_not_fit(tmp_path):
    "float16 ends at 65504: infinity is refused, and nothing is left."
    model = build_tiny()[0].eval()
    with torch.no_grad(): model.model.connector.modality_projection.proj.weight.mul_(1e6)
    scene = make_scene(0)
    for dtype, failed in (('float16', 1), ('bfloat16', 0)):
        store, report = write_store(model, [Video(scene.record, scene)], tmp_path/dtype, dtype)
        assert (len(report.failed), len(store.missing())) == (failed, failed)
    assert 'try features.dtype=bfloat16' in next(tmp_path.rglob('*.error')).read_text()


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    "A store of four videos, 88 MB each, whose numbers say which frame of which video they are."
    folder, record = tmp_path_factory.mktemp('large'), make_scene(0).record
    videos = [Video(record.model_copy(update=dict(video_uid=f'v{k}', duration=299.5)), make_scene(k)) for k in range(4)]
    store, used = FeatureStore(folder, 'e', videos), []
    def batches(k):
        for i in range(0, 600, 30):
            memory = psutil.Process().memory_info()
            used.append(memory.rss - memory.shared)
            yield (torch.arange(i, i + 30)[:, None, None].expand(-1, 64, 576) + 1000*k)
    for k, v in enumerate(videos): write_tokens(store.path(v.uid), batches(k), (600, 64, 576), 'float32', store.metadata(v.uid))
    assert max(used) - used[3] < 44e6                                   # written as it comes: not even half a file is held
    return store


def test_memory_stays_flat(large):
    "A thousand slices, from all over 354 MB: the process grows by no more than some slices."
    rng, process, most = random.Random(0), psutil.Process(), 0
    for i in range(1000):
        k, start = rng.randrange(4), rng.randrange(600 - 16)
        tokens = large.read(f'v{k}', start, start + 16)                 # 2.4 MB
        assert tokens[0, 0, 0].item() == start + 1000*k and tokens[-1, -1, -1].item() == start + 15 + 1000*k
        if i == 50: start_rss, start_files = process.memory_info().rss, process.num_fds()
        if i > 50: most = max(most, process.memory_info().rss - start_rss)
    assert most < 16e6, f'{most/1e6:.0f} MB more'
    assert process.num_fds() == start_files


class Slices:
    "What a dataset of slices looks like to a DataLoader."
    def __init__(self, store): self.store = store
    def __len__(self): return 40
    def __getitem__(self, i): return self.store.read(f'v{i % 4}', 10*i, 10*i + 2)[:, 0, 0]


@pytest.mark.parametrize('context', ['fork', processes.context])
def test_workers(large, context):
    loader = DataLoader(Slices(large), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert [x.tolist() for x in loader] == [[10*i + 1000*(i % 4), 10*i + 1 + 1000*(i % 4)] for i in range(40)]


# By the published config.json files: image, patch, scale, vision width, heads and MLP, hidden size, tokens. Towers are cut to one layer.
REAL = {'256M': (512, 16, 4, 768, 12, 3072, 576, 64), '500M': (512, 16, 4, 768, 12, 3072, 960, 64),
        '2.2B': (384, 14, 3, 1152, 16, 4304, 2048, 81)}

@pytest.mark.parametrize('name', REAL)
@pytest.mark.parametrize('pooled', [0, 4])
def test_real_shapes(tmp_path, name, pooled):
    image, patch, scale, width, heads, mlp, hidden, tokens = REAL[name]
    text = dict(model_type='llama', vocab_size=64, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    vision = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=heads,
                  image_size=image, patch_size=patch)
    torch.manual_seed(0)
    config = DSTSmolVLMConfig(text_config=text, vision_config=vision, scale_factor=scale, pad_token_id=0, tokens_per_frame=pooled)
    model = DSTSmolVLM(config)
    record = read_records(SAMPLE/'toy.jsonl')[0].model_copy(update=dict(duration=1.))
    store, report = write_store(model.eval(), [Video(record, SAMPLE/record.video)], tmp_path)
    assert not report.failed and store.shape(record.video_uid) == (3, pooled or tokens, hidden)
    per_hour = 7200*(pooled or tokens)*hidden*2
    header = 8 + int.from_bytes(store.path(record.video_uid).read_bytes()[:8], 'little')
    assert (store.path(record.video_uid).stat().st_size - header)*2400 == per_hour
    with safe_open(store.path(record.video_uid), 'pt') as f: assert f.get_tensor('tokens').isfinite().all()


def test_several_dialogues_of_a_video(tmp_path):
    "One file for all of them, long enough for the longest; two videos of one name are refused."
    record = read_records(SAMPLE/'toy.jsonl')[0]
    plain = dict(turns=[], steps=[s.model_copy(update=dict(spans=[(0., 1.)])) for s in record.steps], video=str(SAMPLE/record.video))
    talks = [record.model_copy(update=plain | dict(dialogue=f'd{k}', duration=2. + k)) for k in range(3)]
    for source in ('video', 'replay'):
        (tmp_path/'records.jsonl').write_text('\n'.join(r.to_json() for r in talks))
        cfg = compose_config([*MODEL, 'data=records', f'data.path={tmp_path/"records.jsonl"}', f'data.source={source}',
                              f'features.path={tmp_path/source}'])
        store, report = feature_writer.build_store(cfg)
        assert not report.failed and [store.shape(uid)[0] for uid in store] == ([9] if source == 'video' else [5, 7, 9])
    with pytest.raises(InputError, match='two videos'):
        FeatureStore(tmp_path, 'e', [Video(record, SAMPLE/'toy-test-0-00001.mp4'), Video(record, SAMPLE/record.video)])


@pytest.mark.parametrize('argv', [TOY, [*MODEL, 'data=records', f'data.path={SAMPLE/"toy.jsonl"}'],
                                  [*MODEL, 'data=records', f'data.path={SAMPLE/"toy.jsonl"}', 'data.source=replay']])
def test_the_frames_of_training(argv):
    "The store holds the very frames that training would encode, under the same names."
    cfg = compose_config([*argv, 'features.toy_videos=2'])
    videos = {v.record.uid: v for v in feature_store.list_videos(cfg)}
    scenes = load_scenes(cfg.data, 'train')
    for scene in [scenes[i] for i in range(min(2, len(scenes)))]:
        video = videos[scene.record.uid]
        assert video.record == scene.record and np.array_equal(np.stack(list(video.frames())), scene.frames())


def test_uids_of_every_kind(tmp_path):
    "What a record may be called, a file can be."
    model, scene = build_tiny()[0].eval(), make_scene(0)
    uids = ['a/b', 'a_b', '../../etc/passwd', '.', 'küche', 'A/B', 'x'*5000, 'line\nbreak', '\U0001f600', '"}{\\']
    videos = [Video(VideoRecord(**scene.record.model_dump() | dict(video_uid=uid, duration=.5)), scene) for uid in uids]
    store, report = write_store(model, videos, tmp_path/'store')
    assert report.written == len(uids) and not store.missing() and len(files(tmp_path/'store')) == len(uids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['store'] and all(store[uid].shape == (2, 1, 128) for uid in uids)
