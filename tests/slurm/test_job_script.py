"""slurm/*.sbatch on a real cluster of three nodes, with a program in train.py's place that ends as a test wants it.

All jobs are queued at once and looked at when they have ended, so that their waiting is one.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.recovery.slurm_cluster import Cluster, missing
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"a SLURM cluster needs {', '.join(missing())}")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
ODD = ["a b", "it's", '"q"', "$HOME", "*", "", "--mean=0.5 0.5", "\\", "ü"]
JOBS = {  # name: how it ends, sbatch's options, variables
    "arguments": ("", (), {}),
    "two nodes": ("", ("--nodes=2",), {}),
    "gpus": ("", ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=2"), {}),
    "uneven": ("", ("--nodes=2", "--ntasks=3"), {}),
    "usage": ("exit 2", (), {}),
    "crash": ("exit 1", (), {}),
    "raise": ("raise", ("--nodes=2",), {}),
    "killed": ("checkpoint 5", (), {}),
    "lost": ("checkpoint 2 75", (), {}),
    "array": ("wait", ("--array=0-1",), {}),
    "stale word": ("", (), {}),
    "no progress": ("die", (), {}),
    "most starts": ("checkpoint 5", (), {"MAX_STARTS": "2"}),
    "cancelled": ("wait", (), {}),
    "signalled": ("wait", (), {}),
    "not to requeue": ("wait", ("--no-requeue",), {}),
    "container": ("", (), {"CONTAINER": "env INSIDE=yes", "PATH": f"{sys.prefix}/bin:/usr/bin:/bin"}),
    "scratch": ("", (), {"LOCAL_SCRATCH": "/local/me", "XDG_CACHE_HOME": "/home/me/cache", "HF_HOME": ""}),
    "offline": ("", (), {"NETWORK": "no", "WANDB_MODE": ""}),
    "no venv": ("", (), {"VENV": "/nowhere"}),
    "modules": ("", (), {"MODULES": "a b", "BASH_FUNC_module%%": '() { export INSIDE="$unset$*"; }'}),
    "no modules": ("", (), {"MODULES": "cuda/12.4"}),
    "tasks and gpus": ("", ("--gpus-per-node=2", "--ntasks-per-node=3"), {}),
    "few cpus": ("", ("--gpus-per-node=2",), {}),
}


class Jobs:
    """The jobs of `JOBS`, in folders of their own under `folder`."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.ids = {name: self.submit(name, *how) for name, how in JOBS.items()}
        for name in ("cancelled", "signalled", "not to requeue", "array"):
            cluster.wait_for(f"{name} to run", lambda name=name: bool(self.said(name)), 120)
        cluster.query("scancel", str(self.ids["cancelled"]))
        for name in ("signalled", "not to requeue"):
            cluster.query("scancel", "--signal=USR1", str(self.ids[name]))
        cluster.wait_for("both tasks of the array to run", lambda: len(self.said("array")) == 2, 60)
        cluster.query("scancel", "--signal=USR1", f"{self.ids['array']}_1")  # the one with the array's own number
        cluster.wait_for("signalled to start again", lambda: len(self.said("signalled")) == 2, 60)
        cluster.query("scancel", str(self.ids["signalled"]))

    def submit(self, name, fake, options, variables):
        place = self.folder / name
        place.mkdir()
        shutil.copy(ROOT / "tests/slurm/fake_train.py", place / "train.py")
        (place / "slurm").symlink_to(ROOT / "slurm")
        if name == "stale word":
            (place / "old").mkdir()
            (place / "old/REQUEUE").touch()
        settings = {
            "FAKE": fake,
            "VENV": sys.prefix,
            "NETWORK": "yes",
            "ACCELERATE_CONFIG": "",
            "OMP_NUM_THREADS": "",
            "HF_HUB_OFFLINE": "0",
        } | variables
        words = {"arguments": ODD, "stale word": ["--run-dir", "old"]}.get(name, [])
        line = (*options, "slurm/train.sbatch", *words)
        return self.cluster.submit(*line, folder=place, **settings)

    def said(self, name, rank=0):
        """What a rank said at each of its starts."""
        files = list((self.folder / name).glob(f"runs/*/said-{rank}.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def ended(self, name):
        """A job's state, exit status, starts and log, once it has ended."""
        found = self.cluster.wait(self.ids[name], *ENDED, seconds=180)
        log = (self.folder / name / f"slurm-{self.ids[name]}.out").read_text()
        status = int(found["ExitCode"].split(":")[0])
        return found["JobState"], status, int(found["Restarts"]) + 1, log.strip().splitlines()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("c"), cpus=32) as cluster:
        yield Jobs(cluster, tmp_path_factory.mktemp("jobs"))


def test_arguments_arrive_as_they_were_written(jobs):
    assert jobs.ended("arguments")[:3] == ("COMPLETED", 0, 1)
    run_dir = f"runs/cifar-dist-{jobs.ids['arguments']}"
    assert jobs.said("arguments")[0]["arguments"] == ["--resume", "auto", "--run-dir", run_dir, *ODD]


@pytest.mark.parametrize(
    "name, places",
    [
        ("two nodes", [("0", "0"), ("1", "0")]),
        ("gpus", [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]),
        ("uneven", [("0", "0"), ("0", "1"), ("1", "0")]),
    ],
)
def test_every_node_has_its_ranks_and_all_have_one_place_to_meet(name, places, jobs):
    assert jobs.ended(name)[:3] == ("COMPLETED", 0, 1)
    said = [jobs.said(name, rank)[0] for rank in range(len(places))]
    assert [(one["SLURM_NODEID"], one["SLURM_LOCALID"]) for one in said] == places
    [(address, port)] = {(one["MASTER_ADDR"], int(one["MASTER_PORT"])) for one in said}
    assert address == "127.0.0.1"
    assert 15000 < port < 32768
    assert {(one["OMP_NUM_THREADS"], one["SLURM_CPUS_PER_TASK"]) for one in said} == {
        ("2", "2") if name == "gpus" else ("1", "1")
    }


@pytest.mark.parametrize(
    "name, status, reason",
    [
        ("usage", 2, "exit status 2; the reason is above"),
        ("crash", 1, "exit status 1; the reason is above"),
        ("raise", 1, "rank 1: failed: of a reason of its own"),
    ],
)
def test_a_failed_run_is_not_started_again_and_says_why_at_the_end(name, status, reason, jobs):
    state, found, starts, log = jobs.ended(name)
    assert (state, found, starts) == ("FAILED", status, 1)
    assert log[-1] == f"slurm       failed, not requeued: {reason}"


def test_a_killed_run_is_started_again_until_it_is_done_in_one_log(jobs):
    state, _, starts, log = jobs.ended("killed")
    assert (state, starts) == ("COMPLETED", 5)
    assert [line.split(", on")[0][-7:] for line in log if ", on" in line] == [f"start {n}" for n in range(1, 6)]
    assert [one.get("SLURM_RESTART_COUNT") for one in jobs.said("killed")] == [None, "1", "2", "3", "4"]
    assert len({tuple(one["arguments"]) for one in jobs.said("killed")}) == 1
    assert log[-1] == "slurm       done"


def test_three_starts_without_progress_are_the_last(jobs):
    state, status, starts, log = jobs.ended("no progress")
    assert (state, status, starts) == ("FAILED", 1, 4)
    assert sum("signal 9" in line for line in log) == 3
    assert "three starts came no further than step none" in log[-1]


def test_a_job_starts_so_often_at_most(jobs):
    state, _, _, log = jobs.ended("most starts")
    assert (state, len(jobs.said("most starts"))) == ("FAILED", 2)
    assert "MAX_STARTS=2" in log[-1]


def test_a_cancelled_job_stays_cancelled(jobs):
    assert jobs.ended("cancelled")[0] == "CANCELLED"
    assert len(jobs.said("cancelled")) == 1


def test_a_signalled_job_saves_and_starts_again(jobs):
    log = jobs.ended("signalled")[3]
    assert "slurm       stopped by SIGUSR1 at step none; requeueing" in log


def test_where_slurm_refuses_to_requeue_the_log_says_how_to_go_on(jobs):
    state, _, starts, log = jobs.ended("not to requeue")
    assert (state, starts) == ("FAILED", 1)
    assert log[-1].endswith(f"submit the same again with --run-dir runs/cifar-dist-{jobs.ids['not to requeue']}")


def test_a_command_can_put_python_into_a_container(jobs):
    assert jobs.ended("container")[0] == "COMPLETED"
    assert jobs.said("container")[0]["INSIDE"] == "yes"


def test_decoded_data_go_to_the_nodes_own_disk_and_fetched_files_stay(jobs):
    assert jobs.ended("scratch")[0] == "COMPLETED"
    said = jobs.said("scratch")[0]
    assert (said["XDG_CACHE_HOME"], said["HF_HOME"]) == ("/local/me", "/home/me/cache/huggingface")


def test_modules_are_loaded_also_by_what_minds_unset_variables(jobs):
    assert jobs.ended("modules")[0] == "COMPLETED"
    assert jobs.said("modules")[0]["INSIDE"] == "load a b"


def test_nodes_without_a_network_are_told_so(jobs):
    assert jobs.ended("offline")[0] == "COMPLETED"
    assert jobs.said("offline")[0]["HF_HUB_OFFLINE"] == "1"
    assert jobs.said("offline")[0]["WANDB_MODE"] == "offline"
    assert jobs.ended("arguments")[0] == "COMPLETED"
    assert jobs.said("arguments")[0]["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no venv", "VENV=/nowhere has no bin/python"),
        ("no modules", "MODULES=cuda/12.4 is set, but this node has no module command"),
        ("tasks and gpus", "--ntasks-per-node 3 on nodes with 2 GPUs"),
        ("few cpus", "1 CPUs on nodes with 2 GPUs, one process each: give --cpus-per-gpu"),
    ],
)
def test_what_cannot_work_ends_at_once(name, reason, jobs):
    state, status, starts, log = jobs.ended(name)
    assert (state, status, starts) == ("FAILED", 2, 1)
    assert reason in log[-1]
    assert not jobs.said(name)


