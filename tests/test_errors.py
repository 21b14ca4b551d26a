"""Who says what went wrong, before processes have met: test_launch.py has what comes after."""

import pytest

from cifar_dist.errors import UsageError, run_main


def refuse():
    raise UsageError("--lr is 7; take less.")


def crash():
    raise ZeroDivisionError("division by zero. Really")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.argv", ["train.py"])


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


def test_other_processes_of_a_node_fail_in_a_line(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        run_main(crash)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        run_main(crash)
    assert left.value.code == 1
    assert capsys.readouterr().err == "train.py: local rank 1: ended too (ZeroDivisionError: division by zero)\n"
