"""The largest micro-batch that fits, with a memory that the test makes small."""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist.config import AugmentConfig, Config, InputConfig
from cifar_dist.errors import UsageError
from cifar_dist.training import micro_batch
from cifar_dist.training.micro_batch import smaller
from tests.ranks import Ranks
from tests.test_same_training import of, run

FLAGS = "--dataset digits --model test_vit --img-size 32 --wandb disabled --batch-size 48 --max-steps 3 --log-every 1"

INPUT = InputConfig(32, (0.5,) * 3, (0.5,) * 3, "bilinear")
PLAN = SimpleNamespace(batch_size=8, num_processes=1, micro_batch_size=8, memory=SimpleNamespace(optimizer=100))


class Tight(nn.Module):
    """Finds no room for more than `most` images at a time, as a GPU would say it."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __call__(self, module, inputs):
        if len(inputs[0]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def tight(most):
    """Every model has such a memory from now on."""
    nn.modules.module.register_module_forward_pre_hook(Tight(most))


@pytest.mark.parametrize("share, micro, expected", [(48, 48, 24), (48, 16, 8), (45, 45, 15), (7, 7, 1), (7, 1, None)])
def test_the_next_smaller_micro_batch_divides_the_share(share, micro, expected):
    assert smaller(share, micro) == expected


@pytest.mark.parametrize("share, micro, expected", [(100, 50, 20), (6, 6, 2), (50, 50, 10), (10, 2, None)])
def test_of_images_in_pairs_no_micro_batch_parts_two(share, micro, expected):
    assert smaller(share, micro, pairs=True) == expected


def test_what_torch_says_without_room():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert micro_batch.is_out_of_memory(error.value)
    assert not micro_batch.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_step_without_room_says_what_to_take(tmp_path):
    def work():
        tight(20)
        return run(*FLAGS.split(), "--batch-size", 25, "--run-dir", tmp_path)

    found = Ranks(work, 1)
    assert found.statuses == [2]
    assert "a step with 25 images at a time does not fit into memory; take --micro-batch-size 5," in found.said[0]
    assert "Traceback" not in found.said[0]


def test_a_step_of_mixed_images_without_room_says_what_to_take(tmp_path):
    def work():
        tight(30)
        return run(*FLAGS.split(), "--mixup", 0.2, "--batch-size", 50, "--run-dir", tmp_path)

    found = Ranks(work, 1)
    assert found.statuses == [2] and "take --micro-batch-size 10," in found.said[0]  # 25 would part a pair


@pytest.mark.parametrize("flag", ["--micro-batch-size=1", "--auto-micro-batch"])
def test_a_batch_norm_that_needs_two_images_says_so(tmp_path, flag):
    """test_resnet makes one value a channel of 32 pixels."""
    flags = [*FLAGS.replace("test_vit", "test_resnet").split(), "--batch-size", 4, "--run-dir", tmp_path]

    def work():
        if flag == "--auto-micro-batch":
            tight(1)
        return run(*flags, flag)

    found = Ranks(work, 1)
    assert found.statuses == [2] and "Traceback" not in found.said[0]
    assert "give every process two images or more at a time (--batch-size, --micro-batch-size)" in found.said[0]


def test_the_micro_batch_is_halved_until_every_process_has_room(tmp_path):
    """The training is that of the whole batch; process 1 has least room."""

    def work():
        tight(20 if os.environ["RANK"] == "0" else 7)
        return run(*FLAGS.split(), "--auto-micro-batch", "--run-dir", tmp_path / "tight")

    found = Ranks(work, 2).check()
    assert "micro-batch 6" in found.said[0] or "6 images" in found.said[0], found.said[0]
    Ranks(lambda: run(*FLAGS.split(), "--run-dir", tmp_path / "wide"), 1).check()
    assert of(tmp_path / "tight", "train/loss") == pytest.approx(of(tmp_path / "wide", "train/loss"), rel=1e-5)


@pytest.mark.parametrize("mixup, words", [(0.0, "one image fits"), (0.2, "2 images fit")])
def test_not_even_one_image(mixup, words):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    model.register_forward_pre_hook(Tight(0))
    with pytest.raises(UsageError, match=f"not even {words}"):
        micro_batch.fitting(Accelerator(cpu=True), model, INPUT, PLAN, Config(augment=AugmentConfig(mixup=mixup)))


def test_of_images_that_are_mixed_an_even_number_is_found():
    model, plan = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), SimpleNamespace(**vars(PLAN))
    plan.batch_size = plan.micro_batch_size = 100
    model.register_forward_pre_hook(Tight(30))
    mixed = Config(augment=AugmentConfig(cutmix=1.0))
    assert micro_batch.fitting(Accelerator(cpu=True), model, INPUT, plan, mixed) == 20


def test_trying_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3600, 2))
    before, random = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    assert micro_batch.fitting(Accelerator(cpu=True), model, INPUT, PLAN, Config()) == 8
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
