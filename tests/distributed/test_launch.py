"""Every launcher ends in the process group that was asked for, or in one line that says what to do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from cifar_dist.distributed import group, slurm
from cifar_dist.distributed.group import start
from cifar_dist.distributed.launch import Launch, prepare_environment
from cifar_dist.errors import UsageError
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
LAUNCHERS = ("SLURM_", "ACCELERATE_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_", "MASTER_", "LOCAL_")
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SIMPLE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "ACCELERATE_DYNAMO_BACKEND": "NO"}


@pytest.fixture(autouse=True)
def bare():
    """No launcher's variables but those a test sets, and none left behind."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHERS) or name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def gpus(monkeypatch):
    """As many GPUs as a test says."""

    def pretend(count):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    pretend(0)
    return pretend


# What is refused


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; start with"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "RANK and LOCAL_RANK are set but WORLD_SIZE is not"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 but LOCAL_WORLD_SIZE is 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3 but WORLD_SIZE is 2"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0, which the processes cannot agree on; .*--standalone"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE is 1 but RANK, MASTER_ADDR, MASTER_PORT are not set"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', not a number"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2', not a number"),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
            r"mpirun started 4 processes .*torchrun.* or srun",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, r"mpirun started 2 processes \(PMI_SIZE\)"),
        (STEP | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 4 processes"),
        (SIMPLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, "starts one this way .*cpu_multi.yaml"),
        (TORCHRUN | {"ACCELERATE_USE_FSDP": "true"}, "FSDP, which needs GPUs"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16 but --precision is bf16"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "STEPS to 4; say it in the recipe instead: --micro-batch-size",
        ),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "CLIPPING to 1.0; say it in the recipe instead: --clip-grad"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "BACKEND to inductor; say it in the recipe instead: --compile"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "no launcher started this process; start with accelerate launch"),
        (
            TORCHRUN
            | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_configs/zero9.json"},
            "deepspeed_config_file is ds_configs/zero9.json, not a file in .*; start in the repository root",
        ),
    ],
)
def test_what_would_train_wrongly_is_refused(environment, said, gpus):
    os.environ.update(environment)
    with pytest.raises(UsageError, match=said):
        prepare_environment("bf16")


def test_deepspeed_that_is_not_installed_is_named(monkeypatch, gpus):
    os.environ.update(TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[deepspeed\]'"):
        prepare_environment("bf16")


def test_an_older_fsdp_is_refused(gpus):
    os.environ.update(TORCHRUN | {"ACCELERATE_USE_FSDP": "true"})
    gpus(2)
    with pytest.raises(UsageError, match="asks for FSDP 1; set fsdp_version to 2"):
        prepare_environment("bf16")
    os.environ["FSDP_VERSION"] = "2"
    assert prepare_environment("bf16").fsdp


def test_more_processes_than_gpus_are_refused(gpus):
    os.environ.update(TORCHRUN)
    gpus(2)
    assert not prepare_environment("bf16").on_cpu
    gpus(1)
    with pytest.raises(UsageError, match=r"2 processes were started on this node but each sees 1 GPU"):
        prepare_environment("bf16")


@pytest.mark.parametrize(
    "asked, started, said",
    [
        ({"world_size": 2}, (1, "NO"), "2 processes were started but Accelerate sees 1"),
        ({"world_size": 2}, (2, "NO"), "asked for processes that share gradients but Accelerate started .* NO"),
        ({"world_size": 2, "deepspeed": True}, (2, "MULTI_CPU"), "asked for DEEPSPEED but .* MULTI_CPU"),
        ({"world_size": 1, "fsdp": True}, (1, "NO"), "asked for FSDP but .* NO"),
    ],
)
def test_a_group_that_was_not_asked_for_is_refused(asked, started, said):
    launched = Launch(**{"on_cpu": True, "deepspeed": False, "fsdp": False} | asked)
    with pytest.raises(UsageError, match=said):
        launched.check(started[0], DistributedType[started[1]])


def test_what_accelerate_started_is_looked_at(monkeypatch, gpus):
    os.environ.update(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
    alone = SimpleNamespace(num_processes=1, distributed_type=DistributedType.NO)
    monkeypatch.setattr(group, "Accelerator", lambda **settings: alone)
    with pytest.raises(UsageError, match="2 processes were started but Accelerate sees 1"):
        start("fp32")


# What is let through


@pytest.mark.parametrize(
    "environment, world_size",
    [
        ({}, 1),
        (SIMPLE, 1),
        (TORCHRUN, 2),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, 2),
        (TORCHRUN | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "auto"}, 2),
        (STEP | TORCHRUN, 2),  # torchrun within srun
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),  # a batch script
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 1),  # srun --pty bash
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 1),
    ],
)
def test_launchers_that_agree_with_themselves(environment, world_size, gpus):
    os.environ.update(environment)
    assert prepare_environment("bf16").world_size == world_size


