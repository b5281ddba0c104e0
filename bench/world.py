"""Is drawing the toy world ever what training waits for?

    python bench/world.py [--steps 20] [--json FILE]

Three questions, each answered by ratios of times measured in turn in this one run:
* frames: what `render_frame` gains over drawing the same pixels plainly (`plain_frame`), and what a frame costs in an hour of video;
* share: drawing scenes, and laying out whole batches, as shares of a training step of the tiny model (conf/train/demo.yaml);
* waiting: the share of a step in which the trainer waits for data, with 0 and with 1 data-loader worker.
"""
import argparse, json, math, tempfile, time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw

from dst_smolvlm.core.config import atomic_write, compose_config, environment, run_cli
from dst_smolvlm.runs.training_run import make_trainer
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.training.arguments import training_arguments
from dst_smolvlm.training.trainer import DSTTrainer
from dst_smolvlm.world.render import COLOURS, _look, _path
from dst_smolvlm.world.toy_world import Scene, in_hand, make_scene, render_frame
from dst_smolvlm.world.world_config import WorldConfig

SKIN, SKIN_EDGE, DARK, EDGE = (222, 174, 140), (150, 100, 80), (60, 60, 60), (20, 20, 20)


def plain_part(draw, part, x, y, r):
    look, shape = dict(fill=COLOURS[part.colour], outline=EDGE), part.shape
    def ring(n, radii):
        angles = [-math.pi/2 + 2*math.pi*k/n for k in range(n)]
        return [(x + q*math.cos(a), y + q*math.sin(a)) for a, q in zip(angles, radii)]
    if shape in ('circle', 'ring'): draw.ellipse((x-r, y-r, x+r, y+r), **look)
    if shape == 'ring': draw.ellipse((x-r/2, y-r/2, x+r/2, y+r/2), fill=DARK, outline=EDGE)
    if shape == 'square': draw.rectangle((x-.85*r, y-.85*r, x+.85*r, y+.85*r), **look)
    if shape == 'bar': draw.rectangle((x-1.15*r, y-.4*r, x+1.15*r, y+.4*r), **look)
    if shape == 'triangle': draw.polygon(ring(3, [1.15*r]*3), **look)
    if shape == 'star': draw.polygon(ring(10, [1.15*r, .45*r]*5), **look)
    if shape == 'cross':
        a, b = 1.05*r, .35*r
        corners = ((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b))
        draw.polygon([(x+dx, y+dy) for dx, dy in corners], **look)


def plain_hand(draw, x, y, size):
    s = size/64
    draw.line((x + 10*s, size + 4*s, x + 3*s, y + 9*s), fill=SKIN, width=round(9*s))
    draw.ellipse((x-6*s, y+3*s, x+8*s, y+15*s), fill=SKIN, outline=SKIN_EDGE)


def plain_frame(scene: Scene, i: int) -> np.ndarray:
    "Frame `i` of a scene without lying, passing or hidden parts, drawn in colours with nothing kept: the same pixels as `render_frame`."
    cfg, rng, t = scene.config, np.random.default_rng([scene.seed, i]), i/scene.record.fps
    size, (table, phase, swing) = cfg.image_size, _look(scene.seed)
    s, img = size/64, Image.new('RGB', (size, size), table)
    draw, (dx, dy) = ImageDraw.Draw(img), rng.normal(0, .8, 2)
    draw.rectangle((14*s+dx, 2*s+dy, 50*s+dx, 12*s+dy), fill=(120, 124, 130), outline=DARK)
    for b in range(3):
        x, y = (5 + 18.5*b)*s + dx, 50*s + dy
        draw.rectangle((x, y, x+16*s, y+12*s), fill=(150, 116, 76), outline=(70, 50, 30))
        for k in range(b + 1): draw.ellipse((x+(3+4*k)*s, y+4*s, x+(5+4*k)*s, y+6*s), fill=(40, 30, 20))
    held = in_hand(scene, t)
    for k, (part, u, box, _) in enumerate(held[:3]):
        x, y = _path(u, box, size)
        side = 0 if len(held) == 1 else (-1 if k == 0 else 1)*size*.21
        x, y, r = x + side + dx + rng.normal(0, cfg.jitter), y + dy + rng.normal(0, cfg.jitter), cfg.part_size*size/64*rng.uniform(.9, 1.1)
        plain_hand(draw, x, y + r/2, size)
        if rng.random() >= cfg.occlusion: plain_part(draw, part, x, y, r)
        else: draw.ellipse((x-r, y-r, x+r, y+r), fill=SKIN, outline=SKIN_EDGE)
    if not held and rng.random() < .6: plain_hand(draw, rng.uniform(.2, .8)*size, rng.uniform(.45, .75)*size, size)
    light = 1 + cfg.light*math.sin(phase + swing*t) + rng.normal(0, .02)
    noise = rng.integers(-6, 7, (size, size, 1), dtype=np.int8)
    return (np.asarray(img, np.float32)*np.float32(light) + noise).clip(0, 255).astype(np.uint8)


