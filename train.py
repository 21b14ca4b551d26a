"""Train or fine-tune an image classifier: one command on one CPU, one GPU or many nodes.

python train.py --dataset digits --model cnn4
accelerate launch train.py --model swin_base --pretrained --lr 5e-5
"""

from __future__ import annotations

import shlex
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from cifar_dist import checkpoint
from cifar_dist.batches import Batches
from cifar_dist.checkpoint import Trained
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import Config
from cifar_dist.control import StopRequest, Verdict
from cifar_dist.cost import measure
from cifar_dist.data import TrainingData, load_training_data
from cifar_dist.data.augment import Preprocess
from cifar_dist.distributed import (
    check_agreement,
    device_bytes,
    engine_name,
    finish,
    first_failure,
    on_main,
    peak_memory_bytes,
    seed_everything,
    seed_process,
    shared_buffers,
    start,
)
from cifar_dist.engine import Meter, Stepper, evaluate, train_step
from cifar_dist.engine_choice import engine_table, zero_gain
from cifar_dist.errors import Diverged, UsageError, run_main
from cifar_dist.models import build_model, input_config, resolve_name
from cifar_dist.models.sync_bn import synchronise
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import wrap
from cifar_dist.plan import Plan, Schedule, make_plan
from cifar_dist.preview import check_preview, write_preview
from cifar_dist.run_folder import choose_run_dir, create_run_dir, identity, note_bad_step, run_lock
from cifar_dist.stream_batches import make_batches
from cifar_dist.tracking import Silent, Tracker
from cifar_dist.train_state import TrainState
from cifar_dist.wandb_run import wandb_mode


def main() -> None:
    """Read the command line, plan the run, and train."""
    command = parse_command_line()
    config = command.config
    resolve_name(config.model.model)  # wrong names and taken folders are refused before data is decoded
    if command.preview is not None:
        check_preview(command.preview)
    accelerator = start(config.run.precision, config.run.ddp_timeout)
    check_agreement(accelerator, identity(config))
    run_dir = on_main(accelerator, lambda: claim(config)) if command.trains else None
    data = load_training_data(config.data, device_bytes(accelerator))
    facts = {"data set": data.fingerprint, "train/val split": data.split_digest, "data mode": data.mode}
    check_agreement(accelerator, facts)
    seed_everything(config.run.seed)
    resuming = run_dir is not None and checkpoint.exists(run_dir)
    fresh = replace(config.model, pretrained=False, init_weights=None)
    model = build_model(fresh if resuming else config.model, len(data.class_names))
    if config.model.sync_bn:
        model = synchronise(model, accelerator.device)
    sizes = measure(config, data, model)
    plan = make_plan(config, sizes, accelerator.num_processes, engine_name(accelerator))
    lines = plan.lines() + zero_gain(config, sizes, plan, device_bytes(accelerator))
    accelerator.print(*lines, *(engine_table(config, sizes) if command.plan_only else []), sep="\n", flush=True)
    if (preview := command.preview) is not None:
        on_main(accelerator, lambda: write_preview(preview, config, plan, data, input_config(model, config.model)))
        accelerator.print(f"preview     {preview}")
    if run_dir is not None:
        belongs = {"data_fingerprint": data.fingerprint, "class_names": list(data.class_names), "data_mode": data.mode}
        lock = run_lock(run_dir)
        on_main(accelerator, lambda: create_run_dir(lock, config, plan, belongs))
        with StopRequest() as request:
            train(Job(config, plan, accelerator, run_dir, request), data, model)
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
        model.compile()
    return Trained(wrap(accelerator, model, make_optimizer(model, config.optim), config, plan), ema)


