"""The gradient noise scale of a run where it stands: about the batch up to which twice the images halve the steps.

    python -m benchmarks.noise_scale RUN_DIR [--batches 100]

As McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1): from the mean squared norm of gradients over the recipe's
batch, and that of their mean, which is a gradient over all of them, come unbiased estimates of the true gradient's
squared norm and of the noise, tr(Sigma); their ratio is the simple noise scale. Images are augmented as in training,
the model trains (batch norm, dropout), and nothing is updated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from cifar_dist.data import load_training_data
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import autocast, device_bytes, start
from cifar_dist.errors import UsageError
from cifar_dist.plan import make_plan
from cifar_dist.run_record import open_run
from cifar_dist.scoring import EvalSpec, LoadedRun, load_run
from cifar_dist.training.batches import ResidentBatches
from cifar_dist.training.sizes import measure


def noise_scale(gradients: Iterable[torch.Tensor], batch: int) -> float:
    """From at least two gradients (P,) over `batch` images each, all at the same weights; in images."""
    total, squares, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for gradient in gradients:
        total = total + gradient.double()
        squares += float(gradient.double().square().sum())
        count += 1
    small, big, whole = squares / count, float((total / count).square().sum()), batch * count
    squared = (whole * big - batch * small) / (whole - batch)
    noise = (small - big) / (1 / batch - 1 / whole)
    return noise / squared if squared > 0 else float("inf")


def gradients(loaded: LoadedRun, batches: ResidentBatches, count: int) -> Iterator[torch.Tensor]:
    """Gradients (P,) of as many steps as would come next."""
    model, config = loaded.model.train(), loaded.run.config
    for step in range(count):
        model.zero_grad()
        for batch in batches(loaded.stored.step + step):
            with autocast(loaded.accelerator.device, config.run.precision):
                logits = model(batch.images).float()
            smoothing = 0.0 if batch.targets.is_floating_point() else config.augment.smoothing
            losses = F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
            (losses * batch.weights).sum().backward()
        yield torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()


def main() -> None:
    """Load a run's last checkpoint, take gradients, print the noise scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args()
    run = open_run(args.run_dir)
    config = run.config
    accelerator = start(config.run.precision)
    spec = EvalSpec("last", config.data, None, None, "none", config.run.precision, args.run_dir)
    loaded = load_run(run, spec, accelerator)
    data = load_training_data(config.data, device_bytes(accelerator))
    if not isinstance(data.train, ResidentSet):
        raise UsageError(f"RUN_DIR {args.run_dir} streams its data; this works on resident images.")
    plan = make_plan(config, measure(config, data, loaded.model), 1)
    parallel: Any = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    batches = ResidentBatches(data.train, config, plan, loaded.input, parallel)
    set_seed(0)
    found = noise_scale(gradients(loaded, batches, args.batches), plan.batch_size)
    print(f"{args.run_dir}: after {loaded.stored.step} steps with batches of {plan.batch_size}, the noise scale is")
    print(f"{found:,.0f} images (from {args.batches} gradients)")


if __name__ == "__main__":
    run_main(main)
