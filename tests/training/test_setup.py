"""What the plan says of images."""

import pytest

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.training.setup import image_lines


@pytest.mark.parametrize(
    ("flags", "size", "images", "augment"),
    [
        ("", 32, "32 px, mean 0.5 0.4 0.3333, std 1 2 3", "crop padding 4, hflip 0.5"),
        (
            "--crop-padding 0 --hflip 0 --crop-mode reflect --remode pixel --mixup-prob 0.5",
            32,
            "32 px, mean",
            "  nothing",
        ),
        ("--scale 0.08 1 --crop-padding 0", 48, "32 px, resized to 48 px", "scale 0.08 1, hflip 0.5"),
        ("--crop-padding 0 --hflip 0", 32, "32 px, mean", "nothing"),
        ("--data-size 64 --mixup 0.2", 224, "64 px, resized to 224 px (bicubic), mean", "hflip 0.5, mixup 0.2"),
        ("--crop-mode reflect --aa rand-m9", 16, "32 px, resized to 16 px", "crop mode reflect, hflip 0.5, aa rand-m9"),
    ],
)
def test_sizes_and_every_augmentation_that_is_on_are_said(flags, size, images, augment):
    inputs = InputConfig(size, (0.5, 0.4, 1 / 3), (1.0, 2.0, 3.0), "bicubic")
    first, second = image_lines(parse_command_line(flags.split()).config, inputs)
    assert first.startswith(f"images      {images}")
    assert second.startswith("augment     ") and second.endswith(augment)
