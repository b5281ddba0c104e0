"""An oracle, streamed like any model, is perfect through the whole pipeline: records → stream → trace on disk → scores. Exactly."""
import itertools, os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import processes
from dst_smolvlm.core.config import compose_config
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.evaluation.baselines import stream_oracle
from dst_smolvlm.evaluation.comparison import score_all, tally
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.streaming.context_strategies import STRATEGIES, make_strategy
from dst_smolvlm.streaming.trace_writer import read_trace, write_trace
from dst_smolvlm.world.replay import replay
from dst_smolvlm.world.scenes import load_scenes
from dst_smolvlm.world.toy_world import make_scene

REAL = Path(os.environ.get('DST_REAL', '../shared/real'))/'holoassist'
WORST_IS_ONE = {'cider', 'meteor', 'meteor_exact_stem'}                   # the reference itself does not have 1 there
BEST_IS_ZERO = {'reply_missing_rate', 'reply_redundant_rate', 'reply_time_diff', 'duplicate_rate'}


@pytest.fixture(scope='module')
def reader():
    model, layout = build_tiny(dict(hidden_size=32, layers=1, vision_size=32))
    return model.eval(), layout


def check(reader, scene, folder, forgets=False, **options):
    """Stream the oracle on a scene, by way of a file → its trace, and nothing but perfect scores. Where the context `forgets` the state,
    the oracle has to say it again, and these decisions are no changes."""
    trace = read_trace(write_trace(stream_oracle(*reader, scene.record, scene.frames(), **options), folder/'trace.json'))
    for f in trace.frames: f.latency_ms = f.decision_ms = 0.; f.first_token_ms = None      # that it takes its time is no error
    scores = score_all(tally(trace, scene.record).counts, dict(speaking_f1=1, update_f1=1, joint_goal_accuracy=1))
    judged = {k: v for k, v in scores.items() if isinstance(v, float) and not (forgets and k in ('update_f1', 'update_precision', 'score'))}
    wrong = {k: v for k, v in judged.items() if k not in WORST_IS_ONE and v != (0. if k in BEST_IS_ZERO else 1.)}
    assert not wrong, (scene.record.uid, wrong)
    assert scores['joint_goal_accuracy'] == 1. and (scores['speaking_f1'] == 1. or not scene.record.turns)
    return trace


@pytest.mark.parametrize('name', [n for n in STRATEGIES if n != 'none'])
def test_the_toy_world_under_every_strategy(reader, tmp_path, name):
    scene, few = make_scene(5, 'test'), dict(num_frames=8)
    small = dict(summarize_and_drop=dict(summary_max_length=16), recent_frames=few, text_long_vision_short=few)
    strategy = make_strategy(dict(name=name, max_seq_len=330, reserved_seq_len=64) | small.get(name, {}))
    trace = check(reader, scene, tmp_path, forgets=name != 'summarize_with_dst', strategy=strategy)
    assert any(e['type'] == 'overflow' for e in trace.events)


@pytest.mark.parametrize('world', ['toy', 'toy_hidden', 'toy_small', 'toy_crowded'])
def test_toy_worlds(reader, tmp_path, world):
    scenes = load_scenes(compose_config([f'data={world}', 'data.world.max_idle=6']).data, 'test')
    for i in range(3): check(reader, scenes[i], tmp_path)


def recordings():
    if not REAL.is_dir(): pytest.skip('no HoloAssist labels at hand')
    return [r for r in read_records([REAL], policy='clip') if r.steps]


def test_the_shortest_recordings(reader, tmp_path):
    for record in sorted(recordings(), key=lambda r: r.duration)[:3]: check(reader, replay(record), tmp_path, strategy=long_context(reader))


def long_context(reader):
    return make_strategy(dict(name='summarize_with_dst', max_seq_len=None), reader[0].config.text_config.max_position_embeddings)


class Skimmer:
    "A model that holds all places in its cache, and reads nothing: what the oracle needs of one."
    def __init__(self, model): self.model = model
    def __getattr__(self, name): return getattr(self.model, name)
    def encode_frames(self, pixels): return pixels.new_zeros(1, 1, self.model.config.text_config.hidden_size)
    def forward_batch(self, asks, layout):
        for ask in asks:
            cache, (ids, _) = ask.memory.cache, ask.memory.take()
            counts = np.zeros(cache.rows, int); counts[ask.memory.row] = len(ids)
            cache.lengths, cache.next_position = cache.lengths + counts, cache.next_position + counts
        return [None]*len(asks)


@dataclass
class Dark:
    "A record whose frames are all black."
    record: object
    def frames(self): return itertools.repeat(np.zeros((8, 8, 3), np.uint8), self.record.num_frames())


def part_of_the_recordings(part, parts, folder):
    torch.set_num_threads(1)
    model, layout = build_tiny(dict(hidden_size=32, layers=1, vision_size=32, image_size=64))
    reader, seen = (Skimmer(model.eval()), layout), 0
    for record in recordings()[part::parts]:
        check(reader, Dark(record), folder, strategy=long_context(reader)); seen += 1
    (folder/f'seen{part}').write_text(str(seen))


@pytest.mark.slow
def test_every_recording(tmp_path):
    "All of them, in two processes, through everything but the layers of a model."
    folders = [tmp_path/str(k) for k in range(2)]
    for f in folders: f.mkdir()
    running = [processes.start(tmp_path/f'log{k}', part_of_the_recordings, k, 2, folder) for k, folder in enumerate(folders)]
    for p in running: p.join()
    assert [p.exitcode for p in running] == [0, 0], [(tmp_path/f'log{k}').read_text()[-3000:] for k in range(2)]
    assert sum(int((folder/f'seen{k}').read_text()) for k, folder in enumerate(folders)) == len(recordings()) >= 100
