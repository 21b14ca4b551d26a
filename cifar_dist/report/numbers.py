"""Every number of a run's report: ``metrics.json``. Accuracies are fractions, losses in nats, sizes in units' names."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import numpy as np

from cifar_dist.cost.flops import Flops, Peak, mfu
from cifar_dist.distributed.hardware import cpu_name
from cifar_dist.errors import UsageError
from cifar_dist.report.endings import cut_warning, steps_trained
from cifar_dist.report.evidence import Chosen
from cifar_dist.report.predictions import Scored
from cifar_dist.run_record import Run
from cifar_dist.statistics import bootstrap_macro_f1, calibration, wilson_interval

COST_FILE = "cost.json"  # what `scoring.measure_cost` found
MOST_NAMED = 10  # classes in a sentence
LOWEST, HIGHEST = 0.05, 20  # a fitted temperature outside has followed a few images
TEST_SELECTED = (
    "The run was watched, and its best checkpoint picked, on the test split, so these numbers are optimistic:"
    " no unseen data was left to test on."
)


def compute_metrics(scored: Scored, of_confidence_alone: bool = False) -> dict[str, Any]:
    """Every number of the predictions, by the project's `evaluate` modules, or those that a temperature changes."""
    import evaluate
    from cifar_dist.metrics.balanced_accuracy import BalancedAccuracy
    from cifar_dist.metrics.calibration import Calibration
    from cifar_dist.metrics.classification_report import ClassificationReport
    from cifar_dist.metrics.confusion_matrix import ConfusionMatrix
    from cifar_dist.metrics.cross_entropy import CrossEntropy
    from cifar_dist.metrics.top_k_accuracy import TopKAccuracy

    modules: list[Any] = [CrossEntropy, Calibration]
    if not of_confidence_alone:
        modules += [TopKAccuracy, ClassificationReport, BalancedAccuracy, ConfusionMatrix]
    with tempfile.TemporaryDirectory() as cache:  # else each leaves an empty folder in the user's home
        combined = evaluate.combine([module(keep_in_memory=True, cache_dir=cache) for module in modules])
        return combined.compute(predictions=scored.probabilities, references=scored.labels)


def metrics_of(run: Run, scored: Scored, val: Scored | None, chosen: Chosen, cost: dict[str, Any]) -> dict[str, Any]:
    """The metrics in reading order, with what they were measured on and what to be wary of."""
    found, about = compute_metrics(scored), scored.about
    classes = zip(scored.class_names, found["classes"], strict=True)
    count = len(scored.labels)
    selected_on = _selected_on(run, scored)
    return {
        "top1": found["top1"],
        "top1_interval": wilson_interval(int(scored.correct.sum()), count),
        "top3": found["top3"],
        "top5": found["top5"],
        "error_rate": 1 - found["top1"],
        "loss": found["loss"],
        "balanced_accuracy": found["balanced_accuracy"],
        "macro_f1_interval": bootstrap_macro_f1(scored.labels, scored.predicted, len(scored.class_names), seed=0),
        "num_samples": count,
        "macro_avg": found["macro_avg"],
        "weighted_avg": found["weighted_avg"],
        "classes": [{"name": name, **numbers} for name, numbers in classes],
        "confusion_matrix": found["confusion_matrix"],
        "evaluation": _evaluation(run, scored, val),
        "calibration": _calibration(scored, val, found),
        "suspected_label_errors": chosen.num_suspects,
        "cost": _cost(run, cost),
        "dataset": {"name": about.dataset, "split": about.split, "fingerprint": about.fingerprint},
        "checkpoint": {"which": about.checkpoint, "step": about.step, "digest": about.digest},
        "precision": about.precision,
        "tta": about.tta,
        "selected_on": selected_on,
        "warnings": _warnings(run, scored, selected_on),
    }


def _evaluation(run: Run, scored: Scored, val: Scored | None) -> dict[str, Any] | None:
    """Accuracy and loss on the split that the run was watched on, of the very weights that were scored, if known."""
    step, split = scored.about.step, run.evaluation_split
    logged = {name: dict(zip(*run.series(f"val/{name}"), strict=True)).get(step) for name in ("top1", "loss")}
    if None not in logged.values():
        return {"split": split, **logged, "measured": "while training"}
    if val is None or split != "val" or val.about.digest != scored.about.digest:
        return None
    numbers = {"top1": float(val.correct.mean()), "loss": compute_metrics(val, of_confidence_alone=True)["loss"]}
    return {"split": split, **numbers, "measured": "afterwards"}


def _selected_on(run: Run, scored: Scored) -> str:
    """The split by which the checkpoint was picked or the run ended: val, test, or none."""
    picked = scored.about.checkpoint == "best" or run.config.run.patience is not None or run.evaluation_split == "test"
    return run.evaluation_split if picked and run.series("val/top1")[0] and steps_trained(run) else "none"


