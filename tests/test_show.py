"""The live picture: any frame, names and words give a picture of one size; a video is whole or not there; hours cost what minutes do."""
import os, signal, sys, threading, time, types
from pathlib import Path

import av, numpy as np, pytest
from processes import start

import dst_smolvlm.data.container as containers
import dst_smolvlm.data.decoding as decoding
import dst_smolvlm.viz.canvas as canvas
import dst_smolvlm.viz.live_view as live_view
import dst_smolvlm.viz.state_strip as state_strip
import dst_smolvlm.viz.video_output as show
from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.frames import iter_frames, prefetch, read_frames, video_length
from dst_smolvlm.streaming.reference_traces import example_trace
from dst_smolvlm.viz.canvas import fit_image
from dst_smolvlm.viz.live_view import Screen
from dst_smolvlm.core.states import STATE_COLORS
from dst_smolvlm.viz.state_strip import SPEAK, LaneStrip
from dst_smolvlm.viz.video_output import VideoWriter, open_window, replay, source_address

HALF = dict(speak=.5, update=.5)
GREY = np.full((48, 64, 3), 90, np.uint8)
ODD_TEXTS = ['', ' ', '\n', 'x'*5000, 'a b '*2000, '赤い円を箱2に入れる', '📦➡️👩‍🔧🏳️‍🌈', 'ضع الدائرة',
             '\x00\x1b[31m', '\ud800', 'e\u0301'*300, '\u202eabc',
             '<b>&amp;</b> $x_1$ %s {}', 'Ünïcödé ß ẞ']


def hexes(pixels): return {'#%02X%02X%02X' % tuple(p) for p in np.unique(pixels.reshape(-1, 3), axis=0)}


# Pictures

@pytest.mark.parametrize('size', [(32, 32), (33, 57), (1, 1), (1, 4000), (4000, 1), (1920, 1080), (2160, 3840), (4320, 7680), (301, 77)],
                         ids=lambda s: f'{s[1]}x{s[0]}')
