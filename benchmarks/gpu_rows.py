"""One model trained in one way, measured: the project's own training, or the plain loop; rows of `benchmarks.gpu`."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers import set_fused_attn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain_loop import PlainLoop, Setting
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import ModelConfig
from cifar_dist.cost.flops import Flops, Peak, count_flops, mfu
from cifar_dist.cost.speed import durations
from cifar_dist.data import TrainingData
from cifar_dist.distributed.group import peak_memory_bytes
from cifar_dist.models import build_model, input_config
from cifar_dist.models.cpu_layers import use_cpu_layers
from cifar_dist.models.packed_attention import PackedAttention, PackedWindowAttention
from cifar_dist.plan import make_plan
from cifar_dist.schedule import Schedule
from cifar_dist.training.engine import Meter, Stepper, train_step
from cifar_dist.training.features import Features
from cifar_dist.training.job import prepare
from cifar_dist.training.setup import Setup
from cifar_dist.training.sizes import measure
from cifar_dist.training.stream_batches import make_batches

PRECISION, LR = "bf16", "1e-4"
WINDOWS = 8
WARM_UP_STEPS = 3
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Case:
    """A model to train: pixels a side, images a step, and the aims on one H100 (0: none)."""

    model: str
    img_size: int
    batch_size: int
    images_per_second: float = 0.0
    times_plain: float = 0.0
    data_share: float = 0.0


@dataclass(frozen=True)
class Way:
    """How it is trained.

    Attributes:
        name: in the table.
        compiles: with --compile and this --compile-mode; empty for neither.
        attention: packed, by our kernels where they compute it; timm, as its layers have it (compiled, Swin's does
            not repeat itself); or fused, the same with TIMM_FUSED_ATTN=2, by which Swin's windows are fused, too.
        channels_last: --channels-last.
        tunes: cuDNN tries its algorithms for every shape (torch.backends.cudnn.benchmark).
        deterministic: cuDNN takes only algorithms that give the same every time, as in train.py; else any, as in the
            plain loop.
    """

    name: str
    compiles: str = ""
    attention: Literal["packed", "timm", "fused"] = "packed"
    channels_last: bool = False
    tunes: bool = False
    deterministic: bool = True


PLAIN = Way("plain", deterministic=False, attention="timm")


@dataclass
class Row:
    """What was measured; None where it does not apply or was not reached.

    Attributes:
        case: the model.
        way: how it was trained.
        step_seconds: a step in each window.
        no_data_step_seconds: the same with one batch that is on the device already.
        batch_seconds: to make one augmented batch, waited for.
        device_seconds: of a step that the GPU computes.
        mfu: by the median window.
        peak_memory_bytes: of tensors on the GPU; without one all that the process ever held.
        ready_seconds: until it waited for its turn, compiling included, beside others that got ready.
        error: why it ended early.
    """

    case: Case
    way: Way
    step_seconds: list[float] = field(default_factory=list)
    no_data_step_seconds: list[float] = field(default_factory=list)
    batch_seconds: float | None = None
    device_seconds: float | None = None
    mfu: float | None = None
    peak_memory_bytes: int | None = None
    ready_seconds: float | None = None
    error: str = ""

    @property
    def images_per_second(self) -> float | None:
        """Of the median window."""
        return self.case.batch_size / statistics.median(self.step_seconds) if self.step_seconds else None

    @property
    def data_share(self) -> float | None:
        """What part of a step the data path is: what a batch that is there already saves."""
        if not (self.step_seconds and self.no_data_step_seconds):
            return None
        return 1 - statistics.median(self.no_data_step_seconds) / statistics.median(self.step_seconds)

    @property
    def no_data_images_per_second(self) -> float | None:
        """Of the median window without a data path."""
        found = self.no_data_step_seconds
        return self.case.batch_size / statistics.median(found) if found else None

    @property
    def busy_share(self) -> float | None:
        """The part of a step in which the GPU computes."""
        if not (self.step_seconds and self.device_seconds):
            return None
        return self.device_seconds / statistics.median(self.step_seconds)

    def as_json(self) -> dict[str, Any]:
        """Everything, with the medians."""
        return asdict(self) | {
            "images_per_second": self.images_per_second,
            "no_data_images_per_second": self.no_data_images_per_second,
            "data_share": self.data_share,
            "busy_share": self.busy_share,
        }


@dataclass(frozen=True)
class Bench:
    """What rows share.

    Attributes:
        accelerator: of this process.
        data: the training set.
        pictures: the same for the plain loop, see there.
        peak: of the device, in bf16.
        seconds: that a row's windows take with the data path, and again those without.
        turn: waits until no other process computes; called when a row is ready.
    """

    accelerator: Accelerator
    data: TrainingData
    pictures: Any
    peak: Peak
    seconds: float
    turn: Callable[[], object] = lambda: None

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.accelerator.device


class Ours:
    """The project's training of `model`, put together as train.py does, without its log; flags in `more` win."""

    def __init__(self, bench: Bench, case: Case, way: Way, more: str = ""):
        flags = f"--model {case.model} --batch-size {case.batch_size} --precision {PRECISION} --opt adamw --lr {LR}"
        switches = ["--img-size", str(case.img_size)] * bool(case.img_size)
        switches += ["--channels-last"] * way.channels_last + ["--compile", "--compile-mode", way.compiles] * bool(
            way.compiles
        )
        config = parse_command_line([*flags.split(), *switches, *more.split()]).config
        set_seed(config.run.seed)
        model = build_model(config.model, len(bench.data.class_names))
        if way.attention != "packed":
            for layer in model.modules():
                if isinstance(layer, PackedAttention | PackedWindowAttention):
                    layer.__class__ = type(layer).__base__  # type: ignore[assignment]  # timm's
        plan = make_plan(config, measure(config, bench.data, model), 1)
        use_cpu_layers(model, bench.device, PRECISION)
        parallel = prepare(Setup(config, plan, bench.accelerator, bench.data, model, Features())).parallel
        parallel.model.train()
        self._batches = make_batches(bench.data.train, config, plan, input_config(model, config.model), parallel)
        self._schedule = Schedule(parallel.optimizer, config.optim, config.run.epochs, plan.steps_per_epoch)
        self._stepper, self._meter = Stepper(parallel, 0.0), Meter(bench.accelerator, plan.batch_size)
        self.model, self._device, self._step = model, bench.device, 0
        self._fixed = self.batch()

    def batch(self) -> list[Any]:
        """The next step's one micro-batch, and no other."""
        return [next(self._batches(self._step))]

    def run(self, steps: int, fixed: bool = False) -> float:
        """Train so many steps more, or on the same batch again and again; seconds until the device has done them."""
        began = time.perf_counter()
        for _ in range(steps):
            self._schedule.apply(self._step)
            share, _ = train_step(self._stepper, self._fixed if fixed else self._batches(self._step))
            self._meter.add(share)
            self._step += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def windows(ways: list[tuple[Callable[[int], float], list[float]]], seconds: float) -> None:
    """Append the seconds of a step in each window of steps, run in each way, to that way's list; each for `seconds`.

    The ways take turns, and every other time the other way round, so that no one has the cooler GPU.
    """
    step = ways[0][0](WARM_UP_STEPS) / WARM_UP_STEPS
    steps = max(1, round(seconds / WINDOWS / step))
    for number in range(WINDOWS):
        for run, found in reversed(ways) if number % 2 else ways:
            found.append(run(steps) / steps)


