"""Commands in processes of their own, forked from one that has imported the package already: a start costs nothing."""
import multiprocessing, os, signal, socket

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['dst_smolvlm.runs.training_run', 'dst_smolvlm.runs.evaluation_run', 'nltk', 'hydra'])

# A model and a task that take a tenth of a second a step. Nothing here rests on the defaults of conf/.
TRAIN = dict(seed=0, max_seq_len=320, dialogues=1, auxiliary_samples=2, learning_rate=.001, lr_scheduler_type='constant',
             lr_scheduler_kwargs='null', warmup_steps=0, max_grad_norm=1., gradient_accumulation_steps=1, logging_steps=1,
             dataloader_num_workers=0, dataloader_pin_memory='false', disable_tqdm='true')
SMALL = ['model=tiny', 'model.hidden_size=32', 'model.layers=1', 'model.vision_size=32', 'model.image_size=64', 'data=toy', 'data.seed=0',
         'train=demo', *(f'++train.{key}={value}' for key, value in TRAIN.items())]
# Videos of some thirty frames, a third of the usual length.
SHORT = ['data.world.max_steps=3', 'data.world.max_idle=5', 'data.train_world.max_idle=5']


def small_model():
    "The smallest model that the package builds, for what does not depend on how good it is → model and layout."
    from dst_smolvlm.model.modeling import build_tiny
    return build_tiny(dict(hidden_size=32, layers=1, vision_size=32, image_size=64))


def _run(log, env, command, *args):
    with open(log, 'w') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's background job inherits that it is ignored
    command(*args)


def start(log, command, *args, env=(), daemon=True):
    "Call `command(*args)` in a process of its own, with what it prints in the file `log`. A daemon may not have children."
    process = context.Process(target=_run, args=(log, dict(env), command, *args), daemon=daemon)
    process.start()
    return process


def run(log, command, *args, ranks=1, env=(), daemon=True) -> int | list[int]:
    "`start` and wait → the exit status, or minus the signal that killed it; for several `ranks`, started as torchrun does, one each."
    envs, logs = [dict(env)], [log]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        together = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        envs = [dict(env) | together | dict(RANK=str(r), LOCAL_RANK=str(r)) for r in range(ranks)]
        logs = [log.with_name(f'{log.name}{r}') for r in range(ranks)]
    processes = [start(log, command, *args, env=env, daemon=daemon) for log, env in zip(logs, envs)]
    for log, process in zip(logs, processes):
        process.join(180)
        if process.is_alive(): process.kill(); raise TimeoutError(log.read_text())
    status = [process.exitcode for process in processes]
    return status if ranks > 1 else status[0]
