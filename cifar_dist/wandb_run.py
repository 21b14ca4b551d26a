"""The run's page on Weights & Biases: one run per run folder, whatever the number of starts.

``log.jsonl`` is the truth; W&B is a copy for comparing runs, and its failures never end a training.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from cifar_dist.config import Config
from cifar_dist.errors import UsageError


def wandb_mode(config: Config) -> str:
    """What ``--wandb`` asks for; by default online where a key is at hand and works, else offline.

    Raises:
        UsageError: ``--wandb online`` was asked for but no key works.
    """
    asked = config.run.wandb or os.environ.get("WANDB_MODE")
    if asked in ("offline", "disabled"):
        return asked
    import wandb

    try:
        problem = "" if wandb.login(prompt=False) else "no API key is configured"
    except wandb.Error as error:
        problem = (str(error).splitlines() or ["it cannot be reached"])[0]
    if problem and asked:
        raise UsageError(f"--wandb {asked}: {problem}; run wandb login, or take --wandb offline.")
    return "offline" if problem else "online"


def start_wandb(run_dir: Path, config: Config) -> Any:
    """Open the run's W&B run (the same one again after a resume), or None when disabled or out of reach."""
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    try:
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
    except wandb.Error as error:
        print(f"warning: W&B does not start ({error}); log.jsonl has everything.", file=sys.stderr, flush=True)
        return None


def log_report(run_dir: Path, config: Config, step: int, metrics: dict[str, Any], pictures: dict[str, Path]) -> None:
    """Add a report's final metrics, and at `step` its pictures, to the run's own W&B run."""
    run = start_wandb(run_dir, config)
    if run is None:
        return
    import wandb

    run.summary.update(metrics)
    run.log({f"report/{name}": wandb.Image(str(path)) for name, path in pictures.items()}, step=step)
    run.finish()
