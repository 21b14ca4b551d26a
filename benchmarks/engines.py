"""One recipe under every engine: how far the first 50 losses are from one process's, images/s, and peak memory.

    python benchmarks/engines.py --data DIR_WITH_HUB_PARQUET [--model vit_small_cifar …] [--json FILE]

Every run is train.py under `accelerate launch`, with one thread a process on a CPU. Without a GPU the engines run over
gloo; on a machine with GPUs each process has one. images/s are of the last 40 of 50 steps, as train.py logs them; peak
memory is the main process's (its tensors on a GPU; without one all it has resident, libraries included).
The machine should have nothing else to do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cifar_dist.distributed.hardware import processor

ROOT = Path(__file__).parent.parent
GPUS = torch.cuda.device_count()
ENGINES = {"single": "gpu", "ddp": "cpu_multi", "fsdp2": "fsdp2"}  # others have a file of their own name
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")


def cases(many: int) -> list[tuple[str, int, str, list[str]]]:
    """Engine, processes, precision and further flags of each run; the first is what others are compared with."""
    plain = [("single", 1, []), ("single", 1, ["--micro-batch-size", "16"])]
    plain += [("ddp", count, []) for count in range(2, many + 1)]
    plain += [(engine, max(2 if not GPUS else 1, GPUS), []) for engine in ZERO + (("fsdp2",) if GPUS else ())]
    found = [(engine, count, "fp32", flags) for engine, count, flags in plain]
    for precision in ("bf16", "fp16") if GPUS else ("bf16",):
        found += [(engine, count, precision, flags) for engine, count, flags in plain if not flags]
    if GPUS:
        found += [("single", 1, precision, ["--compile"]) for precision in ("fp32", "bf16")]
    return found


def run(folder: Path, engine: str, count: int, flags: list[str]) -> list[dict[str, float]]:
    """The training records of one run."""
    config = ROOT / "accelerate_configs" / f"{ENGINES.get(engine, engine)}.yaml"
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "WANDB_MODE": "disabled"}
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", count]
    command = [sys.executable, *launcher, "train.py", *flags, "--run-dir", folder]
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def main() -> None:
    """Run every case once, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="vit_small_cifar")
    parser.add_argument("--batch-size", default="48")
    parser.add_argument("--flags", default="", help="more flags of train.py, in one string")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    recipe = ["--dataset", args.data, "--model", args.model, "--batch-size", args.batch_size, "--max-steps", "50"]
    recipe += ["--lr", "5e-4", "--clip-grad", "1", "--log-every", "1", "--val-fraction", "0.01", *args.flags.split()]
    rows: list[dict[str, object]] = []
    losses: dict[str, list[float]] = {}
    print("engine         processes  precision  flags                    largest loss difference  images/s  peak MiB")
    with tempfile.TemporaryDirectory() as folder:
        for number, (engine, count, precision, flags) in enumerate(cases(GPUS or 3)):
            records = run(Path(folder) / str(number), engine, count, [*recipe, "--precision", precision, *flags])
            found = [record["train/loss"] for record in records]
            first = losses.setdefault(precision, found)  # of this precision's one-process run
            row: dict[str, Any] = {
                "engine": engine,
                "processes": count,
                "precision": precision,
                "flags": " ".join(flags),
                "loss_difference": max(abs(a - b) / a for a, b in zip(first, found, strict=True)),
                "images_per_second": statistics.median(record["images_per_second"] for record in records[10:]),
                "peak_memory_bytes": records[-1]["peak_memory_bytes"],
                "losses": found,
            }
            rows.append(row)
            print(
                f"{engine:14} {count:9}  {precision:9}  {row['flags']:24} {row['loss_difference']:23.1e}"
                f"  {row['images_per_second']:8,.0f}  {row['peak_memory_bytes'] / 2**20:8,.0f}",
                flush=True,
            )
    if args.json:
        facts = {
            "command": " ".join(sys.argv),
            "hardware": torch.cuda.get_device_name() if GPUS else processor(),
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("torch", "accelerate", "deepspeed", "timm")},
            "rows": rows,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
