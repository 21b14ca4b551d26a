"""The run folder: which one, and what identifies the training in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from filelock import FileLock, Timeout

from cifar_dist.command_line import load_config
from cifar_dist.config import Config
from cifar_dist.distributed.hardware import processor
from cifar_dist.durable import fsync, read_json, replace_text
from cifar_dist.errors import UsageError
from cifar_dist.plan import Plan
from cifar_dist.recovery.store import sweep

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "datasets", "evaluate", "wandb", "numpy", "safetensors",
    "deepspeed", "triton",
)  # fmt: skip
REQUEUE = "REQUEUE"
BOOKKEEPING = {  # settings that say where a run is and what is kept of it
    "run_dir", "cache_dir", "resume", "wandb", "wandb_project", "log_every", "checkpoint_every", "keep_last",
    "time_limit",
}  # fmt: skip
NOT_THE_TRAINING = {
    *BOOKKEEPING, "max_steps", "micro_batch_size", "auto_micro_batch", "on_nan", "skip_corrupt", "ddp_timeout",
}  # fmt: skip
_DIGESTS = {  # facts of the data that say nothing to people, and what it means when they differ
    "data_fingerprint": "files have other names or sizes, or are of another revision on the Hub",
    "train_val_split": "labels, or the order of images, are others",
    "pixel_digest": "images are others, in files of the same names and sizes, or the cache of them is damaged",
}


def choose_run_dir(config: Config) -> Path:
    """The run's folder, after checking that it is free or may be continued; nothing is written.

    The default is ``runs/MODEL-DATASET-TIME``.

    Raises:
        UsageError: the folder holds something and ``--resume auto`` was not given, or was made with
            other settings.
    """
    if config.run.run_dir is None:
        if config.run.resume == "auto":
            raise UsageError("--resume auto needs --run-dir: the folder of the run to continue.")
        model = config.model.model.replace("/", "_").replace(":", "_")
        now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]  # milliseconds, as a shell's loop starts several in a second
        return Path("runs") / f"{model}-{Path(config.data.dataset).resolve().name}-{now}"
    run_dir = Path(config.run.run_dir)
    try:
        run_dir.stat()
    except FileNotFoundError:
        return run_dir
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir!s:.80} cannot be used ({error.strerror}); name another.") from None
    if not run_dir.is_dir():
        raise UsageError(f"--run-dir {run_dir} is a file; name a folder.")
    if any(path.name != ".lock" and not path.name.startswith(".tmp-") for path in run_dir.iterdir()):
        if config.run.resume != "auto":
            raise UsageError(f"--run-dir {run_dir} is not empty; name another, or continue with --resume auto.")
        if not (run_dir / "config.yaml").is_file():
            raise UsageError(f"--resume auto: {run_dir} is no run folder (config.yaml is missing).")
        _refuse_changes(config)
    return run_dir


def _refuse_changes(config: Config) -> None:
    """Raise `UsageError` if the run folder holds a run with other settings."""
    if changed := changed_settings(config):
        raise UsageError(
            f"--resume auto: the run in {config.run.run_dir} has other settings ({'; '.join(changed)}); give those,"
            f" or another --run-dir, which may begin with its weights (--init-weights {config.run.run_dir})."
        )


def changed_settings(config: Config) -> list[str]:
    """What makes this another training than the one that its run folder holds: ``--lr 0.001 -> 0.5``.

    Data may have moved: another place that there is is none. What lies there is for the caller to compare.

    Raises:
        UsageError: the settings saved there cannot be read.
    """
    saved = Path(config.run.run_dir or "") / "config.yaml"
    if not saved.is_file():
        return []
    before = load_config(saved)
    old = before.flat() | {"data_size": before.data.pixels}
    new = config.flat() | {"data_size": config.data.pixels}
    if new["precision"] == "auto":  # it goes on as it began
        new |= {name: old[name] for name in ("precision", "channels_last")}
    if Path(config.data.dataset).exists():
        new["dataset"] = old["dataset"]
    return [
        f"--{k.replace('_', '-')} {old[k]} -> {new[k]}" for k in new if k not in NOT_THE_TRAINING and old[k] != new[k]
    ]


def identity(config: Config) -> dict[str, str]:
    """What every process of a job must have alike before it begins: settings, code and libraries."""
    settings = {f"--{k.replace('_', '-')}": str(v) for k, v in config.flat().items() if k != "cache_dir"}
    return settings | {
        "commit": str(_git_commit()),
        "set of libraries": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def run_lock(run_dir: Path) -> FileLock:
    """The lock that one training at a time holds on its folder; the kernel frees it when its process dies."""
    return FileLock(run_dir / ".lock", timeout=0.2)  # which `is_running` can hold for a moment


def is_running(run_dir: Path) -> bool:
    """Whether a training holds a folder's lock; of other machines, only where the file system shares such locks."""
    try:
        with (run_dir / ".lock").open() as file:  # a shared lock, so that those who ask do not see each other
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def create_run_dir(lock: FileLock, config: Config, plan: Plan, facts: dict[str, Any]) -> None:
    """Make the folder, or take it up again, lock it, and write what identifies the run.

    ``config.yaml``, ``plan.json`` and ``environment.json`` (command, versions, hardware and `facts`). A run that
    goes on keeps its first environment and adds this start to ``restarts``.

    Args:
        lock: of `run_lock`; the caller keeps it for as long as it writes to the folder.
        config: the merged configuration.
        plan: the derived numbers.
        facts: must hold ``data_fingerprint`` and ``class_names``.

    Raises:
        UsageError: the folder cannot be written, another run has it, or the data differ from those the run began
            with.
    """
    run_dir = Path(lock.lock_file).parent
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        fsync(run_dir.parent)
        lock.acquire()
        if config.run.resume == "auto":
            _refuse_changes(config)  # once more: another training may have begun here, and ended, in the meantime
        sweep(run_dir / "checkpoints")  # what a killed save has left takes room
        _refuse_small_disk(run_dir, config, plan)
        _write_identity(run_dir, config, plan, facts)
    except (Timeout, FileExistsError):
        raise UsageError(f"--run-dir {run_dir} is in use by another training; wait, or name another.") from None
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir} cannot be written ({error.strerror}); name another folder.") from None