def _warnings(run: Run, scored: Scored, selected_on: str) -> list[str]:
    warnings, trained_on = [cut] if (cut := cut_warning(run)) else [], run.environment.get("data_fingerprint")
    own_data = scored.about.own_data
    absent = [number for number in range(len(scored.class_names)) if number not in scored.labels]
    if absent:
        warnings.append(
            f"The images are of {len(scored.class_names) - len(absent)} of the {len(scored.class_names)} classes; macro"
            f" means are over these, without {_listed(scored, absent)}."
        )
    predicted = set(scored.predicted.tolist())
    never = sorted(set(scored.labels.tolist()) - predicted)
    if len(predicted) == 1 and never:
        only = scored.class_names[scored.predicted[0]]
        warnings.append(f"Every image is taken for {only}: the accuracy is that class's share of the images.")
    elif never:
        warnings.append(
            f"Never predicted: {_listed(scored, never)} (a precision of 0 in 0 predictions counts as 0 in macro means)."
        )
    if selected_on == "test" and own_data:
        warnings.append(TEST_SELECTED)
    if own_data and trained_on not in (None, scored.about.fingerprint):
        warnings.append(
            f"The data set has changed since training (fingerprint {trained_on}, now {scored.about.fingerprint})."
        )
    return warnings


def _listed(scored: Scored, classes: list[int]) -> str:
    """Names of classes, of many the first."""
    names = [scored.class_names[number] for number in classes[:MOST_NAMED]]
    return ", ".join(names) + (f" and {len(classes) - MOST_NAMED} more" if len(classes) > MOST_NAMED else "")


def _calibration(scored: Scored, val: Scored | None, found: dict[str, Any]) -> dict[str, Any]:
    """How far confidences can be trusted, as they are and at a temperature fitted on val."""
    numbers = {"ece": found["ece"], "brier": found["brier"], "nll": found["loss"]}
    temperature = None if val is None or val.correct.all() else calibration.fit_temperature(val.logits, val.labels)
    if temperature is None or not LOWEST < temperature < HIGHEST:  # with hardly a mistake in val, any small one fits
        missing = "there is no val split at hand" if val is None else "every image of val is right"
        bounds = f"not between {LOWEST:g} and {HIGHEST:g}: it follows a few images, or logits of an unusual scale"
        reason = missing if temperature is None else f"the best on val, {temperature:.3g}, is {bounds}"
        return {"before": numbers, "temperature": None, "fitted_on": None, "after": None, "unfitted": reason}
    after = compute_metrics(temperature_scaled(scored, temperature), of_confidence_alone=True)
    return {
        "before": numbers,
        "temperature": temperature,
        "fitted_on": "val",
        "after": {"ece": after["ece"], "brier": after["brier"], "nll": after["loss"]},
        "unfitted": None,
    }


def temperature_scaled(scored: Scored, temperature: float) -> Scored:
    """The same predictions with logits divided by the temperature."""
    return replace(scored, logits=calibration.apply(scored.logits, temperature).astype("float32"))


def _cost(run: Run, cost: dict[str, Any]) -> dict[str, Any]:
    """What `scoring.measure_cost` found, and what training took by the log; MFU where the machine's peak is known."""
    if not cost:
        return {}
    try:
        return _cost_of(run, cost)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{run.folder}: {COST_FILE} of the report is damaged ({error!r}); remove it and run evaluate.py again."
        ) from None


def _cost_of(run: Run, cost: dict[str, Any]) -> dict[str, Any]:
    rates, memory, seconds = (run.series(name)[1] for name in ("images_per_second", "peak_memory_bytes", "seconds"))
    rate = float(np.median(rates)) if rates else None
    processes, environment = run.environment.get("num_processes", 1), run.environment
    flops, peak = Flops(**cost["flops"]), Peak(**cost["peak"])
    cpu = cpu_name(environment.get("processor", ""), environment.get("cpu_threads", 0))
    here = cost["inference"]["device"] in (environment.get("device"), cpu)
    whole = run.config.model.freeze == "none"  # a frozen backbone has no backward pass, or is computed once
    share = mfu(flops, rate, processes, peak) if rate and here and whole else None
    training = {
        "images_per_second": rate,
        "peak_memory_bytes": max(memory) if memory else None,
        "seconds": seconds[-1] if seconds else None,
        "mfu": share if share is None or share <= 1 else None,  # else the peak was measured on a busy machine
        "num_processes": processes,
    }
    counted = {"gflops": flops.forward / 1e9, "gmacs": flops.macs / 1e9}
    counted["gmacs_without_attention"] = flops.macs_without_attention / 1e9
    return {**cost, **counted, "training": training}
