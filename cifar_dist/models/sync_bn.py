"""Batch normalisation over the images of all processes: the same training on any number of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_dist.errors import UsageError


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of `model`, as it stands, takes statistics from the batch.

    A BatchNorm in evaluation mode (a frozen backbone's, or all of them after ``model.eval()``) does not.
    """
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def other_buffers(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that are no BatchNorm's statistics; in some models they hold bounds that are infinite."""
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if not isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    )


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every BatchNorm layer, timm's with activation included, take its statistics over all processes.

    On CUDA devices layers become torch's ``SyncBatchNorm`` (``timm.layers.convert_sync_batchnorm``), which does not
    train on others; there they become `SyncedBatchNorm`. Parameters stay the same objects and names of the state
    stay those of the plain model, so checkpoints fit both. With one process nothing changes.

    Args:
        model: in training mode; changed in place, unless it is itself a BatchNorm that CUDA needs replaced.
        device: where it will train.

    Returns:
        The model.

    Raises:
        UsageError: no layer takes statistics from the batch.
    """
    if not has_batch_norm(model):
        raise UsageError("--sync-bn: the model has no batch norm that trains; leave it out.")
    if device.type == "cuda":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncedBatchNorm):
            original = type(module)
            names = {"__module__": original.__module__}
            module.__class__ = type(original.__name__, (SyncedBatchNorm, original), names)
    return model


class SyncedBatchNorm(_BatchNorm):
    """Mixed into a BatchNorm layer's class: mean and variance of the rows of all processes (Ioffe & Szegedy 2015).

    Processes may hold different numbers of rows. The mean is reduced first and then the squared deviations from it,
    because the difference E[x²] - E[x]² cancels. Sums are exchanged in float64.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) to the same shape."""
        if not self.training or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        channels = (1, -1, *[1] * (x.ndim - 2))
        rows = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

        others = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        sums = _SumOverProcesses.apply(torch.cat([rows.sum(others).double(), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = rows - mean.to(rows.dtype).view(channels)
        variance = _SumOverProcesses.apply(centred.square().sum(others).double()) / total
        if self.track_running_stats:
            self._track(mean.detach(), (variance * total / (total - 1)).detach())

        scale = (variance + self.eps).rsqrt().to(rows.dtype)
        y = centred * (scale if self.weight is None else scale * self.weight).view(channels)
        if self.bias is not None:
            y = y + self.bias.view(channels)
        y = y.to(x.dtype)
        for name in ("drop", "act"):  # timm's BatchNormAct2d
            y = getattr(self, name, nn.Identity())(y)
        return y

    def _track(self, mean: torch.Tensor, unbiased: torch.Tensor) -> None:
        """Move the running statistics towards a batch's, as torch does."""
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        factor = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), factor)  # type: ignore[union-attr]


class _SumOverProcesses(torch.autograd.Function):
    """A small tensor's sum, for every process. Each one's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
