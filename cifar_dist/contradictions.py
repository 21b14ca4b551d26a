"""Settings that contradict each other, whatever the data, the model and the processes."""

from __future__ import annotations

from cifar_dist.config import Config
from cifar_dist.errors import UsageError


def refuse_contradictions(config: Config) -> None:
    """Raise `UsageError` if settings contradict each other, whatever the data, the model and the processes."""
    run, optim = config.run, config.optim
    _refuse_augmentation(config)
    if optim.warmup_epochs >= run.epochs:
        raise UsageError(
            f"--warmup-epochs {optim.warmup_epochs:g} must be less than --epochs {run.epochs}, else nothing is left to"
            " train at the full learning rate; lower it (0 is none)."
        )
    if optim.warmup_epochs % 1 and not optim.sched_on_updates:
        raise UsageError(
            f"--warmup-epochs {optim.warmup_epochs:g}: with --no-sched-on-updates the rate changes once an epoch;"
            " take a whole number."
        )
    if optim.min_lr and optim.sched in ("step", "constant"):
        raise UsageError(f"--min-lr {optim.min_lr:g}: the {optim.sched} schedule does not end at a given rate.")
    if optim.min_lr > optim.lr:
        raise UsageError(f"--min-lr {optim.min_lr:g} is above --lr {optim.lr:g}.")
    if optim.warmup_epochs and optim.warmup_lr > optim.lr:
        raise UsageError(f"--warmup-lr {optim.warmup_lr:g} is above --lr {optim.lr:g}, to which the warmup rises.")


def _refuse_augmentation(config: Config) -> None:
    augment, size = config.augment, config.data.pixels
    if augment.scale is not None:
        low, high = augment.scale
        if low > high:
            raise UsageError(f"--scale {low:g} {high:g}: the smaller share of the area comes first.")
        if augment.crop_padding:
            raise UsageError("--scale crops in place of --crop-padding; add --crop-padding 0.")
    if augment.crop_padding >= size:
        raise UsageError(f"--crop-padding {augment.crop_padding} must be less than the images' --data-size {size}.")
    if augment.scale is None and augment.cutout > size:
        raise UsageError(
            f"--cutout {augment.cutout} is larger than the images' --data-size {size}; lower it (0 is off)."
        )
    if augment.flip_mode == "alternating" and augment.hflip != 0.5:
        raise UsageError(
            f"--flip-mode alternating mirrors every image each other epoch, so --hflip {augment.hflip:g} means nothing;"
            " leave it at 0.5."
        )
