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

    from cifar_dist import export, scoring
    from cifar_dist.aim import Aim, choose_aims, is_done, precision_of
    from cifar_dist.command_line import OneLineParser
    from cifar_dist.distributed.ending import run_main
    from cifar_dist.distributed.group import finish, on_main, say, start
    from cifar_dist.report import Report, check_runs, make_room, wandb_report, write_comparison, write_report
    from cifar_dist.run_record import Run, open_run
    from cifar_dist.tracking.wandb_run import log_report

if TYPE_CHECKING:  # type checkers take `import evaluate` for this file too
    Metric: Any
    MetricInfo: Any
    combine: Any


WAIT_SECONDS = 4 * 3600  # that other processes wait for the one that draws, exports and uploads


def main() -> None:
    """Score each run once, write its report from what was saved, and compare the runs."""
    arguments = parse_arguments()
    runs = [open_run(folder) for folder in arguments.run_dirs]
    check_runs(runs)  # refused before anything is scored
    if arguments.wandb_report:
        wandb_report.runs_by_project(runs)
    accelerator = start(precision_of(runs[0]), WAIT_SECONDS)
    on_main(accelerator, lambda: check_places(arguments))
    aims = on_main(accelerator, lambda: choose_aims(runs, arguments.checkpoint, arguments.data, arguments.tta))
    for run, aim in zip(runs, aims, strict=True):
        report(run, aim, arguments, accelerator)
    if len(runs) > 1:
        on_main(accelerator, lambda: compare(runs, [aim.folder for aim in aims], arguments))
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
    several, plain = len(arguments.run_dirs) > 1, arguments.data is None and arguments.tta == "none"
    for flag, ok, cure in (
        ("--export", not several, "give one RUN_DIR"),
        ("--export", plain, "its card is of the run's own test set, without --data and --tta"),
        ("--onnx", arguments.export is not None, "add --export DIR"),
        ("--push-to-hub", arguments.export is not None, "add --export DIR"),
        ("--wandb-report", several, "give several RUN_DIRs"),
        ("--checkpoint", not several or arguments.checkpoint in ("best", "last"), "a folder is of one RUN_DIR"),
        ("--output", several, "give several RUN_DIRs; a run's report is in its folder"),
    ):
        if getattr(arguments, flag[2:].replace("-", "_")) and not ok:
            parser.error(f"{flag} does not go with this command; {cure}.")
    return arguments


def check_places(arguments: argparse.Namespace) -> None:
    """Refuse folders that can't be written before the time that scoring takes."""
    if len(arguments.run_dirs) > 1:
        make_room(comparison_folder(arguments))
    if arguments.export is not None:
        export.check(arguments.export, arguments.onnx)


def report(run: Run, aim: Aim, arguments: argparse.Namespace, accelerator: Accelerator) -> None:
    """Score a run, unless that has been done, write and announce its report, and export its model if asked to."""
    done, subject = on_main(accelerator, lambda: is_done(run, aim)), None
    if not done:
        say(accelerator, f"scoring     {run.folder}, checkpoint {aim.which}")
    if not done or arguments.export is not None:
        subject = scoring.load_subject(run, aim, accelerator)
    if subject is not None and not done:
        scoring.score(subject)

    def publish() -> None:
        written = write_report(run, aim.folder)
        announce(written, aim.folder, again=done)
        if not done and (run.folder / "wandb_id").exists() and aim.folder.name == "report":
            to_wandb(run, written)
        if subject is not None and arguments.export is not None:
            deliver(subject, written, arguments)

    on_main(accelerator, publish)


def announce(written: Report, folder: Path, again: bool) -> None:
    """Say what the report found, and where it is."""
    metrics, scored = written.metrics, written.metrics["checkpoint"]
    how = "saved predictions" if again else f"checkpoint {scored['which']}, step {scored['step']}"
    print(
        f"test        top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
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


def deliver(subject: scoring.Subject, written: Report, arguments: argparse.Namespace) -> None:
    """Export the model, and upload it if asked to."""
    export.export_run(subject.run, subject.model, written.metrics, arguments.export)
    if arguments.onnx:
        export.export_onnx(subject.model, subject.input, arguments.export)
    print(f"export      {arguments.export}", flush=True)
    if arguments.push_to_hub:
        print(f"Hub         {export.push_to_hub(arguments.export, arguments.push_to_hub)}", flush=True)


def comparison_folder(arguments: argparse.Namespace) -> Path:
    """Where the comparison goes."""
    return arguments.output or arguments.run_dirs[0].resolve().parent / "comparison"


def compare(runs: list[Run], folders: list[Path], arguments: argparse.Namespace) -> None:
    """Write and announce the comparison."""
    output = comparison_folder(arguments)
    found = write_comparison(runs, folders, output)
    for sentence in found.verdicts:
        print(f"verdict     {sentence}")
    print(f"comparison  {found.page}", flush=True)
    if arguments.wandb_report:
        config = runs[0].config
        study = wandb_report.Study(found.title, found.markdown, wandb_report.runs_by_project(runs))
        print(wandb_report.publish(study, config, output), flush=True)


if __name__ == "__main__":
    run_main(main)
