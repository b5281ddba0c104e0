"""Two processes train the model that one would; two that would train each its own are refused."""
import json, os, subprocess, sys

import pytest, torch
from safetensors.torch import load_file

import processes
from dst_smolvlm import train
from dst_smolvlm.core.config import InputError, compose_config
from dst_smolvlm.model.checkpoints import load_model
from dst_smolvlm.runs import training_run
from dst_smolvlm.runs.training_run import make_trainer
from dst_smolvlm.training.arguments import training_arguments

# Four steps of four videos, so that the second half of the run is in the second epoch. Plain SGD: Adam would make much of a rounding error.
FOUR_STEPS = [*processes.SMALL, *processes.SHORT, 'data.train_videos=8', '++train.max_steps=4', '++train.optim=sgd',
              '++train.learning_rate=.02', '++train.save_strategy=no']


def losses(out):
    log = json.loads((out/'training_log.json').read_text())
    return [{k: v for k, v in step.items() if 'loss' in k} for step in log if 'loss' in step]

def weights(out): return load_file(out/'checkpoint'/'model.safetensors')


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    "Four videos a step, in one batch of one process."
    out = tmp_path_factory.mktemp('one')
    argv = [*FOUR_STEPS, f'output_dir={out}', '++train.per_device_train_batch_size=4', '++train.use_cpu=true']
    assert processes.run(out/'log', train.main, argv) == 0, (out/'log').read_text()
    return out


def check_same(one, other):
    "Every part of the loss at every step to 1e-5; the weights to a hundred-thousandth of how far they went."
    assert len(losses(one)) == len(losses(other)) == 4
    for step, (alone, together) in enumerate(zip(losses(one), losses(other)), 1):
        assert len(alone) == 6
        assert together == pytest.approx(alone, rel=1e-5), f'step {step}'
    start, alone, together = dict(load_model(compose_config(FOUR_STEPS).model)[0].named_parameters()), weights(one), weights(other)
    moved = max((alone[name] - start[name].detach()).abs().max() for name in alone)
    apart = max((alone[name] - together[name]).abs().max() for name in alone)
    assert apart < 1e-5*moved, f'moved by {moved:.1e}, apart by {apart:.1e}'


@pytest.mark.parametrize(('ranks', 'batch', 'micro_batches'), ((1, 2, 2), (2, 2, 1)))
def test_dealt_otherwise(one, ranks, batch, micro_batches, tmp_path):
    "The same four videos as two micro-batches, or by two processes."
    argv = [*FOUR_STEPS, f'output_dir={tmp_path}', f'++train.per_device_train_batch_size={batch}',
            f'++train.gradient_accumulation_steps={micro_batches}', *(['++train.use_cpu=true'] if ranks == 1 else [])]
    done = processes.run(tmp_path/'log', train.main, argv, ranks=ranks, env=dict(ACCELERATE_USE_CPU='true') if ranks > 1 else {})
    assert done in (0, [0, 0]), min(tmp_path.glob('log*')).read_text()
    check_same(one, tmp_path)


def test_by_torchrun(one, tmp_path):
    "Two processes of two micro-batches each, started as a user does."
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'dst_smolvlm.train']
    argv = [*FOUR_STEPS, 'output_dir=two', '++train.per_device_train_batch_size=1', '++train.gradient_accumulation_steps=2']
    done = subprocess.run([*torchrun, *argv], cwd=tmp_path, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '2 processes on cpu, equal weights on all' in done.stdout
    check_same(one, tmp_path/'two')


def every_parameter_is_used(argv):
    "The command, which fails unless every parameter that learns has a gradient before every step."
    from transformers import Trainer
    clip = Trainer._clip_grad_norm
    def look(self, model):
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f'without a gradient: {without}'
        return clip(self, model)
    Trainer._clip_grad_norm = look
    train.main(argv)


@pytest.mark.parametrize('mode', ('heads', 'lm_token'))
def test_no_parameter_is_unused(mode, tmp_path):
    "DDP would wait for the gradient of one that is, or need find_unused_parameters: in both decision modes all have one."
    argv = [*FOUR_STEPS, f'output_dir={tmp_path}', '++train.per_device_train_batch_size=1', '++train.max_steps=2',
            f'model.decision_mode={mode}']
    assert processes.run(tmp_path/'log', every_parameter_is_used, argv, ranks=2, env=dict(ACCELERATE_USE_CPU='true')) == [0, 0], (
        tmp_path/'log0').read_text()


def test_two_that_do_not_know_each_other(tmp_path):
    "As torchrun starts them, but without ACCELERATE_USE_CPU on a machine without GPUs: each says so in one line and trains nothing."
    argv = [*FOUR_STEPS, f'output_dir={tmp_path/"out"}', '++train.per_device_train_batch_size=1']
    assert processes.run(tmp_path/'rank', train.main, argv, ranks=2, env=dict(CUDA_VISIBLE_DEVICES='')) == [2, 2]
    for rank in range(2):
        [said] = [line for line in (tmp_path/f'rank{rank}').read_text().splitlines() if not line.startswith('[transformers]')]
        assert said.startswith('error: 2 processes were launched, but accelerate joined 1') and 'ACCELERATE_USE_CPU=true' in said
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]


def test_two_micro_batches_wait_on_the_cpu(tmp_path):
    "A step's micro-batches are fetched together; only the one that is used may lie on the GPU."
    args = training_arguments(compose_config([*FOUR_STEPS, '++train.use_cpu=true']), tmp_path)
    assert make_trainer(compose_config(FOUR_STEPS), args).get_train_dataloader().device is None


def test_different_weights_are_refused(monkeypatch):
    "Ranks that were seeded differently would be averaged into nonsense."
    class Ranks:
        num_processes, device = 2, torch.device('cpu')
        def gather(self, mine): return torch.cat([mine, mine + 1e-9])
    class Trainer: accelerator, model = Ranks(), torch.nn.Linear(2, 2)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match='different weights'): training_run.check_ranks(Trainer)
