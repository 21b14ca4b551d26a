"""Images/s of the data path, from sample ids to a ready batch: ours, torchvision in a DataLoader, and timm's loader.

    python benchmarks/data_path.py [--threads 2] [--repeats 5] [--json FILE]

All three read the same 50,000 random 32 x 32 images from memory, do random crop with padding 4, horizontal flip and
normalising, and at 224 also a bicubic resize, on the same cores: ours with that many threads, the loaders with that
many workers (prefetching), each worker with one thread. They are timed in turn, and only one of them exists at a time:
workers of another would fill their queues meanwhile. A repeat is a few seconds after a warm-up that empties the queues.
On a GPU ours runs there, and the loaders' batches are copied to it.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torchvision import transforms as T

from cifar_dist.config import AugmentConfig, InputConfig
from cifar_dist.data.augment import Augment
from cifar_dist.distributed.group import keep_freed_memory
from cifar_dist.distributed.hardware import processor
from cifar_dist.ordering import epoch_order

COUNT, BATCH = 50_000, 256
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class InMemory(torch.utils.data.Dataset):
    """PIL images out of an array, as torchvision's CIFAR10 gives them."""

    transform: Callable[[Image.Image], torch.Tensor]

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def ours(images: np.ndarray, size: int, dtype: torch.dtype, _: int) -> Generator[torch.Tensor]:
    """Batches of cifar_dist."""
    data = torch.from_numpy(images).to(DEVICE)
    augment = Augment(AugmentConfig(), InputConfig(size, MEAN, STD, "bicubic"), 0, DEVICE, dtype)
    for epoch in range(1000):
        order = torch.from_numpy(epoch_order(COUNT, 0, epoch).copy()).to(DEVICE)
        for rows in order.split(BATCH)[:-1]:
            yield augment(data[rows], rows, epoch)


def torchvision(images: np.ndarray, size: int, dtype: torch.dtype, workers: int) -> Generator[torch.Tensor]:
    """The loop everyone writes."""
    steps = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
    steps += [] if size == 32 else [T.Resize(size, T.InterpolationMode.BICUBIC)]
    data = InMemory(images)
    data.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(MEAN, STD)])
    loader = torch.utils.data.DataLoader(
        data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    for _ in range(1000):
        for batch, _ in loader:
            yield batch.to(DEVICE, dtype)


def timm(images: np.ndarray, size: int, dtype: torch.dtype, workers: int) -> Generator[torch.Tensor]:
    """timm's loader, with its crop for small images and its prefetcher where there is a GPU."""
    loader = create_loader(
        InMemory(images),  # type: ignore[arg-type]
        (3, size, size),
        BATCH,
        is_training=True,
        no_aug=False,
        train_crop_mode="rkrc",
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        use_prefetcher=DEVICE.type == "cuda",
        device=DEVICE,
        persistent_workers=True,
    )
    for _ in range(1000):
        for batch, _ in loader:
            yield batch.to(DEVICE, dtype)


PATHS: dict[str, Callable[..., Generator[torch.Tensor]]] = {"ours": ours, "torchvision": torchvision, "timm": timm}


def rate(batches: Iterator[torch.Tensor], seconds: float) -> float:
    """Images/s over some seconds."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(batches))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def main() -> None:
    """Time the paths in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train.py does
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    rows = []
    print("size  dtype     ours      torchvision  timm      images/s (medians); ours / torchvision, ours / timm")
    for size in (32, 224):
        for dtype in (torch.float32, torch.bfloat16):
            found: dict[str, list[float]] = {name: [] for name in PATHS}
            for _ in range(args.repeats):
                for name, path in PATHS.items():
                    with closing(path(images, size, dtype, args.threads)) as batches:
                        rate(batches, args.seconds / 2)
                        found[name].append(rate(batches, args.seconds))
            medians = {name: statistics.median(rates) for name, rates in found.items()}
            name = str(dtype).removeprefix("torch.")
            ratios = [medians["ours"] / medians[other] for other in ("torchvision", "timm")]
            rows.append({"size": size, "dtype": name, "rates": found, "ratios": ratios})
            numbers = "  ".join(f"{medians[name]:9,.0f}" for name in PATHS)
            print(f"{size:4}  {name:8}  {numbers}      {ratios[0]:.1f}  {ratios[1]:.1f}", flush=True)
    if args.json:
        facts = {
            "hardware": torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor(),
            "threads": args.threads,
            "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
            "rows": rows,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