def test_a_taken_port_is_passed_over(jobs):
    jobs.ended("arguments")
    number = max(int(job) for job in jobs.cluster.query("squeue", "-h", "-t", "all", "-o", "%A").split()) + 1
    with socket.create_server(("127.0.0.1", 15000 + number % 15000)):
        jobs.ids["port"] = jobs.submit("port", "", (), {})
        assert jobs.ids["port"] == number
        assert jobs.ended("port")[0] == "COMPLETED"
    assert int(jobs.said("port")[0]["MASTER_PORT"]) > 15000 + number % 15000


def test_a_node_that_never_starts_costs_a_start_and_no_more(jobs):
    cluster = jobs.cluster
    cluster.query("scancel", str(jobs.ids["array"]))
    cluster.wait_for("all other jobs to end", lambda: not cluster.query("squeue", "-h"), 180)
    silent = cluster.pause("n2")
    jobs.ids["silent"] = jobs.submit("silent", "", ("--nodelist=n1,n2",), {})
    cluster.wait_for("the job to be queued again", lambda: cluster.job(jobs.ids["silent"]).get("Restarts") == "1", 120)
    silent.send_signal(signal.SIGCONT)
    assert jobs.ended("silent")[:3] == ("COMPLETED", 0, 2)


@pytest.mark.parametrize("name", ["train", "evaluate", "study"])
def test_slurm_takes_each_script(name, jobs):
    line = ["sbatch", "--test-only", f"slurm/{name}.sbatch", "something"]
    found = subprocess.run(line, cwd=ROOT, env=jobs.cluster.environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_a_report_may_take_several_processes(jobs, tmp_path):
    shutil.copy(ROOT / "tests/slurm/fake_train.py", tmp_path / "evaluate.py")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    line = ("--nodes=2", "slurm/evaluate.sbatch", "runs/a b", "--run-dir", str(tmp_path))
    number = jobs.cluster.submit(*line, folder=tmp_path, VENV=sys.prefix, NETWORK="no")
    assert jobs.cluster.wait(number, *ENDED)["JobState"] == "COMPLETED"
    for rank in (0, 1):
        said = json.loads((tmp_path / f"said-{rank}.jsonl").read_text())
        assert said["arguments"] == ["runs/a b", "--run-dir", str(tmp_path)]


def test_a_study_is_not_submitted_to_a_node(jobs, tmp_path):
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    number = jobs.cluster.submit("slurm/study.sbatch", "s.yaml", folder=tmp_path, VENV=sys.prefix, NETWORK="no")
    assert jobs.cluster.wait(number, *ENDED)["ExitCode"] == "2:0"
    assert "on the login node: bash slurm/study.sh s.yaml" in (tmp_path / f"slurm-{number}.out").read_text()


@pytest.mark.parametrize(
    "text, nodes", [("4", "4"), ("2(x3),1", "2 2 2 1"), ("1,2(x2)", "1 2 2"), ("16(x12)", " ".join(["16"] * 12))]
)
def test_slurms_lists_of_nodes(text, nodes):
    line = ["bash", "-c", 'source slurm/job.sh && each_node "$0"', text]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == nodes.split()


@pytest.mark.parametrize("names", [(), ("step-00000050", "step-00000100"), ("step-00000100", "step-00000100-7")])
def test_the_newest_step_is_read_off_the_folders(tmp_path, names):
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    line = ["bash", "-c", 'source slurm/job.sh && newest_step "$0"', str(tmp_path)]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == ("00000100" if names else "none")


def test_another_folder_than_the_repository_is_refused(jobs, tmp_path):
    number = jobs.cluster.submit(str(ROOT / "slurm/train.sbatch"), folder=tmp_path)
    found = jobs.cluster.wait(number, *ENDED)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert "submit in the repository's folder" in (tmp_path / f"slurm-{number}.out").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not there")
def test_shellcheck_finds_nothing():
    scripts = [str(path) for path in Path("slurm").glob("*") if path.suffix in (".sh", ".sbatch")]
    assert len(scripts) == 6
    for line in (["shellcheck", "-x", *scripts], ["shellcheck", "-s", "bash", "slurm/site.env"]):
        found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
