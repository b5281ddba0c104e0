"""The estimate of a training's memory against real forward and backward passes."""
import ctypes, gc, json, os, re, resource, weakref
from pathlib import Path

import pytest, torch

import processes
from dst_smolvlm import train
from dst_smolvlm.core.config import InputError
from dst_smolvlm.model.configuration import published_config, tiny_config
from dst_smolvlm.model.modeling import DSTSmolVLM
from dst_smolvlm.training.activation_memory import MicroBatch, activations
from dst_smolvlm.training.adapters import adapt
from dst_smolvlm.training.memory_estimate import estimate_memory
from dst_smolvlm.training.parameter_groups import AdapterConfig
from dst_smolvlm.training.piece_memory import autocast


def some_256m(text_layers, vision_layers):
    "The published 256M sizes with fewer layers, which are all alike."
    config = published_config('256M', tokens_per_frame=4, image_token_id=3, pad_token_id=0)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = text_layers, vision_layers
    return DSTSmolVLM(config)


def small(**choices):
    "Small, but with several layers, several tokens per frame and fewer key heads than query heads."
    config = tiny_config(1000, 3, 0, hidden_size=192, layers=6, vision_size=128, image_size=128, scale_factor=4, vision_layers=4, **choices)
    config.tokens_per_frame = 4
    if config.decision_mode == 'lm_token': config.update(dict(speak_token_id=8, update_token_id=9))
    torch.manual_seed(0)
    return DSTSmolVLM(config)


def make_batch(model, streams, tokens, frames, words, steps):
    "Rows without padding that end with a labelled word."
    n, side = model.tokens_per_frame, model.config.vision_config.image_size
    ids, labels = torch.full((streams, tokens), 5), torch.full((streams, tokens), -100)
    begin = tokens - words - frames*n
    assert begin >= steps
    ids[:, begin:begin + frames*n] = model.config.image_token_id
    labels[:, tokens - words:] = 7
    at = torch.arange(steps)
    return dict(input_ids=ids, labels=labels, pixel_values=torch.randn(streams*frames, 3, side, side),
                frame_positions=(begin + n*torch.arange(1, frames + 1) - 1).expand(streams, -1),
                step_spans=torch.stack([at, at + 1], -1).expand(streams, -1, -1),
                previous_state=torch.zeros(streams, frames, steps, dtype=torch.long))


def checkpoint_layers(model):
    "Without the library's hook that makes the outputs of frozen embeddings learn: it sends gradients through a frozen tower, for nobody."
    model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    model.disable_input_require_grads()


def run(model, batch):
    out = model(**batch)
    words = torch.nn.functional.cross_entropy(out.lm_logits.float(), out.lm_targets)
    return words + sum(x.log_softmax(-1).mean() for x in (out.speak_logits, out.update_logits, out.pointer_logits, out.state_logits))


def kept(model, batch, precision=None):
    "Bytes that autograd really keeps until the backward pass: each storage once, without parameters and inputs."
    ours = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *batch.values()]}
    found = {}
    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata in ours: return t
        found[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, found.pop, storage._cdata, None)      # checkpointing saves inputs that nobody will ask for
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(precision): loss = run(model, batch)
    gc.collect()
    size = sum(found.values())
    loss.backward()
    return size


def kept_by_estimate(e): return e.text + e.vision + e.heads + e.words


FREEZE = dict(nothing=lambda m: [], vision=lambda m: [m.model.vision_model], frames=lambda m: [m.model.vision_model, m.model.connector],
              language=lambda m: [m.model.vision_model, m.model.connector, m.model.text_model])
CASES = [(frozen, 96, checkpointing, None) for frozen in FREEZE for checkpointing in (False, True)]

