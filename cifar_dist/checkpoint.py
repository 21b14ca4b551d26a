"""What a checkpoint holds, how a training is written into one, and how it is put back.

A folder of `checkpoint_store` holds ``model.safetensors``, ``ema.safetensors`` (when kept), ``optimizer.safetensors``
and ``optimizer.json``, all of them whole whatever the engine, ``process-R.safetensors`` with what only process R has
(random streams, BatchNorm statistics), and ``state.json``. Every function but the readers must be called by every
process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from cifar_dist import checkpoint_store as store
from cifar_dist.checkpoint_store import Damaged, Files, Stored
from cifar_dist.distributed import first_failure, gather, on_main, shared_buffers
from cifar_dist.durable import decode, encode, save_json, save_tensors
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.parallel import Replicated
from cifar_dist.train_state import TrainState

T = TypeVar("T")


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


def save(run_dir: Path, trained: Trained, state: TrainState, best: bool, keep_last: int = 2) -> None:
    """Commit a checkpoint; then drop all but the newest `keep_last` and the best one.

    Raises:
        Diverged: a weight is not finite; nothing is written.
        UsageError: the file system refused on some process (full, read-only), on all of them alike; the
            checkpoints before it are intact.
    """
    accelerator = trained.parallel.accelerator
    root = run_dir / "checkpoints"
    if not best and on_main(accelerator, lambda: _holds(root, state)):
        return
    whole = (*_whole_weights(trained), trained.parallel.optimizer_state())
    finite = all(bool(tensor.isfinite().all()) for tensor in whole[0].values())
    if not on_main(accelerator, lambda: finite):
        raise Diverged(f"weights are not finite after step {state.step}; lower --lr or set --clip-grad.")
    aside, failure = on_main(accelerator, lambda: _attempt(lambda: store.begin(root, state.step)))
    files: Files = {}
    if aside is not None:
        written = gather(accelerator, _attempt(lambda: _write(aside, trained, state, whole)))
        failure = next(filter(None, (found for _, found in written)), "")
        files = {name: facts for found, _ in written for name, facts in (found or {}).items()}
    if aside is not None and not failure:
        facts = {"step": state.step, "num_processes": accelerator.num_processes, "files": files}
        _, failure = on_main(accelerator, lambda: _attempt(lambda: _commit(root, aside, best, facts, keep_last)))
    if failure:
        on_main(accelerator, lambda: shutil.rmtree(aside or "", ignore_errors=True))
        raise UsageError(
            f"--run-dir {run_dir}: the checkpoint of step {state.step} could not be saved ({failure}); older ones are"
            " intact."
        )


def _holds(root: Path, state: TrainState) -> bool:
    last = store.latest_manifest(root)
    return last is not None and last.step == state.step and state_of(last) == state


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """What `work` returns, and why it failed at the file system or an empty string."""
    try:
        return work(), ""
    except (OSError, SafetensorError) as error:
        return None, _first_line(error)


def _whole_weights(trained: Trained) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """On the main process: copies of the model's weights and the average's (empty if none is kept).

    Statistics (BatchNorm) are the processes' mean.
    """
    accelerator, copies = trained.parallel.accelerator, []
    average = {} if trained.ema is None else {trained.ema.module: trained.ema.module.state_dict}
    for module, whole in {trained.parallel.module: trained.parallel.weights, **average}.items():
        with shared_buffers(accelerator, module):
            found = whole()
            if accelerator.is_main_process:
                copies.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()})
    return tuple(copies + [{}] * (2 - len(copies)))  # type: ignore[return-value]


def _write(aside: Path, trained: Trained, state: TrainState, whole: tuple[dict[str, Any], ...]) -> Files:
    """This process's files, durably, with their sizes and hashes."""
    parallel = trained.parallel
    own = aside / f"process-{parallel.accelerator.process_index}.safetensors"
    save_tensors(_own_state(trained), own)
    if not parallel.accelerator.is_main_process:
        return store.settle([own])
    weights, averaged, optimizer_state = whole
    save_tensors(weights, aside / "model.safetensors")
    if averaged:
        save_tensors(averaged, aside / "ema.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    save_json(encode(optimizer_state, "", tensors), aside / "optimizer.json")
    save_tensors(tensors, aside / "optimizer.safetensors")
    save_json({"state": asdict(state), "scaler": parallel.scaler_state()}, aside / "state.json")
    return store.settle(path for path in aside.iterdir() if path == own or not path.name.startswith("process-"))


def _commit(root: Path, aside: Path, best: bool, facts: dict[str, Any], keep_last: int) -> None:
    stored = store.commit(root, aside, best, facts)
    store.point(root, stored)
    store.prune(root, keep_last, stored.best_step)


def exists(run_dir: Path) -> bool:
    """Whether the run has a checkpoint, be it a damaged one: then it must not start afresh."""
    return store.holds_any(run_dir / "checkpoints")


def resume_point(accelerator: Accelerator, run_dir: Path) -> Stored | None:
    """The newest checkpoint that every process finds sound, the same for all; None if the run has not saved one yet.

    Damaged ones are named and set aside. The caller holds the run's lock.

    Raises:
        UsageError: the run has checkpoints, but no sound one, or they are of another version's format.
    """
    while found := on_main(accelerator, lambda: _choose(run_dir / "checkpoints")):
        reason = first_failure(accelerator, _fault_here(found, accelerator.process_index))
        if not reason:
            return found
        on_main(accelerator, partial(_pass_over, found.folder, reason))
    return None


def _fault_here(found: Stored, process: int) -> str:
    """What is wrong with a checkpoint as this process sees it, or an empty string."""
    own = f"process-{process}.safetensors"
    try:
        if store.read_manifest(found.folder).digest != found.digest:
            raise Damaged("another manifest than the first process's")
        found.verify([own] if own in found.files else [])
    except Damaged as error:
        return f"on process {process}: {error}"
    return ""


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
        f"checkpoint {folder} does not fit this run ({_first_line(error)}); restore it, or start afresh in another"
        " --run-dir."
    )


def state_of(stored: Stored) -> TrainState:
    """The counters of a checkpoint.

    Raises:
        UsageError: they are of another version.
    """
    return _read_state(stored.folder)[0]


def find(run_dir: Path, which: str) -> Stored:
    """Checkpoint ``last`` or ``best``; see `checkpoint_store.find`."""
    return store.find(run_dir / "checkpoints", which)


def keeps_best(run_dir: Path) -> bool:
    """Whether the run has named a best checkpoint."""
    last = store.latest_manifest(run_dir / "checkpoints")
    return last is not None and last.best_step > 0


def load_weights(stored: Stored) -> dict[str, torch.Tensor]:
    """The weights to evaluate: the moving average if the run keeps one."""
    averaged = "ema.safetensors" in stored.files
    return load_file(stored.folder / ("ema.safetensors" if averaged else "model.safetensors"))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    return states | _own_buffers(trained)


def _put_back_own_state(trained: Trained, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if "random.cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random.cuda"])
    with torch.no_grad():
        for name, buffer in _own_buffers(trained).items():
            buffer.copy_(states[name])
