"""How far a training is: its clock, its means, its heartbeat, and what is told of them."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from cifar_dist.distributed.group import peak_memory_bytes
from cifar_dist.recovery.lost_work import Heartbeat
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.tracking.tracker import Silent, Tracker
from cifar_dist.training.engine import Meter
from cifar_dist.training.features import Feed
from cifar_dist.training.setup import Setup


class Progress(AbstractContextManager["Progress"]):
    """Counts a training's steps and tells of them, on the main process; as a context it closes the log at its end.

    Args:
        run_dir: the run's folder.
        setup: what is trained.
        feed: its batches are asked how long steps waited for them.
        state: where the run begins, or goes on.
    """

    def __init__(self, run_dir: Path, setup: Setup, feed: Feed, state: TrainState):
        self._setup, self._batches, self._state = setup, feed.batches, state
        accelerator, plan = setup.accelerator, setup.plan
        speaks = accelerator.is_main_process
        self._meter = Meter(accelerator, plan.num_train / plan.steps_per_epoch)
        self._heartbeat = Heartbeat(run_dir, writes=speaks)
        self._began = time.perf_counter() - state.seconds - feed.seconds
        self._tracker = Tracker(run_dir, setup.config, plan, state.step, state.judged_step) if speaks else Silent()
        self.say(f"run folder  {run_dir}" + (f", continued at step {state.step}" if state.step else ""))

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self._heartbeat.beat(self._state, last=True)
        except OSError:
            if error is None:  # else it is not to cover what ended the training
                raise
        finally:
            self._tracker.close()

    def say(self, text: str) -> None:
        """Print a line for people."""
        self._tracker.say(text)

    def paused(self) -> AbstractContextManager[None]:
        """Speed is not measured meanwhile, as in an evaluation."""
        return self._meter.paused()

    def stepped(self, state: TrainState, share: torch.Tensor | None, lr: float) -> None:
        """Count a step, and tell of the last ones when that is due.

        Args:
            state: moves on by the step.
            share: of loss and top-1, as `train_step` returns it; None if the step was refused.
            lr: learning rate of the step.
        """
        state.advance(share is None, time.perf_counter() - self._began)
        if share is not None:
            self._meter.add(share)
        self._tracker.advance(state.step)
        self._heartbeat.beat(state)
        if self._meter.steps and self._setup.plan.logs_at(state.step, self._setup.config.run.log_every):
            memory = peak_memory_bytes(self._setup.accelerator)
            record = {"lr": lr, "seconds": state.seconds, "peak_memory_bytes": memory}
            if state.skipped_steps:
                record["skipped_steps"] = state.skipped_steps
            self._tracker.training(state.step, self._meter.read(self._batches.take_waits()) | record)

    def evaluated(self, state: TrainState, scores: dict[str, float], best: bool) -> None:
        """Tell of an evaluation."""
        self._tracker.evaluation(state.step, scores, best)

    def sync(self) -> None:
        """Make the log durable, so that it knows all steps of a checkpoint that is."""
        self._tracker.sync()