def test_a_gpu_is_used_unless_the_launcher_says_cpu(gpus):
    gpus(1)
    assert not prepare_environment("bf16").on_cpu
    os.environ["ACCELERATE_USE_CPU"] = "True"
    assert prepare_environment("bf16").on_cpu


@pytest.mark.parametrize("given", [{}, {"PMI_SIZE": "5", "PMI_RANK": "3"}, {"MASTER_ADDR": "a.b", "MASTER_PORT": "7"}])
def test_srun_tasks_become_ranks(given, gpus, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    os.environ.update(STEP | given)
    assert prepare_environment("bf16").world_size == 5
    found = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    assert found == ["3", "1", "5", "2"]
    assert os.environ["MASTER_ADDR"] == given.get("MASTER_ADDR", "gpu07")
    assert os.environ["MASTER_PORT"] == given.get("MASTER_PORT", str(15000 + (1234 * 101 + 2) % 15000))


@pytest.mark.parametrize(
    "nodes, first",
    [("a", "a"), ("b,a", "b"), ("n[1-2]", "n1"), ("x[3,5-9],a", "x3"), ("r[01-02]c[1-4]", "r01c1"), ("n-1,n-2", "n-1")],
)
def test_the_first_host_of_a_node_list(nodes, first, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert slurm._first_host(nodes) == first


@pytest.mark.parametrize("seconds", [600, 700])  # Accelerate drops a timeout of 600 s, and gloo takes 1800
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_processes_wait_for_each_other_as_long_as_was_said(seconds):
    os.environ.update(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    os.environ["MASTER_PORT"] = str(free_port())
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        start("fp32", seconds)
        joined = torch.distributed.distributed_c10d._get_default_group()
        assert joined._get_backend(torch.device("cpu")).options._timeout.total_seconds() == pytest.approx(seconds)
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


# The files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_launch_config_says_how_many_processes_and_nothing_about_training(path):
    command, config = path.read_text().splitlines()[0], yaml.safe_load(path.read_text())
    assert command.startswith("# ") and f"accelerate launch --config_file accelerate_configs/{path.name}" in command
    engine = config.pop("deepspeed_config", {}) | config.pop("fsdp_config", {})
    assert set(config) <= {
        *("compute_environment", "distributed_type", "num_machines", "num_processes", "use_cpu"),
        *("gpu_ids", "main_process_port", "rdzv_backend", "same_network"),
    }
    assert {key for key in engine if not key.startswith("fsdp_")} <= {
        *("deepspeed_config_file", "deepspeed_multinode_launcher", "zero3_init_flag")
    }
    assert (ROOT / engine.get("deepspeed_config_file", "ds_configs")).exists()


# Real launchers


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def begin(*command, **environment):
    """Start a launcher without waiting for it."""
    command = [str(part) for part in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True, **pipes)


def finished(*processes, within=120):
    """Exit statuses and output, once all have ended in time."""
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=within)[0])
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], "".join(said)


