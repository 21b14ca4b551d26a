"""Names of processors, and GPUs that torch cannot use."""

import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from cifar_dist.distributed.group import restart, start
from cifar_dist.distributed.hardware import (
    VISIBLE,
    cpu_name,
    device_name,
    processor,
    refuse_unknown_gpu,
    tell_of_idle_gpus,
)
from cifar_dist.errors import UsageError

TOO_OLD = RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.\nmore")


class NVMLError(Exception):
    pass


class NVMLError_LibRmVersionMismatch(NVMLError):
    pass


@pytest.fixture
def machine(monkeypatch):
    """Make one with so many GPUs as NVIDIA's library sees (an error: without it), and with torch's word on them."""
    for name in ("ACCELERATE_USE_CPU", *VISIBLE, "SLURM_GPUS_ON_NODE", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(count, said, environment=MappingProxyType({})):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def initialise():
            if isinstance(count, Exception):
                raise count

        def refuse():
            raise said

        library = SimpleNamespace(
            NVMLError=NVMLError,
            NVMLError_LibRmVersionMismatch=NVMLError_LibRmVersionMismatch,
            nvmlInit=initialise,
            nvmlDeviceGetCount=lambda: count,
            nvmlSystemGetDriverVersion=lambda: "535.183.01",
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda handle: ["NVIDIA L4", "another"][handle],
        )
        monkeypatch.setitem(sys.modules, "pynvml", library)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", refuse)
        monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")
        monkeypatch.setattr("platform.node", lambda: "gpu07")

    return make


NONE_SEEN = RuntimeError("No CUDA GPUs are available")


@pytest.mark.parametrize(
    ("count", "said", "environment", "expected"),
    [
        (
            1,
            TOO_OLD,
            {},
            "1 GPU (NVIDIA L4, driver 535.183.01) on gpu07: torch 2.15.0+cu132 uses none (The NVIDIA driver on your"
            " system is too old (found version 12020)), so the CPU does the work; install a torch that fits"
            " (pytorch.org).",
        ),
        (2, AssertionError("Torch not compiled with CUDA enabled"), {}, "2 GPUs (NVIDIA L4, driver 535.183.01) on"),
        (2, AssertionError("Torch not compiled with CUDA enabled"), {}, "; install a torch that fits (pytorch.org)."),
        (
            2,
            NONE_SEEN,
            {"CUDA_VISIBLE_DEVICES": "2"},
            "(No CUDA GPUs are available), so the CPU does the work; CUDA_VISIBLE_DEVICES is 2: name",
        ),
        (2, NONE_SEEN, {}, "; nvidia-smi may say more."),
        (NVMLError_LibRmVersionMismatch(), NONE_SEEN, {}, "GPUs whose driver was renewed without a restart on gpu07"),
    ],
)
def test_gpus_that_lie_idle_are_named(machine, capsys, count, said, environment, expected):
    machine(count, said, environment)
    tell_of_idle_gpus()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and expected in line


@pytest.mark.parametrize(
    ("count", "environment"),
    [
        (0, {}),
        (NVMLError("no library"), {}),
        (NVMLError("no library"), {"SLURM_GPUS_ON_NODE": "0"}),
        (NVMLError("no library"), {"SLURM_GPUS_ON_NODE": ""}),
        (2, {"CUDA_VISIBLE_DEVICES": ""}),
        (2, {"CUDA_VISIBLE_DEVICES": "-1"}),
        (2, {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "2"}),
        (NVMLError("no library"), {"HIP_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "2"}),
        (2, {"LOCAL_RANK": "1"}),  # the first of the node has said it
    ],
)
def test_a_cpu_on_purpose_needs_no_word(machine, capsys, count, environment):
    machine(count, TOO_OLD, environment)
    tell_of_idle_gpus()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "said", "named", "cure"),
    [
        (2, TOO_OLD, "2 GPUs (NVIDIA L4, driver 535.183.01) on gpu07", "; install a torch that fits (pytorch.org), or"),
        (NVMLError("-"), RuntimeError("Found no NVIDIA driver on your system"), "GPUs that SLURM gave on", "--nv, --"),
    ],
)
def test_gpus_that_slurm_gave_are_not_left_idle(machine, count, said, named, cure):
    machine(count, said, {"SLURM_GPUS_ON_NODE": "2"})
    with pytest.raises(UsageError) as error:
        tell_of_idle_gpus()
    assert str(error.value).startswith(named) and cure in str(error.value)
    assert str(error.value).endswith("or ask SLURM for none.")


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(("by_choice", "lines"), [("false", 1), ("true", 0)])
def test_a_start_says_it_once(machine, capsys, by_choice, lines):
    machine(2, TOO_OLD, {"ACCELERATE_USE_CPU": by_choice})
    restart(start("fp32"), "bf16", 600)
    assert capsys.readouterr().err.count("so the CPU does the work") == lines


def test_a_gpu_that_torch_was_not_built_for_is_refused(monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UsageError, match=r"^Tesla V100 is sm_70, and torch .* is built for sm_75, sm_80; install"):
        refuse_unknown_gpu(torch.device("cuda"))


def test_another_error_of_a_gpu_is_its_own(monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: unspecified launch failure")

    refuse_unknown_gpu(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(RuntimeError, match="launch failure"):
        refuse_unknown_gpu(torch.device("cuda"))


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_a_cpu_is_named_with_its_threads(monkeypatch, threads, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")) == cpu_name(processor(), threads) == f"{processor()} ({said})"


@pytest.mark.parametrize(
    ("family", "model", "name", "expected"),
    [
        (26, 2, "AMD EPYC", "AMD EPYC, family 26, model 2"),
        (6, 143, "Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz, family 6, model 143"),
        (25, 33, "AMD Ryzen 7 5800X 8-Core Processor", "AMD Ryzen 7 5800X 8-Core Processor"),
    ],
)
def test_a_processors_name_tells_it_from_others(monkeypatch, family, model, name, expected):
    cores = [(family, model, name), (1, 1, "another")]  # the first one's are taken
    said = [f"processor\t: 0\ncpu family\t: {f}\nmodel\t\t: {m}\nmodel name\t: {n}\n" for f, m, n in cores]
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join(said))
    assert processor() == expected


@pytest.mark.parametrize("cpuinfo", ["processor\t: 0\nCPU part\t: 0xd40\n", None])
def test_a_processor_without_a_name_in_proc_is_pythons(monkeypatch, cpuinfo):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("platform.processor", lambda: "an Arm")
    assert processor() == "an Arm"
