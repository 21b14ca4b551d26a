"""Checkpoints that are written while training goes on: what they hold, when they are there, and how a run ends."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import train
from cifar_dist.config import OptimConfig, RunConfig
from cifar_dist.distributed.group import start
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import checkpoint, checkpoint_timer, saver, store
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.training.engine import Evaluator
from tests.ranks import Ranks

FLAGS = [
    "train.py", "--dataset", "digits", "--model", "cnn4", "--wandb", "disabled", "--epochs", 2, "--batch-size", 240,
    "--log-every", 1, "--resume", "auto",
]  # fmt: skip


@pytest.fixture
def run(monkeypatch, fresh_accelerate):
    """train.py's main, with what it raises."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", [*map(str, FLAGS), *map(str, flags)])
        train.main()

    return call


def committed(run_dir):
    return [stored.step for stored in store.committed(run_dir / "checkpoints")]


def test_every_process_writes_what_it_was_at_the_time(tmp_path):
    """Also its own BatchNorm statistics and random stream, and the average."""

    def work():
        accelerator = start("fp32")
        rank = accelerator.process_index
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        whole = Trained(Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None), ModelEmaV3(model))
        model[1].running_mean.fill_(rank + 1)
        may_write, write = threading.Event(), checkpoint.Contents.write

        def late(*arguments):
            assert may_write.wait(60)
            return write(*arguments)

        checkpoint.Contents.write = late
        keeper = Saver(tmp_path, accelerator, CheckpointTimer(RunConfig()))
        random, average = torch.get_rng_state(), whole.ema.module[0].weight.clone()
        keeper.save(whole, TrainState(step=1))
        with torch.no_grad():
            for tensor in (*model.state_dict().values(), *whole.ema.module.state_dict().values()):
                tensor.zero_()
        torch.rand(3)
        may_write.set()
        keeper.finish()
        folder = checkpoint.find(tmp_path, "last").folder
        own = load_file(folder / f"process-{rank}.safetensors")
        return (
            own["model.1.running_mean"].tolist(),
            load_file(folder / "model.safetensors")["1.running_mean"].tolist(),
            torch.equal(own["random.cpu"], random),
            rank > 0 or torch.equal(load_file(folder / "ema.safetensors")["0.weight"], average),
        )

    found = Ranks(work, 2).check().results
    assert found == [([rank + 1.0] * 4, [1.5] * 4, True, True) for rank in range(2)]


def test_a_checkpoint_is_there_before_the_next_is_due(tmp_path, monkeypatch, run):
    """It is committed between two steps, as soon as it is written, and at the latest before an evaluation."""
    seen = {}
    step, scores = train.train_step, Evaluator.scores

    def looking(*arguments, **settings):
        time.sleep(0.3)  # writing takes less
        seen[len(seen) + 1] = committed(tmp_path / "run")
        return step(*arguments, **settings)

    def evaluating(*arguments, **settings):
        seen["evaluation"] = committed(tmp_path / "run")
        return scores(*arguments, **settings)

    monkeypatch.setattr(train, "train_step", looking)
    monkeypatch.setattr(Evaluator, "scores", evaluating)
    run("--epochs", 1, "--checkpoint-every", 2, "--run-dir", tmp_path / "run")
    assert seen == {1: [], 2: [], 3: [], 4: [2], 5: [2], 6: [4, 2], "evaluation": [4, 2]}


@pytest.mark.parametrize(
    ("where", "error"), [("scores", Diverged), ("scores", RuntimeError), ("train_step", UsageError)]
)
def test_what_was_being_written_when_a_run_fails_is_kept(tmp_path, monkeypatch, run, where, error):
    write = checkpoint.Contents.write

    def slow(*arguments):
        time.sleep(1)
        return write(*arguments)

    calls = []

    def failing(*_, **__):
        raise error("on purpose")

    def failing_later(*arguments, **settings):
        calls.append(0)
        if len(calls) == 6:
            raise error("on purpose")
        return step(*arguments, **settings)

    step = train.train_step
    monkeypatch.setattr(checkpoint.Contents, "write", slow)
    if where == "scores":
        monkeypatch.setattr(Evaluator, "scores", failing)
    else:
        monkeypatch.setattr(train, "train_step", failing_later)
    with pytest.raises(error, match="on purpose"):
        run("--checkpoint-every", 5, "--run-dir", tmp_path / "run")
    assert committed(tmp_path / "run") == [5]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-step-*"))


def test_a_disk_that_fills_up_meanwhile_ends_the_run_and_keeps_the_older_one(tmp_path, monkeypatch, run):
    calls, write = [], checkpoint.Contents.write

    def full(*arguments):
        calls.append(0)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(checkpoint.Contents, "write", full)
    with pytest.raises(
        UsageError, match=r"checkpoint of step 4 could not be saved .*No space left.*older ones are intact"
    ):
        run("--checkpoint-every", 2, "--run-dir", tmp_path / "run")
    assert committed(tmp_path / "run") == [2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-step-*"))


def test_the_time_of_a_save_is_that_of_its_work(tmp_path, monkeypatch, fresh_accelerate):
    """Neither a step nor an evaluation between writing and committing counts."""
    model = nn.Linear(4, 2)
    accelerator = start("fp32")
    whole = Trained(Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None), None)
    now = [100.0]
    monkeypatch.setattr(checkpoint_timer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(saver, "beside", at_once)
    write = checkpoint.Contents.write

    def three_seconds(*arguments):
        now[0] += 3
        return write(*arguments)

    monkeypatch.setattr(checkpoint.Contents, "write", three_seconds)
    took, clock = [], CheckpointTimer(RunConfig(checkpoint_every="10s"))
    monkeypatch.setattr(clock, "save_took", took.append)
    keeper = Saver(tmp_path, accelerator, clock)
    now[0] += 11
    assert clock.wants_save
    keeper.save(whole, TrainState(step=1))
    assert not clock.wants_save
    now[0] += 60
    keeper.finish()
    assert took == [3]
    assert clock.wants_save  # ten seconds after the copy, whatever came between


def at_once(work):
    done = saver.Future()
    done.set_result(work())
    return done


def test_a_process_that_is_still_writing_does_not_keep_the_program(tmp_path):
    """A second Ctrl-C ends it at once: what is written then is of no use."""
    program = "import threading; from cifar_dist.recovery.saver import beside; beside(threading.Event().wait)"
    assert subprocess.run([sys.executable, "-c", program], timeout=180).returncode == 0
