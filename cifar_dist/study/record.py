"""What a study leaves beside its runs' folders: which runs it has, and how those ended that failed.

``RUNS_DIR/study.json`` holds the runs as a `StudyRecord`; ``RUNS_DIR/NAME.failed`` one line on a run's last try.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cifar_dist.errors import UsageError

RECORD = "study.json"


@dataclass(frozen=True)
class StudyRecord:
    """A study when its runs were last compared.

    Attributes:
        name: the study's.
        runs: where each of its runs stood, by the name of the run's folder.
    """

    name: str
    runs: dict[str, str]


def save_record(runs_dir: Path, record: StudyRecord) -> None:
    """Leave a study's record beside its runs.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        (runs_dir / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"runs_dir {runs_dir} cannot be written ({error.strerror}); name another.") from None


def record_of(folders: Sequence[Path]) -> StudyRecord | None:
    """The record of the study that all these runs are of; None where there is no such study, or no whole record."""
    paths = [folder.resolve() for folder in folders]
    file = paths[0].parent / RECORD
    if any(path.parent != file.parent for path in paths) or not file.is_file():
        return None
    try:
        record = StudyRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None
    return record if all(path.name in record.runs for path in paths) else None


def _note(run: Path) -> Path:
    return run.with_name(f"{run.name}.failed")


def note_failure(run: Path, status: int, reason: str) -> None:
    """Leave word of how a run's last try ended, as slurm/job.sh does too; a full disk goes without."""
    with suppress(OSError):
        run.parent.mkdir(parents=True, exist_ok=True)
        _note(run).write_text(f"status {status}: {reason}".removesuffix(": ") + "\n", encoding="utf-8")


def forget_failure(run: Path) -> None:
    """Take that word away, before the run is tried again."""
    _note(run).unlink(missing_ok=True)


def failure_of(run: Path) -> str:
    """How a run's last try failed, ``status 2: …``; nothing where it did not."""
    try:
        return _note(run).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
