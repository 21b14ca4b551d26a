"""What two processes must agree on; started by torchrun from test_train.py with an empty folder."""

import errno
import sys
from pathlib import Path

import torch
from torch import nn

from cifar_dist import checkpoint
from cifar_dist.checkpoint import Trained, TrainState
from cifar_dist.config import OptimConfig
from cifar_dist.distributed import on_main, share_buffers, start
from cifar_dist.errors import UsageError
from cifar_dist.optim import make_optimizer


def refused(work):
    try:
        work()
    except UsageError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main():
    accelerator = start("fp32")
    rank = accelerator.process_index
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    trained = Trained(*accelerator.prepare(model, make_optimizer(model, OptimConfig())), None)
    run_dir, save_tensors = Path(sys.argv[1]), checkpoint.save_tensors
    checkpoint.save(run_dir, accelerator, trained, TrainState(step=1), best=True)

    for failing in (0, 1):  # a disk that is full for one process only

        def full(tensors, path, failing=failing):
            if rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            save_tensors(tensors, path)

        checkpoint.save_tensors = full
        said = refused(lambda: checkpoint.save(run_dir, accelerator, trained, TrainState(step=2), best=True))
        assert "No space left" in said
        accelerator.wait_for_everyone()
        assert checkpoint.read_state(run_dir, "last").step == 1
        checkpoint.save_tensors = save_tensors
    checkpoint.load(run_dir, accelerator, trained)

    def refuse():
        raise UsageError("only the main process knows")

    assert refused(lambda: on_main(accelerator, refuse)) == "only the main process knows"

    norm = nn.BatchNorm1d(2)
    norm.running_mean += rank + 1
    share_buffers(accelerator, norm)
    assert norm.running_mean.tolist() == [1, 1]
    accelerator.wait_for_everyone()
    (run_dir / f"sound-{rank}").touch()  # two processes printing may share a line
    accelerator.end_training()


main()
