"""What strangers' files are like: the right frames at the right times, whatever a container says, and one bad file ends nothing."""
import itertools, os, struct
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest
from PIL import Image

from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.display import lay
from dst_smolvlm.data.frames import iter_frames, last_source_frame, read_frames, video_length
from dst_smolvlm.data.pixels import frames_to_pixels
from dst_smolvlm.data.probe import count_frames
from dst_smolvlm.data.schema import RecordError, VideoRecord
from dst_smolvlm.data.video_files import find_videos, playing_time, video_lengths
from dst_smolvlm.records import main as records
from dst_smolvlm.world.scenes import Video

CASES = Path(os.environ.get('DST_CASES', Path(__file__).resolve().parents[2]/'shared'/'cases'))


def case(*names):
    path = CASES.joinpath(*names)
    if not path.exists(): pytest.skip(f'{path}: not found')
    return path


# Clips whose pictures hold their number as eight bars, bright for a 1

def numbered(i, size=(48, 96)):
    bars = np.array([220 if i >> b & 1 else 30 for b in range(8)], np.uint8)[np.arange(size[1])*8//size[1]]
    return np.broadcast_to(bars[None, :, None], (*size, 3)).copy()


def number(image): return sum(int(image[:, (2*b + 1)*image.shape[1]//16].mean() > 125) << b for b in range(8))


def write(target, n=40, first=0, codec='libx264', rate=10, bf=3, size=(48, 96), start=0., sound=0., mux=None, format=None, aspect=None,
          times=None, **options):
    "Pictures `first`, `first + 1`, … ; the first of them at `start` seconds of the file's clock; `sound` in seconds."
    with av.open(str(target) if isinstance(target, Path) else target, 'w', format=format, options=mux or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
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
        assert (playing_time(path), last_source_frame(path), video_length(path)) == (4., (3.9, 4.), (3.9, 8))
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
        else: assert len(seen) >= len(whole) - 6           # half a second and a picture may be rounding
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
    for first, short, size, name in itertools.product((True, False), (True, False), ((32, 64), (48, 96)), ('two.mkv', 'two.mp4')):
        parts = [([numbered(99, size)]*2, 1), ([numbered(i) for i in range(40)], 10)]
        with av.open(str(tmp_path/name), 'w') as container:
            outs = []
            for images, rate in parts if first else parts[::-1]:
                stream = container.add_stream('libx264', rate=rate)
                stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], 'yuv420p'
                if short == (rate == 1): stream.disposition = av.stream.Disposition.default
                outs.append((stream, images))
            for stream, images in outs:
                for image in images: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
                container.mux(stream.encode(None))
        check(tmp_path/name, range(40))
    for name, mark in itertools.product(('cover.mp4', 'cover.mkv'), (av.stream.Disposition.attached_pic, av.stream.Disposition(0))):
        with av.open(str(tmp_path/name), 'w') as container:
            cover, stream = container.add_stream('mjpeg', rate=1), container.add_stream('libx264', rate=10)
            cover.height, cover.width, cover.pix_fmt, cover.disposition = 400, 400, 'yuvj420p', mark
            stream.height, stream.width, stream.pix_fmt = 48, 96, 'yuv420p'
            container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((400, 400, 3), np.uint8), format='rgb24')))
            for i in range(40): container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i), format='rgb24')))
            container.mux(stream.encode(None))
        check(tmp_path/name, range(40))


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
    'back.ts': (dict(start=500.), dict(start=3.)), 'hours.ts': ({}, dict(start=7000.)),
    'pause.ts': ({}, dict(start=20.)), 'disc.vob': (MPEG2, MPEG2), 'program.mpg': (MPEG2, MPEG2),
    'camera.m2ts': ({}, {}), 'browser.webm': (dict(codec='libvpx', bf=None),)*2, 'vp9.webm': (dict(codec='libvpx-vp9', bf=None),)*2,
    'b.mkv': ({}, {}), 'hevc.ts': (dict(codec='libx265', **{'x265-params': 'log-level=none'}),)*2, 'size.ts': ({}, dict(size=(96, 192)))}


