"""What is settled before a training: its folder, data and model, and then how it is trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from cifar_dist.command_line import CommandLine
from cifar_dist.config import NO_AUGMENTATION, Config, InputConfig
from cifar_dist.data import TrainingData, load_training_data
from cifar_dist.distributed.group import check_agreement, device_bytes, engine_name, on_main, say
from cifar_dist.distributed.hardware import device_name
from cifar_dist.errors import UsageError
from cifar_dist.idle_flags import has_effect, idle_flags
from cifar_dist.models import build_model, head_parameter_names, input_config, resolve_name
from cifar_dist.models.cpu_layers import use_cpu_layers
from cifar_dist.models.factory import drops_paths
from cifar_dist.models.sync_bn import synchronise
from cifar_dist.optim import full_rate_share, has_momentum
from cifar_dist.parallel import check_engine
from cifar_dist.parallel.choice import engine_lines, zero_gain
from cifar_dist.plan import Plan, make_plan
from cifar_dist.recovery import checkpoint
from cifar_dist.run_folder import choose_run_dir, identity, recorded_data_mode
from cifar_dist.tracking.wandb_run import wandb_mode
from cifar_dist.training.features import Features, decide
from cifar_dist.training.micro_batch import fitting
from cifar_dist.training.precision import resolve_precision
from cifar_dist.training.preview import check_preview, write_preview
from cifar_dist.training.sizes import measure
from cifar_dist.training.whitening import whiten

HIGHEST_TO_FINE_TUNE = 3e-4  # the learning rate, by AdamW, of all weights of a transformer at once
MUCH_LARGER = 4  # a side, than images are kept


@dataclass(frozen=True)
class Setup:
    """All that a training needs to know before it begins.

    Attributes:
        config: the merged configuration; nothing in it is left to be found out.
        plan: what follows from it, the data and the processes.
        accelerator: of this process; its precision is the configuration's.
        data: the training data.
        model: not on its device yet.
        features: whether a frozen backbone's are computed once.
    """

    config: Config
    plan: Plan
    accelerator: Accelerator
    data: TrainingData
    model: nn.Module
    features: Features


def refuse_names(command: CommandLine) -> None:
    """Refuse names that there are not, before anything takes time.

    Raises:
        UsageError: there is no such model, or the preview cannot be written there.
    """
    resolve_name(command.config.model.model)
    if command.preview is not None:
        check_preview(command.preview)


def claim(command: CommandLine, accelerator: Accelerator) -> Path | None:
    """The run's folder, once everything that can refuse a run at its start has agreed; None if there is to be no run.

    Raises:
        UsageError: W&B or the folder can't be had, or other processes were given something else.
    """
    config = command.config
    check_agreement(accelerator, identity(config))

    def chosen() -> Path:
        wandb_mode(config)
        return choose_run_dir(config)

    return on_main(accelerator, chosen) if command.trains else None


def load_data(config: Config, run_dir: Path | None, accelerator: Accelerator) -> TrainingData:
    """The training data, the same on all processes, held as the run in `run_dir` holds them if it goes on."""
    mode = recorded_data_mode(run_dir) if run_dir is not None and config.run.resume == "auto" else None
    wanted = config.data
    if mode is not None:
        wanted = replace(wanted, data_mode=mode, data_size=wanted.pixels)
    data = load_training_data(wanted, device_bytes(accelerator))
    found = {"data set": data.fingerprint, "train/val split": data.split_digest, "data mode": data.mode}
    check_agreement(accelerator, found)
    return data


def make_model(config: Config, data: TrainingData, run_dir: Path | None, accelerator: Accelerator) -> nn.Module:
    """The model with the weights that a new run begins with; one that goes on will put back its own.

    Raises:
        UsageError: there is no such model, or a setting that it has no use for, or weights do not fit it.
    """
    set_seed(config.run.seed)  # alike on every process, so that all build the same weights
    resuming = run_dir is not None and checkpoint.exists(run_dir)
    fresh = replace(config.model, pretrained=False, init_weights=None)
    model = build_model(fresh if resuming else config.model, len(data.class_names))
    if config.model.sync_bn:
        model = synchronise(model, accelerator.device)
    if not resuming:
        if config.model.drop_path and not drops_paths(model):
            rate = f"--drop-path {config.model.drop_path}"
            raise UsageError(f"{rate}: no layer of {config.model.model} has a path around it; leave it out.")
        whiten(model, data, config.model, accelerator)
    return model


def settle(
    command: CommandLine, data: TrainingData, model: nn.Module, run_dir: Path | None, accelerator: Accelerator
) -> Setup:
    """Find out what was left open (precision, what fits into memory), make the plan, and say it.

    Raises:
        UsageError: settings, data, model and engine do not go together.
    """
    features = decide(command.config, data, model, accelerator)
    config, accelerator = resolve_precision(command.config, model, accelerator, run_dir)
    config = replace(config, data=replace(config.data, data_size=config.data.pixels))
    use_cpu_layers(model, accelerator.device, config.run.precision)
    sizes = measure(config, data, model)
    sizes = replace(sizes, data_bytes=sizes.data_bytes + features.nbytes)
    plan = make_plan(config, sizes, accelerator.num_processes, engine_name(accelerator))
    if config.run.auto_micro_batch and command.trains:
        micro = fitting(accelerator, model, input_config(model, config.model), plan, config)
        config = replace(config, run=replace(config.run, micro_batch_size=micro))
        plan = make_plan(config, sizes, accelerator.num_processes, engine_name(accelerator))
    check_engine(config, plan, model)
    first, *further = plan.lines()
    inputs = input_config(model, config.model)
    device = device_lines(config, accelerator.device, accelerator.num_processes)
    device += enlarging_lines(config, inputs, accelerator.device)
    lines = [first, *image_lines(config, inputs), *device, *further]
    lines += data.lines() + features.lines() + zero_gain(config, sizes, plan, device_bytes(accelerator))
    facts = {
        "has_momentum": has_momentum(config.optim),
        "num_processes": plan.num_processes,
        "resizes": inputs.img_size != config.data.pixels or config.augment.scale is not None,
        "streams": data.mode == "stream",
    }
    lines += idle_flags(command.given, config.flat() | facts) + layer_decay_lines(config, model)
    lines += fine_tuning_lines(config, model)
    say(accelerator, *lines, *(engine_lines(config, sizes) if command.plan_only else []))
    return Setup(config, plan, accelerator, data, model, features)


def device_lines(config: Config, device: torch.device, num_processes: int) -> list[str]:
    """What the first process computes on, and what to say of a GPU that is older than bf16, or one of several."""
    name, precision = device_name(device), config.run.precision
    lines = [f"device      {name}, {precision}"]
    if config.model.compile:
        off = [switch for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE") if os.environ.get(switch) == "1"]
        lines += [f"note        --compile does nothing: {switch} is 1" for switch in off]
    if device.type != "cuda":
        return lines
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        lines.append(f"note        {name} has no bf16 of its own, and emulates it; --precision fp16 may be faster")
    alike = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())].count(name)
    if num_processes == 1 and alike > 1 and config.run.batch_size % alike == 0:
        launcher = f"torchrun --standalone --nproc-per-node {alike}"
        lines.append(f"note        one of {alike} such GPUs: {launcher} train.py … takes all")
    return lines


def enlarging_lines(config: Config, inputs: InputConfig, device: torch.device) -> list[str]:
    """What to say where a CPU is to train on images that are made much larger than they are kept."""
    seen, kept = inputs.img_size, config.data.pixels
    if device.type != "cpu" or seen < MUCH_LARGER * kept:
        return []
    times = (seen / kept) ** 2
    return [f"note        {seen} px are {times:.0f} times the work of {kept} px; on a CPU try --img-size 64"]


def layer_decay_lines(config: Config, model: nn.Module) -> list[str]:
    """What to say where layer decay reaches less than half of the model."""
    decay = config.optim.layer_decay
    if decay in (None, 1.0) or config.model.freeze != "none":
        return []
    share = full_rate_share(model, set(head_parameter_names(model)), decay)
    few = f"{share:.0%} of the weights below the head, in which timm sees few layers, keep the full rate"
    return [f"note        --layer-decay {decay:g}: {few}"] * (share > 0.5)


def fine_tuning_lines(config: Config, model: nn.Module) -> list[str]:
    """What to say of a learning rate by which a transformer forgets what it was pretrained on."""
    optim, pretrained = config.optim, config.model.pretrained or config.model.init_weights
    whole = config.model.freeze == "none" and optim.layer_decay is None
    whole = whole and config.run.max_steps != 0
    if not (pretrained and whole and "adam" in optim.opt and optim.lr > HIGHEST_TO_FINE_TUNE):
        return []
    if not any("attn" in name for name, _ in model.named_modules()):
        return []
    return [f"note        --lr {optim.lr:g} is high for a pretrained transformer, with AdamW usually 1e-5 to 1e-4"]


def image_lines(config: Config, inputs: InputConfig) -> list[str]:
    """How images reach the model, as lines of the plan: their sizes, and every augmentation that is on."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (inputs.mean, inputs.std))
    resized = f", resized to {inputs.img_size} px ({inputs.interpolation})"
    size = f"{config.data.pixels} px{resized if inputs.img_size != config.data.pixels else ''}"
    chosen, settings = [], config.flat()
    for name, value in vars(config.augment).items():
        if value != getattr(NO_AUGMENTATION, name) and has_effect(name, settings):
            words = " ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else value
            chosen.append(f"{name.replace('_', ' ')} {words}")
    return [f"images      {size}, mean {mean}, std {std}", f"augment     {', '.join(chosen) or 'nothing'}"]


def show_augmentation(path: Path, setup: Setup) -> None:
    """Write a sheet of training images as the model will see them."""
    inputs = input_config(setup.model, setup.config.model)
    on_main(setup.accelerator, lambda: write_preview(path, setup.config, setup.plan, setup.data, inputs))
    say(setup.accelerator, f"preview     {path}")
