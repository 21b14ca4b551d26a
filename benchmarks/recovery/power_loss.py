"""What a power failure could take of a save, by a trace of its system calls."""

from __future__ import annotations

import os
import re


class Disk:
    """What a power failure could take, followed call by call of a trace."""

    def __init__(self, root: str):
        self.root, self.faults = root, list[str]()
        self._dirty, self._names = set[str](), dict[str, set[str]]()  # files; names by the folder they were made in

    def _name(self, path: str) -> None:
        self._names.setdefault(os.path.dirname(path), set()).add(os.path.basename(path))

    def _lost(self, folder: str) -> list[str]:
        inside = [path for path in self._dirty if path.startswith(f"{folder}/")]
        return inside + [f"{folder}/{name}" for name in self._names.get(folder, ())]

    def _uncommitted(self) -> list[str]:
        steps = [name for name in self._names.get(f"{self.root}/checkpoints", ()) if name.startswith("step-")]
        return steps + [name for name in self._names.get(self.root, ()) if name == "checkpoints"]

    def take(self, line: str) -> None:
        """Follow one line of ``strace -f -y``."""
        match = re.match(r"\d+ +(\w+)\((.*)\) += (\d+)(?:<([^>]*)>)?", line)
        if match is None:
            return
        call, arguments, _, opened = match.groups()
        paths = re.findall(r'"([^"]*)"', arguments)
        held = re.findall(r"\d+<([^>]*)>", arguments)
        if call == "openat" and "O_CREAT" in arguments:
            self._create(opened)
        elif call in ("write", "pwrite64", "writev", "ftruncate"):
            self._dirty |= set(held[:1])
        elif call == "mmap" and "MAP_SHARED" in arguments and "PROT_WRITE" in arguments:
            self._dirty |= set(held)
        elif call in ("fsync", "fdatasync"):
            self._dirty.discard(held[0])
            self._names.pop(held[0], None)
        elif call == "mkdir":
            self._name(paths[0])
        elif call.startswith("rename"):
            self._rename(*paths[-2:])
        elif call in ("unlink", "unlinkat", "rmdir") and (lost := self._uncommitted()):
            self.faults.append(f"something older was removed before {lost} were durable")

    def _create(self, path: str) -> None:
        self._name(path)
        lost = [other for other in self._dirty if os.path.dirname(other) == os.path.dirname(path)]
        if os.path.basename(path) == "manifest.json" and lost:
            self.faults.append(f"the manifest was begun before {lost} were durable")
        if path.startswith(f"{self.root}/returned-") and (lost := self._uncommitted()):
            self.faults.append(f"a save returned before the names {lost} were durable")
        self._dirty.add(path)

    def _rename(self, old: str, new: str) -> None:
        if os.path.basename(old).startswith("step-") and (lost := self._uncommitted()):
            self.faults.append(f"something older was taken away before {lost} were durable")
        if os.path.basename(new).startswith("step-") and (lost := self._lost(old)):
            self.faults.append(f"{os.path.basename(new)} got its name before {lost} were durable")
        for path in [path for path in self._dirty if path == old or path.startswith(f"{old}/")]:
            self._dirty.remove(path)
            self._dirty.add(new + path.removeprefix(old))
        self._names[new] = self._names.pop(old, set())
        self._names.get(os.path.dirname(old), set()).discard(os.path.basename(old))
        self._name(new)


def whole_lines(trace: list[str]) -> list[str]:
    """Calls of several threads, which strace begins and ends in lines of their own, as one line each: at their end."""
    begun, found = dict[str, str](), []
    for line in trace:
        thread = line.split()[0]
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif match := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line):
            found.append(begun.pop(thread, "") + match[1])
        else:
            found.append(line)
    return found


def faults_in(trace: list[str], root: str) -> list[str]:
    """What a power failure could have spoilt in the course of a trace."""
    disk = Disk(root)
    for line in trace:
        disk.take(line)
    return [*dict.fromkeys(disk.faults)]
