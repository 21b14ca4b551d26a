"""The CIFAR-native models: published sizes, shapes, and that timm's tools work on them."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.nn import functional as F

from cifar_dist.config import ModelConfig
from cifar_dist.models import NATIVE, build_model, count_parameters

BN = 2  # weights a channel of BatchNorm


def _cnn4_by_hand():
    convs = sum(9 * i * o + o + BN * o for i, o in ((3, 32), (32, 64), (64, 128), (128, 128)))
    return convs + (512 * 256 + 256) + (256 * 10 + 10)


def _wrn28_10_by_hand():
    total, channels = 27 * 16, 16
    for wide in (160, 320, 640):
        for _ in range(4):
            total += BN * channels + 9 * channels * wide + BN * wide + 9 * wide * wide
            total += channels * wide if channels != wide else 0
            channels = wide
    return total + BN * 640 + 640 * 10 + 10


def _vit_by_hand():
    d, tokens = 384, 64 + 1
    block = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + 2 * (d * d + d)
    return (48 * d + d) + d + tokens * d + 7 * block + 2 * d + 10 * d + 10


def _dla34_by_hand():
    stock = sum(p.numel() for p in timm.create_model("dla34", num_classes=10).parameters())
    return stock - 3 * 16 * (49 - 9)


def _airbench94_by_hand(second=256):
    layers = ((24, 64), (64, 64), (64, second), (second, second), (second, 256), (256, 256))
    return (24 * 12 + 24) + sum(9 * i * o + BN * o for i, o in layers) + 256 * 10


PARAMETERS = {
    "airbench94": _airbench94_by_hand,
    "airbench94_narrow": lambda: _airbench94_by_hand(128),
    "cnn4": _cnn4_by_hand,
    "wrn28_10": _wrn28_10_by_hand,
    "vit_small_cifar": _vit_by_hand,
    "dla34_cifar": _dla34_by_hand,
    "resnet18_cifar": lambda: 11_173_962,  # the counts that users of the 3x3-stem ResNets quote
    "resnet34_cifar": lambda: 21_282_122,
    "resnet50_cifar": lambda: 23_520_842,
}
FIXED = {
    name: 24 * 12 + 24 + 2 * (64 + second + 256) for name, second in (("airbench94", 256), ("airbench94_narrow", 128))
}  # not trained: the whitening layer, BatchNorm's factors
FEATURES = {
    "airbench94": (256, 3, 3),
    "airbench94_narrow": (256, 3, 3),
    "cnn4": (128, 2, 2),
    "wrn28_10": (640, 8, 8),
    "vit_small_cifar": (65, 384),
    "dla34_cifar": (512, 4, 4),
    "resnet18_cifar": (512, 4, 4),
    "resnet34_cifar": (512, 4, 4),
    "resnet50_cifar": (2048, 4, 4),
}
SMALL = ("airbench94", "cnn4", "resnet18_cifar", "vit_small_cifar")


@pytest.fixture(scope="module")
def native():
    """Each native model with 10 classes, built once; a test that changes one builds its own."""
    torch.manual_seed(0)
    return {name: build_model(ModelConfig(model=name), 10) for name in NATIVE}


def test_every_native_model_is_tested():
    assert set(NATIVE) == set(PARAMETERS) == set(FEATURES)
    assert set(NATIVE) <= set(timm.list_models())


@pytest.mark.parametrize("name", NATIVE)
def test_parameter_count(native, name):
    assert count_parameters(native[name]) == (PARAMETERS[name](), PARAMETERS[name]() - FIXED.get(name, 0))


def test_published_sizes_in_millions(native):
    assert round(count_parameters(native["wrn28_10"])[0] / 1e6, 1) == 36.5
    assert round(count_parameters(native["resnet18_cifar"])[0] / 1e6, 2) == 11.17
    assert round(count_parameters(native["vit_small_cifar"])[0] / 1e6, 1) == 6.3


@pytest.mark.parametrize("name", NATIVE)
def test_shapes_at_32_px(native, name):
    model = native[name].eval()
    with torch.no_grad():
        features = model.forward_features(torch.zeros(2, 3, 32, 32))
        assert tuple(features.shape) == (2, *FEATURES[name])
        assert tuple(model.forward_head(features).shape) == (2, 10)
        assert tuple(model.forward_head(features, pre_logits=True).shape) == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", [n for n in NATIVE if n.startswith(("resnet", "dla", "wrn"))])
def test_stem_is_3x3_and_keeps_32_px(native, name):
    model = native[name].eval()
    stem = model.get_submodule(model.default_cfg["first_conv"])
    assert stem.kernel_size == (3, 3) and stem.stride == (1, 1)
    sizes = {info["module"]: 32 // info["reduction"] for info in model.feature_info}
    seen = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out.shape[-1]))
        for n in sizes
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    assert seen == sizes and max(seen.values()) == 32


def _plain_cnn4(dropout):
    layers = []
    for i, o in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, 10))


@pytest.mark.parametrize("training", [False, True])
def test_cnn4_equals_plain_pytorch(training):
    model, plain = build_model(ModelConfig(model="cnn4"), 10), _plain_cnn4(0.5)
    own = list(model.state_dict().values())
    assert [v.shape for v in own] == [v.shape for v in plain.state_dict().values()]
    plain.load_state_dict(dict(zip(plain.state_dict(), own, strict=True)))
    images = torch.randn(8, 3, 32, 32)
    outputs = []
    for net in (model, plain):
        net.train(training)
        torch.manual_seed(1)
        outputs.append(net(images))
    assert torch.equal(*outputs)


def test_resnet_cifar_equals_timms_with_the_stem_swapped(native):
    stock = timm.create_model("resnet18", num_classes=10)
    stock.conv1, stock.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    stock.load_state_dict(native["resnet18_cifar"].state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(stock.eval()(images), native["resnet18_cifar"].eval()(images))


def test_wrn_block_by_its_formula(native):
    block, x = native["wrn28_10"].eval().stages[1][0], torch.randn(2, 160, 8, 8)
    act = F.relu(block.bn1(x))
    expected = block.conv2(F.relu(block.bn2(block.conv1(act)))) + block.shortcut(act)
    assert torch.allclose(block(x), expected)
    assert expected.shape == (2, 320, 4, 4)


@pytest.mark.parametrize(("drop", "expected"), [(None, 0.3), (0.1, 0.1), (0.0, 0.0)])
def test_wrn_dropout_is_its_own_unless_told(drop, expected):
    model = build_model(ModelConfig(model="wrn28_10", drop=drop), 10)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [expected] * 12


@pytest.mark.parametrize("name", NATIVE)
def test_layer_decay_slows_earlier_layers(native, name):
    model = native[name]
    model.requires_grad_(True)
    scale = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        for p in group["params"]
    }
    scales = [scale[id(p)] for p in model.parameters()]
    stem = scale[id(model.get_submodule(model.default_cfg["first_conv"]).weight)]
    assert all(scale[id(p)] == 1.0 for p in model.get_classifier().parameters())
    assert stem == min(scales) < 0.1
    assert len(set(scales)) >= 5
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == set(scales)


def test_layers_of_cnn4_for_layer_decay(native):
    layers = timm.models.group_parameters(native["cnn4"], native["cnn4"].group_matcher())
    firsts = [names[0] for _, names in sorted(layers.items())]
    assert firsts == [*(f"blocks.{i}.0.weight" for i in range(4)), "hidden.weight", "fc.weight"]


@pytest.mark.parametrize("name", [n for n in NATIVE if n not in ("dla34_cifar", "vit_small_cifar")])
def test_layer_decay_follows_the_depth(native, name):
    groups = timm.models.group_parameters(native[name], native[name].group_matcher(), reverse=True)
    depths = [groups[n] for n, _ in native[name].named_parameters() if n in groups]
    assert depths == sorted(depths)


@pytest.mark.parametrize("name", NATIVE)
def test_reset_classifier(name):
    model = build_model(ModelConfig(model=name), 10).eval()
    model.reset_classifier(7)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
        model.reset_classifier(0)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.head_hidden_size)


def test_export_folder_loads_back_bit_equal(tmp_path, native):
    for name in SMALL:
        model = native[name].eval()
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization=True)
        again = build_model(ModelConfig(model=f"local-dir:{tmp_path / name}", pretrained=True), 10).eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images), again(images))


@pytest.mark.parametrize("name", NATIVE)
def test_one_batch_can_be_learned(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, drop=0.0), 10)
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert losses[0] < 5 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", NATIVE)
def test_bf16_autocast_in_channels_last(native, name):
    model = native[name].eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(images)
    assert rough.dtype == torch.bfloat16
    assert torch.allclose(rough.float(), exact, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("name", SMALL)
def test_compiles_as_one_graph(native, name):
    torch._dynamo.reset()
    model, images = native[name].eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images), model(images))
