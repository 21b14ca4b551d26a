"""Study E as one would write it by hand: plain PyTorch, torchvision transforms, a DataLoader.

The yardstick for recipes/cnn4.yaml; it shares no code with cifar_dist.

    python benchmarks/plain_cnn4.py --data DIR_WITH_HUB_PARQUET [--epochs 50] [--seed 0]

Prints one JSON line per epoch: epoch, seconds (training only), val top-1; and the test top-1 of the
last epoch at the end.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sklearn.model_selection import train_test_split
from torch import nn
from torchvision import transforms


def cnn() -> nn.Module:
    """Study E's network."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10))


class Images(torch.utils.data.Dataset):
    """PIL images in memory, transformed when asked for."""

    def __init__(self, rows: list[Any], transform: Callable[[Any], torch.Tensor]):
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.rows[index]
        return self.transform(image), label


@torch.inference_mode()
def accuracy(model: nn.Module, loader: torch.utils.data.DataLoader) -> float:
    """Top-1 over a loader, as a fraction."""
    model.eval()
    hits = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(hits).mean().item()


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    files = {split: str(next(args.data.rglob(f"{split}-*.parquet"))) for split in ("train", "test")}
    data = load_dataset("parquet", data_files=files)
    rows = {split: [(row["img"].convert("RGB"), row["label"]) for row in data[split]] for split in files}
    train, val = train_test_split(rows["train"], test_size=0.1, random_state=42, stratify=[y for _, y in rows["train"]])

    norm = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    augment = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4), *norm])
    plain = transforms.Compose(norm)
    loader = torch.utils.data.DataLoader(Images(train, augment), batch_size=64, shuffle=True)
    val_loader = torch.utils.data.DataLoader(Images(val, plain), batch_size=64)
    test_loader = torch.utils.data.DataLoader(Images(rows["test"], plain), batch_size=64)

    model = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(1, args.epochs + 1):
        model.train()
        began = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        seconds = time.perf_counter() - began
        print(
            json.dumps({"epoch": epoch, "seconds": round(seconds, 2), "val_top1": accuracy(model, val_loader)}),
            flush=True,
        )
    print(json.dumps({"test_top1": accuracy(model, test_loader), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
