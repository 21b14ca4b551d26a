"""Score a run's best checkpoint on its test split and write its report; of several runs also a comparison.

python evaluate.py runs/cnn4-digits
python evaluate.py runs/vit_base-cifar10 runs/swin_base-cifar10
accelerate launch evaluate.py runs/swin_base-cifar10
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "evaluate":  # `import evaluate` found this script first: hand over to the library of that name
    elsewhere = [entry for entry in sys.path if not os.path.isfile(os.path.join(entry, "evaluate.py"))]
    library = importlib.machinery.PathFinder.find_spec("evaluate", elsewhere)
    if library is None or library.loader is None:
        raise ModuleNotFoundError("Hugging Face evaluate is not installed: pip install evaluate", name="evaluate")
    sys.modules["evaluate"] = importlib.util.module_from_spec(library)
    library.loader.exec_module(sys.modules["evaluate"])
else:
    from cifar_dist.distributed.ending import run_main
    from cifar_dist.evaluate_arguments import parse_arguments

    if __name__ == "__main__":
        arguments = run_main(parse_arguments)  # --help and wrong flags are answered at once

    from accelerate import Accelerator

    from cifar_dist import export, scoring
    from cifar_dist.distributed.group import on_main, say, start
    from cifar_dist.errors import UsageError
    from cifar_dist.eval_spec import EvalSpec, choose_specs, is_done, precision_of
    from cifar_dist.report import (
        Report,
        check_runs,
        left_out,
        make_room,
        wandb_report,
        write_comparison,
        write_report,
    )
    from cifar_dist.run_record import Run, open_run
    from cifar_dist.tracking.wandb_run import log_report

if TYPE_CHECKING:  # type checkers take `import evaluate` for this file too
    Metric: Any
    MetricInfo: Any
    combine: Any


WAIT_SECONDS = 4 * 3600  # that other processes wait for the one that draws, exports and uploads


def main(arguments: argparse.Namespace | None = None) -> None:
    """Score each run once, write its report from what was saved, and compare the runs."""
    arguments = arguments or parse_arguments()
    runs = [open_run(folder) for folder in arguments.run_dirs]
    check_runs(runs)  # refused before anything is scored
    if arguments.wandb_report:
        wandb_report.runs_by_project(runs)
    accelerator = start(precision_of(runs[0]), WAIT_SECONDS)
    specs = on_main(accelerator, lambda: choose_specs(runs, arguments.checkpoint, arguments.data, arguments.tta))
    on_main(accelerator, lambda: check_places(specs, arguments))
    for run, spec in zip(runs, specs, strict=True):
        report(run, spec, arguments, accelerator)
    if len(runs) > 1:
        on_main(accelerator, lambda: compare(runs, specs, arguments))
    accelerator.end_training()


def check_places(specs: list[EvalSpec], arguments: argparse.Namespace) -> None:
    """Refuse folders that can't be written before the time that scoring takes."""
    for spec in specs:
        if not os.access(place := spec.folder.parent, os.W_OK):
            raise UsageError(f"RUN_DIR {place} cannot be written, where its report goes; copy it to a place of yours.")
    if len(specs) > 1:
        make_room(comparison_folder(specs, arguments))
    if arguments.export is not None:
        export.check(arguments.export, arguments.onnx)


def report(run: Run, spec: EvalSpec, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    """Score a run, unless that has been done, write and announce its report, and export its model if asked to."""
    done, loaded = on_main(accelerator, lambda: is_done(run, spec)), None
    if not done:
        say(accelerator, f"scoring     {run.folder}, checkpoint {spec.which}")
    if not done or arguments.export is not None:
        loaded = scoring.load_run(run, spec, accelerator)
    if loaded is not None and not done:
        scoring.score(loaded)

    def publish() -> None:
        written = write_report(run, spec.folder)
        announce(written, spec.folder, again=done)
        if not done and (run.folder / "wandb_id").exists() and spec.folder.name == "report":
            to_wandb(run, written)
        if loaded is not None and arguments.export is not None:
            deliver(loaded, written, arguments)

    on_main(accelerator, publish)


def announce(written: Report, folder: Path, again: bool) -> None:
    """Say what the report found, and where it is."""
    metrics, scored = written.metrics, written.metrics["checkpoint"]
    how = "saved predictions" if again else f"checkpoint {scored['which']}, step {scored['step']}"
    top5 = f"  top-5 {metrics['top5']:.2%}" if len(metrics["classes"]) > 5 else ""
    print(
        f"test        top-1 {metrics['top1']:.2%}{top5}  loss {metrics['loss']:.4f}"
        f"  ({metrics['num_samples']:,} images, {how})"
    )
    for warning in metrics["warnings"]:
        print(f"warning     {warning}")
    print(f"report      {folder / 'report.html'}", flush=True)


def to_wandb(run: Run, written: Report) -> None:
    """Add the report's numbers, tables and pictures to the run's own page."""
    metrics = written.metrics
    numbers = {f"test/{name}": metrics[name] for name in ("top1", "top3", "top5", "error_rate", "loss")}
    facts = {"test/selected_on": metrics["selected_on"], "test/warnings": "; ".join(metrics["warnings"])}
    log_report(run.folder, run.config, run.last_step, numbers | facts, written.pictures, written.tables)


def deliver(loaded: scoring.LoadedRun, written: Report, arguments: argparse.Namespace) -> None:
    """Export the model, and upload it if asked to."""
    export.export_run(loaded.run, loaded.model, written.metrics, arguments.export)
    if arguments.onnx:
        export.export_onnx(loaded.model, loaded.input, arguments.export)
    print(f"export      {arguments.export}", flush=True)
    if arguments.push_to_hub:
        print(f"Hub         {export.push_to_hub(arguments.export, arguments.push_to_hub)}", flush=True)


def comparison_folder(specs: list[EvalSpec], arguments: argparse.Namespace) -> Path:
    """Where the comparison goes: beside the runs, and called like the reports that it compares.

    A set that is another one for some runs only, since the others' own have moved there, is in its name.
    """
    name = "comparison" + max((spec.folder.name for spec in specs), key=len).removeprefix("report")
    return arguments.output or arguments.run_dirs[0].resolve().parent / name


def compare(runs: list[Run], specs: list[EvalSpec], arguments: argparse.Namespace) -> None:
    """Write and announce the comparison."""
    output = comparison_folder(specs, arguments)
    if others := left_out(output, runs):
        print(f"replacing   a comparison that had {', '.join(others)}, too; --output takes another folder")
    found = write_comparison(runs, [spec.folder for spec in specs], output)
    for sentence in found.verdicts:
        print(f"verdict     {sentence}")
    print(f"comparison  {found.page}", flush=True)
    if arguments.wandb_report:
        config = runs[0].config
        study = wandb_report.Study(found.title, found.markdown, wandb_report.runs_by_project(runs))
        print(wandb_report.publish(study, config, output), flush=True)


if __name__ == "__main__":
    run_main(lambda: main(arguments))
