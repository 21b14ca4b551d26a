"""What only an NVIDIA GPU can show, by ``make test-gpu``."""

import itertools
import math

import pytest
import torch
from torch import nn

from cifar_dist.config import OptimConfig
from cifar_dist.distributed.group import start
from cifar_dist.models.patches import PatchConv2d
from cifar_dist.optim import fuse, make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.training.batches import Batch
from cifar_dist.training.engine import Stepper, train_step
from tests.conftest import TORCH_WARNINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
STEPS, BATCH = 6, 256


def trained(opt, spoiled, graphs):
    """Everything that STEPS steps leave behind, of which the spoiled ones are not finite."""
    torch.manual_seed(0)
    accelerator = start("bf16")
    device = accelerator.device
    pixels = torch.randn(STEPS, BATCH, 3, 32, 32, device=device)
    pixels[spoiled, 0, 0, 0, 0] = math.nan
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 10)).to(device)
    if graphs:
        model.compile(mode="reduce-overhead")
    parallel = Replicated(accelerator, model, fuse(make_optimizer(model, OptimConfig(opt=opt, lr=0.01))), 1.0)
    stepper, labels = Stepper(parallel, 0.1), torch.arange(BATCH, device=device) % 10
    weights = torch.full((BATCH,), 1 / BATCH, device=device)
    verdicts = [train_step(stepper, [Batch(images, labels, labels, weights, last=True)])[1].bad for images in pixels]
    assert verdicts == [step in spoiled for step in range(STEPS)]
    states = (state.values() for state in parallel.optimizer.state.values())
    found = itertools.chain(model.state_dict().values(), *states, [torch.cuda.get_rng_state(device)])
    return [value.clone() for value in found if isinstance(value, torch.Tensor)]


@pytest.mark.filterwarnings(*TORCH_WARNINGS)
@pytest.mark.parametrize("opt, graphs", [("adamw", False), ("adamw", True), ("momentum", False), ("lamb", False)])
@pytest.mark.parametrize("spoiled", [[0], [1, 2], [5]])
def test_a_step_that_the_device_refuses_leaves_what_the_host_would(fresh_accelerate, monkeypatch, opt, graphs, spoiled):
    by_device = trained(opt, spoiled, graphs)
    monkeypatch.setattr(Replicated, "update_unless", lambda self, refused: False)
    by_host = trained(opt, spoiled, graphs)
    assert all(value.isfinite().all() for value in by_device)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(by_device, by_host, strict=True))


def test_patches_by_a_product_are_as_near_to_fp32_as_by_a_convolution():
    torch.manual_seed(0)
    conv, images = nn.Conv2d(3, 192, 16, stride=16).cuda(), torch.randn(8, 3, 224, 224, device="cuda")
    exact = nn.functional.conv2d(images.double(), conv.weight.double(), conv.bias.double(), conv.stride)
    errors = []
    for kind in (nn.Conv2d, PatchConv2d):
        conv.__class__ = kind
        with torch.autocast("cuda", torch.bfloat16):
            found = conv(images)
        assert found.dtype == torch.bfloat16
        assert found.shape == exact.shape
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert 0 < errors[1] < 1.2 * errors[0] < 0.01
