"""Does the same command give the same weights, bit for bit? Each model is trained twice by train.py, and compared.

    python -m benchmarks.same_twice [--dataset digits] [--models cnn4:32 …] [--precisions fp32 bf16] [--flags "…"]
    python -m benchmarks.same_twice … --cut-at 7 --flags "--compile --compile-mode reduce-overhead"

A model is NAME:PIXELS. Both runs go at once, and every start finds nothing compiled. With --cut-at the second one ends
at that step and is resumed. Printed is the largest difference between two numbers of the runs' last checkpoints
(weights, their moving average, the optimizer's state, random numbers); 0 says that all are equal.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
MODELS = ("cnn4:32", "resnet18_cifar:32", "wrn28_10:32", "vit_tiny_patch16_224:224", "swin_tiny_patch4_window7_224:224")


def start(flags: list[str]) -> None:
    """Run train.py, with a cache of compiled kernels of its own."""
    command = [sys.executable, "train.py", *flags]
    with tempfile.TemporaryDirectory() as cache:
        compiled = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | compiled, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr[-2000:]}")


def last_state(folder: Path, flags: list[str], ends: list[str]) -> dict:
    """All tensors of the last checkpoint of a run that is started once for each step at which it is to end."""
    flags = [*flags, "--seed", "0", "--wandb", "disabled", "--run-dir", str(folder), "--resume", "auto"]
    for steps in ends:
        start([*flags, "--max-steps", steps])
    files = sorted((folder / "checkpoints" / "last").glob("*.safetensors"))
    return {f"{file.name}: {key}": value for file in files for key, value in load_file(file).items()}


def difference(a: dict, b: dict) -> float:
    """The largest between two numbers; infinity where the runs have other tensors."""
    if a.keys() != b.keys():
        return float("inf")
    return torch.stack([(a[key].double() - b[key].double()).abs().max() for key in a if a[key].numel()]).max().item()


def main() -> None:
    """Train every model in every precision twice; print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--steps", default="30")
    parser.add_argument("--cut-at", help="step at which the second run ends before it is resumed")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of train.py")
    args = parser.parse_args()
    second = [args.steps] if args.cut_at is None else [args.cut_at, args.steps]
    for model, precision in product(args.models, args.precisions):
        name, pixels = model.split(":")
        flags = ["--dataset", args.dataset, "--model", name, "--img-size", pixels, "--precision", precision]
        flags += ["--batch-size", "64", *args.flags]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as both:
            runs = ("a", [args.steps]), ("b", second)
            found = [both.submit(last_state, Path(folder) / run, flags, ends) for run, ends in runs]
            a, b = (future.result() for future in found)
        print(f"{name:30}  {precision}  {difference(a, b):.1e}  ({len(a)} tensors)", flush=True)


if __name__ == "__main__":
    main()
