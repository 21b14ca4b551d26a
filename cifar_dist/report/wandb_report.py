"""A W&B report that compares runs, through wandb-workspaces: on the server, or as its specification in a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.config import Config
from cifar_dist.errors import UsageError, first_line
from cifar_dist.run_record import Run
from cifar_dist.tracking.wandb_run import wandb_mode

SPECIFICATION = "wandb_report.json"
_CURVES = {"val accuracy": "val/top1", "val loss": "val/loss", "train loss": "train/loss"}
_PICTURES = ["report/confusion_matrix", "report/grad_cam", "report/mistakes"]


@dataclass(frozen=True)
class Study:
    """What the report is to say: a title, the comparison in Markdown, and the ids of the runs to draw by project."""

    title: str
    markdown: str
    runs: dict[str, list[str]]


def runs_by_project(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The W&B ids of runs.

    Raises:
        UsageError: a run has none.
    """
    found: dict[str, list[str]] = {}
    for run in runs:
        if not (run.folder / "wandb_id").exists():
            raise UsageError(f"--wandb-report: {run.folder} has no W&B run (it was trained with --wandb disabled).")
        ids = found.setdefault(run.config.run.wandb_project, [])
        ids.append((run.folder / "wandb_id").read_text().strip())
    return found


def build_report(study: Study, entity: str) -> Any:
    """A `wandb_workspaces.reports.v2.Report`: the table, the curves of the runs side by side, and their pictures.

    Raises:
        UsageError: wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, about the library's own code
            import wandb_workspaces.reports.v2 as wr
    except ImportError:
        raise UsageError("--wandb-report needs wandb-workspaces: pip install wandb-workspaces.") from None
    runs = [
        wr.Runset(name=project, filters=f"ID in {ids!r}") if len(study.runs) == 1
        else wr.Runset(entity=entity, project=project, name=project, filters=f"ID in {ids!r}")
        for project, ids in study.runs.items()
    ]  # fmt: skip
    curves: list[Any] = [wr.LinePlot(title=title, x="Step", y=[key]) for title, key in _CURVES.items()]
    return wr.Report(
        entity=entity,
        project=next(iter(study.runs)),
        title=study.title[:128],
        blocks=[
            wr.MarkdownBlock(study.markdown),
            wr.H1("Curves"),
            wr.PanelGrid(runsets=runs, panels=curves),
            wr.H1("Pictures"),
            wr.PanelGrid(runsets=runs, panels=[wr.MediaBrowser(media_keys=_PICTURES)]),
        ],
    )


def publish(study: Study, config: Config, folder: Path) -> str:
    """Save the report on the server, or where there is none its specification in `folder`; a line that says where."""
    reason = "no server"
    if wandb_mode(config) == "online":
        try:
            import wandb

            report = build_report(study, wandb.Api().default_entity or "")
            report.save()
            return f"W&B report  {report.url}"
        except UsageError:
            raise
        except Exception as error:  # whatever the client raises when the server does not take it
            reason = first_line(error)
    report = build_report(study, "entity")
    (folder / SPECIFICATION).write_text(report._to_model().model_dump_json(indent=1) + "\n", encoding="utf-8")
    return (
        f"W&B report  not sent ({reason}): its specification is {folder / SPECIFICATION}; send the runs"
        " with wandb sync, then give the same command where you are logged in."
    )
