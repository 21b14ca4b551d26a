"""Training speed on one GPU: images/s and MFU, the plain loop beside it, and what the data path costs.

    python -m benchmarks.gpu --json FILE [--data DIR_WITH_HUB_PARQUET] [--models vit_base_patch16_224 …] [--minutes 7.5]

Every row is one model trained in one way, in bf16 with AdamW, crop, flip and normalising: as train.py puts it together,
or, for `plain`, as benchmarks/plain_loop.py does with a worker for each core. Each row is a process of its own. A few
get ready at the same time, compiling included; then one at a time is measured while all others are stopped (SIGSTOP).
A row has a few windows of steps, each waited for at its end; our rows have as many again, in turn with these, on one
batch that is on the device already. Its images/s are those of the median window with the data path. A row that fails,
or is not done in time, says so. The JSON file is written anew after every row.

Columns: `x plain` against the plain loop's images/s; `no data` images/s without the data path; `batch` the milliseconds
to make an augmented batch, waited for; `data` the share of a step that the data path adds, by the two rates; `busy` the
share of a step in which the GPU computes (the rest it waits for Python); `ready` seconds until it waited for its turn.
Without a GPU the script runs, too, to be tried out. Without --data images are noise, and the plain loop is spared
decoding.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import machine
from benchmarks.gpu_rows import CORES, PLAIN, PRECISION, Bench, Case, Row, Way, fill
from benchmarks.gpu_turns import Turns
from cifar_dist.config import DataConfig
from cifar_dist.cost.peak import device_peak
from cifar_dist.data import TrainingData, load_training_data
from cifar_dist.data.resident import ResidentSet
from cifar_dist.data.sources import open_source
from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import device_bytes, start
from cifar_dist.durable import replace_text
from cifar_dist.errors import first_line
from cifar_dist.training.micro_batch import is_out_of_memory

VIT = Case("vit_base_patch16_224", 224, 256, 3500, 1.4, 0.01)
SWIN = Case("swin_base_patch4_window7_224", 224, 128, 2400, 2.0)
NFNET = Case("dm_nfnet_f0", 224, 256)
RESNET = Case("resnet18_cifar", 32, 1024, 60_000)
WRN = Case("wrn28_10", 32, 512, 11_500)

EAGER, GRAPHS = Way("eager"), Way("CUDA graphs", compiles="reduce-overhead")
COMPILED = Way("compiled", compiles="default")
NHWC = Way("channels_last", channels_last=True)
ANY = Way("channels_last, any algorithm", channels_last=True, deterministic=False)
GRAPHS_NHWC = Way("CUDA graphs, channels_last", channels_last=True, compiles="reduce-overhead")
GRAPHS_ANY = Way("CUDA graphs, any algorithm", channels_last=True, compiles="reduce-overhead", deterministic=False)
GRAPHS_TUNED = Way(
    "CUDA graphs, tuned", channels_last=True, compiles="reduce-overhead", tunes=True, deterministic=False
)
TIMM = Way("CUDA graphs, timm's attention", compiles="reduce-overhead", attention="timm")
FUSED = Way("CUDA graphs, timm's fused windows", compiles="reduce-overhead", attention="fused")

ROWS: list[tuple[Case, Way]] = [  # what compiles the longest is first, what can be done without last
    *((SWIN, way) for way in (GRAPHS, PLAIN, EAGER)),
    *((VIT, way) for way in (GRAPHS, PLAIN, TIMM, EAGER)),
    *((NFNET, way) for way in (GRAPHS_NHWC, PLAIN)),
    *((case, way) for case in (WRN, RESNET) for way in (GRAPHS_NHWC, PLAIN)),
    *((SWIN, way) for way in (FUSED, TIMM, COMPILED)),
    *((case, NHWC) for case in (WRN, RESNET, NFNET)),
    *((case, way) for case in (WRN, RESNET) for way in (GRAPHS_ANY, GRAPHS_TUNED, ANY)),
    (VIT, COMPILED),
]


def noise(count: int) -> tuple[TrainingData, list[tuple[Image.Image, int]]]:
    """A training set of random 32 px images, and the same as PIL images with labels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    split = ResidentSet(torch.from_numpy(images), torch.from_numpy(labels), torch.arange(count))
    data = TrainingData(split, None, tuple("0123456789"), "noise", "noise", None)
    return data, [(Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)]


def plain_pictures(folder: str) -> Any:
    """The train split of a folder of parquet files as the Hub has them, as a `datasets.Dataset`."""
    from datasets import load_dataset

    columns = open_source(DataConfig(dataset=folder)).columns
    files = [str(file) for file in sorted(Path(folder).rglob("train-*.parquet"))]
    pictures = load_dataset("parquet", data_files={"train": files}, split="train")
    return pictures.select_columns([columns.image, columns.label])


def resident(folder: str, device_bytes: int) -> TrainingData:
    """That split as train.py has it in memory."""
    return load_training_data(DataConfig(dataset=folder, val_fraction=0.0, data_mode="resident"), device_bytes)


