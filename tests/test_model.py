"""What could go wrong inside the model without a word: leaks, decisions that streaming reads elsewhere, half a checkpoint on a hub."""
import os, re, shutil, subprocess, sys
from itertools import permutations
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.utils import hub as library_hub

from dst_smolvlm.core.config import InputError
from dst_smolvlm.data.pixels import frames_to_pixels
from dst_smolvlm.model.checkpoints import checkpoint_hash, load_pretrained, quiet, save_model
from dst_smolvlm.model.configuration import DSTSmolVLMConfig
from dst_smolvlm.model.heads import old_name
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny, lengths_to_read
from dst_smolvlm.model.packing import pack_rows
from dst_smolvlm.model.stream_layout import layout_stream
from dst_smolvlm.streaming.runner import StreamRunner
from dst_smolvlm.world.toy_world import make_scene, render

SMALL = dict(hidden_size=32, layers=2, vision_size=32)
WAYS = [('padded', 0), ('packed', 0), ('packed', 10**6)]
OUTPUTS = 'speak_logits', 'update_logits', 'pointer_logits', 'state_logits'


def streams(layout, limits=(10**6, 190, 260)):
    "A padded batch of streams of different lengths."
    rows = []
    for seed, limit in enumerate(limits):
        scene = make_scene(seed)
        states = torch.from_numpy(scene.record.states()).long()
        previous_state = torch.cat([torch.zeros_like(states[:1]), states])
        stream = layout_stream(layout, scene.record, previous_state.numpy(), max_tokens=limit)
        T = len(stream.frame_positions)
        rows.append((stream, previous_state[:T], frames_to_pixels(render(scene)[:T], 64)))
    def pad(values, fill):
        values = [torch.as_tensor(v) for v in values]
        size = [max(v.shape[d] for v in values) for d in range(values[0].dim())]
        return torch.stack([F.pad(v, [x for d in reversed(range(v.dim())) for x in (0, size[d] - v.shape[d])], value=fill) for v in values])
    return dict(input_ids=pad([r[0].ids for r in rows], layout.tokenizer.pad_token_id), labels=pad([r[0].labels for r in rows], -100),
                frame_positions=pad([r[0].frame_positions for r in rows], -1), step_spans=pad([r[0].step_spans for r in rows], -1),
                previous_state=pad([r[1] for r in rows], -1), pixel_values=torch.cat([r[2] for r in rows]))


def tiny_and_streams(attention):
    "A small model that reads with this kernel, and streams for it."
    model, layout = build_tiny(SMALL)
    model.set_attn_implementation(attention)
    return model, streams(layout)


def reading(model, how, row_tokens=0): model.reading, model.row_tokens = how, row_tokens; return model

def score(out, valid):
    "A number that depends on every output of real frames and words."
    parts = [out[k][valid].float() for k in OUTPUTS if k != 'pointer_logits']
    parts += [out.pointer_logits[valid].float().softmax(-1), out.lm_logits.float()]
    return sum((part*torch.linspace(-1, 1, part.numel()).reshape(part.shape)).sum()/part.numel() for part in parts)

def results(model, batch):
    "Outputs at real frames and words, and all gradients."
    model.zero_grad()
    out, valid = model(**batch), batch['frame_positions'] >= 0
    score(out, valid).backward()
    return {k: out[k][valid].detach() for k in OUTPUTS} | dict(lm=out.lm_logits.detach()), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
@pytest.mark.parametrize('mode', ['heads', 'lm_token'])
def test_every_way_to_read_is_the_same(mode, attention):
    "Outputs and gradients; with gradient checkpointing as well."
    model, layout = build_tiny(SMALL | dict(decision_mode=mode))
    model.set_attn_implementation(attention)
    batch = streams(layout)
    expected = results(reading(model.train(), 'alone'), batch)
    for checkpointing in (False, True):
        if checkpointing: model.gradient_checkpointing_enable()
        for way in WAYS:
            for ours, theirs in zip(results(reading(model, *way), batch), expected):
                for name, value in theirs.items():
                    torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4, msg=f'{way} {name}')


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_packed_in_half_precision(attention):
    "Under autocast every way is about as far from float32, and all of it is finite."
    model, batch = tiny_and_streams(attention)
    exact = results(reading(model.eval(), 'alone'), batch)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        alone, packed = (results(reading(model, *way), batch)[0] for way in (('alone', 0), ('packed', 10**6)))
    for name, value in exact.items():
        off = [(mixed[name].float() - value).abs().max() for mixed in (alone, packed)]
        assert off[1].isfinite() and off[1] < 3*off[0] + .02, (name, off)


