"""LoRA, frozen parts and rates: nothing that learned is lost, nothing frozen moves, and a run that goes on is as if it never stopped."""
import copy, json, os, pickle, signal
from pathlib import Path

import peft, pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

import processes
from dst_smolvlm import train
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.model.checkpoints import load_pretrained, save_model
from dst_smolvlm.model.configuration import tiny_config
from dst_smolvlm.model.heads import old_name
from dst_smolvlm.model.modeling import DSTSmolVLM, build_tiny
from dst_smolvlm.streaming.session import stream_record
from dst_smolvlm.training import adapters, lora
from dst_smolvlm.training.adapters import adapt, quantization
from dst_smolvlm.training.batches import StreamCollator
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.training.lora import add_lora, load_adapter, merged, save_adapter
from dst_smolvlm.training.parameter_groups import AdapterConfig, parameter_groups, part_of, part_sizes
from dst_smolvlm.training.arguments import DSTTrainingArguments
from dst_smolvlm.training.trainer import DSTTrainer
from dst_smolvlm.world.scenes import ToyScenes
from test_interrupted import same_weights, train_until, weights

SMALL = dict(hidden_size=32, layers=2, vision_size=32, image_size=64)
LORA = dict(lora_rank=4, lora_alpha=8., lora_dropout=.1)


PlainTrainer = type('PlainTrainer', (DSTTrainer,), {k: getattr(Trainer, k) for k in ('create_optimizer', '_save', '_load_from_checkpoint')})


def small(seed=0): return build_tiny(SMALL, seed)


def moved(model, seed=0):
    "As if it had been trained: everything that learns is somewhere else."
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.1*torch.randn_like(p))
    return model


def trainer(out, kind=DSTTrainer, model=None, steps=5, callbacks=None, **options):
    options = dict(max_steps=steps, save_steps=1, learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1, weight_decay=.01,
                   use_cpu=True, disable_tqdm=True, save_strategy='steps', seed=0, lr_scheduler_type='linear') | options
    args = DSTTrainingArguments(output_dir=str(out), **options)
    built, layout = small()
    torch.manual_seed(1)
    model = adapt(built, args) if model is None else model
    data = DSTStreamDataset(ToyScenes('train', length=4), layout, 64, max_seq_len=320, dialogues=1, auxiliary_samples=2)
    collate = StreamCollator(layout.tokenizer.pad_token_id)
    return kind(model=model, args=args, train_dataset=data, data_collator=collate, callbacks=callbacks)


def batch(layout, n=1):
    data = DSTStreamDataset(ToyScenes('train', length=4), layout, 64, max_seq_len=320, dialogues=0, auxiliary_samples=2)
    rows = StreamCollator(layout.tokenizer.pad_token_id)([data[i] for i in range(n)])
    names = 'input_ids', 'pixel_values', 'frame_positions', 'step_spans', 'previous_state', 'labels', 'learn_frames'
    return {k: v for k, v in rows.items() if k in names or k.startswith('auxiliary_sample') and k != 'auxiliary_states'}


def outputs(model, layout):
    with torch.no_grad(): out = model.eval()(**batch(layout))
    return torch.cat([v.flatten() for k, v in out.items() if k != 'lm_targets'])


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Gradients(TrainerCallback):
    "Keeps the gradients at the moment of each of the optimizer's steps."
    def __init__(self): self.steps = []
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


# What is saved

def test_the_library_loses_the_heads_and_we_do_not(tmp_path):
    "`add_adapter` and `save_pretrained` write LoRA alone: a user who trusts them gets the untrained heads back, without a word."
    model, layout = small()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=AdapterConfig().lora_targets))
    model.heads.requires_grad_(True)
    trained = moved(model)
    trained.save_pretrained(tmp_path/'theirs')
    again, _ = small()
    again.load_adapter(str(tmp_path/'theirs'))
    assert not torch.equal(again.heads.decisions.speaking_head.weight, trained.heads.decisions.speaking_head.weight)
    assert torch.equal(again.heads.decisions.speaking_head.weight, small()[0].heads.decisions.speaking_head.weight)

    trained = moved(add_lora(small()[0], AdapterConfig(**LORA)))
    again = load_adapter(small()[0], save_adapter(trained, tmp_path/'ours'))
    assert same(again, trained)
    assert torch.equal(outputs(again, layout), outputs(trained, layout))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in trained.named_parameters() if p.requires_grad}


