"""A command that was killed and is given again ends as if nothing had happened, and never shows half a result."""
import json, os, shutil, signal, time
from pathlib import Path

import psutil, pytest, torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Trainer

import processes
from dst_smolvlm import evaluate, train
from dst_smolvlm.trace import read_trace

# Two steps an epoch: the third is in the middle of the second epoch, where a resumed run has to find its place again. The rate rises.
FIVE_STEPS = [*processes.SMALL, 'data.train_videos=4', '++train.max_steps=5', '++train.lr_scheduler_type=constant_with_warmup',
              '++train.warmup_steps=9', '++train.save_strategy=steps', '++train.save_steps=1', '++train.save_total_limit=1']
BATCH = {1: ['++train.per_device_train_batch_size=2', '++train.use_cpu=true'], 2: ['++train.per_device_train_batch_size=1']}   # by ranks


def train_until(argv, owner, method, step, number):
    "The command, which sends itself the signal `number` when `method` of `owner` is called after so many steps (None: any)."
    running, init, original = [], Trainer.__init__, getattr(owner, method)
    def remember(self, *args, **kwargs): running.append(self); init(self, *args, **kwargs)
    def stop(self, *args, **kwargs):
        if step in (None, running[0].state.global_step): os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)
    Trainer.__init__ = remember
    setattr(owner, method, stop)
    train.main(argv)


def trained(out, argv, ranks=1, until=None):
    "Run the training, or run it `until` then; → its exit status, or those of its ranks."
    env, command = (dict(ACCELERATE_USE_CPU='true') if ranks > 1 else {}), [*argv, *BATCH[ranks], f'output_dir={out}']
    out.mkdir(exist_ok=True)
    return processes.run(out/'log', *((train_until, command, *until) if until else (train.main, command)), ranks=ranks, env=env)


def weights(out): return load_file(out/'checkpoint'/'model.safetensors')

def same_weights(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a training leaves that nobody interrupted."
    out = tmp_path_factory.mktemp('whole')
    assert trained(out, FIVE_STEPS) == 0, (out/'log').read_text()
    return out


def test_killed_at_every_bad_moment(whole, tmp_path):
    "In the middle of an epoch, of the trainer's own checkpoint, of a step by Ctrl-C, and of the last save: bit for bit the same weights."
    out, kill = tmp_path/'out', -signal.SIGKILL
    for moment, status in (((Trainer, 'training_step', 3, signal.SIGKILL), kill),
                           ((Trainer, '_save_optimizer_and_scheduler', 4, signal.SIGKILL), kill),
                           ((Trainer, 'training_step', 4, signal.SIGINT), 130),
                           ((PreTrainedTokenizerBase, 'save_pretrained', None, signal.SIGKILL), kill)):
        assert trained(out, FIVE_STEPS, until=moment) == status, (out/'log').read_text()
        assert not (out/'checkpoint').exists()
    assert trained(out, FIVE_STEPS) == 0, (out/'log').read_text()
    assert same_weights(weights(out), weights(whole))
    assert (out/'training_log.json').read_text().count('loss_lm') == 5
    assert not (out/'trainer').exists()


def test_killed_with_two_ranks(tmp_path):
    "Each finds its own half of the videos again. Three steps an epoch."
    out, whole, argv = tmp_path/'out', tmp_path/'whole', [*FIVE_STEPS, 'data.train_videos=6']
    assert trained(whole, argv, ranks=2) == [0, 0], (whole/'log0').read_text()
    assert trained(out, argv, ranks=2, until=(Trainer, 'training_step', 4, signal.SIGKILL)) == [-signal.SIGKILL]*2
    assert trained(out, argv, ranks=2) == [0, 0], (out/'log0').read_text()
    a, b = weights(out), weights(whole)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-6


def test_a_finished_training_is_not_repeated(whole):
    file = whole/'checkpoint'/'model.safetensors'
    before = file.stat().st_mtime_ns
    assert trained(whole, FIVE_STEPS) == 0
    assert 'whole; remove it to train again' in (whole/'log').read_text()
    assert file.stat().st_mtime_ns == before and not (whole/'trainer').exists()


def test_another_configuration_never_inherits_a_checkpoint(whole, tmp_path):
    "Killed before its first checkpoint, the new run must not take the old one's weights for its own."
    out, other = shutil.copytree(whole, tmp_path/'out'), [*FIVE_STEPS, '++train.seed=1']
    assert trained(out, other, until=(Trainer, 'training_step', 0, signal.SIGKILL)) == -signal.SIGKILL
    assert trained(out, other) == 0
    assert not same_weights(weights(out), weights(whole))


def test_evaluation_killed_while_it_streams(whole, tmp_path):
    "What was streamed stays and is not streamed again, the scores are the same, and no worker outlives the command."
    argv = ['data=toy', 'data.validation_videos=1', 'data.test_videos=2', 'context_strategy=drop_all', 'eval=dst_strategy',
            'eval.split=test', 'eval.max_reply_tokens=2', 'eval.controls=false', 'eval.pictures=1', f'eval.checkpoint={whole/"checkpoint"}']
    traces = lambda out: {p.relative_to(out): p.stat().st_mtime_ns for p in sorted(Path(out).rglob('traces/*/*/*.json'))}

    killed = processes.start(tmp_path/'log', evaluate.main, [*argv, 'eval.workers=2', f'output_dir={tmp_path/"out"}'], daemon=False)
    while killed.is_alive() and len(traces(tmp_path/'out')) < 2: time.sleep(.02)
    workers = psutil.Process(killed.pid).children(recursive=True)
    killed.kill()
    killed.join()
    _, left = psutil.wait_procs(workers, timeout=20)
    for worker in left: worker.kill()
    assert not left, 'workers wait for work that will never come'

    before = traces(tmp_path/'out')
    assert 2 <= len(before) < 5 and not (tmp_path/'out'/'scores.json').exists()
    for path in before: read_trace(tmp_path/'out'/path)
    for name in ('out', 'undisturbed'): evaluate.main([*argv, 'eval.workers=1', f'output_dir={tmp_path/name}'])
    after = traces(tmp_path/'out')
    assert len(after) == 5 and before.items() <= after.items()
    rows = [json.loads((tmp_path/name/'scores.json').read_text())['rows'] for name in ('out', 'undisturbed')]
    assert rows[0] == rows[1]