@pytest.mark.parametrize('name', JOINED)
def test_the_clock_goes_on_from_the_joint(tmp_path, name):
    a, b = JOINED[name]
    joined = b''.join(write(tmp_path/f'{k}{Path(name).suffix}', 20, 20*k, **how).read_bytes() for k, how in enumerate((a, b)))
    (tmp_path/name).write_bytes(joined)
    check(tmp_path/name, range(40), a.get('rate', 10))


def test_a_recording_that_stood_still_for_a_moment(tmp_path):
    "Less than ten seconds are a pause: the last picture stays."
    (tmp_path/'a.ts').write_bytes(b''.join(write(tmp_path/f'{k}.ts', 20, 20*k, start=1 + 2.5*k).read_bytes() for k in range(2)))
    check(tmp_path/'a.ts', [*range(20), *[19]*5, *range(20, 40)])


def test_a_clock_that_wraps_in_the_middle(tmp_path):
    check(write(tmp_path/'wrap.ts', 40, start=2**33/90000 - 2.), range(40))


def test_what_cannot_be_continued_is_an_error_that_names_the_second(tmp_path):
    fragments = dict(mux={'movflags': 'frag_keyframe+empty_moov+default_base_moof'})
    windows, real = (dict(codec=codec, bf=None) for codec in ('wmv2', 'rv10'))
    for suffix, one, two in (('.flv', {}, {}), ('.mp4', fragments, fragments), ('.ts', {}, dict(mux={'mpegts_start_pid': '0x300'})),
                             ('.wmv', windows, windows), ('.asf', {}, {}), ('.rm', real, real), ('.nut', dict(bf=0), dict(bf=0))):
        path = tmp_path/f'joined{suffix}'
        path.write_bytes(b''.join(write(tmp_path/f'{k}{suffix}', 20, 20*k, **how).read_bytes() for k, how in enumerate((one, two))))
        for read in (lambda p: list(iter_frames(p, 10)), video_length, lambda p: list(iter_frames(p, 10, start=15))):
            with pytest.raises(InputError, match=r'joined.*(after|beyond) (1\.9|2\.[01]) s') as caught: read(path)
            assert '\n' not in str(caught.value)
        with pytest.raises(RecordError, match=r'(1\.9|2\.[01]) s'): playing_time(path)


def test_a_gap_is_a_pause_where_time_stamps_are_a_table(tmp_path):
    "In MP4 and Matroska the last picture stays, as in a player; after a day it is an error."
    for name in ('a.mp4', 'a.mkv'):
        path = write(tmp_path/name, 4, bf=0, times=[0, 1, 2, 6002])
        frames = [number(f.image) for f in iter_frames(path, 1)]
        assert frames == [0] + [2]*600 + [3] or frames == [0] + [2]*600
        assert len(frames) == video_length(path, 1).frames and playing_time(path) == pytest.approx(600.3, abs=.01)
    late = write(tmp_path/'late.mkv', 4, bf=0, times=[0, 1, 2, 10*90000])
    with pytest.raises(InputError, match=r'late.mkv: after 0.3 s its clock jumps by 89999.7 s'): list(iter_frames(late, .1))


# Cut without encoding anew: an edit list that plays parts of an MP4

