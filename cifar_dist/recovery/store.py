"""A run's checkpoints as folders: committed in one rename, verified by hashes, chosen, and pruned.

``RUN_DIR/checkpoints/step-XXXXXXXX/`` appears under its name only when all its files, and ``manifest.json`` with their
sizes and hashes, are durable. The manifest says which step it is; names are for people, and so are the links ``last``
and ``best``. What fails a check is set aside as ``damaged-*`` by the training that finds it.

Pillai et al., "All File Systems Are Not Created Equal", 2014, on what must be made durable in which order.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.durable import fsync, save_json
from cifar_dist.errors import UsageError

FORMAT = 3
_MANIFEST = "manifest.json"
_HASH_BYTES = 2**20
_FACTS = ("serial", "step", "best_step", "num_processes", "files")

Files = dict[str, dict[str, Any]]  # by name: bytes and sha256


class Damaged(Exception):
    """A checkpoint folder fails a check; the message says which."""


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint.

    Attributes:
        folder: where it is.
        serial: the how-manieth commit of the run it is; the newest has the largest.
        step: optimizer steps made.
        best_step: the step of the run's best checkpoint as of then; 0 for none.
        num_processes: how many wrote it.
        files: sizes and hashes.
        digest: sha256 of all of the above.
    """

    folder: Path
    serial: int
    step: int
    best_step: int
    num_processes: int
    files: Files
    digest: str

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare size and sha256 of the files called `names` (all) with the manifest's.

        Raises:
            Damaged: one differs or is missing.
        """
        chosen = self.files if names is None else {name: self.files.get(name) for name in names}
        with ThreadPoolExecutor(4) as pool:  # hashlib and reading leave the interpreter free
            found = list(pool.map(lambda name: _measured(self.folder / name), chosen))
        for name, measured in zip(chosen, found, strict=True):
            expected = chosen[name]
            if measured is None or expected is None:
                raise Damaged(f"{name} is missing")
            if measured["bytes"] != expected["bytes"]:
                raise Damaged(f"{name} has {measured['bytes']} bytes, not {expected['bytes']}")
            if measured != expected:
                raise Damaged(f"{name} has another sha256 than when it was written")


def settle(paths: Iterable[Path]) -> Files:
    """Make written files durable and tell their sizes and hashes, both at once: what `commit` is to be given.

    Raises:
        OSError: one could not be made durable, or is not there any more.
    """
    paths = list(paths)
    with ThreadPoolExecutor(4) as pool:
        durable = [pool.submit(fsync, path) for path in paths]
        found = dict(zip((path.name for path in paths), pool.map(_measured, paths), strict=True))
        for each in durable:
            each.result()
    if lost := [name for name, measured in found.items() if measured is None]:
        raise FileNotFoundError(f"{lost[0]} has vanished")
    return {name: measured for name, measured in found.items() if measured}


def _measured(path: Path) -> dict[str, Any] | None:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return None
    return {"bytes": size, "sha256": digest.hexdigest()}


def unreadable(folder: Path, error: OSError) -> str:
    """What to say of a checkpoint that may be sound: a file server that hiccups must not cost it."""
    return f"checkpoint {folder} cannot be read now ({error.strerror}); start again when it can, or move it away."


def begin(root: Path, step: int) -> Path:
    """A new folder for the files of a checkpoint, which does not exist for any reader before `commit`."""
    if not root.is_dir():
        root.mkdir()  # not its parents: if the run folder has vanished, nothing is saved elsewhere
        fsync(root.parent)
    aside = root / f".tmp-{_name(step)}-{secrets.token_hex(4)}"
    aside.mkdir()
    return aside


def commit(root: Path, aside: Path, best: bool, facts: dict[str, Any]) -> Stored:
    """Give the folder that `begin` made, with settled files in it, its manifest and its name, in one rename.

    Args:
        root: the run's folder of checkpoints.
        aside: what `begin` returned.
        best: whether it is the best so far.
        facts: ``step``, ``num_processes`` and ``files`` of the manifest.
    """
    before = latest_manifest(root)
    best_step = facts["step"] if best else before.best_step if before else 0
    serial = before.serial + 1 if before else 1
    manifest = {"format": FORMAT, "serial": serial, **facts, "best_step": best_step}
    digest = _digest(manifest)
    save_json(manifest | {"digest": digest}, aside / _MANIFEST)
    fsync(aside / _MANIFEST)
    fsync(aside)
    folder = root / _name(facts["step"])
    if folder.exists():  # the same step again, with its evaluation: the older one stays until this one is there
        folder = folder.with_name(f"{folder.name}-{serial}")
    os.replace(aside, folder)
    fsync(root)
    return Stored(folder, serial, facts["step"], best_step, facts["num_processes"], facts["files"], digest)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def point(root: Path, stored: Stored) -> None:
    """Let the links ``last`` and ``best`` name their folders, where the file system has links.

    A copy of a checkpoint in a link's place, which programs that follow links make of it, is removed.
    """
    known = committed(root)
    manifests = [(one.folder / _MANIFEST).read_bytes() for one in known]
    best = next((found for found in known if found.step == stored.best_step > 0), None)
    for link, named in ((root / "last", stored), (root / "best", best)):
        if named is not None:
            with suppress(OSError):  # links are for people only
                if link.is_dir() and not link.is_symlink() and (link / _MANIFEST).read_bytes() in manifests:
                    os.replace(link, root / f".del-step-{link.name}-{secrets.token_hex(4)}")
                fresh = root / f".tmp-{link.name}"
                fresh.unlink(missing_ok=True)
                fresh.symlink_to(named.folder.name)
                os.replace(fresh, link)
    fsync(root)


def prune(root: Path, keep_last: int, best_step: int) -> None:
    """Drop all but the newest `keep_last` committed checkpoints and the best one; only called after a commit.

    Of several of one step, the newest is kept.
    """
    steps: list[int] = []
    for stored in committed(root):
        if stored.step in steps or (len(steps) >= keep_last and stored.step != best_step):
            os.replace(stored.folder, root / f".del-{stored.folder.name}-{secrets.token_hex(4)}")
        else:
            steps.append(stored.step)
    sweep(root)


def sweep(root: Path) -> None:
    """Remove what a save or a pruning left unfinished; to be called by the one training that holds the run's lock."""
    for left_over in [*root.glob(".tmp-step-*"), *root.glob(".del-step-*")]:
        shutil.rmtree(left_over, ignore_errors=True)


