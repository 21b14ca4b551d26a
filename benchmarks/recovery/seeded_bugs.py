"""R14: thirty bugs, planted one at a time in a copy of the source; each must make the test named beside it fail.

    python -m benchmarks.recovery.seeded_bugs [--only NAME …] [--json FILE]

A bug is a piece of the source and what takes its place (seeded_bugs.yaml). First every named test must pass on the
untouched copy; then each bug is planted, its test run, and the source put back. A bug that no test notices, or whose
place is no longer there, is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bug:
    """`old` in `file` becomes `new`, and `test` must notice."""

    name: str
    file: str
    old: str
    new: str
    test: str


BUGS = [Bug(**bug) for bug in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())]


def passes(copy: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass in the copy, and the name of the first that did not."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-p", "no:unraisableexception", *tests]  # it may raise after a failure, in place of a summary
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=900)
    failed = [line.split(" - ")[0].removeprefix("FAILED ") for line in done.stdout.splitlines() if "FAILED" in line]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not failed):
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-1000:])
    return done.returncode == 0, failed[0] if failed else ""


def plant(copy: Path, bug: Bug) -> bool:
    """Whether its test notices the bug: plant it, run the test, put the source back."""
    path = copy / bug.file
    source = path.read_text()
    if source.count(bug.old) != 1:
        print(f"{bug.name}: its place is there {source.count(bug.old)} times in {bug.file}")
        return False
    path.write_text(source.replace(bug.old, bug.new))
    began = time.monotonic()
    try:
        passed, by = passes(copy, [bug.test])
    finally:
        path.write_text(source)
    print(f"{bug.name:45}  {'MISSED' if passed else by}  ({time.monotonic() - began:.0f} s)", flush=True)
    return not passed


def main() -> None:
    """Plant all bugs, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[bug.name for bug in BUGS], default=[bug.name for bug in BUGS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    chosen = [bug for bug in BUGS if bug.name in options.only]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "wandb", "__pycache__"))
        passed, by = passes(copy, sorted({bug.test for bug in chosen}))
        if not passed:
            sys.exit(f"without any bug, {by} fails")
        noticed = {bug.name: plant(copy, bug) for bug in chosen}
    print(f"{sum(noticed.values())} of {len(noticed)} noticed")
    if options.json:
        options.json.write_text(json.dumps({"noticed": noticed}, indent=1) + "\n")
    sys.exit(0 if all(noticed.values()) else 1)


if __name__ == "__main__":
    main()
