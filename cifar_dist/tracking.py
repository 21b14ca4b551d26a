"""Where numbers go: console, ``log.jsonl`` and Weights & Biases, behind one ``log(step, values)``.

Only the job's main process opens a `Tracker`; the others hold a `Silent` one.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm.auto import tqdm

from cifar_dist.command_line import load_config
from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.plan import Plan

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "evaluate", "wandb", "numpy", "safetensors")
NOT_THE_TRAINING = {
    "run_dir", "resume", "max_steps", "log_every", "checkpoint_every", "wandb", "wandb_project", "cache_dir",
    "micro_batch_size",
}  # fmt: skip


def default_run_dir(config: Config) -> Path:
    """``runs/MODEL-DATASET-TIME``, named once by the main process."""
    dataset = Path(config.data.dataset).name or "data"
    model = config.model.model.replace("/", "_").replace(":", "_")
    return Path("runs") / f"{model}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}"


def choose_run_dir(config: Config) -> Path:
    """The run's folder, after checking that it is free or may be continued; nothing is written.

    Raises:
        UsageError: the folder holds something and ``--resume auto`` was not given, or was made with
            other settings.
    """
    if config.run.resume == "auto" and not config.run.run_dir:
        raise UsageError("--resume auto needs --run-dir: the folder of the run to continue.")
    run_dir = Path(config.run.run_dir) if config.run.run_dir else default_run_dir(config)
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"--run-dir {run_dir} is a file; name a folder.")
    if run_dir.exists() and any(run_dir.iterdir()):
        if config.run.resume != "auto":
            raise UsageError(f"--run-dir {run_dir} is not empty; name another folder, or continue with --resume auto.")
        _check_same_training(run_dir / "config.yaml", config)
    return run_dir


def create_run_dir(run_dir: Path, config: Config) -> None:
    """Create the run's folder with its ``config.yaml``.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.save(run_dir / "config.yaml")
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir} cannot be written ({error.strerror}); name another folder.") from None


def _check_same_training(saved: Path, config: Config) -> None:
    if not saved.is_file():
        raise UsageError(f"--resume auto: {saved.parent} is no run folder (config.yaml is missing).")
    old, new = load_config(saved).flat(), config.flat()
    changed = [
        f"--{k.replace('_', '-')} {old[k]} -> {new[k]}" for k in new if k not in NOT_THE_TRAINING and old[k] != new[k]
    ]
    if changed:
        raise UsageError(f"--resume auto: the run in {saved.parent} has other settings ({'; '.join(changed)}).")


def save_facts(run_dir: Path, plan: Plan, device: str, facts: dict[str, Any]) -> None:
    """Write ``plan.json`` and ``environment.json``: what a reader needs to repeat the run."""
    environment = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_threads": torch.get_num_threads(),
        "device": device,
        "num_processes": plan.num_processes,
        "versions": {name: _version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }
    for name, value in (("plan.json", asdict(plan)), ("environment.json", environment)):
        (run_dir / name).write_text(json.dumps(value, indent=1) + "\n")


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Silent:
    """A tracker for the processes that do not speak."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def advance(self, step: int) -> None:
        """Show nothing."""

    def training(self, step: int, values: dict[str, float]) -> None:
        """Record nothing."""

    def evaluation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Record nothing."""

    def close(self) -> None:
        """Close nothing."""


class Tracker(Silent):
    """The main process's voice.

    Args:
        run_dir: the run's folder; `log.jsonl` and W&B's files live in it.
        config: the merged configuration, shown in W&B.
        plan: its steps scale the progress bar and turn steps into epochs.
        first_step: records after this step are dropped from `log.jsonl`, since they will come again.
    """

    def __init__(self, run_dir: Path, config: Config, plan: Plan, first_step: int):
        _forget_after(run_dir / "log.jsonl", first_step)
        self._file: TextIO = (run_dir / "log.jsonl").open("a", encoding="utf-8")
        self._plan, self._selected_on = plan, config.data.select_on
        self._bar = None
        if sys.stderr.isatty():
            columns, rows = shutil.get_terminal_size()  # tqdm draws nothing where a terminal says it has none
            self._bar = tqdm(total=plan.total_steps, initial=first_step, unit="step", ncols=columns, nrows=rows)
        self._wandb = start_wandb(run_dir, config)
        self._began, self._first_step = time.perf_counter(), first_step

    def say(self, text: str) -> None:
        """Print a line for people, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move a terminal's progress bar to `step`; it redraws itself a few times a second at most."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Record training means at `step` and show where the run is: on a terminal's bar, else as a line."""
        self._log(step, values)
        shown = {
            "loss": f"{values['train/loss']:.4f}",
            "acc": f"{values['train/top1']:.2%}",
            "lr": f"{values['lr']:.3g}",
            "images/s": f"{values['images_per_second']:,.0f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        steps_left = self._plan.total_steps - step
        seconds_left = (time.perf_counter() - self._began) / (step - self._first_step) * steps_left
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        epoch = self._plan.epoch_of(step)
        self.say(f"epoch {epoch:6.2f}  step {step}/{self._plan.total_steps}  {numbers}  left {_clock(seconds_left)}")

    def evaluation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Record the scores of the split that selects the best checkpoint, saying so if it is test."""
        record = {f"val/{name}": value for name, value in scores.items()}
        on_test = self._selected_on == "test"
        self._log(step, record | ({"selected_on": "test"} if on_test else {}))
        name = "TEST (selecting on it)" if on_test else "val"
        epoch = self._plan.epoch_of(step)
        mark = "  best so far" if best else ""
        self.say(f"epoch {epoch:6.2f}  {name} loss {scores['loss']:.4f}  {name} acc {scores['top1']:.2%}{mark}")

    def _log(self, step: int, values: dict[str, Any]) -> None:
        record = {"epoch": self._plan.epoch_of(step), **values}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def close(self) -> None:
        """Flush everything and finish the W&B run."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _forget_after(log: Path, step: int) -> None:
    """Drop records later than `step` and a torn last line; a resumed run writes them again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    aside = log.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, log)


def wandb_mode(config: Config) -> str:
    """What ``--wandb`` asks for; by default online where a key is at hand and works, else offline."""
    if config.run.wandb:
        return config.run.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error:
        print("Weights & Biases cannot be reached with the key at hand; logging offline.", file=sys.stderr)
        return "offline"


def start_wandb(run_dir: Path, config: Config) -> Any:
    """Open the run's W&B run (the same one again after a resume), or None when disabled."""
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    return wandb.init(
        project=config.run.wandb_project,
        name=run_dir.name,
        id=id_file.read_text().strip(),
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        dir=run_dir,
        config=config.flat(),
        settings=wandb.Settings(silent=True),
    )


def log_report(run_dir: Path, metrics: dict[str, float], pictures: dict[str, Path]) -> None:
    """Add a report's final metrics and pictures to the run's own W&B run."""
    run = start_wandb(run_dir, load_config(run_dir / "config.yaml"))
    if run is None:
        return
    import wandb

    run.summary.update(metrics)
    run.log({name: wandb.Image(str(path)) for name, path in pictures.items()})
    run.finish()
