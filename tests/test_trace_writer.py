"A trace that is written while it is streamed: whatever interrupts the stream, what there was by then can be read, and nothing false can."
import os, resource, signal, time

import numpy as np, psutil, pytest

import processes
from dst_smolvlm.core.config import InputError
from dst_smolvlm.streaming import trace_writer
from dst_smolvlm.streaming.reference_traces import example_trace
from dst_smolvlm.streaming.trace import Trace, TraceFrame
from dst_smolvlm.streaming.trace_writer import TraceWriter, read_trace, write_trace


def make_frame(i, S=3, **more):
    rng = np.random.default_rng(i)
    return TraceFrame(index=i, time=i/2, speak_prob=rng.random(), update_prob=rng.random(), state_probs=rng.dirichlet([1]*3, S),
                      state=rng.integers(0, 3, S), pointer_probs=rng.dirichlet([1]*(S + 1)),
                      latency_ms=rng.random()*9, decision_ms=1/3, **more)


def make_header(uid='long', S=3, **more):
    return Trace(video_uid=uid, steps=[dict(id=f'S{s}', name=f'Schritt {s}: «茶»\u2028\n') for s in range(S)], frames=[], **more)


def said(i): return dict(type='assistant', frame=i, time=i/2, text=f'Gut gemacht, {i} Löffel 茶.\u2028\r\n')


def write_all(path, frames, events, header):
    "One by one, each event with its frame."
    with TraceWriter(path, header) as writer:
        for frame in frames: writer.add(frame, [e for e in events if e['frame'] == frame.index])


def part_of(path): return path.with_name(f'{path.name}.part')


def without(streamed, **fields): return streamed.model_copy(update=dict(frames=[], events=[]) | fields)


# ---- the same file

def awkward():
    "Traces with whatever is hard to write: no frames, no events, odd characters, NaN, tuples, several events at a frame."
    two = dict(type='state', frame=1, time=.5, transitions=[(0, 0, 1), (0, 1, 2)], certainty=float('nan'))
    frames = [make_frame(0, text=''), make_frame(1, first_token_ms=1e-9, text='\\ "\n\x7f'), make_frame(2, skipped='behind', delay_s=1e22)]
    yield make_header()
    yield make_header().model_copy(update=dict(frames=frames))
    meta = dict(frames=[1], events='x', nested={'1': [None, True]})
    yield make_header(meta=meta).model_copy(update=dict(frames=frames, events=[said(0), two, said(1)]))
    yield make_header(S=0).model_copy(update=dict(frames=[make_frame(0, S=0)]))
    yield example_trace()


@pytest.mark.parametrize('streamed', list(awkward()), ids=['nothing', 'no events', 'odd', 'no steps', 'example'])
def test_the_final_file_is_that_of_write_trace(streamed, tmp_path):
    write_all(tmp_path/'a.json', streamed.frames, streamed.events, without(streamed))
    write_trace(streamed, tmp_path/'b.json')
    assert (tmp_path/'a.json').read_bytes() == (tmp_path/'b.json').read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'b.json']
    read = read_trace(tmp_path/'a.json')
    assert read.frames == streamed.frames and len(read.events) == len(streamed.events)


def test_what_is_learned_while_streaming_may_go_into_meta(tmp_path):
    with TraceWriter(tmp_path/'a.json', make_header(meta={'seed': 1})) as writer:
        writer.add(make_frame(0))
        writer.header.meta['skipped_frames'] = 0
    assert read_trace(tmp_path/'a.json').meta == {'seed': 1, 'skipped_frames': 0}


# ---- interrupted

def stream_for_ever(path):
    with TraceWriter(path, make_header()) as writer:
        for i in range(10**6): writer.add(make_frame(i), [said(i)])


def test_killed_while_it_writes(tmp_path):
    "By SIGKILL, at moments that nobody chose: all frames but at most the one that was being written."
    for trial in range(3):
        path = tmp_path/f'{trial}.json'
        process = processes.start(tmp_path/'log', stream_for_ever, path)
        while process.is_alive() and not (part_of(path).is_file() and part_of(path).stat().st_size > 20_000*(trial + 1)): time.sleep(.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path/'log').read_text()
        assert sorted(p.name for p in tmp_path.glob(f'*{trial}.json*')) == [f'{trial}.json.part']      # no final file, no half of one
        streamed = read_trace(part_of(path))
        assert streamed.meta == {'partial': True} and len(streamed.frames) > 20
        assert streamed.frames == [make_frame(i) for i in range(len(streamed.frames))]
        assert streamed.events == [said(i) for i in range(len(streamed.frames))]
        hint = f'{trial}.json: No such file or directory; the stream did not end, .*{trial}.json.part has'
        with pytest.raises(InputError, match=hint): read_trace(path)


