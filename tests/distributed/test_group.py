"""Starting Accelerate: what is refused instead of training wrongly in silence."""

import os
import platform
import resource
import subprocess
import sys

import psutil
import pytest
import torch

from cifar_dist.distributed import group
from cifar_dist.distributed.group import on_main, seed_process, start
from cifar_dist.errors import UsageError
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without the rank variables of a launcher
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"):
        start("fp32")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works on this machine's accelerator")
def test_fp16_needs_an_accelerator():
    with pytest.raises(UsageError, match="--precision fp16 needs a GPU"):
        start("fp16")


@pytest.mark.parametrize("error", [ValueError("no such type"), NotImplementedError("set NCCL_P2P_DISABLE=1")])
def test_what_accelerate_refuses_is_said_in_a_line(monkeypatch, error):
    def refuse(**_):
        raise error

    monkeypatch.setattr(group, "Accelerator", refuse)
    with pytest.raises(UsageError, match=str(error)):
        start("bf16")


@pytest.mark.parametrize("precision, found", [("fp32", "no"), ("bf16", "bf16")])
def test_precision_is_what_was_asked_for(precision, found):
    assert start(precision).mixed_precision == found
    assert torch.backends.cudnn.deterministic  # or a GPU's fp32 convolutions would be others in every run


def test_on_a_cpu_freed_memory_is_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(group, "keep_freed_memory", lambda: calls.append(0))
    start("fp32")
    assert calls


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
@pytest.mark.parametrize("asked, least, most", [(False, 19, 21), (True, 1, 3)])
def test_freed_memory_is_not_faulted_in_again(asked, least, most):
    """Counted by the kernel, of twenty blocks of 64 MiB one after another; a page has at least 4 KiB."""
    script = """
import ctypes, resource, sys, torch
from cifar_dist.distributed.group import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which some machines give unasked
if sys.argv[1] == "True":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(asked)], capture_output=True, text=True, check=True)
    assert least < int(done.stdout) / (2**26 / resource.getpagesize()) < most


def test_random_streams_depend_on_seed_and_step():
    accelerator, drawn = start("fp32"), set()
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_process(accelerator, seed, step)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 3


def test_processes_draw_their_own_numbers():
    def work():
        seed_process(start("fp32"), 0, 0)
        return torch.rand(3).tolist()

    assert len({tuple(drawn) for drawn in Ranks(work, 3).check().results}) == 3


def test_on_main_hands_over_results_and_errors():
    accelerator = start("fp32")
    assert on_main(accelerator, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        on_main(accelerator, lambda: 1 / 0)


@pytest.mark.parametrize(
    "by_user, launcher, expected",
    [
        (False, "TORCHELASTIC_RUN_ID", 4),
        (False, "ACCELERATE_MIXED_PRECISION", 4),
        (True, "TORCHELASTIC_RUN_ID", 1),
        (False, "", 1),
    ],
)
def test_processes_share_the_cores_that_a_launcher_leaves_idle(monkeypatch, by_user, launcher, expected):
    """Not where the 1 is the user's, and not without torchrun or accelerate launch: then it is the user's, too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    environment = {"OMP_NUM_THREADS": "1"} if by_user else {}
    monkeypatch.setattr(psutil.Process, "environ", lambda _: environment)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if launcher:
        monkeypatch.setenv(launcher, "no")

    def work():
        torch.set_num_threads(1)
        start("fp32")
        return torch.get_num_threads()

    assert Ranks(work, 2).check().results == [expected] * 2


def test_processes_that_are_bound_to_cores_have_no_more_threads(monkeypatch):
    """Accelerate gives each its share of the machine's 16."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")

    def work():
        start("fp32")
        return torch.get_num_threads()

    assert Ranks(work, 2).check().results == [3] * 2


def test_fp32_is_fp32_whatever_the_container_says():
    torch.set_float32_matmul_precision("high")
    start("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
