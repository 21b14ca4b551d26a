"""The four-layer CNN of study E, registered with timm as ``cnn4``."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

CHANNELS = (32, 64, 128, 128)


class Cnn4(nn.Module):
    """Four times (3x3 convolution, BatchNorm, ReLU, 2x2 max-pool), a hidden layer of 256, a linear classifier.

    Convolutions have a bias and 32 px images give 128 x 2 x 2 = 512 features, as in study E: 375,434 parameters
    with 10 classes. The study states no dropout rate; 0.5 is PyTorch's, and so are the initial weights.

    Args:
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        img_size: pixels a side (or height, width), multiples of 16.
        drop_rate: dropout between the hidden layer and the classifier.

    Raises:
        ValueError: `img_size` is not a multiple of 16.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, img_size: int | tuple[int, int] = 32, drop_rate: float = 0.5
    ) -> None:
        super().__init__()
        height, width = to_2tuple(img_size)
        if height % 16 or width % 16:
            raise ValueError(f"cnn4 halves the image four times: {height}x{width} is not a multiple of 16")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = CHANNELS[-1]
        self.head_hidden_size = 256
        pairs = zip((in_chans, *CHANNELS), CHANNELS, strict=False)
        self.blocks = nn.Sequential(*(self._block(ins, outs) for ins, outs in pairs))
        self.hidden = nn.Linear(CHANNELS[-1] * (height // 16) * (width // 16), self.head_hidden_size)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.feature_info = [
            {"num_chs": outs, "reduction": 2 ** (i + 1), "module": f"blocks.{i}"} for i, outs in enumerate(CHANNELS)
        ]

    @staticmethod
    def _block(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.MaxPool2d(2),  # before ReLU: the same result, since both only compare, on a quarter of the pixels
            nn.ReLU(inplace=True),
        )

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers from input to output, for timm's layer decay."""
        return {"stem": r"^blocks\.0\.", "blocks": [(r"^blocks\.(\d+)", None), (r"^hidden", (len(CHANNELS),))]}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; `global_pool` is timm's, and this model has none."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 128, H / 16, W / 16)."""
        return self.blocks(images)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, 128, H / 16, W / 16) to logits (B, K), or to (B, 256) before the classifier."""
        features = self.head_drop(torch.relu(self.hidden(features.flatten(1))))
        return features if pre_logits else self.fc(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to logits (B, K)."""
        return self.forward_head(self.forward_features(images))


default_cfgs = generate_default_cfgs(
    {
        "cnn4": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "pool_size": (2, 2),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "blocks.0.0",
            "classifier": "fc",
        }
    }
)


@register_model
def cnn4(pretrained: bool = False, **kwargs: Any) -> Cnn4:
    """Study E's network; see `Cnn4`."""
    return build_model_with_cfg(Cnn4, "cnn4", pretrained, **kwargs)
