"""What the campaigns share: their recipe, what a run leaves behind, digested, and a command line."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from benchmarks.recovery.jobs import Job
from cifar_dist.config import OptimConfig, RunConfig
from cifar_dist.distributed.group import start
from cifar_dist.distributed.hardware import processor
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import checkpoint, saver, store
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.train_state import TrainState

T = TypeVar("T")
FLAGS = shlex.split(  # two epochs of 7 steps with all that has a state, or draws at random
    "--dataset digits --model test_efficientnet --img-size 32 --wandb disabled --epochs 2 --batch-size 192"
    " --micro-batch-size 48 --lr 2e-3 --warmup-epochs 1 --clip-grad 1 --drop 0.2 --mixup 0.4 --cutout 6"
    " --smoothing 0.1 --model-ema-decay 0.9 --log-every 1 --checkpoint-every 3 --resume auto"
)
STEPS = 14
TIMING = {"seconds", "images_per_second", "data_wait", "peak_memory_bytes"}  # all else is alike in every repetition


def checkpoints_of(run_dir: Path) -> list[Path]:
    """All checkpoints that have a name, sound or not, the newest last."""
    folders = [path for path in run_dir.glob("checkpoints/step-*") if path.name[5:].replace("-", "").isdecimal()]
    return sorted(folders, key=lambda folder: [int(number) for number in folder.name.split("-")[1:]])


def steps_of(run_dir: Path) -> list[int]:
    """Their steps."""
    return [int(folder.name.split("-")[1]) for folder in checkpoints_of(run_dir)]


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint, by its manifest alone; an empty string if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if folder.name.split("-")[1] != f"{manifest['step']:08d}":
            return f"the manifest of {folder.name} is of step {manifest['step']}"
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            if (len(content), hashlib.sha256(content).hexdigest()) != (entry["bytes"], entry["sha256"]):
                return f"{name} is not what the manifest says"
        needed = {"model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json"}
        needed |= {f"process-{rank}.safetensors" for rank in range(manifest["num_processes"])}
        return f"not in the manifest: {', '.join(sorted(needed - manifest['files'].keys()))}" * (
            not needed <= manifest["files"].keys()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return repr(error)


def newest_sound(run_dir: Path) -> int | None:
    """Step of the newest checkpoint without a fault."""
    return max((int(f.name.split("-")[1]) for f in checkpoints_of(run_dir) if not fault_of(f)), default=None)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMING}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def final_digest(run_dir: Path) -> str:
    """sha256 over all that a run has come to.

    Every tensor of the newest checkpoint (weights, average, optimizer, each process's random streams and statistics),
    its counters, and every logged number of every step, without times.
    """
    digest, folder = hashlib.sha256(), checkpoints_of(run_dir)[-1]
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for file in (folder / "optimizer.json", folder / "state.json"):
        digest.update(json.dumps(_timeless(json.loads(file.read_text())), sort_keys=True).encode())
    for line in (run_dir / "log.jsonl").read_text().splitlines():
        digest.update(json.dumps(_timeless(json.loads(line)), sort_keys=True).encode())
    return digest.hexdigest()


class Failures(list[str]):
    """Sentences, each said as soon as it is known."""

    def add(self, failure: str) -> None:
        """One more."""
        print(f"FAILED  {failure}", flush=True)
        self.append(failure)


class AtOnce(Executor):
    """Does in the calling thread what it is given."""

    def __init__(self, max_workers: int = 1):
        del max_workers

    def submit(self, work: Callable[..., T], /, *args: Any, **named: Any) -> Future[T]:
        """What `work` came to, or raised."""
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **named))
        except BaseException as error:
            done.set_exception(error)
        return done


class Small:
    """A tiny training whose weights, average, momentum and random stream all tell its step, to save and load by itself.

    Args:
        run_dir: where checkpoints go.
        width: weights are `width` x `width`.
        one_thread: write in the thread that saves, so that its system calls are counted in their order.
    """

    def __init__(self, run_dir: Path, width: int = 8, one_thread: bool = False):
        model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.1))
        self.run_dir, self._ema = run_dir, ModelEmaV3(model)
        run_dir.mkdir(parents=True, exist_ok=True)
        optimizer = make_optimizer(model, OptimConfig(opt="momentum"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        accelerator = start("fp32", 60)
        self._trained = Trained(Replicated(accelerator, model, optimizer, None), self._ema)
        self._saver = Saver(run_dir, accelerator, CheckpointTimer(RunConfig()))
        if one_thread:
            saver.beside, store.ThreadPoolExecutor = AtOnce().submit, AtOnce  # type: ignore[misc,assignment]

    def _tensors(self) -> list[torch.Tensor]:
        parallel = self._trained.parallel
        momenta = [state["momentum_buffer"] for state in parallel.optimizer.state.values()]
        return [*parallel.module.parameters(), *momenta]

    def save(self, step: int, best: bool = False) -> None:
        """Save the checkpoint of a step, keeping the last two and the best."""
        torch.manual_seed(step)
        with torch.no_grad():
            for tensor in self._tensors():
                tensor.fill_(step)
            for tensor in self._ema.module.parameters():
                tensor.fill_(-step)
        self.run_dir.mkdir(exist_ok=True)
        self._saver.save(self._trained, TrainState(step=step), best)
        self._saver.finish()

    def load(self) -> int:
        """Load the checkpoint that is chosen; its step, on which all of it must agree, or 0 if there is none."""
        found = checkpoint.resume_point(self._trained.parallel.accelerator, self.run_dir)
        if found is None:
            return 0
        checkpoint.load(found, self._trained)
        tensors = [*self._tensors(), *(-tensor for tensor in self._ema.module.parameters())]
        [step] = {value for tensor in tensors for value in tensor.unique().tolist()} | {float(torch.initial_seed())}
        return int(step)


def reference(folder: Path, count: int, flags: list[str] = FLAGS, real: bool = False) -> tuple[str, float]:
    """Digest and seconds of an uninterrupted run on `count` processes."""
    name = f"whole-{count}{'-real' * real}"
    began, job = (
        time.monotonic(),
        Job([*flags, "--run-dir", str(folder / name)], count, folder / f"{name}.txt", real=real),
    )
    statuses = job.wait(300)
    seconds = time.monotonic() - began
    job.end()
    if statuses is None or any(statuses):
        raise RuntimeError(f"the uninterrupted run failed ({statuses}): {folder / name}.txt")
    return final_digest(folder / name), seconds


def campaign(
    doc: str, run: Callable[..., dict[str, Any]], trials: int, more: Callable[..., None] | None = None
) -> None:
    """A campaign's command line: run it, print its rows, write JSON, and exit with status 1 if something failed.

    Args:
        doc: the script's docstring.
        run: called with trials, seed, folder and what `more` declares; returns ``rows`` (dicts of a table) and
            ``failures`` (sentences), among others.
        trials: how many by default.
        more: adds arguments to the parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are made and failed ones stay (default: a new one)")
    parser.add_argument("--json", type=Path)
    if more is not None:
        more(parser)
    options = vars(parser.parse_args())
    json_path, folder = options.pop("json"), options.pop("folder")
    folder = folder or Path(tempfile.mkdtemp(prefix="recovery-"))
    began = time.monotonic()
    found = run(folder=folder, **options)
    found["seconds"] = round(time.monotonic() - began, 1)
    columns = list(dict.fromkeys(name for row in found["rows"] for name in row))
    table = [columns, *([str(row.get(name, "")) for name in columns] for row in found["rows"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"{found['seconds']} s; " + (f"failed runs are in {folder}" if found["failures"] else "nothing failed"))
    if json_path is not None:
        packages = ("torch", "accelerate", "safetensors", "timm", "numpy")
        machine = {
            "command": shlex.join(["python", "-m", f"benchmarks.recovery.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "processor": processor(),
            "cores": os.cpu_count(),
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        }
        json_path.write_text(json.dumps(machine | found, indent=1) + "\n")
    if not found["failures"]:
        shutil.rmtree(folder)
    sys.exit(1 if found["failures"] else 0)


def begin(folder: Path) -> None:
    """Make the folder, with a cache of its own, and keep this process to one thread, as its children will be."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    torch.set_num_threads(1)
