"""The tables of a run's report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist import figures
from cifar_dist.config import Config
from cifar_dist.idle_flags import has_effect
from cifar_dist.memory import MIB
from cifar_dist.metrics.calibration import BINS
from cifar_dist.optim import has_momentum
from cifar_dist.page import Table
from cifar_dist.report.endings import steps_trained
from cifar_dist.report.predictions import About, Scored
from cifar_dist.run_folder import BOOKKEEPING
from cifar_dist.run_record import Run
from cifar_dist.training.features import changes

UNSTEADY = 3  # times the median latency, above which the 95th percentile says that other programs ran
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
    "momentum",
    "sched",
    "warmup_epochs",
    "crop_padding",
    "hflip",
    "smoothing",
    "val_fraction",
    "select_on",
    "precision",
    "seed",
    "split_seed",
]


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.2f} %"


def mean_and_deviation(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    """Mean and sample standard deviation of repeats, a number as `shown`; a dash where one lacks the number."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{shown(float(np.mean(known)))} ± {shown(float(np.std(known, ddof=1))).removesuffix(' %')}"


def interval(pair: Sequence[float]) -> str:
    """An interval of fractions, in percent."""
    return f"{100 * pair[0]:.2f} to {100 * pair[1]:.2f} %"


def quantity(value: float) -> str:
    """Two decimals, or of less than 1 three digits."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def taken(seconds: float) -> str:
    """How long something took: hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def parameters(count: int) -> str:
    """A number of parameters: in millions, or of few all digits."""
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def shown(value: Any) -> str:
    """A setting's value for people, who need not know Python."""
    if value is None or isinstance(value, bool):
        return {None: "none", False: "no", True: "yes"}[value]
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else str(value)


def results(metrics: dict[str, Any]) -> Table:
    """The headline's numbers."""
    low, high = metrics["macro_f1_interval"]
    return Table(
        ("measure", "value", "95 % interval"),
        [
            ("top-1 accuracy", percent(metrics["top1"]), interval(metrics["top1_interval"])),
            *((f"top-{k} accuracy", percent(metrics[f"top{k}"]), "") for k in (3, 5) if k < len(metrics["classes"])),
            ("top-1 error", percent(metrics["error_rate"]), ""),
            ("balanced accuracy", percent(metrics["balanced_accuracy"]), ""),
            ("macro F1", f"{metrics['macro_avg']['f1']:.4f}", f"{low:.4f} to {high:.4f}"),
            ("loss (nats)", f"{metrics['loss']:.4f}", ""),
            ("images", f"{metrics['num_samples']:,}", ""),
        ],
        strong=[0],
    )


def splits(run: Run, scored: Scored, metrics: dict[str, Any]) -> Table:
    """Train, val and test side by side, at the checkpoint's step, with the sets they are of where these differ."""
    rows, step, evaluation, about = [], scored.about.step, metrics["evaluation"], scored.about
    of_own, of_other = ("", "") if about.own_data else (f" of {name}" for name in (run.dataset, about.dataset))
    watched = f"{run.evaluation_split}{of_own}"
    top1, loss = run.epoch_mean("train/top1", step), run.epoch_mean("train/loss", step)
    if top1 is not None and loss is not None:
        how = f"{while_training(run.config)}, mean over the checkpoint's epoch"
        rows.append((f"train{of_own}", percent(top1), f"{loss:.4f}", how))
    if evaluation:
        how = f"at the checkpoint, {evaluation['measured']}"
        rows.append((watched, percent(evaluation["top1"]), f"{evaluation['loss']:.4f}", how))
    elif run.series("val/top1")[0]:
        rows.append((watched, "–", "–", "not at the checkpoint's step"))
    again = evaluation and about.own_data and watched == "test" and about.tta == "none"
    unlike = "train" if evaluation and evaluation["measured"] == "afterwards" else "the others"
    how = "afterwards, each image once" + (f", over several views, unlike {unlike}" if about.tta != "none" else "")
    if again and 0 < abs(evaluation["top1"] - metrics["top1"]) < 0.005:
        how += "; in other batches, whose sums round otherwise"
    rows.append((f"test{of_other}", percent(metrics["top1"]), f"{metrics['loss']:.4f}", how))
    return Table(("split", "top-1", "loss (nats)", "measured"), rows, strong=[len(rows) - 1])


