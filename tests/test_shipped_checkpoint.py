"""The checkpoint in data/ is small, loads, and understands the sample beside it."""
import importlib.util, json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.data.frames import read_frames
from dst_smolvlm.data.loading import read_records
from dst_smolvlm.metrics.scores import score_traces
from dst_smolvlm.model.checkpoints import load_pretrained
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.streaming.session import load_thresholds, runner_options, stream_record

root = Path(__file__).parent.parent
data, checkpoint = root/'data', root/'data'/'checkpoint'


def ship_checkpoint():
    spec = importlib.util.spec_from_file_location('ship_checkpoint', root/'bench'/'ship_checkpoint.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def stream_sample(model, layout, thresholds, most=8, **changes):
    "Traces and scores of the first `most` videos."
    records, options = read_records(data/'toy.jsonl')[:most], runner_options(compose_config([]), model, thresholds) | changes
    traces = [stream_record(model.eval(), layout, r, read_frames(data/r.video, r.fps), **options) for r in records]
    return traces, score_traces(traces, records)


def test_is_small_and_complete():
    assert sum(p.stat().st_size for p in checkpoint.iterdir()) < 4_000_000
    assert {x.dtype for x in load_file(checkpoint/'model.safetensors').values()} == {torch.bfloat16}
    assert set(json.loads((checkpoint/'thresholds.json').read_text())) == {'speak', 'update'}
    assert 'ship_checkpoint' in (checkpoint/'README.md').read_text(encoding='utf-8')


def test_understands_the_sample():
    "It tracks the steps, speaks in time and names the right step; the same network untrained does none of it."
    model, layout = load_pretrained(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    traces, scores = stream_sample(model, layout, load_thresholds(compose_config([]), checkpoint))
    assert scores['joint_goal_accuracy'] > .9
    assert scores['speaking_f1'] > .85 and scores['update_f1'] > .85 and scores['response_names_step'] > .7
    said = [text for trace in traces for _, text in trace.spoken]
    assert sum('put the' in text or 'All steps are done' in text for text in said) > .9*len(said)
    _, untrained = stream_sample(*build_tiny(), dict(speak=.5, update=.5), most=2, max_reply_tokens=1)
    assert untrained['joint_goal_accuracy'] < .5


def test_shipping_again_changes_nothing(tmp_path):
    ship_checkpoint().ship(checkpoint, tmp_path/'again')
    for path in checkpoint.iterdir():
        if path.suffix != '.safetensors': assert path.read_bytes() == (tmp_path/'again'/path.name).read_bytes(), path.name
    weights, again = load_file(checkpoint/'model.safetensors'), load_file(tmp_path/'again'/'model.safetensors')
    assert weights.keys() == again.keys() and all(torch.equal(x, again[name]) for name, x in weights.items())
    with pytest.raises(InputError, match='model.safetensors.* missing'): ship_checkpoint().ship(tmp_path, tmp_path/'nothing')
