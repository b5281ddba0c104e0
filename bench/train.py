"""What does a training step cost, and against what?

    python bench/train.py [--repeats 3] [--json FILE]

All ratios are of times taken in turn in this one run, forward and backward, of the tiny model:
* one_pass_vs_frames_T*: the T samples of `DSTFrameDataset`, each with everything up to its frame, against the one row that teaches the same
  (training.frame_samples shows that the losses and gradients are equal);
* features_vs_pixels: rows whose frames pass the (frozen) vision tower and the connector against rows that find their features in the store,
  reading included. The tower has 6 layers of 384 on 256 patches, a small one: SmolVLM2's has 12 of 768 on 1024;
* packed_vs_padded: eight streams of the toy world and the dialogue beside each, padded to the longest, against the same laid side by side
  in rows of that length with a block mask (what a GPU does), and packed_2048 in rows of up to 2048 tokens; alone_vs_padded: each read by
  itself without padding (what a CPU does). The text model has 6 layers of 384;
* loader_share is no speed-up but the share of a training step of the demo in which the trainer waits for data, with one worker; without
  one it is loader_share_no_worker. `slow_s` is the step, `fast_s` the waiting.
Where there is a GPU, the published shapes follow (random weights, bfloat16 computation, streams of 4096 tokens with 4 a frame, features
instead of pixels): tokens a second, the share of the GPU's peak (MFU, by 6 × parameters × tokens + attention), with and without
checkpointing and compilation, and the longest stream that fits 24 GB.
"""
import argparse, gc, json, tempfile, time
from functools import partial
from statistics import median

import numpy as np
import torch

from dst_smolvlm.core.config import atomic_write, environment, run_cli
from dst_smolvlm.model.modeling import build_published, build_tiny
from dst_smolvlm.training.batches import StreamCollator, model_inputs
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.training.frame_samples import DSTFrameDataset
from dst_smolvlm.training.feature_writer import write_store
from dst_smolvlm.training.losses import LossConfig, loss_counts, multitask_loss
from dst_smolvlm.world.scenes import ToyScenes, scene_video
from dst_smolvlm.world.world_config import WorldConfig
from world import trainer_of


def learn(model, batches, counts):
    "Forward and backward over batches of one step."
    for batch in batches:
        total, _ = multitask_loss(model(**model_inputs(batch)), batch, LossConfig(), counts)
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
    streams = DSTStreamDataset(ToyScenes('train', 1, 0, world), layout, 64, from_middle=0, dialogues=0, auxiliary_samples=0)
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
    options = dict(from_middle=0, dialogues=0, auxiliary_samples=0)
    pixels, stored = (DSTStreamDataset(scenes, layout, 128, store=s, **options) for s in (None, store))
    counts = loss_counts(collate([pixels[0]]))
    step = lambda data: lambda: learn(model, [collate([data[0]])], counts)
    return dict(name='features_vs_pixels') | ratio(step(pixels), step(stored), model, repeats)


def packing(repeats: int) -> list[dict]:
    "The same batch, read in three ways."
    model, layout = build_tiny(dict(hidden_size=384, layers=6))
    data = DSTStreamDataset(ToyScenes('train', 8), layout, 64, dialogues=1, auxiliary_samples=0)
    model.model.vision_model.requires_grad_(False)
    batch = StreamCollator(layout.tokenizer.pad_token_id)([data[i] for i in range(8)])
    batch['frame_tokens'] = model.encode_frames(batch.pop('pixel_values')).detach()
    counts, rows = loss_counts(batch), []
    def step(reading, row_tokens=0):
        model.reading, model.row_tokens = reading, row_tokens
        learn(model, [batch], counts)
    ways = dict(packed=('packed',), packed_2048=('packed', 2048), alone=('alone',))
    for name, way in ways.items():
        rows.append(dict(name=f'{name}_vs_padded') | ratio(partial(step, 'padded'), partial(step, *way), model, repeats))
    return rows


def loader(steps: int) -> list[dict]:
    "How long a training step of the demo waits for data."
    rows = []
    for workers in (1, 0):
        with trainer_of(workers, steps) as trainer:
            trainer.train()
            step_s, wait_s = trainer.waited()
        name = 'loader_share' if workers else 'loader_share_no_worker'
        rows.append(dict(name=name, ratio=wait_s/step_s, slow_s=step_s, fast_s=wait_s))
    return rows


# Dense half precision with float32 sums, by the makers' data sheets.
PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40': 181e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'TITAN RTX': 65e12}


def flops(model, streams: int, tokens: int) -> float:
    "Of one step of the language model, forward and backward; checkpointing's second forward pass is no useful work and is not counted."
    text = model.config.text_config
    n = sum(p.numel() for p in model.model.text_model.layers.parameters())
    return streams*tokens*(6*n + 6*text.num_hidden_layers*tokens*text.num_attention_heads*text.head_dim)      # causal: half of 12


