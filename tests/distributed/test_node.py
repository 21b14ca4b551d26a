"""What a process may use of its node."""

import os
import queue
import threading

import psutil
import pytest

from cifar_dist.distributed.node import own_memory_bytes
from cifar_dist.training import stream_batches

TASKS = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    "free, environment, expected",
    [
        (6, {}, 6),
        (6, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (2, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (4, TASKS | {"SLURM_CPUS_ON_NODE": "16"}, 4),  # each task has its own
        (16, TASKS | {"SLURM_CPUS_ON_NODE": "16"}, 4),  # srun --cpu-bind=none
        (16, TASKS | {"SLURM_CPUS_ON_NODE": "64", "TORCHELASTIC_RUN_ID": "1"}, 4),
    ],
)
def test_a_stream_decodes_with_the_cores_that_the_process_may_use(monkeypatch, free, environment, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(free)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(stream_batches, "ThreadPoolExecutor", asked.append)
    stream_batches.StreamBatches._run(None, 0, queue.Queue(), threading.Event())
    assert asked == [expected]


GIB = 2**30


@pytest.mark.parametrize(
    ("groups", "files", "processes", "expected"),
    [
        ("", {}, 1, 64),
        ("", {}, 4, 16),
        ("0::/\n", {"memory.max": f"{8 * GIB}\n"}, 2, 4),  # in a container
        ("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n", {
            "system.slice/slurmstepd.scope/job_7/memory.max": 32 * GIB,
            "system.slice/slurmstepd.scope/job_7/step_0/memory.max": 16 * GIB,
            "system.slice/slurmstepd.scope/job_7/step_0/user/memory.max": "max\n",
        }, 1, 16),
        ("9:name=systemd:/\n4:memory:/slurm/uid_0/job_7\n3:cpu,cpuacct:/slurm\n0::/\n", {
            "memory/slurm/uid_0/job_7/memory.limit_in_bytes": 20 * GIB,
            "memory/memory.limit_in_bytes": 2**63 - 4096,
            "cpu/memory.max": GIB,
        }, 1, 20),
    ],
)  # fmt: skip
def test_memory_is_the_machines_or_what_a_control_group_leaves(
    monkeypatch, tmp_path, groups, files, processes, expected
):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64 * GIB}))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    assert own_memory_bytes(tmp_path) == expected * GIB


def test_this_machines_memory_is_some():
    assert 0 < own_memory_bytes() <= psutil.virtual_memory().total
