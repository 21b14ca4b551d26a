"""The largest micro-batch that fits, found by trying before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from cifar_dist.config import Config, InputConfig
from cifar_dist.distributed.control import Snapshot, any_of
from cifar_dist.distributed.group import autocast
from cifar_dist.errors import UsageError
from cifar_dist.plan import Plan


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no room, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def smaller(share: int, micro: int, pairs: bool = False) -> int | None:
    """The largest micro-batch up to half of `micro` that divides a process's `share` of the batch, if there is one.

    Args:
        share: images.
        micro: what is too much.
        pairs: whether images come in pairs, as mixup and CutMix have them.
    """
    smallest = 2 if pairs else 1
    return next((size for size in range(micro // 2, 0, -1) if share % size == 0 and size % smallest == 0), None)


def fitting(accelerator: Accelerator, model: torch.nn.Module, input: InputConfig, plan: Plan, config: Config) -> int:
    """Try a forward and backward pass with the plan's micro-batch, and with about half of it until all processes can.

    Room for the optimizer's state, which a first step makes, is held meanwhile. Weights, statistics and random streams
    are afterwards as before.

    Raises:
        UsageError: not even one image fits, or, where images are mixed, one pair.
    """
    share, micro = plan.batch_size // plan.num_processes, plan.micro_batch_size
    model = model.to(accelerator.device).train()
    snapshot = Snapshot(model, accelerator.device)
    snapshot.take()
    while True:
        sizes = (micro, input.img_size, plan.memory.optimizer)
        failed = any_of(accelerator, not _fits(accelerator, model, sizes, config.run.precision))
        snapshot.restore()
        model.zero_grad()
        if not failed:
            return micro
        if (less := smaller(share, micro, config.augment.mixes)) is None:
            least = "one image fits" if micro == 1 else f"{micro} images fit"
            raise UsageError(f"--auto-micro-batch: not even {least} into memory; take a smaller model.")
        micro = less


@contextmanager
def enough_for_batch_norm() -> Iterator[None]:
    """Within it a BatchNorm that gets one value a channel, of which there is no variance, is a `UsageError`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # as torch says it
            raise
        raise UsageError(
            "a BatchNorm of this model gets a single value per channel of one image at a time; give every process two"
            " images or more at a time (--batch-size, --micro-batch-size), or larger ones (--img-size)."
        ) from None


def forward_and_backward(model: torch.nn.Module, images: torch.Tensor, precision: str) -> None:
    """What a step computes of `images` (B, 3, S, S), with a loss that takes no labels."""
    with autocast(images.device, precision), enough_for_batch_norm():
        loss = model(images).float().logsumexp(1).sum()
    loss.backward()


def _fits(accelerator: Accelerator, model: torch.nn.Module, sizes: tuple[int, int, int], precision: str) -> bool:
    """Whether `sizes`, images of so many pixels a side beside so many bytes, can be trained on here."""
    count, side, state_bytes = sizes
    try:
        held = torch.empty(state_bytes, dtype=torch.uint8, device=accelerator.device)
        images = torch.zeros(count, 3, side, side, device=accelerator.device)
        forward_and_backward(model, images, precision)
        del held
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    return True