def stream_batch(model, layout, streams: int, tokens: int) -> dict:
    "Streams of the toy world cut to `tokens`, with random features in place of pixels, on the GPU."
    world = WorldConfig(length=tokens, min_steps=6, max_steps=8)
    data = DSTStreamDataset(ToyScenes('train', streams, 0, world), layout, 64, max_seq_len=tokens, from_middle=0,
                            dialogues=0, auxiliary_samples=0)
    rows = [data.stream(k, data.rng(k), look=False) for k in range(streams)]
    shape = layout.tokens_per_frame, model.config.text_config.hidden_size
    for row in rows: row['frame_tokens'] = torch.randn(len(row['frame_positions']), *shape)*.02
    batch = StreamCollator(layout.tokenizer.pad_token_id)([([row], []) for row in rows])
    return {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}


def gpu_step(model, optimizer, batch) -> None:
    with torch.autocast('cuda', torch.bfloat16): total, _ = multitask_loss(model(**model_inputs(batch)), batch, LossConfig())
    total.backward()
    optimizer.step()
    optimizer.zero_grad()


def gpu_speed(size: str, checkpointing: bool, compiled: bool, streams=2, tokens=4096, steps=8) -> dict:
    "Tokens a second and the share of the peak of one size."
    model, layout = build_published(size, tokens_per_frame=4)
    model.cuda().train()
    for part in (model.model.vision_model, model.model.connector): part.requires_grad_(False)
    if checkpointing: model.gradient_checkpointing_enable(dict(use_reentrant=False)), model.disable_input_require_grads()
    if compiled:
        for layer in model.model.text_model.layers: layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batch = stream_batch(model, layout, streams, tokens)
    read = batch['input_ids'].numel()
    for _ in range(3): gpu_step(model, optimizer, batch)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps): gpu_step(model, optimizer, batch)
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - begin)/steps
    peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)
    name = f'gpu_{size}' + '_checkpointing'*checkpointing + '_compiled'*compiled
    mfu = flops(model, streams, batch['input_ids'].shape[1])/step_s/peak if peak else None
    return dict(name=name, ratio=mfu, tokens_per_s=read/step_s, step_s=step_s, peak_gb=torch.cuda.max_memory_allocated()/1e9)


def longest_stream(size: str, card=24e9) -> dict:
    "The longest single stream (a multiple of 1024 tokens) that trains within 24 GB, the allocator being capped there."
    torch.cuda.set_per_process_memory_fraction(min(1., card/torch.cuda.get_device_properties(0).total_memory))
    longest = 0
    for tokens in range(1024, 8193, 1024):
        try:
            found = gpu_fits(size, tokens)
        except torch.OutOfMemoryError: found = False
        gc.collect(), torch.cuda.empty_cache()
        if not found: break
        longest = tokens
    torch.cuda.set_per_process_memory_fraction(1.)
    return dict(name=f'gpu_{size}_longest_in_24GB', ratio=None, tokens=longest, minutes=longest/4/2/60)


def gpu_fits(size: str, tokens: int) -> bool:
    model, layout = build_published(size, tokens_per_frame=4)
    model.cuda().train()
    for part in (model.model.vision_model, model.model.connector): part.requires_grad_(False)
    model.gradient_checkpointing_enable(dict(use_reentrant=False)), model.disable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batch = stream_batch(model, layout, 1, tokens)
    for _ in range(2): gpu_step(model, optimizer, batch)
    return True


def on_gpu(sizes=('256M', '500M', '2.2B')) -> list[dict]:
    rows = []
    for size in sizes:
        for measure in (*(partial(gpu_speed, size, c, k) for c in (False, True) for k in (False, True)), partial(longest_stream, size)):
            torch.cuda.reset_peak_memory_stats()
            try: row = measure()
            except torch.OutOfMemoryError: row = dict(name=f'gpu_{size}', ratio=None, note='out of memory')
            gc.collect(), torch.cuda.empty_cache()
            rows.append(row)
            print('| ' + ' | '.join(f'{k} {v:.3g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()) + ' |', flush=True)
    return rows


@run_cli
def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--steps', type=int, default=20, help='training steps for loader_share')
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    torch.manual_seed(0), np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        print('| what | times faster (median, range) | without, s | with, s |\n|---|---|---|---|', flush=True)
        rows = []
        one = lambda measure: lambda repeats: [measure(repeats)]
        for measure in (*(one(partial(one_pass, T)) for T in (32, 64, 128)), one(partial(features, folder)), packing):
            for r in measure(args.repeats):
                rows.append(r)
                spread = f"{r['ratio']:.2f} ({r['least']:.2f}–{r['most']:.2f})"
                print(f"| {r['name']} | {spread} | {r['slow_s']:.2f} | {r['fast_s']:.3f} |", flush=True)
    for r in loader(args.steps):
        rows.append(r)
        print(f"| {r['name']} | {r['ratio']:.3f} of a step | {r['slow_s']:.2f} | {r['fast_s']:.3f} |", flush=True)
    if torch.cuda.is_available(): rows += on_gpu()
    found = dict(rows=rows, repeats=args.repeats, threads=torch.get_num_threads(), **environment())
    if args.json:
        with atomic_write(args.json) as f: json.dump(found, f, indent=1)


if __name__ == '__main__': main()
