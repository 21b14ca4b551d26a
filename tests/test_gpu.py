"""What only an NVIDIA GPU can show, by ``make test-gpu``."""

import math

import psutil
import pytest
import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torch._inductor.async_compile import AsyncCompile

from cifar_dist.config import OptimConfig
from cifar_dist.distributed.group import start
from cifar_dist.models.compilation import compile_model
from cifar_dist.models.packed_attention import pack_attention
from cifar_dist.models.patches import PatchConv2d
from cifar_dist.optim import fuse, make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery.stop_request import SIGNALS, unheard_by_children
from cifar_dist.training.batches import Batch
from cifar_dist.training.engine import Stepper, train_step
from tests.conftest import TORCH_WARNINGS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
STEPS, BATCH = 6, 256
NO_CONTEXT = "ignore:Attempting to run cuBLAS, but there was no current CUDA context"  # a backward pass in a new thread


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
        compile_model(model, "reduce-overhead")
    parallel = Replicated(accelerator, model, fuse(make_optimizer(model, OptimConfig(opt=opt, lr=0.01))), 1.0)
    stepper, labels = Stepper(parallel, 0.1), torch.arange(BATCH, device=device) % 10
    weights = torch.full((BATCH,), 1 / BATCH, device=device)
    refused = [train_step(stepper, [Batch(images, labels, weights, last=True)])[1].refused for images in pixels]
    assert refused == [step in spoiled for step in range(STEPS)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = model.state_dict() | {"random": torch.cuda.get_rng_state(device)}
    for parameter, state in parallel.optimizer.state.items():
        found |= {f"{key} of {names[parameter]}": value for key, value in state.items() if torch.is_tensor(value)}
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.filterwarnings(*TORCH_WARNINGS)
@pytest.mark.parametrize("opt, graphs", [("adamw", False), ("adamw", True), ("momentum", False), ("lamb", False)])
@pytest.mark.parametrize("spoiled", [[0], [1, 2], [5]])
def test_a_step_that_the_device_refuses_leaves_what_the_host_would(fresh_accelerate, monkeypatch, opt, graphs, spoiled):
    by_device = trained(opt, spoiled, graphs)
    monkeypatch.setattr(Replicated, "update_unless", lambda self, refused: False)
    by_host = trained(opt, spoiled, graphs)
    assert [name for name, value in by_device.items() if not value.isfinite().all()] == []
    assert by_device.keys() == by_host.keys()
    assert [name for name, value in by_device.items() if not torch.equal(value, by_host[name])] == []


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


def attended(layer, tokens, mask, dtype):
    """What comes out of a layer under autocast, and every gradient; without it for float64."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float64):
        out = layer(tokens, mask)
    out.backward(torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(out.dtype))
    return [out.detach(), tokens.grad, *(parameter.grad for parameter in layer.parameters())]


def windows(size, masks, windows):
    """Tokens of windows, and a layer for them."""
    torch.manual_seed(0)
    layer, area = WindowAttention(64, 2, window_size=size, device="cuda"), size * size
    nn.init.normal_(layer.relative_position_bias_table)
    mask = torch.where(torch.rand(masks, area, area, device="cuda") < 0.3, -100.0, 0.0) if masks else None
    return layer, torch.randn(windows, area, 64, device="cuda"), mask


def images(tokens):
    """Tokens of images, and a layer for them."""
    torch.manual_seed(0)
    return Attention(192, 3, qkv_bias=True, device="cuda"), torch.randn(8, tokens, 192, device="cuda"), None


@pytest.mark.filterwarnings(NO_CONTEXT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make, given", [(windows, (7, 4, 1200)), (windows, (4, 0, 48)), (images, (197,)), (images, (256,))]
)
def test_packed_attention_is_as_near_to_exact_as_timms_and_the_same_every_time(make, given, dtype):
    layer, tokens, mask = make(*given)
    exact = attended(layer.double(), tokens.double(), None if mask is None else mask.double(), torch.float64)
    theirs = attended(layer.float(), tokens, mask, dtype)
    pack_attention(nn.Sequential(layer))
    mine = attended(layer, tokens, mask, dtype)
    for found, other, right in zip(mine, theirs, exact, strict=True):
        assert found.dtype == other.dtype
        assert 0 < (found - right).norm() < 1.2 * (other - right).norm() < 0.05 * right.norm()
    assert all(map(torch.equal, mine, attended(layer, tokens, mask, dtype)))


@pytest.mark.filterwarnings(NO_CONTEXT, *TORCH_WARNINGS)
@pytest.mark.parametrize("make, given", [(windows, (7, 4, 1200)), (images, (197,))])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_packed_attention_compiled_is_that_of_its_layer_and_repeats_itself(make, given, mode):
    layer, tokens, mask = make(*given)
    pack_attention(nn.Sequential(layer))
    plain = attended(layer, tokens, mask, torch.bfloat16)
    compile_model(layer, mode)
    passes = []
    for _ in range(3):  # a CUDA graph is recorded in the second
        passes.append([value.clone() for value in attended(layer, tokens, mask, torch.bfloat16)])
    for compiled, right in zip(passes[0], plain, strict=True):
        assert (compiled - right).norm() < 0.01 * right.norm()
    for later in passes[1:]:
        assert all(map(torch.equal, later, passes[0]))


def test_the_compilers_processes_outlive_what_asks_the_training_to_stop():
    with unheard_by_children():
        compile_model(nn.Linear(2, 2).cuda(), "default")
    pool = AsyncCompile.process_pool()
    assert pool.submit(math.sqrt, 4).result(60) == 2
    for child in psutil.Process().children(recursive=True):
        for number in SIGNALS:
            child.send_signal(number)
    assert pool.submit(math.sqrt, 9).result(60) == 3