def test_peft_reads_our_folder(tmp_path):
    "The format is peft's own: its loader puts heads, both embeddings and LoRA back."
    model, layout = small()
    trained = moved(add_lora(model, AdapterConfig(**LORA, lora_train=['heads', 'embeddings', 'connector'])))
    theirs = peft.PeftModel.from_pretrained(small()[0], str(save_adapter(trained, tmp_path/'a')))
    assert torch.allclose(outputs(theirs, layout), outputs(trained, layout), atol=1e-6)
    assert not torch.allclose(outputs(small()[0], layout), outputs(trained, layout), atol=1e-2)


@pytest.mark.parametrize('parts', [['vision', 'connector', 'embeddings', 'heads'], []])
def test_everything_that_moved_is_in_the_folder(tmp_path, parts):
    cfg = AdapterConfig(**LORA, lora_train=parts)
    trained = moved(add_lora(small()[0], cfg))
    trained.requires_grad_(False)                       # what is saved must not depend on what is frozen at that moment
    with safe_open(save_adapter(trained, tmp_path/'a')/'adapter_model.safetensors', 'pt') as f: names = set(f.keys())
    assert {part_of(n) for n in names} == {'lora', *parts}
    assert same(load_adapter(small()[0], tmp_path/'a'), trained)


@pytest.mark.parametrize('parts', [['heads'], []])
def test_an_adapter_with_the_names_of_older_versions(tmp_path, parts, monkeypatch):
    "The weights of its heads get their present names, and the fingerprints of its base still fit."
    trained = moved(add_lora(small()[0], AdapterConfig(**LORA, lora_train=parts)))
    folder = save_adapter(trained, tmp_path/'a')
    with safe_open(folder/'adapter_model.safetensors', 'pt') as f: metadata, names = f.metadata(), list(f.keys())
    weights = load_file(folder/'adapter_model.safetensors')
    save_file({old_name(name): weights[name] for name in names}, folder/'adapter_model.safetensors', metadata=metadata)
    assert same(load_adapter(small()[0], folder), trained)
    base = small()[0]
    names = ['heads.pointer.query.0.weight', 'heads.state_head.previous_state_embedding.weight', 'lm_head.weight']
    older = {old_name(name): dict(base.named_parameters())[name] for name in names}
    now = lora.fingerprint(base, names)
    monkeypatch.setattr(lora, 'own_parameters', lambda model: older)
    assert lora.fingerprint(base, older) == now


def test_tied_embeddings_stay_one_tensor(tmp_path):
    "peft's modules_to_save makes two of them."
    def tied():
        _, layout = small()
        config = tiny_config(len(layout.tokenizer), layout.image_token_id, layout.tokenizer.pad_token_id, **SMALL)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
        torch.manual_seed(0)
        return DSTSmolVLM(config), layout
    model, layout = tied()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    in_full = dict(target_modules=AdapterConfig().lora_targets, modules_to_save=['embed_tokens', 'lm_head'])
    wrapped = peft.get_peft_model(tied()[0], peft.LoraConfig(r=2, **in_full))
    theirs = moved(wrapped).base_model.model
    assert not torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)
    trained = moved(add_lora(model, AdapterConfig(**LORA)))
    for other in (load_adapter(tied()[0], save_adapter(trained, tmp_path/'a')), merged(trained)):
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert torch.allclose(outputs(other, layout), outputs(trained, layout), atol=1e-5)
    saved, _ = load_pretrained(save_model(merged(trained), layout, tmp_path/'whole'))
    assert torch.allclose(outputs(saved, layout), outputs(trained, layout), atol=1e-5)