def edited(path, target, parts):
    "The MP4 with the edit list `parts`: numbers of the first picture, or None for a pause, and how many; at 10 pictures a second."
    data = bytearray(path.read_bytes())
    def numbers(kind, skip, count=1): return struct.unpack_from(f'>{count}i', data, data.index(kind) + skip)
    (film,), (media,), (begin,) = numbers(b'mvhd', 16), numbers(b'mdhd', 16), numbers(b'elst', 16)
    edits = [(n*film//10, -1 if first is None else begin + first*media//10, 1 << 16) for first, n in parts]
    place = data.index(b'elst') - 4
    old, = struct.unpack_from('>i', data, place)
    box = struct.pack(f'>i4s2i{3*len(edits)}i', 16 + 12*len(edits), b'elst', 0, len(edits), *itertools.chain(*edits))
    data[place:place + old] = box
    for kind in (b'edts', b'trak', b'moov'):
        place = data.index(kind) - 4
        struct.pack_into('>i', data, place, struct.unpack_from('>i', data, place)[0] + len(box) - old)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize('bf', [0, 3])
@pytest.mark.parametrize('parts', [
    [(0, 10), (25, 10)], [(10, 10), (10, 10)], [(0, 8), (16, 8), (32, 8)], [(3, 30)], [(None, 8), (9, 13)],
], ids=['two', 'repeated', 'three', 'one', 'late'])
def test_parts_of_an_edit_list(tmp_path, parts, bf):
    path = edited(write(tmp_path/'a.mp4', bf=bf), tmp_path/'b.mp4', parts)
    played = [first + i for first, n in parts if first is not None for i in range(n)]
    check(path, played)
    assert count_frames(path, 10) == (len(played), '')


def test_a_pause_of_an_edit_list(tmp_path):
    path = edited(write(tmp_path/'a.mp4', bf=0), tmp_path/'b.mp4', [(0, 10), (None, 20), (10, 10)])
    played = [number(f.image) for f in iter_frames(path, 10)]
    assert len(played) == video_length(path, 10).frames == 40 and played[:10] == [*range(10)] and played[-10:] == [*range(10, 20)]


def test_an_edit_list_that_goes_back_in_time_is_an_error_everywhere(tmp_path):
    "FFmpeg shows the second part before the end of the first: B-frames are decoded earlier than they are shown."
    path = edited(write(tmp_path/'a.mp4', bf=3, **{'x264-params': 'scenecut=0'}), tmp_path/'b.mp4', [(30, 10), (0, 10)])
    for read in (read_frames, video_length, last_source_frame, lambda path: [*iter_frames(path, start=2)]):
        with pytest.raises(InputError, match=r'its clock jumps by -0\.\d s; convert the video, or cut it there$'): read(path)
    count, why = count_frames(path, 10)
    assert count < 20 and 'its clock jumps' in why


@pytest.mark.parametrize('bf', [0, 3])
def test_whole_mp4_files_of_all_kinds_and_two_in_one(tmp_path, bf):
    kinds = dict(plain='', web='faststart', fragments='empty_moov+frag_keyframe', dash='empty_moov+frag_keyframe+default_base_moof')
    for name, flags in kinds.items():
        for sound in (0,) if 'frag' in flags and not bf else (0, 9):
            check(write(tmp_path/f'{name}{sound}.mp4', bf=bf, sound=sound, mux=dict(movflags=flags) if flags else None), range(40))
    for first, second in (('fragments0', 'fragments0'), ('plain9', 'plain9'), ('plain0', 'web0'), ('fragments0', 'plain0')):
        path = tmp_path/f'{first}-{second}.mp4'
        path.write_bytes(b''.join((tmp_path/f'{part}.mp4').read_bytes() for part in (first, second)))
        for read in (lambda p: list(iter_frames(p, 10)), lambda p: list(iter_frames(p, 10, start=30)), video_length, playing_time):
            with pytest.raises((InputError, RecordError), match='its clock jumps|two recordings were joined'): read(path)


@pytest.mark.parametrize('end', ['#EXT-X-ENDLIST\n', ''], ids=['ended', 'open'])
def test_a_playlist_is_read_from_its_first_segment_and_not_waited_for(tmp_path, end):
    for i in range(5): write(tmp_path/f'{i}.ts', 10, 10*i, bf=0, start=float(i))
    segments = ''.join(f'#EXTINF:1.0,\n{i}.ts\n' for i in range(5))
    (tmp_path/'a.m3u8').write_text(f'#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n{segments}{end}')
    assert [number(f.image) for f in iter_frames(tmp_path/'a.m3u8', 10, timeout=1)] == [*range(50)]
    assert video_length(tmp_path/'a.m3u8', 10, timeout=1).frames == 50


def test_a_transport_stream_that_lost_data_says_so(tmp_path):
    "A gap in the middle of a group of pictures is no joint; a reader that wants to go on may."
    noise = np.random.default_rng(0).integers(0, 256, (60, 12, 16, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(tmp_path/'a.ts'), 'w') as container:
        stream = container.add_stream('libx264', rate=10, options={'sc_threshold': '0'})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.gop_size = 96, 128, 'yuv420p', 20
        for image in noise: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode(None))
    data = (tmp_path/'a.ts').read_bytes()
    packets = [data[i:i+188] for i in range(0, len(data), 188)]
    inside = [i for i, p in enumerate(packets) if p[1:3] == b'\x01\x00']                 # stream 256, not the first of a picture
    lost = inside[len(inside)*5//12]                                                      # far from key frames 20 and 40
    (tmp_path/'lost.ts').write_bytes(b''.join(packets[:lost] + packets[lost+1:]))
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


@pytest.mark.parametrize('suffix', ['mkv', 'mp4', 'mov', 'ts', 'flv'])
def test_b_frames_out_of_avi(tmp_path, suffix):
    "Copied from AVI with its numbers for times: still in the order of showing, in slices too."
    with av.open(str(write(tmp_path/'a.avi', 60))) as source, av.open(str(tmp_path/f'b.{suffix}'), 'w') as target:
        stream = target.add_stream('libx264', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 96, 'yuv420p'
        for packet in source.demux(video=0):
            if packet.dts is None: continue
            packet.pts, packet.stream = packet.dts, stream
            target.mux(packet)
    check(tmp_path/f'b.{suffix}', range(60))


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
@pytest.mark.parametrize('scale', [1, 2])
def test_all_eight_ways_to_lay_a_picture(tmp_path, way, aspect, scale):
    "By what a display matrix means: stored column p, row q is shown at (a·p + c·q, b·p + d·q). Pixels are wide before they are turned."
    image = numbered(5)
    image[:24] //= 3                                                                      # no symmetry
    with av.open(str(tmp_path/'a.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 96, 'yuv420p'
        if aspect: stream.codec_context.sample_aspect_ratio = aspect
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode(None))
    (tmp_path/'b.mp4').write_bytes(with_matrix((tmp_path/'a.mp4').read_bytes(), way, scale))
    stored = np.asarray(Image.fromarray(image).resize((128 if aspect else 96, 48)))
    (a, b, c, d), (q, p) = way, np.indices(stored.shape[:2])
    x, y = a*p + c*q, b*p + d*q
    shown = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), np.uint8)
    shown[y - y.min(), x - x.min()] = stored
    got = read_frames(tmp_path/'b.mp4')[0]
    assert got.shape == shown.shape and np.abs(got.astype(int) - shown).mean() < 8


def test_a_matrix_that_is_nearly_a_turn_or_nothing():
    image = np.arange(12).reshape(3, 4)
    assert (lay(image, (100, 65536, -65536, 100)) == np.rot90(image, -1)).all() and (lay(image, (65000, 900, -900, 65000)) == image).all()


@pytest.mark.parametrize('name,codec', [('a.mpg', 'mpeg2video'), ('a.ts', 'mpeg2video'), ('a.mp4', 'libx264'), ('a.mkv', 'libx264'),
                                        ('a.mov', 'mpeg4'), ('a.avi', 'mpeg4'), ('h.ts', 'libx264')])
def test_wide_and_narrow_pixels(tmp_path, name, codec):
    "PAL and NTSC as a viewer shows them; a number that comes from rounding, or from a mistake, changes nothing."
    for aspect, size, width in (('16/15', (576, 720), 768), ('64/45', (576, 720), 1024), ('8/9', (480, 720), 640), ('1/1', (48, 96), 96)):
        path = write(tmp_path/name, 12, codec=codec, bf=None, rate=25, size=size, aspect=Fraction(aspect))
        frames = read_frames(path, 25)
        assert frames.shape == (12, size[0], width, 3) and [number(f) for f in frames] == list(range(12))
    if name == 'a.mp4':
        for aspect in ('1280/1281', '1/100'):
            assert read_frames(write(path, 2, aspect=Fraction(aspect))).shape[1:] == (48, 96, 3)


def test_aspect_and_size_change_together(tmp_path):
    "From an old recording to a new one: wide pixels at first, square ones then."
    parts = [dict(size=(48, 96), aspect=Fraction(4, 3)), dict(size=(96, 192))]
    (tmp_path/'a.ts').write_bytes(b''.join(write(tmp_path/f'{k}.ts', 20, 20*k, **how).read_bytes() for k, how in enumerate(parts)))
    frames = list(iter_frames(tmp_path/'a.ts', 10))
    assert [f.image.shape[:2] for f in frames] == [(48, 128)]*20 + [(96, 192)]*20 and [number(f.image) for f in frames] == list(range(40))


def test_pictures_of_several_sizes_one_by_one(tmp_path):
    "Each frame has its own size, in any source; an array takes the first's; the model's pixels are those of each image by itself."
    sizes = [(48, 96), (96, 192), (60, 40), (48, 96)]
    for i, size in enumerate(sizes): Image.fromarray(numbered(i, size)).save(tmp_path/f'{i}.png')
    images = [f.image for f in iter_frames(tmp_path, 1, 1)]
    assert [image.shape[:2] for image in images] == sizes and read_frames(tmp_path, 1, 1).shape == (4, 48, 96, 3)
    assert (read_frames(tmp_path, 1, 1)[[0, 3]] == np.stack([images[0], images[3]])).all()
    pixels = frames_to_pixels(images, 64)
    assert pixels.shape == (4, 3, 64, 64) and all(frames_to_pixels([image], 64)[0].equal(p) for image, p in zip(images, pixels))


# Folders

def test_cases_of_folders():
    mac = video_lengths(case('mac-disk', 'videos'))
    assert dict(mac) == dict(P90_01=4.) and [Path(p.file).name for p in mac.problems] == ['._P90_01.mp4'] and mac.problems[0].warning
    assert dict(video_lengths(case('one-bad-video', 'videos'))) == dict(P90_01=4., P90_02=4.)
    mts = video_lengths(case('mts-folder', 'videos'))
    assert dict(mts) == dict(P90_01=4.) and not mts.problems
    nested = video_lengths(case('nested-video-names', 'videos'))
    assert (nested['R1-tea'], nested['R2-tea'], len(nested)) == (4., .1, 2)
    assert nested.path('R1-tea') == case('nested-video-names', 'videos')/'R1-tea'/'Export_py'/'Video_pitchshift.mp4'
    twice = video_lengths(case('same-stem-twice', 'videos'))
    assert 'P90_01' not in twice and twice.get('P90_01') is None and twice.path('P90_01') is None
    problem, = twice.problems
    assert problem.warning and problem.record == 'P90_01'
    assert 'full/P90_01.MP4' in str(problem) and 'preview/P90_01.mp4' in str(problem)


@pytest.mark.parametrize('name', ['mac-disk', 'one-bad-video', 'mts-folder', 'two-video-streams'])
def test_a_folder_of_videos_on_the_command_line(name, capsys):
    folder = case(name)
    records(['check', str(next(p for p in (folder/'labels', folder/'labels.jsonl') if p.exists())), '--videos', str(folder/'videos')])
    assert 'none of the' not in capsys.readouterr().out


def test_the_length_on_the_command_line_is_that_of_the_pictures(capsys):
    folder = case('audio-longer-mkv')
    with pytest.raises(SystemExit): records(['check', str(folder/'labels.jsonl'), '--videos', str(folder/'videos')])
    assert 'duration = 9.0: runs past the end of the video, 4 s' in capsys.readouterr().out


def write_sound(path):
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))


CLIP = {}

@pytest.fixture
def put(tmp_path):
    "Writes copies of one small clip, or something else, under these names."
    if not CLIP: CLIP['data'] = write(tmp_path/'clip.mp4', 8, rate=2, size=(32, 64)).read_bytes(); (tmp_path/'clip.mp4').unlink()
    def put(*names, data=None):
        for name in names:
            (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path/name).write_bytes(CLIP['data'] if data is None else data)
    return put


def test_endings_are_those_that_ffmpeg_knows(tmp_path, put):
    names = ['a.MTS', 'b.ts', 'c.M2TS', 'd.m4v', 'e.MPG', 'f.mpeg', 'g.3gp', 'h.wmv', 'i.FLV', 'j.ogv', 'k.VOB', 'l.mxf', 'm.mkv', 'n.webm',
             'o.asf', 'p.f4v', 'q.mov', 'r.Mp4', 's.avi', 't.dv', 'u.m2v', 'v.3g2']
    put(*names)
    assert [p.name for p in find_videos(tmp_path)[0]] == sorted(names) and set(video_lengths(tmp_path)) == {n.split('.')[0] for n in names}


def opening(monkeypatch):
    "The files that are opened from now on."
    opened, really = [], av.open
    monkeypatch.setattr(av, 'open', lambda path, *args, **options: opened.append(path) or really(path, *args, **options))
    return opened


def test_what_else_lies_in_a_folder_is_not_opened(tmp_path, put, monkeypatch):
    put('P1.mp4')
    put('P1.json', 'P1.txt', 'P1.jpg', 'P1.PNG', 'P1.csv', 'P1.zip', 'P1.srt', 'P1.wav', 'P1.m4a', 'P1.vtt', 'P1.npy', 'P1.bin', 'P2.json',
        'P3.bin', '.DS_Store', 'Thumbs.db', data=b'something else')
    opened = opening(monkeypatch)
    lengths = video_lengths(tmp_path)
    assert not opened and len(lengths) == 1
    assert lengths['P1'] == 4. and 'P2' not in lengths and lengths['P1'] == 4. and 'P1' in lengths
    assert len(opened) == 1 and not lengths.problems
    assert 'P3' not in lengths and not lengths.problems                        # an ending that nobody knows is looked at once
    assert len(opened) == 2 and 'P3' not in lengths and len(opened) == 2


def test_a_video_of_an_unknown_ending_is_one(tmp_path, put):
    "A camera's small copy beside the film is not meant; alone it is."
    put('GX01.LRV', 'GX01.MP4', 'GX02.LRV', 'clip.divx', 'noending')
    lengths = video_lengths(tmp_path)
    assert lengths.path('GX01').name == 'GX01.MP4' and lengths.path('GX02').name == 'GX02.LRV' and not lengths.problems
    assert lengths['GX02'] == lengths['clip'] == lengths['noending'] == 4.


def test_downloads_and_what_macs_leave_are_a_warning_each(tmp_path, put):
    put('good.mp4')
    skipped = ['a.mp4.part', 'b.mp4.crdownload', 'c.mkv.tmp', 'd.part.mp4', 'e.mp4.download/e.mp4', '._good.mp4', '__MACOSX/x/good.mp4',
               '.hidden.mov', 'Unconfirmed 1.crdownload', 'f.MP4.Part']
    put(*skipped)
    put('empty.mp4', data=b'')
    put('notes.tmp', '.DS_Store', '._notes.txt', data=b'-')
    lengths = video_lengths(tmp_path)
    assert list(lengths) == ['good'] and lengths['good'] == 4.
    expected = {name.split('/')[0] for name in skipped} | {'empty.mp4'}
    assert {Path(p.file).name for p in lengths.problems} == expected and len(lengths.problems) == len(expected)
    assert all(p.warning and '\n' not in str(p) for p in lengths.problems)


def test_a_broken_file_is_a_warning_when_it_is_met(tmp_path, put):
    put('good.mp4', 'cut.mp4')
    (tmp_path/'cut.mp4').write_bytes(CLIP['data'][:len(CLIP['data'])//2])
    put('text.mkv', data=b'minutes of the meeting')
    write_sound(tmp_path/'sound.mp4')
    lengths = video_lengths(tmp_path)
    assert not lengths.problems and len(lengths) == 4                          # nothing is opened before it is asked for
    assert lengths.get('cut') is None and 'cut' not in lengths and len(lengths.problems) == 1
    problem = lengths.problems[0]
    assert problem.warning and problem.record == 'cut' and problem.file.endswith('cut.mp4')
    assert 'not a readable video, or cut off' in problem.why
    assert dict(lengths) == dict(good=4.) and [Path(p.file).name for p in lengths.problems] == ['cut.mp4', 'sound.mp4', 'text.mkv']
    with pytest.raises(KeyError): lengths['text']


def test_names_are_stems_or_folders(tmp_path, put):
    put('R1/Export_py/Video.mp4', 'R1-b/Export_py/Video.mp4', 'P01/P01_02/rgb.mp4', 'P01/P01_03/rgb.MP4', 'x/take.1.mp4', 'solo/video.mp4',
        'cams/left.mp4', 'cams/right.mp4', 'stemmed/stemmed.mp4', 'stemmed/other.mp4', 'caf\u00e9.mp4')
    lengths = video_lengths(tmp_path)
    file = lambda uid: lengths.path(uid) and lengths.path(uid).relative_to(tmp_path).as_posix()
    assert file('R1') == 'R1/Export_py/Video.mp4' and file('R1-b') == 'R1-b/Export_py/Video.mp4'
    assert file('P01_02') == file('P01/P01_02') == file('P01/P01_02/rgb') == 'P01/P01_02/rgb.mp4' and file('P01_03') == 'P01/P01_03/rgb.MP4'
    assert file('take.1') == file('x/take.1') == file('take.1.mp4') == 'x/take.1.mp4' and file('solo') == 'solo/video.mp4'
    assert file('stemmed') == 'stemmed/stemmed.mp4' and file('cafe\u0301') == 'caf\u00e9.mp4'
    assert [file(uid) for uid in ('R', 'R1-', 'take', 'P0', 'P02/P01_02', 'Export', '', '/', '..', tmp_path.name)] == [None]*10
    assert not lengths.problems
    assert [file(uid) for uid in ('cams', 'P01', 'rgb', 'Video', 'Export_py')] == [None]*5
    assert [p.record for p in lengths.problems] == ['cams', 'P01', 'rgb', 'Video', 'Export_py']
    assert all(p.warning and p.kind == 'ambiguous' for p in lengths.problems)
    assert file('cams') is None and len(lengths.problems) == 5                 # said once


def test_sound_beside_a_video_is_not_ambiguous_and_a_broken_one_is(tmp_path, put):
    put('a.mp4', 'b.mp4', 'link/c.mp4')
    write_sound(tmp_path/'a.3gp')
    put('b.mkv', data=b'half a download')
    (tmp_path/'c.mp4').symlink_to(tmp_path/'link'/'c.mp4')
    (tmp_path/'loop').symlink_to(tmp_path)
    lengths = video_lengths(tmp_path)
    assert lengths['a'] == 4. and lengths['c'] == 4. and 'b' not in lengths and [p.kind for p in lengths.problems] == ['ambiguous']


def test_a_linked_folder_is_looked_into(tmp_path, put):
    put('disk/P1.mp4')
    (tmp_path/'videos').mkdir()
    (tmp_path/'videos'/'more').symlink_to(tmp_path/'disk')
    assert dict(video_lengths(tmp_path/'videos')) == dict(P1=4.)


def test_a_folder_without_videos(tmp_path, put):
    put('labels.json', 'a.jpg', 'notes', data=b'x'*200)
    with pytest.raises(RecordError, match='a folder without videos'): video_lengths(tmp_path)
    with pytest.raises(RecordError, match='no such folder'): video_lengths(tmp_path/'gone')
    put('only.LRV')
    assert video_lengths(tmp_path)['only'] == 4.


def test_ten_thousand_files_are_only_listed(tmp_path, put, monkeypatch):
    put('f0.mp4')
    for i in range(1, 10000): os.link(tmp_path/'f0.mp4', tmp_path/f'f{i}.mp4')
    opened = opening(monkeypatch)
    lengths = video_lengths(tmp_path)
    assert len(lengths) == 10000 and not opened and lengths['f77'] == 4. and len(opened) == 1
