"""A file that is no video, or only a part of one, gives one InputError that names it."""
import av, numpy as np, pytest
from PIL import Image

import dst_smolvlm.data.container as containers
import dst_smolvlm.data.decoding as decoding
from dst_smolvlm.core.config import InputError, run_cli
from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.frames import iter_frames, prefetch, read_frames, video_length


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "Ten seconds of noise at 10 pictures a second, with the table of contents in front."
    folder, noise = tmp_path_factory.mktemp('clip'), np.random.default_rng(0).integers(0, 256, (100, 48, 64, 3), dtype=np.uint8)
    write_video(folder/'whole.mp4', noise, fps=10)
    with av.open(str(folder/'whole.mp4')) as source, av.open(str(folder/'web.mp4'), 'w', options={'movflags': 'faststart'}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None: packet.stream = stream; target.mux(packet)
    return folder


def refused(path):
    with pytest.raises(InputError) as caught: read_frames(path)
    assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)
    return str(caught.value)


def test_missing(tmp_path):
    assert 'no such video file' in refused(tmp_path/'missing.mp4')
    assert 'say how many frames a second it has' in refused(tmp_path)              # a folder of images


@pytest.mark.parametrize('content', [b'', b'these are the minutes of the meeting\n'*50, b'{"video_uid": "tea"}', bytes(5000)])
def test_not_a_video(tmp_path, content):
    (tmp_path/'text.mp4').write_bytes(content)
    assert 'not a readable video' in refused(tmp_path/'text.mp4')


@pytest.mark.parametrize('share', [.01, .1, .3, .5, .7, .9, .94])
@pytest.mark.parametrize('name', ['whole.mp4', 'web.mp4'])
def test_truncated(clip, tmp_path, name, share):
    data = (clip/name).read_bytes()
    (tmp_path/name).write_bytes(data[:int(len(data)*share)])
    refused(tmp_path/name)


def test_truncated_between_two_packets(clip, tmp_path):
    with av.open(str(clip/'web.mp4')) as container: ends = sorted(p.pos + p.size for p in container.demux(video=0) if p.size)
    for n in (1, 20, 90):
        (tmp_path/'short.mp4').write_bytes((clip/'web.mp4').read_bytes()[:ends[n]])
        assert 'cut off after' in refused(tmp_path/'short.mp4')


