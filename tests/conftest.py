"""What every test shares: no network, no W&B, a cache of its own, and real data where it is at hand."""

import os
from pathlib import Path

import pytest

os.environ.update(WANDB_MODE="disabled", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded data sets go to a folder of the test session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


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
