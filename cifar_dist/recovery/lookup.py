"""A run's checkpoint by its name, for those who read it while a training may go on."""

from __future__ import annotations

from pathlib import Path

from cifar_dist.errors import UsageError
from cifar_dist.recovery.store import Damaged, Stored, choose, committed, read_manifest, unreadable


def find(root: Path, which: str) -> Stored:
    """The newest sound checkpoint for ``last``, the best one as of then for ``best``, or a folder; changes nothing.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    if which not in ("last", "best"):
        return _verified((root / which).resolve())  # a link such as last/ has no step in its name
    seen: list[Path] = []
    while True:
        seen, before = sorted(root.glob("step-*")), seen
        try:
            return _newest_or_best(root, which)
        except UsageError:
            if seen == before:  # else a training may have dropped what was about to be read
                raise


def _newest_or_best(root: Path, which: str) -> Stored:
    last, wrong = choose(root)
    if last is None:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in sorted(wrong.items())) or "none at all"
        raise UsageError(f"{root.parent} has no sound checkpoint ({reasons}); train it, or restore one.")
    if which == "last" or last.best_step == last.step:
        return last
    best = next((stored for stored in committed(root) if stored.step == last.best_step), None)
    if best is None:
        raise UsageError(f"{root.parent} has no checkpoint '{which}'; name another with --checkpoint.")
    return _verified(best.folder)


def _verified(folder: Path) -> Stored:
    try:
        stored = read_manifest(folder)
        stored.verify()
    except Damaged as error:
        raise UsageError(f"{folder} is no sound checkpoint ({error}); name another with --checkpoint.") from None
    except OSError as error:
        raise UsageError(unreadable(folder, error)) from None
    return stored
