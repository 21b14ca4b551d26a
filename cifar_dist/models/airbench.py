"""The small network of CIFAR-10 speed runs, registered with timm as ``airbench94``, and a narrower one for CPUs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from cifar_dist.models.cifar_variants import cifar_cfg

PATCH = 2  # pixels a side that the first layer looks at
LOGIT_SCALE = 1 / 9
NOISE = 5e-4  # variance that a direction of the patches has at least, as whitening sees it


class Airbench94(nn.Module):
    """A whitening 2x2 convolution, three groups of two 3x3 convolutions, a maximum over what is left, a linear layer.

    The network of Jordan 2024 (arXiv:2404.00498), after Page 2019 ("How to train your ResNet 8"): the first layer is
    not trained but computed from training images (`whiten`); convolutions begin as the identity on the channels they
    are given; BatchNorm has a short memory and no factor of its own; logits are divided by 9. Unlike there, the first
    layer's bias is not trained for three epochs either: the gradient to it costs a tenth of a step on a CPU.

    Args:
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        widths: channels of the three groups.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (64, 256, 256),
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        directions = 2 * in_chans * PATCH**2  # each with both signs
        self.whitening = nn.Conv2d(in_chans, directions, PATCH)
        self.whitening.requires_grad_(False)
        self.act = nn.GELU()
        pairs = zip((directions, *widths), widths, strict=False)
        self.groups = nn.Sequential(*(self._group(ins, outs) for ins, outs in pairs))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.feature_info = [
            {"num_chs": outs, "reduction": 2 ** (i + 1), "module": f"groups.{i}"} for i, outs in enumerate(widths)
        ]

    @staticmethod
    def _group(in_channels: int, out_channels: int) -> nn.Sequential:
        def convolution(channels: int) -> nn.Conv2d:
            layer = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            nn.init.dirac_(layer.weight.data[:channels])
            return layer

        def norm() -> nn.BatchNorm2d:
            layer = nn.BatchNorm2d(out_channels, eps=1e-12, momentum=0.4)
            layer.weight.requires_grad_(False)
            return layer

        first = (convolution(in_channels), nn.MaxPool2d(2), norm(), nn.GELU())
        return nn.Sequential(*first, convolution(out_channels), norm(), nn.GELU())

    @torch.no_grad()
    def whiten(self, batches: Iterable[torch.Tensor]) -> None:
        """Let the first layer whiten the patches of these images: uncorrelated directions of equal variance.

        Args:
            batches: float (B, 3, H, W) each, normalised as in training.
        """
        layer, count, products = self.whitening, 0, torch.zeros(())
        for images in batches:
            patches = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
            count, products = count + len(patches), products + patches.T @ patches
        variances, directions = torch.linalg.eigh(products / count)
        filters = (directions / (variances + NOISE).sqrt()).T.reshape(-1, *layer.weight.shape[1:])
        layer.weight.copy_(torch.cat([filters, -filters]))
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output, for timm's layer decay."""
        return {"stem": r"^whitening", "blocks": [(r"^groups\.(\d+)", None)]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool` is timm's, and this model has one."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes, bias=False) if num_classes > 0 else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 256, H / 8 - 1, W / 8 - 1)."""
        return self.groups(self.act(self.whitening(images)))

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 256, h, w) to logits (B, K), or to (B, 256) before the classifier."""
        features = self.head_drop(features.amax((2, 3)))
        return features if pre_logits else LOGIT_SCALE * self.fc(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(images))


_CFG = cifar_cfg(pool_size=(3, 3), first_conv="whitening")
default_cfgs = generate_default_cfgs({"airbench94": _CFG, "airbench94_narrow": _CFG})


@register_model
def airbench94(pretrained: bool = False, **kwargs: Any) -> Airbench94:
    """The network of the paper, see `Airbench94`: 1.97 M parameters with 10 classes."""
    return build_model_with_cfg(Airbench94, "airbench94", pretrained, **kwargs)


@register_model
def airbench94_narrow(pretrained: bool = False, **kwargs: Any) -> Airbench94:
    """The same with 128 channels in its second group: 1.16 M parameters, and 0.55 of the arithmetic."""
    arch = {"widths": (64, 128, 256)}
    return build_model_with_cfg(Airbench94, "airbench94_narrow", pretrained, **{**arch, **kwargs})
