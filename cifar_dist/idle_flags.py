"""Flags that would do nothing: what each of them needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    "layer_decay": ("--freeze none", lambda s: s["freeze"] == "none"),
    "min_delta": ("--patience", lambda s: s["patience"]),
    # of facts beside the settings, which are known after the data and the model:
    "momentum": ("an --opt that has one", lambda s: s["has_momentum"]),
    "interpolation": ("images to be resized", lambda s: s["resizes"]),
    "shuffle_window": ("--data-mode stream", lambda s: s["streams"]),
    "sync_bn": ("several processes", lambda s: s["num_processes"] > 1),
}


def has_effect(name: str, settings: Settings) -> bool:
    """Whether all is there that a setting needs to have an effect."""
    return name not in NEEDS or bool(NEEDS[name][1](settings))


def idle_flags(given: Settings, settings: Settings) -> list[str]:
    """What to say of the settings that were given on the command line and do nothing.

    They are not refused: a study's grid, or a sweep, gives some to all of its runs. A recipe may hold them without a
    word, since a saved one holds all settings there are.

    Args:
        given: the command line's own settings that are not the default, by their flag's name.
        settings: all that it comes to with its recipe, and the facts that `NEEDS` asks for.
    """
    said = []
    for name, value in given.items():
        if not has_effect(name, settings):
            shown = "" if value is True else f" {value:g}" if isinstance(value, float) else f" {value}"
            said.append(f"note        --{name.replace('_', '-')}{shown} does nothing without {NEEDS[name][0]}")
    return said