@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_no_stream_sees_another(attention):
    "Three streams in one row. Exchange one for noise: the others' outputs stay. Learn from one: the others' gradient is exactly zero."
    model, batch = tiny_and_streams(attention)
    lengths = lengths_to_read(batch['frame_positions'], batch['step_spans'], batch['labels'])
    assert len(pack_rows(lengths.tolist(), 10**6)) == 1
    reading(model.eval(), 'packed', 10**6)
    with torch.no_grad(): embeds = model.embed(batch['input_ids'], model.encode_frames(batch['pixel_values']))
    torch.manual_seed(0)
    for changed, other in permutations(range(3), 2):
        noise = embeds.clone()
        noise[changed] = torch.randn_like(noise[changed])
        with torch.no_grad(): before, after = (model.read(x, lengths)[other, :lengths[other]] for x in (embeds, noise))
        assert (before - after).abs().max() <= 1e-6
    embeds.requires_grad_()
    for i in range(3):
        (gradient,) = torch.autograd.grad(model.read(embeds, lengths)[i, :lengths[i]].square().sum(), embeds)
        assert gradient[i, :lengths[i]].abs().amax(-1).min() > 0
        assert gradient[[j for j in range(3) if j != i]].abs().max() == 0 and not gradient[i, lengths[i]:].any()


def test_every_parameter_has_a_gradient():
    "In both modes: distributed training waits for any that has none."
    for mode in ('heads', 'lm_token'):
        model, layout = build_tiny(SMALL | dict(decision_mode=mode))
        _, gradients = results(model, streams(layout))
        assert not [name for name, g in gradients.items() if g is None]
        assert not [name for name, g in gradients.items() if not g.any() and not name.startswith('heads.decisions.evidence.0')]


def test_modes_have_their_own_modules():
    by_head, by_token = (build_tiny(SMALL | dict(decision_mode=mode))[0] for mode in ('heads', 'lm_token'))
    left_out = set(by_head.state_dict()) - set(by_token.state_dict())
    assert {name.split('.')[2] for name in left_out} == {'speaking_head', 'dst_update_head', 'evidence'}
    assert not set(by_token.state_dict()) - set(by_head.state_dict())
    assert all(torch.equal(p, dict(by_token.named_parameters())[n]) for n, p in by_head.named_parameters() if n.startswith('model.'))


def test_token_decisions_are_three_rows_of_the_output_layer():
    "Each row moves its own decisions, and no other row moves any; in float32 also under autocast and with a bfloat16 backbone."
    model, layout = build_tiny(SMALL | dict(decision_mode='lm_token'))
    hidden, c = torch.randn(1, 5, 32), model.config
    decisions = lambda: torch.stack(model.token_logits(hidden))                            # [2, 1, 5, 2]
    with torch.no_grad():
        before = decisions()
        used = c.image_token_id, c.speak_token_id, c.update_token_id
        others = sorted(set(range(c.text_config.vocab_size)) - set(used))
        moves = ([used[0]], [[1, 0], [1, 0]]), ([used[1]], [[0, 1], [0, 0]]), ([used[2]], [[0, 0], [0, 1]]), (others, [[0, 0], [0, 0]])
        for rows, moved in moves:
            kept = model.lm_head.weight[rows].clone()
            model.lm_head.weight[rows] += 1
            assert ((decisions() != before).amax((1, 2)).int().tolist()) == moved
            model.lm_head.weight[rows] = kept
        with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(decisions(), before)
        model.to(torch.bfloat16).heads.float()
        assert decisions().dtype == torch.float32


