"""Train or fine-tune an image classifier: one command on one CPU, one GPU or many nodes.

python train.py --dataset digits --model cnn4
accelerate launch train.py --model swin_base --pretrained --lr 5e-5
"""

from __future__ import annotations

from cifar_dist.command_line import CommandLine, parse_command_line
from cifar_dist.distributed.ending import run_main
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.recovery import stop_request

if __name__ == "__main__":
    stop_request.listen()  # before the seconds of importing, in which a signal may come too
    command = run_main(parse_command_line)  # --help and wrong flags are answered at once

import shlex
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from cifar_dist.config import Config
from cifar_dist.cost.sizes import measure
from cifar_dist.data import TrainingData, load_training_data
from cifar_dist.distributed.control import Verdict, Wish
from cifar_dist.distributed.group import (
    check_agreement,
    device_bytes,
    engine_name,
    finish,
    first_failure,
    on_main,
    peak_memory_bytes,
    say,
    seed_everything,
    seed_process,
    shared_buffers,
    start,
)
from cifar_dist.models import build_model, input_config, resolve_name
from cifar_dist.models.attention import use_plain_attention
from cifar_dist.models.compilation import compile_model
from cifar_dist.models.sync_bn import synchronise
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import check_engine, wrap
from cifar_dist.parallel.choice import engine_table, zero_gain
from cifar_dist.plan import Plan, Schedule, make_plan
from cifar_dist.recovery import checkpoint
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.lost_work import Heartbeat, lost_work
from cifar_dist.recovery.pace import Pace
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.stop_request import StopRequest
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.run_folder import (
    ask_for_requeue,
    choose_run_dir,
    create_run_dir,
    identity,
    note_bad_step,
    note_resumption,
    recorded_data_mode,
    run_lock,
)
from cifar_dist.tracking.tracker import Silent, Tracker
from cifar_dist.tracking.wandb_run import wandb_mode
from cifar_dist.training.batches import Batches
from cifar_dist.training.engine import Meter, Stepper, Stopped, train_step
from cifar_dist.training.features import Features, Feed, decide, make_feed
from cifar_dist.training.micro_batch import fitting
from cifar_dist.training.precision import resolve_precision
from cifar_dist.training.preview import check_preview, write_preview
from cifar_dist.training.whitening import whiten


def main(command: CommandLine | None = None) -> None:
    """Plan the run that `command`, or this program's command line, asks for, and train."""
    command = command or parse_command_line()
    config = command.config
    resolve_name(config.model.model)  # wrong names and taken folders are refused before data is decoded
    if command.preview is not None:
        check_preview(command.preview)
    accelerator = start(config.run.precision, config.run.ddp_timeout)
    check_agreement(accelerator, identity(config))
    run_dir = on_main(accelerator, lambda: claim(config)) if command.trains else None
    mode = recorded_data_mode(run_dir) if run_dir is not None and config.run.resume == "auto" else None
    data = load_training_data(replace(config.data, data_mode=mode or config.data.data_mode), device_bytes(accelerator))
    found = {"data set": data.fingerprint, "train/val split": data.split_digest, "data mode": data.mode}
    check_agreement(accelerator, found)
    seed_everything(config.run.seed)
    resuming = run_dir is not None and checkpoint.exists(run_dir)
    fresh = replace(config.model, pretrained=False, init_weights=None)
    model = build_model(fresh if resuming else config.model, len(data.class_names))
    if config.model.sync_bn:
        model = synchronise(model, accelerator.device)
    if not resuming:
        whiten(model, data, config.model, accelerator)
    features = decide(config, data, model, accelerator)
    config, accelerator = resolve_precision(config, model, accelerator, run_dir)
    use_plain_attention(model, accelerator.device, config.run.precision)
    sizes = measure(config, data, model)
    sizes = replace(sizes, data_bytes=sizes.data_bytes + features.nbytes)
    plan = make_plan(config, sizes, accelerator.num_processes, engine_name(accelerator))
    inputs = input_config(model, config.model)
    if config.run.auto_micro_batch and command.trains:
        micro = fitting(accelerator, model, inputs, plan, config.run.precision)
        config = replace(config, run=replace(config.run, micro_batch_size=micro))
        plan = make_plan(config, sizes, accelerator.num_processes, engine_name(accelerator))
    check_engine(config, plan, model)
    lines = plan.lines() + features.lines() + zero_gain(config, sizes, plan, device_bytes(accelerator))
    say(accelerator, *lines, *(engine_table(config, sizes) if command.plan_only else []))
    if (preview := command.preview) is not None:
        on_main(accelerator, lambda: write_preview(preview, config, plan, data, inputs))
        say(accelerator, f"preview     {preview}")
    if run_dir is not None:
        lock = run_lock(run_dir)
        on_main(accelerator, lambda: create_run_dir(lock, config, plan, data.facts))
        pace = Pace(config.run)
        saver = Saver(run_dir, accelerator, pace, config.run.keep_last)
        with StopRequest(pace.time_is_up) as request:
            train(Job(config, plan, accelerator, run_dir, request, pace, saver), data, model, features)
        lock.release()
    finish(accelerator)


