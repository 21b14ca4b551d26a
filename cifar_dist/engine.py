"""One training step, the meter that reads it, and exact passes over a split."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from cifar_dist.batches import Batch
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed import total
from cifar_dist.errors import Diverged


@dataclass(frozen=True)
class Stepper:
    """What a training step works with: the prepared model and optimizer, and the loss's settings."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    smoothing: float
    clip_grad: float | None


def train_step(stepper: Stepper, micro_batches: Iterable[Batch]) -> torch.Tensor:
    """One optimizer update from this process's micro-batches.

    The update follows the mean loss over the real rows of the global batch, whatever the number of
    processes and micro-batches.

    Returns:
        float64 (2,) on the device: this process's share of the global batch's mean loss and top-1;
        summed over processes they are the batch's. Nothing is fetched to the host.
    """
    accelerator, model, optimizer = stepper.accelerator, stepper.model, stepper.optimizer
    # Accelerate divides by the accumulation and DDP by the processes; the weights already do both.
    undo = accelerator.gradient_accumulation_steps * accelerator.num_processes
    share = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in micro_batches:
        with accelerator.accumulate(model):
            logits = model(batch.images)
            soft = batch.targets.is_floating_point()  # mixup has smoothed them already
            losses = F.cross_entropy(
                logits, batch.targets, reduction="none", label_smoothing=0.0 if soft else stepper.smoothing
            )
            loss = (losses * batch.weights).sum()
            accelerator.backward(loss * undo)
            if accelerator.sync_gradients and stepper.clip_grad is not None:
                accelerator.clip_grad_norm_(model.parameters(), stepper.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        correct = (logits.detach().argmax(1) == batch.labels) * batch.weights
        share += torch.stack([loss.detach(), correct.sum()])
    return share


class Meter:
    """Means over the steps since the last reading; what it adds up stays on the device until then."""

    def __init__(self, accelerator: Accelerator, batch_size: int):
        self._accelerator, self._batch_size = accelerator, batch_size
        self._restart()

    def _restart(self) -> None:
        self._steps = 0
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
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Mean training loss (nats), top-1 (fraction) and images/s of the whole job since the last reading.

        Raises:
            Diverged: the loss is not finite, on every process alike.
        """
        loss, top1 = total(self._accelerator, self._sum)
        steps, seconds = self._steps, time.perf_counter() - self._started
        self._restart()
        if not math.isfinite(loss):
            raise Diverged(f"the training loss is {loss} within the last {steps} steps; lower --lr or set --clip-grad.")
        return {
            "train/loss": loss / steps,
            "train/top1": top1 / steps,
            "images_per_second": steps * self._batch_size / seconds,
        }


@dataclass(frozen=True)
class Rows:
    """Part of a split: `rows` int64 (B,) positions, `real` bool (B,) False where filled up, `images` ready."""

    rows: torch.Tensor
    real: torch.Tensor
    images: torch.Tensor


def _passes(accelerator: Accelerator, split: ResidentSet, preprocess: Preprocess, batch_size: int) -> Iterator[Rows]:
    """This process's batches of a split: as many on every process, each row real exactly once."""
    stride = batch_size * accelerator.num_processes
    offsets = torch.arange(batch_size, device=split.images.device)
    for start in range(accelerator.process_index * batch_size, -(-len(split) // stride) * stride, stride):
        positions = start + offsets
        rows = positions.clamp(max=len(split) - 1)
        yield Rows(rows, positions < len(split), preprocess(split.images[rows]))


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, split: ResidentSet, preprocess: Preprocess, batch_size: int
) -> dict[str, float]:
    """Mean cross-entropy and top-1 of `model` over every row of `split`, each counted once.

    Returns:
        ``loss`` in nats and ``top1`` as a fraction, the same on every process.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for part in _passes(accelerator, split, preprocess, batch_size):
        with accelerator.autocast():
            logits = model(part.images).float()
        labels = split.labels[part.rows]
        losses = F.cross_entropy(logits, labels, reduction="none") * part.real
        correct = (logits.argmax(1) == labels) & part.real
        sums += torch.stack([losses.sum(dtype=torch.float64), correct.sum(), part.real.sum()])
    loss, correct_rows, count = total(accelerator, sums)
    if count != len(split):
        raise RuntimeError(f"evaluation counted {count:.0f} rows of {len(split)}")
    return {"loss": loss / count, "top1": correct_rows / count}


@torch.inference_mode()
def predict(
    accelerator: Accelerator, model: torch.nn.Module, split: ResidentSet, preprocess: Preprocess, batch_size: int
) -> torch.Tensor:
    """Logits of every row of `split`.

    Returns:
        float32 (N, K) on the CPU, row i for row i of the split, complete on every process.
    """
    model.eval()
    found: list[torch.Tensor] = []
    for part in _passes(accelerator, split, preprocess, batch_size):
        with accelerator.autocast():
            logits = model(part.images).float()
        found.append(accelerator.gather(logits).cpu())
    return torch.cat(found)[: len(split)]
