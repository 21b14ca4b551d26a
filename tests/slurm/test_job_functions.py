"""What job scripts do that needs no cluster."""

import os
import subprocess

import pytest

from cifar_dist.command_line import parse_command_line
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "arguments",
    [["--run-dir=~/x"], ["--run-dir", "~/x"], ["--run_dir=/a/~/x"], ["--run-dir", "a b", "--lr=1"], ["--run-dir=~x"]],
    ids=" ".join,
)
def test_the_folder_is_the_one_that_train_py_takes(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    script = f'source {ROOT}/slurm/job.sh && run_dir_of "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == parse_command_line(arguments).config.run.run_dir


def test_a_job_script_that_is_no_job_says_how_to_submit_it(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    done = subprocess.run(["bash", "slurm/train.sbatch", "--lr", "1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert "failed: this is the script of a job; sbatch [sbatch's options] slurm/train.sbatch" in done.stdout


@pytest.mark.parametrize(
    ("restarts", "arguments", "said"),
    [
        ("0", ["--resume", "never"], "failed, not requeued: --resume never: a job that starts again goes on"),
        ("0", ["--resume=never", "--lr", "1"], "failed, not requeued: --resume never: a job that starts again goes on"),
        ("1", ["--lr", "1"], "done"),  # of a job that had ended, whose notes are gone
    ],
)
def test_a_job_that_could_not_go_on_is_refused_and_one_that_was_done_may_run_again(tmp_path, restarts, arguments, said):
    script = f'source {ROOT}/slurm/job.sh && launch() {{ :; }} && train "$@"'
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *arguments],
        cwd=tmp_path, env=os.environ | job | {"MAX_STARTS": "100"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(f"slurm       {said}") and done.stderr == ""
    assert done.returncode == (0 if said == "done" else 2)
