"""One run's report, made from files alone: saved predictions, log, configuration, plan and environment.

Scoring ends with `predictions.save_predictions`; `write_report` does the rest, so a report can be made
again without the model or the data.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.config import Config
from cifar_dist.predictions import Scored, load_predictions
from cifar_dist.run_folder import Run, open_run

SHOWN_SETTINGS = [
    "model",
    "dataset",
    "pretrained",
    "init_weights",
    "epochs",
    "batch_size",
    "opt",
    "lr",
    "weight_decay",
    "sched",
    "warmup_epochs",
    "crop_padding",
    "hflip",
    "smoothing",
    "val_fraction",
    "select_on",
    "precision",
    "seed",
]
NOT_SETTINGS = [
    "run_dir", "cache_dir", "resume", "wandb", "wandb_project", "log_every", "checkpoint_every", "keep_last",
    "time_limit",
]  # fmt: skip
TEST_SELECTED = (
    "The run was watched, and its best checkpoint picked, on the test split, so these numbers are optimistic:"
    " no unseen data was left to test on."
)


@dataclass(frozen=True)
class Report:
    """What was written: `metrics` as in ``metrics.json``, `pictures` by name."""

    metrics: dict[str, Any]
    pictures: dict[str, Path]


def write_report(run_dir: Path) -> Report:
    """Make everything in ``RUN_DIR/report/`` from ``predictions.parquet`` and the run's own files.

    Accuracies are fractions, the loss is in nats.

    Raises:
        UsageError: a file of the run is missing or damaged.
    """
    run, scored, folder = open_run(run_dir), load_predictions(run_dir), run_dir / "report"
    results = compute_metrics(scored)
    matrix = np.array(results["confusion_matrix"])
    metrics = _with_facts(results, run, scored)
    with (folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["true \\ predicted", *scored.class_names])
        rows.writerows([name, *row] for name, row in zip(scored.class_names, matrix.tolist(), strict=True))
    pictures = _write_pictures(run, scored, matrix)
    (folder / "report.md").write_text(_markdown(run, scored, metrics, pictures), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Report(metrics, pictures)


def compute_metrics(scored: Scored) -> dict[str, Any]:
    """Every number of the predictions, by the project's `evaluate` modules."""
    import evaluate
    from cifar_dist.metrics.classification_report import ClassificationReport
    from cifar_dist.metrics.confusion_matrix import ConfusionMatrix
    from cifar_dist.metrics.cross_entropy import CrossEntropy
    from cifar_dist.metrics.top_k_accuracy import TopKAccuracy

    modules = (TopKAccuracy, CrossEntropy, ClassificationReport, ConfusionMatrix)
    with tempfile.TemporaryDirectory() as cache:  # else each leaves an empty folder in the user's home
        combined = evaluate.combine([module(keep_in_memory=True, cache_dir=cache) for module in modules])
        return combined.compute(predictions=scored.probabilities, references=scored.labels)


def _with_facts(results: dict[str, Any], run: Run, scored: Scored) -> dict[str, Any]:
    """The metrics in reading order, with what they were measured on and what to be wary of."""
    picked = scored.checkpoint == "best" or run.config.run.patience is not None or run.evaluation_split == "test"
    selected_on = run.evaluation_split if picked and run.series("val/top1")[0] else "none"
    trained_on = run.environment.get("data_fingerprint")
    warnings = [TEST_SELECTED] if selected_on == "test" else []
    if trained_on not in (None, scored.fingerprint):
        warnings.append(
            f"The data set has changed since training (fingerprint {trained_on}, now {scored.fingerprint})."
        )
    classes = zip(scored.class_names, results["classes"], strict=True)
    return {
        "top1": results["top1"],
        "top3": results["top3"],
        "top5": results["top5"],
        "error_rate": 1 - results["top1"],
        "loss": results["loss"],
        "num_samples": len(scored.labels),
        "macro_avg": results["macro_avg"],
        "weighted_avg": results["weighted_avg"],
        "classes": [{"name": name, **numbers} for name, numbers in classes],
        "dataset": {"name": scored.dataset, "split": "test", "fingerprint": scored.fingerprint},
        "checkpoint": {"which": scored.checkpoint, "step": scored.step},
        "selected_on": selected_on,
        "warnings": warnings,
    }


def _write_pictures(run: Run, scored: Scored, matrix: np.ndarray) -> dict[str, Path]:
    """Draw what the log and the predictions hold; a quantity that was never logged has no picture."""
    from cifar_dist import figures

    axis = figures.StepAxis(run.plan["steps_per_epoch"], scored.step)

    def curves(name: str) -> list[figures.Curve]:
        found = [
            figures.Curve("train", *run.series(f"train/{name}"), figures.TRAIN),
            figures.Curve(run.evaluation_split, *run.series(f"val/{name}"), figures.EVALUATION),
        ]
        return [curve for curve in found if curve.steps]

    steps, rates = run.series("lr")
    drawn = {
        "loss": figures.loss_curves(curves("loss"), axis),
        "accuracy": figures.accuracy_curves(curves("top1"), axis),
        "lr": figures.lr_curve(figures.Curve("learning rate", [1, *steps], [run.plan["lr_first"], *rates]), axis),
        "confusion_matrix": figures.confusion_matrix(matrix, scored.class_names),
    }
    pictures = {name: run.folder / "report" / f"{name}.png" for name in drawn}
    for name, figure in drawn.items():
        figures.save(figure, pictures[name])
    return pictures