def while_training(config: Config) -> str:
    """When train numbers are taken, and how images and loss differ from those of the other splits."""
    augment = config.augment
    used = [name for name, on in (("mixup", augment.mixup), ("CutMix", augment.cutmix)) if on]
    used += [f"label smoothing {augment.smoothing:g}"] if augment.smoothing else []
    softened = f" with {' and '.join(used)}" if used else ""
    softened += " (a mixed image is of the class it has most of)" * augment.mixes
    return f"while training{', on augmented images' if changes(augment) else ''}{softened}"


def per_class(metrics: dict[str, Any]) -> Table:
    """Precision, recall, F1 and support of each class, with their means."""

    def row(name: str, values: dict[str, Any], support: int, predicted: bool = True) -> tuple[str, ...]:
        known = {"precision": predicted, "recall": support, "f1": support}
        return (name, *(f"{values[key]:.4f}" if known[key] else "–" for key in known), f"{support:,}")

    predicted = np.any(metrics["confusion_matrix"], axis=0)
    classes = zip(metrics["classes"], predicted, strict=True)
    rows = [row(values["name"], values, values["support"], guessed) for values, guessed in classes]
    for name, key in (("macro mean", "macro_avg"), ("weighted mean", "weighted_avg")):
        rows.append(row(name, metrics[key], metrics["num_samples"]))
    header: tuple[str, ...] = ("class", "precision", "recall", "F1", "support")
    if len(predicted) > figures.MOST_NAMED_CLASSES:  # pictures call them by their numbers
        header = ("number", *header)
        rows = [(f"{number}" if number < len(predicted) else "", *cells) for number, cells in enumerate(rows)]
    return Table(header, rows, strong=[len(rows) - 2, len(rows) - 1])


def calibration(metrics: dict[str, Any]) -> Table:
    """ECE, Brier score and NLL, before and after temperature scaling."""
    numbers = metrics["calibration"]
    rows = [("as trained", "1", *(f"{numbers['before'][name]:.4f}" for name in ("ece", "brier", "nll")))]
    if numbers["after"]:
        scaled = (f"{numbers['after'][name]:.4f}" for name in ("ece", "brier", "nll"))
        rows.append(("temperature fitted on val", f"{numbers['temperature']:.3f}", *scaled))
    return Table(("confidences", "temperature", f"ECE ({BINS} bins)", "Brier score", "NLL (nats)"), rows)


def cost(metrics: dict[str, Any]) -> Table:
    """Size, arithmetic, time and memory."""
    found = metrics["cost"]
    trained = f"{parameters(found['trained_parameters'])} trained"
    rows = [("parameters", parameters(found["parameters"]), trained)]
    return Table(("what", "value", "how"), [*rows, *_arithmetic(found), *_inference(found), *_training(found)])


def _arithmetic(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        ("GFLOPs", quantity(found["gflops"]), f"one image of {found['img_size']} pixels, two per multiply-add"),
        ("GMACs", quantity(found["gmacs"]), "multiply-adds, the half of that"),
        (
            "GMACs without attention",
            quantity(found["gmacs_without_attention"]),
            "without the products of queries, keys and values, as counters do that miss fused attention; papers often"
            " call this GFLOPs, and thop adds a few operations for LayerNorm and softmax",
        ),
    ]


