"""What interruptions cost: a heartbeat says how far a run came, its checkpoint where it goes on."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cifar_dist.distributed import peers
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.run_log import read_log

_FILE = "progress.json"
_EVERY_SECONDS = 1.0


class Heartbeat:
    """Writes how far the run has come, at most once a second; not durably, since it only serves the accounts.

    Args:
        run_dir: the run's folder.
        writes: whether this process does; the others only know it for themselves.
    """

    def __init__(self, run_dir: Path, writes: bool):
        self._path, self._writes, self._last = run_dir / _FILE, writes, 0.0

    def beat(self, state: TrainState, last: bool = False) -> None:
        """Note where the run stands; `last` at the end, whenever the one before was."""
        peers.now_at(f"step {state.step}")
        now = time.monotonic()
        if self._writes and (last or now - self._last >= _EVERY_SECONDS):
            self._last = now
            aside = self._path.with_name(f".tmp-{_FILE}")
            aside.write_text(json.dumps({"step": state.step, "seconds": round(state.seconds, 3)}) + "\n")
            os.replace(aside, self._path)


def last_beat(run_dir: Path) -> tuple[int, float]:
    """Step and seconds of training at the last heartbeat; zeros where none can be read."""
    try:
        beat = json.loads((run_dir / _FILE).read_text())
        return int(beat["step"]), float(beat["seconds"])
    except (OSError, ValueError, TypeError, KeyError):  # none was written yet, or the machine lost power
        return 0, 0.0


def lost_work(run_dir: Path, state: TrainState) -> dict[str, float]:
    """What a run that goes on from `state` has to do again, as far as a heartbeat (one a second) or the log tells."""
    step, seconds = last_beat(run_dir)
    reached = [{"step": state.step, "seconds": state.seconds}, {"step": step, "seconds": seconds}]
    with suppress(OSError):
        reached += [{**reached[0], **record} for record in read_log(run_dir) if record is not None]
    return {
        "resumed_at_step": state.step,
        "steps_redone": max(one["step"] for one in reached) - state.step,
        "seconds_lost": round(max(one["seconds"] for one in reached) - state.seconds, 1),
    }
