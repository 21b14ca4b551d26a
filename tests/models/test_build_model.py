"""build_model's flags other than weights, freezing, and the input a model expects."""

import copy
import json
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn
from torch.nn import functional as F

from cifar_dist.config import InputConfig, ModelConfig
from cifar_dist.errors import UsageError
from cifar_dist.models import (
    NATIVE,
    build_model,
    count_parameters,
    head_parameter_names,
    input_config,
    resolve_name,
)


def _error(num_classes=10, **settings):
    with pytest.raises(UsageError) as caught:
        build_model(ModelConfig(**settings), num_classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_seed_decides_the_weights():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model(ModelConfig(model="cnn4"), 10).fc.weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_image_size_reaches_models_of_one_size():
    assert build_model(ModelConfig(model="vit_tiny", img_size=32), 5).patch_embed.grid_size == (2, 2)
    assert build_model(ModelConfig(model="vit_small_cifar", img_size=64), 5).patch_embed.grid_size == (16, 16)
    assert build_model(ModelConfig(model="cnn4", img_size=64), 5).hidden.in_features == 128 * 4 * 4


def test_any_image_size_suits_a_convolutional_model():
    small, large = (build_model(ModelConfig(model="resnet18_cifar", img_size=size), 5) for size in (32, 96))
    assert [p.shape for p in small.parameters()] == [p.shape for p in large.parameters()]


def test_patches_that_overlap_ask_for_no_multiple():
    assert build_model(ModelConfig(model="pvt_v2_b0", img_size=32), 10)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_size_check_leaves_the_model_as_built():
    states = []
    for size in (None, 32):
        torch.manual_seed(0)
        model = build_model(ModelConfig(model="resnet18_cifar", img_size=size), 5)
        states.append(model.state_dict())
        assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ("vit_tiny", 225, "multiple of its patch size 16, such as 224"),
        ("cnn4", 33, "multiple of 16"),
        ("vit_tiny", 8, "vit_tiny"),
        ("squeezenet_none", 32, "no such model"),
        ("inception_v3", 32, "leave --img-size out, or take another (its own is 299)"),
    ],
)
def test_image_size_refused(model, size, said):
    message = _error(model=model, img_size=size)
    assert said in message
    assert message.startswith("--img-size" if "no such" not in said else "--model")


def test_rates_reach_the_model():
    model = build_model(ModelConfig(model="vit_small_cifar", drop=0.2, drop_path=0.1), 10)
    assert model.head_drop.p == 0.2
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@register_model
def toy_without_rates(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    """A model that takes nothing but its classes."""

    class Toy(nn.Linear):
        def __init__(self, num_classes):
            super().__init__(3, num_classes)

    return Toy(**kwargs)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"model": "cnn4", "drop_path": 0.1}, "--drop-path 0.1"),
        ({"model": "dla34_cifar", "drop_path": 0.1}, "--drop-path 0.1"),
        ({"model": "wrn28_10", "drop_path": 0.1}, "--drop-path 0.1"),
        ({"model": "toy_without_rates", "drop": 0.1}, "--drop 0.1"),
    ],
)
def test_rate_that_the_model_lacks(settings, flag):
    assert _error(**settings).startswith(flag)


def test_no_rate_is_none_where_the_model_takes_none(tmp_path):
    save_file(build_model(ModelConfig(model="cnn4"), 4).state_dict(), tmp_path / "weights.safetensors")
    for weights in (None, str(tmp_path / "weights.safetensors")):
        model = build_model(ModelConfig(model="cnn4", drop=0.0, drop_path=0.0, init_weights=weights), 4)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
        assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))


def test_an_encoder_is_no_classifier():
    assert _error(model="toy_without_rates") == (
        "--model toy_without_rates: it has no classifier (get_classifier()); take another."
    )


LARGE_HEADS = ["tf_efficientnet_lite0", "dla34", "mnasnet_small", "mobilenetv3_small_100"]


