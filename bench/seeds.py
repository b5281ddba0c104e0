"""The spread of the scores over training seeds.

    make demo SEED=1 OUT=outputs/seed1      # one folder per seed
    python bench/seeds.py outputs/seed0 outputs/seed1 outputs/seed2 [--json FILE]

Each folder holds the scores.json of one evaluation. Prints mean and range per row and measure; refuses to mix evaluations of
different videos.
"""
import argparse, json
from pathlib import Path

from dst_smolvlm.core.config import InputError, atomic_write, run_cli
from dst_smolvlm.metrics.scores import COLUMNS

MODEL_ROWS = ('model', 'model_head_only', 'control_grey', 'control_permuted', 'event_order')

def summarise(folders) -> dict:
    "Mean, smallest and largest value of every measure of every row."
    runs = []
    for folder in folders:
        path = Path(folder)/'scores.json'
        if not path.is_file(): raise InputError(f'{path}: not found; evaluate first (python -m dst_smolvlm.evaluate output_dir={folder})')
        runs.append(json.loads(path.read_text()))
    if len({r['meta']['records_hash'] for r in runs}) > 1: raise InputError('the evaluations are of different videos')
    seeds = [r['meta']['seed'] for r in runs]
    if len(set(seeds)) < len(seeds): raise InputError(f'training seeds {seeds}: a seed occurs twice')
    rows = []
    for name in MODEL_ROWS:
        values = {c: [row[c] for r in runs for row in r['rows'] if row['name'] == name] for c in COLUMNS}
        rows.append(dict(name=name) | {c: dict(mean=sum(v)/len(v), min=min(v), max=max(v)) for c, v in values.items() if None not in v})
    return dict(seeds=seeds, videos=runs[0]['meta']['videos'], hardware=runs[0]['meta']['hardware'], rows=rows)

@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+')
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    found = summarise(args.folders)
    print('| row | ' + ' | '.join(c.replace('_', ' ') for c in COLUMNS) + ' |\n|' + '---|'*(len(COLUMNS) + 1))
    for row in found['rows']:
        cells = [f"{row[c]['mean']:.3f} ({row[c]['min']:.3f}–{row[c]['max']:.3f})" if c in row else '–' for c in COLUMNS]
        print(f"| {row['name']} | " + ' | '.join(cells) + ' |')
    print(f"\ntraining seeds {', '.join(map(str, found['seeds']))}; {found['videos']} videos; {found['hardware']}")
    if args.json:
        with atomic_write(args.json) as f: json.dump(found, f, indent=1)

if __name__ == '__main__': main()
