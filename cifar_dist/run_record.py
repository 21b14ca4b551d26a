"""Reading back what a training left in its run folder."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_dist.command_line import load_config
from cifar_dist.config import Config, DataConfig
from cifar_dist.durable import read_json
from cifar_dist.errors import UsageError
from cifar_dist.run_log import LOG, read_log


def epoch_mean(series: tuple[list[int], list[float]], steps_per_epoch: int, step: int) -> float | None:
    """The mean of a training quantity over the epoch that `step` ends or is in, up to it, or over the last one before
    of which something was logged; None if nothing was.

    A record is taken for the mean of the steps since the one before; after a resume within an epoch it is of those
    since then.
    """
    steps, values = series
    last = bisect_right(steps, step)
    if last == 0:
        return None
    first = (min(step, steps[last - 1]) - 1) // steps_per_epoch * steps_per_epoch
    before, total = first, 0.0
    for place in range(bisect_right(steps, first), last):
        before, total = steps[place], total + (steps[place] - before) * values[place]
    return total / (before - first)


@dataclass(frozen=True)
class Run:
    """What a run folder says about its training, read by `open_run`."""

    folder: Path
    config: Config
    plan: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def dataset(self) -> str:
        """The name of its data set: of a path the last part."""
        return Path(self.config.data.dataset).resolve().name

    @property
    def evaluation_split(self) -> str:
        """The split that the run was evaluated on while training: val, or test to reproduce older studies."""
        return self.config.data.select_on

    @property
    def data_mode(self) -> str:
        """How train was held, resident or stream; of older runs, what was asked for."""
        return self.environment.get("data_mode", self.config.data.data_mode)

    @property
    def last_step(self) -> int:
        """The last step with a record."""
        return max((record["step"] for record in self.records), default=0)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps, ascending, and values of one logged quantity; a step logged again counts once, the later value."""
        found = {record["step"]: record[key] for record in self.records if record.get(key) is not None}
        return sorted(found), [found[step] for step in sorted(found)]

    def epoch_mean(self, key: str, step: int) -> float | None:
        """See `epoch_mean`."""
        return epoch_mean(self.series(key), self.plan["steps_per_epoch"], step)

    def data_at(self, place: str) -> DataConfig:
        """Its data, where they have moved to."""
        return replace(self.config.data, dataset=place)

    def check_classes(self, class_names: Sequence[str], dataset: str) -> None:
        """Refuse classes that are not, name by name, those the run was trained on.

        Raises:
            UsageError: their number or one of their names differs.
        """
        trained_on = self.environment["class_names"]
        if len(trained_on) != len(class_names):
            raise UsageError(
                f"the run has {len(trained_on)} classes but {dataset} now has {len(class_names)}; restore the data."
            )
        for number, (old, new) in enumerate(zip(trained_on, class_names, strict=True)):
            if old != new:
                raise UsageError(
                    f"class {number} was {old!r} in training, is {new!r} in {dataset} now; restore the data."
                )


def open_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: there is no such folder, it is no run's, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"RUN_DIR {folder}: no such folder; name the --run-dir of a finished run.")
    missing = [n for n in ("config.yaml", "plan.json", "environment.json", LOG) if not (folder / n).is_file()]
    if missing and (inside := sorted(each.parent for each in folder.glob("*/config.yaml"))):
        raise UsageError(
            f"RUN_DIR {folder} is no run folder, but holds {len(inside)}, such as {inside[0]}; name those."
        )
    if missing:
        raise UsageError(f"RUN_DIR {folder} is no run folder that train.py made ({missing[0]} is missing).")
    plan, environment = (read_json(folder / name) for name in ("plan.json", "environment.json"))
    config = load_config(folder / "config.yaml")
    return Run(folder, config, plan, environment, _records(folder, must_be_some=config.run.max_steps != 0))


def _records(folder: Path, must_be_some: bool) -> list[dict[str, Any]]:
    """The log's records. A torn last line, the mark of a killed run, is passed over."""
    log, lines = folder / LOG, list(read_log(folder))
    records = [record for record in lines if record is not None]
    if None in lines[:-1]:
        raise UsageError(f"{log}: line {lines.index(None) + 1} is no log record; remove it to make the report.")
    if must_be_some and not records:
        raise UsageError(f"{log} holds no record yet; train the run further (--resume auto) before its report.")
    return records