@dataclass(frozen=True)
class Job:
    """A training that is to run: what, on which processes, in which folder, and who may ask it to stop."""

    config: Config
    plan: Plan
    accelerator: Accelerator
    run_dir: Path
    request: StopRequest
    pace: Pace
    saver: Saver

    def wish(self) -> Wish:
        """What this process would have all do after a step."""
        return Wish(stop=bool(self.request.reason), save=self.pace.wants_save, writing=self.saver.writing)

    def save_at_once(self, trained: Trained, state: TrainState) -> None:
        """Commit a checkpoint before anything else."""
        self.saver.save(trained, state)
        self.saver.finish()


def claim(config: Config) -> Path:
    """The run's folder, once everything that can refuse a run at its start has agreed."""
    wandb_mode(config)
    return choose_run_dir(config)


def prepare(config: Config, plan: Plan, model: torch.nn.Module, accelerator: Accelerator) -> Trained:
    """Put the model on its device, with its optimizer and, if asked for, its moving average."""
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model = model.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
    decay = config.optim.model_ema_decay
    ema = None if decay is None else ModelEmaV3(model, decay=decay)
    if config.model.compile:
        compile_model(model, config.model.compile_mode)
    return Trained(wrap(accelerator, model, make_optimizer(model, config.optim), config, plan), ema)


def decline(job: Job, trained: Trained, state: TrainState, batches: Batches, verdict: Verdict) -> str:
    """What follows from a step that was refused: a word about a skipped one, or the end.

    Raises:
        Diverged: it was not finite, and may not be skipped; the last good state is saved.
        UsageError: there were no data for it; the last good state is saved.
    """
    if verdict.lost:
        job.save_at_once(trained, state)
        raise UsageError(first_failure(job.accelerator, batches.lost or ""))
    lr = max(group["lr"] for group in trained.parallel.optimizer.param_groups)
    notice = on_main(
        job.accelerator, lambda: note_bad_step(job.run_dir, state.step, lr, batches.sample_ids(state.step))
    )
    if job.config.run.on_nan == "stop" or not state.may_skip:
        job.save_at_once(trained, state)
        skip = "" if job.config.run.on_nan == "skip" else "go on with --on-nan skip, or "
        raise Diverged(f"{notice}; {skip}start anew with a lower --lr or with --clip-grad.")
    return f"skipped     {notice}"


def resume(job: Job, trained: Trained) -> TrainState:
    """Put back the newest sound checkpoint, if there is one, and say where the run stands and what it lost."""
    accelerator, run_dir = job.accelerator, job.run_dir
    found = checkpoint.resume_point(accelerator, run_dir)
    seed_process(accelerator, job.config.run.seed, 0 if found is None else found.step)
    if found is None:
        return TrainState()
    state = checkpoint.load(found, trained)
    lost = on_main(accelerator, lambda: note_resumption(run_dir, lost_work(run_dir, state)))
    say(accelerator, f"resumed     {lost['steps_redone']} steps, {lost['seconds_lost']} s, are to be done again")
    return state


