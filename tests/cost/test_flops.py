"""FLOPs against hand counts and the figures that papers quote, peaks against what the chips are made of."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from cifar_dist.cost.flops import Flops, Peak, count_flops, mfu

VIT, SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"
CUDA = torch.device("cuda")
MEASURED = Peak(1.0, "measured here")


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=10)


def test_convolutions_and_linear_layers_by_hand():
    """Strides, padding and groups; what has no products counts nothing."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 5, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10), nn.Softmax(1),
    )  # fmt: skip
    macs = 8 * 3 * 9 * 16 * 16 + 12 * 2 * 25 * 12 * 12 + 12 * 10
    assert count_flops(model, 32) == Flops(2 * macs, 0)
    assert count_flops(model, 32).macs == count_flops(model, 32).macs_without_attention == macs


@pytest.fixture(params=["fused", "unfused"])
def attention(request):
    set_fused_attn(request.param == "fused", experimental=True)
    yield
    set_fused_attn(True)


def test_vit_by_hand_with_fused_and_unfused_attention(attention):
    tokens, width, blocks = 14 * 14 + 1, 768, 12
    patches = 14 * 14 * (3 * 16 * 16) * width
    block = tokens * (width * 3 * width + width * width + 2 * width * 4 * width)
    products = 2 * tokens * tokens * width
    found = count_flops(on_meta(VIT), 224)
    assert found.attention == 2 * blocks * products
    assert found.macs_without_attention == patches + blocks * block + width * 10
    assert found.macs == found.macs_without_attention + blocks * products


def test_windows_of_swin_by_hand_with_fused_and_unfused_attention(attention):
    """Each of a window's 49 tokens attends to 49."""
    stages = [(56, 128, 2), (28, 256, 2), (14, 512, 18), (7, 1024, 2)]
    products = sum(blocks * side * side * 49 * 2 * width for side, width, blocks in stages)
    assert count_flops(on_meta(SWIN), 224).attention == 2 * products


def quoted(model):
    """Multiply-adds as thop has them: 4 more for an element of a LayerNorm, and 3 n - 1 for a Softmax module's row."""
    more = 0

    def count(module, inputs, output):
        nonlocal more
        if isinstance(module, nn.LayerNorm):
            more += 4 * output.numel()
        elif isinstance(module, nn.Softmax):
            more += 3 * output.numel() - output.numel() // output.shape[-1]

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    return more


@pytest.mark.parametrize("name, parameters, giga", [(VIT, "85.81", "16.86"), (SWIN, "86.75", "15.17")])
def test_the_figures_that_papers_quote(name, parameters, giga):
    model = on_meta(name)
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}" == parameters
    found = count_flops(model, 224)
    assert f"{(found.macs_without_attention + quoted(model)) / 1e9:.2f}" == giga
    assert f"{found.macs_without_attention / 1e9:.2f}" in Flops.__doc__ and f"{found.macs / 1e9:.2f}" in Flops.__doc__


class Awkward(nn.Module):
    """A frozen layer and table on tensors that are not contiguous, and a parameter that is a module's input."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, 3))
        self.table = nn.Parameter(torch.zeros(8, 7), requires_grad=False)
        self.norm, self.linear = nn.LayerNorm(3), nn.Linear(3, 5, bias=False).requires_grad_(False)

    def forward(self, images):
        positions = (images.permute(0, 3, 1, 2) @ self.table).sum()
        query = self.norm(self.query.expand(1, -1, -1)).sum()
        return self.linear(images.permute(0, 2, 3, 1)).sum((1, 2)) + positions + query


def test_a_linear_layer_is_never_taken_for_attention():
    assert count_flops(Awkward(), 8) == Flops(2 * 8 * 8 * 3 * (5 + 7), 0)


def test_the_model_stays_as_it_is():
    model = timm.create_model("test_vit", num_classes=10, img_size=32).train()
    model.patch_embed.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    count_flops(model, 32)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert trained == [parameter.requires_grad for parameter in model.parameters()]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_mfu_by_hand():
    """Two devices of 3 kFLOP/s; 100 images/s of 10 FLOPs forward and 20 backward."""
    assert mfu(Flops(10, 4), 100, 2, Peak(3000, "")) == pytest.approx(100 * 30 / 6000)
