"""The published sizes, with random weights: what fits the tiny model by accident does not fit here."""
import math

import pytest, torch
from transformers import TrainerCallback

from dst_smolvlm.core.config import compose_config
from dst_smolvlm.data.schema import VideoRecord
from dst_smolvlm.model.checkpoints import load_model
from dst_smolvlm.model.configuration import PUBLISHED, image_seq_len, published_config
from dst_smolvlm.model.modeling import DSTSmolVLM, build_published
from dst_smolvlm.model.stream_layout import StreamLayout, layout_stream, tiny_tokenizer, toy_texts
from dst_smolvlm.training.batches import StreamCollator
from dst_smolvlm.training.arguments import DSTTrainingArguments
from dst_smolvlm.training.trainer import DSTTrainer

STEPS = [dict(id=f'S{i}', name=f'put the {c} star in box {i}', spans=[(.5*i, 3)]) for i, c in enumerate(('red', 'blue', 'green'))]
RECORD = VideoRecord(video_uid='two frames', dataset='test', duration=.5, goal='sort parts', steps=STEPS,
                     turns=[dict(role='assistant', time=.5, content='Now the blue star.')])


@pytest.fixture(scope='module')
def layout(): return StreamLayout(tiny_tokenizer(toy_texts()), tokens_per_frame=4)


@pytest.fixture(scope='module')
def model():
    "SmolVLM2-256M-Video-Instruct by its published config.json, with our heads and four tokens per frame."
    return load_model(compose_config(['model=shape', 'model.size=256M']).model)[0]


@pytest.fixture(scope='module')
def item(layout):
    "Two frames in which everything happens: steps begin, and the assistant speaks. One item of a dataset."
    states = torch.from_numpy(RECORD.states()).long()                                      # [T, S]
    previous_state = torch.cat([torch.zeros_like(states[:1]), states])
    stream = layout_stream(layout, RECORD, previous_state.numpy())
    row = dict(input_ids=stream.ids, labels=stream.labels, frame_positions=stream.frame_positions, step_spans=stream.step_spans,
               previous_state=previous_state[:2], state_labels=states, speak_labels=[0, 1], update_labels=[1, 1])
    torch.manual_seed(1)
    return [{k: torch.as_tensor(v) for k, v in row.items()} | dict(
        pixel_values=torch.randn(2, 3, 512, 512), learn_frames=torch.ones(2, dtype=torch.bool))], []


class Gradients(TrainerCallback):
    "Keeps the norm of every gradient at the moment of the optimizer's step."
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


def test_sizes(model):
    "A wrong reading of the configuration would not count as many parameters as the published weights."
    assert image_seq_len(model.config) == model.model.image_seq_len == 64
    assert model.tokens_per_frame == 4
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith('heads.')) == 256_484_928
    heads = model.heads
    linear = {name: head for name, head in heads.named_modules() if name.endswith('_head') and hasattr(head, 'weight')}
    assert {name: tuple(head.weight.shape) for name, head in linear.items()} == (
        {'decisions.speaking_head': (2, 576), 'decisions.dst_update_head': (2, 576), 'state_head.dst_state_head': (3, 576)})
    assert heads.pointer.query[0].weight.shape == (576, 4*576) and heads.pointer.key[0].weight.shape == (2*576, 576)


@pytest.mark.parametrize('size, parameters, tokens', [('256M', 256_484_928, 64), ('500M', 507_482_304, 64), ('2.2B', 2_246_784_880, 81)])
@pytest.mark.parametrize('mode', ['heads', 'lm_token'])
def test_published_sizes(size, parameters, tokens, mode):
    "As many parameters as the published weights; counted without memory for them, which the largest would need 9 GB of."
    ids = dict(speak_token_id=5, update_token_id=6) if mode == 'lm_token' else {}
    with torch.device('meta'): model = DSTSmolVLM(published_config(size, decision_mode=mode, **ids))
    assert image_seq_len(model.config) == model.model.image_seq_len == model.tokens_per_frame == tokens
    assert sum(p.numel() for name, p in model.named_parameters() if not name.startswith('heads.')) == parameters
    assert {name.split('.')[2] for name in model.state_dict() if name.startswith('heads.') and name.endswith('_head.weight')} == (
        {'speaking_head', 'dst_update_head', 'dst_state_head'} if mode == 'heads' else {'dst_state_head'})
    text, vision = model.config.text_config, model.config.vision_config
    assert text.rope_parameters['rope_theta'] == (130000 if size == '2.2B' else 100000)
    assert text.hidden_size % text.num_attention_heads == 0 and vision.image_size//vision.patch_size % model.config.scale_factor == 0
    assert text.head_dim == 64 and text.max_position_embeddings == 8192


