"""Who says what went wrong, before processes have met: test_launch.py has what comes after."""

import ast
import errno
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
import torch

from cifar_dist.distributed import ending, peers
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from cifar_dist.recovery import stop_request
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


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EIO, None)])
def test_a_disk_without_room_is_something_that_the_user_can_mend(number, status, capsys):
    def fill():
        raise OSError(number, os.strerror(number), "runs/a/log.jsonl")

    with pytest.raises((SystemExit, OSError)) as left:
        run_main(fill)
    assert getattr(left.value, "code", None) == status
    said = "train.py: error: no room left on the disk (runs/a/log.jsonl); free some and start again (train.py"
    assert capsys.readouterr().err.startswith(said) == (status == 2)


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP], ids=errno.errorcode.get
)
def test_a_path_that_cannot_be_used_is_named(number, capsys):
    def look():
        raise OSError(number, os.strerror(number), "/home/another/weights.pth")

    with pytest.raises(SystemExit) as left:
        run_main(look)
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"train.py: error: /home/another/weights.pth cannot be used ({os.strerror(number)}); get access to it, or name"
        " another (train.py goes on with --resume auto).\n"
    )


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--init-weights", "private/w.pth"], "--init-weights: "),
        (["--lr", "1", "--init_weights=private"], "--init_weights: "),
        (["--init-weights", "private/w"], ""),
        (["private"], ""),
        ([], ""),
    ],
)
def test_the_flag_of_a_path_that_cannot_be_used_is_named(monkeypatch, capsys, words, flag):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])

    def look():
        raise PermissionError(errno.EACCES, "Permission denied", os.path.abspath("private/w.pth"))

    with pytest.raises(SystemExit):
        run_main(look)
    assert capsys.readouterr().err.startswith(f"train.py: error: {flag}{os.path.abspath('private/w.pth')} cannot be")


@pytest.mark.parametrize("named", [(), (7,), ("/dev/shm/psm_1",), ("/proc/self/mem",)])
def test_what_nobody_named_keeps_its_traceback(named):
    def look():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), *named)

    with pytest.raises(PermissionError):
        run_main(look)


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


def hangs():
    """As a process does that waits where it hears of nothing."""
    for number in stop_request.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(300)


def test_a_rank_that_hangs_does_not_outlive_one_that_fails(monkeypatch):
    monkeypatch.setattr(ending, "GRACE_SECONDS", 1.0)

    def work():
        start("fp32", 60)
        (crash if torch.distributed.get_rank() == 1 else hangs)()

    began = time.monotonic()
    assert Ranks(lambda: run_main(work), 2).statuses == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 60


def test_processes_of_another_container_are_not_taken_for_peers(monkeypatch):
    """It may have this machine's name."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace")
    code = "from cifar_dist.distributed import peers; print(peers.me())"
    where, pid = ast.literal_eval(
        subprocess.run([*alone, sys.executable, "-c", code], capture_output=True, text=True).stdout
    )
    peers.remember([peers.me(), (where, pid)])
    assert where.startswith(platform.node()) and not peers.absent()
    peers.remember([peers.me(), (peers.me()[0], 2**22 + 1)])  # beyond what Linux gives away
    assert "has gone" in peers.absent()
    peers.remember([])


def test_what_an_old_locale_lacks_is_printed_somehow():
    code = "from cifar_dist.distributed.ending import run_main; run_main(lambda: print('lr … ½'))"
    old = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=old, capture_output=True, text=True, encoding="latin-1")
    assert (done.stdout, done.stderr) == ("lr \\u2026 ½\n", "")


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