def accelerate(*arguments):
    return begin(sys.executable, "-m", "accelerate.commands.launch", *arguments)


def by_hand(rank, port, *arguments):
    place = TORCHRUN | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    return begin(sys.executable, "tests/launched.py", *arguments, **place)


def notes(folder):
    return sorted(path.read_text() for path in folder.iterdir())


TWO = ["0 of 2, MULTI_CPU, sum 3", "1 of 2, MULTI_CPU, sum 3"]


@pytest.mark.parametrize(
    "arguments, found",
    [
        (["cpu.yaml"], ["0 of 1, NO, sum 1"]),
        (["cpu_multi.yaml"], TWO),
        (["multi_gpu.yaml", "--num_processes", 2], TWO),
        (["zero1.yaml", "--num_processes", 2], [note.replace("MULTI_CPU", "DEEPSPEED") for note in TWO]),
    ],
    ids=["cpu", "cpu_multi", "multi_gpu", "zero1"],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_accelerate_launch_starts_what_its_config_says(arguments, found, tmp_path):
    if "zero1.yaml" in arguments:
        pytest.importorskip("deepspeed")
    name, *more = arguments
    process = accelerate("--config_file", f"accelerate_configs/{name}", *more, "tests/launched.py", tmp_path)
    status, said = finished(process)
    assert status == [0], said
    assert notes(tmp_path) == found


def test_accelerate_launch_that_starts_one_process_for_two_is_refused(tmp_path):
    status, said = finished(accelerate("--cpu", "--num_processes", 2, "tests/launched.py", tmp_path))
    assert status == [1] and "cpu_multi.yaml" in said.split("Traceback")[0]
    assert notes(tmp_path) == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_two_nodes_of_accelerate_launch_train_together(tmp_path):
    config = ["--config_file", "accelerate_configs/multi_node.yaml", "--num_processes", 2]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    nodes = [accelerate(*config, *place, "--machine_rank", rank, "tests/launched.py", tmp_path) for rank in (0, 1)]
    status, said = finished(*nodes)
    assert status == [0, 0], said
    assert notes(tmp_path) == TWO


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("fault", ["crash", ""])
def test_torchrun_ends_soon_and_the_first_error_stands_on_top(fault, tmp_path):
    """A process that goes on into a collective without the other says so in a line, below."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    status, said = finished(begin(*torchrun, "tests/launched.py", tmp_path, *filter(None, [fault])))
    if not fault:
        assert status == [0] and notes(tmp_path) == TWO
        return
    assert status == [1] and said.startswith("[rank1]: Traceback"), said
    assert "ZeroDivisionError: on one rank" in said and "[rank0]" not in said


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_a_usage_error_of_one_rank_ends_all(tmp_path):
    port = free_port()
    status, said = finished(by_hand(1, port, tmp_path, "usage"), by_hand(0, port, tmp_path, "usage"))
    assert status == [2, 75]
    first, second = said.splitlines()
    assert first == "launched.py: rank 1: error: --lr is wrong on one rank; take another."
    assert second.startswith("launched.py: rank 0: ended too (RuntimeError: ")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_the_store_going_with_rank_0_costs_no_pages(tmp_path):
    port = free_port()
    status, said = finished(by_hand(0, port, tmp_path, "crash0"), by_hand(1, port, tmp_path, "crash0"))
    assert status == [1, 75]
    first, second = said[: said.index("launched.py: rank 1")], said[said.index("launched.py: rank 1") :]
    *pages, last = first.splitlines()
    assert all(line.startswith("[rank0]: ") for line in pages), said
    assert last == "launched.py: rank 0: failed: ZeroDivisionError: on one rank"
    assert len(second.splitlines()) == 1 and second.startswith("launched.py: rank 1: ended too (RuntimeError: ")


def test_a_process_that_came_but_never_joined_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("RANK", "0")
    job = Launch(3, on_cpu=True, deepspeed=False, fsdp=False)
    for reason in ("wait timeout after 10000ms, keys: /default_pg/0//cpu//0/2", "wait timeout, keys: a/0/2, a/0/1"):
        assert job.absence(reason, 10).startswith("rank 2 of 3 did not come to node1:29500 within --ddp-timeout 10")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_processes_that_never_come_are_waited_for_only_so_long(tmp_path):
    port = free_port()
    status, said = finished(by_hand(1, free_port(), tmp_path, "timeout=1"), by_hand(0, port, tmp_path, "timeout=1"))
    assert status == [2, 2]
    without_first, without_second = said.splitlines()
    assert "rank 1 of 2 did not reach the others at 127.0.0.1:" in without_first
    assert f"1 of 2 processes came to 127.0.0.1:{port} within --ddp-timeout 1; check" in without_second


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_a_process_that_comes_late_is_waited_for(tmp_path):
    port = free_port()
    first = by_hand(1, port, tmp_path)
    time.sleep(4)
    status, said = finished(first, by_hand(0, port, tmp_path))
    assert status == [0, 0], said
    assert notes(tmp_path) == TWO


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_processes_says_so_and_hears_signals(rank, tmp_path):
    """As where a shell has kept the variables of a launcher."""
    waits = by_hand(rank, free_port(), tmp_path)
    try:
        said = waits.stdout.readline()
        assert f"rank {rank} waits for the others of 2 processes at 127.0.0.1:" in said, said
        waits.terminate()
        assert waits.wait(timeout=60) == -signal.SIGTERM
    finally:
        waits.kill()
        waits.stdout.close()


def test_variables_that_a_shell_has_kept_of_srun_are_refused(gpus):
    os.environ.update({name: value for name, value in STEP.items() if name != "SLURM_NODEID"})
    with pytest.raises(UsageError, match="SLURM_PROCID is set but SLURM_NODEID not; start with srun, or unset"):
        prepare_environment("fp32")


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        status, said = finished(by_hand(0, port, tmp_path))
    assert status == [2] and f"127.0.0.1:{port} is taken by another program" in said


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem in ("zero3_offload", "fsdp2")], ids=str)
def test_under_srun_the_engine_is_the_one_that_accelerate_launch_would_set(config, tmp_path, monkeypatch):
    """Against what a script started by ``accelerate launch`` finds in its environment."""
    show = tmp_path / "show.py"
    show.write_text("import json, os; open(f'{__file__}.json', 'w').write(json.dumps(dict(os.environ)))")
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    line += ["--num_processes", "1", "--num_machines", "1", "--main_process_port", "0", str(show)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    launched = json.loads((tmp_path / "show.py.json").read_text())
    expected = {name: value for name, value in launched.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    monkeypatch.chdir(ROOT)
    os.environ["ACCELERATE_CONFIG"] = str(config)
    assert slurm.engine_variables() == expected


@pytest.mark.parametrize(
    "text, said", [(None, "is nowhere.yaml, not a file in"), ("distributed_type: NONSENSE", "Accelerate cannot use it")]
)
def test_an_engine_that_cannot_be_is_refused(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "nowhere.yaml").write_text(text)
    os.environ.update(STEP | {"ACCELERATE_CONFIG": "nowhere.yaml"})
    with pytest.raises(UsageError, match=said):
        prepare_environment("fp32")


def test_a_single_task_with_an_engine_is_a_group_of_one(gpus):
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    os.environ.update(STEP | alone | {"SLURM_STEP_TASKS_PER_NODE": "1"})
    os.environ["ACCELERATE_CONFIG"] = str(ROOT / "accelerate_configs/zero2.yaml")
    found = prepare_environment("fp32")
    assert (found.world_size, found.grouped, found.deepspeed) == (1, True, True)
