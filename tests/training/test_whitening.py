"""A first layer that is computed from the training images."""

import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cifar_dist.config import ModelConfig
from cifar_dist.data.resident import ResidentSet
from cifar_dist.data.stream import StreamSet
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model, input_config
from cifar_dist.training.whitening import IMAGES, whiten
from tests.ranks import Ranks
from tests.test_same_training import run

CONFIG = ModelConfig(model="airbench94")


@pytest.fixture
def accelerator(fresh_accelerate):
    return Accelerator(cpu=True)


class Data:
    def __init__(self, train):
        self.train = train


def images(count):
    """Neighbouring pixels are alike, as in photographs."""
    rough = torch.rand(count, 8, 8, 3, generator=torch.Generator().manual_seed(0)).mul(255)
    smooth = torch.nn.functional.interpolate(rough.permute(0, 3, 1, 2), size=32, mode="bilinear")
    return smooth.permute(0, 2, 3, 1).to(torch.uint8)


@pytest.fixture(scope="module")
def resident():
    """The first half of it is darker than the second."""
    count = 2 * IMAGES
    pixels = images(count)
    pixels[:IMAGES] //= 2
    return Data(ResidentSet(pixels, torch.zeros(count, dtype=torch.int64), torch.arange(count)))


def test_patches_leave_the_layer_uncorrelated_and_of_equal_variance(resident, accelerator):
    """By numpy, over the patches of the images that it was made from."""
    model = build_model(CONFIG, 10)
    whiten(model, resident, CONFIG, accelerator)
    input = input_config(model, CONFIG)
    pixels = (resident.train.images[::2].numpy() / 255.0 - input.mean) / input.std
    corners = [pixels[:, y : 31 + y, x : 31 + x] for y in (0, 1) for x in (0, 1)]
    patches = np.stack(corners, -1).reshape(-1, 12)  # channel, then row and column of the patch
    filters = model.whitening.weight.detach().double().numpy().reshape(24, 12)
    found = patches @ filters[:12].T
    second_moments = found.T @ found / len(found)
    np.testing.assert_allclose(second_moments - np.diag(np.diag(second_moments)), 0, atol=1e-3)
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(np.sort(np.diag(second_moments)), np.sort(variances / (variances + 5e-4)), rtol=1e-3)
    assert np.linalg.cond(patches.T @ patches) > 100  # there was something to whiten
    np.testing.assert_array_equal(filters[12:], -filters[:12])
    assert not model.whitening.weight.requires_grad
    assert not model.whitening.bias.requires_grad


def test_a_convolution_is_what_the_filters_say(resident, accelerator):
    model = build_model(CONFIG, 10)
    whiten(model, resident, CONFIG, accelerator)
    image = torch.rand(1, 3, 32, 32)
    patch = image[0, :, 4:6, 7:9].flatten()
    expected = model.whitening.weight.flatten(1) @ patch
    torch.testing.assert_close(model.whitening(image)[0, :, 4, 7], expected)


def test_other_models_and_given_weights_stay(resident, accelerator):
    whiten(build_model(ModelConfig(model="cnn4"), 10), resident, ModelConfig(model="cnn4"), accelerator)
    model = build_model(CONFIG, 10)
    before = model.whitening.weight.clone()
    whiten(model, resident, ModelConfig(model="airbench94", init_weights="file.safetensors"), accelerator)
    assert torch.equal(model.whitening.weight, before)


def test_a_stream_has_no_images_to_look_at(accelerator):
    with pytest.raises(UsageError, match="--data-mode stream"):
        whiten(build_model(CONFIG, 10), Data(StreamSet.__new__(StreamSet)), CONFIG, accelerator)


def test_all_processes_have_the_first_ones_layer(resident):
    def work():
        accelerator = start("fp32")
        model, rank = build_model(CONFIG, 10), int(os.environ["RANK"])
        data = Data(resident.train.take(torch.arange(100 * rank, IMAGES + 100 * rank)))  # as another machine's signs
        whiten(model, data, CONFIG, accelerator)
        return model.whitening.weight.tolist()

    first, second = Ranks(work, 2).check().results
    assert first == second


def test_train_py_whitens_and_does_not_train_the_layer(tmp_path):
    flags = ["--dataset", "digits", "--model", "airbench94", "--wandb", "disabled", "--opt", "nmuon", "--lr", "0.02"]
    for max_steps in (1, 2):
        run(*flags, "--max-steps", max_steps, "--run-dir", tmp_path / "run", "--resume", "auto")
    from safetensors.torch import load_file

    weights = [load_file(path / "model.safetensors") for path in sorted(tmp_path.glob("run/checkpoints/step-*"))]
    assert len(weights) == 2
    first, last = (found["whitening.weight"] for found in weights)
    assert torch.equal(first, last)
    assert torch.equal(first[:12], -first[12:])
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])
