"""A command that was killed and is given again ends as if nothing had happened, and never shows half a result."""
import json, os, resource, shutil, signal, time
from pathlib import Path

import psutil, pytest, torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState

import processes
from dst_smolvlm import evaluate, train
from dst_smolvlm.model import modeling
from dst_smolvlm.streaming.trace_writer import read_trace

# Two steps an epoch: the third is in the middle of the second epoch, where a resumed run has to find its place again. The rate rises.
FIVE_STEPS = [*processes.SMALL, *processes.SHORT, 'data.train_videos=4', '++train.max_steps=5',
              '++train.lr_scheduler_type=constant_with_warmup', '++train.warmup_steps=9', '++train.save_strategy=steps',
              '++train.save_steps=1', '++train.save_total_limit=1']
BATCH = {1: ['++train.per_device_train_batch_size=2', '++train.use_cpu=true'], 2: ['++train.per_device_train_batch_size=1']}   # by ranks


FULL_DISK = 'the disk is full'                                 # instead of a signal

# What makes a resume hard: dropout, micro-batches, workers, streams dealt by length, and a log that is not written at every step. Four
# steps an epoch; the checkpoint is in the middle of the second, and the kill two steps later.
HARD = [*processes.SMALL, *processes.SHORT, '++train.max_steps=8', '++train.lr_scheduler_type=cosine', '++train.warmup_steps=3',
        '++train.save_strategy=steps', '++train.save_steps=5', '++train.logging_steps=2', '++train.gradient_accumulation_steps=2',
        '++train.dataloader_num_workers=2',
        '++train.train_sampling_strategy=group_by_length', '++train.per_device_train_batch_size=1', '++train.eval_strategy=steps',
        '++train.eval_steps=3', '++train.eval_videos=1', 'eval.max_reply_tokens=2']


def with_dropout(command, *args):
    "A command whose tiny models drop a tenth of their attention."
    original = modeling.tiny_config
    def config(*a, **kw):
        made = original(*a, **kw)
        made.text_config.attention_dropout = .1
        return made
    modeling.tiny_config = config
    command(*args)


def train_until(argv, owner, method, step, number):
    "The command, which sends itself the signal `number` when `method` of `owner` is called after so many steps (None: any)."
    running, init, original = [], Trainer.__init__, getattr(owner, method)
    def remember(self, *args, **kwargs): running.append(self); init(self, *args, **kwargs)
    def stop(self, *args, **kwargs):
        if step in (None, running[0].state.global_step):
            if number == FULL_DISK: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            else: os.kill(os.getpid(), number)
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
        if status == 130: assert 'checkpoint-4 is whole: the same command goes on from there' in (out/'log').read_text()
    assert trained(out, FIVE_STEPS) == 0, (out/'log').read_text()
    assert same_weights(weights(out), weights(whole))
    assert (out/'training_log.json').read_text().count('loss_lm') == 5
    assert not (out/'trainer').exists()


def curve(out):
    "Everything that the log says of the learning; not of the time it took."
    return [{k: v for k, v in h.items() if 'runtime' not in k and 'per_second' not in k}
            for h in json.loads((out/'training_log.json').read_text()) if 'train_runtime' not in h]


