"""Does the same command give the same weights, bit for bit? Each model is trained twice by train.py, and compared.

    python -m benchmarks.same_twice [--dataset digits] [--models cnn4:32 …] [--precisions fp32 bf16] [--flags "…"]

A model is NAME:PIXELS. Printed is the largest difference between two weights of the runs; 0 says that all are equal.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
MODELS = ("cnn4:32", "resnet18_cifar:32", "wrn28_10:32", "vit_tiny_patch16_224:224", "swin_tiny_patch4_window7_224:224")


def weights(folder: Path, flags: list[str]) -> dict:
    """The last weights of a run with these flags."""
    command = [sys.executable, "train.py", *flags, "--seed", "0", "--wandb", "disabled", "--run-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def main() -> None:
    """Train every model in every precision twice; print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", default="30")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of train.py")
    args = parser.parse_args()
    for model, precision in product(args.models, args.precisions):
        name, pixels = model.split(":")
        flags = ["--dataset", args.dataset, "--model", name, "--img-size", pixels, "--precision", precision]
        flags += ["--batch-size", "64", "--max-steps", args.steps, *args.flags]
        with tempfile.TemporaryDirectory() as folder:
            first, second = (weights(Path(folder) / run, flags) for run in "ab")
        differences = torch.stack([(first[key].double() - second[key].double()).abs().max() for key in first])
        print(f"{name:30}  {precision}  {differences.max():.1e}", flush=True)  # nan where one of them is


if __name__ == "__main__":
    main()
