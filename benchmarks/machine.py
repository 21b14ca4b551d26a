"""Where something was measured, as results say it."""

from importlib.metadata import version
from typing import Any

import torch

from cifar_dist.distributed.hardware import processor


def facts(*packages: str) -> dict[str, Any]:
    """The GPU or else the processor, torch's threads, and the versions of `packages`."""
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in packages},
    }