@pytest.mark.parametrize('frozen,tokens,checkpointing,precision', [*CASES, ('nothing', 48, False, 'bf16'), ('vision', 48, True, 'bf16')])
def test_kept(frozen, tokens, checkpointing, precision):
    "The estimate is what autograd keeps in the whole model."
    model, sizes = small(), dict(streams=2, tokens=tokens, frames=tokens//24, words=tokens//10, steps=5)
    for part in FREEZE[frozen](model): part.requires_grad_(False)
    if checkpointing: checkpoint_layers(model)
    estimate = estimate_memory(model, **sizes, precision=precision, checkpointing=checkpointing)
    assert all(m.gradient_checkpointing == checkpointing for m in model.model.text_model.layers)          # still as it was
    real = kept(model.train(), make_batch(model, **sizes), precision)
    print(f'{frozen} {tokens} {checkpointing} {precision}: {kept_by_estimate(estimate)/real:.3f}')
    assert kept_by_estimate(estimate) == pytest.approx(real, rel=.1)


def test_kept_by_token_decisions():
    "Without heads for the decisions, three rows of the word logits are read: another graph, and no missing heads."
    sizes = dict(streams=2, tokens=96, frames=4, words=9, steps=5)
    models = [small(decision_mode=mode).train() for mode in ('heads', 'lm_token')]
    estimates, real = [activations(m, MicroBatch(**sizes)) for m in models], [kept(m, make_batch(m, **sizes)) for m in models]
    for estimate, found in zip(estimates, real): assert estimate.kept == pytest.approx(found, rel=.1)
    # What differs between the modes is small beside all else: the difference itself must be right, too.
    assert estimates[1].heads - estimates[0].heads == pytest.approx(real[1] - real[0], rel=.25)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_kept_by_lora(checkpointing):
    "Dropout of LoRA keeps masks, also if the model was just loaded for use; frozen weights keep no inputs."
    model, sizes = small(), dict(streams=2, tokens=96, frames=4, words=9, steps=5)
    adapt(model, AdapterConfig(lora_rank=4, lora_dropout=.1)).eval()
    estimate, without = (kept_by_estimate(estimate_memory(m, **sizes, checkpointing=checkpointing)) for m in (model, small()))
    assert not any(m.training for m in model.modules())                                                    # still as it was
    if checkpointing: checkpoint_layers(model)
    assert estimate == pytest.approx(kept(model.train(), make_batch(model, **sizes)), rel=.1)
    assert estimate < .5*without                                                                           # the tower learns there


def test_frozen_tower_under_checkpointing():
    """As the trainer leaves it, the frozen tower is not in the graph; with what the library does, its layers' inputs are kept. The
    estimate rests on the first."""
    model, sizes = small(), dict(streams=1, tokens=120, frames=20, words=20, steps=3)
    for part in FREEZE['frames'](model): part.requires_grad_(False)
    model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    library = kept(model, make_batch(model, **sizes))
    model.disable_input_require_grads()
    ours, estimate = kept(model, make_batch(model, **sizes)), estimate_memory(model, **sizes, checkpointing=True)
    assert estimate.vision == 0 and kept_by_estimate(estimate) == pytest.approx(ours, rel=.1)
    layers_inputs = model.config.vision_config.num_hidden_layers*20*(128//8)**2*128*4
    assert library - ours > .9*layers_inputs


def test_inputs_are_one_micro_batch():
    "The others of a step wait in the machine's memory, so that there is nothing to say about their number."
    model = small()
    sizes = dict(tokens=96, frames=4, words=9, steps=5)
    one, two = (estimate_memory(model, streams=n, **sizes).inputs for n in (1, 2))
    assert two == 2*one >= 2*4*(4*3*128*128 + 96)
    assert estimate_memory(model, streams=1, from_features=True, **sizes).inputs < one/10
    with pytest.raises(TypeError): estimate_memory(model, accumulate=8)


def test_frames_without_gradient():
    "Half of the frames teach the vision tower: half is kept, and the other half's pixels are copied."
    model, sizes = small(), dict(streams=1, tokens=240, frames=16, words=20, steps=3)
    estimate, whole = (estimate_memory(model, **sizes, frame_grad=share) for share in (.5, 1.))
    learn = torch.arange(16) % 2 == 0
    assert kept_by_estimate(estimate) == pytest.approx(kept(model, make_batch(model, **sizes) | dict(learn_frames=learn)), rel=.1)
    assert estimate.vision < .6*whole.vision


def test_shapes_alone():
    "A model without weights gives the same estimate, and nothing of the model is changed by it."
    real = small()
    with torch.device('meta'): empty = DSTSmolVLM(real.config)
    before = {name: p.clone() for name, p in real.state_dict().items()}
    sizes = dict(streams=2, tokens=96, frames=8, words=9, steps=4)
    filled, shapes = (estimate_memory(model, **sizes).parts for model in (real, empty))
    assert filled == shapes
    assert all(torch.equal(p, before[name]) for name, p in real.state_dict().items())
    assert all(p.grad is None for p in real.parameters())


@pytest.mark.parametrize('wrong,said', [(dict(optim='adam'), 'optim=adam'),
                                        (dict(precision='fp8'), 'precision=fp8'), (dict(ranks=0), 'ranks=0'),
                                        (dict(sharding='zero3'), 'sharding=zero3'), (dict(tokens=96, frames=90), 'do not fit 96 tokens')])
def test_refused(wrong, said):
    with pytest.raises(InputError, match=said): estimate_memory(small(), **wrong)


@pytest.mark.parametrize('text_layers,vision_layers', [(2, 1), pytest.param(30, 12, marks=pytest.mark.slow)])
def test_peak_of_a_process(tmp_path, text_layers, vision_layers):
    "The 256M sizes, vision frozen, layers checkpointed: the highest resident memory of a process that really trains it."
    path, log = tmp_path/'peak.json', tmp_path/'log'
    assert processes.run(log, peak_in_this_process, path, text_layers, vision_layers) == 0, log.read_text()
    found = json.loads(path.read_text())
    print(found)
    assert .7 < found['estimated']/found['peak'] < 1.4


def peak_in_this_process(path, *layers):
    "A step and another backward pass; what was there before the model counts for nothing."
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)                 # freed tensors go back to the system, as far as the C library can
    model, sizes = small(), dict(streams=1, tokens=64, frames=4, words=16, steps=3)
    run(model, make_batch(model, **sizes)).backward()      # libraries and thread pools have what they need
    del model
    before = resident()
    model, sizes = some_256m(*layers), dict(streams=1, tokens=400, frames=2, words=200, steps=12)
    model.model.vision_model.requires_grad_(False)
    checkpoint_layers(model)
    batch = make_batch(model, **sizes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    run(model, batch).backward()
    optimizer.step()
    run(model, batch).backward()                           # gradients and optimizer state are there, as in a second micro-batch
    estimate = estimate_memory(model, **sizes, checkpointing=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024 - before
    Path(path).write_text(json.dumps(dict(estimated=estimate.total - estimate.reserve, peak=peak, before=before)))


def resident(): return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(scope='module', params=['256M', pytest.param('500M', marks=pytest.mark.slow)])
def planned(request, tmp_path_factory):
    "A dry run by the command → its output folder and what it printed."
    folder = tmp_path_factory.mktemp('planned')
    argv = ['model=shape', f'model.size={request.param}', 'train=dst_training', '++train.dry_run=true', '++train.use_cpu=true',
            '++train.bf16=false', 'data.train_videos=4', 'data.seed=0', f'output_dir={folder/"out"}']
    status = processes.run(folder/'log', train.main, argv, env=dict(OMP_NUM_THREADS='1'))
    said = (folder/'log').read_text()
    assert status == 0, said
    return folder, said


def test_dry_run(planned):
    "The command says what a training would need: each part of the estimate, and their sum."
    _, said = planned
    found = {name: float(size) for name, size in re.findall(r'^(\w+) +([\d.]+) GiB', said, re.M)}
    total = found.pop('total')
    assert {'weights', 'gradients', 'optimizer', 'inputs', 'text', 'vision', 'heads', 'words', 'passing', 'reserve'} <= found.keys()
    assert sum(found.values()) == pytest.approx(total, abs=.06)                    # of eleven rounded figures
    learn, everything = (float(re.search(rf'^ +all .*?([\d.]+) M {kind}', said, re.M)[1])*1e6 for kind in ('learn', 'parameters'))
    assert found['weights'] == pytest.approx(4*everything/2**30, abs=.01)          # float32, of which the vision tower learns nothing
    assert found['gradients'] == pytest.approx(4*learn/2**30, abs=.01) and found['optimizer'] == pytest.approx(8*learn/2**30, abs=.01)
    assert re.search(r'^(fits|does not fit) a 24 GB card', said, re.M) and 'nothing was trained' in said


def test_dry_run_leaves_nothing(planned):
    folder, _ = planned
    assert [p.name for p in folder.iterdir()] == ['log']