@pytest.mark.parametrize('mode', ['heads', 'lm_token'])
@pytest.mark.parametrize('source', ['embedding', 'hidden'])
def test_streaming_equals_one_pass(mode, source):
    model, layout = build_tiny(SMALL | dict(decision_mode=mode, pointer_source=source))
    scene = make_scene(1, 'test')
    frames, names = scene.frames()[:25], [s.name for s in scene.record.steps]
    runner = StreamRunner(model.eval(), layout, names, tracker_options=None, max_reply_tokens=4, speak_threshold=.4)
    previous_state = []
    answers = [(previous_state.append(torch.from_numpy(runner.previous_state.astype(int))), runner.push(f))[1] for f in frames]
    ids = torch.tensor([[i for s in runner.memory.segments for i in s.ids][:runner.memory.length]])
    with torch.no_grad():
        out = model(ids, frames_to_pixels(frames, 64), frame_positions=(ids == layout.image_token_id).nonzero()[None, :, 1],
                    step_spans=torch.tensor([runner.memory.prompt.step_spans]), previous_state=torch.stack(previous_state)[None])
    for key in ('speak', 'update'):
        streamed = torch.tensor([getattr(a, f'{key}_prob') for a in answers])
        torch.testing.assert_close(streamed, out[f'{key}_logits'][0].softmax(-1)[:, 1], atol=1e-5, rtol=0)
    streamed = torch.tensor([a.pointer_probs.tolist() for a in answers])
    torch.testing.assert_close(streamed, out.pointer_logits[0].softmax(-1), atol=1e-5, rtol=0)


@pytest.fixture(scope='module', params=['heads', 'lm_token'])
def saved(request, tmp_path_factory):
    model, layout = build_tiny(SMALL | dict(decision_mode=request.param))
    facts = dict(data='toy', steps=300, seed=0, metrics={'joint goal accuracy': .5})
    return model, layout, save_model(model, layout, tmp_path_factory.mktemp('saved')/'checkpoint', facts)


def test_the_card_is_true_and_its_snippet_runs(saved, monkeypatch, capsys):
    model, _, folder = saved
    card = (folder/'README.md').read_text(encoding='utf-8')
    head = yaml.safe_load(card.split('---')[1])
    assert head['library_name'] == 'transformers' and head['license'] == 'apache-2.0' and 'base_model' not in head
    facts = (f'decision mode | {model.config.decision_mode}', f'parameters | {sum(p.numel() for p in model.parameters()):,}',
             'tokens per frame | 1', 'pointer source | embedding', 'data | toy', 'joint goal accuracy | 0.5')
    assert all(f'| {fact} |' in card for fact in facts)
    assert str(folder.parent) not in card
    [snippet] = re.findall('```python\n(.*?)```', card, re.DOTALL)
    if model.config.decision_mode == 'heads':            # as a user runs it, who has imported nothing
        env = os.environ | dict(HF_HUB_OFFLINE='1')
        done = subprocess.run([sys.executable, '-c', snippet], cwd=folder, capture_output=True, text=True, env=env)
        assert done.returncode == 0 and done.stdout.startswith('[0 0]'), done.stderr
    else:
        monkeypatch.chdir(folder)
        exec(snippet, {})
        assert capsys.readouterr().out.startswith('[0 0]')


def test_another_card_is_no_other_model(saved, tmp_path):
    model, layout, folder = saved
    before = checkpoint_hash(folder)
    copy = save_model(model, layout, tmp_path/'copy')
    assert (copy/'README.md').read_text() != (folder/'README.md').read_text() and checkpoint_hash(copy) == before
    (copy/'README.md').unlink()
    assert checkpoint_hash(copy) == before
    (copy/'tokenizer_config.json').write_text('{}')
    assert checkpoint_hash(copy) != before


