#!/usr/bin/env bash
# On the login node: queue all runs of a study as a job array, and their comparison for when all have ended.
#   bash slurm/study.sh [sbatch's options] STUDY.yaml [--at-once 4] [-- train.py's options for every run]
#   bash slurm/study.sh --gpus-per-node 1 --cpus-per-gpu 8 recipes/study_d/study.yaml --at-once 3
# Given again, it queues the runs that are not finished, once none is queued or runs any more.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
source slurm/job.sh
set_up
options=()
while [ $# -gt 0 ] && [[ $1 != *.yaml ]]; do
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail 2 "no study: bash slurm/study.sh [sbatch's options] STUDY.yaml"
sbatch() { command sbatch "${options[@]}" "$@"; }
commands=$("${python[@]}" -m cifar_dist.study "$1" --slurm "${@:2}") || exit
say "$commands"
eval "$commands" || exit
[ -z "${job:-}" ] || say "job ${job%%;*} is the array: tail -f slurm-${job%%;*}_NUMBER.out"