def read_manifest(folder: Path) -> Stored:
    """A folder's manifest; its files are not looked at.

    Raises:
        Damaged: it is missing or not what was written.
        UsageError: it is of another version of the format.
        OSError: it cannot be read now.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        digest = manifest.pop("digest")
        if digest != _digest(manifest):
            raise Damaged(f"{_MANIFEST} is not what was written")
        if manifest["format"] != FORMAT:
            raise UsageError(
                f"checkpoint {folder} has format {manifest['format']}, this version of cifar-dist reads {FORMAT};"
                " go on with the version that wrote it."
            )
        if not folder.name.startswith(_name(manifest["step"])):
            raise Damaged(f"{_MANIFEST} is that of step {manifest['step']}")
        return Stored(folder, digest=digest, **{name: manifest[name] for name in _FACTS})
    except FileNotFoundError:
        raise Damaged(f"{_MANIFEST} is missing") from None
    except (NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{_MANIFEST} cannot be read ({error})") from None


def _manifests(root: Path) -> tuple[list[Stored], dict[Path, str], dict[Path, OSError]]:
    """Checkpoints whose manifests are sound, the newest first, what is wrong with others', and which can't be read."""
    found, wrong, unread = list[Stored](), dict[Path, str](), dict[Path, OSError]()
    for folder in root.glob("step-*"):
        try:
            found.append(read_manifest(folder))
        except Damaged as error:
            wrong[folder] = str(error)
        except OSError as error:
            unread[folder] = error
    return sorted(found, key=lambda stored: stored.serial, reverse=True), wrong, unread


def committed(root: Path) -> list[Stored]:
    """Checkpoints whose manifests are sound, the newest first."""
    return _manifests(root)[0]


def latest_manifest(root: Path) -> Stored | None:
    """The newest checkpoint by its manifest alone."""
    return next(iter(committed(root)), None)


def holds_any(root: Path) -> bool:
    """Whether there is anything of a checkpoint, be it damaged: then a run must not start afresh."""
    return any(path.name.startswith(("step-", "damaged-", "last", "best")) for path in root.glob("*"))


def choose(root: Path) -> tuple[Stored | None, dict[Path, str]]:
    """The newest checkpoint of which every byte is as written, and what is wrong with the newer ones.

    Raises:
        UsageError: there is one of another version of the format, or one that cannot be read now would be chosen.
    """
    candidates, wrong, unread = _manifests(root)
    for stored in candidates:
        if max(unread, default=root) > stored.folder:
            break
        try:
            stored.verify()
            return stored, wrong
        except OSError as error:
            raise UsageError(unreadable(stored.folder, error)) from None
        except Damaged as error:
            wrong[stored.folder] = str(error)
    if unread:
        raise UsageError(unreadable(max(unread), unread[max(unread)]))
    return None, wrong


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither chosen nor pruned; people may want to look at it."""
    kept = folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(2)}")
    os.replace(folder, kept)
    return kept
