#!/bin/bash
# One run on a SLURM cluster, which goes on after preemption and beyond the time limit of a job:
#   sbatch docs/slurm.sh experiment=imagenet_d18_d18 data.root=/data/imagenet
#SBATCH --job-name=flextok
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

# The folder is named after the job, which keeps its number when it goes back into the queue.
srun python train.py trainer=multi_node trainer.num_nodes="$SLURM_NNODES" trainer.devices="$SLURM_NTASKS_PER_NODE" \
    hydra.run.dir="runs/slurm/$SLURM_JOB_ID" ckpt_path=auto "$@"
code=$?
# 75: a signal stopped the run, and all is saved. Where SLURM preempts the job it puts it back into the queue itself.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
