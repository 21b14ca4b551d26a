"""One run's report, made from files alone: saved predictions, evidence and costs, log, configuration and environment.

Scoring ends with what `scoring` saves; `write_report` does the rest, so a report can be made again in seconds, without
the model or the data.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cifar_dist import figures
from cifar_dist.durable import read_json
from cifar_dist.errors import UsageError
from cifar_dist.page import Code, Files, Page, Picture, Section, Table, Text
from cifar_dist.report import sheets, tables
from cifar_dist.report.endings import early_stopping, steps_trained
from cifar_dist.report.epochs import write_epochs
from cifar_dist.report.evidence import Chosen, Evidence, choose, load_evidence
from cifar_dist.report.numbers import COST_FILE, metrics_of, temperature_scaled
from cifar_dist.report.predictions import AVERAGED, Scored, load_predictions, predictions_file
from cifar_dist.run_record import Run
from cifar_dist.schedule import schedule_without_model

MOST_CONFUSIONS = 10
INTERVALS = (
    "Intervals are of the test images, not of other seeds: Wilson's score interval of the accuracy, a percentile"
    " bootstrap over images of macro F1."
)


@dataclass(frozen=True)
class Report:
    """What was written: `metrics` as in ``metrics.json``, `pictures` by name, and tables."""

    metrics: dict[str, Any]
    pictures: dict[str, Path]
    tables: dict[str, Table]


@dataclass(frozen=True)
class Found:
    """What is known of a run whose report is to be written."""

    run: Run
    scored: Scored
    chosen: Chosen
    evidence: Evidence
    metrics: dict[str, Any]


def report_folder(
    run_dir: Path, which: str = "best", other: str | None = None, fingerprint: str | None = None, tta: str = "none"
) -> Path:
    """Where a run's report is: that of its best checkpoint in ``report``, any other one beside it.

    Args:
        run_dir: the run's folder.
        which: the checkpoint: best, last, or its folder.
        other: the data set, if it is not the run's own.
        fingerprint: of that set.
        tta: none, flip or flip-shift.
    """
    name = "report"
    if which != "best":
        name += f"-{Path(which).name}"
    if other is not None:
        name += f"-{Path(other).resolve().name}-{(fingerprint or '')[:8]}"
    if tta != "none":
        name += f"-{tta}"
    return run_dir / name


def saved_scores(folder: Path) -> Scored | None:
    """The test predictions in a report's folder, if all else that a report needs is there too and can be read."""
    try:
        scored = load_predictions(folder)
        load_evidence(folder, scored.ids[choose(scored).shown].tolist())
        read_json(folder / COST_FILE)
        return scored
    except (UsageError, OSError):
        return None


