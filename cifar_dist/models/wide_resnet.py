"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146), registered with timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from cifar_dist.models.cifar_variants import cifar_cfg


class WideBlock(nn.Module):
    """Pre-activation block: (BatchNorm, ReLU, 3x3 convolution) twice, dropout between the convolutions."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False) if in_channels != channels else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        out = torch.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.drop(torch.relu(self.bn2(out))))
        return out + x


class WideResNet(nn.Module):
    """WRN-`depth`-`width` for 32 px: a 3x3 stem, three stages at 32, 16 and 8 px, average pool, linear classifier.

    Convolutions start as in He et al. 2015.

    Args:
        depth: 6 n + 4 for n blocks a stage.
        width: factor on the 16, 32 and 64 channels of the stages.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling.
        drop_rate: dropout inside each block.
    """

    global_pool: SelectAdaptivePool2d
    fc: nn.Module

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.3,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        self.feature_info = []
        channels = 16
        for stage in range(3):
            blocks = nn.Sequential()
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(WideBlock(channels, 16 * 2**stage * width, stride, drop_rate))
                channels = 16 * 2**stage * width
            self.stages.append(blocks)
            self.feature_info.append({"num_chs": channels, "reduction": 2**stage, "module": f"stages.{stage}"})
        self.bn = nn.BatchNorm2d(channels)
        self.num_features = self.head_hidden_size = channels
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output, for timm's layer decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^conv1", "blocks": [(blocks, None), (r"^bn", (99999,))]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is named."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 64 * width, H / 4, W / 4)."""
        return torch.relu(self.bn(self.stages(self.conv1(images))))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 64 * width, H / 4, W / 4) to logits (B, K), or to (B, 64 * width) before the classifier."""
        features = self.global_pool(features)
        return features if pre_logits else self.fc(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(images))


default_cfgs = generate_default_cfgs({"wrn28_10": cifar_cfg(pool_size=(8, 8))})


@register_model
def wrn28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10 with dropout 0.3: 36.48 M parameters with 10 classes."""
    return build_model_with_cfg(WideResNet, "wrn28_10", pretrained, **{"depth": 28, "width": 10, **kwargs})
