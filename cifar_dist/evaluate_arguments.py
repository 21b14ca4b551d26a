"""The command line of evaluate.py; what takes seconds to import is left to the script."""

from __future__ import annotations

import argparse

from cifar_dist.argument_types import name_or_path, path
from cifar_dist.command_line import OneLineParser

DESCRIPTION = "Score a run's best checkpoint on its test split and write its report; of several runs also a comparison."


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="evaluate.py", allow_abbrev=False, description=DESCRIPTION)
    parser.elsewhere = (
        " A run is scored by the settings in its folder, as it was trained; weights from elsewhere become one by"
        " train.py --init-weights FILE --max-steps 0."
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=path, nargs="+", help="folders of runs that train.py made")
    parser.add_argument(
        "--checkpoint",
        type=name_or_path,
        default="best",
        help="weights to score: best, last, or a checkpoint's folder (default: best)",
    )
    parser.add_argument(
        "--data",
        type=name_or_path,
        help="score another set with the same classes: a name or path, also CLASS/*.png;"
        " or the path to which the run's own have moved",
    )
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "flip-shift"),
        default="none",
        help="flip: average with the mirror image; flip-shift: also with both moved by a pixel, up left and down right",
    )
    parser.add_argument(
        "--output",
        type=path,
        help="folder of the comparison (default: beside the runs: comparison, or comparison-flip, … like the reports)",
    )
    parser.add_argument("--export", type=path, metavar="DIR", help="write a folder that plain timm loads")
    parser.add_argument("--onnx", action="store_true", help="with --export: also model.onnx")
    parser.add_argument("--push-to-hub", type=name_or_path, metavar="NAME/REPO", help="with --export: to the Hub, too")
    parser.add_argument("--wandb-report", action="store_true", help="of several runs: make a W&B report too")
    arguments = parser.parse_intermixed_args()
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
