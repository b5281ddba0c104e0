"""What a training is asked for that does not exist is said before it begins; what the library does for us is really on."""
import pytest, torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback

import processes
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.metrics.scores import COLUMNS
from dst_smolvlm.runs.training_run import StreamingValidation, make_trainer, train
from dst_smolvlm.training.resume import last_whole_checkpoint
from dst_smolvlm.training.arguments import training_arguments

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
    (['++train.early_stopping_patience=2', '++train.eval_strategy=steps', '++train.eval_steps=1'], 'needs train.metric_for_best_model'),
    (['++train.class_weights=auto'], "choose 'fixed' or 'data'"),
    (['++train.deepspeed=zero2.json'], 'train: .*deepspeed'),
    (['++train.optim=adamw_9bit'], 'train: adamw_9bit is not a valid'),
    (['++train.load_best_model_at_end=true', '++train.eval_strategy=steps', '++train.eval_steps=2'], 'train: .*load_best_model_at_end'),
    (['++train.lora_rank=4', '++train.freeze_text=true'], 'freeze_text=true: lora_rank'),
    (['++train.qlora=true'], 'qlora=true: 4-bit weights cannot learn'),
    (['++train.max_seq_len=9000'], 'reads at most 8192'),
    (['model.pointer_source=hidden'], 'set train.auxiliary_samples=0'),
    (['++train.dataloader_persistent_workers=true', '++train.dataloader_num_workers=1'], 'would not know the next one'),
    (['++train.eval_strategy=steps', '++train.eval_steps=1', '++eval.state_tracker.foo=1'], 'eval.state_tracker.foo'),
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


def test_best_checkpoint_is_what_is_left(tmp_path, monkeypatch):
    "Of three steps the second is the best: its weights are in checkpoint/ and its figure is in the card, not those of the last."
    cfg = compose_config([*SMALL, f'output_dir={tmp_path}', '++train.save_strategy=steps', '++train.save_steps=1',
                          '++train.eval_strategy=steps', '++train.eval_steps=1', '++train.eval_videos=1',
                          '++train.load_best_model_at_end=true', '++train.metric_for_best_model=eval_stream_slot_accuracy',
                          '++train.save_total_limit=1', '++train.learning_rate=.05'])
    seen = {}
    def watch(self, trainer):
        seen[trainer.state.global_step] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        return dict(stream_slot_accuracy={1: .25, 2: .75, 3: .5}[trainer.state.global_step])
    monkeypatch.setattr(StreamingValidation, '__call__', watch)
    assert train(cfg).state.best_global_step == 2
    left = load_file(tmp_path/'checkpoint'/'model.safetensors')
    assert all(torch.equal(left[k], seen[2][k]) for k in left) and not all(torch.equal(left[k], seen[3][k]) for k in left)
    card = (tmp_path/'checkpoint'/'README.md').read_text()
    assert '| checkpoint_of_step | 2 |' in card and '| validation stream slot accuracy | 0.75 |' in card


def test_a_loss_should_be_small(tmp_path):
    for metric, greater in (('eval_loss_state', False), ('eval_stream_update_f1', True)):
        args = training_arguments(compose_config([*SMALL, f'++train.metric_for_best_model={metric}']), tmp_path)
        assert args.greater_is_better is greater


def test_a_video_that_overflows_counts_as_silent(tmp_path):
    "Every column is there, however little could be streamed: a missing one would end the run at its first evaluation."
    trainer = trainer_of(tmp_path, '++train.eval_strategy=steps', '++train.eval_steps=1', 'context_strategy.max_seq_len=200')
    found = trainer.evaluate()
    assert found['eval_stream_failed'] == 1 and found['eval_stream_speaking_f1'] == 0
    assert {f'eval_stream_{c}' for c in COLUMNS} <= {*found}


def test_one_process_takes_one_gpu(tmp_path, capsys):
    "With several, the library would cut the rows of a batch and its frames each for itself."
    args = training_arguments(compose_config(SMALL), tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 4
    assert make_trainer(compose_config(SMALL), args).args.n_gpu == 1
    assert 'uses one of 4 GPUs' in capsys.readouterr().out


def test_patience_survives_a_resume(tmp_path):
    "Stopped in the middle and resumed, a run ends at the step at which it would have ended."
    options = ['++train.early_stopping_patience=3', '++train.eval_strategy=steps', '++train.eval_steps=1', '++train.max_steps=9',
               '++train.metric_for_best_model=eval_stream_slot_accuracy', '++train.save_strategy=steps', '++train.save_steps=1',
               '++train.save_total_limit=9']
    ends = []
    for folder, last in ((tmp_path/'whole', None), (tmp_path/'whole', 3)):
        trainer = trainer_of(folder, *options)
        trainer.watch = lambda trainer: dict(stream_slot_accuracy=.5)
        trainer.train(resume_from_checkpoint=last and str(folder/'trainer'/f'checkpoint-{last}'))
        ends.append(trainer.state.global_step)
    assert ends == [4, 4]
    assert last_whole_checkpoint(tmp_path/'whole'/'trainer')[1]          # stopped early is finished
