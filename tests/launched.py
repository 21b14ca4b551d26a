"""Start, share a number, and note rank, world size and type in a file of the folder given; test_launch.py launches it.

Words after the folder: ``timeout=SECONDS``; ``usage`` or ``crash``, what the last rank does; ``crash0``, the first one.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cifar_dist.distributed.ending import run_main
from cifar_dist.distributed.group import start, total
from cifar_dist.errors import UsageError
from cifar_dist.recovery import stop_request


def main():
    folder, *words = sys.argv[1:]
    timeout = [int(word.removeprefix("timeout=")) for word in words if word.startswith("timeout=")]
    stop_request.listen()  # as train.py does
    accelerator = start("fp32", *timeout)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if "usage" in words and rank == world_size - 1:
        raise UsageError("--lr is wrong on one rank; take another.")
    if ("crash" in words and rank == world_size - 1) or ("crash0" in words and rank == 0):
        raise ZeroDivisionError("on one rank")
    ranks = total(accelerator, torch.tensor([rank + 1.0], dtype=torch.float64, device=accelerator.device))
    note = f"{rank} of {world_size}, {accelerator.distributed_type.name}, sum {ranks[0]:g}"
    (Path(folder) / f"rank-{rank}").write_text(note)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
