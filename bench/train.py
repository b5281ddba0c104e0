"""What does a training step cost, and against what?

    python bench/train.py [--repeats 3] [--json FILE]

All ratios are of times taken in turn in this one run, forward and backward, of the tiny model:
* one_pass_vs_frames_T*: the T samples of `DSTFrameDataset`, each with everything up to its frame, against the one row that teaches the same
  (08_dataset shows that the losses and gradients are equal);
* features_vs_pixels: rows whose frames pass the (frozen) vision tower and the connector against rows that find their features in the store,
  reading included. The tower has 6 layers of 384 on 256 patches, a small one: SmolVLM2's has 12 of 768 on 1024.
"""
import argparse, json, tempfile, time
from functools import partial
from statistics import median

import numpy as np
import torch

from dst_smolvlm.config import atomic_write, environment, run_cli
from dst_smolvlm.dataset import DSTFrameDataset, DSTStreamDataset, StreamCollator, ToyScenes, scene_video
from dst_smolvlm.features import write_store
from dst_smolvlm.loss import LossConfig, loss_counts, multitask_loss
from dst_smolvlm.model import build_tiny
from dst_smolvlm.world import WorldConfig

TARGETS = 'speak_labels', 'update_labels', 'state_labels', 'glimpse_states'


def learn(model, batches, counts):
    "Forward and backward over batches of one step."
    for batch in batches:
        total, _ = multitask_loss(model(**{k: v for k, v in batch.items() if k not in TARGETS}), batch, LossConfig(), counts)
        total.backward()


def seconds(work, model) -> float:
    model.zero_grad()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ratio(slow, fast, model, repeats: int) -> dict:
    "How many times as long `slow` takes, taken in turn; median and range."
    fast(), model.zero_grad()                                      # warm
    pairs = [(seconds(slow, model), seconds(fast, model)) for _ in range(repeats)]
    ratios = [a/b for a, b in pairs]
    slow_s, fast_s = map(median, zip(*pairs))
    return dict(ratio=median(ratios), least=min(ratios), most=max(ratios), slow_s=slow_s, fast_s=fast_s)


def one_pass(T: int, repeats: int) -> dict:
    "Frame samples, four to a batch, against one row of T frames."
    model, layout = build_tiny()
    world = WorldConfig(min_steps=1, max_steps=2, max_carry=4, min_idle=1, max_idle=4, mistakes=0., length=T)
    streams = DSTStreamDataset(ToyScenes('train', 1, 0, world), layout, 64, from_middle=0, dialogues=0, glimpses=0)
    collate, singles = StreamCollator(layout.tokenizer.pad_token_id), DSTFrameDataset(streams)
    whole, samples = collate([streams[0]]), [singles[t] for t in range(len(singles))]
    assert len(samples) == T
    batches, counts = [collate(samples[i:i+4]) for i in range(0, T, 4)], loss_counts(whole)
    row = ratio(lambda: learn(model, batches, counts), lambda: learn(model, [whole], counts), model, repeats)
    return dict(name=f'one_pass_vs_frames_T{T}') | row


def features(folder, repeats: int) -> dict:
    "Reading and learning from the store against drawing, encoding and learning from pixels."
    model, layout = build_tiny(dict(image_size=128, vision_size=384, vision_layers=6, scale_factor=16))
    for part in (model.model.vision_model, model.model.connector): part.requires_grad_(False)
    world = WorldConfig(min_steps=1, max_steps=2, max_carry=4, min_idle=1, max_idle=4, mistakes=0., length=64, image_size=128)
    scenes = ToyScenes('train', 1, 0, world)
    store, _ = write_store(model, [scene_video(s) for s in scenes], folder)
    collate = StreamCollator(layout.tokenizer.pad_token_id)
    options = dict(from_middle=0, dialogues=0, glimpses=0)
    pixels, stored = (DSTStreamDataset(scenes, layout, 128, store=s, **options) for s in (None, store))
    counts = loss_counts(collate([pixels[0]]))
    step = lambda data: lambda: learn(model, [collate([data[0]])], counts)
    return dict(name='features_vs_pixels') | ratio(step(pixels), step(stored), model, repeats)


@run_cli
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    torch.manual_seed(0), np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        print('| what | times faster (median, range) | without, s | with, s |\n|---|---|---|---|', flush=True)
        rows = []
        for measure in (*(partial(one_pass, T) for T in (32, 64, 128)), partial(features, folder)):
            rows.append(r := measure(args.repeats))
            spread = f"{r['ratio']:.1f} ({r['least']:.1f}–{r['most']:.1f})"
            print(f"| {r['name']} | {spread} | {r['slow_s']:.2f} | {r['fast_s']:.3f} |", flush=True)
    found = dict(rows=rows, repeats=args.repeats, threads=torch.get_num_threads(), **environment())
    if args.json:
        with atomic_write(args.json) as f: json.dump(found, f, indent=1)


if __name__ == '__main__': main()