def _refuse_small_disk(run_dir: Path, config: Config, plan: Plan) -> None:
    """A checkpoint is written before an older one goes; what the run has already is there to be replaced."""
    held = sum(file.stat().st_size for file in run_dir.glob("checkpoints/step-*/*"))
    needed = (config.run.keep_last + 2) * plan.checkpoint_bytes - held
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise UsageError(
            f"--run-dir {run_dir}: checkpoints take {plan.checkpoint_bytes / 2**20:,.0f} MiB each, and the last"
            f" --keep-last {config.run.keep_last}, the best and the next one need {needed / 2**20:,.0f} MiB, but"
            f" {free / 2**20:,.0f} MiB are free; make room, or name another folder."
        )


def _write_identity(run_dir: Path, config: Config, plan: Plan, facts: dict[str, Any]) -> None:
    environment = {**_environment(plan), **facts}
    resuming = config.run.resume == "auto" and (run_dir / "environment.json").is_file()
    if resuming:
        first = read_json(run_dir / "environment.json")
        for fact, found in facts.items():
            if first.get(fact, found) != found:  # runs of earlier versions lack some, and gain them below
                how = _DIGESTS.get(fact, f"{shorten(str(first.get(fact)), 60)} -> {shorten(str(found), 60)}")
                raise UsageError(
                    f"--resume auto: {fact.replace('_', ' ')} differs from when the run in {run_dir} began ({how});"
                    f" restore the data of --dataset {config.data.dataset}, or train on them in another --run-dir."
                )
        environment = facts | first | {"restarts": [*first.get("restarts", []), _environment(plan)]}
    if config.run.resume != "auto" and (run_dir / "config.yaml").exists():
        raise FileExistsError
    (run_dir / REQUEUE).unlink(missing_ok=True)
    replace_text(run_dir / "config.yaml", config.as_recipe())  # first: a folder without it is no run's
    replace_text(run_dir / "plan.json", json.dumps(asdict(plan), indent=1) + "\n")
    replace_text(run_dir / "environment.json", json.dumps(environment, indent=1) + "\n")


def recorded_data_mode(run_dir: Path) -> str | None:
    """How a run that goes on holds its data: as it began, since resident and stream have orders of their own."""
    path = run_dir / "environment.json"
    return read_json(path).get("data_mode") if path.is_file() else None


def note_resumption(run_dir: Path, lost: dict[str, float]) -> dict[str, float]:
    """Add to this start's entry in ``environment.json`` where the run goes on and what was lost; see `lost_work`."""
    path = run_dir / "environment.json"
    environment = read_json(path)
    if environment.get("restarts"):
        environment["restarts"][-1] |= lost
        replace_text(path, json.dumps(environment, indent=1) + "\n")
    return lost


def ask_for_requeue(run_dir: Path, reason: str) -> None:
    """Leave word for a scheduler that the run has saved all and should be started again, and why it stopped."""
    replace_text(run_dir / REQUEUE, reason + "\n")


def note_bad_step(run_dir: Path, step: int, lr: float, ids: list[int]) -> str:
    """Write down a step whose loss or gradient is not finite, for those who look for the image; a sentence about it."""
    note = run_dir / f"not-finite-{step:08d}.json"
    note.write_text(json.dumps({"step": step, "lr": lr, "sample_ids": ids}) + "\n", encoding="utf-8")
    shown = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
    return (
        f"the loss or its gradient is not finite in step {step} (counted from 0; lr {lr:.3g};"
        f" {len(ids)} images, ids {shown}; all of them in {note})"
    )


def _environment(plan: Plan) -> dict[str, Any]:
    """One start: what a reader needs to repeat it."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
        "num_processes": plan.num_processes,
        "timm_fused_attn": os.environ.get("TIMM_FUSED_ATTN"),  # which of timm's attentions are fused
        "versions": {name: _version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this source tree, with ``+changes`` when files differ from it."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*here, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changed else "")
