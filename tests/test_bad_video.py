"""A file that is no video, or only a part of one, gives one InputError that names it."""
import av, numpy as np, pytest

from dst_smolvlm.config import InputError, run_cli
from dst_smolvlm.video import iter_frames, read_frames, write_video


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
    assert 'say how many pictures a second it has' in refused(tmp_path)              # a folder of images


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


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match='even'): write_video(tmp_path/'odd.mp4', np.zeros((2, 47, 64, 3), np.uint8))
    with pytest.raises(ValueError): write_video(tmp_path/'ragged.mp4', [np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)])
    assert list(tmp_path.iterdir()) == []


def test_a_command_says_it_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped: run_cli(lambda argv: read_frames(argv[0]))([str(tmp_path/'missing.mp4')])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == '' and err.count('\n') == 1 and 'missing.mp4' in err
