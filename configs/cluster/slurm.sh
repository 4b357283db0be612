#!/bin/bash
# A preprocessing job on the nodes of one Slurm allocation: Ray's head and the job on the first, workers on all.
#
#   sbatch --nodes 8 configs/cluster/slurm.sh CONFIG.toml --output /scratch/me/dataset [--key value ...]
#
# Needs on every node the environment that is active when sbatch is called, and the same shared file system.
# Requeued, preempted or out of time, the same command goes on where it stopped. A test runs this file with a stand-in
# for srun on one machine; it has not been run on a Slurm cluster.
#SBATCH --job-name=parquetry
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=96G
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
: "${1:?usage: sbatch configs/cluster/slurm.sh CONFIG.toml [--key value ...]}"

# The batch script runs on the allocation's first node.
head=${SLURMD_NODENAME:-$(hostname)}
address=$head:${RAY_PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0
# Whoever reaches a Ray cluster can run code on it: this one belongs to those who have this job's token, that is its
# own processes, which srun gives this environment.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --block --port="${address##*:}" --num-cpus="$SLURM_CPUS_PER_TASK" &
if ((SLURM_JOB_NUM_NODES > 1)); then
    others=$((SLURM_JOB_NUM_NODES - 1))
    srun --nodes="$others" --ntasks="$others" --exclude="$head" --overlap \
        ray start --block --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" &
fi
# Wait until the head answers; if it never does, the job says so. Workers may join later: the job takes them as they
# come.
for _ in {1..30}; do
    ray status --address "$address" >/dev/null 2>&1 && break
    sleep 1
done

python -m preprocess run "$@" --ray.address "$address"
