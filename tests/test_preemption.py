"""Asked to stop at any moment, a run ends with a checkpoint, leaves word, and goes on as if nothing had been."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
from cifar_dist.data.stream import StreamSet
from cifar_dist.recovery import checkpoint, saver
from cifar_dist.recovery.stop_request import SIGNALS, StopRequest, unheard_by_children
from cifar_dist.training.engine import Evaluator
from cifar_dist.training.stream_batches import StreamBatches
from tests.conftest import ROOT
from tests.ranks import Ranks
from tests.test_same_training import run
from tests.test_train import assert_same_state, records

SHORT = [
    "--dataset", "digits", "--data-size", 16, "--model", "cnn4", "--img-size", 16, "--wandb", "disabled",
    "--epochs", 2, "--batch-size", 240, "--mixup", 0.2, "--log-every", 1, "--resume", "auto",
]  # fmt: skip
STEPS_PER_EPOCH = 6


def step_of(run_dir):
    return checkpoint.find(run_dir, "last").step


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, tmp_path_factory):
    """The number of processes, and their uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    Ranks(lambda: run(*SHORT, "--run-dir", folder), request.param).check()
    return request.param, folder


def cut(folder, processes, place, number, rank):
    """A run in which process `rank` gets signal `number` when it comes to `place` for the third time."""

    def work():
        owner, name = place
        original, calls = getattr(owner, name), []

        def signalled(*arguments, **settings):
            calls.append(0)
            if len(calls) == 3 and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), number)
            return original(*arguments, **settings)

        setattr(owner, name, signalled)
        return run(*SHORT, "--checkpoint-every", 1, "--run-dir", folder)

    return Ranks(work, processes)


