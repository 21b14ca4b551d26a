"""What a checkpoint holds: how it is taken from a training, and put back.

A folder of `store` holds ``model.safetensors``, ``ema.safetensors`` (when kept), ``optimizer.safetensors``
and ``optimizer.json``, all of them whole whatever the engine, ``process-R.safetensors`` with what only process R has
(random streams, BatchNorm statistics), and ``state.json``. Every function but the readers must be called by every
process.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from cifar_dist.distributed.group import first_failure, on_main, shared_buffers
from cifar_dist.durable import decode, encode, save_json, save_tensors
from cifar_dist.errors import UsageError, first_line
from cifar_dist.models.sync_bn import other_buffers
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import lookup, store
from cifar_dist.recovery.store import Damaged, Files, Stored
from cifar_dist.recovery.train_state import TrainState


@dataclass(frozen=True)
class Trained:
    """The live objects that a checkpoint holds: the engine with model and optimizer, and the average if kept."""

    parallel: Replicated
    ema: ModelEmaV3 | None

    @property
    def judged(self) -> torch.nn.Module:
        """The model to evaluate: the average if there is one."""
        return self.parallel.model if self.ema is None else self.ema.module

    def average(self) -> None:
        """Take the weights of a new step into the average."""
        if self.ema is not None:
            self.ema.update(self.parallel.module)


@dataclass(frozen=True)
class Contents:
    """What one process has to write of a checkpoint, all of it in copies: files' contents by name without suffix.

    Of `buffers` (see `other_buffers`) infinity is no sign of a run that diverged.
    """

    tensors: dict[str, dict[str, torch.Tensor]]
    texts: dict[str, Any]
    buffers: frozenset[str] = frozenset()

    @property
    def finite(self) -> bool:
        """Whether no weight or statistic is infinite, and nothing is not a number."""
        weights = self.tensors.get("model", {})
        return all(_finite(t) or (name in self.buffers and not t.isnan().any()) for name, t in weights.items())

    def write(self, folder: Path) -> Files:
        """Write the files, durably; their sizes and hashes."""
        paths = []
        for name, tensors in self.tensors.items():
            save_tensors(tensors, folder / f"{name}.safetensors")
            paths.append(folder / f"{name}.safetensors")
        for name, value in self.texts.items():
            save_json(value, folder / f"{name}.json")
            paths.append(folder / f"{name}.json")
        return store.settle(paths)


def contents(trained: Trained, state: TrainState) -> Contents:
    """Copy what this process has to write: its own state, and on the main process what is whole."""
    parallel = trained.parallel
    whole = {"model": (parallel.module, parallel.weights)}
    if trained.ema is not None:
        whole["ema"] = (trained.ema.module, trained.ema.module.state_dict)
    tensors = {}
    for name, (module, weights) in whole.items():
        with shared_buffers(parallel.accelerator, module):  # statistics (BatchNorm) are the processes' mean
            tensors[name] = _copies(parallel.accelerator, weights())
    moments: dict[str, torch.Tensor] = {}
    settings = encode(parallel.optimizer_state(), "", moments)
    tensors["optimizer"] = _copies(parallel.accelerator, moments)
    own = {f"process-{parallel.accelerator.process_index}": _own_state(trained)}
    if not parallel.accelerator.is_main_process:
        return Contents(own, {})
    counters = {"state": asdict(state), "scaler": parallel.scaler_state()}
    return Contents(own | tensors, {"optimizer": settings, "state": counters}, other_buffers(parallel.module))


def _copies(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the main process copies of `tensors`, which go one by one: some engines have made them for this."""
    if not accelerator.is_main_process:
        return {}
    return {name: tensors.pop(name).detach().to("cpu", copy=True) for name in list(tensors)}


