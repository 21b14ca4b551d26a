"""How far a run was trained of what its schedule spans, by its log."""

from __future__ import annotations

from cifar_dist.recovery.lost_work import last_beat
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.run_record import Run


def steps_trained(run: Run) -> int:
    """Optimizer steps, by the log or, where that was cut between two records, by the last heartbeat."""
    return min(max(run.last_step, last_beat(run.folder)[0]), run.plan["schedule_steps"])


def was_cut(run: Run) -> bool:
    """Whether the run ended before its schedule and the evaluation that follows did, other than by early stopping."""
    evaluated = run.series("val/top1")[0]
    reached = min([steps_trained(run), *evaluated[-1:]])
    return reached < run.plan["schedule_steps"] and not _out_of_patience(run)


def steps_of(run: Run) -> str:
    """``40 of 110 steps``."""
    steps, end = steps_trained(run), run.plan["schedule_steps"]
    return f"{steps:,} of {end:,} steps" + ", before the last evaluation" * (steps == end)


def epochs_of(run: Run) -> str:
    """``11 of 20``, as many as were trained of those that the schedule spans."""
    trained, end = (steps / run.plan["steps_per_epoch"] for steps in (steps_trained(run), run.plan["schedule_steps"]))
    return f"{round(trained, 2):g} of {round(end, 2):g}"


def cut_warning(run: Run) -> str | None:
    """What a report of a run must say that was not trained to its end; None of one that was."""
    if not was_cut(run):
        return None
    if steps_trained(run) == 0:
        return "Nothing was trained in this run: its weights are those that it began with."
    return f"The run was not trained to the end of its schedule: it was cut after {steps_of(run)}."


def early_stopping(run: Run) -> str | None:
    """When early stopping ended the run, if it did."""
    if not _out_of_patience(run) or steps_trained(run) >= run.plan["schedule_steps"]:
        return None
    patience = run.config.run.patience
    return (
        f"Early stopping ended the training after epoch {epochs_of(run)}: {run.evaluation_split} top-1 had not"
        f" gained for {patience} epoch{'s' * (patience != 1)} (--patience)."
    )


def _out_of_patience(run: Run) -> bool:
    """Whether early stopping ended the run, judging its logged scores as training does."""
    state = TrainState()
    (steps, top1), (_, losses) = run.series("val/top1"), run.series("val/loss")
    for step, right, loss in zip(steps, top1, losses, strict=True):
        whole_epoch = step > 0 and step % run.plan["steps_per_epoch"] == 0
        state.judge({"top1": right, "loss": loss}, run.config.run.min_delta, whole_epoch)
    return state.is_out_of_patience(run.config.run.patience)
