"""The mistakes that cost others months, each committed on purpose: what it looks like, and that the code as it is does not make it.

One short stream is learned by heart. Who then streams it must hear the words of the record, at their frames, each ended; a model that
was taught with one of the mistakes does not say them."""
import os, tempfile

import numpy as np, pytest, torch
import torch.nn.functional as F
from transformers import PrinterCallback

import processes
from dst_smolvlm import train
from dst_smolvlm.model.modeling import build_tiny
from dst_smolvlm.runs import training_run
from dst_smolvlm.streaming.session import stream_record
from dst_smolvlm.training.batches import StreamCollator, model_inputs
from dst_smolvlm.training.dataset import DSTStreamDataset
from dst_smolvlm.training.losses import PARTS, multitask_loss
from dst_smolvlm.training.arguments import DSTTrainingArguments
from dst_smolvlm.training.trainer import DSTTrainer
from dst_smolvlm.world.scenes import ToyScenes
from dst_smolvlm.world.world_config import WorldConfig

WORLD = WorldConfig(min_steps=2, max_steps=2, min_carry=3, max_carry=4, min_idle=2, max_idle=3, mistakes=0, questions=0)
SCENE = ToyScenes('train', 1, 0, WORLD)


class Taught(DSTStreamDataset):
    "One stream, whose row may be spoiled."
    mistake = staticmethod(lambda row, layout: row)
    def __len__(self): return 60
    def __getitem__(self, k): return [self.mistake(self.stream(0, self.rng(0)), self.layout)], []


def learn_by_heart(mistake=None, steps=60):
    "A model that saw one stream `steps` times."
    model, layout = build_tiny(dict(hidden_size=64, layers=2))
    data = Taught(SCENE, layout, 64, from_middle=0, state_corruption=0, drop_replies=0, dialogues=0, auxiliary_samples=0)
    if mistake: data.mistake = mistake
    args = DSTTrainingArguments(output_dir=tempfile.mkdtemp() + '/trainer', max_steps=steps, per_device_train_batch_size=1,
                                learning_rate=4e-3, adam_beta2=.99, use_cpu=True, disable_tqdm=True, save_strategy='no',
                                logging_steps=steps)
    trainer = DSTTrainer(model=model, args=args, train_dataset=data, data_collator=StreamCollator(layout.tokenizer.pad_token_id))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model.eval(), layout


def watch(model, layout):
    "What the model says of the stream, by frame, and what the record says."
    scene = SCENE[0]
    trace = stream_record(model, layout, scene.record, scene.frames(), max_reply_tokens=40)
    true = {f: [t.content for t in turns if t.role == 'assistant'][0] for f, turns in scene.record.turns_at().items()}
    return trace, dict(trace.spoken), true


@pytest.fixture(scope='module')
def model(): return learn_by_heart()


def test_without_a_mistake(model):
    "Every reply at its frame, word for word and ended; every change of the state."
    trace, said, true = watch(*model)
    assert said == true
    assert (trace.states == SCENE[0].record.states()).mean() > .95
    assert set(trace.update_frames()) >= set(np.flatnonzero((np.diff(SCENE[0].record.states(), axis=0) != 0).any(1)) + 1)


def test_labels_shifted_twice(model):
    "In the data set and in the model again: each word is taught one place too late. Here, what a position says is what stands next."
    def shift(row, layout): return row | dict(labels=torch.cat([row['labels'][1:], row['labels'].new_tensor([-100])]))
    _, said, true = watch(*learn_by_heart(shift))
    assert said != true
    ours, layout = model
    row = DSTStreamDataset(SCENE, layout, 64, from_middle=0, state_corruption=0, drop_replies=0).stream(0, np.random.default_rng(0))
    batch = StreamCollator(layout.tokenizer.pad_token_id)([([row], [])])
    with torch.no_grad(): out = ours(**model_inputs(batch))
    assert (out.lm_logits.argmax(-1) == out.lm_targets).float().mean() > .95
    labelled = batch['labels'][0] != -100
    assert torch.equal(out.lm_targets, batch['input_ids'][0][labelled])         # the labels are the tokens themselves, in their places


