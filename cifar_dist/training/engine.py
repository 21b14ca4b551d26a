"""One training step, the meter that reads it, and exact passes over a split."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm.auto import tqdm

from cifar_dist.data.augment import View
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.control import FlagReduction, Snapshot, StepFlags, any_of
from cifar_dist.distributed.group import autocast, total
from cifar_dist.errors import UsageError
from cifar_dist.parallel import Replicated
from cifar_dist.training.batches import Batch
from cifar_dist.training.micro_batch import enough_for_batch_norm, is_out_of_memory, smaller


class Stepper:
    """What a training step works with.

    Args:
        parallel: the engine that holds the model and its optimizer.
        smoothing: label smoothing.
    """

    def __init__(self, parallel: Replicated, smoothing: float):
        self.parallel, self.smoothing = parallel, smoothing
        self.snapshot = Snapshot(parallel.module, parallel.accelerator.device)


def train_step(
    stepper: Stepper, micro_batches: Iterable[Batch], own_flags: Callable[[], StepFlags] = StepFlags
) -> tuple[torch.Tensor, StepFlags]:
    """One optimizer update from this process's micro-batches, unless a number in it is not finite.

    The update follows the mean loss over the real rows of the global batch, whatever the number of
    processes and micro-batches. A refused step leaves weights, optimizer, buffers and random streams as they were.

    Args:
        stepper: the engine and the loss's settings.
        micro_batches: this process's part of the global batch; the last one says so.
        own_flags: asked at its end what this process has to tell the others.

    Returns:
        float64 (2,) on the device: this process's share of the global batch's mean loss and top-1 (summed over
        processes they are the batch's), and the flags of all processes.
    """
    parallel = stepper.parallel
    device = parallel.accelerator.device
    stepper.snapshot.take()
    share, lost = torch.zeros(2, dtype=torch.float64, device=device), False
    for batch in micro_batches:
        lost = lost or batch.lost
        try:
            share += _micro_step(stepper, batch, lost)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _no_room(batch) from None
        if batch.last:
            nonfinite, bad_gradient = ~share[0].isfinite(), parallel.gradient_is_bad()
            nonfinite = nonfinite if bad_gradient is None else nonfinite | bad_gradient
            reduction = FlagReduction(parallel.accelerator, nonfinite, replace(own_flags(), lost=lost))
            updated = parallel.update_unless(reduction.refused)
    flags = reduction.result()  # meanwhile a GPU updates, and makes the next batch, which the loop's end began
    if flags.refused:
        scaler = parallel.scaler_state() if flags.lost else {}
        parallel.drop()
        parallel.load_scaler(scaler)  # which has seen no overflow, but a step without data
    elif not updated and parallel.update():
        flags = replace(flags, refused=True)
    if flags.refused:
        stepper.snapshot.restore()
    return share, flags


def _micro_step(stepper: Stepper, batch: Batch, lost: bool) -> torch.Tensor:
    """Forward and backward of a micro-batch: float64 (2,), its part of the global batch's loss and top-1."""
    parallel = stepper.parallel
    with parallel.micro_batch(batch.last):
        with enough_for_batch_norm():
            logits = parallel.forward(batch.images).float()
        soft = batch.targets.is_floating_point()  # mixup has smoothed them already
        smoothing = 0.0 if soft else stepper.smoothing
        losses = F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
        loss = (losses * batch.weights).sum()
        # The gradient of a loss that is not finite is made so too: every engine, and every process, sees it.
        parallel.backward(loss * torch.where(loss.detach().isfinite(), math.nan if lost else 1.0, math.nan))
    labels = batch.targets.argmax(1) if soft else batch.targets  # of a mixed image the class it has most of
    correct = (logits.detach().argmax(1) == labels) * batch.weights
    return torch.stack([loss.detach(), correct.sum()])


def _no_room(batch: Batch) -> UsageError:
    micro = len(batch.images)
    size = smaller(micro, micro, pairs=batch.targets.is_floating_point())  # what divides it divides the batch, too
    if size is None:
        least = "a single image" if micro == 1 else f"{micro} images"
        return UsageError(f"a step with {least} does not fit into memory; take a smaller --model or --img-size.")
    return UsageError(
        f"a step with {micro} images at a time does not fit into memory; take --micro-batch-size {size},"
        " or --auto-micro-batch (the batch stays what it is), and go on with --resume auto."
    )


class Meter:
    """Means over the steps since the last reading; what it adds up stays on the device until then.

    Args:
        accelerator: of this process.
        images: of a step, as the mean over an epoch, whose last batch may be filled up.

    Attributes:
        steps: how many steps the next reading is over.
    """

    def __init__(self, accelerator: Accelerator, images: float):
        self._accelerator, self._images = accelerator, images
        self._restart()

    def _restart(self) -> None:
        self.steps = 0
        self._sum = torch.zeros(2, dtype=torch.float64, device=self._accelerator.device)
        self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock, as for an evaluation or a checkpoint."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def add(self, share: torch.Tensor) -> None:
        """Count one step's share, as `train_step` returns it."""
        self._sum += share
        self.steps += 1

    def read(self, waits: list[float]) -> dict[str, float]:
        """Means of the whole job since the last reading.

        Args:
            waits: this process's, as `Batches.take_waits` returns them.

        Returns:
            Mean training loss (nats), top-1 (fraction), images/s, the share of time that steps waited for data, and
            damaged images that were skipped.
        """
        numbers = torch.cat([self._sum, torch.tensor(waits, dtype=torch.float64, device=self._sum.device)])
        loss, top1, waited, corrupt = total(self._accelerator, numbers)
        steps, seconds = self.steps, time.perf_counter() - self._started
        self._restart()
        return {
            "train/loss": loss / steps,
            "train/top1": top1 / steps,
            "images_per_second": steps * self._images / seconds,
            "data_wait": waited / self._accelerator.num_processes / seconds,
            **({"skipped_images": corrupt} if corrupt else {}),
        }


@dataclass(frozen=True)
class Scored:
    """Part of a split: `rows` int64 (B,) positions, `real` bool (B,) False where filled up, `logits` float32 (B, K)."""

    rows: torch.Tensor
    real: torch.Tensor
    logits: torch.Tensor


class Stopped(Exception):
    """A pass over a split was broken off because some process was asked to stop."""


@dataclass(frozen=True)
class Evaluator:
    """How splits are scored.

    Attributes:
        accelerator: of this process.
        preprocess: what the rows' images go through.
        batch_size: images per process and forward pass.
        precision: fp32, bf16 or fp16.
    """

    accelerator: Accelerator
    preprocess: Callable[[torch.Tensor], torch.Tensor]
    batch_size: int
    precision: str

    def _scored(
        self,
        model: torch.nn.Module,
        split: ResidentSet,
        stop: Callable[[], bool] = lambda: False,
        view: View | None = None,
    ) -> Iterator[Scored]:
        """This process's batches of a split: as many on every process, each row real exactly once."""
        model.eval()
        accelerator, device = self.accelerator, self.accelerator.device
        stride = self.batch_size * accelerator.num_processes
        offsets = torch.arange(self.batch_size, device=device)
        starts = range(accelerator.process_index * self.batch_size, -(-len(split) // stride) * stride, stride)
        ask_every = 16 if device.type == "cuda" else 1  # batches; asking makes the host wait for the device
        for number, start in enumerate(starts):
            if number % ask_every == 0 and any_of(accelerator, stop()):
                raise Stopped
            positions = start + offsets
            rows = positions.clamp(max=len(split) - 1)
            images = split.images[rows]
            images = self.preprocess(view(images) if view else images)
            with autocast(device, self.precision):
                logits = model(images).float()
            yield Scored(rows, positions < len(split), logits)

    @torch.no_grad()
    def scores(
        self, model: torch.nn.Module, split: ResidentSet, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Mean cross-entropy and top-1 of `model` over every row of `split`, each counted once.

        Returns:
            ``loss`` in nats and ``top1`` as a fraction, the same on every process.

        Raises:
            Stopped: `stop` said so on some process meanwhile.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for part in self._scored(model, split, stop):
            labels = split.labels[part.rows]
            losses = F.cross_entropy(part.logits, labels, reduction="none") * part.real
            correct = (part.logits.argmax(1) == labels) & part.real
            sums += torch.stack([losses.sum(dtype=torch.float64), correct.sum(), part.real.sum()])
        loss, correct_rows, count = total(self.accelerator, sums)
        if count != len(split):
            raise RuntimeError(f"evaluation counted {count:.0f} rows of {len(split)}")
        return {"loss": loss / count, "top1": correct_rows / count}

    @torch.no_grad()
    def logits(
        self,
        model: torch.nn.Module,
        split: ResidentSet,
        view: View | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> torch.Tensor:
        """Logits, or whatever `model` returns, of every row of `split` as it is, or in a view of it.

        Returns:
            float32 (N, K) on the CPU, row i for row i of the split, complete on every process.

        Raises:
            Stopped: `stop` said so on some process meanwhile.
        """
        parts = self._scored(model, split, stop, view)
        batches = -(-len(split) // (self.batch_size * self.accelerator.num_processes))
        quiet = not self.accelerator.is_main_process or None  # None: shown in a terminal only
        shown = tqdm(parts, "forward passes", batches, leave=False, disable=quiet, unit="batch")
        return torch.cat([self.accelerator.gather(part.logits).cpu() for part in shown])[: len(split)]
