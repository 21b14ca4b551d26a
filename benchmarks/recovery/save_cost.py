"""R13: what a checkpoint costs a training: how long it stands still, how long until the commit, and its share.

    python -m benchmarks.recovery.save_cost --trials 5 [--model vit_base_patch16_224] [--json FILE]

For a small state (three matrices of 2048 x 2048) and for that of `--model` with AdamW and a moving average, in turn,
`--trials` times:

* a bare write of the same bytes into as many files with the same fsyncs (each file, its folder, a rename, the folder
  above),
* a save: the training's pause, and the time until it is committed with nothing beside it.

Then, in turn, `--trials` times, for `--model`: as many optimizer steps as outlast a save, without one, with one that is
written beside them, and after one that is waited for. The difference to the first is what the save costs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.utils import ModelEmaV3

from benchmarks.recovery.common import Failures, Small, campaign, checkpoints_of
from cifar_dist.config import OptimConfig, RunConfig
from cifar_dist.distributed.group import start
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.train_state import TrainState

MIB, WIDTH, BATCH = 2**20, 2048, 8


def bare_write(contents: dict[str, bytes], folder: Path) -> float:
    """Seconds of writing files as durably as a save does."""
    began, aside = time.perf_counter(), folder / "aside"
    aside.mkdir()

    def sync(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    for name, content in contents.items():
        (aside / name).write_bytes(content)
        sync(aside / name)
    sync(aside)
    aside.rename(folder / "bare")
    sync(folder)
    seconds = time.perf_counter() - began
    shutil.rmtree(folder / "bare")
    return seconds


class Training:
    """A model of timm that learns noise.

    Args:
        name: of the model.
        folder: where checkpoints go.
    """

    def __init__(self, name: str, folder: Path):
        accelerator = start("bf16" if torch.cuda.is_available() else "fp32", 60)
        model = timm.create_model(name, num_classes=10).to(accelerator.device)
        size = resolve_model_data_config(model)["input_size"]
        self._parallel = Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None)
        self._trained = Trained(self._parallel, ModelEmaV3(model))
        self._images = torch.randn(BATCH, *size, device=accelerator.device)
        folder.mkdir(parents=True)
        self.run_dir, self._saver = folder, Saver(folder, accelerator, CheckpointTimer(RunConfig()))
        self._saved = 0

    def steps(self, count: int) -> None:
        """Optimizer steps."""
        for _ in range(count):
            cast = torch.autocast("cuda", torch.bfloat16) if self._images.is_cuda else nullcontext()
            with cast:
                loss = self._parallel.forward(self._images).float().logsumexp(-1).mean()
            self._parallel.backward(loss)
            self._parallel.update()
            self._trained.average()
        if self._images.is_cuda:
            torch.cuda.synchronize()

    def save(self) -> None:
        """Begin to save."""
        self._saved += 1
        self._saver.save(self._trained, TrainState(step=self._saved))

    def finish(self) -> None:
        """Wait for the commit."""
        self._saver.finish()


class Large(Small):
    """Wide enough for 48 MiB of state."""

    def __init__(self, folder: Path):
        super().__init__(folder, WIDTH)
        self._saved = 0

    def save(self) -> None:  # type: ignore[override]
        """Begin to save."""
        self._saved += 1
        self._saver.save(self._trained, TrainState(step=self._saved))

    def finish(self) -> None:
        """Wait for the commit."""
        self._saver.finish()


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def save_against_write(name: str, state: Training | Large, trials: int) -> dict[str, Any]:
    """Saves and bare writes in turn: a row of medians."""
    pauses, totals, writes, size = list[float](), list[float](), list[float](), 0
    for _ in range(2):  # the first ones allocate
        state.save()
        state.finish()
    for _ in range(trials):
        contents = {path.name: path.read_bytes() for path in checkpoints_of(state.run_dir)[-1].iterdir()}
        size = sum(map(len, contents.values()))
        writes.append(bare_write(contents, state.run_dir))
        del contents
        pauses.append(timed(state.save))
        totals.append(pauses[-1] + timed(state.finish))
    pause, total, write = map(statistics.median, (pauses, totals, writes))
    return {
        "what": f"{name}, {size / MIB:.0f} MiB",
        "bare write": f"{write:.3f} s",
        "pause": f"{pause:.3f} s",
        "until committed": f"{total:.3f} s",
        "pause / write": f"{pause / write:.2f}",
        "until committed / write": f"{total / write:.2f}",
        "seconds": {"write": writes, "pause": pauses, "total": totals},
    }


def beside_training(name: str, training: Training, save_seconds: float, trials: int) -> list[dict[str, Any]]:
    """Steps without a save, beside one, and after one, in turn: rows of medians."""
    training.steps(1)
    count = max(1, round(1.5 * save_seconds / timed(lambda: training.steps(1))))
    found: dict[str, list[float]] = {"no save": [], "written beside them": [], "waited for": []}

    def beside() -> None:
        training.save()
        training.steps(count)
        training.finish()

    def waited_for() -> None:
        training.save()
        training.finish()
        training.steps(count)

    for _ in range(trials):
        for how, work in zip(found, (lambda: training.steps(count), beside, waited_for), strict=True):
            found[how].append(timed(work))
    plain = statistics.median(found["no save"])
    return [
        {
            "what": f"{name}, {count} steps of {BATCH} images, save {how}",
            "took": f"{statistics.median(seconds):.2f} s",
            "save costs": f"{statistics.median(seconds) - plain:.2f} s",
            "seconds": seconds,
        }
        for how, seconds in found.items()
    ]


def run(trials: int, seed: int, folder: Path, model: str = "vit_base_patch16_224") -> dict[str, Any]:
    """The tables' rows; nothing here can fail."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [save_against_write("small", Large(folder / "small"), trials)]
    training = Training(model, folder / "large")
    training.steps(1)
    rows.append(save_against_write(model, training, trials))
    rows += beside_training(model, training, statistics.median(rows[-1]["seconds"]["total"]), trials)
    numbers = {row["what"]: row.pop("seconds") for row in rows}
    return {"rows": rows, "failures": Failures(), "all_seconds": numbers}


def model_flag(parser: argparse.ArgumentParser) -> None:
    """Declare --model."""
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm")


if __name__ == "__main__":
    campaign(__doc__, run, trials=5, more=model_flag)
