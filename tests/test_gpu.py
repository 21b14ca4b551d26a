"""What only an NVIDIA GPU can show, by ``make test-gpu``."""

import itertools
import math

import pytest
import torch
from timm.models.swin_transformer import WindowAttention
from torch import nn

from cifar_dist.config import OptimConfig
from cifar_dist.distributed.group import start
from cifar_dist.models.packed_attention import pack_attention
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


def attended(layer, tokens, mask, precision):
    """What comes out of a layer, and every gradient."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        out = layer(tokens, mask)
    out.backward(torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(out.dtype))
    return [out.detach(), tokens.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("size, heads, masks", [(7, 4, 4), (7, 3, 0), (4, 2, 8), (8, 1, 2)])
def test_window_attention_is_as_near_to_exact_as_timms_and_the_same_every_time(size, heads, masks):
    torch.manual_seed(0)
    area = size * size
    layer = WindowAttention(32 * heads, heads, window_size=size, device="cuda")
    nn.init.normal_(layer.relative_position_bias_table)
    tokens = torch.randn(48, area, 32 * heads, device="cuda")
    mask = torch.where(torch.rand(masks, area, area, device="cuda") < 0.3, -100.0, 0.0) if masks else None
    exact = attended(layer.double(), tokens.double(), None if mask is None else mask.double(), "exact")
    theirs = attended(layer.float(), tokens, mask, "bf16")
    pack_attention(nn.Sequential(layer))
    mine = attended(layer, tokens, mask, "bf16")
    for found, other, right in zip(mine, theirs, exact, strict=True):
        assert found.dtype == other.dtype
        assert 0 < (found - right).norm() < 1.2 * (other - right).norm() < 0.05 * right.norm()
    assert all(map(torch.equal, mine, attended(layer, tokens, mask, "bf16")))


@pytest.mark.filterwarnings(*TORCH_WARNINGS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_window_attention_compiled_is_that_of_its_layer(mode):
    torch.manual_seed(0)
    layer = WindowAttention(64, 2, window_size=7, device="cuda")
    pack_attention(nn.Sequential(layer))
    tokens, mask = torch.randn(8, 49, 64, device="cuda"), torch.zeros(4, 49, 49, device="cuda")
    plain = attended(layer, tokens, mask, "bf16")
    layer.compile(mode=mode, dynamic=False)
    for _ in range(3):  # a CUDA graph is recorded in the second
        found = [value.clone() for value in attended(layer, tokens, mask, "bf16")]
    for compiled, right in zip(found, plain, strict=True):
        torch.testing.assert_close(compiled, right, rtol=0.02, atol=0.02)
