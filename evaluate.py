"""Score a run's best checkpoint on its test split and write the report to RUN_DIR/report/.

python evaluate.py runs/cnn4-digits
accelerate launch evaluate.py runs/swin_base-cifar10
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import replace
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
    import torch
    from accelerate import Accelerator

    from cifar_dist import checkpoint, report
    from cifar_dist.command_line import OneLineParser
    from cifar_dist.data import load_test_data
    from cifar_dist.data.augment import Preprocess
    from cifar_dist.distributed import finish, on_main, start
    from cifar_dist.engine import Evaluator
    from cifar_dist.errors import UsageError, is_first_process, run_main
    from cifar_dist.models import build_model, input_config
    from cifar_dist.predictions import Scored, save_predictions
    from cifar_dist.run_record import Run, open_run
    from cifar_dist.wandb_run import log_report

if TYPE_CHECKING:  # type checkers take `import evaluate` for this file too
    Metric: Any
    MetricInfo: Any
    combine: Any


def main() -> None:
    """Score the test split once, save the predictions, and write the report from what was saved."""
    arguments = parse_arguments()
    run = open_run(arguments.run_dir)
    which = choose_checkpoint(run.folder, arguments.checkpoint)
    precision = run.config.run.precision
    if precision == "fp16" and not torch.accelerator.is_available():
        precision = "fp32"  # a run trained on a GPU may be scored anywhere
    accelerator = start(precision)
    scored = score(run, which, accelerator, precision)
    on_main(accelerator, lambda: publish(run, scored))
    finish(accelerator)


def parse_arguments() -> argparse.Namespace:
    """The command line: `run_dir`, a path, and `checkpoint`, best or last."""
    parser = OneLineParser(prog="evaluate.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run that train.py made")
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="weights to score (default: best)"
    )
    return parser.parse_args()


def choose_checkpoint(run_dir: Path, wanted: str) -> str:
    """The checkpoint to score: the wanted one, or the last where a run keeps no best."""
    if wanted == "best" and not checkpoint.keeps_best(run_dir):
        if is_first_process():
            print("checkpoint  the run has no best one; the last is scored", flush=True)
        return "last"
    return wanted


def score(run: Run, which: str, accelerator: Accelerator, precision: str) -> Scored:
    """Probabilities of every test image, from the run's own configuration and weights."""
    config = run.config
    stored = checkpoint.find(run.folder, which)
    data = load_test_data(config.data)
    run.check_classes(data.class_names, data.name)
    model = build_model(replace(config.model, pretrained=False, init_weights=None), len(data.class_names))
    try:
        model.load_state_dict(checkpoint.load_weights(stored))
    except RuntimeError:
        raise UsageError(f"{run.folder}: checkpoint {which} does not fit the model of its config.yaml.") from None
    inputs = input_config(model, config.model)
    preprocess = Preprocess(inputs, accelerator.device, torch.float32)
    evaluator = Evaluator(accelerator, preprocess, run.plan["micro_batch_size"], precision)
    logits = evaluator.logits(model.to(accelerator.device), data.test.to(accelerator.device))
    if not logits.isfinite().all():
        raise UsageError(f"{run.folder}: checkpoint {which} (step {stored.step}) predicts NaN; the run diverged.")
    return Scored(
        ids=data.test.ids.numpy(),
        labels=data.test.labels.numpy(),
        probabilities=logits.double().softmax(dim=1).float().numpy(),
        class_names=tuple(data.class_names),
        dataset=data.name,
        fingerprint=data.fingerprint,
        checkpoint=which,
        step=stored.step,
    )


def publish(run: Run, scored: Scored) -> None:
    """Save the predictions, write and announce the report, and add it to the run's W&B page if it has one."""
    save_predictions(run.folder, scored)
    written = report.write_report(run.folder)
    metrics = written.metrics
    print(
        f"test        top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}"
        f"  ({metrics['num_samples']:,} images, checkpoint {scored.checkpoint}, step {scored.step})"
    )
    for warning in metrics["warnings"]:
        print(f"warning     {warning}")
    print(f"report      {run.folder / 'report' / 'report.md'}", flush=True)
    if not (run.folder / "wandb_id").exists():
        return
    numbers = {f"test/{name}": metrics[name] for name in ("top1", "top3", "top5", "error_rate", "loss")}
    last_step = max(record["step"] for record in run.records)
    facts = {"test/selected_on": metrics["selected_on"], "test/warnings": "; ".join(metrics["warnings"])}
    log_report(run.folder, run.config, last_step, numbers | facts, written.pictures)


if __name__ == "__main__":
    run_main(main)
