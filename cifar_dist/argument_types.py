"""What argparse may take for a number, a share or a time."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Any


def _number(kind: type, low: float, high: float, open_low: bool, open_high: bool) -> Callable[[str], Any]:
    """An argparse type that accepts finite numbers of `kind` in the interval and names it otherwise."""
    highest = high if isinstance(high, int) else f"{high:g}"
    interval = f"{'(' if open_low else '['}{low:g}, {highest}{')' if open_high else ']'}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        too_low = value <= low if open_low else value < low
        too_high = value >= high if open_high else value > high
        if (kind is float and not math.isfinite(value)) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"{text} is outside {interval}")
        return value

    return parse


positive_int = _number(int, 1, 1e12, False, True)
any_seed = _number(int, 0, 2**32, False, True)
positive = _number(float, 0, math.inf, True, True)
non_negative = _number(float, 0, math.inf, False, True)
non_negative_int = _number(int, 0, 1e12, False, True)
fraction = _number(float, 0, 1, False, True)
closed_fraction = _number(float, 0, 1, False, False)
positive_fraction = _number(float, 0, 1, True, False)

_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?")


def name_or_path(given: str) -> str:
    """An argparse type for a name or a path, also one with ~ that no shell has seen: of a recipe, or after =."""
    if not given:
        raise argparse.ArgumentTypeError("it is empty, as by a variable that is not set; give one, or leave it out")
    return expanduser(given)


def path(given: str) -> Path:
    """`name_or_path`, as a path."""
    return Path(name_or_path(given))


def beta_parameter(given: str) -> float:
    """An argparse type for the alpha of Beta(alpha, alpha), or 0 for none.

    With less than 0.001 an image stays as it is, with more than 1000 it is half of each.
    """
    alpha = non_negative(given)
    if alpha and not 1e-3 <= alpha <= 1e3:
        raise argparse.ArgumentTypeError(f"{given} is neither 0 nor in [0.001, 1000]")
    return alpha


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as ``90m``, ``1h30m`` or ``45s``; 0 for what is none."""
    found = _DURATION.fullmatch(duration)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    return float(3600 * hours + 60 * minutes + seconds)


def duration(text: str) -> str:
    """An argparse type for a time such as ``1h30m``."""
    if not seconds_of(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90m, 1h30m or 45s")
    return text


def steps_or_duration(text: str) -> int | str:
    """An argparse type for a number of steps, or a time."""
    return positive_int(text) if text.lstrip("-").isdecimal() else duration(text)
