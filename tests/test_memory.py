"""The estimate of a training's memory against real forward and backward passes."""
import ctypes, gc, json, os, resource, subprocess, sys, weakref
from pathlib import Path

import pytest, torch

from dst_smolvlm import memory
from dst_smolvlm.config import InputError
from dst_smolvlm.memory import estimate_memory
from dst_smolvlm.model import DSTSmolVLM, DSTSmolVLMConfig, tiny_config


def published_256m():
    text = dict(model_type='llama', vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., rms_norm_eps=1e-5, tie_word_embeddings=False)
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
    return DSTSmolVLM(DSTSmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, tokens_per_frame=4,
                                       tie_word_embeddings=False,
                                       image_token_id=3, pad_token_id=0))


def small():
    "Small, but with several layers, several tokens per frame and fewer key heads than query heads."
    config = tiny_config(1000, 3, 0, hidden_size=192, layers=6, vision_size=128, image_size=128, scale_factor=4, vision_layers=4)
    config.tokens_per_frame = 4
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
                told=torch.zeros(streams, frames, steps, dtype=torch.long))


def checkpoint_layers(model):
    "Without the library's hook that makes the outputs of frozen embeddings learn: it sends gradients through a frozen tower, for nobody."
    model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
    model.disable_input_require_grads()


def run(model, batch):
    out = model(**batch)
    words = torch.nn.functional.cross_entropy(out.lm_logits.float(), out.lm_targets)
    return words + sum(out[f'{name}_logits'].log_softmax(-1).mean() for name in ('speak', 'update', 'pointer', 'state'))


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
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), memory.autocast(precision): loss = run(model, batch)
    gc.collect()
    size = sum(found.values())
    loss.backward()
    return size


def kept_by_estimate(e): return e.text + e.vision + e.heads + e.words


FREEZE = dict(nothing=lambda m: [], vision=lambda m: [m.model.vision_model], frames=lambda m: [m.model.vision_model, m.model.connector],
              language=lambda m: [m.model.vision_model, m.model.connector, m.model.text_model])
CASES = [(frozen, tokens, checkpointing, None) for frozen in FREEZE for tokens in (48, 96) for checkpointing in (False, True)]

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
    assert filled == pytest.approx(shapes, rel=1e-3)       # a freed storage may lend its address to another
    assert all(torch.equal(p, before[name]) for name, p in real.state_dict().items())
    assert all(p.grad is None for p in real.parameters())


@pytest.mark.parametrize('wrong,said', [(dict(optim='adam'), 'optim=adam'),
                                        (dict(precision='fp8'), 'precision=fp8'), (dict(ranks=0), 'ranks=0'),
                                        (dict(sharding='zero3'), 'sharding=zero3'), (dict(tokens=96, frames=90), 'do not fit 96 tokens')])
def test_refused(wrong, said):
    with pytest.raises(InputError, match=said): estimate_memory(small(), **wrong)


def test_peak_of_a_process(tmp_path):
    "The published 256M sizes, vision frozen, layers checkpointed: the highest resident memory of a process that really trains it."
    path = tmp_path/'peak.json'
    done = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='2'))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    print(found)
    assert .7 < found['estimated']/found['peak'] < 1.4


def peak_in_this_process(path):
    "A step and another backward pass; what was there before the model counts for nothing."
    ctypes.CDLL(None).mallopt(-3, 1 << 16)                 # freed tensors go back to the system, as far as the C library can
    model, sizes = small(), dict(streams=1, tokens=64, frames=4, words=16, steps=3)
    run(model, make_batch(model, **sizes)).backward()      # libraries and thread pools have what they need
    del model
    before = resident()
    model, sizes = published_256m(), dict(streams=1, tokens=600, frames=2, words=300, steps=12)
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

if __name__ == '__main__': peak_in_this_process(sys.argv[1])
