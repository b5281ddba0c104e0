"""How soon a command answers that has nothing to compute: help, a configuration, a misspelt key, the check of one file.

python bench/startup.py [--repeats 5] [--json startup.json]

Each is started anew, in turn, so that a busy moment of the machine hits all alike; the median counts. Beside each stands its share of what
Python needs to import torch and transformers, which is what an answer would wait for if the commands imported them first.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

from dst_smolvlm.core.config import environment

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = 'import torch, transformers'
ANSWERS = {
    **{f'{name} --help': ['-m', f'dst_smolvlm.{name}', '--help'] for name in 'train evaluate stream records features cache world'.split()},
    'train --cfg': ['-m', 'dst_smolvlm.train', '--cfg'],
    'train train.lerning_rate=1': ['-m', 'dst_smolvlm.train', 'train.lerning_rate=1'],
    'records check data/toy.jsonl': ['-m', 'dst_smolvlm.records', 'check', str(ROOT/'data'/'toy.jsonl')]}


def seconds(argv) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *argv], cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), capture_output=True)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json')
    args = parser.parse_args()
    runs = {'python -c pass': ['-c', 'pass'], f'python -c "{IMPORTS}"': ['-c', IMPORTS], **ANSWERS}
    for argv in runs.values(): seconds(argv)                               # once, so that the files are in memory
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, argv in runs.items(): times[name].append(seconds(argv))
    medians = {name: statistics.median(each) for name, each in times.items()}
    heavy = medians[f'python -c "{IMPORTS}"']
    print(f"{'':42}{'median s':>9}{'range':>14}{'of the imports':>16}")
    for name, median in medians.items():
        print(f'{name:42}{median:9.2f}{min(times[name]):8.2f}–{max(times[name]):.2f}{median/heavy:15.0%}')
    if args.json:
        rows = [dict(command=name, median_s=median, seconds=times[name], share_of_imports=median/heavy) for name, median in medians.items()]
        Path(args.json).write_text(json.dumps(dict(rows=rows, repeats=args.repeats, **environment()), indent=1))


if __name__ == '__main__': main()
