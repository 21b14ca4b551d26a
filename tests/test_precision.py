"""--precision auto: what was measured to be the fastest is trained with, by every process, and stays."""

import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist import precision
from cifar_dist.command_line import load_config, parse_command_line
from cifar_dist.precision import Way, fastest
from tests.ranks import Ranks
from tests.test_same_training import of, run

FLAGS = "--dataset digits --model cnn4 --img-size 32 --wandb disabled --batch-size 48 --max-steps 3 --log-every 1"
FP32, BF16, FP32_NHWC, BF16_NHWC = (Way(name, layout) for layout in (False, True) for name in ("fp32", "bf16"))


@pytest.mark.parametrize(
    "rates, expected",
    [
        ({FP32: 100, FP32_NHWC: 90, BF16: 60, BF16_NHWC: 70}, FP32),
        ({FP32: 100, FP32_NHWC: 150, BF16: 60, BF16_NHWC: 70}, FP32_NHWC),
        ({FP32: 100, FP32_NHWC: 150, BF16: 300, BF16_NHWC: 290}, BF16),
        ({FP32: 100, BF16: 104}, FP32),  # not worth other roundings
    ],
)
def test_the_fastest_is_taken_if_it_is_worth_it(rates, expected):
    assert fastest(rates) == expected


def measured_as(monkeypatch, rates):
    monkeypatch.setattr(precision, "measure", lambda *_: rates)


@pytest.mark.parametrize("way", [BF16_NHWC, FP32_NHWC, FP32])
def test_a_run_is_the_one_that_asks_for_what_was_found(tmp_path, monkeypatch, way):
    measured_as(monkeypatch, {FP32: 1, way: 2})
    run(*FLAGS.split(), "--precision", "auto", "--run-dir", tmp_path / "auto")
    explicit = ["--precision", way.precision, "--channels-last" if way.channels_last else "--no-channels-last"]
    run(*FLAGS.split(), *explicit, "--run-dir", tmp_path / "explicit")
    assert of(tmp_path / "auto", "train/loss") == of(tmp_path / "explicit", "train/loss")
    saved, expected = (load_config(tmp_path / name / "config.yaml") for name in ("auto", "explicit"))
    assert (saved.run.precision, saved.model) == (expected.run.precision, expected.model)


def test_the_choice_changes_the_training(tmp_path, monkeypatch):
    """Or the test above could not fail."""
    for name, way in (("fp32", FP32), ("bf16", BF16)):
        measured_as(monkeypatch, {way: 1})
        run(*FLAGS.split(), "--precision", "auto", "--run-dir", tmp_path / name)
    assert of(tmp_path / "fp32", "train/loss") != of(tmp_path / "bf16", "train/loss")


def test_a_run_goes_on_with_what_it_began_with(tmp_path, monkeypatch):
    flags = [*FLAGS.split(), "--precision", "auto", "--resume", "auto"]
    for max_steps, rates in ((2, {FP32: 1, BF16_NHWC: 2}), (3, {FP32: 2, BF16_NHWC: 1})):
        measured_as(monkeypatch, rates)
        run(*flags, "--max-steps", max_steps, "--run-dir", tmp_path / "cut")
    run(*FLAGS.split(), "--precision", "bf16", "--channels-last", "--run-dir", tmp_path / "whole")
    assert of(tmp_path / "cut", "train/loss") == of(tmp_path / "whole", "train/loss")


def test_the_first_process_decides_for_all(tmp_path):
    def work():
        rates = [{FP32: 1, BF16: 2}, {FP32: 2, BF16: 1}][int(os.environ["RANK"])]
        precision.measure = lambda *_: rates
        return run(*FLAGS.split(), "--precision", "auto", "--run-dir", tmp_path / "auto")

    Ranks(work, 2).check()
    Ranks(lambda: run(*FLAGS.split(), "--precision", "bf16", "--run-dir", tmp_path / "bf16"), 2).check()
    assert of(tmp_path / "auto", "train/loss") == of(tmp_path / "bf16", "train/loss")


def test_measuring_tries_all_ways_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 2))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    config = parse_command_line([*FLAGS.split(), "--precision", "auto"]).config
    assert list(precision.measure(config, model, Accelerator(cpu=True))) == [FP32, FP32_NHWC, BF16, BF16_NHWC]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())
    nhwc = parse_command_line([*FLAGS.split(), "--precision", "auto", "--channels-last"]).config
    assert list(precision.measure(nhwc, model, Accelerator(cpu=True))) == [FP32_NHWC, BF16_NHWC]
