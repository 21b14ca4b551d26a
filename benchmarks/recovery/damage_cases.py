"""What can be done to the checkpoints of steps 1, 2 and 3, and which one must be chosen then."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
