"""Numbers that follow from the configuration, the data and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cifar_dist.config import Config, OptimConfig, RunConfig
from cifar_dist.contradictions import refuse_contradictions
from cifar_dist.errors import UsageError
from cifar_dist.memory import Load, Usage, checkpoint_bytes, usage
from cifar_dist.ordering import steps_per_epoch
from cifar_dist.schedule import schedule_without_model

FEW_STEPS = 60  # in a whole schedule


@dataclass(frozen=True)
class Sizes:
    """What the plan needs to know of the data and the model; counts, and bytes for `data_bytes`."""

    num_train: int
    num_val: int
    num_test: int | None
    num_classes: int
    data_bytes: int
    num_parameters: int
    num_trainable: int
    state_per_parameter: int
    has_batch_norm: bool = False


@dataclass(frozen=True)
class Plan:
    """Every derived number of a run; printed at the start and saved with it."""

    num_train: int
    num_val: int
    num_test: int | None
    num_classes: int
    has_batch_norm: bool
    select_on: str
    engine: str
    num_processes: int
    batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    steps_per_epoch: int
    schedule_steps: int
    total_steps: int
    warmup_steps: int
    lr_first: float
    lr_after_warmup: float
    lr_last: float
    num_parameters: int
    num_trainable: int
    state_per_parameter: int
    data_bytes: int
    checkpoint_bytes: int
    memory: Usage
    notes: tuple[str, ...]

    def epoch_of(self, step: int) -> float:
        """Epochs completed after `step` optimizer steps."""
        return step / self.steps_per_epoch

    def logs_at(self, step: int, every: int) -> bool:
        """Whether training means are recorded after `step`: every so many steps, and at the end of every epoch.

        A record shortly before that is left to it, which would be the mean of a few steps otherwise.
        """
        left = min(self.total_steps - step, -step % self.steps_per_epoch)
        return left == 0 or (step % every == 0 and 2 * left >= every)

    def lines(self) -> list[str]:
        """The plan for people, a fact a line."""
        test = "" if self.num_test is None else f", test {self.num_test:,}"
        if self.select_on == "test":
            test += " (val IS test: the best epoch is picked on it)"
        return [
            f"data        train {self.num_train:,}, val {self.num_val:,}{test}; {self.num_classes} classes",
            f"model       {self.num_parameters:,} parameters, {self.num_trainable:,} trained",
            f"batch       {self.batch_size} = {self.num_processes} process(es) x {self.micro_batch_size} images"
            f" x {self.grad_accum_steps} accumulation step(s)",
            f"steps       {self.total_steps:,} of {self.schedule_steps:,} scheduled, {self.steps_per_epoch:,} an epoch",
            f"lr          first step {self.lr_first:.4g}, after {self.warmup_steps:,} warmup steps"
            f" {self.lr_after_warmup:.4g}, last step {self.lr_last:.4g}",
            f"memory      {self.engine}: each process holds about {self.memory}; activations come on top",
            *self.notes,
        ]


def split_batch(batch_size: int, micro_batch_size: int | None, num_processes: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps of a global batch.

    Raises:
        UsageError: the batch does not divide over the processes or into micro-batches.
    """
    share, rest = divmod(batch_size, num_processes)
    if rest:
        near = max(batch_size - rest, num_processes)
        raise UsageError(
            f"--batch-size {batch_size} is global and does not divide over {num_processes} processes;"
            f" take a multiple of {num_processes}, such as {near}."
        )
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise UsageError(
            f"--micro-batch-size {micro} does not divide the {share} images that each of {num_processes} process(es)"
            f" gets of --batch-size {batch_size}; take a divisor of {share}."
        )
    return micro, share // micro


def steps_in_all(config: RunConfig, schedule_steps: int) -> int:
    """How many steps of its schedule a run makes."""
    return schedule_steps if config.max_steps is None else min(schedule_steps, config.max_steps)


def make_plan(config: Config, sizes: Sizes, num_processes: int, engine: str | None = None) -> Plan:
    """Derive every number of the run.

    Args:
        config: the run's configuration.
        sizes: of its data and model.
        num_processes: that train together.
        engine: how they keep the training state, a name of `memory`; without one, single or ddp.

    Raises:
        UsageError: the numbers contradict each other (batch, warmup, data set size, mixup).
    """
    run, optim = config.run, config.optim
    micro, accumulation = micro_batches(config, num_processes)
    refuse_contradictions(config)
    _refuse_sizes(config, sizes)
    engine = engine or ("single" if num_processes == 1 else "ddp")
    _refuse_compiling(config, engine, accumulation)
    updates = steps_per_epoch(sizes.num_train, run.batch_size)
    schedule_steps = run.epochs * updates
    total = steps_in_all(run, schedule_steps)
    warmup_steps = math.ceil(optim.warmup_epochs * updates - 1e-6)  # a step before its end is of it
    lr_first, lr_after_warmup, lr_last = _rates(config, updates, (0, warmup_steps, max(total - 1, 0)))
    load = memory_load(config, sizes)
    return Plan(
        **asdict(sizes),
        select_on=config.data.select_on,
        engine=engine,
        num_processes=num_processes,
        batch_size=run.batch_size,
        micro_batch_size=micro,
        grad_accum_steps=accumulation,
        steps_per_epoch=updates,
        schedule_steps=schedule_steps,
        total_steps=total,
        warmup_steps=warmup_steps,
        lr_first=lr_first,
        lr_after_warmup=lr_after_warmup,
        lr_last=lr_last,
        checkpoint_bytes=checkpoint_bytes(load),
        memory=usage(engine, num_processes, load, accumulation > 1),
        notes=(
            *_batch_norm(config, sizes, num_processes, micro, accumulation),
            *_keeps_initial_weights(config, total),
            *_defaults_of_others(config),
            *_few_steps(config, schedule_steps),
        ),
    )