def assess(job: Job, trained: Trained, state: TrainState, feed: Feed, tracker: Silent) -> bool | None:
    """Evaluate after an epoch, or at the end; whether it is the best so far, or None if broken off to stop."""
    if feed.val is None:
        state.judged_step = state.step
        return True
    try:
        with shared_buffers(job.accelerator, trained.judged):
            scores = feed.evaluator.scores(trained.judged, feed.val, stop=lambda: bool(job.request.reason))
    except Stopped:
        return None
    best = state.judge(scores, job.config.run.min_delta, whole_epoch=state.step % job.plan.steps_per_epoch == 0)
    tracker.evaluation(state.step, scores, best)
    return best


def facts(accelerator: Accelerator, state: TrainState, lr: float) -> dict[str, float]:
    """What a training record says besides the means."""
    found = {"lr": lr, "seconds": state.seconds, "peak_memory_bytes": peak_memory_bytes(accelerator)}
    return found | ({"skipped_steps": state.skipped_steps} if state.skipped_steps else {})


def train(job: Job, data: TrainingData, model: torch.nn.Module, features: Features) -> None:
    """Train to the plan's last step; evaluate and checkpoint at the end of every epoch."""
    config, plan, accelerator, pace = job.config, job.plan, job.accelerator, job.pace
    run = config.run
    trained = prepare(config, plan, model, accelerator)
    state = resume(job, trained)

    keeps = features.kept and state.goes_on(plan, run.patience)
    feed = make_feed(data, config, plan, trained, keeps, stop=lambda: bool(job.request.reason))
    batches = feed.batches
    schedule = Schedule(trained.parallel.optimizer, config.optim, run.epochs, plan.steps_per_epoch)
    stepper = Stepper(trained.parallel, config.augment.smoothing)
    speaker = Tracker(job.run_dir, config, plan, state.step) if accelerator.is_main_process else Silent()
    with closing(batches), closing(speaker) as tracker, job.saver:
        tracker.say(f"run folder  {job.run_dir}" + (f", continued at step {state.step}" if state.step else ""))
        meter = Meter(accelerator, plan.num_train / plan.steps_per_epoch)
        heartbeat = Heartbeat(job.run_dir, writes=accelerator.is_main_process)
        began = time.perf_counter() - state.seconds - feed.seconds

        stopped = False
        while not stopped and state.goes_on(plan, run.patience):
            saves, best, written = False, False, True
            if not state.owes_evaluation(plan):  # a run that was stopped within one begins with it
                lr = schedule.apply(state.step)
                trained.parallel.model.train()
                with pace.step():
                    share, verdict = train_step(stepper, batches(state.step), job.wish)
                if verdict.bad:
                    tracker.say(decline(job, trained, state, batches, verdict))
                else:
                    meter.add(share)
                    trained.average()
                state.advance(verdict.bad, time.perf_counter() - began)
                stopped, saves = verdict.stop, verdict.save or pace.saves_at(state.step)
                written = not verdict.writing
                tracker.advance(state.step)
                heartbeat.beat(state)
                if plan.logs_at(state.step, run.log_every) and meter.steps:
                    tracker.training(state.step, meter.read(batches.take_waits()) | facts(accelerator, state, lr))
            with meter.paused():
                evaluates = not stopped and state.owes_evaluation(plan)
                if written or evaluates:  # an evaluation may take long, and end the run
                    job.saver.finish()
                if evaluates:
                    judgement = assess(job, trained, state, feed, tracker)
                    saves, best, stopped = True, judgement is True, judgement is None
                if saves or stopped:
                    tracker.sync()
                    job.saver.save(trained, state, best)

        job.saver.finish()
        if stopped:
            reason = first_failure(accelerator, job.request.reason)
            on_main(accelerator, lambda: ask_for_requeue(job.run_dir, reason))
            tracker.say(f"stopped     by {reason} after step {state.step}; the same command with --resume auto goes on")
            return
        if state.best_step:
            tracker.say(f"best {config.data.select_on} acc {state.best_top1:.2%} at step {state.best_step}")
        tracker.say(f"report      python evaluate.py {shlex.quote(str(job.run_dir))}")


if __name__ == "__main__":
    run_main(lambda: main(command))
    stop_request.ignore()