def device_seconds(run: Callable[[int], float], device: torch.device) -> float | None:
    """What the kernels of a step take together, by torch's profiler."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(WARM_UP_STEPS)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / WARM_UP_STEPS / 1e6


@cache
def flops_of(model: str, img_size: int) -> Flops:
    """The project's count of a model's operations."""
    with torch.device("meta"):
        return count_flops(build_model(ModelConfig(model=model), 10), img_size)


def count_operators(case: Case) -> int:
    """Operators of forward and backward, without the optimizer's."""

    class Counter(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.found += 1
            return function(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = build_model(ModelConfig(model=case.model), 10)
        images = torch.empty(2, 3, case.img_size, case.img_size)
    with Counter():
        model(images).sum().backward()
    return Counter.found


def fill(bench: Bench, row: Row) -> None:
    """Measure a row; what is done when something fails stays in it."""
    set_fused_attn(True, experimental=row.way.attention == "fused")
    torch.backends.cudnn.benchmark = row.way.tunes
    torch.backends.cudnn.deterministic = row.way.deterministic
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    (_fill_plain if row.way == PLAIN else _fill_ours)(bench, row)


def _fill_ours(bench: Bench, row: Row) -> None:
    began = time.perf_counter()
    ours = Ours(bench, row.case, row.way)
    ours.run(WARM_UP_STEPS)
    row.ready_seconds = time.perf_counter() - began
    bench.turn()
    without_data = partial(ours.run, fixed=True)
    windows([(ours.run, row.step_seconds), (without_data, row.no_data_step_seconds)], bench.seconds)
    _read(bench, row)
    row.batch_seconds = statistics.median(durations(ours.batch, bench.device, bench.seconds / 10))
    row.device_seconds = device_seconds(ours.run, bench.device)


def _fill_plain(bench: Bench, row: Row) -> None:
    case, began = row.case, time.perf_counter()
    setting = Setting(case.model, case.img_size, case.batch_size, PRECISION, CORES, bench.device.type == "cpu")
    with closing(PlainLoop(bench.pictures, setting)) as loop:
        loop.run(1)
        row.ready_seconds = time.perf_counter() - began
        bench.turn()
        loop.run(WARM_UP_STEPS + (2 * CORES if bench.device.type == "cuda" else 0))  # uses up what was loaded ahead
        windows([(loop.run, row.step_seconds)], bench.seconds)
        _read(bench, row)


def _read(bench: Bench, row: Row) -> None:
    """What both loops tell."""
    row.peak_memory_bytes = peak_memory_bytes(bench.accelerator)
    row.mfu = mfu(flops_of(row.case.model, row.case.img_size), row.images_per_second or 0.0, 1, bench.peak)
