"""R3: whatever is done to saved files is noticed; the newest sound checkpoint is taken, and never a fresh start.

    python -m benchmarks.recovery.damage --trials 1000 [--seed 0] [--json FILE]

A tiny run has checkpoints of steps 1 (the best), 2 and 3. In a copy of it each file of the newest is cut, emptied,
zeroed and deleted; `--trials` times one random bit of it is flipped; files change places, within it and with an older
one; its manifest is edited; there are stray files and folders, broken links, checkpoints of a newer format. Each time
the program must load the newest checkpoint that is left, put the damaged one aside and say so. Where none is
left it must refuse. The same for some of it with a whole `train.py --resume auto`, whose final state must then be the
undamaged run's, or whose exit status is 2 with one line.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import (
    FLAGS,
    Failures,
    Small,
    begin,
    campaign,
    checkpoints_of,
    final_digest,
    reference,
    steps_of,
)
from benchmarks.recovery.damage_cases import (
    Case,
    file_cases,
    flip,
    folder_cases,
    link,
    manifest_cases,
    named,
    newer,
    spoil,
)
from benchmarks.recovery.jobs import Job
from cifar_dist.errors import UsageError

STEPS = (1, 2, 3)


def judge(small: Small, case: Case, place: Path) -> str:
    """Do it and load; what is wrong with what came of it, or an empty string."""
    case.do(place / "checkpoints")
    small.run_dir, said = place, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found: int | None = small.load()
    except UsageError as error:
        found, message = None, str(error)
        if "\n" in message:
            return f"refused in several lines: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if found != case.expected:
        return f"step {found} was loaded, not {case.expected}; said: {said.getvalue()!r}"
    if found is not None and found < 3:
        aside = [path.name for path in (place / "checkpoints").glob("damaged-step-*")]
        if not aside or not all(name in said.getvalue() for name in aside):
            return f"step {found} was loaded, {aside} put aside, but said: {said.getvalue()!r}"
    return ""


def small_campaign(trials: int, dice: random.Random, folder: Path, failures: Failures) -> list[dict[str, Any]]:
    """All of the matrix on a tiny run; a row for each kind."""
    small = Small(template := folder / "template")
    for step in STEPS:
        small.save(step, best=step == 1)
    if steps_of(template) != list(STEPS):
        failures.add(f"three saves left the checkpoints {steps_of(template)}")
    files = sorted(path.name for path in named(template / "checkpoints", 3).iterdir())
    flips = [(dice.choice(files), dice.random()) for _ in range(trials)]
    cases = [*file_cases(template / "checkpoints", files), *manifest_cases(), *folder_cases()]
    cases += [Case("flip a bit", f"{file} at {place:.9f}", spoil(flip(place), file), 2) for file, place in flips]
    counts: dict[str, list[int]] = {}
    for number, case in enumerate(cases):
        place = folder / f"case-{number}"
        shutil.copytree(template, place, symlinks=True)
        try:
            fault = judge(small, case, place)
        except FileNotFoundError as error:
            fault = f"could not be tried ({error})"
        count = counts.setdefault(case.kind, [0, 0])
        count[0] += 1
        if fault:
            count[1] += 1
            failures.add(f"{case.kind}: {case.name}: {fault}: {place}")
        else:
            shutil.rmtree(place)
    return [{"damage": kind, "cases": done, "failures": bad} for kind, (done, bad) in counts.items()]


def all_of(do: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Do something in every checkpoint of a run."""

    def every(run_dir: Path) -> None:
        for saved in checkpoints_of(run_dir):
            do(saved)

    return every


def newest(do: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Do something in the newest checkpoint of a run."""
    return lambda run_dir: do(checkpoints_of(run_dir)[-1])


def cut_weights(checkpoint: Path) -> None:
    """Cut a checkpoint's weights short."""
    os.truncate(checkpoint / "model.safetensors", 100)


def newer_format(checkpoint: Path) -> None:
    """Make it one that a later version has written."""
    (checkpoint / "manifest.json").write_bytes(newer((checkpoint / "manifest.json").read_bytes()))


def whole_campaign(folder: Path, failures: Failures) -> list[dict[str, Any]]:
    """Some damage before a whole ``train.py --resume auto``."""
    expected, _ = reference(folder, 1)
    cases: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
        "newest cut": (newest(cut_weights), [], ""),
        "newest without a manifest": (newest(lambda saved: (saved / "manifest.json").unlink()), [], ""),
        "all cut": (all_of(cut_weights), [], "step-"),
        "all manifests deleted": (all_of(lambda saved: (saved / "manifest.json").unlink()), [], "step-"),
        "all of a newer format": (all_of(newer_format), [], "format"),
        "another config": (lambda run_dir: None, ["--lr", "1e-3"], "--lr"),
        "a link to nothing": (lambda run_dir: link(run_dir / "checkpoints", "last", "step-00000099"), [], ""),
    }
    bad = 0
    for number, (name, (do, flags, word)) in enumerate(cases.items()):
        run_dir, said = folder / f"whole-case-{number}", folder / f"whole-case-{number}.txt"
        shutil.copytree(folder / "whole-1", run_dir, symlinks=True)
        try:
            do(run_dir)
            before = steps_of(run_dir)
            job = Job([*FLAGS, *flags, "--run-dir", str(run_dir)], 1, said)
            statuses = job.wait(120)
            job.end()
            lines = [line for line in said.read_text().splitlines() if "error:" in line or "Traceback" in line]
            if not word:
                fault = "" if statuses == [0] and final_digest(run_dir) == expected else f"{statuses}, or another state"
            elif statuses != [2] or len(lines) != 1 or word not in lines[0]:
                fault = f"exit status {statuses}, said {lines}"
            else:
                fault = "" if set(steps_of(run_dir)) <= set(before) else "it has trained"
        except (OSError, IndexError) as error:
            fault = f"could not be tried, or left nothing ({error!r})"
        if fault:
            bad += 1
            failures.add(f"train.py with {name}: {fault}: {run_dir}, {said}")
    return [{"damage": "train.py --resume auto", "cases": len(cases), "failures": bad}]


def run(trials: int, seed: int, folder: Path) -> dict[str, Any]:
    """The matrix with `trials` bit flips; rows of a table, and failures."""
    begin(folder)
    failures = Failures()
    rows = whole_campaign(folder, failures)
    rows = small_campaign(trials, random.Random(seed), folder, failures) + rows
    return {"rows": rows, "failures": failures}


if __name__ == "__main__":
    campaign(__doc__, run, trials=1000)