def write_report(run: Run, folder: Path) -> Report:
    """Make all of a report but what `scoring` has saved in its folder.

    Raises:
        UsageError: a file of it is missing, damaged or cannot be written.
    """
    found = _gather(run, folder)
    try:
        _write_confusions(found, folder)
        write_epochs(run, folder / "epochs.csv")
        pictures = _write_pictures(found, folder)
        _page(found, pictures, folder).write(folder, "report")
        metrics = json.dumps(found.metrics, indent=1, allow_nan=False) + "\n"
        (folder / "metrics.json").write_text(metrics, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be written ({error.strerror}); make way for it.") from None
    return Report(found.metrics, pictures, _tables(found.metrics))


def _tables(metrics: dict[str, Any]) -> dict[str, Table]:
    found = {"results": tables.results(metrics), "classes": tables.per_class(metrics)}
    return found | ({"cost": tables.cost(metrics)} if metrics["cost"] else {})


def _gather(run: Run, folder: Path) -> Found:
    scored = load_predictions(folder)
    val = load_predictions(folder, "val") if predictions_file(folder, "val").exists() else None
    chosen = choose(scored)
    evidence = load_evidence(folder, scored.ids[chosen.shown].tolist())
    return Found(run, scored, chosen, evidence, metrics_of(run, scored, val, chosen, read_json(folder / COST_FILE)))


def _write_confusions(found: Found, folder: Path) -> None:
    names = found.scored.class_names
    with (folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["true \\ predicted", *names])
        counts = found.metrics["confusion_matrix"]
        rows.writerows([name, *row] for name, row in zip(names, counts, strict=True))


def _write_pictures(found: Found, folder: Path) -> dict[str, Path]:
    """Draw what there is; a quantity that was never logged, or an image that is missing, has no picture."""
    drawn = _curves(found) | _of_classes(found) | sheets.of_images(found.scored, found.chosen, found.evidence)
    return figures.save_all(drawn, folder)


def _curves(found: Found) -> dict[str, Figure | None]:
    run, axis = found.run, figures.StepAxis(found.run.plan["steps_per_epoch"], found.scored.about.step)

    def curves(name: str) -> list[figures.Curve]:
        both = [
            figures.Curve("train", *run.series(f"train/{name}"), figures.TRAIN, dashed=True),
            figures.Curve(run.evaluation_split, *run.series(f"val/{name}"), figures.EVALUATION),
        ]
        return [curve for curve in both if curve.steps]

    return {
        "loss": figures.loss_curves(curves("loss"), axis),
        "accuracy": figures.accuracy_curves(curves("top1"), axis),
        "lr": figures.lr_curve(_schedule(run), figures.Curve("logged", *run.series("lr"), figures.EVALUATION), axis),
    }


def _schedule(run: Run) -> figures.Curve:
    """The learning rate of every step that the run took, by its settings; a step's record is of its end."""
    schedule = schedule_without_model(run.config.optim, run.config.run.epochs, run.plan["steps_per_epoch"])
    steps = range(1, run.last_step + 1)
    return figures.Curve("schedule", steps, [schedule.apply(step - 1) for step in steps], figures.TRAIN)


def _of_classes(found: Found) -> dict[str, Figure | None]:
    names, metrics = found.scored.class_names, found.metrics
    matrix = np.array(metrics["confusion_matrix"])
    recalls = [values["recall"] if values["support"] else float("nan") for values in metrics["classes"]]
    off = matrix - np.diag(np.diag(matrix))
    most = [divmod(int(cell), len(names)) for cell in np.argsort(-off, axis=None, kind="stable")[:MOST_CONFUSIONS]]
    pairs = [(names[true], names[guess], int(off[true, guess])) for true, guess in most if off[true, guess]]
    numbered = len(names) <= figures.MOST_NUMBERED_CLASSES  # else the two matrices are one picture
    calibration, scored = metrics["calibration"], found.scored
    panels = [_reliability(scored, "as trained", calibration["before"]["ece"])]
    if calibration["after"]:
        temperature = calibration["temperature"]
        title = f"temperature {temperature:.2f}, fitted on val"
        panels.append(_reliability(temperature_scaled(scored, temperature), title, calibration["after"]["ece"]))
    return {
        "confusion_matrix": figures.confusion_matrix(matrix, names),
        "confusion_shares": figures.normalized_confusion_matrix(matrix, names) if numbered else None,
        "class_accuracy": figures.class_bars(names, recalls, metrics["top1"]),
        "confusions": figures.top_confusions(pairs) if pairs else None,
        "reliability": figures.reliability_diagram(panels),
    }


def _reliability(scored: Scored, title: str, ece: float) -> figures.Reliability:
    from cifar_dist.metrics.calibration import reliability

    bins = reliability(scored.probabilities, scored.labels)
    return figures.Reliability(title, bins.confidences, bins.accuracies, bins.counts, ece)


def _page(found: Found, pictures: dict[str, Path], folder: Path) -> Page:
    """The report for people: the result first, then how it came about."""
    run, scored, metrics = found.run, found.scored, found.metrics
    captions = sheets.captions(len(scored.class_names))

    def shown(*names: str) -> list[Picture]:
        return [Picture(pictures[name], captions[name]) for name in names if name in pictures]

    files = {
        "counts": folder / "confusion_matrix.csv",
        "every epoch": folder / "epochs.csv",
        "every prediction": folder / "predictions.parquet",
        "all numbers": folder / "metrics.json",
    }
    return Page(
        f"{run.folder.resolve().name}: {run.config.model.model}{_data_words(run, scored)}",
        _head(run, scored, metrics),
        [
            Section("Results", [tables.results(metrics), Text(INTERVALS), tables.splits(run, scored, metrics)]),
            Section("Curves", [Text(_curve_words(run)), *shown("loss", "accuracy", "lr")]),
            Section(
                "Classes",
                [
                    tables.per_class(metrics),
                    *shown("class_accuracy", "confusion_matrix", "confusion_shares", "confusions"),
                    Files(files),
                ],
            ),
            Section("Calibration", [tables.calibration(metrics), *_uncalibrated(metrics), *shown("reliability")]),
            Section(
                "Mistakes",
                [
                    Text(sheets.mistake_words(scored, found.chosen)),
                    *shown("mistakes"),
                    *_names(scored, found.chosen.mistakes),
                    *shown("label_errors"),
                    *_names(scored, found.chosen.suspects),
                ],
            ),
            Section("What the model looks at", [Text(_map_words(found)), *shown("grad_cam", "rollout")]),
            Section("Cost", [tables.cost(metrics)] if metrics["cost"] else []),
            Section("Settings", [tables.settings(run)]),
            Section("Environment", [tables.environment(run, scored)]),
            Section("To reproduce", [Code(tables.commands(run, scored.about))]),
        ],
    )


def _data_words(run: Run, scored: Scored) -> str:
    """On what it was trained and tested."""
    if scored.about.own_data:
        return f" on {scored.about.dataset}"
    return f", trained on {run.dataset}, tested on {scored.about.dataset}"


def _head(run: Run, scored: Scored, metrics: dict[str, Any]) -> list[Text]:
    """The result, of what it is, and what to be wary of."""
    about, trained_on = scored.about, run.dataset
    what = "Test accuracy" if about.own_data else f"Accuracy on {about.dataset}, another set than the run's own,"
    other = f" The run's own set is {trained_on}: train and val below are of that." * (not about.own_data)
    interval = f"95 % interval {tables.interval(metrics['top1_interval'])}, Wilson's"
    return [
        Text(f"{what} {tables.percent(metrics['top1'])} ({interval})", strong=True),
        Text(
            f"On {metrics['num_samples']:,} images of {about.dataset}{AVERAGED[about.tta]}, with"
            f" {_checkpoint_words(run, scored, metrics['selected_on'])}.{other}"
        ),
        *(Text(warning, strong=True) for warning in metrics["warnings"]),
    ]


def _checkpoint_words(run: Run, scored: Scored, selected_on: str) -> str:
    """Which checkpoint was scored; without a split to choose by, none is the best."""
    about, epoch = scored.about, scored.about.step / run.plan["steps_per_epoch"]
    last = ", the run's last step" if about.step == steps_trained(run) else ""
    place = f"of step {about.step:,} (epoch {epoch:.4g}{last})"
    name = f"checkpoint {Path(about.checkpoint).name}"
    if selected_on != "none":
        return f"{name} {place}, selected on {selected_on}"
    name = "the checkpoint" if about.checkpoint == "best" else name
    return f"{name} {place}, not selected by a score"


def _uncalibrated(metrics: dict[str, Any]) -> list[Text]:
    reason = metrics["calibration"]["unfitted"]
    return [Text(f"No temperature is used: {reason}.")] if reason else []


def _names(scored: Scored, rows: list[int]) -> list[Text]:
    """Which images a gallery shows."""
    if not rows:
        return []
    return [Text(f"{'From left to right, line by line' if len(rows) > 1 else 'Shown'}: {scored.names_of(rows)}.")]


def _map_words(found: Found) -> str:
    rows = [row for row in (*found.chosen.right, *found.chosen.wrong) if row is not None]
    return sheets.map_words(found.evidence, found.scored.ids[rows].tolist())


def _curve_words(run: Run) -> str:
    words = (
        f"Train numbers are taken {tables.while_training(run.config)}, so they may lie on either side of"
        f" {run.evaluation_split}'s. The dotted line is the checkpoint that was scored."
    )
    return " ".join(filter(None, (early_stopping(run), words)))
