"The bench of streaming: its arithmetic against a count of the operations, its scripts, and that a row is written. No time is asserted."
import importlib.util, json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dst_smolvlm.model.configuration import published_config
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny
from dst_smolvlm.world.toy_world import make_scene

root = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('bench_stream', root/'bench'/'stream.py')
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

def counted(work) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(): work()
    return counter.get_total_flops()

def shape(size):
    "A published shape without any numbers in it."
    with torch.device('meta'): model = DSTSmolVLM(published_config(size, tokens_per_frame=4)).eval()
    model.set_attn_implementation('eager')
    return model

@pytest.mark.parametrize('size', ['256M', '2.2B'])
def test_the_arithmetic_is_that_of_the_operations(size):
    model = shape(size)
    side, D = model.config.vision_config.image_size, model.config.text_config.hidden_size
    tower, text = model.model.vision_model, model.model.text_model
    def look():
        patches = tower.embeddings.patch_embedding(torch.zeros(1, 3, side, side, device='meta')).flatten(2).transpose(1, 2).contiguous()
        return model.model.connector(tower.encoder(inputs_embeds=patches).last_hidden_state)
    assert counted(look) == bench.vision_flops(model.config)
    mask = torch.zeros(1, 1, 4, 100, device='meta')
    keys = bench.kv_bytes(model.config, 96)//2
    assert keys == 96*2*model.config.text_config.num_hidden_layers*text.layers[0].self_attn.k_proj.out_features
    longer = lambda x: torch.cat([x.new_zeros(*x.shape[:2], 96, x.shape[3]), x], 2)
    past = SimpleNamespace(get_seq_length=lambda *a: 96, is_compileable=False, update=lambda k, v, *a, **kw: (longer(k), longer(v)))
    read = lambda: text(inputs_embeds=torch.zeros(1, 4, D, device='meta'), attention_mask=mask, past_key_values=past,
                        position_ids=torch.arange(4, device='meta')[None])
    assert counted(read) == pytest.approx(bench.text_flops(model.config, 4, 100), rel=.001)     # the rotary angles are products too

def test_the_arithmetic_leaves_nothing_of_a_whole_pass_out():
    model, _ = build_tiny()
    assert counted(lambda: model.encode_frames(torch.zeros(1, 3, 64, 64))) == bench.vision_flops(model.config)

def test_a_frame_costs_at_least_the_reading_of_its_weights():
    model, _ = build_tiny()
    slow, fast = (bench.limits(model, 100, peak, 1e12, 1e9) for peak in (1e9, 1e30))
    assert slow['limit_fps_one'] < fast['limit_fps_one'] == pytest.approx(1e12/1e9/(fast['weights_gb'] + fast['kv_gb']))
    assert fast['limit_fps_many'] == pytest.approx(1e12/1e9/fast['kv_gb'])               # many share the weights
    cramped = bench.limits(model, 100, 1e30, 1e30, memory=2*sum(p.numel() for p in model.parameters()))
    assert cramped['limit_streams'] < 1e4                                                # and the memory is full at some time

def test_the_first_name_of_a_device_is_the_most_precise():
    found = lambda name: next(v for k, v in bench.DEVICES.items() if k in name)
    assert found('NVIDIA H100 PCIe') < found('NVIDIA H100 80GB HBM3') < found('NVIDIA H200')
    assert found('NVIDIA A100-SXM4-40GB')[1] < found('NVIDIA A100-SXM4-80GB')[1]
    assert found('NVIDIA L40S')[0] > found('NVIDIA L4')[0] and found('NVIDIA L40')[0] != found('NVIDIA L4')[0]

def test_a_script_decides_and_nothing_else():
    model, layout = bench.tiny()
    scene = make_scene(3, 'test')
    runner = bench.StreamRunner(model, layout, **bench.task(scene), max_reply_tokens=3)
    states, speaks = bench.life(12, len(scene.record.steps), change=4, speak=5)
    bench.script(runner.stream, states, speaks)
    results = [runner.push(f) for f in scene.frames()[:12]]
    assert {i for i, r in enumerate(results) if r.text is not None} == speaks == {2, 7}
    np.testing.assert_array_equal([r.state for r in results], states)
    assert (states[3] == 0).all() and states[4].sum() == 1 and states[8].max() == 2
    # A reply has as many tokens as it may have: words 3, how it opens, its end.
    replies = [s for s in runner.memory.segments if s.kind == 'assistant']
    assert {len(s.ids) for s in replies} == {len(layout.assistant_open) + 3 + 1 + len(layout.turn_end)}

def test_a_rewound_stream_answers_as_before():
    model, layout = bench.tiny()
    runner, image = bench.grown(model, layout, 160), make_scene(5, 'test').frames()[7]
    length, segments = runner.memory.length, len(runner.memory.segments)
    assert length == 160
    first = runner.push(image)
    for _ in range(5): runner.push(image)
    bench.rewind(runner.memory, length, segments)
    again = runner.push(image)
    assert (first.speak_prob, first.cache_tokens) == (pytest.approx(again.speak_prob, abs=1e-6), again.cache_tokens)
    bench.rewind(runner.memory, length, segments)
    assert bench.without_cache(model, runner.memory, image)[0][1] == pytest.approx(first.speak_prob, abs=1e-4)

def test_live_streams_hold_their_context_and_fail_when_work_piles_up():
    model, layout = bench.build('tiny', 0, 'cpu')
    live = bench.Live(model, layout, slots=2, held=200)
    lengths = lambda: [s.memory.length for s in live.batch.streams.values()]
    before = lengths()
    assert all(190 < n <= 200 for n in before)
    _, results = live.frames(3, 0.)
    assert len(results) == 6 and all(r.first_token_ms >= r.decision_ms for r in results) and lengths() == before
    assert live.at_rate(.02, fps=20_000.) == np.inf                                      # 800 frames within a fiftieth of a second

def test_quick_row_in_a_file(tmp_path, capsys):
    out = tmp_path/'rows.json'
    bench.main(['--quick', '--repeats', '1', '--only', 'loop_vs_generate', '--json', str(out)])
    found = json.loads(out.read_text())
    assert {'rows', 'hardware', 'python', 'versions', 'threads', 'repeats'} <= set(found)
    (row,) = found['rows']
    assert row['name'] == 'loop_vs_generate' and row['ratio'] == min(c['ratio'] for c in row['cases']) > 0
    assert [(c['way'], c['words']) for c in row['cases']] == [('loop', 2), ('stream', 2), ('loop', 6), ('stream', 6)]
    assert '| loop_vs_generate |' in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused: bench.main(['--only', 'nothing'])
    assert refused.value.code == 2 and 'choose of cache_vs_reencode_512' in capsys.readouterr().err
