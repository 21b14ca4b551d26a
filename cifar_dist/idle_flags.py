"""Flags that would do nothing: what each of them needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cifar_dist.errors import UsageError

Settings = dict[str, Any]
NEEDS: dict[str, tuple[str, Callable[[Settings], Any]]] = {
    "val_fraction": ("--select-on val", lambda s: s["select_on"] == "val" or not s["val_fraction"]),
    "split_seed": ("--select-on val and a --val-fraction", lambda s: s["select_on"] == "val" and s["val_fraction"]),
    "crop_mode": ("--crop-padding", lambda s: s["crop_padding"]),
    "remode": ("--reprob", lambda s: s["reprob"]),
    "mixup_prob": ("--mixup or --cutmix", lambda s: s["mixup"] or s["cutmix"]),
    "mixup_switch_prob": ("both --mixup and --cutmix", lambda s: s["mixup"] and s["cutmix"]),
    "warmup_lr": ("--warmup-epochs", lambda s: s["warmup_epochs"]),
    "decay_epochs": ("--sched step", lambda s: s["sched"] == "step"),
    "decay_rate": ("--sched step", lambda s: s["sched"] == "step"),
    "micro_batch_size": ("a --batch-size as large", lambda s: (s["micro_batch_size"] or 0) <= s["batch_size"]),
    "min_delta": ("--patience", lambda s: s["patience"]),
}


def refuse_idle_flags(given: Settings, settings: Settings, source: str) -> None:
    """Refuse what was given on the command line and does nothing.

    A recipe may hold such settings: a saved one holds all there are, and the command line may have switched off what
    they belong to.

    Args:
        given: the command line's own settings that are not the default, by their flag's name.
        settings: all that it comes to with its recipe.
        source: what to call the command line in errors, if anything.

    Raises:
        UsageError: a flag needs another one.
    """
    for name, value in given.items():
        need, is_met = NEEDS.get(name, ("", bool))
        if need and not is_met(settings):
            shown = f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
            where = f"{source}: " if source else ""
            raise UsageError(f"{where}{shown} does nothing without {need}; give that, or leave this out.")
