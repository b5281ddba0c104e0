"""What does a streamed frame cost, and against what? Does it stay the same over hours, and how many streams fit one machine?

    OMP_NUM_THREADS=1 python bench/stream.py [--repeats 5] [--only NAME,...] [--quick] [--json FILE]

Ratios are of times taken in turn in this one run; the median and the range of the turns are told, and as `cpu_ratio` the same of the
process's own time, which says more on a busy machine. Use one thread (OMP_NUM_THREADS=1):
passes of one token gain nothing from more, and threads that wait for each other on a busy machine say little. `--only` takes patterns,
`flat_*` for one; `--quick` takes small sizes, to see that everything runs. Models have random weights, so what they decide is forced by a
script: the states and the frames at which they speak are given, the words are their own. The tiny model unless another one is named.

* cache_vs_reencode_512: a silent frame when 512 tokens are cached, against all 512 and the frame in one causal pass without a cache. The
  vision tower on the new frame and the heads are in both; the image tokens of old frames are kept in both. The decisions are the same.
  A second figure says what it would be if the other way had to encode the old frames again.
* loop_vs_generate: replies of some lengths after 512 tokens, by `generate()` against `fast_greedy_generate` on the same kind of cache, and
  against the stream's own words (`say` on a `StreamCache`). The words are the same. The ratio is the least of all cases.
* flat_*: 10,000 frames within 2048 tokens, each strategy; the state changes every 100 frames, and every 25 ten words are said. The ratio is
  the mean time of the last 1000 frames over that of frames 1000 to 2000, overflows and replies included, over the same ratio of a frame
  that never changes and is timed in between: it takes out how busy the machine was. `wall_ratio` is without that, `cpu_ratio` of the
  thread's own time. p99/p50 are of silent frames, and of all but overflow frames. Memory is that of the process (resident), after a
  collection, since frame 2000.
* batch8_vs_one: frames a second of eight toy videos in eight slots over the same videos one after the other, all cut to the length of the
  shortest, so that no slot is ever empty; the results are the same.
* int8_vision_256M: see bench/int8_vision.py. frame_share_256M: where the time of a streamed frame and one word goes in that shape; the
  ratio is the share of the vision tower. Beside it, what the cache saves in that shape.
* gpu_SIZE_TOKENS: where there is a GPU (or with --device), the published shapes, bfloat16, vision included, the context held at 4096
  tokens by rewinding after every frame: frames a second of one stream, times to decision and first word, and the number of live streams of
  2 frames a second whose decisions come within 250 ms at p99, queueing included. The ratio is the share of the arithmetic limit.
"""
import argparse, gc, json, time
from collections import defaultdict, deque
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from statistics import median

import numpy as np, psutil, torch
from transformers import DynamicCache

from dst_smolvlm.core.config import atomic_write, environment, run_cli
from dst_smolvlm.data.pixels import frames_to_pixels
from dst_smolvlm.model.modeling import build_published, build_tiny
from dst_smolvlm.model.stream_memory import Segment, generate_turn
from dst_smolvlm.streaming.context_strategies import STRATEGIES, make_strategy
from dst_smolvlm.streaming.batch_runner import BatchStreamRunner
from dst_smolvlm.streaming.runner import StreamRunner
from dst_smolvlm.world.toy_world import make_scene


# What a stream decides, by a script

class Replay:
    "In place of a stream's filter: it replays given states."
    def __init__(self, states): self.states = iter(states)
    def __call__(self, pointer): return next(self.states)
    def restart(self, previous_state): pass

class SpeakAt:
    "In place of a threshold, with which the probability is compared once a frame: it is reached at given frames, and never elsewhere."
    def __init__(self, frames): self.frames, self.frame = frames, -1
    def __le__(self, prob):
        self.frame += 1
        return self.frame in self.frames

def script(stream, states, speaks):
    stream.tracker, stream.options.speak_threshold = Replay(states), SpeakAt(speaks)

def tiny():
    "The tiny model, whose replies do not end before they are as long as they may be: what it says changes no time."
    model, layout = build_tiny()
    layout.never_said = [*layout.never_said, layout.end_id]
    return model.eval(), layout