def test_the_end_is_never_taught(model):
    "Where padding is the end token and padding is masked, nobody learns to stop: the words come, and go on."
    def mask(row, layout): return row | dict(labels=torch.where(row['labels'] == layout.end_id, -100, row['labels']))
    trained, layout = learn_by_heart(mask)
    _, said, true = watch(trained, layout)
    assert said and not set(said.values()) & set(true.values())
    assert layout.tokenizer.pad_token_id != layout.end_id


def test_heads_that_never_fire():
    "If sub-sampling drops frames at which something happens, silence is all that is learned; it must only ever drop silent ones."
    def drop(row, layout): return row | {k: torch.where(row[k] == 1, -100, row[k]) for k in ('speak_labels', 'update_labels')}
    trace, said, _ = watch(*learn_by_heart(drop))
    assert not said and not trace.update_frames()
    _, layout = build_tiny()
    every, few = (DSTStreamDataset(SCENE, layout, 64, negative_keep=keep) for keep in (1., .1))
    kept = drawn = 0
    for epoch in range(20):
        rows = []
        for data in (every, few):
            data.set_epoch(epoch)
            rows.append(data.stream(0, data.rng(0), look=False))
        for key in ('speak_labels', 'update_labels'):
            assert torch.equal(rows[0][key] == 1, rows[1][key] == 1)
        drawn, kept = drawn + (rows[0]['speak_labels'] == 0).sum(), kept + (rows[1]['speak_labels'] == 0).sum()
    assert 0 < kept < .2*drawn


def test_a_batch_without_positives_is_not_nan():
    "A mean over nothing is not a number, and one step later no weight is. Ours is zero, and the step moves what it has labels for."
    assert F.cross_entropy(torch.zeros(3, 2), torch.full((3,), -100)).isnan()
    def silence(row, layout):
        masked = {k: torch.full_like(row[k], -100) for k in ('labels', 'speak_labels', 'update_labels')}
        return row | masked
    model, _ = learn_by_heart(silence, steps=2)
    assert all(p.isfinite().all() for p in model.parameters())
    def nothing(row, layout): return silence(row, layout) | dict(state_labels=torch.full_like(row['state_labels'], -100))
    model, layout = learn_by_heart(nothing, steps=2)
    assert all(p.isfinite().all() for p in model.parameters())
    data = Taught(SCENE, layout, 64, dialogues=0, auxiliary_samples=0)
    data.mistake = nothing
    batch = StreamCollator(layout.tokenizer.pad_token_id)([data[0]])
    _, parts = multitask_loss(model(**model_inputs(batch)), batch, DSTTrainingArguments(output_dir='unused', use_cpu=True))
    assert {k: v.item() for k, v in parts.items()} == dict.fromkeys(PARTS, 0.)


def seed_by_rank(argv):
    "The command, in which every rank draws other weights, as where the seed is never set."
    original = training_run.load_model
    training_run.load_model = lambda cfg, seed, **kwargs: original(cfg, seed + int(os.environ['RANK']), **kwargs)
    train.main(argv)


def test_unsynchronised_ranks(tmp_path):
    "Two processes whose weights differ from the start are refused, before the first step. (Two that never meet: test_two_processes.)"
    argv = [*processes.SMALL, 'data.train_videos=4', '++train.max_steps=1', f'output_dir={tmp_path/"out"}',
            '++train.per_device_train_batch_size=1']
    assert processes.run(tmp_path/'log', seed_by_rank, argv, ranks=2, env=dict(ACCELERATE_USE_CPU='true')) == [2, 2]
    assert 'the ranks hold different weights' in (tmp_path/'log0').read_text()
