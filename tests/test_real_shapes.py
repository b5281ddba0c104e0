"""The published 256M sizes, with random weights: what fits the tiny model by accident does not fit here."""
import math

import pytest, torch
from transformers import TrainerCallback

from dst_smolvlm.dataset import StreamCollator
from dst_smolvlm.model import DSTSmolVLM, DSTSmolVLMConfig, image_seq_len
from dst_smolvlm.prompt import StreamLayout, layout_stream, tiny_tokenizer, toy_texts
from dst_smolvlm.records import VideoRecord
from dst_smolvlm.train import DSTTrainer, DSTTrainingArguments

STEPS = [dict(id=f'S{i}', name=f'put the {c} star in box {i}', spans=[(.5*i, 3)]) for i, c in enumerate(('red', 'blue', 'green'))]
RECORD = VideoRecord(video_uid='two frames', dataset='test', duration=.5, goal='sort parts', steps=STEPS,
                     turns=[dict(role='assistant', time=.5, content='Now the blue star.')])


@pytest.fixture(scope='module')
def layout(): return StreamLayout(tiny_tokenizer(toy_texts()), tokens_per_frame=4)


@pytest.fixture(scope='module')
def model(layout):
    "SmolVLM2-256M-Video-Instruct by its published config.json, with our heads and four tokens per frame."
    text = dict(model_type='llama', vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000., rms_norm_eps=1e-5, tie_word_embeddings=False)
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16)
    torch.manual_seed(0)
    return DSTSmolVLM(DSTSmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, tokens_per_frame=layout.tokens_per_frame,
                                       tie_word_embeddings=False, image_token_id=layout.image_token_id,
                                       pad_token_id=layout.tokenizer.pad_token_id))


@pytest.fixture(scope='module')
def item(layout):
    "Two frames in which everything happens: steps begin, and the assistant speaks. One item of a dataset."
    states = torch.from_numpy(RECORD.states()).long()                                      # [T, S]
    told = torch.cat([torch.zeros_like(states[:1]), states])
    stream = layout_stream(layout, RECORD, told.numpy())
    row = dict(input_ids=stream.ids, labels=stream.labels, frame_positions=stream.frame_positions, step_spans=stream.step_spans,
               told=told[:2], state_labels=states, speak_labels=[0, 1], update_labels=[1, 1])
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
    assert {name: tuple(head.weight.shape) for name, head in heads.named_children() if name.endswith('_head')} == dict(
        speaking_head=(2, 576), dst_update_head=(2, 576), dst_state_head=(3, 576))
    assert heads.query[0].weight.shape == (576, 4*576) and heads.key[0].weight.shape == (2*576, 576)


def test_one_training_step(model, layout, item, tmp_path):
    "Every head, the pointer, the words and the end of the vision tower learn. The tower's other layers stand still, to save time."
    tower = model.model.vision_model
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
    learn = [name for name, _ in model.named_parameters() if name.startswith('heads.') and not name.startswith('heads.evidence.0.')] + [
        'lm_head.weight', 'model.connector.modality_projection.proj.weight', 'model.vision_model.encoder.layers.11.mlp.fc2.weight',
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
        inputs = {k: batch[k] for k in ('input_ids', 'frame_positions', 'step_spans', 'told', 'labels')}
        out = model(**inputs, frame_tokens=tokens.expand(2, -1, -1))
        with torch.autocast('cpu', dtype=torch.bfloat16): mixed = model(**inputs, frame_tokens=tokens.expand(2, -1, -1))
    assert model.dtype == tokens.dtype == out.lm_logits.dtype == torch.bfloat16
    decided = dict(speak_logits=(1, 2, 2), update_logits=(1, 2, 2), pointer_logits=(1, 2, 4), state_logits=(1, 2, 3, 3))
    assert {name: tuple(out[name].shape) for name in decided} == decided
    assert all(out[name].dtype == torch.float32 and out[name].isfinite().all() for name in decided)
    assert all(mixed[name].dtype == torch.float32 for name in decided)                     # as in mixed-precision training
    assert out.lm_logits.shape == ((batch['labels'] != -100).sum(), 49280)
