#!/usr/bin/env bash
# A SLURM batch script for several machines: sbatch dst_smolvlm/conf/accelerate/slurm.sh train=dst_training output_dir=/shared/run …
# What follows the script's name goes to dst_smolvlm.train. Set the five lines below to your cluster's, or give them to sbatch.
#SBATCH --job-name=dst_smolvlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher per machine; it starts one process per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
set -euo pipefail

# SLURM copies a batch script before it runs it, so that the configuration is not found beside this file.
config=${ACCELERATE_CONFIG:-$(python -c 'import dst_smolvlm.core.config as c; print(c.conf_dir()/"accelerate"/"multi_node.yaml")')}
gpus=${SLURM_GPUS_ON_NODE:-4}
nodes=${SLURM_JOB_NUM_NODES:?start this script with sbatch}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}                                                # the first machine of the job is where all meet
port=$((20000 + SLURM_JOB_ID % 20000))                              # two jobs on one machine must not meet

# Each machine needs its own rank, which only srun's task knows: hence the inner shell, and the single quotes.
export config gpus nodes head port
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$config" --num_machines "$nodes" \
    --num_processes "$((nodes*gpus))" --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port "$port" \
    -m dst_smolvlm.train "$@"' launcher "$@"
