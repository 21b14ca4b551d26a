"""The training loop that everyone writes: torchvision transforms on PIL images, a DataLoader, and Accelerate.

The yardstick for speed: Accelerate's examples/cv_example.py with torchvision's transforms for CIFAR, and what people
add to it (workers, pinned memory, copies not waited for, losses fetched once an epoch). It shares no code
with cifar_dist but the models that timm has not got.

    with closing(PlainLoop(rows, Setting("resnet18_cifar", 32, 128, "fp32", 2))) as loop:
        loop.run(10)  # warm up
        seconds = loop.run(50)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

import cifar_dist.models  # noqa: F401  its models become timm's

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
EPOCHS = 10_000  # nobody gets that far
LR, WEIGHT_DECAY, NUM_CLASSES = 1e-4, 0.05, 10
_IDLE: list[Any] = []


@dataclass(frozen=True)
class Setting:
    """What is trained and how.

    Attributes:
        model: timm's name of it.
        img_size: pixels a side that it sees; images are cropped at 32.
        batch_size: images a step.
        precision: fp32 or bf16 (Accelerate's autocast).
        workers: processes that load; 0 loads between the steps.
        on_cpu: even where there is a GPU.
        learning_rate: of every step.
    """

    model: str
    img_size: int
    batch_size: int
    precision: str
    workers: int
    on_cpu: bool = False
    learning_rate: float = LR


class Images(Dataset[tuple[torch.Tensor, int]]):
    """PIL images and labels, transformed when asked for; of a `datasets.Dataset` they are decoded then, too."""

    def __init__(self, rows: Any, transform: T.Compose):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        image, label = row.values() if isinstance(row, dict) else row
        return self.transform(image.convert("RGB")), label


def transform(img_size: int) -> T.Compose:
    """Crop with padding 4, flip, and a resize where the model sees more than 32 pixels."""
    larger = [] if img_size == 32 else [T.Resize(img_size)]
    return T.Compose(
        [T.RandomCrop(32, padding=4), *larger, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
    )


class PlainLoop:
    """The loop, ready to run; only one should run at a time, or its workers load in the background meanwhile.

    Attributes:
        losses: the mean loss (nats) of every epoch that was finished.

    Args:
        rows: PIL images with labels: pairs in a sequence, or a `datasets.Dataset` of these two columns.
        setting: what is trained and how.
    """

    def __init__(self, rows: Any, setting: Setting):
        precision = {"fp32": "no"}.get(setting.precision, setting.precision)
        self.accelerator = Accelerator(
            cpu=setting.on_cpu, mixed_precision=precision, dataloader_config=DataLoaderConfiguration(non_blocking=True)
        )
        loader = DataLoader(
            Images(rows, transform(setting.img_size)),
            setting.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=setting.workers,
            persistent_workers=setting.workers > 0,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        model = timm.create_model(setting.model, num_classes=NUM_CLASSES).to(self.accelerator.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # constant, but stepped as any
        self._prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.losses: list[float] = []
        self._steps = self._train()

    @property
    def model(self) -> nn.Module:
        """What it trains."""
        return self._prepared[0]

    def _train(self) -> Iterator[None]:
        model, optimizer, loader, scheduler = self._prepared
        for _ in range(EPOCHS):
            model.train()
            total = torch.zeros((), device=self.accelerator.device)
            for images, labels in loader:
                loss = cross_entropy(model(images), labels)
                self.accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                total += loss.detach().float()
                yield
            self.losses.append(total.item() / len(loader))

    def run(self, steps: int) -> float:
        """Train so many steps more; seconds until the device has done them."""
        began = time.perf_counter()
        for _ in range(steps):
            next(self._steps)
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def close(self) -> None:
        """Let go of the model and its memory, and of the workers.

        Where there is a GPU, workers stay until the program ends, idle, with what they have loaded ahead: on a machine
        with an H100 they did not end when asked to, and torch waited five seconds for each of 16.
        """
        self._steps.close()  # type: ignore[attr-defined]
        if self.accelerator.device.type == "cuda":
            _IDLE.append(self._prepared[2])
        self._prepared = self.accelerator.free_memory(*self._prepared)