PLACES = {
    "step": (train, "train_step"),
    "save": (saver.Saver, "save"),
    "write": (checkpoint.Contents, "write"),
    "rename": (checkpoint.store, "commit"),
    "forward": (torch.nn.functional, "cross_entropy"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_anywhere_in_a_step_ends_in_a_checkpoint_of_it(whole, tmp_path, place):
    processes, expected = whole
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # in turn: they are noted alike, wherever they come
    number = numbers[(list(PLACES).index(place) + processes) % 3]
    rank = 0 if place == "rename" else processes - 1
    found = cut(tmp_path / "run", processes, PLACES[place], number, rank)
    assert found.statuses == [0] * processes, found.said
    assert (tmp_path / "run" / "REQUEUE").read_text() == f"{number.name}\n"
    # What comes after a step is seen in the next one; a checkpoint is written and named while that one runs.
    expected_steps = {"step": {3}, "forward": {3}, "save": {4}, "write": {4, 5}, "rename": {5}}
    assert step_of(tmp_path / "run") in expected_steps[place]
    Ranks(lambda: run(*SHORT, "--run-dir", tmp_path / "run"), processes).check()
    assert not (tmp_path / "run" / "REQUEUE").exists()
    assert_same_state(tmp_path / "run", expected)
    assert [r["train/loss"] for r in records(tmp_path / "run") if "train/loss" in r] == [
        r["train/loss"] for r in records(expected) if "train/loss" in r
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_run_whose_output_nobody_reads_any_more_ends_in_a_checkpoint(tmp_path, number):
    """As after Ctrl-C with ``| tee``, which dies of it too, or when a terminal is closed."""

    def work():
        step, calls = train.train_step, []

        def cut_off(*arguments):
            calls.append(0)
            if len(calls) == 3:
                reads, writes = os.pipe()
                os.close(reads)
                os.dup2(writes, 1)
                os.dup2(writes, 2)
                os.kill(os.getpid(), number)
            return step(*arguments)

        train.train_step = cut_off
        return run(*SHORT, "--run-dir", tmp_path / "run")

    assert Ranks(work, 1).statuses == [0]
    assert (tmp_path / "run" / "REQUEUE").read_text() == f"{number.name}\n"
    assert step_of(tmp_path / "run") == 3


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path):
    code = (
        "import os, signal; from cifar_dist.recovery import stop_request; from cifar_dist.study.runner import Signals;"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); stop_request.listen(); os.kill(os.getpid(), signal.SIGHUP);"
        "assert not stop_request.StopRequest().reason; study = Signals(); study.listen();"
        "os.kill(os.getpid(), signal.SIGHUP); assert not study.first"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_reason_to_stop_is_the_first_one_that_was_given():
    """A time limit's reserve shrinks once a checkpoint has been timed."""
    told = iter(["", "--time-limit 4h", ""])
    request = StopRequest(lambda: next(told))
    assert [request.reason for _ in range(3)] == ["", "--time-limit 4h", "--time-limit 4h"]


def test_an_evaluation_is_broken_off_and_made_up_for(whole, tmp_path):
    processes, expected = whole

    def work():
        scores = Evaluator.scores

        def signalled(*arguments, **settings):
            if os.environ["RANK"] == str(processes - 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return scores(*arguments, **settings)

        Evaluator.scores = signalled
        return run(*SHORT, "--run-dir", tmp_path / "run")

    Ranks(work, processes).check()
    assert step_of(tmp_path / "run") == STEPS_PER_EPOCH
    assert not any("val/top1" in record for record in records(tmp_path / "run"))
    Ranks(lambda: run(*SHORT, "--run-dir", tmp_path / "run"), processes).check()
    assert [r for r in records(tmp_path / "run") if "val/top1" in r] == [
        r for r in records(expected) if "val/top1" in r
    ]
    assert_same_state(tmp_path / "run", expected)


def test_a_stream_that_hangs_is_not_waited_for_by_a_run_that_is_to_stop(tmp_path):
    flags = [*SHORT, "--data-mode", "stream"]
    Ranks(lambda: run(*flags, "--run-dir", tmp_path / "whole"), 2).check()

    def work():
        read, wait, waits = StreamSet.read, StreamBatches._wait, threading.Event()

        def hangs(self, wanted, seed, epoch, stop=None):
            if epoch == 1 and os.environ["RANK"] == "1":
                waits.wait()
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait()
            yield from read(self, wanted, seed, epoch, stop)

        def noted(self):
            if self._next > STEPS_PER_EPOCH:
                waits.set()
            return wait(self)

        StreamSet.read, StreamBatches._wait = hangs, noted
        return run(*flags, "--run-dir", tmp_path / "run")

    found = Ranks(work, 2).check()
    assert "stopping    without a step whose data do not come" in found.said[0]
    assert (tmp_path / "run" / "REQUEUE").read_text() == "SIGTERM\n"
    assert step_of(tmp_path / "run") == STEPS_PER_EPOCH
    Ranks(lambda: run(*flags, "--run-dir", tmp_path / "run"), 2).check()
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_a_time_limit_ends_a_run_with_a_checkpoint(tmp_path):
    flags = [*SHORT, "--epochs", 500, "--run-dir", tmp_path, "--time-limit", "8s"]
    began = time.monotonic()
    found = Ranks(lambda: run(*flags), 1).check()
    assert time.monotonic() - began < 60
    assert "stopped     by --time-limit 8s after step" in found.said[0]
    assert (tmp_path / "REQUEUE").read_text() == "--time-limit 8s\n"
    assert step_of(tmp_path) > 0


@pytest.mark.parametrize("delay", [0.2, 2.0])
def test_a_signal_while_libraries_are_imported_is_not_lost(tmp_path, delay):
    """The real program: the handler comes before the imports."""
    command = [sys.executable, "train.py", *map(str, SHORT), "--run-dir", str(tmp_path / "run")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(delay)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0, said
    assert "SIGTERM: stops after this step, with a checkpoint" in said
    assert step_of(tmp_path / "run") == 1
    assert (tmp_path / "run" / "REQUEUE").exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_an_interrupt_after_a_request_stops_at_once(tmp_path, first):
    def work():
        step = train.train_step

        def interrupted(*arguments):
            for number in (first, signal.SIGINT):
                os.kill(os.getpid(), number)
            return step(*arguments)

        train.train_step = interrupted
        return run(*SHORT, "--run-dir", tmp_path)

    found = Ranks(work, 1)
    assert found.statuses == [1]
    assert "interrupted" in found.said[0]
    assert not checkpoint.exists(tmp_path)


DROPS = [*SHORT, "--model", "test_vit", "--img-size", 32, "--drop", 0.3, "--drop-path", 0.2, "--epochs", 1]


def test_random_streams_go_on_where_they_were(tmp_path):
    """Of each process its own."""
    for name, steps in (("whole", 5), ("cut", 2), ("cut", 5)):
        flags = [*DROPS, "--max-steps", steps, "--run-dir", tmp_path / name]
        Ranks(lambda flags=flags: run(*flags), 2).check()
    assert_same_state(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_learning_rates_are_the_closed_form(tmp_path, processes):
    """Loshchilov and Hutter's cosine, over two epochs of six steps, cut on the way."""
    for steps in (5, 12):
        flags = [*SHORT, "--lr", 1e-3, "--max-steps", steps, "--run-dir", tmp_path]
        Ranks(lambda flags=flags: run(*flags), processes).check()
    found = [record["lr"] for record in records(tmp_path) if "lr" in record]
    assert found == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)])


def test_a_failed_run_asks_for_no_requeue(tmp_path):
    def spoil(step, batch):
        if step == 3:
            batch.images[0] = math.nan
        return batch

    found = Ranks(lambda: run(*SHORT, "--run-dir", tmp_path, spoil=spoil), 1)
    assert found.statuses == [1]
    assert step_of(tmp_path) == 3
    assert not (tmp_path / "REQUEUE").exists()


def test_a_helper_does_not_hear_what_asks_the_training_to_stop():
    """As the compiler's are started; SLURM and a closed terminal signal every process."""
    with unheard_by_children():
        helper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(SIGNALS)
    for number in SIGNALS:
        helper.send_signal(number)
    assert helper.communicate(b"still here", timeout=60)[0] == b"still here"
    assert helper.returncode == 0
