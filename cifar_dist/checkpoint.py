"""Checkpoints: written aside, made durable, then renamed, so a half-written one never has a name.

``RUN_DIR/checkpoints/step-XXXXXXXX/`` holds ``model.safetensors``, ``ema.safetensors`` (when kept),
``optimizer.safetensors`` and ``optimizer.json``, ``rng-R.safetensors`` per process, and ``state.json``.
The links ``last`` and ``best`` name two of these folders. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from cifar_dist.errors import UsageError

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

    def judge(self, top1: float, loss: float, min_delta: float) -> bool:
        """Take in new scores of the selecting split; whether they are the best so far.

        The higher top-1 (a fraction) is better; of equal ones, the lower loss (nats). Early stopping counts
        the epochs in which top-1 has not risen by more than `min_delta` over the last value that did.
        """
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
        UsageError: the file system refuses (full, read-only); the checkpoints before it are intact.
    """
    root = run_dir / "checkpoints"
    name = f"step-{state.step:08d}"
    aside = root / f".tmp-{name}"
    failure = ""
    try:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        _save_tensors(_rng_state(), aside / f"rng-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            _write(aside, accelerator, trained, state)
    except (OSError, SafetensorError) as error:
        failure = str(error)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not failure:
        try:
            _commit(root, aside, name, best)
        except OSError as error:
            failure = str(error)
    if failure:
        shutil.rmtree(aside, ignore_errors=True)
        raise UsageError(
            f"--run-dir {run_dir}: checkpoint {name} could not be written ({failure}); older ones are intact."
        )


def _write(aside: Path, accelerator: Accelerator, trained: Trained, state: TrainState) -> None:
    _save_tensors(accelerator.unwrap_model(trained.model).state_dict(), aside / "model.safetensors")
    if trained.ema is not None:
        _save_tensors(trained.ema.module.state_dict(), aside / "ema.safetensors")
    tensors, plain = _flatten_optimizer(trained.optimizer.state_dict())
    _save_tensors(tensors, aside / "optimizer.safetensors")
    _save_json(plain, aside / "optimizer.json")
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    facts = {"format": FORMAT, "num_processes": accelerator.num_processes, "scaler": scaler, **asdict(state)}
    _save_json(facts, aside / "state.json")


def _commit(root: Path, aside: Path, name: str, best: bool) -> None:
    """Make the written folder durable and visible, move the links, then drop what no link names."""
    _fsync(aside)
    if (root / name).exists():
        shutil.rmtree(root / name)
    os.replace(aside, root / name)
    for link in ("last", "best") if best else ("last",):
        fresh = root / f".{link}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, root / link)
    _fsync(root)
    kept = {os.readlink(root / link) for link in ("last", "best") if (root / link).is_symlink()}
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


def load(run_dir: Path, accelerator: Accelerator, trained: Trained) -> TrainState:
    """Put everything of the last checkpoint back; to be called after ``accelerator.prepare``.

    Raises:
        UsageError: a file is missing or damaged, or the format is newer than this version reads.
    """
    folder = run_dir / "checkpoints" / "last"
    try:
        facts = json.loads((folder / "state.json").read_text())
        if facts.pop("format") > FORMAT:
            raise UsageError(f"--resume: {folder} was written by a newer version of cifar-dist; update to read it.")
        accelerator.unwrap_model(trained.model).load_state_dict(load_file(folder / "model.safetensors"))
        if trained.ema is not None:
            trained.ema.module.load_state_dict(load_file(folder / "ema.safetensors"))
        plain = json.loads((folder / "optimizer.json").read_text())
        trained.optimizer.load_state_dict(_unflatten_optimizer(load_file(folder / "optimizer.safetensors"), plain))
        scaler = facts.pop("scaler")
        if accelerator.scaler is not None and scaler:
            accelerator.scaler.load_state_dict(scaler)
        if facts.pop("num_processes") == accelerator.num_processes:
            _set_rng_state(load_file(folder / f"rng-{accelerator.process_index}.safetensors"))
        return TrainState(**facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"--resume: checkpoint {folder} cannot be read ({_first_line(error)}); start afresh in another --run-dir."
        ) from None


def exists(run_dir: Path) -> bool:
    """Whether the run has a checkpoint to resume from."""
    return (run_dir / "checkpoints" / "last" / "state.json").is_file()


def read_state(run_dir: Path, which: str) -> TrainState:
    """The counters of checkpoint ``last`` or ``best``."""
    facts = json.loads((run_dir / "checkpoints" / which / "state.json").read_text())
    return TrainState(**{k: v for k, v in facts.items() if k in TrainState.__dataclass_fields__})


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
        raise UsageError(f"{file} cannot be read ({_first_line(error)}).") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A torch optimizer's state as tensors named ``PARAMETER.KEY`` and a JSON-able rest."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in state["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else numbers)[f"{parameter}.{key}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["numbers"]}.items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = value
    return {"state": state, "param_groups": plain["param_groups"]}


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


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o644)
    _fsync(path)


def _save_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1))
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
