"""Maps lie on what decides the class, equal plain PyTorch, and leave the model as it was."""

import torch
from torch.nn import functional as F

SIDE, PATCH = 32, 8
SWIN = {
    "img_size": SIDE, "patch_size": 2, "num_classes": 3, "embed_dim": 16, "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 4, 8), "window_size": 4,
}  # fmt: skip
VIT = {"img_size": SIDE, "patch_size": 4, "depth": 2, "num_classes": 3}


def patches(count, seed):
    """Noise with a patch somewhere, (N, 3, 32, 32); the patch's colour is the class, (N,); where it is, (N, 32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) / 2
    images += 0.3 * torch.randn(count, 3, 1, 1, generator=generator)  # so that the mean colour says little
    classes = torch.randint(3, (count,), generator=generator)
    where = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for i, (row, column) in enumerate(torch.randint(SIDE - PATCH + 1, (count, 2), generator=generator).tolist()):
        where[i, row : row + PATCH, column : column + PATCH] = True
        images[i, classes[i], row : row + PATCH, column : column + PATCH] += 3
    return images, classes, where


def trained(model, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        images, classes, _ = patches(32, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
    return model