def _rates(config: Config, updates_per_epoch: int, steps: Sequence[int]) -> list[float]:
    """The learning rates of some steps."""
    optim = config.optim
    schedule = schedule_without_model(optim, config.run.epochs, updates_per_epoch)
    try:
        rates = [schedule.apply(step) for step in steps]
    except OverflowError:
        raise UsageError(
            f"--decay-rate {optim.decay_rate:g} every {optim.decay_epochs:g} epochs makes the learning rate too large"
            " for a number; lower it, or raise --decay-epochs."
        ) from None
    if not all(map(math.isfinite, rates)):
        raise UsageError(f"--warmup-epochs {optim.warmup_epochs:g} are too few to divide by; take 0 for none.")
    return rates


def _refuse_sizes(config: Config, sizes: Sizes) -> None:
    run = config.run
    if run.batch_size > sizes.num_train:
        raise UsageError(f"--batch-size {run.batch_size}: there are only {sizes.num_train} training images; lower it.")
    if run.patience and not sizes.num_val:
        raise UsageError(f"--patience {run.patience} needs a val split to watch; raise --val-fraction or leave it out.")


def _refuse_compiling(config: Config, engine: str, accumulation: int) -> None:
    if config.model.compile and engine == "zero3":
        raise UsageError("--compile is not for zero3, whose hooks are compiled anew in every step; leave it out.")
    if (mode := config.model.compile_mode) == "default":
        return
    if not config.model.compile:
        raise UsageError(f"--compile-mode {mode} goes with --compile; give both.")
    if accumulation > 1:  # torch's graphs write each micro-batch's gradient over the one before
        cure = "leave out --micro-batch-size, or take --compile-mode default"
        raise UsageError(f"--compile-mode {mode} takes a step's images at once; {cure}.")
    if engine not in ("single", "ddp"):
        raise UsageError(f"--compile-mode {mode} is not for {engine}, which moves weights about; leave it out.")


def micro_batches(config: Config, num_processes: int) -> tuple[int, int]:
    """Micro-batch size and accumulation steps of the run; see `split_batch`.

    Raises:
        UsageError: the batch does not divide, or mixup cannot pair the images of a micro-batch.
    """
    micro, accumulation = split_batch(config.run.batch_size, config.run.micro_batch_size, num_processes)
    if config.augment.mixes and micro % 2:
        raise UsageError(f"--mixup and --cutmix pair images: the micro-batch of {micro} must be even.")
    return micro, accumulation


def memory_load(config: Config, sizes: Sizes) -> Load:
    """What the run has to hold, whichever engine holds it."""
    return Load(
        num_parameters=sizes.num_parameters,
        num_trainable=sizes.num_trainable,
        state_per_parameter=sizes.state_per_parameter,
        data_bytes=sizes.data_bytes,
        precision=config.run.precision,
        average=config.optim.model_ema_decay is not None,
    )


def _batch_norm(config: Config, sizes: Sizes, num_processes: int, micro: int, accumulation: int) -> list[str]:
    """What makes BatchNorm, and so results, depend on how a batch is cut up, in a line."""
    together = num_processes == 1 or config.model.sync_bn
    if not sizes.has_batch_norm or (together and accumulation == 1):
        return []
    images, depends = micro * (num_processes if together else 1), []
    depends += [] if together else ["the number of processes"]
    depends += [] if accumulation == 1 else ["--micro-batch-size"]
    whose = "per micro-batch" if together else "per process"
    cure = "" if together else f"; --sync-bn takes them over all {num_processes * micro}"
    return [f"batch norm  statistics {whose}: over {images} images, so results depend on {' and '.join(depends)}{cure}"]


def _defaults_of_others(config: Config) -> list[str]:
    """Defaults that suit AdamW, or photographs, and not what was asked for, a line each."""
    if config.run.max_steps == 0:
        return []
    lines, optim, usual = [], config.optim, OptimConfig()
    if optim.opt in ("sgd", "momentum"):
        left = [f"--lr {optim.lr:g}"] * (optim.lr == usual.lr)
        left += [f"--weight-decay {optim.weight_decay:g}"] * (optim.weight_decay == usual.weight_decay)
        if left:
            lines.append(f"note        {' and '.join(left)} as for AdamW; SGD's are about 0.1 and 5e-4")
    if config.data.dataset == "digits" and config.augment.hflip:
        lines.append(f"note        --hflip {config.augment.hflip:g} mirrors digits, which makes others of them; take 0")
    return lines


def _few_steps(config: Config, schedule_steps: int) -> list[str]:
    """What to say of a schedule too short to train by: BatchNorm's statistics alone lag by tens of steps."""
    if schedule_steps >= FEW_STEPS or config.run.max_steps is not None:
        return []
    return [f"note        {schedule_steps} steps in all are few: a smaller --batch-size or more --epochs make more"]


def _keeps_initial_weights(config: Config, total_steps: int) -> list[str]:
    """What keeps much of the weights that the run begins with, a line each."""
    lines, model = [], config.model
    decay = config.optim.model_ema_decay or 0.0
    if decay and total_steps and (kept := decay**total_steps) > 0.1:
        lines.append(
            f"average     after {total_steps:,} steps {kept:.0%} of the moving average, which is evaluated in place of"
            f" the weights, will still be the initial ones: --model-ema-decay {decay:g} is too high for so few"
        )
    if model.freeze == "backbone" and not (model.pretrained or model.init_weights):
        lines.append("note        the frozen backbone has random weights, without --pretrained or --init-weights")
    return lines
