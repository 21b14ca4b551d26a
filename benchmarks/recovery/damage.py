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
import hashlib
import io
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.recovery.common import (
    FLAGS,
    Failures,
    Job,
    Small,
    begin,
    campaign,
    checkpoints_of,
    final_digest,
    reference,
    steps_of,
)
from cifar_dist.errors import UsageError

STEPS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """Something done to the checkpoints folder, and the step that must be chosen then (None: refused)."""

    kind: str
    name: str
    do: Callable[[Path], Any]
    expected: int | None


def named(root: Path, step: int) -> Path:
    """A checkpoint's folder."""
    return root / f"step-{step:08d}"


def spoil(change: Callable[[bytes], bytes], file: str, step: int = 3) -> Callable[[Path], Any]:
    """Change the bytes of a file."""

    def do(root: Path) -> None:
        path = named(root, step) / file
        path.write_bytes(change(path.read_bytes()))

    return do


def flip(place: float) -> Callable[[bytes], bytes]:
    """Flip the bit at this part (of 1) of all bits."""

    def change(content: bytes) -> bytes:
        byte, bit = divmod(int(place * 8 * len(content)), 8)
        return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]

    return change


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Edit JSON."""

    def do(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return do


def newer(content: bytes) -> bytes:
    """A manifest as a later version would write it, with a digest that holds."""
    manifest = json.loads(content) | {"format": 99}
    manifest.pop("digest")
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"digest": digest}).encode()


def swap(one: Path, other: Path) -> None:
    """Exchange two files or folders."""
    aside = one.with_name("aside")
    os.replace(one, aside)
    os.replace(other, one)
    os.replace(aside, other)


def link(root: Path, name: str, to: str | None) -> None:
    """Make a link anew, or only remove it."""
    (root / name).unlink()
    if to is not None:
        (root / name).symlink_to(to)


def file_cases(root: Path, files: list[str]) -> Iterator[Case]:
    """Each file cut, emptied, zeroed, deleted; exchanged with another, or with its older self unless they are alike."""
    changes = {
        "half of": lambda content: content[: len(content) // 2],
        "a byte less of": lambda content: content[:-1],
        "a byte more of": lambda content: content + b"\0",
        "nothing of": lambda content: b"",
        "zeros for": lambda content: bytes(len(content)),
    }
    for file in files:
        for name, change in changes.items():
            yield Case("cut, empty, zero", f"{name} {file}", spoil(change, file), 2)
        yield Case("delete", file, lambda root, file=file: (named(root, 3) / file).unlink(), 2)  # type: ignore[misc]
        for step, left in ((2, 1), (1, 2)):
            older = named(root, step) / file
            if older.exists() and older.read_bytes() == (named(root, 3) / file).read_bytes():
                continue
            yield Case(
                "swap with an older one",
                f"{file} of 3 and {step}",
                lambda root, file=file, step=step: swap(named(root, 3) / file, named(root, step) / file),  # type: ignore[misc]
                left,
            )
    for one, other in itertools.combinations(files, 2):
        yield Case(
            "swap two files",
            f"{one} and {other}",
            lambda root, one=one, other=other: swap(named(root, 3) / one, named(root, 3) / other),  # type: ignore[misc]
            2,
        )


def manifest_cases() -> Iterator[Case]:
    """Edits of the manifest, sensible JSON all."""
    model = "model.safetensors"
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "another step": lambda m: m.update(step=m["step"] + 1),
        "more processes": lambda m: m.update(num_processes=m["num_processes"] + 1),
        "another hash": lambda m: m["files"][model].update(sha256="0" * 64),
        "another size": lambda m: m["files"][model].update(bytes=m["files"][model]["bytes"] + 1),
        "a file not listed": lambda m: m["files"].pop(model),
        "a file listed that is not there": lambda m: m["files"].update(more=m["files"][model]),
        "a file outside": lambda m: m["files"].update({f"../step-00000002/{model}": m["files"].pop(model)}),
        "no files": lambda m: m.update(files={}),
        "files of another type": lambda m: m.update(files=[]),
        "another format by hand": lambda m: m.update(format=99),
        "empty": lambda m: m.clear(),
    }
    for name, change in edits.items():
        yield Case("edit the manifest", name, spoil(edit(change), "manifest.json"), 2)
    for steps in ((3,), (1, 2, 3)):

        def of_a_later_version(root: Path, steps: tuple[int, ...] = steps) -> None:
            for step in steps:
                spoil(newer, "manifest.json", step)(root)

        yield Case("newer format", f"of {steps}", of_a_later_version, None)


def folder_cases() -> Iterator[Case]:
    """Stray files and folders, links that mislead, and several damaged checkpoints."""
    strays: dict[str, Callable[[Path], Any]] = {
        "a file in a checkpoint": lambda root: (named(root, 3) / "notes.txt").write_text("mine"),
        "a file named as a checkpoint": lambda root: named(root, 9).touch(),
        "an empty folder named as one": lambda root: named(root, 9).mkdir(),
        "a folder of no number": lambda root: (root / "step-final").mkdir(),
        "a half-written one": lambda root: shutil.copytree(named(root, 3), root / ".tmp-step-00000009"),
        "a half-removed one": lambda root: shutil.copytree(named(root, 3), root / ".del-step-00000009"),
        "an older one under a newer name": lambda root: shutil.copytree(named(root, 2), named(root, 9)),
        "a link named as one": lambda root: named(root, 9).symlink_to(named(root, 2)),
        "a damaged one put aside": lambda root: shutil.copytree(named(root, 2), root / "damaged-step-00000009"),
    }
    for name, do in strays.items():
        yield Case("stray", name, do, 3)
    for name, to in (("dangling", "step-00000009"), ("missing", None), ("to an older one", "step-00000001")):
        for which in ("last", "best"):
            yield Case("links", f"{which} {name}", lambda root, w=which, to=to: link(root, w, to), 3)  # type: ignore[misc]
    for steps, left in (((2, 3), 1), ((1, 3), 2), ((1, 2, 3), None), ((1, 2), 3)):
        for file in ("model.safetensors", "state.json", "manifest.json"):

            def cut(root: Path, steps: tuple[int, ...] = steps, file: str = file) -> None:
                for step in steps:
                    spoil(lambda content: content[:-9], file, step)(root)

            yield Case("several damaged", f"{file} of {steps}", cut, left)


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
