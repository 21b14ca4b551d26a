# shellcheck shell=bash
# What the scripts of this folder share. They source it in the repository's folder, those of jobs inside the job.

failed="" # the file that tells a study how its run ended; study.sbatch names it

say() { printf 'slurm       %s\n' "$*"; }

fail() { # STATUS REASON, noted in the file $failed if a script has named one
    say "failed${SLURM_JOB_ID:+, not requeued}: $2"
    [ -z "${failed:-}" ] || printf 'status %s: %s\n' "$1" "$2" > "$failed"
    exit "$1"
}

# The interpreter and its surroundings, as slurm/site.env says; sets python.
set_up() {
    # shellcheck source=slurm/site.env
    source slurm/site.env
    local words
    if [ -n "$MODULES" ]; then
        set +u # not every module file survives it
        # shellcheck disable=SC1091
        type module > /dev/null 2>&1 || source /etc/profile > /dev/null 2>&1
        type module > /dev/null 2>&1 || fail 2 "MODULES=$MODULES is set, but this node has no module command"
        read -ra words <<< "$MODULES"
        module load "${words[@]}" || fail 2 "MODULES=$MODULES cannot be loaded; see module avail"
        set -u
    fi
    python=(python3)
    if [ -n "$CONTAINER" ]; then
        read -ra words <<< "$CONTAINER"
        python=("${words[@]}" python3)
    elif [ -n "$VENV" ]; then
        [ -x "$VENV/bin/python" ] || fail 2 "VENV=$VENV has no bin/python; make env, or name another (slurm/site.env)"
        python=("$VENV/bin/python")
        export PATH="$VENV/bin:$PATH"
    fi
    export PYTHONUNBUFFERED=1
}

# Libraries that look for a network there is none of wait for minutes.
go_offline() {
    if [ -z "$NETWORK" ]; then
        NETWORK=no
        if [ -n "${https_proxy:-${HTTPS_PROXY:-}}" ] ||
            timeout 3 bash -c ': < /dev/tcp/huggingface.co/443' 2> /dev/null; then NETWORK=yes; fi
    fi
    if [ "$NETWORK" != yes ]; then
        export HF_HUB_OFFLINE=1 WANDB_MODE="${WANDB_MODE:-offline}"
        say "no network on $SLURMD_NODENAME: data and weights as slurm/prefetch.sh left them, W&B offline"
    fi
}

# What a job's script begins with.
begin_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || fail 2 "this is the script of a job; sbatch [sbatch's options] $0 …"
    set_up
    go_offline
}

