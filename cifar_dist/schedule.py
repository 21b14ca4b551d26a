"""The learning rate of every step, through timm's schedulers."""

from __future__ import annotations

import torch
from timm.scheduler import create_scheduler_v2

from cifar_dist.config import OptimConfig


class Schedule:
    """The learning rate at every step, through timm's schedulers. It is the optimizer's own until the first `apply`.

    Args:
        optimizer: whose parameter groups are set; their ``lr_scale`` (layer decay) is respected.
        config: the schedule's settings. Its warmup comes first, then the schedule over what is left.
        epochs: length of the run that the schedule spans.
        updates_per_epoch: optimizer steps an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: int, updates_per_epoch: int):
        self._optimizer = optimizer
        self._updates_per_epoch = updates_per_epoch
        rates = [group["lr"] for group in optimizer.param_groups]
        self._scheduler, _ = create_scheduler_v2(
            optimizer,
            sched={"linear": "poly"}.get(config.sched, config.sched),
            num_epochs=epochs - config.warmup_epochs,  # type: ignore[arg-type]
            decay_epochs=config.decay_epochs,
            decay_rate=1.0 if config.sched == "linear" else config.decay_rate,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_prefix=True,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # which timm has set to that of the first step

    def apply(self, step: int) -> float:
        """Set every group's learning rate for step `step` (from 0) and return the largest."""
        self._scheduler.step(step // self._updates_per_epoch)
        self._scheduler.step_update(step)
        return max(group["lr"] for group in self._optimizer.param_groups)


def schedule_without_model(config: OptimConfig, epochs: int, updates_per_epoch: int) -> Schedule:
    """The schedule of the peak group alone: what `Schedule.apply` returns is what a run with these settings logs."""
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    return Schedule(dummy, config, epochs, updates_per_epoch)
