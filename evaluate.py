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
    here = os.path.dirname(os.path.realpath(__file__))
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]
    library = importlib.machinery.PathFinder.find_spec("evaluate", elsewhere)
    if library is None or library.loader is None:
        raise ModuleNotFoundError("Hugging Face evaluate is not installed: pip install evaluate", name="evaluate")
    sys.modules["evaluate"] = importlib.util.module_from_spec(library)
    library.loader.exec_module(sys.modules["evaluate"])
else:
    from accelerate import Accelerator

    from cifar_dist import checkpoint, export, scoring, wandb_report
    from cifar_dist.command_line import OneLineParser
    from cifar_dist.distributed import finish, on_main, start
    from cifar_dist.errors import run_main
    from cifar_dist.predictions import predictions_file, save_predictions, saved_by
    from cifar_dist.report import Report, report_folder, write_comparison, write_report
    from cifar_dist.run_record import Run, open_run
    from cifar_dist.wandb_run import log_report

if TYPE_CHECKING:  # type checkers take `import evaluate` for this file too
    Metric: Any
    MetricInfo: Any
    combine: Any


def main() -> None:
    """Score each run once, write its report from what was saved, and compare the runs."""
    arguments = parse_arguments()
    runs = [open_run(folder) for folder in arguments.run_dirs]
    if arguments.wandb_report:
        wandb_report.run_ids(arguments.run_dirs)  # refused before anything is scored
    precisions = scoring.precisions(runs)
    accelerator = start(precisions[0])
    for run, precision in zip(runs, precisions, strict=True):
        report(run, arguments, accelerator, precision)
    if len(runs) > 1:
        on_main(accelerator, lambda: compare(runs, arguments))
    finish(accelerator)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="evaluate.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="folders of runs that train.py made")
    parser.add_argument(
        "--checkpoint", default="best", help="weights to score: best, last, or a checkpoint's folder (default: best)"
    )
    parser.add_argument("--data", help="score another set with the same classes: a name or path, also CLASS/*.png")
    parser.add_argument("--tta", choices=("none", "flip"), default="none", help="flip: average with the mirror image")
    parser.add_argument("--output", type=Path, help="folder of the comparison (default: comparison/ beside the runs)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write a folder that plain timm loads")
    parser.add_argument("--onnx", action="store_true", help="with --export: also model.onnx")
    parser.add_argument("--push-to-hub", metavar="NAME/REPO", help="with --export: upload the folder to the Hub")
    parser.add_argument("--wandb-report", action="store_true", help="of several runs: make a W&B report too")
    arguments = parser.parse_args()
    several = len(arguments.run_dirs) > 1
    for flag, ok, cure in (
        ("--export", not several, "give one RUN_DIR"),
        ("--onnx", arguments.export is not None, "add --export DIR"),
        ("--push-to-hub", arguments.export is not None, "add --export DIR"),
        ("--wandb-report", several, "give several RUN_DIRs"),
        ("--output", several, "give several RUN_DIRs; a run's report is in its folder"),
    ):
        if getattr(arguments, flag[2:].replace("-", "_")) and not ok:
            parser.error(f"{flag} does not go with this command; {cure}.")
    return arguments


def report(run: Run, arguments: argparse.Namespace, accelerator: Accelerator, precision: str) -> None:
    """Score a run, unless the predictions it has are of the same checkpoint, and write and announce its report."""
    folder = report_folder(run.folder, arguments.data)
    which = on_main(accelerator, lambda: choose_checkpoint(run.folder, arguments.checkpoint))
    if arguments.export is None and on_main(accelerator, lambda: is_scored(run, which, folder, arguments.tta)):
        on_main(accelerator, lambda: publish(run, folder, "saved predictions"))
        return
    subject = scoring.load_subject(run, which, accelerator, precision)
    data = scoring.test_data(run, arguments.data)
    scored, val = scoring.score_test(subject, data, arguments.tta), scoring.score_val(subject, arguments.tta)

    def save() -> None:
        predictions_file(folder, "test").unlink(missing_ok=True)  # it is written last, and tells that all is there
        scoring.save_findings(subject, scored, val, data, folder)
        save_predictions(folder, scored)
        written = publish(run, folder, f"checkpoint {which}, step {scored.about.step}")
        if arguments.export is not None:
            deliver(subject, written, arguments)

    on_main(accelerator, save)


def choose_checkpoint(run_dir: Path, wanted: str) -> str:
    """The checkpoint to score: the wanted one, or the last where a run keeps no best."""
    if wanted == "best" and checkpoint.exists(run_dir) and not checkpoint.keeps_best(run_dir):
        print("checkpoint  the run has no best one; the last is scored", flush=True)
        return "last"
    return wanted


def is_scored(run: Run, which: str, folder: Path, tta: str) -> bool:
    """Whether a report's predictions are of the checkpoint as it is now; one that is gone can't have changed."""
    found = saved_by(folder)
    if found is None or (found.checkpoint, found.tta) != (which, tta):
        return False
    return not checkpoint.exists(run.folder) or checkpoint.find(run.folder, which).digest == found.digest


def publish(run: Run, folder: Path, how: str) -> Report:
    """Write and announce the report, and add it to the run's W&B page if it has one."""
    written = write_report(run, folder)
    metrics = written.metrics
    print(
        f"test        top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        f"  ({metrics['num_samples']:,} images, {how})"
    )
    for warning in metrics["warnings"]:
        print(f"warning     {warning}")
    print(f"report      {folder / 'report.html'}", flush=True)
    if (run.folder / "wandb_id").exists() and folder.name == "report":
        numbers = {f"test/{name}": metrics[name] for name in ("top1", "top3", "top5", "error_rate", "loss")}
        facts = {"test/selected_on": metrics["selected_on"], "test/warnings": "; ".join(metrics["warnings"])}
        last_step = max(record["step"] for record in run.records)
        log_report(run.folder, run.config, last_step, numbers | facts, written.pictures)
    return written


def deliver(subject: scoring.Subject, written: Report, arguments: argparse.Namespace) -> None:
    """Export the model, and upload it if asked to."""
    export.export_run(subject.run, subject.model, written.metrics, arguments.export)
    if arguments.onnx:
        export.export_onnx(subject.model, subject.input, arguments.export)
    print(f"export      {arguments.export}", flush=True)
    if arguments.push_to_hub:
        print(f"Hub         {export.push_to_hub(arguments.export, arguments.push_to_hub)}", flush=True)


def compare(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Write and announce the comparison."""
    output = arguments.output or runs[0].folder.resolve().parent / "comparison"
    found = write_comparison(runs, [report_folder(run.folder, arguments.data) for run in runs], output)
    for sentence in found.verdicts:
        print(f"verdict     {sentence}")
    print(f"comparison  {found.page}", flush=True)
    if arguments.wandb_report:
        config = runs[0].config
        ids = wandb_report.run_ids(arguments.run_dirs)
        study = wandb_report.Study(found.title, found.markdown, ids, config.run.wandb_project)
        print(wandb_report.publish(study, config, output), flush=True)


if __name__ == "__main__":
    run_main(main)
