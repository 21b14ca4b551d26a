"""Patches as a matrix product against torch's convolution."""

import pytest
import timm
import torch
from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.models import build_model
from cifar_dist.models.patches import PatchConv2d, as_product


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height, width", [(32, 32), (35, 46)])  # the second leaves rows and columns over
def test_a_product_gives_the_convolution_and_its_gradients(bias, layout, height, width):
    conv = nn.Conv2d(3, 7, 8, stride=8, bias=bias, dtype=torch.float64)
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
    [("test_vit", ["patch_embed.proj"]), ("test_convnext", ["stem.0"]), ("test_resnet", []), ("cnn4", [])],
)
def test_only_what_cuts_images_is_changed_and_weights_keep_their_names(name, patches):
    model = build_model(ModelConfig(model=name), 10)
    assert [key for key, module in model.named_modules() if isinstance(module, PatchConv2d)] == patches
    if name != "cnn4":
        assert model.state_dict().keys() == timm.create_model(name, num_classes=10).state_dict().keys()


def test_without_autocast_on_a_gpu_it_is_the_convolution():
    model = build_model(ModelConfig(model="test_vit"), 10)
    images = torch.randn(2, 3, 160, 160)
    layer = model.patch_embed.proj
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), nn.functional.conv2d(images, layer.weight, layer.bias, layer.stride))
