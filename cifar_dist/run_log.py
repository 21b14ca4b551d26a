"""``log.jsonl``, the record of a training: one JSON object a line, each with the optimizer ``step`` it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def read_log(run_dir: Path) -> Iterator[dict[str, Any] | None]:
    """A run's records, a line each; None for a line that is none, such as one torn by a kill or a power cut."""
    for line in (run_dir / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
