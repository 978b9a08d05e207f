#!/bin/bash
# Two nodes, four ranks each: sbatch examples/slurm_keras.sh
#SBATCH --job-name=hvd-ext-keras
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
# On GPU nodes: #SBATCH --gpus-per-task=1
set -euo pipefail

module load openmpi            # the one that Horovod was built with
source .venv/bin/activate
export TF_CPP_MIN_LOG_LEVEL=2
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export HVD_EXT_TIMEOUT=120     # seconds without progress until a rank that does not answer ends the job

srun --mpi=pmix --kill-on-bad-exit=1 python -m examples.keras_digits --op delay
