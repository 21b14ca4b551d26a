"""Maps lie on what decides the class, equal plain PyTorch, and leave the model as it was."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn
from torch.nn import functional as F

from cifar_dist.config import ModelConfig
from cifar_dist.explain import Unexplained, attention_rollout, grad_cam, target_of
from cifar_dist.explain import maps as maps_module
from cifar_dist.models import build_model
from cifar_dist.models.wide_resnet import WideResNet

SIDE, PATCH = 32, 8
SWIN = {
    "img_size": SIDE, "patch_size": 4, "num_classes": 3, "embed_dim": 32, "depths": (1, 1, 1), "drop_path_rate": 0.0,
    "num_heads": (2, 4, 8), "window_size": 4,
}  # fmt: skip
VIT = {"img_size": SIDE, "patch_size": 8, "depth": 4}


def patches(count, seed, tint=0.3):
    """Noise with a patch somewhere, (N, 3, 32, 32); the patch's colour is the class, (N,); where it is, (N, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) / 2
    images += tint * torch.randn(count, 3, 1, 1, generator=generator)  # so that the mean colour says little
    classes = torch.randint(3, (count,), generator=generator)
    where = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for i, (row, column) in enumerate(torch.randint(SIDE - PATCH + 1, (count, 2), generator=generator).tolist()):
        where[i, row : row + PATCH, column : column + PATCH] = True
        images[i, classes[i], row : row + PATCH, column : column + PATCH] += 3
    return images, classes, where


def trained(make, steps, lr=2e-3, tint=0.3):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        images, classes, _ = patches(32, step, tint)
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
    return model


def density(maps, where):
    """How much denser the maps lie on the patch than an even map would, on average."""
    on_patch = (maps * where).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-9)
    return float(on_patch.mean()) / (PATCH / SIDE) ** 2


def finds_the_patch(maps, where):
    """Well denser than even, and than what a transposed map gets from patches near the diagonal."""
    found = density(maps, where)
    return found > 1.8 and found > 1.4 * density(maps.transpose(1, 2), where)


def timm_model(name, **arguments):
    return lambda: timm.create_model(name, num_classes=3, **arguments)


