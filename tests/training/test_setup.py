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


@pytest.fixture
def gpus(monkeypatch):
    """Make a machine with GPUs of these names, which know bf16 or emulate it."""

    def make(names, own_bf16=True):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: names[getattr(at, "index", at) or 0])
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: own_bf16 or including_emulation
        )

    return make


def config_of(*flags):
    return parse_command_line(list(flags)).config


@pytest.mark.parametrize(
    ("precision", "own", "noted"), [("bf16", False, True), ("bf16", True, False), ("fp16", False, False)]
)
def test_a_gpu_older_than_bf16_is_said_to_emulate_it(gpus, precision, own, noted):
    gpus(["Tesla T4"], own)
    first, *notes = device_lines(config_of("--precision", precision), torch.device("cuda"), 1)
    assert first == f"device      Tesla T4, {precision}"
    slow = "note        Tesla T4 has no bf16 of its own, and emulates it; --precision fp16 may be faster"
    assert notes == [slow] * noted


@pytest.mark.parametrize(
    ("names", "num_processes", "batch", "noted"),
    [
        (["L4"], 1, 128, False),
        (["L4"] * 4, 1, 128, True),
        (["L4"] * 4, 4, 128, False),
        (["L4"] * 4, 1, 129, False),
        (["L4", "T400"], 1, 128, False),
        (["L4", "T400", "L4", "L4", "L4"], 1, 128, True),
    ],
)
def test_gpus_that_no_process_was_started_for_are_named(gpus, names, num_processes, batch, noted):
    gpus(names)
    _, *notes = device_lines(config_of("--batch-size", str(batch)), torch.device("cuda"), num_processes)
    said = "note        one of 4 such GPUs: torchrun --standalone --nproc-per-node 4 train.py … takes all"
    assert notes == [said] * noted


@pytest.mark.parametrize("switch", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compiling_that_is_switched_off_is_said_to_do_nothing(monkeypatch, switch):
    asked, cpu = config_of("--compile"), torch.device("cpu")
    assert len(device_lines(asked, cpu, 1)) == 1
    monkeypatch.setenv(switch, "1")
    assert len(device_lines(config_of(), cpu, 1)) == 1
    assert device_lines(asked, cpu, 1)[1:] == [f"note        --compile does nothing: {switch} is 1"]


def test_devices_are_called_what_they_are():
    assert device_lines(config_of(), torch.device("xpu"), 1) == ["device      xpu, fp32"]


@pytest.mark.parametrize(
    ("device", "seen", "said"),
    [("cpu", 224, "224 px are 49 times the work of 32 px"), ("cpu", 64, ""), ("cuda", 224, "")],
)
def test_what_enlarging_costs_a_cpu_is_said(device, seen, said):
    inputs = InputConfig(seen, (0.5,) * 3, (1.0,) * 3, "bicubic")
    lines = enlarging_lines(parse_command_line([]).config, inputs, torch.device(device))
    assert [line[12 : 12 + len(said)] for line in lines] == [said] * bool(said)