def test_a_killed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    trained = moved(add_lora(small()[0], AdapterConfig(**LORA)))
    save_adapter(trained, tmp_path/'a')
    before = {p.name: p.read_bytes() for p in (tmp_path/'a').iterdir()}
    def fail(*args, **kwargs): raise OSError('disk full')
    monkeypatch.setattr(lora, 'save_file', fail)
    with pytest.raises(OSError): save_adapter(moved(trained), tmp_path/'a')
    assert {p.name: p.read_bytes() for p in (tmp_path/'a').iterdir()} == before
    assert os.listdir(tmp_path) == ['a']


# What is refused

@pytest.fixture
def folder(tmp_path): return save_adapter(moved(add_lora(small()[0], AdapterConfig(**LORA))), tmp_path/'adapter')


def refused(folder, words, model=None):
    model = small()[0] if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(InputError) as e: load_adapter(model, folder)
    assert words in str(e.value) and '\n' not in str(e.value), e.value
    assert same(model, before), 'the model was changed by what was refused'


def test_missing_and_damaged(folder):
    refused(folder/'nothing', 'no such adapter folder')
    weights, config = folder/'adapter_model.safetensors', folder/'adapter_config.json'
    good, text = weights.read_bytes(), config.read_text()
    for bad in (good[:len(good)//2], good[:5], b'', b'\0'*100):
        weights.write_bytes(bad)
        refused(folder, 'damaged')
    weights.write_bytes(good)
    for bad in ('', '[]', '{"peft_type": "LORA"}', text.replace('LORA', 'IA3'), text[:40], text.replace('"r": 4', '"r": "4"')):
        config.write_text(bad)
        refused(folder, 'not the configuration of one of our adapters')
    config.write_text(text.replace('"r": 4', '"r": 8'))
    refused(folder, 'an adapter of another model')
    config.unlink()
    refused(folder, 'it has no adapter_config.json')


def test_a_pickle_is_not_opened(folder, tmp_path):
    class Harm:
        def __reduce__(self): return Path.touch, (tmp_path/'harm',)
    (folder/'adapter_model.safetensors').unlink()
    (folder/'adapter_model.bin').write_bytes(pickle.dumps(Harm()))
    refused(folder, 'a pickle is not opened')
    assert not (tmp_path/'harm').exists()


def test_foreign_adapters(folder, tmp_path):
    refused(folder, 'trained on other weights', small(seed=1)[0])
    refused(folder, 'an adapter of another model', build_tiny(SMALL | dict(layers=3))[0])
    refused(folder, 'its r is 4', add_lora(small()[0], AdapterConfig(lora_rank=8)))
    refused(folder, 'its modules_to_save is', add_lora(small()[0], AdapterConfig(**LORA, lora_train=['heads'])))
    changed = small()[0]                                           # one layer of the base was trained since
    with torch.no_grad(): changed.model.text_model.layers[1].mlp.up_proj.weight.mul_(1.1)
    refused(folder, 'trained on other weights', changed)
    theirs = peft.get_peft_model(small()[0], peft.LoraConfig(r=4, target_modules=AdapterConfig().lora_targets, modules_to_save=['heads']))
    theirs.save_pretrained(tmp_path/'theirs')
    refused(tmp_path/'theirs', 'it does not say what it was added to')


def test_an_adapter_fits_its_base_in_another_precision(folder):
    half = load_adapter(small()[0].to(torch.bfloat16), folder)
    assert {p.dtype for n, p in half.named_parameters() if part_of(n) == 'lora'} == {torch.float32}
    assert merged(half).lm_head.weight.dtype == torch.bfloat16


def test_what_learns_unasked_is_not_lost_silently(tmp_path):
    model = add_lora(small()[0], AdapterConfig(**LORA))
    model.model.text_model.norm.requires_grad_(True)
    with pytest.raises(InputError, match='model.text_model.norm.weight: it learns'): save_adapter(model, tmp_path/'a')
    assert not list(tmp_path.iterdir())


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr(lora, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'pip install .dst_smolvlm\[lora\]'): add_lora(small()[0], AdapterConfig(**LORA))
    monkeypatch.setattr(lora, 'find_spec', lambda name: True)
    monkeypatch.setattr(adapters, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=r'pip install .dst_smolvlm\[qlora\]'): quantization(AdapterConfig(**LORA, qlora=True))


# Training

@pytest.mark.parametrize('options', [
    LORA | dict(learning_rates=dict(lora=1e-2, heads=3e-3)), LORA | dict(lora_train=['heads'], gradient_checkpointing=True),
    dict(freeze_vision=True, learning_rates=dict(heads=1e-2))], ids=['rates', 'frozen embeddings, checkpointing', 'no lora'])
def test_going_on_is_exact(tmp_path, options):
    "With dropout, from the third of five steps, in the middle of an epoch: bit for bit."
    whole = trainer(tmp_path/'whole', **options)
    whole.train()
    resumed = trainer(tmp_path/'resumed', **options)
    assert not same(whole.model, resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path/'whole'/'checkpoint-3'))
    assert same(whole.model, resumed.model)
    losses = [[h['loss'] for h in t.state.log_history if 'loss' in h] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    files = {p.name for p in (tmp_path/'whole'/'checkpoint-3').iterdir()}
    assert ('model.safetensors' in files, 'adapter_model.safetensors' in files) == ('lora_rank' not in options, 'lora_rank' in options)


def test_frozen_stays_and_everything_else_moves(tmp_path):
    t = trainer(tmp_path, **LORA, lora_train=['heads', 'embeddings', 'connector'], steps=3)
    before = copy.deepcopy(t.model)
    t.train()
    for (name, p), old in zip(t.model.named_parameters(), before.parameters()):
        assert torch.equal(p, old) != p.requires_grad, name


def test_every_gradient_is_there_and_checkpointing_changes_none(tmp_path):
    "Frozen embeddings and reentrant checkpointing are the known ways to lose those of the first layers."
    found = []
    checkpointing = dict(gradient_checkpointing=True)
    for kind in ({}, checkpointing, checkpointing | dict(gradient_checkpointing_kwargs=dict(use_reentrant=True))):
        gradients = Gradients()
        t = trainer(tmp_path, **LORA, lora_train=['heads'], steps=2, save_strategy='no', callbacks=[gradients], **kind)
        t.train()
        assert gradients.steps[-1].keys() == {n for n, p in t.model.named_parameters() if p.requires_grad}
        assert all(g.abs().sum() > 0 for n, g in gradients.steps[-1].items() if 'lora_' in n)
        found.append(gradients.steps[-1])
    for other in found[1:]:
        for name, g in other.items(): assert torch.allclose(g, found[0][name], atol=1e-5, rtol=1e-3), name


def test_a_frozen_tower_is_no_part_of_the_graph(tmp_path):
    "The library's switch for checkpointing pulls it in."
    frozen = dict(freeze_vision=True, freeze_connector=True)
    model, _ = small()
    adapt(model, AdapterConfig(**frozen)).activation_checkpointing_enable()
    assert model.encode_frames(torch.randn(1, 3, 64, 64)).requires_grad
    t = trainer(tmp_path, **frozen, gradient_checkpointing=True, steps=1)
    t.train()
    assert t.model.is_activation_checkpointing and not t.model.encode_frames(torch.randn(1, 3, 64, 64)).requires_grad


def test_streams_while_it_trains(tmp_path):
    "The validation streams the model in training: it sees what the merged one sees, and training goes on as if nothing had been."
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            scene = ToyScenes('test', length=1)[0]
            model.eval()
            self.traces = [stream_record(m, layout, scene.record, scene.frames(0, 12), max_reply_tokens=3) for m in (model, merged(model))]
            model.train()
    _, layout = small()
    look = Look()
    models = []
    for callbacks in ([look], []):                     # one after the other: the trainer seeds the random numbers when it is made
        t = trainer(tmp_path, **LORA, steps=2, save_strategy='no', callbacks=callbacks)
        t.train()
        models.append(t.model)
    assert same(*models)
    one, other = (torch.tensor([f.speak_prob for f in trace.frames]) for trace in look.traces)
    assert len(one) == 12 and torch.allclose(one, other, atol=1e-5)


def test_merged_is_plain_and_leaves_the_model(tmp_path):
    model, layout = small()
    trained = moved(add_lora(model, AdapterConfig(**LORA)))
    before, one = copy.deepcopy(trained), merged(trained)
    assert torch.allclose(outputs(one, layout), outputs(trained, layout), atol=1e-5)
    assert same(trained, before) and trained.peft_config
    assert [n for n, _ in one.named_parameters()] == [n for n, _ in small()[0].named_parameters()]
    twice = add_lora(load_pretrained(save_model(one, layout, tmp_path/'m'))[0], AdapterConfig(**LORA))     # it is a base like any other
    assert torch.allclose(outputs(twice, layout), outputs(trained, layout), atol=1e-5)
    with pytest.raises(InputError, match='weights are missing'): load_pretrained(save_model(trained, layout, tmp_path/'unmerged'))


# The command

# Evaluated by streaming after the second and the fourth step. The best is asked to be the one with the greatest loss, and not what the
# training ends with.
COMMAND = [*processes.SMALL, 'data.train_videos=4', 'data.validation_videos=2', '++train.lora_rank=4', '++train.lora_dropout=.1',
           '++train.learning_rates.lora=1e-2', '++train.max_steps=4', '++train.save_strategy=steps', '++train.save_steps=2',
           '++train.eval_strategy=steps', '++train.eval_steps=2', 'eval.max_reply_tokens=1',
           'data.world.max_steps=3', 'data.world.max_idle=4', '++train.load_best_model_at_end=true',
           '++train.metric_for_best_model=eval_loss', '++train.greater_is_better=true']
BY_RANKS = {1: ['++train.per_device_train_batch_size=2', '++train.eval_videos=1', '++train.use_cpu=true'],
            2: ['++train.per_device_train_batch_size=1', '++train.eval_videos=2', '++train.gradient_checkpointing=true']}


def command(out, ranks, *moment):
    "Run it, or run it until it kills itself at this moment; → what it printed and the exit status of rank 0."
    out.mkdir(exist_ok=True)
    argv = [*COMMAND, *BY_RANKS[ranks], f'output_dir={out}']
    call = (train_until, argv, *moment, signal.SIGKILL) if moment else (train.main, argv)
    env = dict(OMP_NUM_THREADS='1') | (dict(ACCELERATE_USE_CPU='true') if ranks > 1 else {})
    status = processes.run(out/'log', *call, ranks=ranks, env=env)
    return min(out.glob('log*')).read_text(), status if ranks == 1 else status[0]


@pytest.mark.parametrize('ranks', (1, 2))
def test_the_command_goes_on_exactly_and_leaves_the_best(ranks, tmp_path):
    "Killed in the middle, with dropout, and by one rank again in its last save: the bits of a run that nobody stopped."
    whole, out = tmp_path/'whole', tmp_path/'out'
    log, status = command(whole, ranks)
    assert status == 0, log
    assert command(out, ranks, Trainer, 'training_step', 3)[1] == -signal.SIGKILL
    files = {p.name for p in (out/'trainer'/'checkpoint-2').iterdir()}
    assert 'adapter_model.safetensors' in files and 'model.safetensors' not in files
    second = load_file(out/'trainer'/'checkpoint-2'/'adapter_model.safetensors')
    if ranks == 1:
        assert command(out, ranks, PreTrainedTokenizerBase, 'save_pretrained', None)[1] == -signal.SIGKILL
        assert not (out/'checkpoint').exists()
    log, status = command(out, ranks)
    assert status == 0 and (ranks == 1 or 'goes on from' in log), log
    assert same_weights(weights(out), weights(whole))
    assert same_weights(load_file(out/'adapter'/'adapter_model.safetensors'), second)
    losses = [h['eval_loss'] for h in json.loads((out/'training_log.json').read_text()) if 'eval_stream_slot_accuracy' in h]
    assert len(losses) == 2 and losses[0] > losses[1]

    kept, layout = load_pretrained(out/'checkpoint')
    base = build_tiny({key: compose_config(COMMAND).model[key] for key in SMALL}, seed=0)[0]
    moved = {part_of(n) for (n, p), q in zip(base.named_parameters(), kept.parameters(), strict=True) if not torch.equal(p, q)}
    assert moved == {'text', 'heads', 'embeddings'}
    assert same(merged(load_adapter(base, out/'adapter')), kept)
    scene = ToyScenes('test', length=1)[0]
    assert len(stream_record(kept, layout, scene.record, scene.frames(0, 8), max_reply_tokens=2).frames) == 8


# Rates

def test_default_training_is_unchanged(tmp_path):
    "Without LoRA and rates the additions to the trainer change no bit."
    ours, theirs = trainer(tmp_path/'a', steps=3), trainer(tmp_path/'b', PlainTrainer, steps=3)
    for t in (ours, theirs): t.train()
    assert same(ours.model, theirs.model)
    for a, b in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != 'params'} == {k: v for k, v in b.items() if k != 'params'}


def test_rates_reach_the_parameters_and_follow_the_schedule(tmp_path):
    rates = dict(lora=1e-2, heads=5e-3)
    t = trainer(tmp_path, **LORA, learning_rates=rates, steps=4)
    t.train()
    for group in t.optimizer.param_groups:
        parts = {part_of(n) for n, p in t.model.named_parameters() if any(p is q for q in group['params'])}
        for part in parts: assert group['initial_lr'] == rates.get(part, 1e-3) and group['lr'] == 0., part
    assert t.state.log_history[1]['learning_rate'] == pytest.approx(1e-3*.75)


def test_a_rate_for_every_part(tmp_path):
    "Nothing is left for the trainer's own rate."
    rates = dict(vision=1e-5, connector=1e-5, text=1e-5, embeddings=1e-5, heads=1e-3)
    t = trainer(tmp_path, learning_rates=rates, steps=1, save_strategy='no')
    before = copy.deepcopy(t.model)
    t.train()
    still = [n for (n, p), q in zip(t.model.named_parameters(), before.parameters()) if torch.equal(p, q)]
    assert all(n.startswith('heads.decisions.evidence.0.') for n in still), still      # what reads them is zero before the first step


@pytest.mark.parametrize('rates', [None, dict(heads=1e-3), dict(vision=1e-6, connector=1e-5, text=1e-5, embeddings=1e-5, heads=1e-3)])
def test_every_parameter_is_in_one_group(rates):
    model, _ = small()
    groups = parameter_groups(model, AdapterConfig(learning_rates=rates), 1e-4, .01)
    ids = [id(p) for g in groups for p in g['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    decays = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    for name, p in model.named_parameters():
        if name.endswith('bias') or 'norm' in name: assert id(p) not in decays, name
        if name.endswith(('proj.weight', 'embed_tokens.weight', 'lm_head.weight')): assert id(p) in decays, name


def test_groups_of_a_wrapped_model():
    "Also under the names of a PeftModel and of DistributedDataParallel."
    in_full = dict(target_modules=AdapterConfig().lora_targets, modules_to_save=['heads', 'lm_head'])
    model = peft.get_peft_model(small()[0], peft.LoraConfig(r=2, **in_full))
    groups = parameter_groups(model, AdapterConfig(learning_rates=dict(lora=1e-2, heads=1e-3, embeddings=1e-5)), 1e-4, 0.)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g['lr'] for g in groups if g['params']} == {1e-2, 1e-3, 1e-5}
    assert part_of('module.heads.none_key') == 'heads' and part_of('_fsdp_wrapped_module.model.text_model.norm.weight') == 'text'


@pytest.mark.parametrize('rates, words', [
    (dict(hed=1e-3), 'learning_rates.hed: no part'), (dict(vision=1e-3), 'is frozen'), (dict(lora=1e-3), 'set lora_rank'),
    (dict(heads=-1), 'above 0'), (dict(heads=float('nan')), 'above 0'), (dict(heads='fast'), 'above 0'), (dict(heads=True), 'above 0')])
def test_wrong_rates(rates, words):
    cfg = AdapterConfig(freeze_vision=True, learning_rates=rates)
    with pytest.raises(InputError, match=words): parameter_groups(adapt(small()[0], cfg), cfg, 1e-4, 0.)


def test_lora_learns_only_in_the_language_model():
    outside = 'are not in the text model'
    for pattern, words in ((r'.*\.q_proj', outside), (r'.*lm_head', outside), ('up_proj', 'no layer has such a name')):
        model, _ = small()
        with pytest.raises(InputError, match=words): add_lora(model, AdapterConfig(lora_rank=2, lora_targets=pattern))
        assert same(model, small()[0])
    sizes = part_sizes(add_lora(small()[0], AdapterConfig(lora_rank=2)))
    assert [part for part, (learn, _) in sizes.items() if not learn] == ['vision', 'connector', 'text']


# Four bits

@pytest.fixture
def packed(tmp_path):
    "A small base on the disk, and how to load it in 4 bits."
    pytest.importorskip('bitsandbytes')
    model, layout = build_tiny(SMALL | dict(hidden_size=64))
    save_model(model, layout, tmp_path/'base')
    cfg = AdapterConfig(**LORA, qlora=True)
    return lambda: DSTSmolVLM.from_pretrained(tmp_path/'base', dtype=torch.float32, **quantization(cfg)), layout, cfg


def test_only_the_language_model_is_packed(packed):
    load, _, cfg = packed
    names = {n for n, p in load().named_parameters() if p.dtype == torch.uint8}
    assert len(names) == 14 and all('text_model.layers.' in n for n in names)
    sizes = part_sizes(load())
    assert sizes['text'][1] == part_sizes(build_tiny(SMALL | dict(hidden_size=64))[0])['text'][1]


def test_training_in_four_bits(packed, tmp_path):
    load, layout, cfg = packed
    def run(name, **options):
        torch.manual_seed(1)
        return trainer(tmp_path/name, model=add_lora(load(), cfg), **LORA, qlora=True, **options)
    with pytest.raises(ValueError, match='purely quantized'): trainer(tmp_path/'no', model=load(), **LORA, qlora=True)
    whole, gradients = run('whole', gradient_checkpointing=True), Gradients()
    whole.add_callback(gradients)
    before = copy.deepcopy({n: p.detach().clone() for n, p in whole.model.named_parameters()})
    whole.train()
    assert gradients.steps[-1].keys() == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    for name, p in whole.model.named_parameters(): assert torch.equal(p, before[name]) != p.requires_grad, name
    resumed = run('resumed', gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path/'whole'/'checkpoint-3'))
    assert same(whole.model, resumed.model)

    one = merged(whole.model)
    assert torch.allclose(outputs(one, layout), outputs(whole.model, layout), atol=1e-5)
    saved, _ = load_pretrained(save_model(one, layout, tmp_path/'merged'))
    assert torch.allclose(outputs(saved, layout), outputs(whole.model, layout), atol=1e-5)
    again = load_adapter(load(), save_adapter(whole.model, tmp_path/'adapter'))
    assert torch.equal(outputs(again, layout), outputs(whole.model, layout))
    load_adapter(load_pretrained(tmp_path/'base')[0], tmp_path/'adapter')           # also on the base as it was before it was packed
