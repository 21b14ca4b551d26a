"""srun's tasks as ranks: what SLURM says of a process, and what ``accelerate launch`` would have said of the engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from cifar_dist.errors import UsageError

CONFIG = "ACCELERATE_CONFIG"  # names a file of accelerate_configs/ where no launcher reads one

VARIABLES = ("SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")


def in_step() -> bool:
    """Whether srun started this process to train with others; a batch script itself has no step.

    A single task counts where an engine was asked for: DeepSpeed and FSDP need a group, be it of one.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or "SLURM_PROCID" not in os.environ or "SLURM_LOCALID" not in os.environ:
        return False
    return int(tasks) > 1 or bool(os.environ.get(CONFIG))


def is_own_rank(rank: str) -> bool:
    """Whether a variable of another launcher is srun's own, as with ``srun --mpi=pmi2``."""
    return in_step() and os.environ.get(rank) == os.environ["SLURM_PROCID"]


def rank_variables() -> dict[str, str]:
    """The variables of torchrun, from those of srun; an address or port that is already set stays.

    Raises:
        UsageError: some are missing, as where a shell has kept the others.
    """
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UsageError(
            f"SLURM_PROCID is set but {', '.join(missing)} not; start with srun, or unset SLURM_PROCID for one process."
        )
    node, per_node = int(os.environ["SLURM_NODEID"]), _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    port = 15000 + (job * 101 + step) % 15000  # below the ephemeral ports
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or _first_host(os.environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
    }


def engine_variables() -> dict[str, str]:
    """What ``accelerate launch --config_file $ACCELERATE_CONFIG`` would set about the engine; numbers of processes and
    machines in that file are SLURM's to say, and passed over.

    Raises:
        UsageError: there is no such file, or Accelerate cannot use it.
    """
    config = os.environ.get(CONFIG)
    if not config:
        return {}
    if not Path(config).is_file():
        raise UsageError(f"{CONFIG} is {config}, not a file in {Path.cwd()}; take one of accelerate_configs/.")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    here = ["--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"]
    try:
        arguments = launch_command_parser().parse_args(["--config_file", config, *here, "train.py"])
        arguments, of_file, _ = _validate_launch_command(arguments)
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ",".join(of_file.deepspeed_config)
            found = prepare_deepspeed_cmd_env(arguments)[1]
        else:
            found = prepare_multi_gpu_env(arguments)
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{CONFIG} {config}: Accelerate cannot use it ({error}).") from None
    engines = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in found.items() if name.startswith(engines) and name != CONFIG}


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's ``2(x3),1`` as ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first name in a SLURM node list such as ``gpu[07-09,12],login``."""
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        if listed:
            return listed[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
