#!/usr/bin/env bash
# On the login node, which reaches the Hub: fetch the data and weights of a training into the caches that its job reads.
#   bash slurm/prefetch.sh --model swin_base --pretrained --lr 5e-5      # the options that the job will have
#   bash slurm/prefetch.sh recipes/study_a/study.yaml                    # all runs of a study
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
source slurm/job.sh
set_up
fetch() {
    say "fetch $*"
    "${python[@]}" train.py "$@" --precision fp32 --plan || exit # fp16 would need a GPU
}
if [[ ${1:-} == *.yaml ]]; then
    study() { "${python[@]}" -m cifar_dist.study "$@"; }
    runs=$(study "$1" --list "${@:2}" | wc -l) || exit
    for ((number = 0; number < runs; number++)); do
        mapfile -d '' -t arguments < <(study "$1" --arguments "$number" "${@:2}")
        fetch "${arguments[@]}"
    done
else
    fetch "$@"
fi
say "fetched: a job without a network finds it"
