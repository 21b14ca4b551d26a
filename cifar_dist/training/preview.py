"""A sheet of training images: what they are, and what the model will see of them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cifar_dist.config import Config, InputConfig
from cifar_dist.data import TrainingData
from cifar_dist.data.resident import ResidentSet
from cifar_dist.errors import UsageError
from cifar_dist.ordering import epoch_order
from cifar_dist.plan import Plan
from cifar_dist.training.batches import ResidentBatches

_IMAGES, _EPOCHS = 8, 7
_TILE = 96  # pixels a side, at least
_GAP, _LINE = 4, 12
_CAPTION = 2 * _LINE


def check_preview(path: Path) -> None:
    """Refuse, before any data is read, a file that cannot be written.

    Raises:
        UsageError: it is no PNG, or cannot be written where it is.
    """
    folder = path.parent
    if path.suffix.lower() != ".png":
        raise UsageError(f"--preview-augment {path}: the sheet is a PNG file; name it .png.")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"--preview-augment {path}: cannot be written; name a file in a folder that exists.")


def write_preview(path: Path, config: Config, plan: Plan, data: TrainingData, input: InputConfig) -> None:
    """Write 8 training images, of as many classes, each beside what the model sees of it in the first 7 epochs.

    Raises:
        UsageError: the file cannot be written, or train is a stream.
    """
    if not isinstance(data.train, ResidentSet):
        raise UsageError(f"--preview-augment {path} looks at resident images; add --data-mode resident for it.")
    rows = _first_of_each(data.train.labels)[:_IMAGES]
    tile = input.img_size * -(-_TILE // input.img_size)
    width, height = _GAP + (1 + _EPOCHS) * (tile + _GAP), _LINE + _GAP + len(rows) * (tile + _CAPTION + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def place(row: int, column: int, pixels: Tensor, caption: str) -> None:
        left, top = _GAP + column * (tile + _GAP), _LINE + _GAP + row * (tile + _CAPTION + _GAP)
        image = Image.fromarray(pixels.numpy()).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(image, (left, top))
        draw.multiline_text((left, top + tile), caption, "black", spacing=1)

    for column, title in enumerate(["original", *(f"epoch {epoch}" for epoch in range(_EPOCHS))]):
        draw.text((_GAP + column * (tile + _GAP), 0), title, "black")
    for line, row in enumerate(rows):
        place(line, 0, data.train.images[row], data.class_names[int(data.train.labels[row])])
        for epoch in range(_EPOCHS):
            image, target = _as_seen(config, plan, data, input, (epoch, row))
            place(line, 1 + epoch, _denormalised(image, input), _caption(target, data.class_names))
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UsageError(f"--preview-augment {path}: cannot be written ({error.strerror or error}).") from None


def _first_of_each(labels: Tensor) -> list[int]:
    """All rows: the first of each class, then the second, and so on."""
    before = Counter[int]()
    turns = []
    for row, label in enumerate(labels.tolist()):
        turns.append((before[label], row))
        before[label] += 1
    return [row for _, row in sorted(turns)]


def _as_seen(
    config: Config, plan: Plan, data: TrainingData, input: InputConfig, where: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What training sees in an epoch of a row of the training set: the batch that holds it, but only its pair.

    The image is (3,T,T), the target a class or (K,) shares.

    A sample's pixels depend neither on the number of processes nor on the micro-batch, so the pair is the whole
    micro-batch of one of many processes.
    """
    epoch, row = where
    place = int((epoch_order(plan.num_train, config.run.seed, epoch) == row).nonzero()[0][0])
    index, within = divmod(place, plan.batch_size)
    micro = 1 if plan.batch_size % 2 else 2
    pairwise = replace(plan, num_processes=plan.batch_size // micro, micro_batch_size=micro, grad_accum_steps=1)
    process, member = divmod(within, micro)
    accelerator = SimpleNamespace(process_index=process, device=torch.device("cpu"))
    one = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    batches = ResidentBatches(data.train, config, pairwise, input, one)  # type: ignore[arg-type]
    batch = next(batches(epoch * plan.steps_per_epoch + index))
    return batch.images[member], batch.targets[member]


def _denormalised(image: Tensor, input: InputConfig) -> Tensor:
    """(3,T,T) back to bytes (T,T,3)."""
    pixels = image.permute(1, 2, 0) * torch.tensor(input.std) + torch.tensor(input.mean)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def _caption(target: Tensor, class_names: tuple[str, ...]) -> str:
    """The classes of a mixed target, the larger share first, a line each; nothing for a plain class."""
    if not target.is_floating_point():
        return ""
    shares, classes = target.topk(2)
    named = zip(shares.tolist(), classes.tolist(), strict=True)
    return "\n".join(f"{class_names[k][:10]} {share:.2f}" for share, k in named if share > 0.01)