@pytest.mark.parametrize("name", [*LARGE_HEADS, "resnet18", "vit_tiny_patch16_224", "caformer_s18"])
def test_a_training_from_scratch_begins_near_the_loss_of_equal_classes(name):
    """As timm draws them the first two begin at losses of 7.3 and 5.8; the others' heads stay as they are drawn."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(model=name, img_size=64), 10)
    logits = model(torch.randn(8, 3, 64, 64))
    loss = F.cross_entropy(logits, torch.arange(8))
    assert loss.item() == pytest.approx(math.log(10), rel=0.2) and logits.any() == (name not in LARGE_HEADS)
    loss.backward()
    gradients = [model.get_parameter(name).grad for name in head_parameter_names(model)]
    assert max(gradient.norm() for gradient in gradients if gradient is not None) > 0.01
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    drawn = dict(timm.create_model(name, num_classes=10, **size).named_parameters())
    changed = {key for key, value in model.named_parameters() if not value.equal(drawn[key])}
    head = {key for key in head_parameter_names(model) if drawn[key].any()}
    assert changed == (head if name in LARGE_HEADS else set())


def test_a_head_that_its_description_does_not_name_is_zero_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "tf_efficientnet_lite0", "num_classes": 10}))
    model = build_model(ModelConfig(model=f"local-dir:{tmp_path}"), 10)
    assert not model.classifier.weight.any() and not model.classifier.bias.any()


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_models_first_loss_is_near_that_of_equal_classes(name):
    torch.manual_seed(0)
    logits = build_model(ModelConfig(model=name), 10)(torch.randn(8, 3, 32, 32))
    assert F.cross_entropy(logits, torch.arange(8)).item() == pytest.approx(math.log(10), rel=0.2)


def test_every_classifier_of_a_frozen_model_is_trained():
    """VOLO adds half of a second classifier's logits; a frozen random one would spoil the probe."""
    model = build_model(ModelConfig(model="volo_d1_224", freeze="backbone", img_size=64), 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}


@pytest.mark.parametrize("name", ["resnet18_cifar", "vit_small_cifar", "cnn4", "deit_tiny_distilled_patch16_224"])
def test_frozen_backbone(name):
    config = ModelConfig(model=name, freeze="backbone", img_size=32)
    torch.manual_seed(0)
    model = build_model(config, 10)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == head_parameter_names(model) and {"fc.weight", "head.weight"} & set(trained)
    width = model.head_hidden_size
    heads = 2 if "distilled" in name else 1
    assert count_parameters(model)[1] == heads * (width * 10 + 10)
    assert list(model.state_dict()) == list(build_model(ModelConfig(model=name, img_size=32), 10).state_dict())


def test_frozen_norms_keep_their_statistics_and_the_head_learns():
    torch.manual_seed(0)
    model = build_model(ModelConfig(model="resnet18_cifar", freeze="backbone"), 10)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval()
    model.train()
    assert model.training and not model.bn1.training and model.fc.training
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed == ["fc.weight", "fc.bias"]


def test_frozen_model_can_be_copied_and_wrapped():
    model = build_model(ModelConfig(model="resnet18_cifar", freeze="backbone"), 10)
    assert isinstance(model, timm.models.resnet.ResNet)
    outer = nn.Sequential(copy.deepcopy(model)).train()
    norms = [m for m in outer.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20 and not any(m.training for m in norms)


def test_input_is_the_models_own():
    for name in ("cnn4", "resnet18_cifar", "swin_tiny", "nfnet_f0", "tf_efficientnet_lite0"):
        cfg = timm.get_pretrained_cfg(resolve_name(name))
        own = input_config(_described(cfg), ModelConfig(model=name))
        assert own == InputConfig(cfg.input_size[-1], cfg.mean, cfg.std, cfg.interpolation)
    assert input_config(build_model(ModelConfig(model="cnn4"), 10), ModelConfig()).std == (0.5, 0.5, 0.5)


def _described(cfg, **overrides):
    model = nn.Identity()
    model.pretrained_cfg = {**cfg.to_dict(), **overrides}
    return model


def test_input_overridden():
    config = ModelConfig(model="cnn4", img_size=48, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), interpolation="bicubic")
    assert input_config(build_model(config, 10), config) == InputConfig(48, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bicubic")


def test_other_interpolations_become_bicubic():
    cfg = timm.get_pretrained_cfg("resnet18")
    assert input_config(_described(cfg, interpolation="lanczos"), ModelConfig()).interpolation == "bicubic"


def test_images_that_are_not_square():
    model = _described(timm.get_pretrained_cfg("resnet18"), input_size=(3, 192, 128))
    with pytest.raises(UsageError, match=r"192 x 128 images; give .* --img-size"):
        input_config(model, ModelConfig(model="resnet18"))
    assert input_config(model, ModelConfig(model="resnet18", img_size=64)).img_size == 64


def test_broken_model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    assert "description cannot be used" in _error(model=f"local-dir:{tmp_path}")
