"""What strangers' files are like: the right frames at the right times, whatever a container says, and one bad file ends nothing."""
import io, itertools, os
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest
from PIL import Image

from dst_smolvlm.annotation import RecordError, VideoRecord
from dst_smolvlm.config import InputError
from dst_smolvlm.features import Video
from dst_smolvlm.footage import find_videos, playing_time, video_lengths
from dst_smolvlm.picture import lay
from dst_smolvlm.records import main as records
from dst_smolvlm.video import frames_to_pixels, iter_frames, last_picture, read_frames, video_length

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))


def case(*names):
    path = CASES.joinpath(*names)
    if not path.exists(): pytest.skip(f'{path}: not found')
    return path


# Clips whose pictures hold their number as seven bars, bright for a 1

def numbered(i, size=(48, 96)):
    bars = np.array([220 if i >> b & 1 else 30 for b in range(8)], np.uint8)
    return np.broadcast_to(bars.repeat(size[1]//8)[None, :, None], (*size, 3)).copy()


def number(image): return sum(int(image[:, (2*b + 1)*image.shape[1]//16].mean() > 125) << b for b in range(8))


def write(target, n=40, first=0, codec='libx264', rate=10, bf=3, size=(48, 96), pix_fmt='yuv420p', start=0., sound=0., mux=None, format=None,
          aspect=None, times=None, **options):
    "Pictures `first`, `first + 1`, … ; the first of them at `start` seconds of the file's clock; `sound` in seconds."
    with av.open(str(target) if isinstance(target, Path) else target, 'w', format=format, options=mux or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if bf is not None: stream.codec_context.max_b_frames, stream.codec_context.gop_size = bf, 12
        if aspect: stream.codec_context.sample_aspect_ratio = aspect
        noise = container.add_stream('aac', rate=8000) if sound else None
        def put(packets):
            for packet in packets:
                if packet.dts is not None: packet.pts, packet.dts = (t + round(start/packet.time_base) for t in (packet.pts, packet.dts))
                container.mux(packet)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(numbered(first + i, size), format='rgb24')
            frame.pts, frame.time_base = times[i] if times else i, 1/Fraction(rate)
            put(stream.encode(frame))
        put(stream.encode(None))
        for k in range(int(sound*8000/1024)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            silence.sample_rate, silence.pts, silence.time_base = 8000, 1024*k, Fraction(1, 8000)
            container.mux(noise.encode(silence))
        if noise: container.mux(noise.encode(None))
    return target


def check(path, numbers, rate=10):
    "Every command's way to the file says these numbers: whole, in slices, at lower rates; and its length."
    whole = list(iter_frames(path, rate))
    assert [number(f.image) for f in whole] == list(numbers) and [f.time for f in whole] == [i/rate for i in range(len(whole))]
    assert video_length(path, rate).frames == len(whole) and playing_time(path) == pytest.approx(len(whole)/rate, abs=.002)
    for start in range(1, len(whole), 7):
        assert [number(f.image) for f in iter_frames(path, rate, start=start, stop=start + 3)] == list(numbers)[start:start+3]
    for fps in (2, 5):
        slow = [number(f.image) for f in iter_frames(path, fps)]
        assert slow == [numbers[min(int(i*rate/fps + 1e-6), len(numbers) - 1)] for i in range(len(slow))]
        assert len(slow) == video_length(path, fps).frames == int(np.ceil(len(whole)*fps/rate - 1e-6))


def as_a_record(path):
    "A record that is as long as its video says has all its frames, but perhaps the one at the very end."
    record = VideoRecord(video_uid='a', dataset='mine', duration=playing_time(path), steps=[dict(id='S1', name='boil', spans=[[0, .1]])])
    assert record.num_frames() - video_length(path, record.fps).frames in (0, 1)
    assert len(list(Video(record, path).frames())) == record.num_frames()


# Lengths

def test_a_longer_sound_and_a_preview_change_nothing():
    for path in (case('audio-longer-mkv', 'videos', 'P90_01.mkv'), case('two-video-streams', 'videos', 'P90_01.mp4')):
        assert (playing_time(path), last_picture(path), video_length(path)) == (4., (3.9, 4.), (3.9, 8))
        assert len(read_frames(path)) == 8 and len(read_frames(path, 10)) == 40
        as_a_record(path)


def test_a_recording_from_a_browser_has_its_length():
    path = case('one-bad-video', 'videos', 'P90_02.webm')
    assert (playing_time(path), video_length(path, 10).frames, len(read_frames(path, 10))) == (4., 40, 40)
    as_a_record(path)


@pytest.mark.parametrize('name', ['a.mkv', 'a.mp4', 'a.mov', 'a.avi', 'a.flv', 'a.ts'])
def test_sound_of_any_length(tmp_path, name):
    for sound in (1., 9.):
        check(write(tmp_path/name, sound=sound), range(40))
        as_a_record(tmp_path/name)


@pytest.mark.parametrize('name', ['a.mkv', 'a.flv', 'a.avi', 'a.mp4'])
@pytest.mark.parametrize('sound', [0., 1., 9.])
def test_truncated_is_still_truncated(tmp_path, name, sound):
    "Also where a longer sound hides that the pictures are not all there; a file that lost sound only may be used."
    data = write(tmp_path/name, sound=sound, mux={'movflags': 'faststart'} if name == 'a.mp4' else {}).read_bytes()
    whole = [number(f.image) for f in iter_frames(tmp_path/name, 10)]
    for share in (.3, .5, .7, .9):
        (tmp_path/name).write_bytes(data[:int(len(data)*share)])
        seen = []
        try:
            for f in iter_frames(tmp_path/name, 10): seen.append(number(f.image))
        except InputError as e: assert str(e).startswith(f'{tmp_path/name}: ') and 'cut off' in str(e)
        else: assert seen == whole
        if share < .5: assert len(seen) < 40
    with pytest.raises(InputError, match='cut off'): (tmp_path/name).write_bytes(data[:len(data)*3//10]), video_length(tmp_path/name)


class Pipe:
    "A target that cannot go back, as a live recording's."
    def __init__(self): self.data = bytearray()
    def write(self, data): self.data += bytes(data); return len(data)


@pytest.mark.parametrize('format,codec', [('matroska', 'libx264'), ('webm', 'libvpx'), ('flv', 'libx264'), ('mpegts', 'libx264')])
def test_recorded_live(tmp_path, format, codec):
    "No duration, no index."
    pipe = write(Pipe(), format=format, codec=codec)
    (tmp_path/'live').write_bytes(pipe.data)
    check(tmp_path/'live', range(40))
    as_a_record(tmp_path/'live')


@pytest.mark.parametrize('name', ['a.mp4', 'a.mkv', 'a.avi', 'a.ts', 'a.webm'])
def test_pictures_that_last_for_seconds(tmp_path, name):
    "Of a time-lapse the last picture is shown as long as the others."
    codec = 'libvpx' if name == 'a.webm' else 'libx264'
    for rate, seconds in ((1, 1), (Fraction(1, 5), 5)):
        path = write(tmp_path/name, 8, rate=rate, codec=codec)
        frames = [number(f.image) for f in iter_frames(path, 2)]
        assert frames == [i//(2*seconds) for i in range(16*seconds)] and playing_time(path) == pytest.approx(8*seconds, abs=.01)
        assert video_length(path).frames == len(frames)
        as_a_record(path)


def test_the_film_among_streams(tmp_path):
    "A preview is none, first or last, marked as default or not; nor is a cover."
    for first, short in itertools.product((True, False), (True, False)):
        parts = [([numbered(99, (32, 64))]*2, 1), ([numbered(i) for i in range(40)], 10)]
        with av.open(str(tmp_path/'two.mkv'), 'w') as container:
            outs = []
            for images, rate in parts if first else parts[::-1]:
                stream = container.add_stream('libx264', rate=rate)
                stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], 'yuv420p'
                if short == (rate == 1): stream.disposition = av.stream.Disposition.default
                outs.append((stream, images))
            for stream, images in outs:
                for image in images: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
                container.mux(stream.encode(None))
        check(tmp_path/'two.mkv', range(40))
    with av.open(str(tmp_path/'cover.mp4'), 'w') as container:
        cover, stream = container.add_stream('mjpeg', rate=1), container.add_stream('libx264', rate=10)
        cover.height, cover.width, cover.pix_fmt, cover.disposition = 400, 400, 'yuvj420p', av.stream.Disposition.attached_pic
        stream.height, stream.width, stream.pix_fmt = 48, 96, 'yuv420p'
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((400, 400, 3), np.uint8), format='rgb24')))
        for i in range(40): container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format='rgb24')))
        container.mux(stream.encode(None))
    check(tmp_path/'cover.mp4', range(40))


# Clocks

def test_segments_joined():
    for name, count in (('segments.ts', 40), ('hls.ts', 60)):
        path = case('joined-segments', name)
        with av.open(str(path)) as container: pictures = [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]
        assert len(pictures) == count and video_length(path, 10) == (pytest.approx((count - 1)/10), count)
        assert playing_time(path) == pytest.approx(count/10)
        assert all((f.image == p).all() for f, p in zip(iter_frames(path, 10), pictures, strict=True))
        assert all((f.image == pictures[20 + k]).all() for k, f in enumerate(iter_frames(path, 10, start=20, stop=25)))
        assert len(read_frames(path)) == count//5
        as_a_record(path)


def test_a_record_of_joined_segments_is_read(capsys):
    records(['check', str(case('joined-segments', 'segments.jsonl'))])
    assert ' 1         1         1         0         0         0' in capsys.readouterr().out


MPEG2 = dict(codec='mpeg2video', bf=2, rate=25)
JOINED = {   # name → how its two parts differ
    'same.ts': ({}, {}), 'plain.ts': (dict(bf=0), dict(bf=0)), 'delay.ts': (dict(bf=0), dict(bf=3)), 'ahead.ts': (dict(bf=3), dict(bf=0)),
    'back.ts': (dict(start=500.), dict(start=3.)), 'hours.ts': ({}, dict(start=7000.)), 'wrap.ts': (dict(start=2**33/90000 - 2), {}),
    'near.ts': ({}, dict(start=2.5)), 'pause.ts': ({}, dict(start=20.)), 'disc.vob': (MPEG2, MPEG2), 'program.mpg': (MPEG2, MPEG2),
    'camera.m2ts': ({}, {}), 'browser.webm': (dict(codec='libvpx', bf=None),)*2, 'vp9.webm': (dict(codec='libvpx-vp9', bf=None),)*2,
    'b.mkv': ({}, {}), 'hevc.ts': (dict(codec='libx265', **{'x265-params': 'log-level=none'}),)*2, 'size.ts': ({}, dict(size=(96, 192)))}


@pytest.mark.parametrize('name', JOINED)
def test_the_clock_goes_on_from_the_joint(tmp_path, name):
    a, b = JOINED[name]
    joined = b''.join(write(tmp_path/f'{k}{Path(name).suffix}', 20, 20*k, **how).read_bytes() for k, how in enumerate((a, b)))
    (tmp_path/name).write_bytes(joined)
    check(tmp_path/name, range(40), a.get('rate', 10))


def test_a_clock_that_wraps_in_the_middle(tmp_path):
    check(write(tmp_path/'wrap.ts', 40, start=2**33/90000 - 2.), range(40))


def test_what_cannot_be_continued_is_an_error_that_names_the_second(tmp_path):
    fragments = dict(mux={'movflags': 'frag_keyframe+empty_moov+default_base_moof'})
    for suffix, one, two in (('.flv', {}, {}), ('.mp4', fragments, fragments), ('.ts', {}, dict(mux={'mpegts_start_pid': '0x300'}))):
        path = tmp_path/f'joined{suffix}'
        path.write_bytes(b''.join(write(tmp_path/f'{k}{suffix}', 20, 20*k, **how).read_bytes() for k, how in enumerate((one, two))))
        for read in (lambda p: list(iter_frames(p, 10)), video_length, lambda p: list(iter_frames(p, 10, start=15))):
            with pytest.raises(InputError, match=r'joined.*(after|beyond) 2\.0 s') as caught: read(path)
            assert '\n' not in str(caught.value)
        with pytest.raises(RecordError, match='2.0 s'): playing_time(path)


def test_a_gap_is_a_pause_where_time_stamps_are_a_table(tmp_path):
    "In MP4 and Matroska the last picture stays, as in a player; after a day it is an error."
    for name in ('a.mp4', 'a.mkv'):
        path = write(tmp_path/name, 4, bf=0, times=[0, 1, 2, 6002])
        frames = [number(f.image) for f in iter_frames(path, 1)]
        assert frames == [0] + [2]*600 + [3] or frames == [0] + [2]*600
        assert len(frames) == video_length(path, 1).frames and playing_time(path) == pytest.approx(600.3, abs=.01)
    late = write(tmp_path/'late.mkv', 4, bf=0, times=[0, 1, 2, 10*90000])
    with pytest.raises(InputError, match=r'late.mkv: after 0.3 s its clock jumps by 89999.7 s'): list(iter_frames(late, .1))


def test_a_transport_stream_that_lost_data_says_so(tmp_path):
    "A gap in the middle of a group of pictures is no joint; whoever wants to go on may."
    data = write(tmp_path/'a.ts', 60, bf=0, size=(240, 320), crf='1').read_bytes()
    with av.open(str(tmp_path/'a.ts')) as container: packets = [p.pos for p in container.demux(video=0) if p.size]
    middle = packets[41]//188*188
    (tmp_path/'lost.ts').write_bytes(data[:middle + 188] + data[middle + 3*188:])
    with pytest.raises(InputError, match=r'lost.ts: not a readable video, or cut off after \d\.\d s'): list(iter_frames(tmp_path/'lost.ts'))
    assert len(list(iter_frames(tmp_path/'lost.ts', 10, damaged='skip'))) == 60


# The order of pictures

def test_b_frames_in_avi():
    path = case('avi-h264-bframes', 'bframes.avi')
    with av.open(str(path)) as container: pictures = [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]   # in order
    for fps in (10, 5, 2):
        frames = list(iter_frames(path, fps))
        assert len(frames) == 4*fps == video_length(path, fps).frames
        assert all((f.image == pictures[f.index*10//fps]).all() for f in frames)
    assert playing_time(path) == 4.


@pytest.mark.parametrize('how', [
    dict(bf=1), dict(bf=3), dict(bf=6, **{'b-pyramid': 'normal'}), dict(bf=16, b_strategy='0', sc_threshold='0', g='60'), dict(bf=0),
    dict(bf=3, **{'x264-params': 'open-gop=1:keyint=12'}), dict(bf=3, **{'x264-params': 'tff=1'}), dict(codec='mpeg4', bf=2),
    dict(codec='mpeg4', bf=4), dict(codec='mpeg2video', bf=2, rate=25), dict(codec='msmpeg4v2', bf=None)], ids=str)
def test_any_b_frames_in_avi(tmp_path, how):
    check(write(tmp_path/'a.avi', 60, **how), range(60), how.get('rate', 10))


# As a viewer shows it

FOUR = 'base', 'hflip', 'vflip', 'transpose'

def test_mirrored_display_matrices():
    for name, corner in zip(FOUR, ('top left', 'top right', 'bottom left', 'top left')):
        image = read_frames(case('mirrored-display-matrix', f'{name}.mp4'))[0].mean(2)
        h, w = (n//4 for n in image.shape)
        corners = {'top left': image[:h, :w], 'top right': image[:h, -w:], 'bottom left': image[-h:, :w], 'bottom right': image[-h:, -w:]}
        assert [c for c, part in corners.items() if part.mean() > 128] == [corner]
        assert image.shape == ((96, 64) if name == 'transpose' else (64, 96))


EIGHT = [*((a, 0, 0, d) for a in (1, -1) for d in (1, -1)), *((0, b, c, 0) for b in (1, -1) for c in (1, -1))]

def with_matrix(data, way, scale=1):
    pack = lambda a, b, c, d: b''.join(int(65536*v).to_bytes(4, 'big', signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 16384))
    at = data.index(pack(1, 0, 0, 1), data.index(b'tkhd'))
    return data[:at] + pack(*(scale*v for v in way)) + data[at+36:]


@pytest.mark.parametrize('way', EIGHT)
@pytest.mark.parametrize('aspect', [None, Fraction(4, 3)])
def test_all_eight_ways_to_lay_a_picture(tmp_path, way, aspect):
    "By what a display matrix means: stored column p, row q is shown at (a·p + c·q, b·p + d·q). Pixels are wide before they are turned."
    data = write(tmp_path/'a.mp4', 4, first=5, aspect=aspect).read_bytes()
    stored = np.asarray(Image.fromarray(numbered(5)).resize((128 if aspect else 96, 48)))
    stored[:24] //= 3                                                                     # no symmetry
    with av.open(str(tmp_path/'a.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 96, 'yuv420p'
        if aspect: stream.codec_context.sample_aspect_ratio = aspect
        half = numbered(5)
        half[:24] //= 3
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format='rgb24')))
        container.mux(stream.encode(None))
    data = (tmp_path/'a.mp4').read_bytes()
    (tmp_path/'b.mp4').write_bytes(with_matrix(data, way))
    a, b, c, d = way
    h, w = stored.shape[:2]
    shown = np.zeros((w, h, 3) if b else (h, w, 3), np.uint8)
    for q, p in itertools.product(range(h), range(w)):
        x, y = a*p + c*q, b*p + d*q
        shown[y if y >= 0 and (b or d) > 0 else y - 1 + shown.shape[0] + (1 if (b or d) < 0 else 0), x if (a or c) > 0 else x + shown.shape[1] - 1] = stored[q, p]
    got = read_frames(tmp_path/'b.mp4')[0]
    assert got.shape == shown.shape and np.abs(got.astype(int) - shown).mean() < 8