def test_the_librarys_own_classes_load_it(saved):
    model, layout, folder = saved
    with quiet():
        assert type(AutoConfig.from_pretrained(folder)) is DSTSmolVLMConfig
        loaded, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is DSTSmolVLM and loaded.config.decision_mode == model.config.decision_mode
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    text = 'Wrong part. Next, put the red circle in box 2.<end_of_utterance>\n<image>'
    assert tokenizer(text).input_ids == layout.tokenizer(text).input_ids and tokenizer.eos_token_id == layout.end_id


def test_what_is_pushed_to_a_hub_is_complete(saved, tmp_path, monkeypatch):
    "`push_to_hub` is the library's own. What it and the tokenizer's would upload makes a checkpoint; no network is touched."
    model, layout, folder = saved
    assert type(model).push_to_hub is PreTrainedModel.push_to_hub
    uploaded = tmp_path/'hub'
    uploaded.mkdir()
    class Hub:
        def create_repo(self, repo_id, **kwargs): return type('Repo', (), dict(repo_id=repo_id))
        def create_commit(self, repo_id, operations, **kwargs):
            for op in operations: shutil.copy(op.path_or_fileobj, uploaded/op.path_in_repo)
    monkeypatch.setattr(library_hub, 'hf_api', Hub)
    data = library_hub.ModelCardData(library_name='transformers')
    card = library_hub.ModelCard.from_template(data, template_str='---\n{{ card_data }}\n---\n')
    monkeypatch.setattr(library_hub, 'create_and_tag_model_card', lambda *args, **kwargs: card)
    with quiet(): model.push_to_hub('somebody/assistant'); layout.tokenizer.push_to_hub('somebody/assistant')
    assert {p.name for p in uploaded.iterdir()} == {p.name for p in folder.iterdir()}
    again, _ = load_pretrained(uploaded)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert checkpoint_hash(uploaded) == checkpoint_hash(folder)
    assert not [p for p in Path(folder).iterdir() if p.is_dir()]                           # all that `hf upload` would take lies flat


def test_a_checkpoint_is_not_contradicted(saved):
    model, _, folder = saved
    other = dict(heads='lm_token', lm_token='heads')[model.config.decision_mode]
    with pytest.raises(InputError, match=f'model.decision_mode={other}'): load_pretrained(folder, decision_mode=other)
    with pytest.raises(InputError, match='model.pointer_source=hidden'): load_pretrained(folder, pointer_source='hidden')
    assert load_pretrained(folder, decision_mode=model.config.decision_mode)[0].config.decision_mode == model.config.decision_mode


def test_a_checkpoint_with_the_names_of_older_versions(saved, tmp_path):
    "It loads equal: as a folder, by the library's classes, and as the state of a resumed training. It is saved under the present names."
    from safetensors.torch import load_file, load_model, save_file
    model, layout, folder = saved
    older = shutil.copytree(folder, tmp_path/'older')
    weights = {old_name(name): value for name, value in load_file(folder/'model.safetensors').items()}
    assert 'heads.told_embedding.weight' in weights and 'heads.none_key' in weights and not any('.pointer.' in name for name in weights)
    save_file(weights, older/'model.safetensors', metadata=dict(format='pt'))
    resumed, by_file = (type(model)(model.config) for _ in range(2))
    resumed.load_state_dict(weights)
    load_model(by_file, older/'model.safetensors')
    with quiet(): by_library = AutoModelForImageTextToText.from_pretrained(older)
    for again in (load_pretrained(older)[0], by_library, resumed, by_file):
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    saved_again = save_model(load_pretrained(older)[0], layout, tmp_path/'again')
    assert load_file(saved_again/'model.safetensors').keys() == load_file(folder/'model.safetensors').keys()


def test_missing_heads_are_not_made_up(saved, tmp_path):
    "Only a plain SmolVLM2 gets new heads: in one of ours a missing one is damage."
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(saved[2], tmp_path/'damaged')
    weights = load_file(folder/'model.safetensors')
    save_file({k: v for k, v in weights.items() if k != 'heads.none_key'}, folder/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(InputError, match='1 weights are missing, the first is heads.none_key'): load_pretrained(folder)
