"""The ready configurations of `accelerate launch`: what they mean to accelerate itself, and that two CPU processes really train by one."""
import json, os, subprocess, sys
from pathlib import Path

import pytest, yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

import processes
from dst_smolvlm.core.config import conf_dir
from dst_smolvlm.model.modeling import build_tiny

FOLDER = conf_dir()/'accelerate'
FILES = sorted(p.name for p in FOLDER.glob('*.yaml'))


def launched(name, *options):
    "What `accelerate launch --config_file NAME OPTIONS` would do: its arguments, and the environment of the processes that it would start."
    argv = ['--config_file', str(FOLDER/name), *options, '-m', 'dst_smolvlm.train', 'train=demo']
    parser, before = launch_command_parser(), sys.argv
    sys.argv = ['accelerate-launch', *argv]                # accelerate reads there which options were given
    try: args, _, _ = _validate_launch_command(parser.parse_args(argv))
    finally: sys.argv = before
    return args, prepare_multi_gpu_env(args)


def test_files(): assert FILES == ['cpu2.yaml', 'ddp.yaml', 'fsdp2.yaml', 'multi_node.yaml', 'zero2.yaml']


@pytest.mark.parametrize('name', FILES)
def test_read_by_accelerate(name):
    "Its own reader refuses unknown keys. The precision is the trainer's business, but for DeepSpeed, which must know it."
    config = load_config_from_file(str(FOLDER/name))
    expected = dict(cpu2=('MULTI_GPU', 2), ddp=('MULTI_GPU', 2), fsdp2=('FSDP', 4), multi_node=('MULTI_GPU', 8), zero2=('DEEPSPEED', 4))
    assert (config.distributed_type.value, config.num_processes) == expected[Path(name).stem]
    assert config.mixed_precision == ('bf16' if name == 'zero2.yaml' else 'no')
    assert config.num_machines == (2 if name == 'multi_node.yaml' else 1)


@pytest.mark.parametrize('name', ['cpu2.yaml', 'ddp.yaml', 'fsdp2.yaml', 'zero2.yaml'])
def test_number_of_processes(name):
    "The file's own, and the command line's."
    assert launched(name)[0].nproc_per_node == str(yaml.safe_load((FOLDER/name).read_text())['num_processes'])
    assert launched(name, '--num_processes', '3')[0].nproc_per_node == '3'


def test_sharding():
    "FSDP of version 2, in parts of one layer each; the classes of these layers are in the model, and every layer is of one of them."
    _, env = launched('fsdp2.yaml')
    assert (env['ACCELERATE_USE_FSDP'], env['FSDP_VERSION'], env['FSDP_RESHARD_AFTER_FORWARD']) == ('true', '2', 'true')
    assert (env['FSDP_AUTO_WRAP_POLICY'], env['FSDP_ACTIVATION_CHECKPOINTING']) == ('TRANSFORMER_BASED_WRAP', 'false')
    assert env['FSDP_STATE_DICT_TYPE'] == 'SHARDED_STATE_DICT'
    wrapped, model = env['FSDP_TRANSFORMER_CLS_TO_WRAP'].split(','), build_tiny()[0]
    layers = [*model.model.text_model.layers, *model.model.vision_model.encoder.layers]
    assert {type(layer).__name__ for layer in layers} == set(wrapped)
    assert sum(type(m).__name__ in wrapped for m in model.modules()) == len(layers)


def test_zero2():
    args, _ = launched('zero2.yaml')
    assert args.use_deepspeed and not args.use_fsdp and not args.multi_gpu
    assert (args.zero_stage, args.gradient_accumulation_steps, args.gradient_clipping) == (2, 'auto', 'auto')
    assert (args.mixed_precision, args.offload_optimizer_device) == ('bf16', 'none')


def test_several_machines():
    args, _ = launched('multi_node.yaml', '--num_machines', '3', '--num_processes', '24', '--machine_rank', '2',
                       '--main_process_ip', 'node7', '--main_process_port', '23456')
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ('3', '8', 2)
    assert (args.rdzv_endpoint, args.rdzv_backend) == ('node7:23456', 'static')


def test_slurm(tmp_path):
    "With commands in the place of SLURM's: one launcher per machine, each with its own rank, and arguments that hold spaces unharmed."
    commands = dict(scontrol='[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"',
                    srun='shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
                    accelerate='printf "%s\\n" "$@" --end')
    for name, body in commands.items():
        (tmp_path/name).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/name).chmod(0o755)
    path = f'{tmp_path}:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = dict(PATH=path, SLURM_JOB_NUM_NODES='2', SLURM_JOB_NODELIST='gpu[3-4]', SLURM_GPUS_ON_NODE='4', SLURM_JOB_ID='1234567')
    script = FOLDER/'slurm.sh'
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    done = subprocess.run(['bash', script, 'output_dir=a b', 'train=demo'], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (part.split('\n')[:-1] for part in done.stdout.split('--end\n')[:2])
    def expected(rank):
        return ['launch', '--config_file', str(FOLDER/'multi_node.yaml'), '--num_machines', '2', '--num_processes', '8',
                '--machine_rank', rank, '--main_process_ip', 'gpu3', '--main_process_port', '34567',
                '-m', 'dst_smolvlm.train', 'output_dir=a b', 'train=demo']
    assert (first, second) == (expected('0'), expected('1'))
    args, _ = launched('multi_node.yaml', *first[3:first.index('-m')])                     # and accelerate understands it
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.rdzv_endpoint) == ('2', '4', 0, 'gpu3:34567')
    outside = subprocess.run(['bash', script], env=dict(PATH=path), capture_output=True, text=True, cwd=tmp_path)
    assert outside.returncode != 0 and 'start this script with sbatch' in outside.stderr


def test_two_cpu_processes(tmp_path):
    "Really run: two ranks that know each other, equal weights, and a checkpoint."
    argv = [*processes.SMALL, 'output_dir=out', 'data.train_videos=4', '++train.max_steps=2', '++train.save_strategy=no',
            '++train.per_device_train_batch_size=1']
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', FOLDER/'cpu2.yaml', '-m', 'dst_smolvlm.train', *argv]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert '2 processes on cpu, equal weights on all' in done.stdout
    assert done.stdout.count('equal weights on all') == 1                                  # said by one of them
    assert json.loads((tmp_path/'out'/'training_log.json').read_text())[-1]['step'] == 2
    assert all(w.isfinite().all() for w in load_file(tmp_path/'out'/'checkpoint'/'model.safetensors').values())
