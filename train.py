"""Train or fine-tune an image classifier: one command on one CPU, one GPU or many nodes.

python train.py --dataset digits --model cnn4
accelerate launch train.py --model swin_base --pretrained --lr 5e-5
"""

from __future__ import annotations

import shlex
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from cifar_dist import checkpoint
from cifar_dist.batches import ResidentBatches
from cifar_dist.checkpoint import Trained, TrainState
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import Config
from cifar_dist.cost import measure
from cifar_dist.data import TrainingData, load_training_data
from cifar_dist.data.augment import Preprocess
from cifar_dist.distributed import finish, on_main, seed_everything, seed_process, share_buffers, start
from cifar_dist.engine import Meter, Stepper, evaluate, train_step
from cifar_dist.errors import run_main
from cifar_dist.models import build_model, input_config, resolve_name
from cifar_dist.optim import make_optimizer
from cifar_dist.plan import Plan, Schedule, make_plan
from cifar_dist.run_folder import choose_run_dir, create_run_dir, run_lock
from cifar_dist.tracking import Silent, Tracker
from cifar_dist.wandb_run import wandb_mode


def main() -> None:
    """Read the command line, plan the run, and train."""
    command = parse_command_line()
    config = command.config
    resolve_name(config.model.model)  # wrong names and taken folders are refused before data is decoded
    accelerator = start(config.run.precision)
    run_dir = None if command.plan_only else on_main(accelerator, lambda: claim(config))
    data = load_training_data(config.data)
    seed_everything(config.run.seed)
    resuming = run_dir is not None and checkpoint.exists(run_dir)
    fresh = replace(config.model, pretrained=False, init_weights=None)
    model = build_model(fresh if resuming else config.model, len(data.class_names))
    plan = make_plan(config, measure(config, data, model), accelerator.num_processes)
    accelerator.print(*plan.lines(), sep="\n", flush=True)
    if run_dir is not None:
        facts = {"data_fingerprint": data.fingerprint, "class_names": list(data.class_names)}
        lock = run_lock(run_dir)
        on_main(accelerator, lambda: create_run_dir(lock, config, plan, facts))
        train(config, plan, data, model, run_dir, accelerator)
        lock.release()
    finish(accelerator)


def claim(config: Config) -> Path:
    """The run's folder, once everything that can refuse a run at its start has agreed."""
    wandb_mode(config)
    return choose_run_dir(config)


def prepare(config: Config, model: torch.nn.Module, accelerator: Accelerator) -> Trained:
    """Put the model on its device, with its optimizer and, if asked for, its moving average."""
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model = model.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, config.optim)
    decay = config.optim.model_ema_decay
    ema = None if decay is None else ModelEmaV3(model, decay=decay)
    if config.model.compile:
        model.compile()
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return Trained(prepared, optimizer, ema)


def train(
    config: Config, plan: Plan, data: TrainingData, model: torch.nn.Module, run_dir: Path, accelerator: Accelerator
) -> None:
    """Train to the plan's last step; evaluate and checkpoint at the end of every epoch."""
    run, device = config.run, accelerator.device
    inputs = input_config(model, config.model)
    trained = prepare(config, model, accelerator)
    resuming = on_main(accelerator, lambda: checkpoint.exists(run_dir))
    state = checkpoint.read_state(run_dir, "last") if resuming else TrainState()
    seed_process(accelerator, run.seed, state.step)
    if resuming:
        checkpoint.load(run_dir, accelerator, trained)

    accelerator.gradient_accumulation_steps = plan.grad_accum_steps
    batches = ResidentBatches(data.train.to(device), config, plan, inputs, accelerator)
    val = data.val.to(device) if data.val is not None else None
    preprocess = Preprocess(inputs, device, torch.float32)
    schedule = Schedule(trained.optimizer, config.optim, run.epochs, plan.steps_per_epoch)
    stepper = Stepper(accelerator, trained.model, trained.optimizer, config.augment.smoothing, config.optim.clip_grad)
    speaks = accelerator.is_main_process
    with closing(Tracker(run_dir, config, plan, state.step) if speaks else Silent()) as tracker:
        tracker.say(f"run folder  {run_dir}" + (f", continued at step {state.step}" if state.step else ""))
        meter = Meter(accelerator, plan.batch_size)
        began = time.perf_counter() - state.seconds

        while state.step < plan.total_steps and not state.out_of_patience(run.patience):
            lr = schedule.apply(state.step)
            trained.model.train()
            meter.add(train_step(stepper, batches(state.step)))
            if trained.ema is not None:
                trained.ema.update(accelerator.unwrap_model(trained.model))
            state.step += 1
            state.seconds = time.perf_counter() - began
            tracker.advance(state.step)

            epoch_ends, ends = state.step % plan.steps_per_epoch == 0, state.step == plan.total_steps
            if plan.logs_at(state.step, run.log_every):
                tracker.training(state.step, meter.read() | {"lr": lr, "seconds": state.seconds})
            best = val is None
            with meter.paused():
                if val is not None and (epoch_ends or ends):
                    judged = trained.model if trained.ema is None else trained.ema.module
                    share_buffers(accelerator, judged)
                    scores = evaluate(accelerator, judged, val, preprocess, plan.micro_batch_size)
                    # A run cut within an epoch is scored, but not judged: it must go on as if it had not been cut.
                    best = state.judge(scores, run.min_delta) if epoch_ends else state.best_step == 0
                    tracker.evaluation(state.step, scores, best)
                if epoch_ends or ends or state.step % (run.checkpoint_every or plan.total_steps) == 0:
                    checkpoint.save(run_dir, accelerator, trained, state, best)

        if state.best_step:
            tracker.say(f"best {config.data.select_on} acc {state.best_top1:.2%} at step {state.best_step}")
        tracker.say(f"report      python evaluate.py {shlex.quote(str(run_dir))}")


if __name__ == "__main__":
    run_main(main)
