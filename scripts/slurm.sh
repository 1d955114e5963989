#!/bin/bash
# Train one row of params.yaml on several machines of a Slurm cluster:
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh r50_256x192_fft [SEED]
#
# Submit it in the project folder, which all machines must see, with the environment activated. One torchrun per machine
# starts one process per GPU; all meet at the first machine. The batch of params.yaml is shared by all processes. A job that
# is killed or requeued continues from last.pt in its folder of outputs/. When it is done, `dvc repro` finds training complete, takes
# its result over and goes on with the evaluation.
#SBATCH --job-name=srl_pose
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
row=${1:?usage: sbatch scripts/slurm.sh ROW [SEED]}
srl-pose check-row "$row"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart must not meet a stale store
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES_PER_NODE:-gpu}" \
    --max-restarts 2 --rdzv-backend c10d --rdzv-endpoint "$head:${MASTER_PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m srl_pose.training.train "$row" ${2:+--seed "$2"}
