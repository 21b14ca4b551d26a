"""What share of a training step the augmented batch takes, on this machine's device.

    python benchmarks/data_share.py [--models vit_base_patch16_224 resnet18_cifar] [--json FILE]

Per model: milliseconds to make an augmented bf16 batch (crop, flip, cutout, normalise, resize; and the same with
RandAugment and mixup) out of a resident set, and of a whole step with it (bf16 autocast, AdamW), medians of
synchronised repeats in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from cifar_dist.config import AugmentConfig, InputConfig, ModelConfig
from cifar_dist.data.augment import Augment, Mixing
from cifar_dist.distributed.group import keep_freed_memory
from cifar_dist.distributed.hardware import processor
from cifar_dist.models import build_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {"vit_base_patch16_224": (224, 128), "resnet18_cifar": (32, 256)}  # pixels and batch
POLICIES = {
    "crop, flip, cutout": AugmentConfig(cutout=12),
    "and RandAugment, mixup": AugmentConfig(cutout=12, aa="rand-m9-mstd0.5-inc1", mixup=0.2),
}


def milliseconds(work: Callable[[], object]) -> float:
    """How long `work` takes, to its end on the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def measure(name: str, size: int, count: int, augment: AugmentConfig, repeats: int) -> dict[str, float]:
    """Medians in milliseconds, and their ratio."""
    images = torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(0, 10, (50_000,), device=DEVICE)
    input = InputConfig(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    pixels = Augment(augment, input, 0, DEVICE, torch.bfloat16)
    mixing = Mixing(augment, 0, 10) if augment.mixup else None
    model = build_model(ModelConfig(model=name, img_size=size if name.startswith("vit") else None), 10).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=DEVICE.type == "cuda")
    ids = torch.randperm(50_000)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        rows = ids[:count].to(DEVICE, non_blocking=True)
        made, targets = pixels(images[rows], ids[:count], 0), labels[rows]
        return mixing(made, targets, ids[:count], 0) if mixing else (made, targets)

    def step() -> None:
        made, targets = batch()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(model(made), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    times = [(milliseconds(batch), milliseconds(step)) for _ in range(repeats)]
    data, whole = (statistics.median(part) for part in zip(*times, strict=True))
    return {"batch_ms": data, "step_ms": whole, "share": data / whole}


def main() -> None:
    """Measure every model with every policy; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    print("model                 augmentation            batch ms   step ms   share")
    for name in args.models:
        for policy, augment in POLICIES.items():
            found = measure(name, *MODELS[name], augment, args.repeats)
            rows.append({"model": name, "augmentation": policy, "batch_size": MODELS[name][1], **found})
            print(f"{name:20}  {policy:22}  {found['batch_ms']:8.2f}  {found['step_ms']:8.1f}  {found['share']:6.1%}")
    if args.json:
        hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else processor()
        facts = {"hardware": hardware, "versions": {name: version(name) for name in ("torch", "timm")}, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
