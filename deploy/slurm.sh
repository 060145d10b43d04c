#!/bin/bash
# One training run over as many Slurm jobs as it takes: ten minutes before a job's time is over every
# process saves and leaves, and the job puts itself into the queue again. From the checkout:
#   sbatch deploy/slurm.sh configs/local/train.yaml
#   scancel JOB                      # ends it; saved, if Slurm gives it the time
#SBATCH --job-name=holdfast
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4         # processes: one per GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@600           # to the processes of srun, not to this script
#SBATCH --requeue
#SBATCH --open-mode=append          # one log over all of its jobs
#SBATCH --output=%x-%j.log
set -u
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate           # or: module load ...

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

# train.py takes its place among the processes from torchrun's names. Who ends first has the others
# two minutes to save: one that waits for a dead one would not end by itself.
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python train.py --config "$1" --resume' train "$1"
code=$?
# Slurm's own count of restarts is of the planned ones too, thirty in a month of 24 h jobs
faults=holdfast-$SLURM_JOB_ID.faults

case $code in
    0 | 2)      # finished, or refused: a person is needed
        rm -f "$faults" ;;
    75 | 140)   # the time limit of the configuration, or USR2: saved, goes on in the next job
        rm -f "$faults"
        scontrol requeue "$SLURM_JOB_ID" ;;
    129 | 130 | 138 | 143)      # stopped by a person, or preempted: then Slurm itself requeues
        ;;
    *)          # a crash, a hang, a fault of a node: at most 20 times in a row
        tries=$((${SLURM_RESTART_COUNT:-0} + 1))        # where the file cannot be written
        echo "$code" >> "$faults" && tries=$(wc -l < "$faults")
        if [ "$tries" -le 20 ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi ;;
esac
exit $code