def life(frames:int, steps:int, change:int=100, speak:int=25):
    "States [T, S] of which one changes every `change` frames, round and round; and the frames of the replies."
    states = np.zeros((frames, steps), np.int8)
    for n, i in enumerate(range(change, frames, change)): states[i:, n//2 % steps] = (states[i, n//2 % steps] + 1) % 3
    return states, set(range(speak//2, frames, speak))

def task(scene) -> dict: return dict(steps=[s.name for s in scene.record.steps], goal=scene.record.goal)

def true_script(scene):
    "The record's states, and the frames at which its assistant speaks."
    return scene.record.states(), {i for i, turns in scene.record.turns_at().items() if any(t.role == 'assistant' for t in turns)}


# Time

def clock(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin

def both_clocks(work) -> tuple[float, float]:
    "Wall seconds, and seconds of this process's own work."
    begin = time.process_time()
    wall = clock(work)
    return wall, time.process_time() - begin

def in_turn(ways:dict, repeats:int) -> dict[str, list[tuple]]:
    "The two times of every way, `repeats` times in turn, after one that does not count."
    for work in ways.values(): work()
    taken = [{name: both_clocks(work) for name, work in ways.items()} for _ in range(repeats)]
    return {name: [t[name] for t in taken] for name in ways}

def seconds(times:list[tuple]) -> float: return median(wall for wall, _ in times)

def ratio_of(slow:list[tuple], fast:list[tuple]) -> dict:
    ratios, cpu = ([a[i]/max(b[i], 1e-9) for a, b in zip(slow, fast)] for i in (0, 1))
    return dict(ratio=median(ratios), least=min(ratios), most=max(ratios), cpu_ratio=median(cpu), slow_ms=1e3*seconds(slow),
                fast_ms=1e3*seconds(fast))

PARTS = dict(encode_frames='vision', pass_through='language model', decisions='heads')

@contextmanager
def parts_of(model):
    "The seconds that a model spends in its parts, by name, while the block runs (on a CPU)."
    spent = defaultdict(float)
    def timed(name, part):
        def call(*args, **kwargs):
            begin = time.perf_counter()
            try: return part(*args, **kwargs)
            finally: spent[name] += time.perf_counter() - begin
        return call
    for method, name in PARTS.items(): setattr(model, method, timed(name, getattr(model, method)))
    try: yield spent
    finally:
        for method in PARTS: delattr(model, method)

def shares(spent:dict, total:float) -> dict[str, float]:
    "Percent of the parts, and of everything else."
    return {k: round(100*v/total, 1) for k, v in (spent | {'rest': total - sum(spent.values())}).items()}

def rewind(memory, length:int, segments:int):
    "The log and the cache's row as they were when they had so many tokens and segments."
    del memory.segments[segments:]
    memory.unread, memory.cache.lengths[memory.row], memory.cache.next_position[memory.row] = 0, length, length


# The cache

def grown(model, layout, tokens:int, **options) -> StreamRunner:
    "A stream with replies and changes that has just reached so many tokens in its cache, with nothing left to be read."
    scene = make_scene(3, 'test')
    frames, runner = scene.frames(), StreamRunner(model, layout, **task(scene), max_reply_tokens=10, **options)
    script(runner.stream, *life(4*tokens, len(scene.record.steps)))
    i = 0
    while tokens - runner.memory.length > 40 or runner.memory.unread: runner.push(frames[i % len(frames)]); i += 1
    script(runner.stream, np.tile(runner.previous_state, (10**4, 1)), set())                     # from now on silent
    while runner.memory.length < tokens: runner.push(frames[i % len(frames)]); i += 1
    if (runner.memory.length, runner.memory.unread) != (tokens, 0): raise AssertionError(f'{runner.memory.length} tokens')
    return runner

@torch.inference_mode()
def without_cache(model, memory, image):
    "The four heads' answers at a new frame, from all that a stream's log says in one pass."
    tokens = model.encode_frames(frames_to_pixels(image[None], model.config.vision_config.image_size))
    ids = [i for s in memory.segments for i in s.ids] + [model.config.image_token_id]*tokens.shape[1]
    embeds = model.embed(torch.tensor([ids]), torch.cat([s.tokens for s in memory.segments if s.tokens is not None] + [tokens]))
    hidden = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    steps = model.step_memory(hidden, embeds, torch.tensor([memory.prompt.step_spans]))
    out = model.decide(hidden[:, -1:], tokens[None], steps, torch.from_numpy(memory.previous_state[None, None].astype(np.int64)))
    return [out[f'{key}_logits'].softmax(-1)[0, 0].numpy() for key in ('speak', 'update', 'state', 'pointer')]

def cache_vs_reencode(repeats:int, quick:bool):
    model, layout = tiny()
    runner, image = grown(model, layout, 512), make_scene(5, 'test').frames()[7]
    memory = runner.memory
    length, segments = memory.length, len(memory.segments)
    def streamed():
        rewind(memory, length, segments)
        return runner.push(image)
    def reencoded():
        rewind(memory, length, segments)
        return without_cache(model, memory, image)
    ours, (speak, update, state, pointer) = streamed(), reencoded()
    for a, b in ((ours.speak_prob, speak[1]), (ours.update_prob, update[1]), (ours.state_probs, state), (ours.pointer_probs, pointer)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    frames = sum(s.kind == 'frame' for s in memory.segments)
    pixels = frames_to_pixels(image[None], 64)
    look = torch.inference_mode()(lambda n: model.encode_frames(pixels.expand(n, -1, -1, -1)))
    taken = in_turn(dict(slow=reencoded, fast=streamed, vision=lambda: look(1), old_frames=lambda: look(frames)), 10*repeats)
    vision, fast, again = (seconds(taken[k]) for k in ('vision', 'fast', 'old_frames'))
    without = (seconds(taken['slow']) - vision)/(fast - vision)
    with parts_of(model) as spent: total = sum(clock(streamed) for _ in range(50))
    yield dict(name='cache_vs_reencode_512', goal='>= 20') | ratio_of(taken['slow'], taken['fast']) | dict(
        vision_ms=1e3*vision, ratio_without_vision=without, ratio_if_old_frames_are_seen_again=(seconds(taken['slow']) + again)/fast,
        old_frames=frames, streamed_percent=shares(spent, total))


# Words

def replies(model, layout, tokens:int, words:int) -> dict:
    "Three ways to say so many words after so many tokens → callables that return the words."
    runner = grown(model, layout, tokens)
    memory = runner.memory
    length, segments = memory.length, len(memory.segments)
    past = [i for s in memory.segments for i in s.ids]
    opening, never = layout.assistant_open, [*layout.never_said]
    cache = DynamicCache()
    with torch.inference_mode(): model.prefill(past, cache, torch.cat([s.tokens for s in memory.segments if s.tokens is not None]))
    ids = torch.tensor([past + opening])
    options = dict(max_new_tokens=words, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=layout.end_id, suppress_tokens=never)
    def uncut():
        if (more := cache.get_seq_length() - length) > 0: cache.crop(-more)
        return cache
    def generate():
        with torch.inference_mode():
            said = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=uncut(), **options)
        return [i for i in said[0, ids.shape[1]:].tolist() if i != layout.end_id]
    def loop(): return model.fast_greedy_generate(opening, uncut(), layout.end_id, words, never)[0]
    def stream():
        rewind(memory, length, segments)
        return model.run(generate_turn(memory, 'assistant', opening, layout, words), layout)
    return dict(generate=generate, loop=loop, stream=stream)

def loop_vs_generate(repeats:int, quick:bool):
    model, layout = tiny()
    cases = []
    for words in (2, 6) if quick else (4, 16, 64):
        ways = replies(model, layout, 256 if quick else 512, words)
        said = {name: way() for name, way in ways.items()}
        if not said['generate'] == said['loop'] == said['stream'] or not said['loop']: raise AssertionError(said)
        taken = in_turn(ways, 2*repeats)
        cases += [dict(way=name, words=len(said['loop'])) | ratio_of(taken['generate'], taken[name]) for name in ('loop', 'stream')]
    worst = min(cases, key=lambda c: c['ratio'])
    yield dict(name='loop_vs_generate', goal='>= 1') | {k: v for k, v in worst.items() if k not in ('way', 'words')} | dict(
        cases=cases, by_case={f"{c['way']}_{c['words']}": round(c['ratio'], 2) for c in cases},
        by_case_cpu={f"{c['way']}_{c['words']}": round(c['cpu_ratio'], 2) for c in cases})


# Hours

BOUNDED = [name for name in STRATEGIES if name != 'none']

def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss

def reference_frame(model, layout):
    "A silent frame that is always the same, to tell how busy the machine is."
    runner, image = grown(model, layout, 256), make_scene(5, 'test').frames()[7]
    length, segments = runner.memory.length, len(runner.memory.segments)
    def work():
        rewind(runner.memory, length, segments)
        runner.push(image)
    return work

def flat(name:str, repeats:int, quick:bool):
    "One strategy over thousands of frames; it is not repeated."
    count, budget = (1000, 320) if quick else (10_000, 2048)
    model, layout = tiny()
    scene = make_scene(3, 'test')
    frames, small = scene.frames()[:16], dict(summary_max_length=32) if quick and name == 'summarize_and_drop' else {}
    strategy = make_strategy(dict(name=name, max_seq_len=budget, reserved_seq_len=60 if quick else 128) | small)
    runner = StreamRunner(model, layout, **task(scene), strategy=strategy, max_reply_tokens=10)
    script(runner.stream, *life(count, len(scene.record.steps)))
    ms, cpu, overflow, replied, other = (np.zeros(count) for _ in range(5))
    other[:], tenth, reference = np.nan, count//10, reference_frame(model, layout)
    for i in range(count):
        if i % 10 == 0: other[i] = clock(reference)
        if i == 2*tenth: before = resident(), runner.memory.cache.nbytes
        began = time.thread_time()
        result = runner.push(frames[i % len(frames)])
        cpu[i], ms[i] = 1e3*(time.thread_time() - began), result.latency_ms
        overflow[i], replied[i] = result.dropped_tokens > 0, result.text is not None
    after = resident(), runner.memory.cache.nbytes
    last, second = slice(-tenth, None), slice(tenth, 2*tenth)
    grew = lambda of: np.nanmean(of[last])/np.nanmean(of[second])
    tail = lambda of, which: float(np.percentile(of[which], 99)/np.percentile(of[which], 50))
    silent, usual = (overflow == 0) & (replied == 0), overflow == 0
    cuts = ms[overflow == 1]
    yield dict(
        name=f'flat_{name}', goal='<= 1.10', ratio=grew(ms)/grew(other), wall_ratio=grew(ms), cpu_ratio=grew(cpu),
        silent_ratio=grew(np.where(silent, ms, np.nan))/grew(other),
        p99_p50_silent=tail(ms, silent), p99_p50_silent_cpu=tail(cpu, silent), p99_p50_without_overflows=tail(ms, usual),
        silent_p50_ms=median(ms[silent]), reply_p50_ms=median(ms[usual & (replied == 1)]),
        overflows=len(cuts), overflow_median_ms=median(cuts), overflow_max_ms=cuts.max(), memory_mb=before[0]/1e6,
        memory_growth_percent=100*(after[0]/before[0] - 1), cache_growth_percent=100*(after[1]/before[1] - 1), cache_mb=after[1]/1e6,
        frames=count, tokens=int(runner.memory.length))


# Many streams

def films(count:int, quick:bool) -> list[tuple]:
    "Toy videos of the same length, that of the shortest, each with its frames and its script."
    scenes = [make_scene(k, 'test') for k in range(count)]
    length = 20 if quick else min(s.record.num_frames() for s in scenes)
    return [(s, s.frames()[:length], true_script(s)) for s in scenes]

def one_by_one(model, layout, videos, **options) -> dict:
    results = {}
    for k, (scene, frames, lines) in enumerate(videos):
        runner = StreamRunner(model, layout, **task(scene), **options)
        script(runner.stream, *lines)
        results[k] = [runner.push(f) for f in frames]
    return results

def together(model, layout, videos, **options) -> dict:
    batch, results = BatchStreamRunner(model, layout, len(videos), **options), {k: [] for k in range(len(videos))}
    for k, (scene, frames, lines) in enumerate(videos):
        script(batch.join(k, **task(scene)), *lines)
        for f in frames: batch.add(k, f)
    while batch.busy:
        for k, result in batch.step(): results[k].append(result)
    return results

def batch_vs_one(repeats:int, quick:bool):
    model, layout = tiny()
    videos, options = films(8, quick), dict(max_reply_tokens=10)
    ways = {way.__name__: partial(way, model, layout, videos, **options) for way in (one_by_one, together)}
    same = [{k: [(r.state.tolist(), r.text) for r in rs] for k, rs in way().items()} for way in ways.values()]
    if same[0] != same[1]: raise AssertionError('the streams together do not say and believe what they do alone')
    taken, where = in_turn(ways, repeats), {}
    for name, way in ways.items():
        with parts_of(model) as spent: total = clock(way)
        where[f'{name}_percent'] = shares(spent, total)
    frames = sum(len(v[1]) for v in videos)
    yield dict(name='batch8_vs_one', goal='>= 3.5') | ratio_of(*taken.values()) | where | dict(
        frames_per_s_one=frames/seconds(taken['one_by_one']), frames_per_s_batch=frames/seconds(taken['together']), frames=frames,
        replies=sum(text is not None for rs in same[0].values() for _, text in rs))


# The published shape on a CPU

def int8_vision(repeats:int, quick:bool):
    from int8_vision import rows
    for row in rows(1 if quick else repeats, (1,)):
        yield row | dict(goal='> 1', least=row['ratio_least'], most=row['ratio_most'], slow_ms=row['fp32_ms'], fast_ms=row['int8_ms'])

def frame_share(repeats:int, quick:bool):
    "A silent frame of 4 tokens after a prompt and some frames, and one word more."
    model, layout = build_published('256M', tokens_per_frame=4)
    scene = make_scene(3, 'test')
    image = enlarged(scene.frames()[5], 512)
    runner = StreamRunner(model.eval(), layout, **task(scene), tracker_options=None, update_threshold=2., speak_threshold=2.)
    runner.push(image)
    fill(runner.memory, layout, 512)
    length, segments = runner.memory.length, len(runner.memory.segments)
    spent = defaultdict(list)
    for _ in range(2 if quick else 1 + repeats):
        rewind(runner.memory, length, segments)
        with parts_of(model) as parts: total = clock(lambda: runner.push(image))
        word = clock(lambda: model.run(generate_turn(runner.memory, 'assistant', layout.assistant_open, layout, 5), layout))
        for name, s in dict(vision=parts['vision'], prefill=parts['language model'], decode=word/5, heads=parts['heads'],
                            rest=total - sum(parts.values())).items(): spent[name].append(s)
    rewind(runner.memory, length, segments)
    with parts_of(model) as parts: again = clock(lambda: without_cache(model, runner.memory, image)) - parts['vision']
    ms = {name: 1e3*median(taken[1:]) for name, taken in spent.items()}
    total, frame = sum(ms.values()), sum(ms.values()) - ms['decode']
    yield dict(name='frame_share_256M', ratio=ms['vision']/total, percent={k: round(100*v/total, 2) for k, v in ms.items()},
               ms={k: round(v, 1) for k, v in ms.items()}, tokens=length, reencode_ms=1e3*again,
               cache_vs_reencode=(1e3*again + ms['vision'])/frame, cache_vs_reencode_without_vision=1e3*again/(frame - ms['vision']))


# What a device could do at most

# Dense bfloat16 with float32 sums (FLOP/s) and memory bandwidth (bytes/s), by the vendor's data sheet. The first name found counts.
DEVICES = {'H200': (989e12, 4.8e12), 'H100 PCIe': (756e12, 2e12), 'H100': (989e12, 3.35e12), 'A100-SXM4-40GB': (312e12, 1.555e12),
           'A100-PCIE-40GB': (312e12, 1.555e12), 'A100': (312e12, 2.039e12), 'L40S': (362e12, .864e12), 'L40': (181e12, .864e12),
           'L4': (121e12, .3e12), 'RTX 4090': (165e12, 1.008e12)}

PUBLISHED_SPEEDS = [      # of other systems on other hardware, for a sense of scale
    dict(what='134 frames/s, first token < 50 ms', device='A100', source='ViCoStream'),
    dict(what='100 frames/s', device='A100', source='StreamMind'),
    dict(what='8 frames/s, 7B parameters', device='H100', source='StreamingVLM')]

def vision_flops(config) -> int:
    "FLOP of one frame through the vision tower and the connector (matrix products alone: 2 per multiplication and sum)."
    v, D = config.vision_config, config.text_config.hidden_size
    patches, h = (v.image_size//v.patch_size)**2, v.hidden_size
    layer = 2*patches*(4*h*h + 2*h*v.intermediate_size) + 4*patches*patches*h
    tokens, width = patches//config.scale_factor**2, h*config.scale_factor**2
    return 2*patches*h*3*v.patch_size**2 + v.num_hidden_layers*layer + 2*tokens*width*D

def text_flops(config, new:int, held:int) -> int:
    "FLOP of `new` tokens through the language model, when `held` are looked at, themselves included; without the vocabulary."
    t = config.text_config
    size = getattr(t, 'head_dim', None) or t.hidden_size//t.num_attention_heads
    queries, keys = t.num_attention_heads*size, t.num_key_value_heads*size
    layer = 2*new*(2*t.hidden_size*queries + 2*t.hidden_size*keys + 3*t.hidden_size*t.intermediate_size) + 4*new*held*queries
    return t.num_hidden_layers*layer

def kv_bytes(config, tokens:int, each:int=2) -> int:
    "Bytes of the keys and values of so many tokens."
    t = config.text_config
    size = getattr(t, 'head_dim', None) or t.hidden_size//t.num_attention_heads
    return tokens*2*t.num_hidden_layers*t.num_key_value_heads*size*each

def limits(model, held:int, peak:float, bandwidth:float, memory:float=np.inf, fps:float=2.) -> dict:
    """The least that a silent frame costs, and what follows for one stream, which reads all weights for it, and for many, which share that
    reading. Heads, vocabulary and activations are left out."""
    vision, text = vision_flops(model.config), text_flops(model.config, model.tokens_per_frame, held)
    weights = [2*sum(p.numel() for p in part.parameters()) for part in (model.model.vision_model, model.model.text_model.layers)]
    cached = kv_bytes(model.config, held)
    one = max(vision/peak, weights[0]/bandwidth) + max(text/peak, (weights[1] + cached)/bandwidth)
    many = vision/peak + max(text/peak, cached/bandwidth)
    return dict(vision_gflop=vision/1e9, text_gflop=text/1e9, weights_gb=sum(weights)/1e9, kv_gb=cached/1e9, limit_fps_one=1/one,
                limit_fps_many=1/many, limit_streams=min(1/many/fps, max(0., memory - sum(weights))/cached))


# Live streams

def enlarged(image, size:int) -> np.ndarray:
    "A toy frame as large as the vision tower wants it, so that no time goes into resizing."
    return image.repeat(-(-size//len(image)), 0).repeat(-(-size//len(image)), 1)[:size, :size].copy()

def fill(memory, layout, length:int):
    "Frames of random numbers up to at most `length` tokens, as if they had been read; nothing may be unread."
    n, cache, row = memory.length, memory.cache, memory.row
    count = (length - n)//len(layout.frame)
    tokens = next(s.tokens for s in memory.segments if s.tokens is not None)
    memory.segments += [Segment('frame', layout.frame, memory.frame, tokens) for _ in range(count)]
    end = n + count*len(layout.frame)
    cache.reserve(end)
    with torch.inference_mode():
        for x in cache.keys + cache.values: x[row, :, n:end].normal_()
    cache.positions[row, n:end] = np.arange(n, end)
    cache.lengths[row] = cache.next_position[row] = end

SILENT = dict(tracker_options=None, update_threshold=2., max_reply_tokens=8)

def build(size:str, tokens_per_frame:int, device:str):
    "A shape with random weights in bfloat16, the heads in float32."
    with torch.device(device):
        model, layout = build_tiny() if size == 'tiny' else build_published(size, tokens_per_frame=tokens_per_frame)
    rotary = model.model.text_model.rotary_emb
    exact = rotary.inv_freq.clone()
    model.to(torch.bfloat16).eval().heads.float()
    rotary.inv_freq = exact
    return model, layout

class Live:
    "Streams of which each holds `held` tokens whenever a frame comes, in slots of a cache of fixed size."
    def __init__(self, model, layout, slots:int, held:int):
        self.slots, scene = slots, make_scene(3, 'test')
        self.images = [enlarged(f, model.config.vision_config.image_size) for f in scene.frames()[:8]]
        self.batch = BatchStreamRunner(model, layout, cache=model.stream_cache(slots, capacity=held + 256, fixed=True), **SILENT)
        self.marks = {}
        for k in range(slots): self.batch.join(k, **task(scene), speak_threshold=2.)
        self.batch.push({k: self.images[0] for k in range(slots)})
        for k, stream in self.batch.streams.items():
            fill(stream.memory, layout, held)
            self.marks[k] = stream.memory.length, len(stream.memory.segments)

    def step(self) -> list[tuple]:
        done = self.batch.step()
        for k, _ in done: rewind(self.batch.streams[k].memory, *self.marks[k])
        return done
    def frames(self, count:int, speak:float) -> tuple[float, list]:
        "So many frames of every stream, one after the other → seconds, and the results."
        for k, stream in self.batch.streams.items():
            stream.options.speak_threshold = speak
            for i in range(count): self.batch.add(k, self.images[i % 8])
        results, begin = [], time.perf_counter()
        while self.batch.busy: results += [r for _, r in self.step()]
        return time.perf_counter() - begin, results
    def at_rate(self, seconds:float, fps:float=2., speak:int=25) -> float:
        "Frames come at their times, every `speak`-th is answered → p99 of ms from due to decision; inf if work piles up."
        rng = np.random.default_rng(0)
        due = sorted((begin + i/fps, k) for k, begin in enumerate(rng.uniform(0, 1/fps, self.slots)) for i in range(int(seconds*fps)))
        for k, stream in self.batch.streams.items():
            stream.options.speak_threshold = SpeakAt(set(range(k % speak, int(seconds*fps), speak)))
        waits, late, due, begin = [], defaultdict(deque), deque(due), time.perf_counter()
        while due or self.batch.busy:
            now = time.perf_counter() - begin
            if now > 1.5*seconds: return np.inf
            while due and due[0][0] <= now:
                at, k = due.popleft()
                self.batch.add(k, self.images[len(waits) % 8]); late[k].append(1e3*(now - at))
            if self.batch.busy: waits += [r.decision_ms + late[k].popleft() for k, r in self.step()]
            elif due: time.sleep(max(0., due[0][0] - (time.perf_counter() - begin)))
        return float(np.percentile(waits, 99))

def most_streams(model, layout, held:int, seconds:float, bound_ms:float=250., most:int=1024) -> tuple[int, dict]:
    "The largest number of streams that all get their decisions in time, by doubling and halving; and p99 of every number that was tried."
    tried = {}
    def holds(slots) -> bool:
        try:
            live = Live(model, layout, slots, held)
            live.at_rate(1.)                                                            # warm
            tried[slots] = live.at_rate(seconds) if not live.batch.busy else np.inf
        except torch.OutOfMemoryError: tried[slots] = np.inf
        live = None
        gc.collect()
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        return tried[slots] < bound_ms
    good, bad = 0, 1
    while bad <= most and holds(bad): good, bad = bad, 2*bad
    while bad <= most and bad - good > max(1, good//16):
        middle = (good + bad)//2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good, {n: round(p, 1) if p < np.inf else None for n, p in tried.items()}

def on_device(device:str, size:str, tokens_per_frame:int, quick:bool, most:int=1024, compiled:bool=False) -> dict:
    "One shape: its times, what they could be, and how many live streams it holds."
    held, count, seconds = (256, 10, 1.) if quick else (4096, 200, 8.)
    model, layout = build(size, tokens_per_frame, device)
    if compiled: model.compile_passes()
    live = Live(model, layout, 1, held)
    live.frames(5, 2.), live.frames(5, 0.)                                              # warm
    taken, silent = live.frames(count, 2.)
    _, spoken = live.frames(count//4, 0.)
    percentiles = lambda name, times: {f'{name}_p{p}': float(np.percentile(times, p)) for p in (50, 99)}
    # Frames wait for each other in that queue: what counts is the time between two of them.
    decision, first = (one_at_a_time(live, count//2, s, what) for s, what in ((2., 'decision_ms'), (0., 'first_token_ms')))
    cuda = device.startswith('cuda')
    hardware = torch.cuda.get_device_name() if cuda else device
    peak, bandwidth = next((v for k, v in DEVICES.items() if k in hardware), (None, None))
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else np.inf
    best = limits(model, held, peak, bandwidth, memory) if peak else {}
    del live
    streams, tried = most_streams(model, layout, held, seconds, most=most)
    fps = len(silent)/taken
    share = fps/best['limit_fps_one'] if best else None
    name = f"{'gpu' if cuda else device}_{size}_{model.tokens_per_frame}" + '_compiled'*compiled
    return dict(name=name, ratio=share, device=hardware, frames_per_s=fps,
                **percentiles('decision_ms', decision), **percentiles('first_token_ms', first), live_streams=streams,
                share_of_streams=streams/best['limit_streams'] if best else None, **best, tried=tried, held=held,
                tokens_per_frame=model.tokens_per_frame, replies=sum(r.text is not None for r in spoken))

def one_at_a_time(live, count:int, speak:float, what:str) -> list[float]:
    "A time of frames that find nothing before them."
    return [getattr(live.frames(1, speak)[1][0], what) for _ in range(count)]

def measure_devices(device:str, sizes:list[str], quick:bool, most:int, compiled:bool):
    for size in sizes:
        for tokens in ((1,) if size == 'tiny' else (4, 0)):
            try: yield on_device(device, size, tokens, quick, most, compiled)
            except torch.OutOfMemoryError: yield dict(name=f'gpu_{size}_{tokens}', ratio=None, note='out of memory')
            gc.collect()
            if torch.cuda.is_available(): torch.cuda.empty_cache()


MEASURES = {'cache_vs_reencode_512': cache_vs_reencode, 'loop_vs_generate': loop_vs_generate,
            **{f'flat_{name}': partial(flat, name) for name in BOUNDED}, 'batch8_vs_one': batch_vs_one,
            'int8_vision_256M': int8_vision, 'frame_share_256M': frame_share}

def line(row:dict) -> str:
    "A row of the table."
    number = lambda v: f'{v:.3g}' if isinstance(v, float) else str(v)
    ratio = '' if row['ratio'] is None else f"{row['ratio']:.3f}"
    if 'least' in row: ratio += f" ({row['least']:.2f}–{row['most']:.2f})"
    skip = 'name', 'ratio', 'least', 'most', 'goal', 'cases', 'ratio_least', 'ratio_most', 'fp32_ms', 'int8_ms', 'repeats', 'threads'
    more = ', '.join(f'{k} {number(v)}' for k, v in row.items() if k not in skip)
    return f"| {row['name']} | {ratio} | {row.get('goal', '')} | {more} |"

@run_cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--only', default='*', help='patterns of names, with commas')
    parser.add_argument('--quick', action='store_true')
    gpu = 'cuda' if torch.cuda.is_available() else None
    parser.add_argument('--device', default=gpu, help='of the gpu_* rows; by default the GPU, if there is one')
    parser.add_argument('--sizes', default='256M,500M,2.2B', help='and their shapes; tiny is one, too')
    parser.add_argument('--most', type=int, default=1024, help='live streams that are tried at most')
    parser.add_argument('--compile', action='store_true', help='gpu_*: with compiled passes')
    parser.add_argument('--json')
    args = parser.parse_args(argv)
    if args.repeats < 1: parser.error('--repeats: at least 1')
    wanted = lambda name: any(fnmatch(name, p) for p in args.only.split(','))
    chosen = [partial(measure, args.repeats, args.quick) for name, measure in MEASURES.items() if wanted(name)]
    if args.device and wanted('gpu_'):
        chosen.append(partial(measure_devices, args.device, args.sizes.split(','), args.quick, args.most, args.compile))
    if not chosen: parser.error(f"--only {args.only}: choose of {', '.join(MEASURES)}, gpu_*")
    torch.manual_seed(0), np.random.seed(0)
    settings = dict(repeats=args.repeats, quick=args.quick, threads=torch.get_num_threads())
    found = dict(rows=[], **settings, published=PUBLISHED_SPEEDS, **environment())
    print('| what | ratio: median (range) | goal | |\n|---|---|---|---|', flush=True)
    for measure in chosen:
        for row in measure():
            found['rows'].append(row)
            print(line(row), flush=True)
            if args.json:
                with atomic_write(args.json) as f: json.dump(found, f, indent=1)
    if any(r['name'].startswith('gpu_') for r in found['rows']):
        print('\nElsewhere: ' + '; '.join(f"{p['what']} ({p['source']}, {p['device']})" for p in PUBLISHED_SPEEDS))


if __name__ == '__main__': main()
