"""Checkpoints: written aside, made durable, then renamed, so a half-written one never has a name.

``RUN_DIR/checkpoints/step-XXXXXXXX/`` holds ``model.safetensors``, ``ema.safetensors`` (when kept),
``optimizer.safetensors`` and ``optimizer.json``, ``rng-R.safetensors`` per process, and ``state.json``.
The links ``last`` and ``best`` name two of these folders.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from cifar_dist.durable import decode, encode, fsync, save_json, save_tensors
from cifar_dist.errors import Diverged, UsageError

FORMAT = 1


@dataclass
class TrainState:
    """Where a run stands. The data position is `step` alone: order is a function of it."""

    step: int = 0
    best_top1: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    patience_top1: float = -1.0
    epochs_without_gain: int = 0
    seconds: float = 0.0

    def judge(self, scores: dict[str, float], min_delta: float) -> bool:
        """Take in an epoch's scores of the selecting split, ``top1`` and ``loss``; whether they are the best so far.

        The higher top-1 (a fraction) is better; of equal ones, the lower loss (nats). Early stopping counts
        the epochs in which top-1 has not risen by more than `min_delta` over the last value that did.

        Raises:
            Diverged: the loss is not finite.
        """
        top1, loss = scores["top1"], scores["loss"]
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} after step {self.step}; lower --lr or set --clip-grad.")
        if top1 > self.patience_top1 + min_delta:
            self.patience_top1, self.epochs_without_gain = top1, 0
        else:
            self.epochs_without_gain += 1
        if (top1, -loss) <= (self.best_top1, -self.best_loss):
            return False
        self.best_top1, self.best_loss, self.best_step = top1, loss, self.step
        return True

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether early stopping with this patience (epochs) ends the run here."""
        return patience is not None and self.epochs_without_gain >= patience


@dataclass(frozen=True)
class Trained:
    """The live objects that a checkpoint holds: the prepared model and optimizer, and the average if kept."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None


def save(run_dir: Path, accelerator: Accelerator, trained: Trained, state: TrainState, best: bool) -> None:
    """Write a checkpoint and point ``last`` (and ``best``) at it. Every process must call this.

    Raises:
        Diverged: a weight is not finite; nothing is written.
        UsageError: the file system refused on some process (full, read-only), on all of them alike; the
            checkpoints before it are intact.
    """
    root = run_dir / "checkpoints"
    name = f"step-{state.step:08d}"
    aside = root / f".tmp-{name}"
    if not all(bool(tensor.isfinite().all()) for tensor in trained.model.parameters()):
        raise Diverged(f"weights are not finite after step {state.step}; lower --lr or set --clip-grad.")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def write() -> None:
        save_tensors(_rng_state(), aside / f"rng-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            _write(aside, accelerator, trained, state)

    for everyone, work in ((False, begin), (True, write), (False, lambda: _commit(root, aside, name, best))):
        failure = _attempt(work) if everyone or accelerator.is_main_process else ""
        if failure := _first_failure(accelerator, failure):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
            raise UsageError(f"--run-dir {run_dir}: {name} could not be saved ({failure}); older ones are intact.")


def _attempt(work: Callable[[], None]) -> str:
    """Why `work` failed at the file system, or an empty string."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return _first_line(error)
    return ""


def _first_failure(accelerator: Accelerator, failure: str) -> str:
    """The first process's failure, known to every process; an empty string if all went well."""
    return (
        next((found for found in gather_object([failure]) if found), "") if accelerator.num_processes > 1 else failure
    )


def _write(aside: Path, accelerator: Accelerator, trained: Trained, state: TrainState) -> None:
    save_tensors(accelerator.unwrap_model(trained.model).state_dict(), aside / "model.safetensors")
    if trained.ema is not None:
        save_tensors(trained.ema.module.state_dict(), aside / "ema.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    save_json(encode(trained.optimizer.state_dict(), "", tensors), aside / "optimizer.json")
    save_tensors(tensors, aside / "optimizer.safetensors")
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    facts = {"format": FORMAT, "num_processes": accelerator.num_processes, "scaler": scaler, "state": asdict(state)}
    save_json(facts, aside / "state.json")


def _commit(root: Path, aside: Path, name: str, best: bool) -> None:
    """Make the written folder durable and visible, move the links, then drop what no link names."""
    fsync(aside)
    if (root / name).exists():
        shutil.rmtree(root / name)
    os.replace(aside, root / name)
    for link in ("best", "last") if best else ("last",):
        fresh = root / f".{link}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, root / link)
    fsync(root)
    kept = {os.readlink(root / link) for link in ("last", "best") if (root / link).is_symlink()}
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


def load(run_dir: Path, accelerator: Accelerator, trained: Trained) -> None:
    """Put back all of the last checkpoint but its `read_state`; to be called after ``accelerator.prepare``.

    With another number of processes the random streams of dropout are left as they are.

    Raises:
        UsageError: a file is missing or damaged, or the format is newer than this version reads.
    """
    folder = run_dir / "checkpoints" / "last"
    facts = _read_facts(folder)
    try:
        accelerator.unwrap_model(trained.model).load_state_dict(load_file(folder / "model.safetensors"))
        if trained.ema is not None:
            trained.ema.module.load_state_dict(load_file(folder / "ema.safetensors"))
        tensors = load_file(folder / "optimizer.safetensors")
        trained.optimizer.load_state_dict(decode(json.loads((folder / "optimizer.json").read_text()), tensors))
        _lay_out_like_parameters(trained.optimizer)
        if accelerator.scaler is not None and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
        if facts["num_processes"] == accelerator.num_processes:
            _set_rng_state(load_file(folder / f"rng-{accelerator.process_index}.safetensors"))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, error) from None


def _read_facts(folder: Path) -> dict[str, Any]:
    """``state.json``, checked.

    Raises:
        UsageError: it is missing, damaged or of a newer format.
    """
    try:
        facts = json.loads((folder / "state.json").read_text())
        if facts["format"] > FORMAT:
            raise UsageError(f"checkpoint {folder} was written by a newer version of cifar-dist; update to read it.")
        TrainState(**facts["state"])
        return {**facts, "num_processes": int(facts["num_processes"]), "scaler": dict(facts["scaler"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"checkpoint {folder} cannot be read ({_first_line(error)}); restore it, or start afresh in another --run-dir."
    )


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments their parameter's memory layout (channels_last), as they had before they were saved."""
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def exists(run_dir: Path) -> bool:
    """Whether the run has a checkpoint to resume from, be it a damaged one."""
    return os.path.lexists(run_dir / "checkpoints" / "last")


def read_state(run_dir: Path, which: str) -> TrainState:
    """The counters of checkpoint ``last`` or ``best``.

    Raises:
        UsageError: they are missing or damaged.
    """
    return TrainState(**_read_facts(run_dir / "checkpoints" / which)["state"])


def load_weights(run_dir: Path, which: str) -> dict[str, torch.Tensor]:
    """The weights to evaluate of checkpoint ``last`` or ``best``: the moving average if the run keeps one.

    Raises:
        UsageError: there is no such checkpoint, or its file is damaged.
    """
    folder = run_dir / "checkpoints" / which
    averaged = folder / "ema.safetensors"
    file = averaged if averaged.is_file() else folder / "model.safetensors"
    if not file.is_file():
        raise UsageError(f"{run_dir} has no checkpoint '{which}'; train it first, or name another with --checkpoint.")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({_first_line(error)}); name another with --checkpoint.") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rng_state() -> dict[str, torch.Tensor]:
    """The generators that dropout and stochastic depth draw from; all else is a function of the step."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
