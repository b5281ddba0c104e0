"""Two processes train the model that one would; two that would train each its own are refused."""
import json, os, subprocess, sys

import pytest, torch
from safetensors.torch import load_file

import processes
from dst_smolvlm import train
from dst_smolvlm.config import InputError, compose_config
from dst_smolvlm.model import load_model

# Four steps of four videos, so that the second half of the run is in the second epoch. Plain SGD: Adam would make much of a rounding error.
FOUR_STEPS = [*processes.SMALL, 'data.train_videos=8', '++train.max_steps=4', '++train.optim=sgd', '++train.learning_rate=.02',
              '++train.save_strategy=no']


def losses(out): return [{k: v for k, v in step.items() if 'loss' in k} for step in json.loads((out/'training_log.json').read_text())]

def weights(out): return load_file(out/'checkpoint'/'model.safetensors')


def test_the_same_model_comes_out(tmp_path):
    "Four videos a step in one batch, or dealt to two processes of two micro-batches each: the same losses at every step, the same weights."
    one, two = tmp_path/'one', tmp_path/'two'
    argv = [*FOUR_STEPS, f'output_dir={one}', '++train.per_device_train_batch_size=4', '++train.use_cpu=true']
    assert processes.run(tmp_path/'log', train.main, argv) == 0, (tmp_path/'log').read_text()

    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'dst_smolvlm.train']
    argv = [*FOUR_STEPS, 'output_dir=two', '++train.per_device_train_batch_size=1', '++train.gradient_accumulation_steps=2']
    done = subprocess.run([*torchrun, *argv], cwd=tmp_path, env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '2 processes on cpu, equal weights on all' in done.stdout

    for step, (alone, together) in enumerate(zip(losses(one), losses(two)), 1):
        assert together == pytest.approx(alone, rel=1e-3), f'step {step}'
    start, alone, together = dict(load_model(compose_config(FOUR_STEPS).model)[0].named_parameters()), weights(one), weights(two)
    moved = max((alone[name] - start[name].detach()).abs().max() for name in alone)
    apart = max((alone[name] - together[name]).abs().max() for name in alone)
    assert apart < 1e-4*moved, f'moved by {moved:.1e}, apart by {apart:.1e}'


def test_two_that_do_not_know_each_other(tmp_path):
    "As torchrun starts them, but without ACCELERATE_USE_CPU on a machine without GPUs: each says so in one line and trains nothing."
    argv = [*FOUR_STEPS, f'output_dir={tmp_path/"out"}', '++train.per_device_train_batch_size=1']
    assert processes.run(tmp_path/'rank', train.main, argv, ranks=2, env=dict(CUDA_VISIBLE_DEVICES='')) == [2, 2]
    for rank in range(2):
        [said] = [line for line in (tmp_path/f'rank{rank}').read_text().splitlines() if not line.startswith('[transformers]')]
        assert said.startswith('error: 2 processes were launched, but accelerate joined 1') and 'ACCELERATE_USE_CPU=true' in said
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]


def test_different_weights_are_refused():
    "Ranks that were seeded differently would be averaged into nonsense."
    class Ranks:
        num_processes, device = 1, torch.device('cpu')
        def gather(self, mine): return torch.cat([mine, mine + 1e-9])
    class Trainer: accelerator, model = Ranks(), torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match='different weights'): train.check_ranks(Trainer)