def test_damaged_in_the_middle(clip, tmp_path):
    data = bytearray((clip/'web.mp4').read_bytes())
    middle = len(data)//2
    data[middle:middle+len(data)//5] = bytes(len(data)//5)
    (tmp_path/'hole.mp4').write_bytes(data)
    assert 'not a readable video' in refused(tmp_path/'hole.mp4')


def test_no_frames(tmp_path):
    with av.open(str(tmp_path/'none.mp4'), 'w', options={'movflags': 'frag_keyframe+empty_moov'}) as container:
        stream = container.add_stream('libx264', rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        container.start_encoding()
    assert 'no frames' in refused(tmp_path/'none.mp4')


def test_sound_only(tmp_path):
    with av.open(str(tmp_path/'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format='fltp', layout='mono')
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert 'no video stream' in refused(tmp_path/'sound.mp4')


def test_no_time_stamps(clip, tmp_path):
    with av.open(str(clip/'whole.mp4')) as source, av.open(str(tmp_path/'bare.h264'), 'w', format='h264') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None: packet.stream = stream; target.mux(packet)
    assert 'no time-stamps' in refused(tmp_path/'bare.h264')


def test_frames_before_the_damage_are_given(clip, tmp_path):
    "A stream does not know its end: what came whole is shown, then the error comes."
    data = (clip/'web.mp4').read_bytes()
    (tmp_path/'half.mp4').write_bytes(data[:len(data)//2])
    frames, seen = iter_frames(tmp_path/'half.mp4'), []
    with pytest.raises(InputError, match='cut off'):
        for frame in frames: seen.append(frame)
    whole = read_frames(clip/'web.mp4')
    assert len(seen) > 3 and all((f.image == whole[f.index]).all() for f in seen)


# Damage in the middle, and a reader that wants to go on

def overwrite(path, target, numbers, header=0):
    "`path` with the contents of the packets `numbers` overwritten; the time-stamp of each."
    with av.open(str(path)) as container:
        packets = [(p.pos + header, p.size, p.pts*p.time_base) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for k in numbers: at, size, _ = packets[k]; data[at:at+size-header] = b'\xa5'*(size - header)
    target.write_bytes(data)
    return [float(packets[k][2]) for k in numbers]


def pictures_of(path, codec, pix_fmt, count=40, **options):
    blocks = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for image in blocks: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize('suffix,header', [('avi', 0), ('mkv', 9)])
@pytest.mark.parametrize('numbers', [[0], [17], [15, 16, 17], [39], [0, 1, 20, 38, 39]])
def test_every_picture_a_key_frame(tmp_path, suffix, header, numbers):
    "Exactly the frames in question have no image, at the pictures' rate and below it, in a slice, and through the queue."
    whole = pictures_of(tmp_path/f'a.{suffix}', 'mjpeg', 'yuvj420p')
    bad = tmp_path/f'bad.{suffix}'
    overwrite(whole, bad, numbers, header)
    for fps in (10, 5, 2):
        true, got = list(iter_frames(whole, fps)), list(prefetch(iter_frames(bad, fps, damaged='skip'), 2))
        assert [f[:2] for f in got] == [f[:2] for f in true] and len(got) == video_length(whole, fps).frames
        assert [f.index for f in got if f.image is None] == [i for i in range(len(true)) if i*10//fps in numbers]
        assert all((f.image == t.image).all() for f, t in zip(got, true) if f.image is not None)
        part = list(iter_frames(bad, fps, start=3, stop=6, damaged='skip'))
        assert all((a.image is None) == (b.image is None) and a[:2] == b[:2] for a, b in zip(part, got[3:6], strict=True))
    for read in (lambda: list(iter_frames(bad, 10)), lambda: read_frames(bad, 10)):
        with pytest.raises(InputError, match='not a readable video, or cut off'): read()


@pytest.mark.parametrize('bf', ['0', '3'])
@pytest.mark.parametrize('k', [0, 1, 12, 15, 24, 39])
def test_pictures_predicted_from_others(tmp_path, k, bf):
    "The clock is right, the damaged packet's time has no image, and from the next key frame on all is as it was."
    whole = pictures_of(tmp_path/'a.mp4', 'libx264', 'yuv420p', g='12', sc_threshold='0', bf=bf)
    time, = overwrite(whole, tmp_path/'bad.mp4', [k])
    true, got = list(iter_frames(whole, 10)), list(iter_frames(tmp_path/'bad.mp4', 10, damaged='skip'))
    assert [f[:2] for f in got] == [f[:2] for f in true]
    with av.open(str(whole)) as container: keys = sorted(float(p.pts*p.time_base) for p in container.demux(video=0) if p.is_keyframe)
    first = [t for t in keys if t <= time][-1]
    begin, end = round(10*(first - .4)), round(10*min([t for t in keys if t > time], default=99))
    assert got[round(10*time)].image is None
    for f, t in zip(got, true):
        if not begin <= f.index < end: assert f.image is not None and (f.image == t.image).all(), f.index
    with pytest.raises(InputError): list(iter_frames(tmp_path/'bad.mp4', 10))


def test_nothing_is_skipped_where_nothing_is_damaged(clip):
    for a, b in zip(iter_frames(clip/'whole.mp4', 30), iter_frames(clip/'whole.mp4', 30, damaged='skip'), strict=True):
        assert a[:2] == b[:2] and (a.image == b.image).all()
    with pytest.raises(InputError, match="damaged=ignore: unknown; write 'error' or 'skip'"):
        next(iter_frames(clip/'whole.mp4', damaged='ignore'))


@pytest.mark.parametrize('share', [.4, .7, .95])
def test_a_file_cut_off_is_an_error_all_the_same(clip, tmp_path, share):
    data, seen = (clip/'web.mp4').read_bytes(), {'error': [], 'skip': []}
    (tmp_path/'half.mp4').write_bytes(data[:int(len(data)*share)])
    messages = []
    for damaged, frames in seen.items():
        with pytest.raises(InputError, match='cut off after') as caught:
            for f in iter_frames(tmp_path/'half.mp4', 10, damaged=damaged): frames.append(f)
        messages.append(str(caught.value))
    whole = read_frames(clip/'web.mp4', 10)
    assert messages[0] == messages[1] and len(seen['skip']) >= len(seen['error']) > 10
    assert all((f.image == whole[f.index]).all() for f in seen['skip'])


def test_only_damage(tmp_path):
    overwrite(pictures_of(tmp_path/'a.avi', 'mjpeg', 'yuvj420p', 9), tmp_path/'bad.avi', range(9))
    with pytest.raises(InputError, match='bad.avi: the video has no frames'): list(iter_frames(tmp_path/'bad.avi', damaged='skip'))


def test_a_damaged_image_of_a_folder_and_a_pair_without_one(tmp_path):
    for i in range(4): Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path/f'{i}.png')
    (tmp_path/'2.png').write_bytes((tmp_path/'2.png').read_bytes()[:20])
    assert [f.image is None for f in iter_frames(tmp_path, 2, 2, damaged='skip')] == [False, False, True, False]
    with pytest.raises(InputError, match='2.png: not a readable image'): list(iter_frames(tmp_path, 2, 2))
    image = np.zeros((8, 8, 3), np.uint8)
    pairs = [(0, image), (.4, None), (.6, image), (1.1, None), (1.3, image)]
    assert [f.image is None for f in iter_frames(pairs, 2, damaged='skip')] == [False, True, False]
    with pytest.raises(InputError, match='a source frame must be uint8'): list(iter_frames(pairs, 2))


def test_damage_on_the_way(tmp_path, monkeypatch):
    "A live stream passes it over; with 'skip' only a frame before which nothing newer came has no image."
    whole = pictures_of(tmp_path/'a.avi', 'mjpeg', 'yuvj420p')
    overwrite(whole, tmp_path/'bad.avi', [4, 15, 22, 23, 24, 25])
    true, opened = read_frames(whole, 2), decoding.open_source
    class Live:
        "A container that knows no end, as a camera's."
        def __init__(self, container): self.container, self.duration = container, None
        def __getattr__(self, name): return getattr(self.container, name)
        def __enter__(self): return self
        def __exit__(self, *_): self.container.close()
    monkeypatch.setattr(decoding, 'open_source', lambda *args: Live(opened(*args)))
    monkeypatch.setitem(containers._CAMERAS, 'avi', {})
    got, shown = list(iter_frames(tmp_path/'bad.avi', damaged='skip')), list(iter_frames(tmp_path/'bad.avi'))
    assert [f.index for f in got] == [f.index for f in shown] == list(range(len(true)))
    assert [f.index for f in got if f.image is None] == [3, 5] and all((f.image == true[f.index]).all() for f in got if f.image is not None)
    assert all(f.image is not None for f in shown)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match='even'): write_video(tmp_path/'odd.mp4', np.zeros((2, 47, 64, 3), np.uint8))
    with pytest.raises(ValueError): write_video(tmp_path/'ragged.mp4', [np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_a_command_says_it_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped: run_cli(lambda argv: read_frames(argv[0]))([str(tmp_path/'missing.mp4')])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == '' and err.count('\n') == 1 and 'missing.mp4' in err