# SLURM's 2(x3),1 as 2 2 2 1.
each_node() {
    local part count
    for part in ${1//,/ }; do
        count=1
        [[ $part != *x* ]] || count=${part//[!0-9x]/} count=${count#*x}
        for ((; count > 0; count--)); do echo "${part%%(*}"; done
    done
}

# Run a Python script of this repository, one process per GPU or task: srun's tasks are the ranks, with no launcher
# between them and SLURM, so that signals reach them and their exit status comes back.
launch() {
    local tasks cpus node gpus=${SLURM_GPUS_ON_NODE:-0} shape=() share=$((1 << 20))
    # shellcheck disable=SC2153
    mapfile -t tasks < <(each_node "$SLURM_TASKS_PER_NODE")
    mapfile -t cpus < <(each_node "$SLURM_JOB_CPUS_PER_NODE")
    if [ "$gpus" -gt 0 ] && [ "${tasks[0]}" -ne "$gpus" ]; then
        [ -z "${SLURM_NTASKS_PER_NODE:-}" ] || fail 2 \
            "--ntasks-per-node ${tasks[0]} on nodes with $gpus GPUs: one process per GPU; leave --ntasks-per-node out"
        shape=(--ntasks=$((SLURM_JOB_NUM_NODES * gpus)) --ntasks-per-node="$gpus")
        for node in "${!tasks[@]}"; do tasks[node]=$gpus; done
    fi
    for node in "${!cpus[@]}"; do # all ranks get what they can have on every node
        share=$((cpus[node] / tasks[node] < share ? cpus[node] / tasks[node] : share))
    done
    [ "$share" -gt 0 ] ||
        fail 2 "$SLURM_JOB_CPUS_PER_NODE CPUs on nodes with $gpus GPUs, one process each: give --cpus-per-gpu 8"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"
    MASTER_ADDR=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # below the ports that systems give away
    while (: < "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
    export MASTER_ADDR MASTER_PORT
    if [ -n "$LOCAL_SCRATCH" ]; then # for decoded data; what was fetched stays where it is
        local caches=${XDG_CACHE_HOME:-$HOME/.cache}
        export HF_HOME="${HF_HOME:-$caches/huggingface}" TORCH_HOME="${TORCH_HOME:-$caches/torch}"
        export XDG_CACHE_HOME=$LOCAL_SCRATCH
    fi
    # Of these, which SLURM versions read or refuse differently, the option is what all agree on.
    unset SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK
    srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task="$share" "${shape[@]}" "${python[@]}" "$@"
}

# The --run-dir among a training's arguments, if there is one.
run_dir_of() {
    local found=""
    while [ $# -gt 0 ]; do
        case $1 in
            --run-dir | --run_dir) found=${2:-} ;;
            --run-dir=* | --run_dir=*) found=${1#*=} ;;
        esac
        shift
    done
    case $found in \~/*) found=$HOME${found#\~} ;; esac # as train.py reads what no shell has expanded
    printf '%s' "$found"
}

# The step of a run's newest checkpoint; one has its name only once it is whole.
newest_step() {
    local name step=none
    for name in "$1"/checkpoints/step-*; do # also step-00000100-7: the same step again, with its evaluation
        [ -d "$name" ] && name=${name##*/step-} && step=${name%%-*}
    done
    printf '%s' "$step"
}

# Stop a job that is started again and again and comes no further. NOTES holds the step at each of its starts.
check_progress() { # NOTES RUN
    local restarts=${SLURM_RESTART_COUNT:-0} now
    now=$(newest_step "$2")
    if [ "$restarts" -eq 0 ] || [ ! -f "$1" ]; then : > "$1"; fi # of a job that was done it is gone
    [ "$restarts" -lt "$MAX_STARTS" ] ||
        fail 1 "it may start no more than MAX_STARTS=$MAX_STARTS times; to go on, submit the same again with --run-dir $2"
    [ "$(tail -n 3 "$1" | grep -c "^$now\$")" -lt 3 ] ||
        fail 1 "three starts came no further than step $now; see above why, and submit the same again with --run-dir $2"
    echo "$now" >> "$1"
}

# Train, and see to it that an interrupted training is started again: with the same folder, W&B run and log.
train() {
    local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} run status=0 why again=""
    job=${job:-$SLURM_JOB_ID} # of an array: the raw number of one task is that of all
    run=$(run_dir_of "$@")
    if [ -z "$run" ]; then
        run=runs/$SLURM_JOB_NAME-$job
        set -- --run-dir "$run" "$@"
    fi
    case " $* " in
        *" --resume never "* | *" --resume=never "*)
            fail 2 "--resume never: a job that starts again goes on; leave it out, or name another --run-dir"
            ;;
    esac
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $run"
    mkdir -p .slurm-jobs
    check_progress ".slurm-jobs/$job.starts" "$run"

    # A rank that fails takes the others with it, and srun then often tells how those ended: it says why itself.
    export CIFAR_DIST_FAILURE_FILE=$PWD/.slurm-jobs/$job.failure
    : > "$CIFAR_DIST_FAILURE_FILE" # now, so that no network file system remembers that it was not there
    rm -f "$run/REQUEUE"
    launch train.py --resume auto "$@" || status=$?
    why=$(cat "$CIFAR_DIST_FAILURE_FILE")
    rm -f "$CIFAR_DIST_FAILURE_FILE"

    if [ -n "$why" ]; then
        fail $((status == 2 ? 2 : 1)) "$why"
    elif [ "$status" -eq 0 ] && [ -f "$run/REQUEUE" ]; then
        again="stopped by $(cat "$run/REQUEUE")"
    elif [ "$status" -eq 75 ]; then # EX_TEMPFAIL, what train.py leaves with then
        again="other processes were lost"
    elif [ "$status" -gt 128 ] && [ "$status" -le 192 ]; then
        again="a process was ended by signal $((status - 128))"
    elif [ "$status" -gt 0 ]; then
        fail "$status" "exit status $status; the reason is above"
    fi
    if [ -z "$again" ]; then
        rm -f ".slurm-jobs/$job.starts"
        say "done"
    else
        say "$again at step $(newest_step "$run"); requeueing" # SLURM ends this script when it requeues its job
        scontrol requeue "$job" || fail 1 "SLURM refuses; to go on, submit the same again with --run-dir $run"
    fi
}
