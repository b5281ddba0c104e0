"""What the short cuts of `dst_smolvlm.data.frames` save, as ratios measured in one run.

    python bench/video.py [--json FILE] [--repeats 7] [--seconds 60]

Makes a clip of 640 x 360 at 30 pictures a second and compares, in turn and several times over:
decoding ahead in the background with decoding in turn, beside a consumer that computes (the vision tower of the tiny model, on the CPU) and
one that only waits as long as a frame takes to decode, as for an accelerator; a slice at the end with decoding from the start;
the length read from time-stamps with the length counted by decoding.
"""
import argparse, json, tempfile
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import numpy as np, torch

from dst_smolvlm.core.config import atomic_write, environment, run_cli
from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.frames import iter_frames, prefetch, video_length
from dst_smolvlm.data.pixels import frames_to_pixels
from dst_smolvlm.model.modeling import build_tiny


def timed(run) -> float:
    began = perf_counter()
    run()
    return perf_counter() - began


def compare(name, slow, fast, repeats) -> dict:
    "Seconds of both in turn: the ratio slow / fast of each repeat; its median, smallest and largest."
    slow(), fast()                                                            # the first run of a file pays for the disk
    pairs = [(timed(slow), timed(fast)) for _ in range(repeats)]
    ratios = [s/f for s, f in pairs]
    return dict(name=name, ratio=median(ratios), min=min(ratios), max=max(ratios), slow_seconds=median(s for s, _ in pairs),
                fast_seconds=median(f for _, f in pairs), repeats=repeats)


@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--seconds', type=int, default=60, help='length of the clip')
    args = parser.parse_args(argv)
    rng, fps = np.random.default_rng(0), 2.
    scene = rng.integers(0, 256, (45, 240, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)             # a wall, past which the camera moves
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'clip.mp4'
        write_video(path, [scene[:, (4*i) % 1280:(4*i) % 1280 + 640] for i in range(30*args.seconds)], fps=30)
        length = video_length(path, fps)
        model = build_tiny()[0].eval()
        size = model.config.vision_config.image_size
        decode = timed(lambda: list(iter_frames(path, fps, stop=30)))/30                              # seconds per frame

        def tower(frames):
            with torch.inference_mode():
                for frame in frames: model.encode_frames(frames_to_pixels(frame.image[None], size))
        def waiting(frames):
            for _ in frames: sleep(decode)
        def length_by_decoding(): return sum(1 for _ in iter_frames(path, fps))
        few, first = dict(stop=60), length.frames - 4
        rows = [
            compare('background queue, tiny tower on the CPU', lambda: tower(iter_frames(path, fps, **few)),
                    lambda: tower(prefetch(iter_frames(path, fps, **few))), args.repeats),
            compare('background queue, a consumer that waits', lambda: waiting(iter_frames(path, fps, **few)),
                    lambda: waiting(prefetch(iter_frames(path, fps, **few))), args.repeats),
            compare('last 4 frames by seeking', lambda: list(islice(iter_frames(path, fps), first, None)),
                    lambda: list(iter_frames(path, fps, start=first)), args.repeats),
            compare('length from time-stamps', length_by_decoding, lambda: video_length(path, fps), args.repeats)]
    print(f'{length.seconds:.1f} s of 640 x 360 at 30 pictures a second, {length.frames} frames at {fps:g} FPS; '
          f'torch threads: {torch.get_num_threads()}\n')
    print('| short cut | times faster (median, range) | without, s | with, s |\n|---|---|---|---|')
    for r in rows:
        print(f"| {r['name']} | {r['ratio']:.2f} ({r['min']:.2f}–{r['max']:.2f}) | {r['slow_seconds']:.3f} | {r['fast_seconds']:.3f} |")
    if args.json:
        with atomic_write(args.json) as f: json.dump(dict(rows=rows, torch_threads=torch.get_num_threads(), **environment()), f, indent=1)

if __name__ == '__main__': main()
