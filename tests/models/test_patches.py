"""Patches as a matrix product against torch's convolution."""

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cifar_dist.config import ModelConfig
from cifar_dist.models import NATIVE, build_model
from cifar_dist.models.patches import PatchConv2d, as_product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height, width", [(32, 32), (35, 46)])  # the second leaves rows and columns over
@pytest.mark.parametrize("patch", [8, (4, 16)])
def test_a_product_gives_the_convolution_and_its_gradients(bias, layout, height, width, patch):
    conv = nn.Conv2d(3, 7, patch, stride=patch, bias=bias, dtype=torch.float64)
    found = []
    for way in (conv, lambda pixels: as_product(conv, pixels)):
        images = torch.randn(4, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        images = images.contiguous(memory_format=layout).requires_grad_()
        conv.zero_grad()
        out = way(images)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        found.append([out, images.grad, *(parameter.grad for parameter in conv.parameters())])
    for theirs, mine in zip(*found, strict=True):
        assert theirs.shape == mine.shape
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "name, patches",
    [
        ("test_vit", ["patch_embed.proj"]),
        ("swin_tiny_patch4_window7_224", ["patch_embed.proj"]),
        ("vit_small_cifar", ["patch_embed.proj"]),
        ("test_convnext", []),
        ("cnn4", []),
    ],
)
def test_only_a_patch_embedding_is_changed_and_weights_keep_their_names(name, patches):
    model = build_model(ModelConfig(model=name), 10)
    assert [key for key, module in model.named_modules() if isinstance(module, PatchConv2d)] == patches
    if name not in NATIVE:
        assert model.state_dict().keys() == timm.create_model(name, num_classes=10).state_dict().keys()


@pytest.mark.parametrize("enabled", [True, False])
def test_on_a_gpu_it_is_the_product_under_autocast_and_the_convolution_without(cuda_autocast, enabled):
    """Told by the strides, on a GPU that is made up: a product's patches have their channels last."""
    cuda_autocast(enabled)
    with FakeTensorMode():
        conv = nn.Conv2d(3, 16, 4, stride=4, device="cuda")
        conv.__class__ = PatchConv2d
        patches = conv(torch.empty(2, 3, 32, 32, device="cuda"))
    assert patches.shape == (2, 16, 8, 8)
    assert patches.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert patches.is_contiguous() != enabled


def test_on_a_cpu_it_is_the_convolution():
    model = build_model(ModelConfig(model="test_vit"), 10)
    images = torch.randn(2, 3, 160, 160)
    layer = model.patch_embed.proj
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), nn.functional.conv2d(images, layer.weight, layer.bias, layer.stride))
