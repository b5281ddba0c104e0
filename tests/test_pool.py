"""Work spread over processes: the same answers, errors one by one, and nobody left behind."""
import math, os, signal, time
from functools import partial

import processes
from dst_smolvlm.core.parallel import run_each


def answers(workers):
    def heard(result):
        try: return result()
        except ValueError as e: return str(e)
    return {key: heard(result) for key, result in run_each(math.sqrt, dict(four=4, nine=9, less=-1), workers, 'roots', silent=True)}


def test_two_processes_answer_as_one():
    assert answers(2) == answers(1) == dict(four=2., nine=3., less='math domain error')


def note(folder, name):
    (folder/name).write_text(str(os.getpid()))
    time.sleep(.2)
    return os.getpid()


def test_every_process_begins_once(tmp_path):
    start = partial(note_start, tmp_path)
    jobs = {k: str(k) for k in range(6)}
    workers = {result() for _, result in run_each(partial(note, tmp_path), jobs, 2, 'some', silent=True, start=start)}
    assert {int(p.stem) for p in tmp_path.glob('*.began')} == workers and len(workers) == 2 and os.getpid() not in workers


def note_start(folder): (folder/f'{os.getpid()}.began').touch(exist_ok=False)


def test_who_stops_listening_stops_the_rest(tmp_path):
    listening = run_each(partial(note, tmp_path), {k: str(k) for k in range(40)}, 2, 'some', silent=True)
    next(listening)
    listening.close()
    before = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == before < 10, 'what had not begun was not called off'


def test_ctrl_c_begins_nothing_more(tmp_path):
    "As a shell sends it, to the parent and to whatever it has started."
    stopped = processes.start(tmp_path/'log', in_a_group, tmp_path, daemon=False)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob('*.job'))) < 4 and time.monotonic() < deadline: time.sleep(.05)
    os.killpg(stopped.pid, signal.SIGINT)
    stopped.join(20)
    before = len(list(tmp_path.glob('*.job')))
    time.sleep(1)
    assert not stopped.is_alive() and 4 <= len(list(tmp_path.glob('*.job'))) == before < 20, (tmp_path/'log').read_text()


def in_a_group(folder):
    os.setpgrp()
    parent(folder)


def parent(folder):
    for _ in run_each(partial(note, folder), {k: f'{k}.job' for k in range(200)}, 2, 'some', silent=True): pass


def test_a_killed_parent_leaves_nobody_behind(tmp_path):
    killed = processes.start(tmp_path/'log', parent, tmp_path, daemon=False)
    deadline = time.monotonic() + 60
    while len(jobs := list(tmp_path.glob('*.job'))) < 4 and time.monotonic() < deadline: time.sleep(.05)
    os.kill(killed.pid, signal.SIGKILL); killed.join()
    time.sleep(1)
    before = len(list(tmp_path.glob('*.job')))
    time.sleep(1)
    assert len(jobs) >= 4 and len(list(tmp_path.glob('*.job'))) == before < 200, (tmp_path/'log').read_text()
