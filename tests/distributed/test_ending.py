"""Who says what went wrong, before processes have met: test_launch.py has what comes after."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from cifar_dist.distributed import peers
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from tests.ranks import Ranks


def refuse():
    raise UsageError("--lr is 7; take less.")


def crash():
    raise ZeroDivisionError("division by zero. Really")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(peers, "place", "")  # a training of an earlier test of this process has been somewhere


@pytest.mark.parametrize(
    "environment, speaks",
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, True),  # started by hand: no other process of this node is known
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "0", "RANK": "8"}, True),  # once per node
        ({"TORCHELASTIC_RUN_ID": "a", "LOCAL_RANK": "1"}, False),
        ({"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}, False),
    ],
)
def test_one_process_of_a_node_speaks(environment, speaks, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        run_main(refuse)
    assert left.value.code == 2
    assert capsys.readouterr().err == ("train.py: error: --lr is 7; take less.\n" if speaks else "")


def test_an_output_that_nobody_reads_any_more_is_said_without_a_traceback():
    """As with ``| head -1``."""
    script = (
        "from cifar_dist.distributed.ending import run_main\nrun_main(lambda: [print(line) for line in range(10**6)])"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        said = process.stderr.read().decode()
    assert said.startswith("-c: error: what read the output has gone (") and said.count("\n") == 1
    assert process.returncode == 1


def test_other_processes_of_a_node_fail_in_a_line(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        run_main(crash)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        run_main(crash)
    assert left.value.code == 1
    assert capsys.readouterr().err == "train.py: local rank 1: ended too (ZeroDivisionError: division by zero)\n"


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EACCES, None)])
def test_a_disk_without_room_is_something_that_the_user_can_mend(number, status, capsys):
    def fill():
        raise OSError(number, os.strerror(number), "runs/a/log.jsonl")

    with pytest.raises((SystemExit, OSError)) as left:
        run_main(fill)
    assert getattr(left.value, "code", None) == status
    said = "train.py: error: no room left on the disk (runs/a/log.jsonl); free some and start again (train.py"
    assert capsys.readouterr().err.startswith(said) == (status == 2)


# What a job script learns of a failure


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "fail, status, reason",
    [(refuse, 2, "--lr is 7; take less."), (crash, 1, "failed: ZeroDivisionError: division by zero")],
)
def test_a_failure_before_processes_meet_is_noted(fail, status, reason, rank, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_FAILURE_FILE", str(tmp_path / "why"))
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_LOCALID", str(rank))
    with pytest.raises((SystemExit, ZeroDivisionError)) as left:
        run_main(fail)
    assert getattr(left.value, "code", 1) == status
    assert (tmp_path / "why").read_text() == f"{'local rank 1: ' if rank else ''}{reason}\n"


def reduce_while(rank_1_does):
    """Two processes' work: rank 0 waits in a collective while rank 1 ends in its own way."""

    def work():
        start("fp32", 60)
        if torch.distributed.get_rank() == 1:
            rank_1_does()
        torch.distributed.all_reduce(torch.ones(1))

    return lambda: run_main(work)


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_rank_that_fails_says_why_and_those_that_lose_it_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_FAILURE_FILE", str(tmp_path / "why"))
    found = Ranks(reduce_while(crash), 2)
    assert found.statuses == [75, 1]
    assert (tmp_path / "why").read_text() == "rank 1: failed: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("on_one_machine", [True, False])
def test_a_killed_rank_is_nobodys_failure(on_one_machine, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_FAILURE_FILE", str(tmp_path / "why"))
    if not on_one_machine:
        monkeypatch.setattr(peers, "absent", str)
    found = Ranks(reduce_while(dies), 2)
    assert found.statuses == [75, -signal.SIGKILL]
    assert not (tmp_path / "why").exists()
    assert ("rank 1 (process " in found.said[0]) == on_one_machine, found.said[0]