def in_turn(ways: dict, rounds: int) -> dict:
    "Seconds that each of `ways` takes, the least of some rounds in which they take turns; the first round is not counted."
    times = {name: [] for name in ways}
    for k in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if k: times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def frames() -> list[dict]:
    def drawn_by(frame, some): return lambda: [frame(*f) for f in some]
    rows, long = [], dict(uses=3, palette=4, min_steps=25, max_steps=30, min_carry=6, max_carry=30, max_idle=60)
    for size, every in ((64, 1), (384, 8)):
        scenes = [make_scene(i, cfg=WorldConfig(image_size=size, overlap=.3)) for i in range(4)]
        some = [(s, i) for s in scenes for i in range(0, s.record.num_frames(), every)]
        t = in_turn(dict(plain=drawn_by(plain_frame, some), now=drawn_by(render_frame, some)), 9)
        rows.append(dict(name=f'a frame of {size}x{size}: plain / now', ratio=t['plain']/t['now'], frame_ms=1e3*t['now']/len(some)))
    videos = dict(hour=make_scene(0, cfg=WorldConfig(length=7200, **long)), short=make_scene(0, cfg=WorldConfig(min_steps=8)))
    anywhere = {name: np.random.default_rng(0).integers(s.record.num_frames(), size=300).tolist() for name, s in videos.items()}
    t = in_turn({name: drawn_by(render_frame, [(s, i) for i in anywhere[name]]) for name, s in videos.items()}, 9)
    name = 'a frame anywhere in an hour / in a video of eight steps'
    rows.append(dict(name=name, ratio=t['hour']/t['short'], frame_ms=1e3*t['hour']/300))
    return rows


class TimedTrainer(DSTTrainer):
    "Writes down when it begins to wait for data, when it has them, and when it has learned from them."
    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.waits = [*getattr(self, 'waits', []), (start, time.perf_counter())]
        return found

    def waited(self) -> tuple[float, float]:
        "Median seconds of a step, and of its waiting; the first three steps are not counted."
        steps = [(b[0] - a[0], a[1] - a[0]) for a, b in zip(self.waits[3:], self.waits[4:])]
        return median(s for s, _ in steps), median(w for _, w in steps)


@contextmanager
def trainer_of(workers: int, steps: int):
    "The demo's trainer for a few steps, in one process with the two streams of conf/train/demo.yaml in a batch."
    cfg = compose_config([f'++train.dataloader_num_workers={workers}', f'train.max_steps={steps}', '++train.save_strategy=no',
                          '++train.disable_tqdm=true', '++train.logging_strategy=no', '++train.use_cpu=true'])
    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(cfg, training_arguments(cfg, Path(out)))
        trainer.__class__ = TimedTrainer
        yield trainer


def drawn_in(data: DSTStreamDataset, batch: range) -> float:
    "Seconds to make the scenes and draw the frames of a batch, out of all that the batch takes."
    spent = 0.
    def timed(function):
        def call(*args, **kwargs):
            nonlocal spent
            start = time.perf_counter()
            try: return function(*args, **kwargs)
            finally: spent += time.perf_counter() - start
        return call
    kinds = type(data.scenes), Scene
    kept = kinds[0].__getitem__, Scene.frames
    kinds[0].__getitem__, Scene.frames = map(timed, kept)
    try: [data[i] for i in batch]
    finally: kinds[0].__getitem__, Scene.frames = kept
    return spent


def training(steps: int) -> list[dict]:
    rows = []
    for workers in (0, 1):
        with trainer_of(workers, steps) as trainer:
            trainer.train()
            step, wait = trainer.waited()
            if not workers:
                data, collate = trainer.train_dataset, trainer.data_collator
                batches = [range(k, k + 2) for k in range(100, 120, 2)]
                drawing = median(drawn_in(data, b) for b in batches)
                laying = []
                for b in batches:
                    start = time.perf_counter()
                    collate([data[i] for i in b])
                    laying.append(time.perf_counter() - start)
                rows += [dict(name='drawing a batch / a training step', ratio=drawing/step, step_s=step),
                         dict(name='drawing and laying out a batch / a training step', ratio=median(laying)/step, step_s=step)]
            rows.append(dict(name=f'waiting for data / a training step, {workers} workers', ratio=wait/step, step_s=step))
    return rows


@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=20, help='training steps to time, of which the first three are not counted')
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = frames() + training(max(args.steps, 6))
    print('| what | ratio |\n|---|---|')
    for row in rows: print(f"| {row['name']} | {row['ratio']:.3f} |")
    if args.json:
        with atomic_write(args.json) as f: json.dump(dict(rows=rows) | environment(), f, indent=1)


if __name__ == '__main__': main()
