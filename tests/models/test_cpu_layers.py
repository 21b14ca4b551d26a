"""In bf16 on a CPU: attention by plain products, which give what the fused kernel gives, and other convolutions."""

import pytest
import torch
from accelerate import Accelerator
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.functional import cross_entropy

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import ModelConfig
from cifar_dist.models import build_model
from cifar_dist.models.cpu_convolution import CpuConv2d, CpuConv2dSame
from cifar_dist.models.cpu_layers import use_cpu_layers
from cifar_dist.training import setup
from cifar_dist.training.precision import ComputeFormat, measure_formats
from tests.test_same_training import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def vit(monkeypatch):
    monkeypatch.delenv("TIMM_FUSED_ATTN", raising=False)
    torch.manual_seed(0)
    return build_model(ModelConfig(model="test_vit", img_size=64), 10)


def fused(model):
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


def test_only_in_bf16_and_only_on_a_cpu(vit):
    layers = len(fused(vit))
    assert fused(vit) == [True] * layers
    for other in ((CPU, "fp32"), (CUDA, "bf16")):
        use_cpu_layers(vit, *other)
        assert fused(vit) == [True] * layers
    undo = use_cpu_layers(vit, CPU, "bf16")
    assert fused(vit) == [False] * layers
    use_cpu_layers(vit, CPU, "bf16")()  # nothing is left to set back
    assert fused(vit) == [False] * layers
    undo()
    assert fused(vit) == [True] * layers


def test_convolutions_are_changed_and_set_back():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Conv2dSame(8, 8, 3, stride=2), StdConv2d(8, 8, 3))
    keys, before = list(model.state_dict()), [type(layer) for layer in model]
    for other in ((CPU, "fp32"), (CUDA, "bf16")):
        use_cpu_layers(model, *other)
        assert [type(layer) for layer in model] == before
    undo = use_cpu_layers(model, CPU, "bf16")
    assert [type(layer) for layer in model] == [CpuConv2d, CpuConv2dSame, StdConv2d]
    assert list(model.state_dict()) == keys
    undo()
    assert [type(layer) for layer in model] == before


def gradient(vit, images, bf16):
    vit.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = vit(images).float()
    cross_entropy(logits, torch.arange(len(images)) % 10).backward()
    return torch.cat([parameter.grad.flatten() for parameter in vit.parameters()])


def test_the_gradient_is_as_near_to_that_in_fp32(vit):
    images = torch.randn(16, 3, 64, 64)
    exact, fused_one = gradient(vit, images, bf16=False), gradient(vit, images, bf16=True)
    use_cpu_layers(vit, CPU, "bf16")
    plain = gradient(vit, images, bf16=True)
    assert not torch.equal(plain, fused_one)
    assert 0 < (plain - exact).norm() < 1.2 * (fused_one - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("precision, expected", [("bf16", False), ("fp32", True)])
def test_training_uses_it(tmp_path, monkeypatch, precision, expected):
    """From before memory is tried (--auto-micro-batch) on."""
    monkeypatch.delenv("TIMM_FUSED_ATTN", raising=False)
    seen, fitting = [], setup.fitting
    monkeypatch.setattr(setup, "fitting", lambda *given: seen.append(fused(given[1])) or fitting(*given))
    flags = "--dataset digits --model test_vit --img-size 32 --wandb disabled --max-steps 1 --auto-micro-batch"
    run(*flags.split(), "--precision", precision, "--run-dir", tmp_path / "run")
    assert set(seen[0]) == {expected}


def test_formats_are_compared_as_they_would_train(vit, monkeypatch):
    seen = {}
    forward = vit.forward

    def noted(images):
        seen.setdefault(torch.is_autocast_enabled("cpu"), set()).update(fused(vit))
        return forward(images)

    monkeypatch.setattr(vit, "forward", noted)
    flags = ["--model", "test_vit", "--img-size", "64", "--precision", "auto", "--batch-size", "2"]
    rates = measure_formats(parse_command_line(flags).config, vit, Accelerator(cpu=True))
    assert ComputeFormat("bf16", False) in rates
    assert seen == {False: {True}, True: {False}}
    assert set(fused(vit)) == {True}
