"""What a store of frame features saves: reading a slice of frames against decoding, and encoding, them again.

    python bench/features.py [--video CLIP] [--json FILE]

The clip is half a minute at 30 pictures a second unless a file is named; the slice lies at its end. The tower is SmolVLM2-256M's with
random weights, on one thread; what is read lies in the page cache. Then 1,000 random slices are read from an hour-long file, and the
growth of the process is measured.
"""
import argparse, json, random, tempfile, time
from itertools import islice
from pathlib import Path

import numpy as np, psutil, torch
from safetensors import safe_open

from dst_smolvlm.core.config import atomic_write, environment, run_cli
from dst_smolvlm.data.container import write_video
from dst_smolvlm.data.frames import iter_frames
from dst_smolvlm.data.schema import Step, VideoRecord
from dst_smolvlm.model.configuration import DSTSmolVLMConfig
from dst_smolvlm.model.modeling import DSTSmolVLM
from dst_smolvlm.training.feature_store import FeatureStore, encode_video, write_tokens
from dst_smolvlm.world.scenes import Video
from dst_smolvlm.world.toy_world import make_scene, render_frame

SLICE, HIDDEN, TOKENS = 8, 576, (64, 4)

class Film:
    "The toy world, 512 pixels wide, at 30 pictures a second."
    def __init__(self, pictures): self.pictures, self.scene, self.noise = pictures, make_scene(3), np.random.default_rng(0)
    def __len__(self): return self.pictures
    def __getitem__(self, i):
        if i >= self.pictures: raise IndexError(i)
        large = render_frame(self.scene, i//15).repeat(8, 0).repeat(8, 1)
        return (large + self.noise.integers(-4, 5, large.shape)).clip(0, 255).astype(np.uint8)

def tower() -> DSTSmolVLM:
    "SmolVLM2-256M by its published config.json, all of its vision tower and next to nothing of its language model."
    text = dict(model_type='llama', vocab_size=64, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=9)
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
    return DSTSmolVLM(DSTSmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, pad_token_id=0)).eval()

def seconds(f, times:int) -> float:
    "Median seconds of a call."
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        f()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[times//2]

def filled(folder, video, frames:int, tokens:int) -> FeatureStore:
    "A store with random numbers of the right shape for a video."
    store = FeatureStore(Path(folder)/str(tokens), 'random', [video])
    write_tokens(store.path(video.uid), (torch.rand(min(100, frames - i), tokens, HIDDEN) for i in range(0, frames, 100)),
                 (frames, tokens, HIDDEN), 'bfloat16', store.metadata(video.uid))
    return store

def growth(read, frames:int, length:int) -> float:
    "By how many bytes the process grows at most while 1,000 random slices of `length` frames are read."
    rng, process = random.Random(0), psutil.Process()
    for _ in range(20): read(rng.randrange(frames - length))
    before, most = process.memory_info().rss, 0
    for _ in range(1000):
        read(rng.randrange(frames - length))
        most = max(most, process.memory_info().rss - before)
    return most

def measure(clip:Path, folder) -> list[dict]:
    n = sum(1 for _ in iter_frames(clip))
    if n < SLICE + 2: raise SystemExit(f'{clip}: too short, take a clip of at least {SLICE//2 + 1} seconds')
    record = VideoRecord(video_uid='clip', dataset='bench', duration=(n - 1)/2, steps=[Step(id='S1', name='watch')])
    video, model, start = Video(record, clip), tower(), n - SLICE - 1
    front = seconds(lambda: list(islice(video.frames(), start, start + SLICE)), 3)
    seek = lambda: [frame.image for frame in iter_frames(clip, start=start, stop=start + SLICE)]
    images, seeking = seek(), seconds(seek, 3)
    encoding = seconds(lambda: list(encode_video(model, images)), 1)
    rows = []
    for tokens in TOKENS:
        store = filled(folder, video, n, tokens)
        reading = seconds(lambda: store.read('clip', start, start + SLICE), 201)  # noqa: B023
        ways = ((f'decode {n/2:g} s of video', front), ('seek and decode', seeking), ('seek, decode, encode', seeking + encoding))
        for what, cost in ways:
            rows.append(dict(name=f'{SLICE} frames of {tokens} tokens: {what} / read', ratio=cost/reading,
                             read_ms=1e3*reading, again_ms=1e3*cost))
    return rows

def memory(folder) -> list[dict]:
    frames, length = 7200, 64
    record = VideoRecord(video_uid='hour', dataset='bench', duration=3599.5, steps=[Step(id='S1', name='watch')])
    store = filled(folder, Video(record, make_scene(0)), frames, 64)
    path = store.path('hour')
    rows = []
    with safe_open(path, 'pt') as kept:
        ways = {'store.read': lambda i: store.read('hour', i, i + length).sum(),
                'a map kept open': lambda i: kept.get_slice('tokens')[i:i+length].sum()}
        for name, read in ways.items():
            grown = growth(read, frames, length)
            rows.append(dict(name=f'{name}: growth over 1,000 slices / size of the file', ratio=grown/path.stat().st_size,
                             grown_mb=grown/1e6, file_mb=path.stat().st_size/1e6))
    return rows

@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--video', type=Path)
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        clip = args.video or Path(folder)/'clip.mp4'
        if not args.video: write_video(clip, Film(900), fps=30)
        rows = measure(clip, folder) + memory(folder)
    print('| what | ratio | |\n|---|---|---|')
    for r in rows:
        detail = f"{r['again_ms']:.0f} ms / {r['read_ms']:.2f} ms" if 'read_ms' in r else f"{r['grown_mb']:.1f} MB / {r['file_mb']:.0f} MB"
        print(f"| {r['name']} | {r['ratio']:.3g} | {detail} |")
    if args.json:
        with atomic_write(args.json) as f: json.dump(dict(rows=rows, **environment()), f, indent=1)

if __name__ == '__main__': main()