def killed_while_finishing(path, step):
    "Killed in the middle of writing the final file, or when it is whole and the part is still there."
    kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    writer = TraceWriter(path, make_header())
    for i in range(50): writer.add(make_frame(i))
    if step == 'rename': os.replace = kill
    else: type(path).unlink = kill
    writer.close()


def test_killed_while_it_finishes(tmp_path):
    path = tmp_path/'a.json'
    assert processes.run(tmp_path/'log', killed_while_finishing, path, 'rename') == -signal.SIGKILL
    assert not path.exists() and len(read_trace(part_of(path)).frames) == 50
    assert processes.run(tmp_path/'log', killed_while_finishing, path, 'remove') == -signal.SIGKILL
    assert len(read_trace(path).frames) == 50 and 'partial' not in read_trace(path).meta


@pytest.mark.parametrize('error', (RuntimeError, KeyboardInterrupt, SystemExit))
def test_an_error_in_the_stream_leaves_the_part(error, tmp_path):
    path = tmp_path/'a.json'
    with pytest.raises(error):
        with TraceWriter(path, make_header()) as writer:
            writer.add(make_frame(0))
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ['a.json.part']
    writer.close()                                     # too late, and harmless: an interrupted stream must not look like a whole one
    assert [p.name for p in tmp_path.iterdir()] == ['a.json.part']


def test_an_interrupted_stream_becomes_a_trace_by_hand_and_says_so(tmp_path):
    path = tmp_path/'a.json'
    with pytest.raises(RuntimeError):
        with TraceWriter(path, make_header(meta={'seed': 3})) as writer: writer.add(make_frame(0)); raise RuntimeError
    write_trace(read_trace(part_of(path)), path)
    assert read_trace(path).meta == {'seed': 3, 'partial': True}


# ---- a full disk

def fill_the_disk(path, room):
    "Files of this process may have `room` bytes. It adds frames until they do not fit, and then once more when there is room again."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    writer = TraceWriter(path, make_header())
    try:
        for i in range(1000): writer.add(make_frame(i), [said(i)])
    except OSError: print('frames that fitted:', i)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    try: writer.add(make_frame(i)); print('added after all')
    except ValueError: pass
    writer.close()


def test_full_disk_while_streaming(tmp_path):
    "All frames that fitted can be read; the one that did not is told to the caller, and no final file pretends that it was not there."
    for room in (10_000, 10_001, 10_100, 10_333):      # wherever the line is cut
        path = tmp_path/f'{room}.json'
        assert processes.run(tmp_path/'log', fill_the_disk, path, room) == 0, (tmp_path/'log').read_text()
        said_so = (tmp_path/'log').read_text().split()
        frames = read_trace(part_of(path)).frames
        assert said_so[:-1] == ['frames', 'that', 'fitted:'] and len(frames) in (int(said_so[-1]), int(said_so[-1]) + 1)
        assert len(frames) > 5 and frames == [make_frame(i) for i in range(len(frames))]
        assert not path.exists()


