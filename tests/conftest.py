"""What every test shares: no network, no W&B, a cache of its own, and real data where it is at hand."""

import os
import socket
import sys
from pathlib import Path

import pytest

for name in ("WANDB_PROJECT", "WANDB_NAME"):
    os.environ.pop(name, None)
os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")

if os.environ.get("CIFAR_DIST_TEST_GPU") != "1":  # `make test-gpu` has what needs NVIDIA's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # kernels of ours run on the CPU; Triton asks for it when it is imported

# of torch 2.11 itself, when it compiles a model, or a function of autograd, and when it prepares CUDA graphs
TORCH_WARNINGS = (
    "ignore:`torch.jit.script_method` is deprecated",
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The CUDA Graph is empty",
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded data sets go to a folder of the test session."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    cache.mkdir(exist_ok=True)  # torch keeps GPU kernels in it, but does not make it
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to anywhere but this machine fails the test."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.fixture
def fresh_accelerate():
    """Accelerate as at the start of a program, for tests that call a script's main, and for those after them."""
    from accelerate.state import AcceleratorState, GradientState

    def reset():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(autouse=True)
def no_earlier_wandb_run(monkeypatch):
    """A W&B run that an earlier test of this process let hang, as its subject, is nothing to the next one."""
    if "wandb" in sys.modules:
        monkeypatch.setattr(sys.modules["wandb"], "run", None)


def _real(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set: it names real data that is not part of the repository")
    return Path(os.environ[variable])


@pytest.fixture
def real_cifar10() -> Path:
    """A folder of CIFAR-10 parquet files as on the Hub."""
    return _real("CIFAR_DIST_TEST_CIFAR10")


@pytest.fixture
def real_weights() -> Path:
    """ImageNet weights of timm's tf_efficientnet_lite0."""
    return _real("CIFAR_DIST_TEST_WEIGHTS")