def _inference(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    speed = found["inference"]
    where, energy = f"{speed['device']}, {speed['precision']}", speed["energy_joules_per_image"]
    tail = f"95th percentile {1e3 * speed['latency_p95_seconds']:.2f} ms"
    if speed["latency_p95_seconds"] > UNSTEADY * speed["latency_median_seconds"]:
        tail += ", unsteady as on a machine that has other work: measure again"
    rows = [
        (
            "latency",
            f"{1e3 * speed['latency_median_seconds']:.2f} ms",
            f"one image once, median of {speed['runs']}; {tail}; {where}",
        ),
        ("throughput", f"{speed['images_per_second']:,.0f} images/s", f"batches of {speed['batch_size']}; {where}"),
    ]
    if speed["peak_memory_bytes"] is not None:
        most = f"{speed['peak_memory_bytes'] / MIB:,.0f} MiB"
        rows.append(("memory, inference", most, "the most held at that batch"))
    return rows + ([("energy", f"{energy:.3g} J/image", "by the GPU's own meter")] if energy else [])


def _training(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is known of the training: what was never logged, or not on this machine, is left out."""
    training, peak, rows = found["training"], found["peak"], []
    if training["peak_memory_bytes"] is not None:
        rows.append(("memory, training", f"{training['peak_memory_bytes'] / MIB:,.0f} MiB", "the most of one process"))
    if training["seconds"] is not None:
        rows.append(("training time", taken(training["seconds"]), "by the log"))
    if training["images_per_second"] is not None:
        rows.append(("training speed", f"{training['images_per_second']:,.0f} images/s", "median of the log"))
    if training["mfu"] is not None:
        most = f"{peak['flops_per_second'] / 1e12:.2f} TFLOP/s a process ({peak['source']})"
        rows.append(("MFU in training", percent(training["mfu"]), f"of {most}; a step counts as three forward passes"))
    return rows


def shown_names(config: Config) -> list[str]:
    """The settings that say what a run is, then all others that differ from the defaults."""
    values, defaults = config.flat(), Config().flat()
    others = (name for name in values if values[name] != defaults[name] and name not in BOOKKEEPING)
    return list(dict.fromkeys((*SHOWN_SETTINGS, *others)))


def settings(run: Run) -> Table:
    """The settings of `shown_names` that have a value and an effect."""
    values, names = run.config.flat(), shown_names(run.config)
    facts = {
        "has_momentum": has_momentum(run.config.optim),
        "num_processes": run.environment.get("num_processes", 1),
        "resizes": True,
        "streams": run.data_mode == "stream",
    }
    if values["init_weights"] is not None:
        names.remove("pretrained")
    told = [name for name in names if values[name] is not None and has_effect(name, values | facts)]
    return Table(("setting", "value"), [(name, shown(values[name])) for name in told])


def environment(run: Run, scored: Scored) -> Table:
    """Where and with what the run was trained, as its folder tells."""
    elsewhere = ("versions", "class_names", "restarts")
    facts = {name: value for name, value in run.environment.items() if name not in elsewhere}
    versions = run.environment.get("versions", {})
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    trained, restarts = steps_trained(run), run.environment.get("restarts", [])
    facts["interruptions"] = interruptions([each for each in restarts if each.get("resumed_at_step", 0) < trained])
    facts["steps"] = f"{trained:,} of {run.plan['schedule_steps']:,} scheduled"
    facts["test data fingerprint"] = scored.about.fingerprint
    rows = [(name.replace("_", " "), str(value)) for name, value in facts.items() if value is not None]
    return Table(("what", "value"), rows)


def interruptions(restarts: Sequence[dict[str, Any]]) -> str:
    """How often the run was started again, and what had to be done twice."""
    steps, seconds = (sum(start.get(name, 0) for start in restarts) for name in ("steps_redone", "seconds_lost"))
    again = f" ({steps:,} steps done again, {taken(seconds)} lost)" if restarts else ""
    return f"{len(restarts)}{again}"


def commands(run: Run, about: About) -> str:
    """What to type to train the same again and score it as it was scored."""
    processes, again = run.environment.get("num_processes", 1), f"{run.folder}-again"
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    if fused := run.environment.get("timm_fused_attn"):
        launcher = f"TIMM_FUSED_ATTN={shlex.quote(fused)} {launcher}"
    config = run.folder / "config.yaml"
    train = f"{launcher} train.py --config {shlex.quote(str(config))} --run-dir {shlex.quote(again)}"
    if about.own_data and about.place is not None:  # the data have moved
        train += f" --dataset {shlex.quote(about.place)}"
    named = about.checkpoint in ("best", "last")
    which = about.checkpoint if named else f"{again}/checkpoints/{Path(about.checkpoint).name}"
    flags = [] if which == "best" else [f"--checkpoint {shlex.quote(which)}"]
    flags += [] if about.tta == "none" else [f"--tta {about.tta}"]
    flags += [] if about.own_data else [f"--data {shlex.quote(about.place or about.dataset)}"]
    return f"{train}\n{' '.join(['python evaluate.py', shlex.quote(again), *flags])}"
