"""Checkpoints: written aside, made durable, then renamed, so a half-written one never has a name.

``RUN_DIR/checkpoints/step-XXXXXXXX/`` holds ``model.safetensors``, ``ema.safetensors`` (when kept),
``optimizer.safetensors`` and ``optimizer.json``, all of them whole whatever the engine, ``process-R.safetensors`` with
what only process R has (random streams, BatchNorm statistics), and ``state.json``.
The links ``last`` and ``best`` name two of these folders.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from cifar_dist.distributed import first_failure, on_main, shared_buffers
from cifar_dist.durable import decode, encode, fsync, save_json, save_tensors
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.parallel import Replicated
from cifar_dist.train_state import TrainState

FORMAT = 2


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


def save(run_dir: Path, trained: Trained, state: TrainState, best: bool) -> None:
    """Write a checkpoint and point ``last`` (and ``best``) at it. Every process must call this.

    Raises:
        Diverged: a weight is not finite; nothing is written.
        UsageError: the file system refused on some process (full, read-only), on all of them alike; the
            checkpoints before it are intact.
    """
    accelerator = trained.parallel.accelerator
    root = run_dir / "checkpoints"
    name = f"step-{state.step:08d}"
    if not best and on_main(accelerator, lambda: _named(root, "last") == name):
        return  # a step has one state
    aside = root / f".tmp-{name}"
    weights, averaged = _whole_weights(trained)
    optimizer_state = trained.parallel.optimizer_state()
    finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
    if not on_main(accelerator, lambda: finite):
        raise Diverged(f"weights are not finite after step {state.step}; lower --lr or set --clip-grad.")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def write() -> None:
        save_tensors(_own_state(trained), aside / f"process-{accelerator.process_index}.safetensors")
        if accelerator.is_main_process:
            _write(aside, trained.parallel, state, (weights, averaged, optimizer_state))

    for everyone, work in ((False, begin), (True, write), (False, lambda: _commit(root, aside, name, best))):
        failure = _attempt(work) if everyone or accelerator.is_main_process else ""
        if failure := first_failure(accelerator, failure):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
            raise UsageError(f"--run-dir {run_dir}: {name} could not be saved ({failure}); older ones are intact.")


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


def _attempt(work: Callable[[], None]) -> str:
    """Why `work` failed at the file system, or an empty string."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return _first_line(error)
    return ""


def _write(aside: Path, parallel: Replicated, state: TrainState, whole: tuple[dict[str, Any], ...]) -> None:
    weights, averaged, optimizer_state = whole
    save_tensors(weights, aside / "model.safetensors")
    if averaged:
        save_tensors(averaged, aside / "ema.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    save_json(encode(optimizer_state, "", tensors), aside / "optimizer.json")
    save_tensors(tensors, aside / "optimizer.safetensors")
    facts = {"format": FORMAT, "num_processes": parallel.accelerator.num_processes, "state": asdict(state)}
    save_json(facts | {"scaler": parallel.scaler_state()}, aside / "state.json")


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
    kept = {_named(root, link) for link in ("last", "best")}
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            shutil.rmtree(folder)


def _named(root: Path, link: str) -> str | None:
    """The folder that ``last`` or ``best`` names, if there is such a link."""
    return os.readlink(root / link) if (root / link).is_symlink() else None


def load(run_dir: Path, trained: Trained) -> None:
    """Put back all of the last checkpoint but its `read_state`. Every process must call this.

    It may come from another engine or number of processes. With another number of processes the random streams of
    dropout are left as they are, and all begin with the mean BatchNorm statistics.

    Raises:
        UsageError: a file is missing or damaged, or the format is another than this version's.
    """
    accelerator, parallel = trained.parallel.accelerator, trained.parallel
    folder = run_dir / "checkpoints" / "last"
    facts = _read_facts(folder)
    try:
        tensors = load_file(folder / "optimizer.safetensors")
        optimizer_state = decode(json.loads((folder / "optimizer.json").read_text()), tensors)
        parallel.load(load_file(folder / "model.safetensors"), optimizer_state)
        if trained.ema is not None:
            trained.ema.module.load_state_dict(load_file(folder / "ema.safetensors"))
        parallel.load_scaler(facts["scaler"])
        if facts["num_processes"] == accelerator.num_processes:
            _put_back_own_state(trained, load_file(folder / f"process-{accelerator.process_index}.safetensors"))
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # not the checkpoint's fault
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, error) from None


def _read_facts(folder: Path) -> dict[str, Any]:
    """``state.json``, checked.

    Raises:
        UsageError: it is missing, damaged or of a newer format.
    """
    try:
        facts = json.loads((folder / "state.json").read_text())
        if facts["format"] != FORMAT:
            raise UsageError(
                f"checkpoint {folder} has format {facts['format']}, this version of cifar-dist reads {FORMAT};"
                " go on with the version that wrote it."
            )
        TrainState(**facts["state"])
        return {**facts, "num_processes": int(facts["num_processes"]), "scaler": dict(facts["scaler"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"checkpoint {folder} cannot be read ({_first_line(error)}); restore it, or start afresh in another --run-dir."
    )


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
