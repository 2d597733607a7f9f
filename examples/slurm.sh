#!/bin/bash
# Responses of a list of particles as an array of jobs, from the folder of the repository:
#     sbatch --array=0-7 examples/slurm.sh particles.h5 131072
#     python lists.py part-*.h5 --out responses.h5
#SBATCH --cpus-per-task=1 --mem=2G --time=01:00:00
LIST=$1 ROWS=$2    # rows of a job, best a multiple of 8192
A=$(( SLURM_ARRAY_TASK_ID * ROWS ))
python latent_fm.py --load weights/latent_fm-zn.eqx --generate "$LIST" --rows $A:$(( A + ROWS )) \
    --threads 1 --quiet --out part-$SLURM_ARRAY_TASK_ID.h5
