"""What scoring costs: 500 traces of 20 minutes, from files to a row with its intervals. No model, no encoder, nothing streamed.

    python bench/evaluate.py [--videos 500] [--minutes 20] [--processes 2] [--json FILE]

The traces are of a known kind: the replies and states of random procedures with errors put in. The row `video_over_scoring` is what the
command does: the traces are read from files and counted in so many processes, then pooled and resampled; its ratio is how many times
faster that is than the videos last. `one_over_many` compares one process with many on a tenth of the videos, the start of processes
included. Each `share_` is the part of the work of one process that a family takes, measured on that tenth, in its processor time."""
import argparse, json, tempfile, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dst_smolvlm.core.config import atomic_write, environment
from dst_smolvlm.data.schema import Step, Turn, VideoRecord
from dst_smolvlm.evaluation import comparison as compare
from dst_smolvlm.metrics import bootstrap, scores as metrics, text as language_metrics
from dst_smolvlm.streaming.reference_traces import reference_speech, trace_from_states
from dst_smolvlm.streaming.trace import TraceFrame, Traces
from dst_smolvlm.streaming.trace_writer import read_trace, write_trace

WEIGHTS = dict(speaking_f1=1, update_f1=1, joint_goal_accuracy=1, response_names_step=1)
VERBS = 'open close tighten loosen place remove attach turn push check'.split()
THINGS = 'lid screw box cable cover lens battery tray paper filter'.split()
BEGIN, END = ['Now', 'Well done, next', 'Please', 'Go on and'], ['care', 'both hands', 'the other hand']


def make_record(k:int, minutes:float, rng) -> VideoRecord:
    "Twelve steps and some sixty replies."
    names = [f'{rng.choice(VERBS)} the {rng.choice(THINGS)} {s + 1}' for s in range(12)]
    times = np.sort(rng.uniform(0, minutes*60, (12, 2)), axis=1).round(1)
    spoken = np.sort(rng.choice(int(minutes*60), 60, replace=False))
    turns = [Turn(role='assistant', time=float(t), content=says(names, rng)) for t in spoken]
    steps = [Step(id=f'S{s}', name=n, spans=[tuple(map(float, t))]) for s, (n, t) in enumerate(zip(names, times))]
    return VideoRecord(video_uid=f'v{k}', dataset='bench', duration=minutes*60., steps=steps, turns=turns)


def says(names, rng) -> str: return f'{rng.choice(BEGIN)} {rng.choice(names)} with {rng.choice(END)} number {rng.integers(999)}.'


def make_video(k:int, minutes:float, folder) -> tuple:
    "A record, and the path of a trace with errors and with times."
    rng = np.random.default_rng(k)
    record = make_record(k, minutes, rng)
    T, names = record.num_frames(), [s.name for s in record.steps]
    states = np.roll(record.states(), int(rng.integers(0, 6)), axis=0)
    near = lambda f: int(np.clip(f + rng.integers(-2, 4), 0, T - 1))
    speech = {near(f): text if rng.random() < .7 else says(names, rng) for f, text in reference_speech(record).items() if rng.random() < .9}
    trace, noise = trace_from_states(record, states, speech, model='bench'), rng.uniform(0, .4, (2, T))
    soft = lambda f, a, b: dict(speak_prob=min(1., f.speak_prob*.6 + a), update_prob=min(1., f.update_prob*.6 + b), latency_ms=20.,
                                decision_ms=15.)
    frames = [TraceFrame(**f.model_dump() | soft(f, a, b)) for f, a, b in zip(trace.frames, *noise)]
    return record, write_trace(trace.model_copy(update=dict(frames=frames)), Path(folder)/f'v{k}.json')


def score(videos, processes:int, language) -> float:
    "Seconds from files to a row."
    records, traces = [r for r, _ in videos], Traces(tuple(partial(read_trace, path) for _, path in videos))
    began = time.perf_counter()
    tallies = compare.tally_rows(dict(bench=(traces, records)), processes, language=language)['bench']
    compare.make_row('bench', 'streamed', '', tallies, WEIGHTS, draws=bootstrap.resample(len(tallies)))
    return time.perf_counter() - began


def families(videos, language) -> Counter:
    "Seconds of processor time by family, in this process."
    spent = Counter()
    def timed(name, f, *args, **options):
        began = time.process_time(); result = f(*args, **options); spent[name] += time.process_time() - began
        return result
    names = dict(count_states='states', match_predictions='matching', count_language='words', count_timeliness='timeliness',
                 event_prf='events')
    originals = {f: getattr(metrics, f) for f in names}
    for f, original in originals.items(): setattr(metrics, f, partial(timed, names[f], original))
    try:
        traces = [timed('reading traces', read_trace, path) for _, path in videos]
        tallies = [timed('all counting', compare.tally, trace, record, language=language) for trace, (record, _) in zip(traces, videos)]
    finally:
        for f, original in originals.items(): setattr(metrics, f, original)
    spent['the rest of counting'] = spent.pop('all counting') - sum(spent[name] for name in names.values())
    timed('pooling, curves', compare.make_row, 'bench', 'streamed', '', tallies, WEIGHTS)
    pick, videos_ = compare.scorer(WEIGHTS), compare.by_video(tallies)
    timed('bootstrap, 1000 draws', bootstrap.bootstrap_scores, videos_, pick, bootstrap.resample(len(videos_)))
    return spent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--videos', type=int, default=500)
    parser.add_argument('--minutes', type=float, default=20.)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(args.processes, mp_context=get_context('spawn')) as pool:
            videos = list(pool.map(partial(make_video, minutes=args.minutes, folder=folder), range(args.videos), chunksize=4))
        language = metrics.Language(language_metrics.load_encoder('words'), 'words',
                                    language_metrics.Idf([t.content for r, _ in videos for t in r.turns]))
        total, some = score(videos, args.processes, language), videos[::10]
        one, many, spent = score(some, 1, language), score(some, args.processes, language), families(some, language)
    rows = [dict(name='video_over_scoring', ratio=round(args.videos*args.minutes*60/total, 1), seconds=round(total, 2)),
            dict(name=f'one_over_many, {len(some)} videos', ratio=round(one/many, 2), seconds=round(many, 2))]
    whole = sum(spent.values())
    rows += [dict(name=f'share_{name}', ratio=round(s/whole, 4), seconds=round(s, 2)) for name, s in spent.most_common()]
    for r in rows: print(f"{r['name']:45} {r['ratio']:12.3f} {r['seconds']:8.2f} s")
    if args.json:
        sizes = dict(videos=args.videos, minutes=args.minutes, processes=args.processes)
        with atomic_write(args.json) as f: json.dump(dict(rows=rows) | sizes | environment(), f, indent=1)


if __name__ == '__main__': main()
