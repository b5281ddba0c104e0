"""What a training is asked for that does not exist is said before it begins; what the library does for us is really on."""
import json

import pytest, torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback

import processes
from dst_smolvlm.config import InputError, compose_config
from dst_smolvlm.train import make_trainer, train
from dst_smolvlm.trainer import training_arguments

SMALL = [*processes.SMALL, 'data.train_videos=4', 'data.validation_videos=1', '++train.max_steps=3', '++train.use_cpu=true',
         '++train.save_strategy=no', '++train.per_device_train_batch_size=1', 'eval.max_reply_tokens=2']


def trainer_of(tmp_path, *overrides):
    cfg = compose_config([*SMALL, *overrides])
    trainer = make_trainer(cfg, training_arguments(cfg, tmp_path/'trainer'))
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(('overrides', 'said'), (
    (['++train.report_to=tensorbord'], 'train.report_to=tensorbord: tensorbord is not supported'),
    (['++train.report_to=trackio'], 'train.report_to=trackio: .*pip install trackio'),
    (['++train.metric_for_best_model=f1'], 'train.metric_for_best_model=f1: choose one of eval_loss'),
    (['++train.early_stopping_patience=2', '++train.eval_strategy=steps', '++train.eval_steps=1'], 'better by what'),
    (['++train.class_weights=auto'], "choose 'fixed' or 'data'"),
    (['++train.deepspeed=zero2.json'], 'train: .*deepspeed'),
    (['++train.optim=adamw_9bit'], 'train: adamw_9bit is not a valid'),
    (['++train.load_best_model_at_end=true', '++train.eval_strategy=steps', '++train.eval_steps=2'], 'train: .*load_best_model_at_end'),
    (['++train.lora_rank=4', '++train.freeze_text=true'], 'freeze_text=true: lora_rank'),
    (['++train.qlora=true'], 'qlora=true: 4-bit weights cannot learn'),
))
def test_said_before_it_begins(overrides, said, tmp_path):
    with pytest.raises(InputError, match=said): trainer_of(tmp_path, *overrides)


def test_order(tmp_path):
    with pytest.raises(InputError, match="choose 'random', 'sequential' or 'group_by_length'"):
        trainer_of(tmp_path, '++train.train_sampling_strategy=batch_rebalance').train()


def test_tensorboard_gets_every_part(tmp_path, monkeypatch):
    monkeypatch.setenv('TENSORBOARD_LOGGING_DIR', str(tmp_path/'runs'))
    trainer_of(tmp_path, '++train.report_to=tensorboard', '++train.eval_strategy=steps', '++train.eval_steps=3').train()
    events = EventAccumulator(str(tmp_path/'runs')).Reload()
    seen = events.Tags()['scalars']
    assert {f'train/loss_{part}' for part in ('lm', 'speak', 'update', 'state', 'pointer')} <= {*seen}
    assert {'eval/loss', 'eval/stream_slot_accuracy'} <= {*seen}
    assert [e.step for e in events.Scalars('train/loss_speak')] == [1, 2, 3]


def test_early_stopping(tmp_path):
    "A metric that never gets better ends the run after so many evaluations."
    trainer = trainer_of(tmp_path, '++train.early_stopping_patience=2', '++train.eval_strategy=steps', '++train.eval_steps=1',
                         '++train.metric_for_best_model=eval_stream_slot_accuracy', '++train.max_steps=9')
    trainer.watch = lambda trainer: dict(stream_slot_accuracy=.5)
    trainer.train()
    assert trainer.state.global_step == 3


def test_compiled_layers(tmp_path):
    "The layers are compiled, and nothing else: the same names, and after some steps the same weights."
    plain = trainer_of(tmp_path)
    compiled = trainer_of(tmp_path, '++train.torch_compile=true', '++train.torch_compile_backend=aot_eager')
    for trainer in (plain, compiled): trainer.train()
    assert all(layer._compiled_call_impl is not None for layer in compiled.model.model.text_model.layers)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-5)


def test_best_checkpoint_is_what_is_left(tmp_path):
    "The weights of the best of three evaluations are in checkpoint/, and its figures in the card."
    cfg = compose_config([*SMALL, f'output_dir={tmp_path}', '++train.save_strategy=steps', '++train.save_steps=1',
                          '++train.eval_strategy=steps', '++train.eval_steps=1', '++train.eval_videos=1',
                          '++train.load_best_model_at_end=true', '++train.metric_for_best_model=eval_loss',
                          '++train.save_total_limit=1', '++train.learning_rate=.05'])
    trainer = train(cfg)
    losses = {h['step']: h['eval_loss'] for h in json.loads((tmp_path/'training_log.json').read_text()) if 'eval_loss' in h}
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()['eval_loss'] == pytest.approx(losses[best], rel=1e-6)
    card = (tmp_path/'checkpoint'/'README.md').read_text()
    assert f'| checkpoint_of_step | {best} |' in card and f'{losses[best]:.4f}'.rstrip('0') in card
