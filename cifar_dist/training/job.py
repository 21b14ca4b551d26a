"""A training that runs, and what happens in it besides its steps: the start, a refused step, an evaluation, the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from cifar_dist.distributed.control import StepFlags
from cifar_dist.distributed.group import first_failure, on_main, say, seed_process, shared_buffers
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.models.compilation import compile_model
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import wrap
from cifar_dist.recovery import checkpoint
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.lost_work import lost_work
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.stop_request import StopRequest, unheard_by_children
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.run_folder import ask_for_requeue, note_bad_step, note_resumption
from cifar_dist.training.batches import Batches
from cifar_dist.training.engine import Stopped
from cifar_dist.training.features import Feed
from cifar_dist.training.progress import Progress
from cifar_dist.training.setup import Setup


@dataclass(frozen=True)
class Job:
    """A training that is to run: what, in which folder, and who may ask it to stop."""

    setup: Setup
    run_dir: Path
    request: StopRequest
    timer: CheckpointTimer
    saver: Saver

    def flags(self) -> StepFlags:
        """What this process has to tell the others after a step."""
        return StepFlags(stop=bool(self.request.reason), save=self.timer.wants_save, writing=self.saver.writing)

    def save_at_once(self, trained: Trained, state: TrainState) -> None:
        """Commit a checkpoint before anything else."""
        self.saver.save(trained, state)
        self.saver.finish()


def prepare(setup: Setup) -> Trained:
    """Put the model on its device, with its optimizer and, if asked for, its moving average."""
    config, accelerator = setup.config, setup.accelerator
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model = setup.model.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
    decay = config.optim.model_ema_decay
    ema = None if decay is None else ModelEmaV3(model, decay=decay)
    if config.model.compile:
        with unheard_by_children():
            compile_model(model, config.model.compile_mode)
    return Trained(wrap(accelerator, model, make_optimizer(model, config.optim), config, setup.plan), ema)


def resume(job: Job, trained: Trained) -> TrainState:
    """Put back the newest sound checkpoint, if there is one, and say where the run stands and what it lost."""
    accelerator, run_dir = job.setup.accelerator, job.run_dir
    found = checkpoint.resume_point(accelerator, run_dir)
    seed_process(accelerator, job.setup.config.run.seed, 0 if found is None else found.step)
    state = TrainState() if found is None else checkpoint.load(found, trained)
    lost = on_main(accelerator, lambda: note_resumption(run_dir, lost_work(run_dir, state)))
    if found is not None or lost["steps_redone"]:
        again = f"; {lost['steps_redone']} steps, {lost['seconds_lost']} s, are to be done again"
        place = f"at step {state.step} of {job.setup.plan.total_steps}{again * bool(lost['steps_redone'])}"
        goes_on = state.goes_on(job.setup.plan, job.setup.config.run.patience)
        say(accelerator, f"resumed     {place}" if goes_on else f"finished    {place}: nothing is left to train")
    return state


def decline(job: Job, trained: Trained, state: TrainState, batches: Batches, flags: StepFlags) -> str:
    """What follows from a step that was refused: a word about one that is skipped or not made, or the end.

    Raises:
        Diverged: it was not finite, and may not be skipped; the last good state is saved.
        UsageError: there were no data for it; the last good state is saved.
    """
    if flags.lost:
        if not (reason := first_failure(job.setup.accelerator, batches.lost or "")):
            return "stopping    without a step whose data do not come"
        job.save_at_once(trained, state)
        raise UsageError(reason)
    lr = max(group["lr"] for group in trained.parallel.optimizer.param_groups)
    notice = on_main(
        job.setup.accelerator, lambda: note_bad_step(job.run_dir, state.step, lr, batches.sample_ids(state.step))
    )
    if job.setup.config.run.on_nan == "stop" or not state.may_skip:
        job.save_at_once(trained, state)
        skip = "" if job.setup.config.run.on_nan == "skip" else "go on with --on-nan skip, or "
        raise Diverged(f"{notice}; {skip}start anew with a lower --lr or with --clip-grad.")
    return f"skipped     {notice}"


def assess(job: Job, trained: Trained, state: TrainState, feed: Feed, progress: Progress) -> bool | None:
    """Evaluate after an epoch, or at the end; whether it is the best so far, or None if broken off to stop."""
    if feed.val is None:
        state.judged_step = state.step
        return True
    try:
        with shared_buffers(job.setup.accelerator, trained.judged):
            scores = feed.evaluator.scores(trained.judged, feed.val, stop=lambda: bool(job.request.reason))
    except Stopped:
        return None
    whole_epoch = state.step > 0 and state.step % job.setup.plan.steps_per_epoch == 0
    best = state.judge(scores, job.setup.config.run.min_delta, whole_epoch)
    progress.evaluated(state, scores, best)
    return best


def conclude(job: Job, state: TrainState, stopped: bool, progress: Progress) -> None:
    """Say how the training ended and, if it was asked to stop, leave word that it is to be started again."""
    if stopped:
        reason = first_failure(job.setup.accelerator, job.request.reason)
        on_main(job.setup.accelerator, lambda: ask_for_requeue(job.run_dir, reason))
        place = "" if job.setup.config.run.run_dir else f"--run-dir {shlex.quote(str(job.run_dir))} "
        again = f"the same command with {place}--resume auto goes on"
        progress.say(f"stopped     by {reason} after step {state.step}; {again}")
        return
    if state.best_step:
        progress.say(f"best {job.setup.config.data.select_on} acc {state.best_top1:.2%} at step {state.best_step}")
    progress.say(f"report      python evaluate.py {shlex.quote(str(job.run_dir))}")
