"""Where numbers go: console, ``log.jsonl`` and Weights & Biases, behind one `Tracker`.

Only the job's main process opens a `Tracker`; the others hold a `Silent` one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from cifar_dist.config import Config
from cifar_dist.durable import replace_text
from cifar_dist.plan import Plan
from cifar_dist.run_log import LOG, read_log
from cifar_dist.tracking.wandb_run import Mirror


class Silent:
    """A tracker for the processes that do not speak."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def advance(self, step: int) -> None:
        """Show nothing."""

    def training(self, step: int, values: dict[str, float]) -> None:
        """Record nothing."""

    def evaluation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Record nothing."""

    def sync(self) -> None:
        """Make nothing durable."""

    def close(self) -> None:
        """Close nothing."""


class Tracker(Silent):
    """The main process's voice.

    Args:
        run_dir: the run's folder; `log.jsonl` and W&B's files live in it.
        config: the merged configuration, shown in W&B.
        plan: its steps scale the progress bar and turn steps into epochs.
        first_step: records after this step are dropped from `log.jsonl`, since they will come again.
        judged_step: so are evaluations after this one, which may be earlier.
    """

    def __init__(self, run_dir: Path, config: Config, plan: Plan, first_step: int, judged_step: int):
        _forget_after(run_dir, first_step, judged_step)
        self._file: TextIO = (run_dir / LOG).open("a", encoding="utf-8")
        self._plan, self._selected_on = plan, config.data.select_on
        self._bar = None
        if sys.stderr.isatty():
            columns, rows = shutil.get_terminal_size()  # tqdm draws nothing where a terminal says it has none
            self._bar = tqdm(total=plan.total_steps, initial=first_step, unit="step", ncols=columns, nrows=rows)
        self._mirror = Mirror(run_dir, config)
        self._began, self._first_step = time.perf_counter(), first_step

    def say(self, text: str) -> None:
        """Print a line for people, above the progress bar if there is one."""
        with _whoever_reads():
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move a terminal's progress bar to `step`; it redraws itself a few times a second at most."""
        if self._bar is not None:
            with _whoever_reads():
                self._bar.update(step - self._bar.n)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Record training means at `step` and show where the run is: on a terminal's bar, else as a line."""
        self._log(step, values)
        shown = {
            "loss": f"{values['train/loss']:.4f}",
            "acc": f"{values['train/top1']:.2%}",
            "lr": f"{values['lr']:.3g}",
            "images/s": f"{values['images_per_second']:,.0f}",
        }
        if self._bar is not None:
            with _whoever_reads():
                self._bar.set_postfix(shown)
            return
        steps_left = self._plan.total_steps - step
        seconds_left = (time.perf_counter() - self._began) / (step - self._first_step) * steps_left
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        epoch = self._plan.epoch_of(step)
        self.say(f"epoch {epoch:6.2f}  step {step}/{self._plan.total_steps}  {numbers}  left {_clock(seconds_left)}")

    def evaluation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Record the scores of the split that selects the best checkpoint, saying so if it is test."""
        record = {f"val/{name}": value for name, value in scores.items()}
        on_test = self._selected_on == "test"
        self._log(step, record | ({"selected_on": "test"} if on_test else {}))
        name = "TEST (selecting on it)" if on_test else "val"
        epoch = self._plan.epoch_of(step)
        mark = "  best so far" if best and step else ""
        self.say(f"epoch {epoch:6.2f}  {name} loss {scores['loss']:.4f}  {name} acc {scores['top1']:.2%}{mark}")

    def _log(self, step: int, values: dict[str, Any]) -> None:
        """Write a record where it counts, or raise, and give W&B a copy."""
        record = {"epoch": self._plan.epoch_of(step), **values}
        try:
            self._file.write(json.dumps({"step": step, **record}) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk, above all
            error.filename = error.filename or self._file.name
            raise
        self._mirror.log(record, step)

    def sync(self) -> None:
        """Make the log durable, so that it knows all steps of a checkpoint that is."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush everything and finish the W&B run."""
        try:
            if line := self._mirror.close():
                self.say(line)
        finally:
            with _whoever_reads():
                if self._bar is not None:
                    self._bar.close()
            self._file.close()


@contextmanager
def _whoever_reads() -> Iterator[None]:
    """Go on where the terminal was closed, or what read the output has gone: it may have died of the same Ctrl-C."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else it would fail again when the program ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _forget_after(run_dir: Path, step: int, judged: int) -> None:
    """Drop training's records later than `step`, evaluations later than `judged`, and torn lines.

    A resumed run writes them again.
    """
    if not (run_dir / LOG).exists():
        return
    records = [record for record in read_log(run_dir) if record is not None]
    kept = [record for record in records if record["step"] <= (judged if "val/loss" in record else step)]
    replace_text(run_dir / LOG, "".join(json.dumps(record) + "\n" for record in kept))