def decline(job: Job, trained: Trained, state: TrainState, batches: Batches, verdict: Verdict) -> str:
    """What follows from a step that was refused: a word about a skipped one, or the end.

    Raises:
        Diverged: it was not finite, and may not be skipped; the last good state is saved.
        UsageError: there were no data for it; the last good state is saved.
    """
    if verdict.lost:
        checkpoint.save(job.run_dir, trained, state, best=False)
        raise UsageError(first_failure(job.accelerator, batches.lost or ""))
    lr = max(group["lr"] for group in trained.parallel.optimizer.param_groups)
    notice = on_main(
        job.accelerator, lambda: note_bad_step(job.run_dir, state.step, lr, batches.sample_ids(state.step))
    )
    if job.config.run.on_nan == "stop" or not state.may_skip:
        checkpoint.save(job.run_dir, trained, state, best=False)
        raise Diverged(f"{notice}; lower --lr, set --clip-grad, or --on-nan skip.")
    return f"skipped     {notice}"


def train(job: Job, data: TrainingData, model: torch.nn.Module) -> None:
    """Train to the plan's last step; evaluate and checkpoint at the end of every epoch."""
    config, plan, accelerator, run_dir = job.config, job.plan, job.accelerator, job.run_dir
    run = config.run
    inputs = input_config(model, config.model)
    trained = prepare(config, plan, model, accelerator)
    resuming = on_main(accelerator, lambda: checkpoint.exists(run_dir))
    state = checkpoint.read_state(run_dir, "last") if resuming else TrainState()
    seed_process(accelerator, run.seed, state.step)
    if resuming:
        checkpoint.load(run_dir, trained)

    batches = make_batches(data.train, config, plan, inputs, trained.parallel)
    val = None if data.val is None else data.val.to(accelerator.device)
    preprocess = Preprocess(inputs, accelerator.device, trained.parallel.input_dtype)
    schedule = Schedule(trained.parallel.optimizer, config.optim, run.epochs, plan.steps_per_epoch)
    stepper = Stepper(trained.parallel, config.augment.smoothing)
    speaker = Tracker(run_dir, config, plan, state.step) if accelerator.is_main_process else Silent()
    with closing(batches), closing(speaker) as tracker:
        tracker.say(f"run folder  {run_dir}" + (f", continued at step {state.step}" if state.step else ""))
        meter = Meter(accelerator, plan.batch_size)
        began = time.perf_counter() - state.seconds

        stopped = False
        while state.step < plan.total_steps and not stopped and not state.out_of_patience(run.patience):
            lr = schedule.apply(state.step)
            trained.parallel.model.train()
            share, verdict = train_step(stepper, batches(state.step), stop=bool(job.request.signal))
            if verdict.bad:
                tracker.say(decline(job, trained, state, batches, verdict))
            else:
                meter.add(share)
                trained.average()
            state.advance(verdict.bad, time.perf_counter() - began)
            tracker.advance(state.step)

            epoch_ends, ends = state.step % plan.steps_per_epoch == 0, state.step == plan.total_steps
            stopped = verdict.stop and not ends
            if plan.logs_at(state.step, run.log_every) and meter.steps:
                facts = {"lr": lr, "seconds": state.seconds, "peak_memory_bytes": peak_memory_bytes(accelerator)}
                facts |= {"skipped_steps": state.skipped_steps} if state.skipped_steps else {}
                tracker.training(state.step, meter.read(batches.take_waits()) | facts)
            best = val is None
            with meter.paused():
                if val is not None and (epoch_ends or ends):
                    judged = trained.judged
                    with shared_buffers(accelerator, judged):
                        scores = evaluate(accelerator, judged, val, preprocess, plan.micro_batch_size, run.precision)
                    best = state.judge(scores, run.min_delta) if epoch_ends else state.glimpse(scores)
                    tracker.evaluation(state.step, scores, best)
                if epoch_ends or ends or stopped or state.step % (run.checkpoint_every or plan.total_steps) == 0:
                    checkpoint.save(run_dir, trained, state, best)

        if stopped:
            asked = job.request.signal or "another process"
            tracker.say(f"stopped     by {asked} after step {state.step}; the same command with --resume auto goes on")
            return
        if state.best_step:
            tracker.say(f"best {config.data.select_on} acc {state.best_top1:.2%} at step {state.best_step}")
        tracker.say(f"report      python evaluate.py {shlex.quote(str(run_dir))}")


if __name__ == "__main__":
    run_main(main)
