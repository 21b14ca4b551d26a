"""What the plan says of images, and of a learning rate."""

import pytest
import torch

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig, ModelConfig
from cifar_dist.models import build_model
from cifar_dist.training.setup import device_lines, enlarging_lines, fine_tuning_lines, image_lines


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


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("vit_tiny", "--lr 1e-3", True),
        ("vit_tiny", "--lr 1e-4", False),
        ("vit_tiny", "--lr 1e-3 --layer-decay 0.75", False),
        ("vit_tiny", "--lr 1e-3 --freeze backbone", False),
        ("vit_tiny", "--lr 0.1 --opt sgd", False),
        ("resnet18", "--lr 1e-3", False),
    ],
)
def test_a_rate_by_which_a_transformer_forgets_is_said(model, flags, said):
    built = build_model(ModelConfig(model=model, img_size=32), 10)
    lines = [
        fine_tuning_lines(parse_command_line([*given, *flags.split()]).config, built)
        for given in (["--init-weights", "x.pth"], [])
    ]
    note = ["note        --lr 0.001 is high for a pretrained transformer, with AdamW usually 1e-5 to 1e-4"]
    assert lines == [note if said else [], []]


@pytest.mark.parametrize(
    ("device", "precision", "own", "noted"),
    [("cuda", "bf16", False, True), ("cuda", "bf16", True, False), ("cuda", "fp16", False, False)],
)
def test_a_gpu_older_than_bf16_is_said_to_be_slow_in_it(monkeypatch, device, precision, own, noted):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: own or including_emulation)
    first, *notes = device_lines(torch.device(device), precision, 2)
    assert first == f"device      Tesla T4, {precision}"
    slow = "note        Tesla T4 has no bf16 of its own, so it is slow; --precision fp16 suits it better"
    assert notes == [slow] * noted


@pytest.mark.parametrize(("count", "num_processes", "noted"), [(1, 1, False), (4, 1, True), (4, 4, False)])
def test_gpus_that_no_process_was_started_for_are_named(monkeypatch, count, num_processes, noted):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    _, *notes = device_lines(torch.device("cuda"), "fp32", num_processes)
    assert notes == ["note        one of 4 GPUs: torchrun --standalone --nproc-per-node 4 train.py … takes all"] * noted


@pytest.mark.parametrize(
    ("device", "seen", "said"),
    [("cpu", 224, "224 px are 49 times the work of 32 px"), ("cpu", 64, ""), ("cuda", 224, "")],
)
def test_what_enlarging_costs_a_cpu_is_said(device, seen, said):
    inputs = InputConfig(seen, (0.5,) * 3, (1.0,) * 3, "bicubic")
    lines = enlarging_lines(parse_command_line([]).config, inputs, torch.device(device))
    assert [line[12 : 12 + len(said)] for line in lines] == [said] * bool(said)
