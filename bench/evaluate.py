"""What scoring costs: matching and all metrics for 500 traces of 20 minutes, by family. No model, no encoder, nothing streamed.

    python bench/evaluate.py [--videos 500] [--minutes 20] [--processes 2] [--json FILE]

The traces are of a known kind: the replies and states of random procedures with errors put in. `share` is the part of the whole that a
family takes; `ratio` of the row `video_over_scoring` is how many times faster the scoring is than the videos last."""
import argparse, json, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np

from dst_smolvlm import bootstrap, compare, language_metrics, metrics
from dst_smolvlm.annotation import Step, Turn, VideoRecord
from dst_smolvlm.config import atomic_write, environment
from dst_smolvlm.trace import TraceFrame, reference_speech, trace_from_states

WEIGHTS = dict(speaking_f1=1, update_f1=1, joint_goal_accuracy=1, response_names_step=1)
VERBS = 'open close tighten loosen place remove attach turn push check'.split()
THINGS = 'lid screw box cable cover lens battery tray paper filter'.split()
BEGIN, END = ['Now', 'Well done, next', 'Please', 'Go on and'], ['care', 'both hands', 'the other hand']


def make_video(k:int, minutes:float) -> tuple:
    "A record of twelve steps and some sixty replies, and a trace with errors and with times."
    rng, T = np.random.default_rng(k), int(minutes*120) + 1
    names = [f'{rng.choice(VERBS)} the {rng.choice(THINGS)} {s + 1}' for s in range(12)]
    times = np.sort(rng.uniform(0, minutes*60, (12, 2)), axis=1).round(1)
    says = lambda: f'{rng.choice(BEGIN)} {rng.choice(names)} with {rng.choice(END)} number {rng.integers(999)}.'
    turns = [Turn(role='assistant', time=float(t), content=says()) for t in np.sort(rng.choice(int(minutes*60), 60, replace=False))]
    steps = [Step(id=f'S{s}', name=n, spans=[tuple(map(float, t))]) for s, (n, t) in enumerate(zip(names, times))]
    record = VideoRecord(video_uid=f'v{k}', dataset='bench', duration=minutes*60., steps=steps, turns=turns)
    states = np.roll(record.states(), int(rng.integers(0, 6)), axis=0)
    near = lambda f: int(np.clip(f + rng.integers(-2, 4), 0, T - 1))
    speech = {near(f): text if rng.random() < .7 else says() for f, text in reference_speech(record).items() if rng.random() < .9}
    trace = trace_from_states(record, states, speech, model='bench')
    noise = rng.uniform(0, .4, (2, len(trace.frames)))
    soft = lambda f, a, b: dict(speak_prob=min(1., f.speak_prob*.6 + a), update_prob=min(1., f.update_prob*.6 + b), latency_ms=20.,
                                decision_ms=15.)
    frames = [TraceFrame(**f.model_dump() | soft(f, a, b)) for f, a, b in zip(trace.frames, *noise)]
    return record, trace.model_copy(update=dict(frames=frames))


def score_part(ks, minutes:float, idf) -> tuple[list, Counter]:
    "Tallies of some videos, and seconds by family. Making the videos is not counted."
    spent, tallies = Counter(), []
    def timed(name, f, *args):
        began = time.perf_counter(); result = f(*args); spent[name] += time.perf_counter() - began
        return result
    names = dict(count_states='states', match_predictions='matching', count_language='words', count_timeliness='timeliness',
                 event_prf='events')
    originals = {f: getattr(metrics, f) for f in names}
    for f, original in originals.items(): setattr(metrics, f, partial(timed, names[f], original))
    language = metrics.Language(language_metrics.load_encoder('words'), 'words', idf)
    for k in ks:
        record, trace = make_video(k, minutes)
        began = time.perf_counter()
        tallies.append(compare.tally(trace, record, language=language))
        spent['all'] += time.perf_counter() - began
    for f, original in originals.items(): setattr(metrics, f, original)
    return tallies, spent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--videos', type=int, default=500)
    parser.add_argument('--minutes', type=float, default=20.)
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    references = [t.content for k in range(0, args.videos, max(1, args.videos//50)) for t in make_video(k, 2.)[0].turns]
    parts = [range(p, args.videos, args.processes) for p in range(args.processes)]
    with ProcessPoolExecutor(args.processes, mp_context=get_context('spawn')) as pool:
        done = list(pool.map(partial(score_part, minutes=args.minutes, idf=language_metrics.Idf(references)), parts))
    tallies, spent = [t for some, _ in done for t in some], sum((s for _, s in done), Counter())
    counting = max(s['all'] for _, s in done)                          # what one waits for: the slower process
    began = time.perf_counter()
    compare.make_row('bench', 'streamed', '', tallies, WEIGHTS)
    row = time.perf_counter() - began
    began = time.perf_counter()
    pick, draws = compare.only(compare.INTERVALS, WEIGHTS), bootstrap.resample(len(tallies))
    bootstrap.bootstrap_scores([t.counts for t in tallies], pick, draws)
    drawn = time.perf_counter() - began
    total = counting + row + drawn
    families = {k: v/args.processes for k, v in spent.items() if k != 'all'}
    families['reading the trace, and the rest'] = spent['all']/args.processes - sum(families.values())
    families |= {'pooling, curves over thresholds': row, 'bootstrap, 1000 draws': drawn}
    ordered = sorted(families.items(), key=lambda x: -x[1])
    rows = [dict(name=f'share_{name}', ratio=round(s/total, 4), seconds=round(s, 2)) for name, s in ordered]
    rows.append(dict(name='video_over_scoring', ratio=round(args.videos*args.minutes*60/total, 1), seconds=round(total, 2)))
    for r in rows: print(f"{r['name']:45} {r['ratio']:12.3f} {r['seconds']:8.2f} s")
    if args.json:
        sizes = dict(videos=args.videos, minutes=args.minutes, processes=args.processes)
        with atomic_write(args.json) as f: json.dump(dict(rows=rows) | sizes | environment(), f, indent=1)


if __name__ == '__main__': main()
