"""Convolutions in bf16 on a CPU: torch's results, and gradients that are torch's but for their rounding."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.functional import conv2d, cross_entropy

from cifar_dist.config import ModelConfig
from cifar_dist.models import build_model, cpu_convolution
from cifar_dist.models.cpu_convolution import CpuConv2d, CpuConv2dSame
from cifar_dist.models.cpu_layers import use_cpu_layers
from tests.test_same_training import run

SHAPES = [  # channels, depth, groups, kernel, stride, padding, height, width; the gradients that are ours
    (128, 129, 1, 3, 1, 1, 4, 4, "dense_weight_gradient"),
    (129, 128, 1, 3, 2, 1, 9, 7, "dense_weight_gradient"),  # 5 x 4 positions
    (128, 128, 1, 1, 1, 0, 5, 5, "dense_weight_gradient"),
    (128, 128, 1, 1, 2, 0, 8, 8, "dense_weight_gradient"),  # a rest that no kernel reaches
    (256, 257, 1, 3, 1, 1, 7, 7, "dense_weight_gradient"),
    (128, 128, 1, 4, 4, 0, 18, 17, "dense_weight_gradient"),
    (128, 128, 1, 3, 1, 1, 6, 6, ""),
    (128, 128, 1, 3, 1, 1, 2, 13, ""),
    (255, 256, 1, 3, 1, 1, 6, 6, ""),
    (256, 256, 1, 3, 1, 1, 5, 10, ""),
    (127, 512, 1, 3, 1, 1, 4, 4, ""),
    (6, 6, 6, 3, 1, 1, 8, 6, ""),
    (6, 6, 6, 3, 1, 1, 3, 2, ""),
    (6, 6, 6, 3, 1, 1, 2, 6, "low_depthwise_weight_gradient"),
    (6, 6, 6, 3, 1, 1, 1, 1, "low_depthwise_weight_gradient"),
    (6, 6, 6, 2, 1, 1, 1, 3, "low_depthwise_weight_gradient"),
    (6, 6, 6, 3, 1, 0, 3, 3, ""),
    (6, 6, 6, 3, 2, 1, 3, 4, "depthwise_input_gradient low_depthwise_weight_gradient"),
    (6, 6, 6, 3, 3, 1, 4, 4, "depthwise_input_gradient low_depthwise_weight_gradient"),
    (6, 6, 6, 5, 1, 2, 8, 6, "depthwise_weight_gradient"),
    (6, 6, 6, 7, 1, 3, 3, 5, "depthwise_weight_gradient"),  # larger than the image
    (6, 6, 6, 5, 1, 0, 8, 9, "depthwise_weight_gradient"),
    (6, 6, 6, 4, 1, 2, 8, 9, "depthwise_weight_gradient"),
    (6, 6, 6, 3, 2, 1, 8, 9, "depthwise_input_gradient"),
    (6, 6, 6, 3, 2, 0, 9, 8, "depthwise_input_gradient"),
    (6, 6, 6, 1, 2, 0, 9, 8, "depthwise_input_gradient"),
    (6, 6, 6, 5, 2, 2, 9, 8, "depthwise_input_gradient depthwise_weight_gradient"),
    (6, 6, 6, 5, 3, 1, 11, 13, "depthwise_input_gradient depthwise_weight_gradient"),
    (6, 6, 6, 7, 4, 3, 16, 19, "depthwise_input_gradient depthwise_weight_gradient"),
    (6, 6, 3, 5, 2, 2, 4, 4, ""),  # neither dense nor depthwise
    (6, 12, 6, 5, 2, 2, 4, 4, ""),
    (12, 6, 6, 5, 1, 2, 4, 4, ""),
]


FARTHER = {  # how many times as far as torch's from the exact gradient
    "dense_weight_gradient": 1.2,
    "depthwise_input_gradient": 1.2,
    "depthwise_weight_gradient": 4,
    "low_depthwise_weight_gradient": 1.01,
}
CPU = torch.device("cpu")


@pytest.fixture
def called(monkeypatch):
    names = []
    for name in FARTHER:
        own = getattr(cpu_convolution, name)
        monkeypatch.setattr(cpu_convolution, name, lambda *given, name=name, own=own: names.append(name) or own(*given))
    return names


def far(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[:-1])))
def test_gradients(shape, layout, called):
    """Inputs have a mean, as after ReLU. How much farther than torch's from the exact ones is said in `FARTHER`."""
    torch.manual_seed(0)
    channels, depth, groups, kernel, stride, padding, height, width, ours = shape
    layer = nn.Conv2d(channels, depth, kernel, stride, padding, groups=groups).to(memory_format=layout).bfloat16()
    images = torch.rand(4, channels, height, width).to(torch.bfloat16, memory_format=layout).requires_grad_()
    tensors = (images, layer.weight, layer.bias)
    expected = layer(images)
    direction = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, tensors, direction)
    doubles = [each.detach().double().requires_grad_() for each in tensors]
    exact = torch.autograd.grad(conv2d(*doubles, stride, padding, groups=groups), doubles, direction.double())

    layer.__class__ = CpuConv2d
    found = layer(images)
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found, tensors, direction)
    assert sorted(called) == sorted(ours.split())
    bound = max([FARTHER[name] for name in ours.split()], default=1)
    for gradient, tensor, their, right in zip(gradients, tensors, theirs, exact, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == torch.bfloat16
        assert far(gradient, right) <= max(bound * far(their, right), 0.003), (far(gradient, right), far(their, right))
    for gradient, tensor in zip(gradients[1:], tensors[1:], strict=True):
        assert gradient.stride() == tensor.stride()  # as DDP wants it


def test_only_what_is_asked_for_is_computed(called):
    layer = CpuConv2d(6, 6, 5, 2, 2, groups=6).bfloat16()
    images = torch.randn(4, 6, 8, 8, dtype=torch.bfloat16)
    layer(images).sum().backward()
    assert called == ["depthwise_weight_gradient"] and images.grad is None
    layer.requires_grad_(False)
    layer(images.requires_grad_()).sum().backward()
    assert called[1:] == ["depthwise_input_gradient"] and images.grad is not None
    layer.bias.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "convolution_backward", lambda *_: pytest.fail("computes the weight's, too"))
        layer(images).sum().backward()
    assert called[2:] == ["depthwise_input_gradient"]
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, 2 * 4 * 16))
    dense = CpuConv2d(128, 128, 3, padding=1).bfloat16().requires_grad_(False)
    dense(torch.randn(2, 128, 4, 4, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert len(called) == 3


@pytest.mark.parametrize(
    "kernel, size, ours", [(5, 8, "depthwise_weight_gradient"), (3, 3, "low_depthwise_weight_gradient")]
)
def test_the_gradient_has_a_gradient(called, kernel, size, ours):
    """That of its square, as torch has it."""
    layer = CpuConv2d(6, 6, kernel, 2, kernel // 2, groups=6).bfloat16()
    images = torch.rand(4, 6, size, size, dtype=torch.bfloat16)
    found = []
    for kind in (CpuConv2d, nn.Conv2d):
        layer.__class__ = kind
        (gradient,) = torch.autograd.grad(layer(images).square().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), layer.weight)[0])
    assert called == [ours] * 2
    assert far(found[0], found[1].double()) < 0.01


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel, ours", [(5, True), (4, False)])
def test_padding_in_words(padding, kernel, ours, called):
    layer, images = nn.Conv2d(6, 6, kernel, padding=padding, groups=6).bfloat16(), torch.randn(2, 6, 9, 9).bfloat16()
    expected = layer(images)
    expected.square().sum().backward()
    theirs, layer.weight.grad = layer.weight.grad, None
    layer.__class__ = CpuConv2d
    assert torch.equal(layer(images), expected)
    layer(images).square().sum().backward()
    assert called == ["depthwise_weight_gradient"] * (ours or padding == "valid")
    assert far(layer.weight.grad, theirs.double()) < 0.005


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": (5, 7)}, {"stride": (1, 2)}, {"padding": (1, 2)}, {"dilation": 2}, {"padding_mode": "reflect"},
        {"padding": 5},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_torchs(settings, called):
    layer = CpuConv2d(6, 6, **{"kernel_size": 5, "padding": 1, "groups": 6} | settings).bfloat16()
    layer(torch.randn(2, 6, 12, 12, dtype=torch.bfloat16)).sum().backward()
    assert called == []


@pytest.mark.parametrize("of_images, of_layer, under", [
    ("float32", "float32", None), ("float64", "float64", "bfloat16"), ("float32", "float32", "float16"),
])  # fmt: skip
def test_types_that_are_torchs(of_images, of_layer, under, called):
    layer = CpuConv2d(6, 6, 5, groups=6).to(getattr(torch, of_layer))
    with torch.autocast("cpu", getattr(torch, under or "bfloat16"), enabled=under is not None):
        found = layer(torch.randn(2, 6, 8, 8, dtype=getattr(torch, of_images)))
    found.float().sum().backward()
    assert called == []
    assert found.dtype == getattr(torch, under if under == "float16" else of_images)


def test_a_mix_of_types_is_refused_as_by_torch():
    with pytest.raises(RuntimeError, match="should be the same"):
        CpuConv2d(6, 6, 5, groups=6)(torch.randn(2, 6, 8, 8, dtype=torch.bfloat16))


def test_an_image_without_a_batch(called):
    layer = CpuConv2d(6, 6, 5, groups=6).bfloat16()
    layer(torch.randn(6, 8, 8, dtype=torch.bfloat16)).sum().backward()
    assert called == []


def test_compiled_layers_are_torchs(called):
    layer, images = CpuConv2d(6, 6, 5, groups=6).bfloat16(), torch.randn(2, 6, 8, 8, dtype=torch.bfloat16)
    torch.compile(layer, backend="eager", fullgraph=True)(images).sum().backward()
    assert called == [] and layer.weight.grad is not None


@pytest.mark.parametrize("dilation", [1, 2])
def test_tensorflows_padding(dilation, called):
    layer = Conv2dSame(6, 6, 5, stride=2, groups=6, dilation=dilation)
    ours, images = copy.deepcopy(layer), torch.randn(4, 6, 9, 8)
    ours.__class__ = CpuConv2dSame
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = layer(images), ours(images)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert called == ["depthwise_weight_gradient"] * (dilation == 1)
    assert layer.weight.grad.dtype == ours.weight.grad.dtype == torch.float32
    assert far(ours.weight.grad, layer.weight.grad.double()) < 0.005


def passes(model, images, bf16):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(images).float()
    cross_entropy(logits, torch.arange(len(images)) % 10).backward()
    return logits, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "tf_efficientnet_lite0", "cnn4"])