def test_frames_of_any_size_keep_their_proportions(size):
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[:(size[0] + 1)//2, :, 1] = 200, 200                   # yellow above, red below
    screen = Screen(['a'], size=(640, 360))
    picture = screen.draw(image, [0], 0, 0, HALF)
    assert picture.shape == (360, 640, 3) and picture.dtype == np.uint8
    left, top, width, height = screen.camera
    inside = picture[top:top + height, left:left + width, 0] > 120
    h, w = inside.any(1).sum(), inside.any(0).sum()
    assert (h, w) == tuple(max(1, round(v*min(height/size[0], width/size[1]))) for v in size)
    if size[0] > 1:                                                            # upright, and centred
        ys = np.flatnonzero(inside.any(1))
        assert picture[top + ys[0], left + width//2, 1] > 120 > picture[top + ys[-1], left + width//2, 1]
        assert abs((ys[0] + ys[-1])/2 - (height - 1)/2) <= 1


def test_frames_that_change_their_size_leave_nothing_behind():
    one, other = Screen(['a']), Screen(['a'])
    one.draw(np.full((50, 100, 3), 255, np.uint8), [0], 0, 0, HALF)
    upright = np.full((100, 50, 3), 120, np.uint8)
    assert (one.draw(upright, [0], 0, 0, HALF) == other.draw(upright, [0], 0, 0, HALF)).all()


@pytest.mark.parametrize('image', [None, np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), GREY/255, 'a'],
                         ids=str)
def test_what_is_no_frame(image):
    with pytest.raises(InputError, match=r'must be uint8 \[H, W, 3\]'): Screen(['a']).draw(image, [0], 0, 0, HALF)


def test_a_view_of_a_frame_and_a_read_only_one():
    turned = np.rot90(np.arange(30*20*3, dtype=np.uint8).reshape(30, 20, 3))
    fixed = turned.copy()
    fixed.flags.writeable = False
    assert (fit_image(turned, (200, 100)) == fit_image(fixed, (200, 100))).all()


@pytest.mark.parametrize('size', [(1280, 720), (1920, 1080), (640, 360), (480, 270), (640, 480), (3840, 720)], ids=str)
@pytest.mark.parametrize('S', [0, 1, 4, 16, 17, 30, 40, 200])
def test_any_number_of_steps(S, size):
    screen = Screen([f'put part {k} into its box' for k in range(S)], size=size)
    state = np.arange(S) % 3
    said = [('user', 'What now?'), ('assistant', 'That one. '*40)]
    for i in range(3): picture = screen.draw(GREY, state, .9, .2, HALF, said, i/2, 'late')
    assert picture.shape == (size[1], size[0], 3)
    x, y = screen.lanes_at
    column = picture[y:y + len(screen.strip.pixels), x + 8]
    for s, value in enumerate(state if S <= 40 else []):
        if screen.strip.edges[s] < screen.strip.edges[s + 1]: assert hexes(column[screen.strip.edges[s]][None]) == {STATE_COLORS[value]}
    boxes = [screen.camera, screen.words.box, *screen.bars, (x, y, screen.strip.pixels.shape[1], len(column))]
    for a, (left, top, width, height) in enumerate(boxes):                     # the parts lie in the picture and beside one another
        assert 0 <= left and 0 <= top and width > 0 and height > 0 and left + width <= size[0] and top + height <= size[1]
        for l2, t2, w2, h2 in boxes[a + 1:]: assert left + width <= l2 or l2 + w2 <= left or top + height <= t2 or t2 + h2 <= top


def test_forty_steps_are_all_named_and_two_hundred_are_counted():
    assert len(Screen([str(k) for k in range(40)]).steps.names) == 40
    many = Screen([str(k) for k in range(200)]).steps
    assert 40 <= len(many.names) < 200 and len(many.names) == 2*many.rows - 1


@pytest.mark.parametrize('text', ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text(text):
    screen = Screen([text]*30, goal=text)
    for i in range(3):
        picture = screen.draw(GREY, [i]*30, i/2, 1 - i/2, HALF, [('user', text), ('assistant', text), (text, text)], i, text)
    assert picture.shape == (720, 1280, 3)
    plain = canvas.plain_line(text)
    assert len(plain) <= 500 and (plain.isprintable())
    for width in (20, 300):
        for lines in (1, 3):
            wrapped = canvas.wrap_text(plain, canvas._font(16), width, lines)
            assert len(wrapped) <= lines and all(len(line) <= 2 or canvas._font(16).getlength(line) <= width for line in wrapped)
            rest = ''.join(wrapped).replace(' ', '').removesuffix('…')
            assert plain.replace(' ', '').startswith(rest)                     # in order, and nothing made up


def test_a_long_name_does_not_leave_its_column():
    plain, long = (Screen([name]*20) for name in ('a', 'w'*300))
    a, b = (s.draw(GREY, [0]*20, 0, 0, HALF) for s in (plain, long))
    where = np.argwhere((a != b).any(-1))
    left, top, width, height = plain.camera
    assert where[:, 1].min() > left + width and where[:, 0].min() >= top and where[:, 0].max() < plain.bars[0][1]
    second = plain.steps.left + plain.steps.width
    gap = [b[plain.steps.top:plain.bars[0][1] - 1, x] for x in range(second - 4, second)]
    assert (np.stack(gap) == 255).all()


@pytest.mark.parametrize('state', [[0], [0, 0, 0], [0, 3], [0, -1], [0, .5], [0, float('nan')], [[0, 0]]])
def test_a_state_that_is_none(state):
    screen = Screen(['a', 'b'])
    with pytest.raises(InputError, match='for each of 2 steps'): screen.draw(GREY, state, 0, 0, HALF)
    assert screen.strip.last == -1                                             # nothing was added


@pytest.mark.parametrize('time_s', [float('nan'), float('inf'), -float('inf')])
def test_a_time_that_is_none(time_s):
    with pytest.raises(InputError, match='time'): Screen(['a']).draw(GREY, [0], 0, 0, HALF, time_s=time_s)


@pytest.mark.parametrize('size', [(641, 480), (640, 481), (400, 268), (720, 1280), (0, 0)])
def test_a_size_that_is_none(size):
    with pytest.raises(InputError, match='even numbers'): Screen(['a'], size=size)


def test_probabilities_outside_of_the_scale():
    for prob in (float('nan'), float('inf'), -1, 7, np.float32(.3)):
        for threshold in (0, 1, 2.): Screen(['a']).draw(GREY, [0], prob, prob, dict(speak=threshold, update=threshold))


def test_a_bar_is_as_long_as_its_probability():
    screen = Screen(['a'])
    def filled(prob, threshold):
        left, top, width, height = screen.bars[0]
        row = screen.draw(GREY, [0], prob, 0, dict(speak=threshold, update=.5))[top + height//2, left + width//3:left + width]
        return sum('#%02X%02X%02X' % tuple(p) == SPEAK for p in row)
    assert filled(.4, .5) == 0 < filled(.5, .5) < filled(.9, .5)
    assert filled(.9, .95) == 0 and abs(filled(.8, .1) - 2*filled(.4, .1)) < 12


def test_words_stay_and_go():
    screen = Screen(['a'])
    left, top, width, height = screen.words.box
    def ink(t, said=()): return int((screen.draw(GREY, [0], 0, 0, HALF, said, t)[top:top + height, left:left + width] < 255).any(-1).sum())
    assert ink(0) == 0
    full = ink(1, [('assistant', 'Take the ladder.')])
    assert ink(4.9) == full > 0 and ink(7.5) == 0
    assert ink(8, [('assistant', 'word '*60)]) == ink(30) > 0 == ink(34)       # a long one is kept for longer
    assert ink(200) == 0
    many = [('user', f'{k} '*9) for k in range(50)]
    assert ink(300, many) > 0 and len(screen.words.said) <= 4 and screen.words.shown[0][2] == [canvas.plain_line(many[-1][1])]


def test_a_note_can_be_read():
    screen, W = Screen(['a']), 1280
    def header(t, note=''): return screen.draw(GREY, [0], 0, 0, HALF, (), t, note)[:36, W*62//100:W - 120]
    none = header(0)
    assert (header(.5, 'frame skipped') != none).any() and (header(2, '') != none).any() and (header(2.6) == none).all()
    assert (header(3, 'x'*999)[:, :30] == 255).all()


def test_what_the_caller_got_is_his():
    screen = Screen(['a'])
    first = screen.draw(GREY, [0], 0, 0, HALF)
    kept = first.copy()
    screen.draw(GREY*2, [2], 1, 1, HALF, [('user', 'Done.')], 1)
    assert (first == kept).all()
    first[:] = 0
    assert (screen.draw(GREY, [2], 0, 0, HALF, (), 30)[:30, 700:900] == 255).all()


# The strip

def strip_of(S, fps=2., width=160): return LaneStrip(S, fps, np.zeros((90, width, 3), np.uint8), 5)


def painted_at_once(strip):
    "Its pixels, from its cells."
    pixels = np.full_like(strip.pixels, 255)
    at_once = state_strip._PALETTE[strip.cells[strip._row, :strip.last + 1]].repeat(strip.column, 1)
    pixels[:, :at_once.shape[1]] = at_once
    return pixels


@pytest.mark.parametrize('skipping', [False, True])
def test_the_strip_is_what_painting_it_at_once_gives(skipping):
    rng, strip, state, t = np.random.default_rng(0), strip_of(5), np.zeros(5, int), 0.
    for _ in range(2000):
        t += .5*(rng.integers(1, 9) if skipping else 1)
        if rng.random() < .1: state[rng.integers(5)] = rng.integers(3)
        strip.add(t, state, rng.random(3) < .05)
        assert strip.last < strip.cells.shape[1]//strip.column
        if rng.random() < .05: assert (strip.pixels == painted_at_once(strip)).all()
    assert (strip.pixels == painted_at_once(strip)).all() and strip.per_cell > 1


def test_nothing_short_is_lost_by_compression():
    "A step in progress and a mark for one frame, in any place of a long stream, stay visible; the last state is that of the last frame."
    for at in (0, 1, 777, 4998):
        strip = strip_of(2, 1.)
        for i in range(5000): strip.add(i, [int(i == at) or 2*(i > at), 0], [False, i == at, False])
        assert ((strip.cells[3] == 1).sum(), (strip.cells[1] == 5).sum(), strip.cells[3, strip.last]) == (1, 1, 2 if at < 4960 else 1)
        cell = int(np.flatnonzero(strip.cells[3] == 1)[0])
        assert cell == at//strip.per_cell


def test_gaps_in_time_hold_the_state_and_time_does_not_go_back():
    strip = strip_of(1)
    strip.add(100., [1], [False]*3)
    strip.add(103., [2], [False]*3)
    assert strip.cells[3, :8].tolist() == [1, 1, 1, 1, 1, 1, 2, 3] and strip.first == 100
    strip.add(101., [0], [False]*3)
    assert strip.last == 6 and (strip.pixels == painted_at_once(strip)).all()
    strip.add(1e9, [0], [False]*3)                                             # thirty years later
    assert strip.last < 160 and strip.span > 1e9 - 100


@pytest.mark.parametrize('seconds', [0, 37, 3600, 86400, 1e9])
def test_the_time_axis_has_room_for_its_labels(seconds, monkeypatch):
    screen, labels, text = Screen(['a']), [], canvas.Canvas.text
    def noted(self, at, what, *rest, **style): labels.append((at, what)); text(self, at, what, *rest, **style)
    monkeypatch.setattr(canvas.Canvas, 'text', noted)
    for t in {0, seconds}:
        labels.clear()
        screen.draw(GREY, [0], 0, 0, HALF, (), t)
    x, y = screen.lanes_at
    y += len(screen.strip.pixels)
    ticks = [at[0] for at, what in labels if y < at[1] < y + 20]
    assert 2 <= len(ticks) <= 10 and min(np.diff(ticks)) > 90 and x <= ticks[0] and ticks[-1] < 1280 - 12 + 1


def test_one_frame_paints_one_column():
    "However long the stream has run: pixels that are written, counted."
    written = []
    class Counting(np.ndarray):
        def __setitem__(self, key, value): written.append(np.asarray(self)[key].size); super().__setitem__(key, value)
    strip = strip_of(5, width=1600)
    strip.pixels = strip.pixels.view(Counting)
    for i in range(20000):
        written.clear()
        compressed = strip.add(i/2, [0, 1, 2, 0, 1], [False]*3)
        assert sum(written) <= (2*strip.pixels.size if compressed else 90*3*strip.column)
    assert strip.per_cell == 16


def test_memory_and_work_are_bounded_over_20000_frames():
    statm = Path('/proc/self/statm')
    def resident(): return int(statm.read_text().split()[1])*os.sysconf('SC_PAGE_SIZE') if statm.exists() else 0
    screen, image, rows, taken = Screen([f'step {k}' for k in range(8)], size=(480, 270)), np.zeros((32, 32, 3), np.uint8), [], 0
    row, flush = screen.steps._row, screen.canvas.flush
    def counted_row(*args): rows.append(1); row(*args)
    def counted_flush():
        nonlocal taken
        taken = sum((c - a)*(d - b) for a, b, c, d in screen.canvas.painted)
        flush()
    screen.steps._row, screen.canvas.flush, quiet = counted_row, counted_flush, set()
    for i in range(20000):
        said = [('assistant', f'Reply number {i}.'), ('user', f'Is it {i}?')] if i % 40 == 0 else ()
        screen.draw(image, np.full(8, i//1000 % 3), .1, .2, HALF, said, i/2, f'note {i}' if i % 90 == 0 else '')
        if i % 40 == 39 and i % 1000: quiet.add(taken)                         # a frame at which nothing changes but the time
        if i == 2000: before = resident()
    assert resident() - before < 30e6                                          # 18,000 pictures would be 7,000 MB, their frames alone 55 MB
    assert len(rows) == 8*20 and len(screen.words.said) <= 4                   # a row is painted when its state changes
    assert min(quiet) < .12*480*270 and len(quiet) < 5                         # in the third hour as in the first minute


# The video

def pictures(n, size=(48, 64)):
    for i in range(n): yield np.full((*size, 3), 20 + 9*i, np.uint8)


@pytest.mark.parametrize('fps', [.5, 1, 2, 7, 25, 60])
@pytest.mark.parametrize('n', [1, 2, 25])
def test_it_can_be_read_back(tmp_path, fps, n):
    with VideoWriter(tmp_path/'a.mp4', fps) as writer:
        for picture in pictures(n): writer.show(picture)
    frames = read_frames(tmp_path/'a.mp4', fps)
    assert len(frames) == n == video_length(tmp_path/'a.mp4', fps).frames
    assert np.abs(frames.mean((1, 2, 3)) - [20 + 9*i for i in range(n)]).max() < 4
    with av.open(str(tmp_path/'a.mp4')) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ('h264', 'yuv420p')
    assert os.listdir(tmp_path) == ['a.mp4'] and writer.closed


@pytest.mark.parametrize('name', ['10:30 tea, no 100%03d?.mp4', 'no_suffix', 'új/mappa/茶.mp4', '-dash.mp4', 'a.avi'])
def test_names(tmp_path, name):
    with VideoWriter(tmp_path/name) as writer:
        for picture in pictures(3): writer.show(picture)
    assert len(read_frames(tmp_path/name)) == 3


def test_without_an_encoder_for_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(show, '_ENCODERS', {'no_such_264': {}, 'mpeg4': show._ENCODERS['mpeg4']})
    with VideoWriter(tmp_path/'a.mp4') as writer:
        for picture in pictures(5): writer.show(picture)
    assert len(read_frames(tmp_path/'a.mp4')) == 5
    with av.open(str(tmp_path/'a.mp4')) as container: assert container.streams.video[0].codec_context.name == 'mpeg4'
    monkeypatch.setattr(show, '_ENCODERS', {'no_such_264': {}})
    with pytest.raises(InputError, match='neither'), VideoWriter(tmp_path/'b.mp4') as writer: writer.show(GREY)
    assert os.listdir(tmp_path) == ['a.mp4']


@pytest.mark.parametrize('after', [0, 1, 6])
@pytest.mark.parametrize('error', [ZeroDivisionError(), InputError('camera: gone'), SystemExit(3), MemoryError(), GeneratorExit()],
                         ids=repr)
def test_an_error_leaves_nothing_new_and_what_was_there(tmp_path, error, after):
    (tmp_path/'old.mp4').write_bytes(b'an earlier video')
    for name in ('new.mp4', 'old.mp4'):
        with pytest.raises(type(error)) as caught, VideoWriter(tmp_path/name) as writer:
            for picture in pictures(after): writer.show(picture)
            raise error
        assert caught.value is error
    assert os.listdir(tmp_path) == ['old.mp4'] and (tmp_path/'old.mp4').read_bytes() == b'an earlier video'


@pytest.mark.parametrize('after', [1, 2, 6])
def test_ctrl_c_keeps_the_video(tmp_path, after):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path/'a.mp4') as writer:
        for picture in pictures(after): writer.show(picture)
        raise KeyboardInterrupt
    assert len(read_frames(tmp_path/'a.mp4')) == after and os.listdir(tmp_path) == ['a.mp4']


def test_ctrl_c_before_the_first_picture_and_no_pictures(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path/'a.mp4'): raise KeyboardInterrupt
    with pytest.raises(InputError, match='a.mp4: no frames'), VideoWriter(tmp_path/'a.mp4'): pass
    assert os.listdir(tmp_path) == []


def _write_until_stopped(path):
    screen = Screen(['a', 'b'], size=(640, 360))
    with VideoWriter(path, 20) as writer:
        for i in range(10**6):
            writer.show(screen.draw(GREY, [1, 0], 0, 0, HALF, (), i/20))
            if i == 20: print('ready', flush=True)


@pytest.mark.parametrize('times', [1, 3])
def test_a_process_stopped_by_the_keyboard(tmp_path, times):
    "At whatever place the signal meets it; a second and a third Ctrl-C leave a whole video or none."
    for k in range(4):
        path, log = tmp_path/f'{k}.mp4', tmp_path/f'{k}.log'
        process = start(log, _write_until_stopped, path)
        until = time.monotonic() + 60
        while 'ready' not in log.read_text() if log.exists() else True:
            assert time.monotonic() < until and process.is_alive(), log.read_text()
            time.sleep(.01)
        time.sleep(.013*k)
        for _ in range(times):
            if process.is_alive(): os.kill(process.pid, signal.SIGINT)
            time.sleep(.002)
        process.join(60)
        assert process.exitcode
        if times == 1 or path.exists(): assert len(read_frames(path, 20)) >= 20
        if times == 1: assert 'KeyboardInterrupt' in log.read_text() and not list(tmp_path.glob('.*'))


def test_sizes_that_no_video_has(tmp_path):
    for wrong in ([np.zeros((47, 64, 3), np.uint8)], [np.zeros((48, 63, 3), np.uint8)], [GREY, np.zeros((50, 64, 3), np.uint8)]):
        with pytest.raises(InputError, match='a.mp4'), VideoWriter(tmp_path/'a.mp4') as writer:
            for picture in wrong: writer.show(picture)
    with pytest.raises(InputError, match='fps=0'): VideoWriter(tmp_path/'a.mp4', 0)
    with pytest.raises(InputError, match='is a folder'), VideoWriter(tmp_path): pass
    assert os.listdir(tmp_path) == []


def test_replay(tmp_path):
    trace = example_trace()
    images = list(np.random.default_rng(0).integers(0, 256, (61, 24, 32, 3), dtype=np.uint8))
    replay(trace, images, tmp_path/'a.mp4', size=(640, 360))
    replay(trace, iter_frames(np.stack(images), 2, source_fps=2), tmp_path/'b.mp4', (640, 360))
    a, b = read_frames(tmp_path/'a.mp4'), read_frames(tmp_path/'b.mp4')
    assert len(a) == 61 and (a == b).all()
    for name, wrong in (('short', images[:60]), ('empty', []), ('bad', [*images[:9], images[9][..., :1], *images[10:]])):
        with pytest.raises(InputError): replay(trace, wrong, tmp_path/f'{name}.mp4', size=(640, 360))
    assert sorted(os.listdir(tmp_path)) == ['a.mp4', 'b.mp4']


def test_notes_of_a_trace():
    f = example_trace().frames[0]
    assert show._note(f, 0) == ''
    assert '214' in show._note(f, 214) and 'behind by 1.5 s' == show._note(f.model_copy(update=dict(delay_s=1.5)), 0)
    assert 'skipped' in show._note(f.model_copy(update=dict(skipped='busy')), 9)


# The window

class FakeTk(types.ModuleType):
    "As much of tkinter as a window uses."
    class TclError(Exception): pass
    def __init__(self, fails=False):
        super().__init__('tkinter')
        module, self.bound, self.destroyed, self.updates, self.shown, self.during_update = self, {}, 0, 0, [], None
        class Tk:
            def __init__(self):
                if fails: raise module.TclError('no display name and no $DISPLAY environment variable')
            def title(self, text): module.titled = text
            def protocol(self, name, call): module.bound[name] = call
            def bind(self, name, call): module.bound[name] = lambda: call(None)
            def destroy(self): module.destroyed += 1
            def update(self):
                module.updates += 1
                if module.during_update: module.during_update()
        class Label:
            def __init__(self, root, **_): pass
            def pack(self): pass
            def configure(self, image): module.shown.append(image)
        self.Tk, self.Label = Tk, Label


@pytest.fixture
def tk(monkeypatch):
    from PIL import ImageTk
    fake = FakeTk()
    monkeypatch.setitem(sys.modules, 'tkinter', fake)
    monkeypatch.setattr(ImageTk, 'PhotoImage', lambda image, master: np.asarray(image))
    monkeypatch.setenv('DISPLAY', ':99')
    return fake


def test_a_window_shows_pictures(tk):
    with open_window('demo') as window:
        for picture in pictures(3): window.show(picture)
        assert not window.closed and tk.updates == 3 and (tk.shown[-1] == picture).all() and tk.titled == 'demo'
    assert window.closed and tk.destroyed == 1
    window.show(picture), window.close()
    assert tk.updates == 3 and tk.destroyed == 1


@pytest.mark.parametrize('how', ['WM_DELETE_WINDOW', '<Escape>', 'q'])
def test_the_user_closes_it(tk, how):
    window = open_window()
    tk.during_update = lambda: tk.bound[how]()
    window.show(GREY)
    assert window.closed and tk.destroyed == 1


def test_a_display_that_goes_away_and_ctrl_c(tk):
    window = open_window()
    def gone(): raise tk.TclError("can't invoke \"update\" command")
    tk.during_update = gone
    window.show(GREY)
    assert window.closed
    other = open_window()
    def stopped(): raise KeyboardInterrupt
    tk.during_update = stopped
    with pytest.raises(KeyboardInterrupt), other: other.show(GREY)
    assert other.closed and tk.destroyed == 1


def test_no_window(monkeypatch):
    monkeypatch.setenv('DISPLAY', ':99')
    monkeypatch.setitem(sys.modules, 'tkinter', FakeTk(fails=True))
    assert open_window() is None
    monkeypatch.setitem(sys.modules, 'tkinter', None)                          # a Python without Tk
    assert open_window() is None
    monkeypatch.undo()
    monkeypatch.delenv('DISPLAY', raising=False), monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    if sys.platform == 'linux': assert open_window() is None


def test_the_package_does_not_need_tk():
    assert 'tkinter' not in Path(show.__file__).read_text().split('class Window')[0] + Path(live_view.__file__).read_text()


# Cameras. FFmpeg's test source behaves as one: it has no end that it knows of, and is opened by the name of its system.

@pytest.fixture
def camera(monkeypatch):
    monkeypatch.setitem(containers._CAMERAS, 'lavfi', {})
    return 'lavfi:testsrc=size=64x48:rate=10:duration=3'


def test_a_camera_is_a_live_stream(camera):
    frames = list(iter_frames(camera, 2))
    assert [f.time for f in frames] == [0, .5, 1, 1.5, 2, 2.5] and frames[0].image.shape == (48, 64, 3)
    assert len({f.image.tobytes() for f in frames}) == 6
    with pytest.raises(InputError, match='a live stream has no length'): video_length(camera)
    ahead = prefetch(iter_frames('lavfi:testsrc=size=64x48:rate=10', 2), 2)    # and one without any end
    assert [next(ahead).index for _ in range(9)] == list(range(9))
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name == 'prefetch']


class Hesitating:
    "A container whose camera says before every picture that it has none yet, `times` times."
    def __init__(self, container, times): self.container, self.times, self.asked = container, times, 0
    def __getattr__(self, name): return getattr(self.container, name)
    def __enter__(self): return self
    def __exit__(self, *_): self.container.close()
    def demux(self, stream):
        for packet in self.container.demux(stream):
            self.asked = 0
            yield packet
            self.asked += 1
            break
        while self.asked < self.times:
            self.asked += 1
            raise av.BlockingIOError(35, 'Resource temporarily unavailable')
        yield from self.demux(stream)


def test_a_camera_that_has_no_picture_yet(camera, monkeypatch):
    "As those of macOS do: nothing is lost by asking again, and asking ends after `timeout`."
    plain, opened = list(iter_frames(camera, 2)), decoding.open_source
    monkeypatch.setattr(decoding, 'open_source', lambda *args: Hesitating(opened(*args), 2))
    assert [(f.time, f.image.tobytes()) for f in iter_frames(camera, 2, stop=4)] == [(f.time, f.image.tobytes()) for f in plain[:4]]
    class Silent(Hesitating):
        def demux(self, stream):
            for packet in self.container.demux(stream) if self.asked < 12 else ():
                self.asked += 1
                yield packet
                if self.asked == 12: break
            raise av.BlockingIOError(35, 'Resource temporarily unavailable')
    monkeypatch.setattr(decoding, 'open_source', lambda *args: Silent(opened(*args), 0))
    seen = []
    with pytest.raises(InputError, match=r'timed out: no data for 0.2 s after 1.1 s'):
        for frame in iter_frames(camera, 2, timeout=.2): seen.append(frame.index)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize('address,message', [
    ('v4l2:/dev/nowhere', 'no camera that can be read'), ('/dev/null', 'no camera that can be read'),
    ('/dev/video77', 'no such video file'),
    ('avfoundation:0', 'avfoundation:0: '), ('dshow:video=Front: left', 'dshow:video=Front: left: ')])
def test_a_camera_that_is_missing_is_one_line(address, message):
    with pytest.raises(InputError, match=message) as caught: next(iter_frames(address))
    assert '\n' not in str(caught.value) and str(caught.value).startswith(address)


def test_a_mac_is_asked_for_a_rate_that_it_has(monkeypatch):
    asked = []
    def fake(where, **options): asked.append((where, options)); raise av.FileNotFoundError(2, 'none')
    monkeypatch.setattr(av, 'open', fake)
    for address in ('avfoundation:1', 'dshow:video=Integrated Camera'):
        with pytest.raises(InputError): next(iter_frames(address))
    assert [(where, o['format'], o['options']) for where, o in asked] == [('1', 'avfoundation', dict(framerate='30')),
                                                                         ('video=Integrated Camera', 'dshow', {})]


def test_where_a_webcam_is(monkeypatch):
    found = []
    monkeypatch.setattr(show.glob, 'glob', lambda pattern: found)
    monkeypatch.setattr(sys, 'platform', 'linux')
    with pytest.raises(InputError, match=r'webcam: no such camera \(0 found\); plug one in'): source_address('webcam')
    found += ['/dev/video10', '/dev/video2', '/dev/video0']
    assert [source_address(f'webcam{k}') for k in ('', ':0', ':1', ':2')] == ['/dev/video0', '/dev/video0', '/dev/video2', '/dev/video10']
    for wrong in ('webcam:3', 'webcam:-1', 'webcam:x', 'webcam:1.5'):
        with pytest.raises(InputError, match=wrong): source_address(wrong)
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert source_address('webcam:1') == 'avfoundation:1'
    monkeypatch.setattr(sys, 'platform', 'win32')
    device = types.SimpleNamespace(name='@device_pnp_1', description='Integrated Camera', media_types=['video'])
    sound = types.SimpleNamespace(description='Mic', media_types=['audio'])
    monkeypatch.setattr(av, 'enumerate_input_devices', lambda system: [sound, device], raising=False)
    assert source_address('webcam') == 'dshow:video=Integrated Camera'
    def none(system): raise ValueError(system)
    monkeypatch.setattr(av, 'enumerate_input_devices', none)
    with pytest.raises(InputError, match='dshow:video=NAME'): source_address('webcam')
    monkeypatch.delattr(av, 'enumerate_input_devices')
    with pytest.raises(InputError, match='dshow:video=NAME'): source_address('webcam')
    for other in ('webcam.mp4', './webcam', 'rtsp://webcam/1', Path('clip.mp4')): assert source_address(other) == other