def real(folder: str, device_bytes: int) -> tuple[TrainingData, Any]:
    """That split both ways."""
    return resident(folder, device_bytes), plain_pictures(folder)


def measure(folder: str | None, seconds: float, row: Row, turn: Callable[[], None]) -> tuple[Row, dict[str, Any]]:
    """Fill in a row, or say in it why not; with it the machine."""
    facts: dict[str, Any] = {}
    try:
        accelerator = start(PRECISION)
        peak = device_peak(accelerator.device, PRECISION)
        if folder:
            data = resident(folder, device_bytes(accelerator))
            pictures = plain_pictures(folder) if row.way == PLAIN else None
        else:
            data, pictures = noise(50_000)
        facts = machine.facts("torch", "torchvision", "timm", "accelerate", "pillow") | {
            "cores": CORES,
            "peak": {"flops_per_second": peak.flops_per_second, "source": peak.source},
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "data": data.name,
        }
        fill(Bench(accelerator, data, pictures, peak, seconds, turn), row)
    except Exception as error:  # whatever a compiler, a driver or a lack of memory raises
        memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        row.error = "out of memory" if memory else f"{type(error).__name__}: {first_line(error)}"
    return row, facts


HEADER = (
    "model                         way                                images/s  x plain    MFU   no data"
    "  batch ms    data   busy  peak GiB  ready s"
)


def shown(value: float | None, form: str, width: int = 0) -> str:
    """A number, or a dash where there is none."""
    return f"{'-' if value is None else format(value, form):>{width}}"


def line(row: Row, plain: float | None) -> str:
    """A row of the table."""
    rate, memory = row.images_per_second, row.peak_memory_bytes
    cells = [
        shown(rate, ",.0f", 8),
        shown(rate / plain if rate and plain else None, ".2f", 7),
        shown(row.mfu, ".1%", 5),
        shown(row.no_data_images_per_second, ",.0f", 8),
        shown(None if row.batch_seconds is None else 1e3 * row.batch_seconds, ".2f", 8),
        shown(row.data_share, ".2%", 6),
        shown(row.busy_share, ".0%", 5),
        shown(memory / 2**30 if memory else None, ".1f", 8),
        shown(row.ready_seconds, ".1f", 7),
    ]
    return f"{row.case.model:28}  {row.way.name:33}  {'  '.join(cells)}  {row.error}".rstrip()


def aims(rows: list[Row]) -> list[str]:
    """Each aim beside the best that was measured, a line each."""
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case and row.images_per_second]
        plain = next((row.images_per_second for row in own if row.way == PLAIN), None)
        best = max((row for row in own if row.way != PLAIN), key=lambda row: row.images_per_second or 0.0, default=None)
        rate = best.images_per_second if best else None
        share = best.data_share if best else None
        found = [
            ("images/s", rate, case.images_per_second, ",.0f", 1),
            ("x plain", rate / plain if rate and plain else None, case.times_plain, ".2f", 1),
            ("data share", share, case.data_share, ".2%", -1),
        ]
        for name, value, aim, form, sign in found:
            if aim:
                verdict = "not measured" if value is None else "met" if sign * (value - aim) >= 0 else "MISSED"
                bound = "at least" if sign > 0 else "at most"
                way = f" ({best.way.name})" if best else ""
                lines.append(f"{case.model}: {name} {shown(value, form)}{way}, aim {bound} {aim:{form}}: {verdict}")
    return lines


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of parquet files as on the Hub (default: 50,000 images of noise)")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--seconds-per-row", type=float, default=5.0, help="with the data path, and again without")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no row begins, and none goes on")
    parser.add_argument("--together", type=int, default=3, help="rows that get ready at the same time, on one GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    known = {case.model for case, _ in ROWS}
    if unknown := [name for name in args.models or () if name not in known]:
        parser.error(f"argument --models: no rows of {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return args


def main(words: list[str] | None = None) -> None:
    """Measure row after row, print a table and the aims, write JSON."""
    args = parse(words)
    turns = Turns(partial(measure, args.data, args.seconds_per_row), time.monotonic() + 60 * args.minutes)
    wanted = [Row(case, way) for case, way in ROWS if not args.models or case.model in args.models]
    rows: list[Row] = []
    done: dict[int, Row] = {}
    facts: dict[str, Any] = {}
    print(HEADER, flush=True)
    for number, (row, found_on) in turns.take(wanted, args.together):
        facts, done[number] = facts or found_on, row
        rows = [done[number] for number in sorted(done)]
        plain = (other.images_per_second for other in rows if other.case == row.case and other.way == PLAIN)
        print(line(row, next(plain, None)), flush=True)
        if args.json:
            found = facts | {"rows": [row.as_json() for row in rows], "aims": aims(rows)}
            replace_text(args.json, json.dumps(found, indent=1) + "\n")
    if facts:
        print(f"{facts['hardware']}, {CORES} cores, peak {facts['peak']['flops_per_second'] / 1e12:,.1f} TFLOP/s")
    print(*aims(rows), sep="\n")


if __name__ == "__main__":
    run_main(main)