@pytest.mark.parametrize('ranks', (1, 2))
def test_the_same_bits_after_a_kill(ranks, tmp_path):
    "Killed in the middle of the second epoch and resumed: the whole curve of losses and evaluations and all weights, bit for bit."
    out, whole = tmp_path/'out', tmp_path/'whole'
    argv = [*HARD, f'data.train_videos={8*ranks}', 'data.validation_videos=2', *(['++train.use_cpu=true'] if ranks == 1 else [])]
    start = dict(ranks=ranks, env=dict(ACCELERATE_USE_CPU='true') if ranks > 1 else {}, daemon=False)
    for folder in (out, whole): folder.mkdir()
    one = lambda status: status if ranks == 1 else [status]*ranks
    kill = train_until, [*argv, f'output_dir={out}'], Trainer, 'training_step', 7, signal.SIGKILL
    assert processes.run(out/'log', with_dropout, *kill, **start) == one(-signal.SIGKILL)
    assert (out/'trainer'/'checkpoint-5').is_dir() and not (out/'checkpoint').exists()
    for folder in (out, whole):
        status = processes.run(folder/'log', with_dropout, train.main, [*argv, f'output_dir={folder}'], **start)
        assert status == one(0), min(folder.glob('log*')).read_text()
    assert 'goes on from' in min(out.glob('log*')).read_text()
    assert [h['step'] for h in curve(whole) if 'loss' in h] == [2, 4, 5, 6, 8]             # before the checkpoint, too
    assert curve(out) == curve(whole)
    assert same_weights(weights(out), weights(whole))


def test_dropout_is_at_work(tmp_path):
    "Else the test above would not test it."
    argv = [*FIVE_STEPS, '++train.use_cpu=true']
    for name, command in (('without', (train.main,)), ('with', (with_dropout, train.main))):
        (tmp_path/name).mkdir()
        assert processes.run(tmp_path/name/'log', *command, [*argv, f'output_dir={tmp_path/name}']) == 0
    assert not same_weights(weights(tmp_path/'with'), weights(tmp_path/'without'))


def test_full_disk(whole, tmp_path):
    "In the middle of a checkpoint: one line that says so, the one before stays, and the run goes on from it when there is room."
    out = tmp_path/'out'
    assert trained(out, FIVE_STEPS, until=(Trainer, '_save_checkpoint', 3, FULL_DISK)) == 2
    [said] = [line for line in (out/'log').read_text().splitlines() if line.startswith('error: ')]
    assert 'the disk is full; stopped at step 3' in said
    assert 'checkpoint-2 is whole: the same command goes on from there' in said
    assert [p.name for p in (out/'trainer').glob('checkpoint-*')] == ['checkpoint-2']
    assert trained(out, FIVE_STEPS) == 0, (out/'log').read_text()
    assert same_weights(weights(out), weights(whole))


def every_rank_before_the_last_file(argv):
    "The command with a slow rank 1, and a look at what is there when rank 0 writes the file that makes a checkpoint whole."
    save, write = Trainer._save_rng_state, TrainerState.save_to_json
    def slow(self, folder):
        if self.args.process_index == 1: time.sleep(1)
        save(self, folder)
    def look(self, path):
        assert len(list(Path(path).parent.glob('rng_state_*.pth'))) == 2, 'a checkpoint that looks whole lacks the random numbers of a rank'
        write(self, path)
    Trainer._save_rng_state, TrainerState.save_to_json = slow, look
    train.main(argv)


def test_a_checkpoint_waits_for_every_rank(tmp_path):
    argv = [*FIVE_STEPS, *BATCH[2], '++train.max_steps=1', f'output_dir={tmp_path/"out"}']
    assert processes.run(tmp_path/'log', every_rank_before_the_last_file, argv, ranks=2, env=dict(ACCELERATE_USE_CPU='true')) == [0, 0], (
        tmp_path/'log0').read_text()


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
    argv = ['data=toy', *processes.SHORT, 'data.validation_videos=1', 'data.test_videos=2', 'context_strategy=drop_all',
            'eval=dst_strategy', 'eval.split=test', 'eval.max_reply_tokens=2', 'eval.controls=false', 'eval.pictures=1',
            f'eval.checkpoint={whole/"checkpoint"}',
            'eval.strategies=null', 'eval.encoder=words', 'eval.bootstrap=20']
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
    timed = ('ready', 'pauc', 'timing', 'intervals', 'counts')                # depend on how long the machine took
    timeless = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in some] for some in rows]
    assert timeless[0] == timeless[1] and timeless[0][0]['joint_goal_accuracy'] is not None