def test_a_models_gradient_is_torchs_but_for_rounding(name, called):
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64) if name != "cnn4" else torch.randn(16, 3, 32, 32)
    model = build_model(ModelConfig(model=name, drop=0, drop_path=0), 10)
    nn.init.normal_(model.get_classifier().weight, std=0.05)  # timm's head of an EfficientNet begins at zero
    undo = use_cpu_layers(model, CPU, "bf16")
    ours_in_fp32, (logits, ours) = passes(model, images, bf16=False), passes(model, images, bf16=True)
    assert called
    before = len(called)
    undo()
    in_fp32, (their_logits, theirs) = passes(model, images, bf16=False), passes(model, images, bf16=True)
    assert len(called) == before
    assert all(map(torch.equal, ours_in_fp32, in_fp32))  # torch's own
    assert torch.equal(logits, their_logits)
    exact = in_fp32[1].double()
    assert not torch.equal(ours, theirs)
    # On a CPU without AVX-512 torch's own are rounded in between.
    assert far(ours, theirs.double()) < 0.005 or far(ours, exact) < 1.01 * far(theirs, exact)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_uses_them(tmp_path, precision, called):
    flags = "--dataset digits --model cnn4 --wandb disabled --max-steps 1 --batch-size 8"
    run(*flags.split(), "--precision", precision, "--run-dir", tmp_path / "run")
    assert called == ["dense_weight_gradient"] * (precision == "bf16")  # of cnn4's layers the last
