"""What `--aa` names: a RandAugment string as timm writes it, or TrivialAugment."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass

_EXAMPLE = "write rand-m9-mstd0.5-inc1, trivial or none"
_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?(?:e-?\d+)?)")


@dataclass(frozen=True)
class RandPolicy:
    """RandAugment, with the names and defaults of timm's ``rand_augment_transform``.

    Attributes:
        m: magnitude, of which `mmax` is the highest.
        n: layers, each of which picks one operation.
        mstd: standard deviation of the magnitude; infinity draws it evenly from 0 to `m`.
        mmax: magnitudes are clipped to it.
        inc: whether all operations grow stronger with the magnitude.
        p: probability that a layer does anything.
    """

    m: int = 10
    n: int = 2
    mstd: float = 0.0
    mmax: int = 10
    inc: bool = False
    p: float = 0.5


def parse_policy(text: str) -> RandPolicy | None:
    """The RandAugment that `text` describes; None for ``trivial``.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == "trivial":
        return None
    first, *sections = text.split("-")
    if first != "rand":
        raise argparse.ArgumentTypeError(f"{text!r} is no policy; {_EXAMPLE}")
    values: dict[str, float] = {}
    for section in sections:
        found = _SECTION.fullmatch(section)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"{text!r}: {section!r} is none of m, n, p, mstd, mmax and inc with a number; {_EXAMPLE}"
            )
        name, value = found[1], float(found[2])
        if name in values:
            raise argparse.ArgumentTypeError(f"{text!r}: {name} is given twice; keep one")
        low, high = {"n": (1, 16), "inc": (0, 1), "p": (0, 1), "mmax": (1, 1000)}.get(name, (0, math.inf))
        whole = name in ("m", "n", "mmax", "inc")
        if not low <= value <= high or (whole and value % 1):
            kind = f"{'a whole number' if whole else 'a number'} from {low:g}" + (f" to {high:g}" if high < 1e9 else "")
            raise argparse.ArgumentTypeError(f"{text!r}: {name} is {kind}, not {found[2]}")
        values[name] = int(value) if whole else value
    if values.get("mstd", 0) > 100:  # timm's spelling of an even draw
        values["mstd"] = math.inf
    policy = RandPolicy(**values)  # type: ignore[arg-type]
    if policy.m > policy.mmax:
        raise argparse.ArgumentTypeError(
            f"{text!r}: m{policy.m} is above the highest, {policy.mmax}; raise it with mmax"
        )
    return policy


def policy_text(text: str) -> str:
    """An argparse type: `text` itself, once it is known to name a policy."""
    parse_policy(text)
    return text
