"""Where the runs of a study stand, by what they and their runner left."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cifar_dist.errors import UsageError
from cifar_dist.study.file import Study, StudyRun
from cifar_dist.study.record import failure_of


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        step: optimizer steps made, by its last checkpoint; 0 without one.
        total_steps: those that it takes, where `step` is known.
        finished: whether it is at its end.
        running: whether a training holds its folder now, as far as this machine can see.
        failure: how its last try failed, ``status 2: …``, or nothing.
        in_the_way: why its folder cannot be continued, or nothing.
    """

    step: int
    total_steps: int
    finished: bool
    running: bool = False
    failure: str = ""
    in_the_way: str = ""

    @property
    def is_due(self) -> bool:
        """Whether it is to be started."""
        return not self.finished and not self.running

    def __str__(self) -> str:
        if self.in_the_way:
            return f"in the way: {self.in_the_way}"
        if self.finished:
            return "finished"
        saved = f"step {self.step} of {self.total_steps}" if self.step else ""
        if self.running:
            return f"running (saved at {saved})" if saved else "running"
        if self.failure:
            return f"failed with {self.failure.partition(': ')[0]}" + (f" (at {saved})" if saved else "")
        return f"cut at {saved}" if saved else "new"

    @property
    def in_full(self) -> str:
        """With the reason of a failure."""
        reason = self.failure.partition(": ")[2]
        return f"{self}: {reason}" if reason and str(self).startswith("failed") else str(self)


def statuses(study: Study) -> list[RunStatus]:
    """Where each run stands."""
    return [status_of(run) for run in study.runs]


def status_of(run: StudyRun) -> RunStatus:
    """Where a run stands, by the counters of its newest checkpoint, which tell train.py too whether it goes on."""
    status = RunStatus(0, 0, finished=False, failure=failure_of(run.folder))
    if not run.folder.exists():
        return status  # without the seconds of importing
    from cifar_dist.durable import read_json
    from cifar_dist.plan import Plan, steps_in_all
    from cifar_dist.recovery import checkpoint, store
    from cifar_dist.run_folder import changed_settings, choose_run_dir, is_running

    try:
        if changed := changed_settings(run.config):
            return replace(status, in_the_way=f"{run.folder} has other settings ({'; '.join(changed)})")
        choose_run_dir(run.config)
        if _has_other_data(run):
            return replace(status, in_the_way=f"{run.folder} has other data than {run.config.data.dataset}")
        status = replace(status, running=is_running(run.folder))
        stored = store.latest_manifest(run.folder / "checkpoints")
        if stored is None:
            return status
        state = checkpoint.state_of(stored)
        plan = Plan(**read_json(run.folder / "plan.json"))
    except (UsageError, OSError) as error:
        return replace(status, in_the_way=str(error).removeprefix("--resume auto: ").rstrip("."))
    except TypeError:
        return replace(status, in_the_way=f"{run.folder / 'plan.json'} is of another version of cifar-dist")
    plan = replace(plan, total_steps=steps_in_all(run.config.run, plan.schedule_steps))
    finished = not state.goes_on(plan, run.config.run.patience)
    return replace(status, step=state.step, total_steps=plan.total_steps, finished=finished)


def _has_other_data(run: StudyRun) -> bool:
    """Whether a run had its data at another place than its study says, and other ones."""
    from cifar_dist.command_line import load_config
    from cifar_dist.data import data_fingerprint
    from cifar_dist.durable import read_json

    data, saved = run.config.data, run.folder / "config.yaml"
    if not saved.is_file() or load_config(saved).data.dataset == data.dataset:
        return False
    return data_fingerprint(data) != read_json(run.folder / "environment.json").get("data_fingerprint")
