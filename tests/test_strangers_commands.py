"One video, every command: all see the same frames, from the first picture to the last."
import json, os, re, shutil
from pathlib import Path

import numpy as np, pytest

from dst_smolvlm import features, records, stream, train
from dst_smolvlm.data.frames import iter_frames, video_length
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.model.checkpoints import save_model
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.streaming.trace_writer import read_trace
from dst_smolvlm.world.scenes import VideoScene

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))
FRAMES = {'audio-longer-mkv/videos/P90_01.mkv': 8, 'two-video-streams/videos/P90_01.mp4': 8, 'one-bad-video/videos/P90_02.webm': 8,
          'mts-folder/videos/P90_01.MTS': 8, 'joined-segments/segments.ts': 8, 'joined-segments/hls.ts': 12,
          'avi-h264-bframes/bframes.avi': 8, 'mirrored-display-matrix/transpose.mp4': 8}            # at 2 FPS, as FFmpeg decodes them
SMALL = ['model.hidden_size=32', 'model.layers=1', 'model.vision_size=32']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save_model(*build_tiny(dict(hidden_size=32, layers=1, vision_size=32)), tmp_path_factory.mktemp('model')/'small')


@pytest.fixture
def videos(tmp_path, monkeypatch) -> dict[str, int]:
    "The files in a folder of their own, in which commands run: the frames by the path."
    monkeypatch.chdir(tmp_path)
    Path('videos').mkdir()
    found = {f'videos/v{k}{Path(name).suffix}': (CASES/name, count) for k, (name, count) in enumerate(FRAMES.items())}
    for path, (file, _) in found.items():
        if not file.is_file(): pytest.skip(f'{file}: not found')
        shutil.copyfile(file, path)
    return {path: count for path, (_, count) in found.items()}


def test_every_command_sees_the_same_frames(videos, checkpoint, capsys):
    for path, count in videos.items():
        assert video_length(path).frames == len([*iter_frames(path)]) == count
        Path(path).with_suffix('.tsv').write_text('type\tid\tstart_ts\tend_ts\tname\nstep\tS1\t1\t3\tboil the water\n')   # without a length
    records.main(['convert', 'videos', '--videos', 'videos', '--out', 'records.jsonl'])
    found = {r.video: r for r in read_records('records.jsonl')}
    assert {path: round(2*r.duration, 3) for path, r in found.items()} == videos
    records.main(['check', 'records.jsonl'])
    assert re.search(r'^all +1 +8 +8 +0 +0 +0$', capsys.readouterr().out, re.MULTILINE)             # no error, no warning

    given, frames = ['data=records', 'data.path=records.jsonl', *SMALL], {path: r.num_frames() for path, r in found.items()}
    assert all(frames[path] in (count, count + 1) for path, count in videos.items())                # the last one may be seen twice
    assert {path: len(VideoScene(r, Path(path)).frames()) for path, r in found.items()} == frames
    features.main([*given, 'features.path=features', 'features.device=cpu'])
    assert f'8 videos of {sum(frames.values())} frames' in capsys.readouterr().out
    train.main([*given, 'train.dry_run=true', 'output_dir=run'])                                    # it probes the videos
    Path('steps.json').write_text('["boil the water"]')
    for path, count in videos.items():
        out = f'{path}.json'
        stream.main([path, '--steps', 'steps.json', '--checkpoint', str(checkpoint), '--out', out, 'eval.max_reply_tokens=1'])
        assert [f.skipped for f in read_trace(out).frames] == [None]*count


def test_frames_that_change_their_size_are_learned_from(tmp_path, monkeypatch):
    "A transport stream that goes on in another size: each picture is scaled by itself."
    import av
    monkeypatch.chdir(tmp_path)
    for k, size in enumerate(((64, 48), (32, 48))):
        with av.open(f'{k}.ts', 'w') as container:
            film = container.add_stream('libx264', rate=4)
            film.width, film.height, film.pix_fmt = *size, 'yuv420p'
            for i in range(16):
                container.mux(film.encode(av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 40*k + 5*i, np.uint8), format='rgb24')))
            container.mux(film.encode(None))
    Path('tea.ts').write_bytes(Path('0.ts').read_bytes() + Path('1.ts').read_bytes())
    assert {f.image.shape for f in iter_frames('tea.ts')} == {(48, 64, 3), (48, 32, 3)}
    record = dict(video_uid='tea', dataset='mine', duration=7.5, video='tea.ts', steps=[dict(id='S1', name='boil', spans=[[1, 6]])])
    Path('records.jsonl').write_text(json.dumps(record) + '\n')
    train.main(['data=records', 'data.path=records.jsonl', *SMALL, 'train.max_steps=1', 'output_dir=run'])
    assert Path('run/checkpoint/model.safetensors').is_file()