def _markdown(run: Run, scored: Scored, metrics: dict[str, Any], pictures: dict[str, Path]) -> str:
    """The report for people: the result first, then how it came about."""
    epoch = scored.step / run.plan["steps_per_epoch"]
    headline = ("top1", "top3", "top5", "error_rate")
    numbers = [f"{metrics[name]:.2%}" for name in headline]
    last_row = [f"{metrics['loss']:.4f}", f"{metrics['macro_avg']['f1']:.4f}", f"{metrics['num_samples']:,}"]
    parts = [
        f"# {_plain(run.folder.resolve().name)}",
        f"**Test accuracy {metrics['top1']:.2%}** on {metrics['num_samples']:,} images of {_plain(scored.dataset)},"
        f" with checkpoint `{scored.checkpoint}` of step {scored.step:,} (epoch {epoch:.4g}).",
        *(f"**{warning}**" for warning in metrics["warnings"]),
        "## Results",
        _table(("top-1", "top-3", "top-5", "top-1 error", "loss (nats)", "macro F1", "images"), [numbers + last_row]),
        _table(("split", "top-1", "loss (nats)", "measured"), _splits(run, scored, metrics)),
        "## Curves",
        f"Train numbers are taken while training, on augmented images{_softened(run.config)}, so they may lie on either"
        f" side of {run.evaluation_split}'s. The dotted line is the checkpoint that was scored.",
        *(f"![{name}]({path.name})" for name, path in pictures.items() if name != "confusion_matrix"),
        "## Per class",
        _table(("class", "precision", "recall", "F1", "support"), _per_class(metrics)),
        f"![confusion matrix]({pictures['confusion_matrix'].name})",
        "Counts: [confusion_matrix.csv](confusion_matrix.csv). Every prediction:"
        " [predictions.parquet](predictions.parquet). All numbers: [metrics.json](metrics.json).",
        "## Settings",
        _table(("setting", "value"), _settings(run.config)),
        "## Environment",
        _table(("what", "value"), _environment(run, scored)),
        "## To reproduce",
        f"```sh\n{_commands(run)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _plain(text: object) -> str:
    """Text that Markdown leaves as it is, in a table too."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(str(text).split()))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _softened(config: Config) -> str:
    """How the training loss differs from the plain cross-entropy of the other splits."""
    augment = config.augment
    used = [name for name, on in (("mixup", augment.mixup), ("CutMix", augment.cutmix)) if on]
    used += [f"label smoothing {augment.smoothing:g}"] if augment.smoothing else []
    return f" with {' and '.join(used)}" if used else ""


def _splits(run: Run, scored: Scored, metrics: dict[str, Any]) -> list[list[str]]:
    """Train, val and test side by side, at the checkpoint's step."""
    rows = []
    for split, key, how in (
        ("train", "train", "while training, on augmented images, up to the checkpoint"),
        (run.evaluation_split, "val", "at the checkpoint, while training"),
    ):
        top1, loss = run.value_at(f"{key}/top1", scored.step), run.value_at(f"{key}/loss", scored.step)
        if top1 is not None and loss is not None:
            rows.append([split, f"{top1:.2%}", f"{loss:.4f}", how])
    return [
        *rows,
        ["**test**", f"**{metrics['top1']:.2%}**", f"{metrics['loss']:.4f}", "afterwards, each image once"],
    ]


def _per_class(metrics: dict[str, Any]) -> list[list[str]]:
    def row(name: str, values: dict[str, Any], support: int) -> list[str]:
        return [name, *(f"{values[key]:.4f}" for key in ("precision", "recall", "f1")), f"{support:,}"]

    rows = [row(_plain(values["name"]), values, values["support"]) for values in metrics["classes"]]
    for name, key in (("*macro mean*", "macro_avg"), ("*weighted mean*", "weighted_avg")):
        rows.append(row(name, metrics[key], metrics["num_samples"]))
    return rows


def _settings(config: Config) -> list[list[str]]:
    """The settings that say what the run is, and all others that differ from the defaults."""
    values, defaults = config.flat(), Config().flat()
    others = [name for name in values if values[name] != defaults[name] and name not in NOT_SETTINGS]
    names = [*SHOWN_SETTINGS, *(name for name in others if name not in SHOWN_SETTINGS)]
    return [[name, _plain(values[name])] for name in names if values[name] is not None]


def _environment(run: Run, scored: Scored) -> list[list[str]]:
    """Where and with what the run was trained, as its folder tells."""
    elsewhere = ("versions", "class_names", "restarts")
    facts = {name: value for name, value in run.environment.items() if name not in elsewhere}
    versions = run.environment.get("versions", {})
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    facts["interruptions"] = _interruptions(run.environment.get("restarts", []))
    facts["parameters"] = f"{run.plan['num_parameters']:,} ({run.plan['num_trainable']:,} trained)"
    facts["steps"] = f"{run.series('train/loss')[0][-1]:,} of {run.plan['schedule_steps']:,} scheduled"
    seconds = run.series("seconds")[1]
    facts["training time"] = str(timedelta(seconds=round(seconds[-1]))) if seconds else None
    facts["test data fingerprint"] = scored.fingerprint
    return [[name.replace("_", " "), _plain(value)] for name, value in facts.items() if value is not None]


def _interruptions(restarts: Sequence[dict[str, Any]]) -> str:
    """How often the run was started again, and what had to be done twice."""
    steps, seconds = (sum(start.get(name, 0) for start in restarts) for name in ("steps_redone", "seconds_lost"))
    again = f" ({steps:,} steps done again, {timedelta(seconds=round(seconds))} lost)" if restarts else ""
    return f"{len(restarts)}{again}"


def _commands(run: Run) -> str:
    """What to type to train the same again and score it."""
    processes, again = run.environment.get("num_processes", 1), f"{run.folder}-again"
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    config = run.folder / "config.yaml"
    train = f"{launcher} train.py --config {shlex.quote(str(config))} --run-dir {shlex.quote(again)}"
    return f"{train}\npython evaluate.py {shlex.quote(again)}"