def no_room_for_the_end(path):
    writer = TraceWriter(path, make_header())
    for i in range(50): writer.add(make_frame(i))
    resource.setrlimit(resource.RLIMIT_FSIZE, (part_of(path).stat().st_size//2, resource.RLIM_INFINITY))
    writer.close()


def test_full_disk_while_finishing(tmp_path):
    "The old final file stays, no temporary one is left, and the part is whole."
    path = tmp_path/'a.json'
    write_trace(example_trace(), path)
    assert processes.run(tmp_path/'log', no_room_for_the_end, path) == 1 and 'File too large' in (tmp_path/'log').read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'a.json.part', 'log']
    assert read_trace(path) == example_trace() and len(read_trace(part_of(path)).frames) == 50


def test_no_room_at_all(tmp_path):
    "Said before the first frame is streamed, not after the last."
    (tmp_path/'file').touch()
    with pytest.raises(OSError): TraceWriter(tmp_path/'file'/'a.json', make_header())
    with pytest.raises(InputError, match='is a folder; name a file'): TraceWriter(tmp_path, make_header())
    with pytest.raises(InputError, match='a.part: is what an unfinished trace is called'): TraceWriter(tmp_path/'a.part', make_header())
    assert [p.name for p in tmp_path.iterdir()] == ['file']


# ---- reading what is there

def test_every_cut_of_a_part_can_be_read(tmp_path):
    "Wherever the last line is cut, also in the middle of a character: the frames before it. No cut gives an error or half a frame."
    path = tmp_path/'a.json'
    writer = TraceWriter(path, make_header())
    sizes = [part_of(path).stat().st_size]
    for i in range(3):
        writer.add(make_frame(i), [said(i)])
        sizes.append(part_of(path).stat().st_size)
    whole = part_of(path).read_bytes()
    for size in range(sizes[0], len(whole) + 1):
        (tmp_path/'cut.part').write_bytes(whole[:size])
        streamed = read_trace(tmp_path/'cut.part')
        assert len(streamed.frames) == len(streamed.events) == sum(size >= s for s in sizes[1:])
    (tmp_path/'cut.part').write_bytes(whole[:sizes[0] - 1])                                  # no whole header: nothing to read
    with pytest.raises(InputError, match='cut.part: video_uid: missing'): read_trace(tmp_path/'cut.part')


def test_read_while_it_grows(tmp_path):
    path = tmp_path/'a.json'
    with TraceWriter(path, make_header()) as writer:
        for i in range(5):
            writer.add(make_frame(i))
            assert read_trace(part_of(path)).frames == [make_frame(k) for k in range(i + 1)]
    assert not part_of(path).exists() and len(read_trace(path).frames) == 5


@pytest.mark.parametrize('damage, says', [
    (lambda lines: [lines[0], lines[1][:50], *lines[2:]], 'line 2: not of an unfinished trace'),
    (lambda lines: [lines[0], b'7', *lines[2:]], 'line 2: not of an unfinished trace'),
    (lambda lines: [lines[0], b'\xff' + lines[1], *lines[2:]], 'line 2: not of an unfinished trace'),
    (lambda lines: [b'[]', *lines[1:]], 'line 1: not of an unfinished trace'),
    (lambda lines: [lines[0].replace(b'video_uid', b'video_id'), *lines[1:]], 'video_uid: missing'),
    (lambda lines: lines[:2] + lines[3:], 'frames.1.index: 2, but frames must be consecutive'),
    (lambda lines: lines[:2] + lines[1:], 'frames.1.index: 0, but frames must be consecutive'),
    (lambda lines: lines[:2] + [lines[2].replace(b'"assistant"', b'"asistant"')] + lines[3:], "events.1.type: 'asistant' is none of"),
    (lambda lines: lines[1:], 'line 1: not of an unfinished trace')])
def test_damage_that_no_kill_makes(damage, says, tmp_path):
    "A line in the middle that is not whole, lost, double, or of another trace is an error that names it."
    writer = TraceWriter(tmp_path/'a.json', make_header())
    for i in range(4): writer.add(make_frame(i), [said(i)])
    part = part_of(tmp_path/'a.json')
    part.write_bytes(b'\n'.join(damage(part.read_bytes().split(b'\n'))))
    with pytest.raises(InputError, match=f'a.json.part: {says}'): read_trace(part)


# ---- what does not fit

def test_what_does_not_fit_is_refused_and_does_not_harm(tmp_path):
    path = tmp_path/'a.json'
    with TraceWriter(path, make_header()) as writer:
        writer.add(make_frame(0))
        for frame, events, says in ((make_frame(2), [], 'consecutive'), (make_frame(1, S=2), [], 'entries for 3 steps'),
                                    (make_frame(1), [said(2)], 'but the trace has 2 frames'),
                                    (make_frame(1), [said(1) | {'type': 'x'}], 'none of'),
                                    (make_frame(1, skipped='busy', text='no'), [], r'skipped \(busy\)')):
            with pytest.raises(ValueError, match=says): writer.add(frame, events)
        writer.add(make_frame(1), iter([said(0), said(1)]))        # a late reply belongs to an earlier frame
    assert read_trace(path).frames == [make_frame(0), make_frame(1)] and read_trace(path).events == [said(0), said(1)]


# ---- twice

def test_the_next_writer_begins_anew(tmp_path):
    path = tmp_path/'a.json'
    for n in (5, 2):
        with pytest.raises(RuntimeError):
            with TraceWriter(path, make_header(f'run {n}')) as writer:
                for i in range(n): writer.add(make_frame(i))
                raise RuntimeError
    streamed = read_trace(part_of(path))
    assert (streamed.video_uid, len(streamed.frames)) == ('run 2', 2)


def test_the_old_trace_stays_until_the_new_one_is_whole(tmp_path):
    path = write_trace(example_trace(), tmp_path/'a.json')
    with TraceWriter(path, make_header()) as writer:
        writer.add(make_frame(0))
        assert read_trace(path) == example_trace()
    assert read_trace(path).video_uid == 'long'


@pytest.mark.parametrize('last', (0, 1))
def test_two_writers_of_one_path_do_not_mix(last, tmp_path):
    "Each has a file of its own; the trace is that of the one who ends last, whole, and neither removes what is the other's."
    path = tmp_path/'a.json'
    headers = [make_header(f'writer {k}') for k in range(2)]
    writers = [TraceWriter(path, header) for header in headers]
    for i in range(20):
        for k, writer in enumerate(writers): writer.add(make_frame(2*i + k).model_copy(update={'index': i}))
    assert read_trace(part_of(path)).video_uid == 'writer 1'
    writers[1 - last].close()
    assert read_trace(path).video_uid == f'writer {1 - last}' and part_of(path).exists() == (last == 1)
    writers[last].close()
    streamed = read_trace(path)
    assert streamed.video_uid == f'writer {last}'
    assert [f.speak_prob for f in streamed.frames] == [make_frame(2*i + last).speak_prob for i in range(20)]
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


def test_a_part_that_somebody_removed(tmp_path):
    with TraceWriter(tmp_path/'a.json', make_header()) as writer:
        writer.add(make_frame(0))
        part_of(tmp_path/'a.json').unlink()
        writer.add(make_frame(1))
    assert len(read_trace(tmp_path/'a.json').frames) == 2


def test_a_pipe_is_written_to_at_the_end(tmp_path):
    "As `--out /dev/stdout`: there is no place for a part beside it."
    os.mkfifo(pipe := tmp_path/'pipe')
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with TraceWriter(pipe, make_header()) as writer: writer.add(make_frame(0))
    write_trace(make_header().model_copy(update=dict(frames=[make_frame(0)])), tmp_path/'a.json')
    assert os.read(reader, 10**5) == (tmp_path/'a.json').read_bytes()
    assert pipe.is_fifo() and not part_of(pipe).exists()
    os.close(reader)


# ---- hours

def stream_for_hours(path):
    "Prints by how many MB the memory grew: while frames are added, while the final file is made, and when it is read."
    grown, used = [], lambda: psutil.Process().memory_info().rss/1e6
    frame, write = make_frame(0), trace_writer._json
    def watched(x):                                    # every line goes through here, in both phases
        most[1] += 1
        if most[1] % 100 == 0: most[0] = max(most[0], used())
        return write(x)
    with TraceWriter(path, make_header()) as writer:
        for i in range(20_000):
            if i == 1000: base, most, trace_writer._json = used(), [0, 0], watched
            writer.add(frame.model_copy(update={'index': i}), [said(i)])
        grown.append(most[0] - base)
        base, most = used(), [0, 0]
    grown.append(most[0] - base)
    base, whole = used(), read_trace(path)
    print(*grown, used() - base, len(whole.frames))


def test_memory_does_not_grow_with_the_stream(tmp_path):
    "20,000 frames are nearly three hours, and more than 20 MB as objects: neither adding nor finishing holds a tenth of that."
    assert processes.run(tmp_path/'log', stream_for_hours, tmp_path/'a.json') == 0, (tmp_path/'log').read_text()
    adding, finishing, reading, number = map(float, (tmp_path/'log').read_text().split())
    assert number == 20_000 and reading > 20
    assert max(adding, finishing) < reading/10, (adding, finishing, reading)
