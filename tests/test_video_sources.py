"""Every source gives the frames that its time-stamps ask for; a slice, the length and the background queue change none of them."""
import gc, http.server, os, socket, subprocess, sys, threading, time, weakref
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest
from PIL import Image

import dst_smolvlm.data.decoding as decoding
import dst_smolvlm.data.frames as video
from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.frames import iter_frames, prefetch, read_frames, video_length


def picture(i, size=(48, 64)):
    "Blocks of random colour, so that no two pictures are alike and none can be guessed from another."
    blocks = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return blocks.repeat(-(-size[0]//6), 0).repeat(-(-size[1]//8), 1)[:size[0], :size[1]]


def write(path, times, codec='libx264', options=None, tick=1000, pix_fmt='yuv420p', size=(48, 64), gop=12, bf=None, mux=None, sound=0,
          shift=0):
    with av.open(str(path), 'w', options=mux or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], pix_fmt
        stream.codec_context.time_base, stream.codec_context.gop_size = Fraction(1, tick), gop
        if bf is not None: stream.codec_context.max_b_frames = bf
        noise = container.add_stream('aac', rate=8000) if sound else None

        def put(packets):
            for packet in packets:
                if shift and packet.dts is not None: packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                container.mux(packet)
        for i, t in enumerate(times):
            shown = av.VideoFrame.from_ndarray(picture(i, size), format='rgb24')
            shown.pts, shown.time_base = round(t*tick), Fraction(1, tick)
            put(stream.encode(shown))
        put(stream.encode(None))
        for k in range(int(sound*8000/1024)):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
            silence.sample_rate, silence.pts, silence.time_base = 8000, 1024*k, Fraction(1, 8000)
            container.mux(noise.encode(silence))
        if sound: container.mux(noise.encode(None))
    return path


N = 72
EVEN = [i/30 for i in range(N)]
UNEVEN = list(3 + np.cumsum(np.random.default_rng(1).integers(1, 130, N))/1000)     # 1 to 129 ms between pictures, from 3 s on
X265 = {'x265-params': 'keyint=12:open-gop=1:bframes=3:log-level=none'}
OPEN = {'bf': '3', 'x264-params': 'open-gop=1:scenecut=0:keyint=12'}
CLIPS = {   # name: (times, how to write it, whether seeking should be exact there)
    'closed.mp4': (UNEVEN, dict(options={'bf': '3'}), True),
    'open.mp4': (UNEVEN, dict(options=OPEN), True),
    'open.mkv': (EVEN, dict(options=OPEN), True),
    'fragments.mp4': (UNEVEN, dict(options={'bf': '3'}, mux={'movflags': 'frag_keyframe+empty_moov'}), True),
    'edit_list.mp4': (EVEN, dict(options={'bf': '2'}, tick=30, shift=-9, mux={'avoid_negative_ts': 'disabled'}), True),
    'refresh.mp4': (EVEN, dict(options={'x264-params': 'intra-refresh=1:keyint=12'}), False),
    'one_key.mp4': (UNEVEN, dict(options={'x264-params': 'scenecut=0:keyint=999:bframes=3'}), False),
    'hevc.mp4': (UNEVEN, dict(codec='libx265', options=X265), True),
    'hevc.mkv': (EVEN, dict(codec='libx265', options=X265), True),
    'vp9.webm': (UNEVEN, dict(codec='libvpx-vp9', options={'deadline': 'realtime', 'auto-alt-ref': '1', 'lag-in-frames': '16'}), True),
    'vp8.webm': (UNEVEN, dict(codec='libvpx', options={'deadline': 'realtime', 'auto-alt-ref': '1', 'lag-in-frames': '16'}), True),
    'mpeg4.mp4': (UNEVEN, dict(codec='mpeg4', bf=2), True),
    'mpeg2.mkv': (EVEN, dict(codec='mpeg2video', bf=2, tick=30), True),
    'sound.mkv': (EVEN, dict(options={'bf': '3'}, sound=5), True),
    'stream.ts': (UNEVEN, dict(options={'bf': '3'}), False),
    'camera.avi': (EVEN, dict(codec='mpeg4', bf=2, tick=30), False),
    'b_frames.avi': (EVEN, dict(options={'bf': '3'}, tick=30), False),
    'clip.flv': (UNEVEN, dict(options={'bf': '3'}), False),
}


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clips')
    for name, (times, how, _) in CLIPS.items(): write(folder/name, times, **how)
    data, still, quarter = (folder/'closed.mp4').read_bytes(), (1, 0, 0, 0, 1, 0, 0, 0, 16384), (0, 1, 0, -1, 0, 0, 0, 0, 16384)
    matrix = lambda values: b''.join(int(65536*v).to_bytes(4, 'big', signed=True) for v in values)
    at = data.index(matrix(still), data.index(b'tkhd'))
    (folder/'turned.mp4').write_bytes(data[:at] + matrix(quarter) + data[at+36:])
    return folder


def same(ours, theirs):
    assert [(f.index, f.time) for f in ours] == [(f.index, f.time) for f in theirs]
    assert all((a.image == b.image).all() for a, b in zip(ours, theirs))


@pytest.mark.parametrize('name', [*CLIPS, 'turned.mp4'])
def test_a_slice_and_the_length_are_those_of_the_whole(clips, name, monkeypatch):
    decoded, decode = [], decoding._decoded
    def counting(*args):
        for item in decode(*args): decoded.append(item[0]); yield item
    monkeypatch.setattr(decoding, '_decoded', counting)
    for fps in (2, 7.3, 30):
        whole = list(iter_frames(clips/name, fps))
        assert video_length(clips/name, fps).frames == len(whole)
        for start in (*range(1, len(whole) - 1, max(1, len(whole)//5)), len(whole) - 1, len(whole), len(whole) + 9):
            for stop in (start + 2, None): same(list(iter_frames(clips/name, fps, start=start, stop=stop)), whole[start:stop])
    decoded.clear()
    assert video_length(clips/name).seconds == max(time for time, *_ in video._source_frames(clips/name, None, 0, 5))
    pictures = len(decoded)
    decoded.clear()
    assert len(list(iter_frames(clips/name, 30, start=len(whole) - 2))) == 2
    if CLIPS.get(name, CLIPS['closed.mp4'])[2]: assert len(decoded) <= 24 < pictures          # two groups of pictures at most
    else: assert len(decoded) >= pictures


def test_the_length_is_read_without_decoding(clips, monkeypatch):
    monkeypatch.setattr(decoding, '_decoded', lambda *args: pytest.fail('decodes'))
    for name in ('closed.mp4', 'open.mkv', 'vp9.webm', 'stream.ts', 'clip.flv'): assert video_length(clips/name).frames > 1


def test_time_stamps_and_not_counts(clips):
    "The frames of a clip of uneven pace are those of its time-stamps; counting pictures would take others."
    path, times = clips/'closed.mp4', np.array(UNEVEN).round(3) - round(UNEVEN[0], 3)
    with av.open(str(path)) as container: shown = [p.to_ndarray(format='rgb24') for p in container.decode(video=0)]
    right, counted = [], []
    for frame in iter_frames(path, 5):
        taken = [i for i, image in enumerate(shown) if (image == frame.image).all()]
        assert taken == [np.flatnonzero(times <= frame.index/5 + 1e-9)[-1]]
        right += taken
        counted.append(round(frame.index*(N - 1)/times[-1]/5))
    assert len(right) > 15 and sum(a != b for a, b in zip(right, counted)) > len(right)/2


def test_an_edit_list_hides_the_pictures_before_it(clips):
    with av.open(str(clips/'edit_list.mp4')) as container: assert any(p.is_discard for p in container.demux(video=0))
    assert len(read_frames(clips/'edit_list.mp4', 30)) == N - 9 == video_length(clips/'edit_list.mp4', 30).frames


def test_damage_is_told_as_decoding_from_the_start_tells_it(clips, tmp_path):
    with av.open(str(clips/'closed.mp4')) as source, av.open(str(tmp_path/'web.mp4'), 'w', options={'movflags': 'faststart'}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None: packet.stream = stream; target.mux(packet)
    data = (tmp_path/'web.mp4').read_bytes()
    for share in (.3, .6, .9):
        half = tmp_path/f'{share}.mp4'
        half.write_bytes(data[:int(len(data)*share)])
        with pytest.raises(InputError) as whole: read_frames(half, 30)
        with pytest.raises(InputError) as part: read_frames(half, 30, start=130)
        with pytest.raises(InputError, match=f'{half}: .*cut off'): video_length(half, 30)
        assert str(part.value) == str(whole.value) and 'cut off after' in str(whole.value)


@pytest.mark.parametrize('read', [read_frames, video_length])
def test_refusals(tmp_path, read):
    (tmp_path/'text.mp4').write_bytes(b'no video'*99)
    (tmp_path/'empty').mkdir()
    array = np.zeros((4, 8, 8, 3), np.uint8)
    for source, options, message in (
            (tmp_path/'text.mp4', {}, 'text.mp4: not a readable video'), (tmp_path/'no.mp4', {}, 'no.mp4: no such video file'),
            (tmp_path/'empty', dict(source_fps=1), 'empty: a folder without images'), (array, {}, 'source_fps=None'),
            (array, dict(source_fps=0), 'source_fps=0'), (array, dict(source_fps=float('nan')), 'source_fps=nan'),
            (array[:0], dict(source_fps=1), 'no source frames'), (tmp_path/'text.mp4', dict(source_fps=5), 'time-stamps of its own'),
            ('gopher://127.0.0.1/x', {}, 'gopher://127.0.0.1/x'), (5, {}, 'int: '),
            (array, dict(source_fps=1, fps=-1), 'must be positive')):
        with pytest.raises(InputError, match=message) as caught: read(source, **options)
        assert '\n' not in str(caught.value)


# Rates: a picture made for a frame is shown in it, whatever its time-stamp was rounded to

NTSC = {29.97: Fraction(30000, 1001), 23.976: Fraction(24000, 1001), 59.94: Fraction(60000, 1001), 25: Fraction(25)}


def numbered(path, rate, count):
    "Picture `i` shows the number `i` as two grey squares, one for each digit."
    with av.open(str(path), 'w') as container:
        stream = container.add_stream({'.mkv': 'ffv1', '.ts': 'libx264'}.get(path.suffix, 'mpeg4'), rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, 'yuv420p'
        for i in range(count):
            shown = np.repeat(np.array([[i//10, i % 10]], np.uint8)*24 + 12, 32, 1).repeat(32, 0)
            shown = av.VideoFrame.from_ndarray(shown[..., None].repeat(3, 2), format='rgb24')
            shown.time_base, shown.pts = 1/rate, i
            container.mux(stream.encode(shown))
        container.mux(stream.encode(None))
    return path


def numbers(frames): return [10*(int(f.image[:, 4:28].mean())//24) + int(f.image[:, 36:60].mean())//24 for f in frames]


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.avi', '.ts'])
@pytest.mark.parametrize('fps', NTSC)
def test_no_picture_is_lost_at_its_own_rate(tmp_path, fps, suffix):
    "The rate as people write it and as it is, for a file that has the one or the other; and the last frame of any number of pictures."
    for real in {NTSC[fps], Fraction(fps).limit_denominator(1001)}:
        if suffix == '.ts' and real != NTSC[fps]: continue                     # no rate of MPEG
        for count in (1, 2, 90) if suffix != '.ts' else (90,):                 # FFmpeg recognises no shorter stream of plain pictures
            path = numbered(tmp_path/f'a{suffix}', real, count)
            for asked in (fps, float(NTSC[fps])):
                assert numbers(iter_frames(path, asked)) == list(range(count))
                assert video_length(path, asked).frames == count
    for start, stop in ((1, 3), (44, None), (89, 90), (90, None)):
        assert numbers(iter_frames(path, fps, start=start, stop=stop)) == list(range(90))[start:stop]


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.avi'])
@pytest.mark.parametrize('fps', [.5, 2, 7.3, 23.976, 29.97, 30, 59.94, 2000])
def test_other_rates(tmp_path, fps, suffix):
    "Frame `i` is the last picture at or before `i / fps`; three quarters of a millisecond are no difference."
    for real in NTSC.values():
        path = numbered(tmp_path/f'a{suffix}', real, 70)
        seen = numbers(iter_frames(path, fps))
        assert video_length(path, fps).frames == len(seen)
        rounding = .001 if suffix == '.mkv' else 0
        for i, number in enumerate(seen):
            assert number/real <= i/fps + .00075 + rounding + 1e-9
            assert number == 69 or (number + 1)/real >= i/fps + .00075 - rounding - 1e-9
        assert len(seen)/fps > 69/real - rounding                              # the next frame would come after the last picture


def test_a_picture_a_millisecond_late_is_late():
    pairs = [(t, picture(k)) for k, t in enumerate((0, .4, .501, .9, 1.0005, 1.499))]
    assert [[k for k in range(6) if (f.image == picture(k)).all()] for f in iter_frames(pairs, 2)] == [[0], [1], [4]]


# Sizes, formats and names

ODD = 47, 63

@pytest.mark.parametrize('name,how', [
    ('odd.mkv', dict(codec='ffv1', pix_fmt='yuv444p', size=ODD)), ('odd.avi', dict(codec='rawvideo', pix_fmt='bgr24', size=ODD, tick=30)),
    ('odd_420.mkv', dict(codec='ffv1', size=ODD)), ('odd_h264.mp4', dict(pix_fmt='yuv444p', size=ODD)),
    ('odd.mov', dict(codec='png', pix_fmt='rgb24', size=ODD)), ('odd_jpeg.mkv', dict(codec='mjpeg', pix_fmt='yuvj420p', size=ODD)),
    ('thin.mkv', dict(codec='ffv1', pix_fmt='yuv444p', size=(6, 701))), ('ten_bits.mp4', dict(pix_fmt='yuv420p10le')),
    ('ten_bits_hevc.mkv', dict(codec='libx265', pix_fmt='yuv420p10le', options=X265)),
    ('sixteen_bits.mkv', dict(codec='ffv1', pix_fmt='gray16le')), ('grey.mp4', dict(pix_fmt='gray')),
    ('alpha.mov', dict(codec='png', pix_fmt='rgba')), ('alpha.mkv', dict(codec='ffv1', pix_fmt='yuva420p')),
    ('10:30 tea, no 100%03d?.mkv', dict())])
def test_sizes_and_pixel_formats(tmp_path, name, how):
    path = write(tmp_path/name, EVEN[:31], **how)
    frames, size = read_frames(path), how.get('size', (48, 64))
    assert frames.shape == (3, *size, 3) and frames.dtype == np.uint8 and frames.flags.c_contiguous
    true = np.stack([picture(i, size) for i in (0, 15, 30)]).astype(float)
    if 'gray' in how.get('pix_fmt', ''): true = (true @ (.299, .587, .114))[..., None]
    assert np.abs(frames - true).mean() < (2 if 'ffv1' in how.get('codec', '') and '444' in how.get('pix_fmt', '') else 25)
    assert video_length(path) == (1, 3)


@pytest.mark.parametrize('name', ['one.mp4', 'one.mkv', 'one.avi', 'one.ts'])
def test_one_picture(tmp_path, name):
    path = write(tmp_path/name, [0], tick=30)
    assert read_frames(path).shape == (1, 48, 64, 3) and video_length(path) == (0, 1)
    assert list(iter_frames(path, start=1)) == []
    with pytest.raises(InputError, match='no frames from 1 to 2'): read_frames(path, start=1, stop=2)


def test_a_picture_file_is_a_video_of_one(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path/'still-001.png')
    assert (read_frames(tmp_path/'still-001.png') == picture(0)).all()


def test_a_title_in_latin_1_is_no_damage(tmp_path):
    with av.open(str(tmp_path/'title.mkv'), 'w') as container:
        container.metadata['title'] = 'creme brulee'
        stream = container.add_stream('libx264', rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for i in range(9): container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), format='rgb24')))
        container.mux(stream.encode(None))
    data = (tmp_path/'title.mkv').read_bytes()
    assert b'creme brulee' in data
    (tmp_path/'title.mkv').write_bytes(data.replace(b'creme brulee', 'crème brulée'.encode('latin-1')))
    assert len(read_frames(tmp_path/'title.mkv')) == 2


# Folders, arrays, pairs

def test_a_folder_in_natural_order(tmp_path):
    kinds = ('png', 'PNG', 'bmp', 'tiff', 'webp')
    for i in range(1, 24):
        Image.fromarray(picture(i)).save(tmp_path/f'img{i}.{kinds[i % 5]}', **(dict(lossless=True) if i % 5 == 4 else {}))
    (tmp_path/'._img3.png').write_bytes(b'not an image'), (tmp_path/'times.csv').write_text('0,1')
    assert (read_frames(tmp_path, 10, source_fps=10) == np.stack([picture(i) for i in range(1, 24)])).all()
    assert (read_frames(tmp_path, 2, source_fps=10) == np.stack([picture(i) for i in (1, 6, 11, 16, 21)])).all()
    assert (read_frames(str(tmp_path), 2, 10, start=3) == np.stack([picture(i) for i in (16, 21)])).all()
    assert video_length(tmp_path, 2, 10) == (2.2, 5)


def test_a_bad_image_is_named(tmp_path):
    for i in range(6): Image.fromarray(picture(i)).save(tmp_path/f'{i}.jpg')
    whole = (tmp_path/'4.jpg').read_bytes()
    for content in (whole[:len(whole)//2], b'', b'minutes of the meeting', whole[:3]):
        (tmp_path/'4.jpg').write_bytes(content)
        with pytest.raises(InputError) as caught: read_frames(tmp_path, 1, 1)
        assert str(caught.value).startswith(f'{tmp_path}/4.jpg: not a readable image')
    assert len(read_frames(tmp_path, 1, 3)) == 2                                       # pictures 0 and 3: the bad one is not wanted here
    Image.fromarray(picture(4, (60, 80))).save(tmp_path/'4.jpg')
    assert [f.image.shape[:2] for f in iter_frames(tmp_path, 1, 1)] == [(48, 64)]*4 + [(60, 80), (48, 64)]
    assert read_frames(tmp_path, 1, 1).shape == (6, 48, 64, 3)


def test_images_as_a_viewer_shows_them(tmp_path):
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6                                                                           # held upright: turn clockwise
    alpha, grey16 = np.dstack([image, np.zeros((48, 64), np.uint8)]), image[..., 0].astype(np.uint16)*257
    for name, made, options, expected in (
            ('turned', Image.fromarray(image), dict(exif=exif), np.rot90(image, -1)), ('alpha', Image.fromarray(alpha), {}, image),
            ('grey', Image.fromarray(image[..., 0]), {}, image[..., [0, 0, 0]]),
            ('grey16', Image.fromarray(grey16), {}, image[..., [0, 0, 0]])):
        (tmp_path/name).mkdir()
        made.save(tmp_path/name/'0.png', **options)
        assert (read_frames(tmp_path/name, source_fps=1)[0] == expected).all(), name


def test_arrays_and_pairs(tmp_path):
    array = np.stack([picture(i) for i in range(20)])
    frames = read_frames(array, 2, 10)
    assert (frames == array[[0, 5, 10, 15]]).all() and not np.shares_memory(next(iter_frames(array, 2, 10)).image, array)
    assert (read_frames(((100 + t, p) for t, p in zip((0, .1, .2, .9, 1.), array)), 2) == array[[0, 2, 4]]).all()
    times = [0, .5, .4]
    with pytest.raises(InputError, match='times must not go back'): read_frames(zip(times, array), 2)
    for wrong in (list(array), [(0, array[0]), 5], [('now', array[0])], [(float('nan'), array[0])], []):
        with pytest.raises(InputError): read_frames(wrong, 2)
    for wrong in (array/255, array[..., :1], array[0], array.astype(int)):
        with pytest.raises(InputError, match=r'must be uint8 \[H, W, 3\]'): read_frames(wrong, 2, 10)


# Addresses: only the loopback here

class Server:
    "Answers the first connection with `reply`, then stalls or closes."
    def __init__(self, reply=b'', stall=False):
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.port, self.stop = self.socket.getsockname()[1], threading.Event()
        threading.Thread(target=self.serve, args=(reply, stall), daemon=True).start()
    def serve(self, reply, stall):
        while not self.stop.is_set():
            try: connection, _ = self.socket.accept()
            except OSError: return
            with connection:
                try:
                    if reply: connection.recv(4096), connection.sendall(reply)
                    if stall: self.stop.wait(20)
                except OSError: pass
    def __enter__(self): return self
    def __exit__(self, *_): self.stop.set(), self.socket.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch): monkeypatch.setenv('no_proxy', '127.0.0.1')


@pytest.mark.parametrize('scheme', ['http', 'rtsp', 'tcp', 'rtmp'])
def test_an_address_that_never_answers(scheme):
    with Server(stall=True) as server:
        began = time.monotonic()
        with pytest.raises(InputError) as caught: read_frames(f'{scheme}://anna:secret@127.0.0.1:{server.port}/live', timeout=.5)
        assert time.monotonic() - began < 10 and 'secret' not in str(caught.value) and '\n' not in str(caught.value)
        assert str(caught.value).startswith(f'{scheme}://127.0.0.1:{server.port}/live: ')


def test_nobody_there():
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    for scheme in ('http', 'rtsp'):
        url = f'{scheme}://127.0.0.1:{port}/a.mp4'
        with pytest.raises(InputError, match=f'{url}: '): read_frames(url, timeout=2)


HEAD = b'HTTP/1.0 200 OK\r\nContent-Type: video/mp2t\r\nConnection: close\r\n\r\n'


def test_a_live_stream(clips):
    "Its times count from the first picture, whatever the sender's clock; it has no length; it may be joined anywhere."
    data, whole = (clips/'stream.ts').read_bytes(), list(iter_frames(clips/'stream.ts', 5))
    chunks = b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in (data[i:i+5000] for i in range(0, len(data), 5000)))
    chunked = HEAD.replace(b'1.0', b'1.1').replace(b'Connection: close', b'Transfer-Encoding: chunked')
    with Server(chunked + chunks + b'0\r\n\r\n') as server:
        url = f'http://127.0.0.1:{server.port}/live.ts'
        same(list(iter_frames(url, 5)), whole)
        same(list(iter_frames(url, 5, start=4, stop=9)), whole[4:9])
        with pytest.raises(InputError, match='a live stream has no length'): video_length(url)
    with Server(HEAD + data) as server:              # a sender that just closes: pictures that the decoder still holds are lost
        frames = list(iter_frames(f'http://127.0.0.1:{server.port}/live.ts', 5))
        assert len(frames) >= len(whole) - 3
        same(frames, whole[:len(frames)])
    with Server(HEAD + data[len(data)//188//3*188:]) as server:                                 # in the middle of a group of pictures
        late = list(iter_frames(f'http://127.0.0.1:{server.port}/live.ts', 5))
    assert late[0].time == 0 and 5 < len(late) < len(whole)


def test_a_live_stream_that_stops_coming(clips):
    data = (clips/'stream.ts').read_bytes()
    with Server(HEAD + data[:len(data)*3//4], stall=True) as server:
        seen = []
        with pytest.raises(InputError, match=r'live.ts: timed out: no data for 0.5 s after \d'):
            for frame in prefetch(iter_frames(f'http://127.0.0.1:{server.port}/live.ts', 5, timeout=.5)): seen.append(frame)
    assert len(seen) > 5
    same(seen, list(iter_frames(clips/'stream.ts', 5))[:len(seen)])


def test_a_sender_that_starts_anew(clips, tmp_path):
    data = (clips/'stream.ts').read_bytes()
    later = write(tmp_path/'later.ts', [t + 500 for t in UNEVEN]).read_bytes()
    with Server(HEAD + data + later) as server:
        with pytest.raises(InputError, match='its clock jumps'): list(iter_frames(f'http://127.0.0.1:{server.port}/live.ts', 5))


def test_a_file_at_an_address(clips):
    "Through a server that can send parts of a file and one that cannot."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(clips))
        def log_message(self, *_): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/open.mkv'
        same(list(iter_frames(url, 5, start=6)), list(iter_frames(clips/'open.mkv', 5, start=6)))
        assert video_length(url) == video_length(clips/'open.mkv')
        server.shutdown()


# The queue

def threads(): return [t for t in threading.enumerate() if t.name == 'prefetch']


class Source:
    "Items 0, 1, …: says how many were made and whether it was closed."
    def __init__(self, n=10**9, fails=None): self.made, self.closed, self.n, self.fails = 0, False, n, fails
    def __iter__(self): return self
    def close(self): self.closed = True
    def __next__(self):
        if self.fails and self.made == self.n: raise self.fails
        if self.made == self.n: raise StopIteration
        self.made += 1
        return self.made - 1


def test_same_items_in_the_same_order():
    for size in (1, 2, 50): assert list(prefetch(Source(200), size)) == list(range(200))
    assert list(prefetch([])) == [] and list(prefetch('abc')) == ['a', 'b', 'c'] and list(prefetch([None, None])) == [None, None]
    with pytest.raises(InputError, match='size=0'): prefetch([], 0)
    assert not threads()


@pytest.mark.parametrize('error', [InputError('clip.mp4: cut off'), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_an_error_comes_after_the_good_items(error):
    source, seen = Source(5, error), []
    ahead = prefetch(source, 2)
    with pytest.raises(type(error)) as caught:
        for item in ahead: seen.append(item)
    assert caught.value is error and seen == [0, 1, 2, 3, 4] and source.closed and not threads()
    assert list(ahead) == []                                                    # as a generator after its error


def test_a_slow_consumer_is_not_overtaken():
    source = Source()
    ahead = prefetch(source, 3)
    for i in range(20):
        assert next(ahead) == i
        time.sleep(.01)
        assert source.made <= i + 1 + 3 + 1
    ahead.close()
    assert source.closed and not threads()


@pytest.mark.parametrize('stop', ['break', 'close', 'del', 'error', 'interrupt', 'cycle'])
def test_who_stops_early_stops_the_thread(stop):
    source, error = Source(), {'error': ZeroDivisionError, 'interrupt': KeyboardInterrupt}.get(stop)
    def consume():
        ahead = prefetch(source, 2)
        if stop == 'cycle': ahead.me = ahead
        for item in ahead:
            if item == 3:
                if error: raise error
                if stop == 'close': ahead.close(); assert not threads()
                return
    if error:
        with pytest.raises(error): consume()
    else: consume()
    gc.collect()
    assert source.closed and source.made <= 4 + 3 and not threads()


def test_the_file_is_closed(clips):
    if not os.path.isdir('/proc/self/fd'): pytest.skip('no /proc')
    def is_open(): return any(os.path.realpath(f'/proc/self/fd/{fd}') == str(clips/'closed.mp4') for fd in os.listdir('/proc/self/fd'))
    ahead = prefetch(iter_frames(clips/'closed.mp4', 30), 2)
    next(ahead)
    assert is_open()
    ahead.close()
    assert not is_open()
    frames = iter_frames(clips/'closed.mp4', 30)
    next(frames), frames.close()
    assert not is_open()
    assert len(list(iter_frames(clips/'closed.mp4', 30, stop=3))) == 3 and not is_open()


def test_two_at_once_and_one_in_another(clips):
    whole = list(iter_frames(clips/'closed.mp4', 30))
    first, second = prefetch(iter_frames(clips/'closed.mp4', 30), 2), prefetch(prefetch(iter_frames(clips/'closed.mp4', 30), 1), 3)
    for ours, a, b in zip(whole, first, second, strict=True): same([a, b], [ours, ours])
    del first, second
    outer = prefetch(prefetch(Source(), 2), 2)
    next(outer)
    del outer
    gc.collect()
    assert not threads()


def test_the_interpreter_ends():
    "Forgotten queues, one full and one waiting for its source, do not keep the program."
    code = ('import itertools, time\nfrom dst_smolvlm.data.frames import prefetch\n'
            'full, waiting = prefetch(itertools.count(), 2), prefetch(iter(lambda: time.sleep(300), 1), 2)\nprint(next(full))')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, '0\n', '')


# Memory

@pytest.mark.parametrize('wrap', [iter, lambda frames: prefetch(frames, 4)])
def test_a_long_file_is_never_held(tmp_path_factory, wrap):
    "2,000 frames of .7 MB: a handful of images live at any time, and the process does not grow."
    path = tmp_path_factory.getbasetemp()/'long.mp4'
    if not path.exists():
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('libx264', rate=30, options={'preset': 'ultrafast'})
            stream.width, stream.height, stream.pix_fmt = 640, 360, 'yuv420p'
            plain = av.VideoFrame.from_ndarray(np.full((360, 640, 3), 90, np.uint8), format='rgb24')
            for i in range(2000): plain.pts = i; container.mux(stream.encode(plain))
            container.mux(stream.encode(None))
    statm = Path('/proc/self/statm')
    def resident(): return int(statm.read_text().split()[1])*os.sysconf('SC_PAGE_SIZE') if statm.exists() else 0
    dead, most, grown = [], 0, 0
    for n, frame in enumerate(wrap(iter_frames(path, 30)), 1):
        weakref.finalize(frame.image, dead.append, n)
        most = max(most, n - len(dead))
        if n == 200: grown = resident()
    assert n == 2000 and most <= 2
    assert resident() - grown < 60e6                                            # 1,800 images would be 1,240 MB
