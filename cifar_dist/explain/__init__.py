"""Which parts of an image a classifier looks at: Grad-CAM and attention rollout, for any timm model."""

from __future__ import annotations

from cifar_dist.explain.maps import attention_rollout, grad_cam
from cifar_dist.explain.target import Unexplained, target_of

__all__ = ["Unexplained", "attention_rollout", "grad_cam", "target_of"]