def _finite(tensor: torch.Tensor) -> bool:
    """Its sum is finite only if all of it is, and takes a tenth of the time; a sum of huge numbers may overflow."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def exists(run_dir: Path) -> bool:
    """Whether the run has a checkpoint, be it a damaged one: then it must not start afresh."""
    return store.holds_any(run_dir / "checkpoints")


def resume_point(accelerator: Accelerator, run_dir: Path) -> Stored | None:
    """The newest checkpoint that every process finds sound, the same for all; None if the run has not saved one yet.

    Damaged ones are named and set aside. The caller holds the run's lock.

    Raises:
        UsageError: the run has checkpoints, but no sound one, or they are of another version's format, or the newest
            cannot be read now.
    """
    while found := on_main(accelerator, lambda: _choose(run_dir / "checkpoints")):
        fault, unreadable = _fault_here(found, accelerator.process_index)
        if blocked := first_failure(accelerator, unreadable):
            raise UsageError(blocked)
        if not (reason := first_failure(accelerator, fault)):
            return found
        on_main(accelerator, partial(_pass_over, found.folder, reason))
    return None


def _fault_here(found: Stored, process: int) -> tuple[str, str]:
    """What is wrong with a checkpoint as this process sees it, and why that cannot be told now; else empty strings."""
    own = f"process-{process}.safetensors"
    try:
        if store.read_manifest(found.folder).digest != found.digest:
            raise Damaged("another manifest than the first process's")
        found.verify([own] if own in found.files else [])
    except Damaged as error:
        return f"on process {process}: {error}", ""
    except OSError as error:
        return "", f"on process {process}: {store.unreadable(found.folder, error)}"
    return "", ""


def _choose(root: Path) -> Stored | None:
    store.sweep(root)
    found, wrong = store.choose(root)
    for folder, reason in wrong.items():
        _pass_over(folder, reason)
    if found is None and store.holds_any(root):
        kept = ", ".join(sorted(path.name for path in root.glob("damaged-*"))) or "nothing but links"
        raise UsageError(
            f"{root} has no sound checkpoint to go on from (it holds {kept}); restore one, or start afresh in another"
            " --run-dir."
        )
    if found is not None:
        store.point(root, found)
    return found


def _pass_over(folder: Path, reason: str) -> None:
    kept = store.set_aside(folder)
    print(f"checkpoint {folder} is damaged ({reason}): kept as {kept.name}", flush=True)


def load(stored: Stored, trained: Trained) -> TrainState:
    """Put back all that a checkpoint holds, and return its counters.

    It may come from another engine or number of processes. With another number of processes the random streams of
    dropout are left as they are, and all begin with the mean BatchNorm statistics.

    Raises:
        UsageError: it does not fit the model or the optimizer.
    """
    accelerator, parallel, folder = trained.parallel.accelerator, trained.parallel, stored.folder
    state, scaler = _read_state(folder)
    try:
        tensors = load_file(folder / "optimizer.safetensors")
        optimizer_state = decode(json.loads((folder / "optimizer.json").read_text()), tensors)
        parallel.load(load_file(folder / "model.safetensors"), optimizer_state)
        if trained.ema is not None:
            trained.ema.module.load_state_dict(load_file(folder / "ema.safetensors"))
        parallel.load_scaler(scaler)
        if stored.num_processes == accelerator.num_processes:
            _put_back_own_state(trained, load_file(folder / f"process-{accelerator.process_index}.safetensors"))
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # not the checkpoint's fault
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _unreadable(folder, error) from None
    return state


def _read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    try:
        facts = json.loads((folder / "state.json").read_text())
        return TrainState(**facts["state"]), dict(facts["scaler"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"checkpoint {folder} does not fit this run ({first_line(error)}); restore it, or start afresh in another"
        " --run-dir."
    )


def state_of(stored: Stored) -> TrainState:
    """The counters of a checkpoint.

    Raises:
        UsageError: they are of another version.
    """
    return _read_state(stored.folder)[0]


def find(run_dir: Path, which: str) -> Stored:
    """Checkpoint ``last`` or ``best``; see `lookup.find`."""
    return lookup.find(run_dir / "checkpoints", which)


def keeps_best(run_dir: Path) -> bool:
    """Whether the run has named a best checkpoint."""
    last = store.latest_manifest(run_dir / "checkpoints")
    return last is not None and last.best_step > 0


def load_weights(stored: Stored) -> dict[str, torch.Tensor]:
    """The weights to evaluate: the moving average if the run keeps one."""
    averaged = "ema.safetensors" in stored.files
    return load_file(stored.folder / ("ema.safetensors" if averaged else "model.safetensors"))


def _own_buffers(trained: Trained) -> dict[str, torch.Tensor]:
    """Buffers in which processes differ: BatchNorm statistics of their own micro-batches."""
    modules = {"model": trained.parallel.module, "ema": None if trained.ema is None else trained.ema.module}
    return {
        f"{whose}.{name}": buffer
        for whose, module in modules.items()
        if module is not None and trained.parallel.accelerator.num_processes > 1
        for name, buffer in module.named_buffers()
    }


def _own_state(trained: Trained) -> dict[str, torch.Tensor]:
    """What this process alone has: its buffers, and the generators that dropout and stochastic depth draw from."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states | {name: buffer.to("cpu", copy=True) for name, buffer in _own_buffers(trained).items()}


def _put_back_own_state(trained: Trained, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])
    with torch.no_grad():
        for name, buffer in _own_buffers(trained).items():
            buffer.copy_(states[name])
