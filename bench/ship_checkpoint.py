"""Makes data/checkpoint of a demo's checkpoint: the same model, its weights in bfloat16 and so half the size.

    make demo
    python bench/ship_checkpoint.py outputs/demo/checkpoint data/checkpoint
"""
import argparse, json, shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dst_smolvlm.core.config import InputError, run_cli

BESIDE = 'generation_config.json', 'tokenizer.json', 'tokenizer_config.json', 'thresholds.json'
NOTE = '\nThe weights were rounded to bfloat16 by `bench/ship_checkpoint.py`; `load_pretrained` computes with them in float32.\n'

def ship(source, target) -> int:
    "Writes the folder `target` from the checkpoint `source`; returns its size in bytes."
    source, target = Path(source), Path(target)
    needed = 'model.safetensors', 'config.json', 'README.md', *BESIDE
    missing = [name for name in needed if not (source/name).is_file()]
    if missing: raise InputError(f'{source}: {", ".join(missing)} missing; train and evaluate first (make demo)')
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in load_file(source/'model.safetensors').items()}
    save_file(weights, target/'model.safetensors', metadata={'format': 'pt'})
    config = json.loads((source/'config.json').read_text(encoding='utf-8')) | {'dtype': 'bfloat16'}
    (target/'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
    card, head = (source/'README.md').read_text(encoding='utf-8'), '\n## Intended use'
    (target/'README.md').write_text(card if NOTE in card else card.replace(head, NOTE + head), encoding='utf-8')
    for name in BESIDE: shutil.copy(source/name, target/name)
    return sum(p.stat().st_size for p in target.iterdir())

@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', nargs='?', default='outputs/demo/checkpoint')
    parser.add_argument('target', nargs='?', default='data/checkpoint')
    args = parser.parse_args(argv)
    print(f'{args.target}: {ship(args.source, args.target)/1e6:.1f} MB')

if __name__ == '__main__': main()
