"""Milliseconds of each augmentation for a batch, ours against the references' on PIL images; one thread each.

    python benchmarks/augment_speed.py --data DIR_WITH_HUB_PARQUET [--repeats 21]

Both get the same training images, already decoded, in turn, and only augment: no normalising. timm's RandAugment may
ask PIL for no bits at all, which new versions of PIL refuse; such an image counts as done.
"""

import argparse
import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import PIL
import timm
import torch
import torchvision
from PIL import Image
from timm.data import rand_augment_transform
from torchvision.transforms import v2

from cifar_dist.config import DataConfig
from cifar_dist.data import load_training_data
from cifar_dist.data.augment.policy import ColourJitter, RandAugment, TrivialAugment
from cifar_dist.data.resident import ResidentSet
from cifar_dist.policy_string import parse_policy

POLICY = "rand-m9-mstd0.5-inc1"
BATCH, SIZE = 512, 32


Policy = RandAugment | TrivialAugment | ColourJitter


def ours(policy: Policy, images: torch.Tensor, ids: torch.Tensor, epoch: int) -> None:
    """All layers of `policy` on a copy of `images`."""
    done, fill = images.clone(), torch.full((3,), 125, dtype=torch.uint8)
    for number in range(policy.num_layers):
        policy.layer(number, ids, epoch, SIZE).apply_(done, fill)


def theirs(transform: Callable[[Image.Image], Image.Image], images: list[Image.Image]) -> None:
    """`transform` on one image after another."""
    for image in images:
        with contextlib.suppress(ValueError):
            transform(image)


def main() -> None:
    """Time each pair in turn and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train = load_training_data(DataConfig(dataset=arguments.data, data_mode="resident"), device_bytes=2**40).train
    assert isinstance(train, ResidentSet)
    images, ids = train.images[:BATCH].clone(), train.ids[:BATCH]
    pictures = [Image.fromarray(image) for image in images.numpy()]
    parsed = parse_policy(POLICY)
    assert parsed is not None
    rows: dict[str, tuple[Policy, Callable[[Image.Image], Image.Image]]] = {
        POLICY: (RandAugment(parsed, 0), rand_augment_transform(POLICY, {"img_mean": (125,) * 3})),
        "trivial": (TrivialAugment(0), v2.TrivialAugmentWide()),
        "colour jitter 0.4": (ColourJitter(0.4, 0), v2.ColorJitter(0.4, 0.4, 0.4)),
    }
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__},"
          f" torchvision {torchvision.__version__}, timm {timm.__version__}, Pillow {PIL.__version__}")  # fmt: skip
    for name, (policy, transform) in rows.items():
        times: tuple[list[float], list[float]] = ([], [])
        for epoch in range(arguments.repeats):
            began = time.perf_counter()
            ours(policy, images, ids, epoch)
            between = time.perf_counter()
            theirs(transform, pictures)
            times[0].append(1e3 * (between - began))
            times[1].append(1e3 * (time.perf_counter() - between))
        mine, other = map(statistics.median, times)
        print(f"{name}: ours {mine:.1f} ms ({min(times[0]):.1f} at best), reference {other:.1f} ms"
              f" ({min(times[1]):.1f} at best), {other / mine:.2f} times")  # fmt: skip


if __name__ == "__main__":
    main()
