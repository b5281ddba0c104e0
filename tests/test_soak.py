"""Ten thousand frames, an hour and a half at two a second, under every strategy: nothing grows."""
import gc

import numpy as np, psutil, pytest, torch
from test_streaming import NAMES, check_cache, ids_in, picture, small_model

from dst_smolvlm.streaming.context_strategies import make_strategy
from dst_smolvlm.streaming.batch_runner import BatchStreamRunner
from dst_smolvlm.streaming.runner import StreamRunner

FRAMES, SETTLED, BUDGET, RESERVED = 10_000, 2_000, 260, 60
STRATEGIES = dict(drop_all={}, drop_middle=dict(positions='recompute'), recent_frames=dict(num_frames=12),
                  text_long_vision_short=dict(num_frames=12), summarize_and_drop=dict(summary_max_length=8), summarize_with_dst={})
MOVED = dict(turned=dict(name='drop_middle', positions='rerotate'), left=dict(name='drop_middle', positions='keep'))


def strategy_of(key):
    options = MOVED[key] if key in MOVED else dict(name=key) | STRATEGIES[key]
    return make_strategy(dict(max_seq_len=BUDGET, reserved_seq_len=RESERVED) | options)

class Life:
    "In the place of the filter: at 2 % of the frames the state changes, at 5 % the model speaks."
    def __init__(self, stream, seed): self.stream, self.rng, self.state = stream, np.random.default_rng(seed), np.zeros(len(NAMES), np.int8)
    def restart(self, state): self.state = np.array(state, np.int8)
    def __call__(self, pointer):
        if self.rng.random() < .02:
            step = self.rng.integers(len(NAMES))
            self.state[step] = (self.state[step] + 1) % 3
        self.stream.options.speak_threshold = 0. if self.rng.random() < .05 else 2.
        return self.state.copy()

def event(rng, i):
    "A frame, now and then none, and what the user says, never twice the same."
    return None if rng.random() < .01 else picture(int(rng.integers(256))), [f'Is part {i} in its box?'] if rng.random() < .01 else []

class Watch:
    "What is looked at while a stream goes on; it keeps a few numbers of it and no result."
    def __init__(self):
        self.frames = self.cuts = self.last_cut = self.longest = self.tokens = self.log = self.segments = 0
        self.replies = self.changes = 0
    def see(self, stream, result, before):
        self.frames += 1
        if result.skipped: return
        if result.dropped_tokens: self.longest = max(self.longest, self.frames - self.last_cut); self.cuts += 1; self.last_cut = self.frames
        memory = stream.memory
        self.tokens, self.log = max(self.tokens, result.cache_tokens), max(self.log, memory.length + memory.unread)
        self.segments = max(self.segments, len(memory.segments))
        self.replies += result.text is not None
        self.changes += (result.state != before).any()
    def check(self, key):
        assert self.frames == FRAMES and self.tokens < BUDGET and self.log < BUDGET and self.segments < BUDGET, (key, vars(self))
        assert self.replies > .03*FRAMES and self.changes > .01*FRAMES, (key, vars(self))
        assert self.cuts > FRAMES/300 and self.longest < 300 and FRAMES - self.last_cut < 300, (key, vars(self))

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.slow
def test_ten_thousand_frames_of_every_strategy():
    "In the rows of one cache, each at its own pace, and with keys that are turned or left where they are, beyond the last position."
    torch.set_num_threads(1)
    model, layout = small_model(layers=1)
    keys = [*STRATEGIES, *MOVED]
    batch, watches, rng = BatchStreamRunner(model, layout, len(keys), max_reply_tokens=8), {}, np.random.default_rng(0)
    for seed, key in enumerate(keys):
        stream = batch.join(key, NAMES, 'sort 3 parts into boxes', strategy=strategy_of(key))
        stream.tracker, watches[key] = Life(stream, seed), Watch()
    given, previous_state = dict.fromkeys(keys, 0), {key: np.zeros(3) for key in keys}
    capacity = settled = None
    while any(w.frames < FRAMES for w in watches.values()):
        for key in keys:
            if not batch.waiting[key] and given[key] < FRAMES: batch.add(key, *event(rng, given[key])); given[key] += 1
        for key, result in batch.step():
            watches[key].see(batch.streams[key], result, previous_state[key])
            previous_state[key] = result.state
        if capacity is None and all(w.cuts >= 2 for w in watches.values()): capacity = batch.cache.capacity, batch.cache.nbytes
        if settled is None and min(w.frames for w in watches.values()) >= SETTLED: settled = resident()
    assert resident() < 1.01*settled
    assert (batch.cache.capacity, batch.cache.nbytes) == capacity and capacity[0] < 2*BUDGET
    for key in keys:
        watches[key].check(key)
        check_cache(model, batch.streams[key].memory, turned=key != 'left')
        assert watches[key].cuts == batch.streams[key].manager.overflows
    limit = model.config.text_config.max_position_embeddings
    assert batch.cache.next_position.max() < limit < FRAMES                # keys that are left where they are came near the last position
    assert not any(batch.waiting.values()) and not batch.working and not any(batch.pending_turns.values())


@pytest.mark.slow
def test_ten_thousand_frames_of_one_runner():
    torch.set_num_threads(1)
    model, layout = small_model(layers=1)
    runner = StreamRunner(model, layout, NAMES, strategy=strategy_of('summarize_with_dst'), max_reply_tokens=8)
    watch, rng = Watch(), np.random.default_rng(1)
    runner.stream.tracker = Life(runner.stream, 1)
    previous_state, capacity, settled = np.zeros(3), None, None
    for i in range(FRAMES):
        result = runner.push(*event(rng, i))
        watch.see(runner.stream, result, previous_state)
        previous_state = result.state
        if watch.cuts == 2: capacity = runner.memory.cache.nbytes
        if i == SETTLED: settled = resident()
    assert resident() < 1.01*settled and runner.memory.cache.nbytes == capacity
    watch.check('summarize_with_dst')
    check_cache(model, runner.memory)
    assert len(ids_in(runner.memory)) < BUDGET and not runner.user_turns
