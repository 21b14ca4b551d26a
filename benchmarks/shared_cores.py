"""How fast train.py trains alone, and two of it at once on the same cores, by what is said to their threads.

    python -m benchmarks.shared_cores [--repeats 3] [--json FILE]

Each number is of a training of its own on digits, or the sum of two; images/s by the log, without its first record.
Threads that wait for each other spin 300,000 times before they sleep, if nobody says otherwise. The machine should have
nothing else to do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine import facts

ROOT = Path(__file__).parent.parent
WAYS = {"as it is": {}, "1,000 spins": {"GOMP_SPINCOUNT": "1000"}, "one thread": {"OMP_NUM_THREADS": "1"}}
CASES = {  # pixels, batch, precision, steps
    "cnn4": (32, 64, "fp32", 120), "resnet18_cifar": (32, 64, "bf16", 16), "vit_tiny_patch16_224": (224, 16, "bf16", 16)
}  # fmt: skip


def images_per_second(model: str, said: dict[str, str]) -> float:
    """Of a training of this model: the median of its log."""
    pixels, batch, precision, steps = CASES[model]
    flags = f"--dataset digits --model {model} --img-size {pixels} --batch-size {batch} --precision {precision}"
    flags += f" --epochs 20 --max-steps {steps} --log-every {steps // 4} --val-fraction 0 --wandb disabled"
    flags += "" if model.startswith("vit") else " --channels-last"
    environment = os.environ | said
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *flags.split(), "--run-dir", f"{folder}/run"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        records = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    rates = [record["images_per_second"] for record in records if "images_per_second" in record]
    return statistics.median(rates[1:])


def main() -> None:
    """Measure in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: dict[str, dict[str, list[float]]] = {}
    for model in CASES:
        for _ in range(args.repeats):
            for way, said in WAYS.items():
                for count, label in ((1, "alone"), (2, "two at once")):
                    with ThreadPoolExecutor() as both:
                        total = sum(both.map(lambda _: images_per_second(model, said), range(count)))  # noqa: B023
                    rows.setdefault(f"{model}, {label}", {}).setdefault(way, []).append(round(total, 1))
        for label in ("alone", "two at once"):
            found = rows[f"{model}, {label}"]
            shown = "   ".join(f"{name} {statistics.median(rates):,.0f}" for name, rates in found.items())
            print(f"{model:22} {label:12} {shown}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(facts("torch", "timm") | {"images/s": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
