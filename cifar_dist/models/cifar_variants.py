"""timm's ResNet, DLA and ViT with the stem and strides for 32 px images, registered with timm."""

from __future__ import annotations

import math
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.dla import DLA, DlaBasic, DlaTree
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


def cifar_cfg(**overrides: Any) -> dict[str, Any]:
    """timm's data and head settings of a CIFAR-native model."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **overrides,
    }


def _reduce_less(feature_info: list[Any]) -> None:
    """Correct timm's record of how far each stage reduces the image: the stem no longer divides by 4."""
    for info in feature_info:
        info["reduction"] = max(1, info["reduction"] // 4)


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stride-1 stem and no max-pool, so that 32 px end at 4 x 4.

    The stem is the one of He et al. 2015 (arXiv:1512.03385, section 4.2) on their ImageNet stages.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stem = nn.Conv2d(self.in_chans, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        _reduce_less(self.feature_info)


class CifarDla(DLA):
    """timm's DLA (Yu et al. 2018, arXiv:1707.06484) with a 3x3 base layer and stride 1 in levels 1 and 2.

    32 px end at 4 x 4 instead of 1 x 1.
    """

    def __init__(self, levels: tuple[int, ...], channels: tuple[int, ...], block: type[nn.Module], **kw: Any) -> None:
        super().__init__(levels, channels, block=block, **kw)
        self.base_layer[0] = nn.Conv2d(self.in_chans, channels[0], 3, padding=1, bias=False)
        self.level1 = self._make_conv_level(channels[0], channels[1], levels[1])
        self.level2 = DlaTree(levels[2], block, channels[1], channels[2])
        for part in (self.base_layer, self.level1, self.level2):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                    nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(self.fc, nn.Conv2d):
            self.fc.reset_parameters()  # DLA's own start makes logits of 10 classes ten times larger than of 1000
        _reduce_less(self.feature_info)


default_cfgs = generate_default_cfgs(
    {
        "resnet18_cifar": cifar_cfg(),
        "resnet34_cifar": cifar_cfg(),
        "resnet50_cifar": cifar_cfg(),
        "dla34_cifar": cifar_cfg(first_conv="base_layer.0"),
        "vit_small_cifar": cifar_cfg(
            fixed_input_size=True, pool_size=None, first_conv="patch_embed.proj", classifier="head"
        ),
    }
)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32 px: 11.17 M parameters with 10 classes."""
    arch = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **{**arch, **kwargs})


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 for 32 px: 21.28 M parameters with 10 classes."""
    arch = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
    return build_model_with_cfg(CifarResNet, "resnet34_cifar", pretrained, **{**arch, **kwargs})


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 for 32 px: 23.52 M parameters with 10 classes."""
    arch = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return build_model_with_cfg(CifarResNet, "resnet50_cifar", pretrained, **{**arch, **kwargs})


@register_model
def dla34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarDla:
    """DLA-34 for 32 px: 15.23 M parameters with 10 classes."""
    arch = {"levels": (1, 1, 1, 2, 2, 1), "channels": (16, 32, 64, 128, 256, 512), "block": DlaBasic}
    return build_model_with_cfg(CifarDla, "dla34_cifar", pretrained, **{**arch, **kwargs})


@register_model
def vit_small_cifar(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32 px in 4 px patches: 7 layers of width 384 with 12 heads, 6.27 M parameters with 10 classes.

    The shape of github.com/omihub777/ViT-CIFAR, which reports 91.0 % on CIFAR-10 from scratch (200 epochs of Adam,
    AutoAugment, label smoothing).
    """
    arch = {"patch_size": 4, "embed_dim": 384, "depth": 7, "num_heads": 12, "mlp_ratio": 1.0}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_small_cifar",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**arch, **kwargs},
    )