@pytest.mark.parametrize(
    ("make", "steps", "tint", "layer"),
    [
        pytest.param(timm_model("test_vit", **VIT), 80, 0.3, "blocks.3.norm1", id="vit"),
        pytest.param(timm_model("test_vit2", **VIT), 40, 0.3, "blocks.3", id="vit without class token"),
        pytest.param(timm_model("test_resnet"), 30, 0.3, "layer2.0", id="resnet"),
        pytest.param(timm_model("test_efficientnet"), 40, 0.15, "blocks.2.0", id="efficientnet"),
        pytest.param(timm_model("test_convnext"), 60, 0.15, "stages.1", id="convnext"),
        pytest.param(timm_model("test_nfnet"), 20, 0.15, "stages.1.0", id="nfnet"),
        pytest.param(lambda: SwinTransformer(**SWIN), 50, 0.15, "layers.1", id="swin"),
        pytest.param(lambda: SwinTransformerV2(**SWIN), 50, 0.15, "layers.1", id="swinv2"),
        pytest.param(timm_model("cnn4"), 20, 0.3, "blocks.3.1", id="cnn4"),
        pytest.param(lambda: WideResNet(10, 1, num_classes=3), 15, 0.15, "bn", id="wide resnet"),
    ],
)
def test_a_trained_model_looks_at_the_patch(make, steps, tint, layer):
    model = trained(make, steps, tint=tint)
    images, classes, where = patches(48, 10**6, tint)
    assert target_of(model, SIDE).name == layer
    maps = grad_cam(model, images, classes)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == classes).float().mean() > 0.5
    assert finds_the_patch(maps, where)
    assert not finds_the_patch(maps.transpose(1, 2), where)
    assert not finds_the_patch(maps.roll(SIDE // 2, dims=2), where)
    rollout = attention_rollout(model, images)
    assert (rollout is not None) == (layer == "blocks.3.norm1")
    assert rollout is None or finds_the_patch(rollout, where)


def by_hand(model, layer, to_map, images, classes):
    """Grad-CAM in plain PyTorch: the channels weighed by their mean gradient, rectified, enlarged, over its maximum."""
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    model.eval()
    handle = layer.register_forward_hook(keep)
    model(images).gather(1, classes[:, None]).sum().backward()
    handle.remove()
    activations, gradients = to_map(kept[0].detach()), to_map(kept[0].grad)
    cam = (gradients.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True).relu()
    large = F.interpolate(cam, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return large / large.amax((1, 2), keepdim=True).clamp(min=1e-20)


def test_a_convnet_as_by_hand():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar")
    images, classes, _ = patches(3, 0)
    expected = by_hand(model, model.layer4, lambda output: output, images, classes)
    torch.testing.assert_close(grad_cam(model, images, classes), expected, atol=1e-4, rtol=1e-4)


def test_a_vit_as_by_hand():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", reg_tokens=2, **VIT)
    images, classes, _ = patches(3, 0)
    grid = model.patch_embed.grid_size
    expected = by_hand(
        model,
        model.blocks[-1].norm1,
        lambda x: x[:, 3:].reshape(len(x), *grid, -1).permute(0, 3, 1, 2),
        images,
        classes,
    )
    assert expected.max() > 0
    torch.testing.assert_close(grad_cam(model, images, classes), expected, atol=1e-4, rtol=1e-4)


def test_the_map_is_of_the_class_that_was_asked_for():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar")
    images = patches(1, 0)[0].expand(2, -1, -1, -1)
    maps = grad_cam(model, images, torch.tensor([0, 1]))
    assert not torch.allclose(maps[0], maps[1], atol=0.1)
    torch.testing.assert_close(maps[1:], grad_cam(model, images[:1], torch.tensor([1])), atol=1e-4, rtol=1e-4)


class WorksInPlace(nn.Module):
    """What its convolution gives is overwritten by the rectifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=4)
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.conv(images).relu_().mean((2, 3)))


def test_a_layer_overwritten_by_the_next_is_seen_as_it_was():
    torch.manual_seed(0)
    model = WorksInPlace()
    images, classes, _ = patches(4, 0)
    activations = model.conv(images).detach().requires_grad_()
    model.fc(activations.relu().mean((2, 3))).gather(1, classes[:, None]).sum().backward()
    cam = (activations.grad.mean((2, 3), keepdim=True) * activations.detach()).sum(1, keepdim=True).relu()
    large = F.interpolate(cam, size=(SIDE, SIDE), mode="bilinear")[:, 0]
    expected = large / large.amax((1, 2), keepdim=True).clamp(min=1e-20)
    torch.testing.assert_close(grad_cam(model, images, classes), expected, atol=1e-5, rtol=1e-5)


def test_rollout_as_by_hand():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", reg_tokens=2, **VIT).eval()
    images = patches(2, 0)[0]
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        rolled = torch.eye(3 + 16)
        for block in model.blocks:
            attn, normed = block.attn, block.norm1(tokens)
            query, key, _ = attn.qkv(normed).reshape(2, 19, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            weights = (attn.q_norm(query) @ attn.k_norm(key).mT * attn.head_dim**-0.5).softmax(-1).mean(1)
            layer = weights + torch.eye(19)
            rolled = (layer / layer.sum(-1, keepdim=True)) @ rolled
            tokens = block(tokens)
    small = rolled[:, 0, 3:].reshape(2, 1, 4, 4)
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    expected = large / large.amax((1, 2), keepdim=True)
    torch.testing.assert_close(attention_rollout(model, images), expected, atol=1e-5, rtol=1e-4)


def hooks_in(model):
    modules = list(model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)


def test_the_model_is_left_as_it_was():
    model = build_model(ModelConfig(model="test_vit", img_size=32, freeze="backbone"), 3)
    model.train()
    model.norm.eval()  # a mode of its own
    images, classes, _ = patches(4, 0)
    F.cross_entropy(model(images), classes).backward()

    def state():
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        modes = {name: module.training for name, module in model.named_modules()}
        fused = {name: module.fused_attn for name, module in model.named_modules() if hasattr(module, "fused_attn")}
        return weights, gradients, (flags, modes, fused, hooks_in(model))

    weights, gradients, facts = state()
    assert gradients and any(facts[2].values())
    grad_cam(model, images, classes)
    attention_rollout(model, images)
    with pytest.raises(RuntimeError) as failure:
        grad_cam(model, images, torch.full((4,), 9))  # no such class
    weights_after, gradients_after, facts_after = state()
    torch.testing.assert_close((weights_after, gradients_after), (weights, gradients), rtol=0, atol=0)
    assert facts_after == facts, failure  # which holds on to all that was alive when it was raised
    assert images.grad is None and not images.requires_grad


def test_a_frozen_model_and_one_without_gradients_are_explained_alike():
    model = build_model(ModelConfig(model="resnet18_cifar"), 3).eval()
    images, classes, _ = patches(2, 0)
    expected = grad_cam(model, images, classes)
    assert expected.max() == 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(grad_cam(model, images, classes), expected)


def test_batches_are_bounded_and_change_nothing(monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", **VIT)
    images, classes, _ = patches(7, 0)
    whole, rollout = grad_cam(model, images, classes), attention_rollout(model, images)
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(maps_module, "BATCH_SIZE", 3)
    torch.testing.assert_close(grad_cam(model, images, classes), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention_rollout(model, images), rollout, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert max(sizes) == 3 and sum(sizes) == 1 + 7 + 7


def test_a_map_without_evidence_stays_zero():
    model = timm.create_model("cnn4", num_classes=3)
    nn.init.zeros_(model.fc.weight)
    images, classes, _ = patches(2, 0)
    assert grad_cam(model, images, classes).eq(0).all()


@pytest.mark.parametrize(
    ("name", "side", "layer"),
    [
        ("dla34_cifar", 32, "level5"),
        ("vit_small_cifar", 32, "blocks.6.norm1"),
        ("mobilenetv3_small_050", 64, "blocks.3.1"),  # its later maps are 2 x 2
        ("regnetx_002", 128, "s4"),
        ("resnetv2_50", 64, "stages.2"),
        ("test_byobnet", 128, "stages.3.0"),
        ("tf_efficientnet_lite0", 128, "bn2"),
        ("deit_tiny_distilled_patch16_224", 64, "blocks.11.norm1"),
        ("eva02_tiny_patch14_224", 56, "blocks.11"),  # has a class token, and averages the patches
        ("mixer_s32_224", 64, "norm"),
        ("hiera_tiny_224", 64, "blocks.11"),  # tokens of earlier blocks lie in another order
        ("swinv2_cr_tiny_ns_224", 64, "stages.2"),  # channels first, unlike the other Swins
        ("mambaout_femto", 64, "stages.2"),
    ],
)
def test_other_architectures(name, side, layer):
    torch.manual_seed(0)
    sized = {"img_size": side} if name.startswith(("vit_", "deit", "eva", "hiera", "mixer", "swin")) else {}
    model = timm.create_model(name, num_classes=3, **sized)
    images, classes = torch.randn(2, 3, side, side), torch.tensor([0, 2])
    target = target_of(model, side)
    assert (target.name, target.layer) == (layer, model.get_submodule(layer))
    for maps in (grad_cam(model, images, classes), attention_rollout(model, images)):
        if maps is not None:
            assert maps.shape == (2, side, side) and maps.dtype == torch.float32
            assert maps.min() >= 0 and set(maps.amax((1, 2)).tolist()) <= {0.0, 1.0}
    assert hooks_in(model) == 0


def test_the_layer_depends_on_the_size_of_the_images():
    model = timm.create_model("test_resnet", num_classes=3)  # made for 160 px
    assert target_of(model, 160).name == "layer4.0"
    assert target_of(model, SIDE).name == "layer2.0"


def test_a_map_as_wide_as_it_has_channels_goes_by_the_models_format():
    shape = {"img_size": 32, "patch_size": 1, "embed_dim": 2, "num_heads": (1, 1, 1)}
    target = target_of(SwinTransformer(**{**SWIN, **shape}), 32)  # 8 x 8 at the end, with 8 channels
    output = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(target.to_map(output), output.permute(0, 3, 1, 2), rtol=0, atol=0)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * SIDE * SIDE, 3)

    def forward(self, images):
        return self.fc(images.flatten(1))


def test_what_cannot_be_explained_says_why():
    images, classes, _ = patches(2, 0)
    with pytest.raises(Unexplained, match=r"^No layer of this Flat .*\.$"):
        grad_cam(Flat(), images, classes)
    pooled = timm.create_model("pit_ti_224", num_classes=3, img_size=64)
    wide = torch.randn(2, 3, 64, 64)
    with pytest.raises(Unexplained, match=r"PoolingVisionTransformer"):
        grad_cam(pooled, wide, classes)
    with pytest.raises(Unexplained, match=r"attention of this PoolingVisionTransformer"):
        attention_rollout(pooled, wide)
    late = timm.create_model("cait_xxs24_224", num_classes=3, img_size=64)  # its class token joins behind the blocks
    with pytest.raises(Unexplained, match=r"attention of this Cait"):
        attention_rollout(late, wide)


@pytest.mark.parametrize(("size", "layer"), [(64, "blocks.9"), (128, "blocks.11")])
def test_a_window_is_not_taken_for_the_map(size, layer):
    """The last attention of SAM's Hiera sees a window of 7 x 7, padded where the map is 2 x 2."""
    model = build_model(ModelConfig(model="sam2_hiera_tiny", img_size=size), 4)
    assert target_of(model.eval(), size).name == layer
