"""--precision auto: what was measured to be the fastest is trained with, by every process, and stays."""

import os

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist.command_line import load_config, parse_command_line
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model
from cifar_dist.training import precision
from cifar_dist.training.precision import ComputeFormat, fastest
from tests.ranks import Ranks
from tests.test_same_training import of, run

FLAGS = "--dataset digits --model cnn4 --img-size 32 --wandb disabled --batch-size 48 --max-steps 3 --log-every 1"
FP32, BF16 = ComputeFormat("fp32", False), ComputeFormat("bf16", False)
FP32_NHWC, BF16_NHWC = ComputeFormat("fp32", True), ComputeFormat("bf16", True)


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
    monkeypatch.setattr(precision, "measure_formats", lambda *_: rates)


@pytest.mark.parametrize("chosen", [BF16_NHWC, FP32_NHWC, FP32])
def test_a_run_is_the_one_that_asks_for_what_was_found(tmp_path, monkeypatch, chosen):
    measured_as(monkeypatch, {FP32: 1, chosen: 2})
    run(*FLAGS.split(), "--precision", "auto", "--run-dir", tmp_path / "auto")
    explicit = ["--precision", chosen.precision, "--channels-last" if chosen.channels_last else "--no-channels-last"]
    run(*FLAGS.split(), *explicit, "--run-dir", tmp_path / "explicit")
    assert of(tmp_path / "auto", "train/loss") == of(tmp_path / "explicit", "train/loss")
    saved, expected = (load_config(tmp_path / name / "config.yaml") for name in ("auto", "explicit"))
    assert (saved.run.precision, saved.model) == (expected.run.precision, expected.model)


def test_the_choice_changes_the_training(tmp_path, monkeypatch):
    """Or the test above could not fail."""
    for name, chosen in (("fp32", FP32), ("bf16", BF16)):
        measured_as(monkeypatch, {chosen: 1})
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
        precision.measure_formats = lambda *_: rates
        return run(*FLAGS.split(), "--precision", "auto", "--run-dir", tmp_path / "auto")

    Ranks(work, 2).check()
    Ranks(lambda: run(*FLAGS.split(), "--precision", "bf16", "--run-dir", tmp_path / "bf16"), 2).check()
    assert of(tmp_path / "auto", "train/loss") == of(tmp_path / "bf16", "train/loss")


def test_processes_with_unlike_clocks_make_as_many_passes(tmp_path):
    """SyncBatchNorm talks to the others in each: else all would wait."""

    def work():
        precision.STEP_SECONDS = [0.0, 1e9][int(os.environ["RANK"])]
        flags = ["--precision", "auto", "--sync-bn", "--ddp-timeout", "20", "--run-dir", tmp_path / "run"]
        return run(*FLAGS.split(), *flags)

    assert Ranks(work, 2).check().statuses == [0, 0]


class Tight(nn.Module):
    """A model without room for more than `most` images, as torch says it."""

    def __init__(self, most):
        super().__init__()
        self.weight, self.most, self.seen = nn.Parameter(torch.ones(3072, 2)), most, []
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.seen.append(len(images))
        return images.flatten(1) @ self.weight


def test_what_does_not_fit_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(precision, "STEP_SECONDS", 1e9)
    config, model = parse_command_line([*FLAGS.split(), "--precision", "auto"]).config, Tight(10)
    precision.measure_formats(config, model, Accelerator(cpu=True))
    assert model.seen[:6] == [2, 2, 4, 4, 8, 8]
    assert set(model.seen[6:]) == {8}
    with pytest.raises(UsageError, match="not even two images fit into memory"):
        precision.measure_formats(config, Tight(1), Accelerator(cpu=True))


def test_a_slow_first_pass_is_not_taken_for_a_slow_model(monkeypatch):
    """As on an H100, where all formats were compared by two images at a time, 50 images/s of thousands."""
    seen = []

    def passed(model, device, inputs, count, each):
        first = count not in seen
        seen.append(count)
        return 5.0 if first else 1e-3 * count

    monkeypatch.setattr(precision, "_seconds", passed)
    config = parse_command_line([*FLAGS.split(), "--precision", "auto"]).config
    precision.measure_formats(config, Tight(1), Accelerator(cpu=True))
    assert seen[-1] == config.run.batch_size


def test_a_batch_norm_that_is_given_one_pixel_an_image():
    config = parse_command_line(
        ["--model", "resnet18", "--img-size", "32", "--batch-size", "4", "--precision", "auto"]
    ).config
    model = build_model(config.model, 10)
    assert min(precision.measure_formats(config, model, Accelerator(cpu=True)).values()) > 0


def test_a_plan_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(precision, "measure_formats", None)
    run(*FLAGS.split(), "--precision", "auto", "--plan")
    assert "precision   auto: measured when a training begins" in capsys.readouterr().out


def test_measuring_tries_all_chosens_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 2))
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    config = parse_command_line([*FLAGS.split(), "--precision", "auto"]).config
    assert list(precision.measure_formats(config, model, Accelerator(cpu=True))) == [FP32, FP32_NHWC, BF16, BF16_NHWC]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.is_contiguous() for parameter in model.parameters())
    nhwc = parse_command_line([*FLAGS.split(), "--precision", "auto", "--channels-last"]).config
    assert list(precision.measure_formats(nhwc, model, Accelerator(cpu=True))) == [FP32_NHWC, BF16_NHWC]
