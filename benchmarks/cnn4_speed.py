"""Seconds of one epoch of study E: train.py against the plain PyTorch loop, in turn, one thread each.

    python benchmarks/cnn4_speed.py --data DIR_WITH_HUB_PARQUET [--repeats 3] [--json FILE]

Both times are of the training steps alone, as each program logs them: no imports, decoding or evaluation.
The machine should have nothing else to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def run(*command: object) -> str:
    """The standard output of a Python program, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def ours(data: Path, folder: Path) -> float:
    """Seconds of the first epoch of recipes/cnn4.yaml."""
    run("train.py", "--config", "recipes/cnn4.yaml", "--dataset", data, "--max-steps", 704, "--run-dir", folder)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return max(record["seconds"] for record in records if "seconds" in record)


def plain(data: Path) -> float:
    """Seconds of the first epoch of benchmarks/plain_cnn4.py."""
    lines = run("benchmarks/plain_cnn4.py", "--data", data, "--epochs", 1).splitlines()
    return json.loads(lines[0])["seconds"]


def main() -> None:
    """Measure in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        ours(args.data, Path(folder) / "warm")  # decodes once
        for repeat in range(args.repeats):
            pair = {"ours": ours(args.data, Path(folder) / str(repeat)), "plain": plain(args.data)}
            pairs.append(pair)
            print(
                f"ours {pair['ours']:6.1f} s   plain {pair['plain']:6.1f} s   ratio {pair['plain'] / pair['ours']:.2f}",
                flush=True,
            )
    ratios = [pair["plain"] / pair["ours"] for pair in pairs]
    print(f"median ratio {statistics.median(ratios):.2f} (n = {len(pairs)})")
    if args.json:
        facts = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
        args.json.write_text(json.dumps({"seconds_per_epoch": pairs, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