@pytest.mark.parametrize('size, mode, tokens_per_frame', [('500M', 'heads', 4), ('2.2B', 'lm_token', 0)])
def test_outputs_of_published_sizes(monkeypatch, size, mode, tokens_per_frame):
    "Every shape that comes out, at the published widths; of the layers, which are all alike, only the first is built."
    hub, text, vision, scale = PUBLISHED[size]
    monkeypatch.setitem(PUBLISHED, size, (hub, text[:2] + (1,) + text[3:], vision[:2] + (1,) + vision[3:], scale))
    model, layout = build_published(size, tokens_per_frame=tokens_per_frame, decision_mode=mode)
    states = torch.from_numpy(RECORD.states()).long()
    previous_state = torch.cat([torch.zeros_like(states[:1]), states])
    stream = layout_stream(layout, RECORD, previous_state.numpy())
    batch = {k: torch.tensor([v]) for k, v in dict(input_ids=stream.ids, labels=stream.labels, frame_positions=stream.frame_positions,
                                                   step_spans=stream.step_spans).items()}
    side = model.config.vision_config.image_size
    with torch.no_grad(): out = model(**batch, previous_state=previous_state[None, :2], pixel_values=torch.randn(2, 3, side, side))
    assert {k: tuple(v.shape) for k, v in out.items() if k != 'lm_logits'} == dict(
        speak_logits=(1, 2, 2), update_logits=(1, 2, 2), pointer_logits=(1, 2, 4), state_logits=(1, 2, 3, 3),
        lm_targets=(sum(label != -100 for label in stream.labels),))
    assert out.lm_logits.shape == (len(out.lm_targets), 49280) and all(v.isfinite().all() for v in out.values())
    assert stream.ids.count(layout.image_token_id) == 2*(tokens_per_frame or image_seq_len(model.config))


def test_one_training_step(model, layout, item, tmp_path):
    "Every head, the pointer, the words and the end of the vision tower learn. Of the layers, which are all alike, a few are left."
    tower = model.model.vision_model
    del tower.encoder.layers[1:-1], model.model.text_model.layers[2:]
    tower.requires_grad_(False)
    tower.encoder.layers[-1].requires_grad_(True)
    args = DSTTrainingArguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=1, learning_rate=1e-3, optim='sgd',
                                logging_steps=1, save_strategy='no', use_cpu=True, disable_tqdm=True)
    seen = Gradients()
    trainer = DSTTrainer(model=model, args=args, train_dataset=[item], callbacks=[seen],
                         data_collator=StreamCollator(layout.tokenizer.pad_token_id))
    before = model.lm_head.weight[layout.end_id].clone()
    trainer.train()
    assert all(math.isfinite(value) for value in trainer.state.log_history[0].values())
    # The evidence layer before the last one waits: the last begins at zero, so that no gradient passes it in the first step.
    of_heads = [name for name, _ in model.named_parameters() if name.startswith('heads.')]
    learn = [name for name in of_heads if not name.startswith('heads.decisions.evidence.0.')] + [
        'lm_head.weight', 'model.connector.modality_projection.proj.weight', 'model.vision_model.encoder.layers.1.mlp.fc2.weight',
        'model.text_model.layers.0.self_attn.q_proj.weight', 'model.text_model.embed_tokens.weight']
    assert not [name for name in learn if not seen.norms.get(name, 0) > 0]
    assert not torch.equal(before, model.lm_head.weight[layout.end_id])


def test_half_precision_with_exact_heads(model, layout, item):
    "A checkpoint in bfloat16 meets its float32 heads at the frame vectors. One frame and a few layers: a CPU is slow at this."
    model.to(torch.bfloat16).heads.float()
    del model.model.vision_model.encoder.layers[1:], model.model.text_model.layers[2:]
    batch = StreamCollator(layout.tokenizer.pad_token_id)([item])
    with torch.no_grad():
        tokens = model.encode_frames(batch['pixel_values'][:1])                            # [1, N, D]
        inputs = {k: batch[k] for k in ('input_ids', 'frame_positions', 'step_spans', 'previous_state', 'labels')}
        out = model(**inputs, frame_tokens=tokens.expand(2, -1, -1))
        with torch.autocast('cpu', dtype=torch.bfloat16): mixed = model(**inputs, frame_tokens=tokens.expand(2, -1, -1))
    assert model.dtype == tokens.dtype == out.lm_logits.dtype == torch.bfloat16
    decided = dict(speak_logits=(1, 2, 2), update_logits=(1, 2, 2), pointer_logits=(1, 2, 4), state_logits=(1, 2, 3, 3))
    assert {name: tuple(out[name].shape) for name in decided} == decided
    assert all(out[name].dtype == torch.float32 and out[name].isfinite().all() for name in decided)
    assert all(mixed[name].dtype == torch.float32 for name in decided)                     # as in mixed-precision training
    assert out.lm_logits.shape == ((batch['labels'] != -100).sum(), 49280)
