"""--preview-augment through train.py, on digits."""

import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import train
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig
from cifar_dist.data import load_training_data
from cifar_dist.distributed.ending import run_main
from cifar_dist.errors import UsageError
from cifar_dist.ordering import global_batch
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.training.batches import ResidentBatches
from cifar_dist.training.preview import check_preview

TILE, GAP, LINE = 96, 4, 12
FLAGS = "--dataset digits --model cnn4 --batch-size 48 --wandb disabled --crop-padding 0 --hflip 0"


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def sheet(monkeypatch, path, flags=""):
    """The tiles of a sheet, (8, 8, 32, 32, 3): rows are images, columns the original and epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    argv = ["train.py", *shlex.split(FLAGS), *shlex.split(flags), "--preview-augment", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    run_main(train.main)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    tiles = np.empty((8, 8, 32, 32, 3), np.uint8)
    for row in range(8):
        for column in range(8):
            top, left = LINE + GAP + row * (TILE + 2 * LINE + GAP), GAP + column * (TILE + GAP)
            tiles[row, column] = pixels[top + 1 : top + TILE : 3, left + 1 : left + TILE : 3]
    return tiles


def test_the_sheet_shows_originals_and_what_training_sees(monkeypatch, tmp_path):
    tiles = sheet(monkeypatch, tmp_path / "plain.png")
    data = load_training_data(parse_command_line(shlex.split(FLAGS)).config.data, 2**40)
    first = sorted(data.train.labels.tolist().index(label) for label in range(10))[:8]  # an image of each class
    assert np.array_equal(tiles[:, 0], data.train.images[first].numpy())
    assert (tiles[:, 1:] == tiles[:, :1]).all()  # nothing is augmented, so every epoch shows the original
    assert list(tmp_path.iterdir()) == [tmp_path / "plain.png"]  # and no run has begun


def test_the_sheet_shows_every_epochs_own_augmentation(monkeypatch, tmp_path):
    flips = sheet(monkeypatch, tmp_path / "flips.png", "--hflip 0.5 --flip-mode alternating")
    mirrored = (flips[:, 1:] == flips[:, :1, :, ::-1]).all((2, 3, 4))
    assert (mirrored[:, 1:] != mirrored[:, :-1]).all()
    mixed = sheet(monkeypatch, tmp_path / "mixed.png", "--cutmix 1")
    own = (mixed[:, 1:] == mixed[:, :1]).all(-1).mean((2, 3))
    assert 0.4 < own.mean() < 0.98 and len(np.unique(own)) > 20  # other shares of each image in each epoch


def test_a_mixed_image_is_the_one_that_training_sees(monkeypatch, tmp_path):
    """By the batches of a whole run, of any micro-batch."""

    flags = "--mixup 0.8 --aa rand-m9-mstd0.5-inc1 --mean 0 0 0 --std 1 1 1"
    tiles = sheet(monkeypatch, tmp_path / "mixed.png", flags)
    config = parse_command_line(shlex.split(f"{FLAGS} {flags}")).config
    train_set = load_training_data(config.data, 2**40).train
    plan = make_plan(config, Sizes(len(train_set), 0, None, 10, 0, 0, 0, 0), 1)
    accelerator = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    parallel = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    batches = ResidentBatches(train_set, config, plan, InputConfig(32, (0,) * 3, (1,) * 3, "bilinear"), parallel)
    found, shown = 0, sorted(train_set.labels.tolist().index(label) for label in range(10))[:8]
    for step in range(plan.steps_per_epoch):
        rows = global_batch(len(train_set), 48, 0, step).rows
        for place in np.flatnonzero(np.isin(rows, shown)):
            image = next(batches(step)).images[place].permute(1, 2, 0) * 255
            if step * 48 + place < len(train_set):
                assert np.array_equal(tiles[shown.index(rows[place]), 1], image.round().to(torch.uint8).numpy())
                found += 1
    assert found == 8


@pytest.mark.parametrize(
    "name, said",
    [("sheet.jpg", "name it .png"), ("missing/sheet.png", "name a file in a folder that exists"), ("x.png/", "cannot")],
)
def test_a_sheet_that_cannot_be_written_is_refused_in_one_line(tmp_path, name, said):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UsageError, match=said):
        check_preview(tmp_path / name)
