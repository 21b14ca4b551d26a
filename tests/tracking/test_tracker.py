"""Run folders and the log: what is refused, what is forgotten on resume, what is written."""

import dataclasses
import errno
import json
import sys
import threading
from pathlib import Path

import pytest

from cifar_dist.config import Config
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.tracking import wandb_run
from cifar_dist.tracking.tracker import Tracker
from tests.tracking.test_wandb_run import FULL_DISK, Fake


def config(run_dir, resume="never", **run):
    return dataclasses.replace(
        Config(), run=dataclasses.replace(Config().run, run_dir=str(run_dir), resume=resume, **run)
    )


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def tracker(run_dir, first_step=0, judged_step=0, settings=None, wandb="disabled"):
    settings = settings or config(run_dir, wandb=wandb)
    plan = make_plan(settings, Sizes(1280, 0, None, 10, 0, 0, 0, 0), 1)
    return Tracker(run_dir, settings, plan, first_step, judged_step)


TRAINING = {"train/loss": 1.5, "train/top1": 0.5, "images_per_second": 100.0, "lr": 0.1, "seconds": 1.0}


def test_log_and_console(tmp_path, capsys):
    voice = tracker(tmp_path)
    voice.training(5, TRAINING)
    voice.evaluation(10, {"loss": 1.25, "top1": 0.625}, best=True)
    voice.close()
    assert records(tmp_path) == [
        {"step": 5, "epoch": 0.5, **TRAINING},
        {"step": 10, "epoch": 1.0, "val/loss": 1.25, "val/top1": 0.625},
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert "step 5/100  loss 1.5000  acc 50.00%  lr 0.1  images/s 100  left " in first
    assert second.endswith("val loss 1.2500  val acc 62.50%  best so far")


def test_a_terminal_gets_a_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    voice = tracker(tmp_path)
    voice.advance(5)
    voice.training(5, TRAINING)
    voice.close()
    shown = capsys.readouterr().err
    assert "5/100" in shown
    assert "loss=1.5000, acc=50.00%, lr=0.1, images/s=100" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_that_goes_on_is_timed_from_where_it_does(tmp_path, capsys, monkeypatch, terminal):
    """Steps 21 to 30 of 100 have taken 5 s: 35 s are left."""
    now = [1000.0]
    monkeypatch.setattr("cifar_dist.tracking.tracker.time.perf_counter", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    voice = tracker(tmp_path, first_step=20)
    now[0] += 5
    voice.advance(30)
    voice.training(30, TRAINING)
    voice.close()
    said = capsys.readouterr()
    if terminal:
        assert "20/100" in said.err and "30/100" in said.err
    else:
        assert said.out.endswith("left 0:00:35\n")


def test_selecting_on_test_is_said_everywhere(tmp_path, capsys):
    settings = config(tmp_path, wandb="disabled")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, select_on="test"))
    voice = tracker(tmp_path, settings=settings)
    voice.evaluation(10, {"loss": 1.0, "top1": 0.5}, best=False)
    voice.close()
    assert records(tmp_path)[0]["selected_on"] == "test"
    assert "TEST (selecting on it)" in capsys.readouterr().out


def test_a_resumed_log_has_each_step_once(tmp_path):
    voice = tracker(tmp_path)
    for step in (10, 20, 30):
        voice.training(step, TRAINING)
    voice.close()
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n12\n{"step": 40, "trai')  # torn by a kill, or a power cut
    voice = tracker(tmp_path, first_step=20)
    voice.training(30, TRAINING)
    voice.close()
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize("judged, evaluations", [(10, [10]), (20, [10, 20])])
def test_an_evaluation_that_a_resumed_run_owes_is_logged_once(tmp_path, judged, evaluations):
    """Logged at an epoch's end, it is in no checkpoint if the run was killed before the next one was there."""
    voice = tracker(tmp_path)
    for step in (10, 20):
        voice.training(step, TRAINING)
        voice.evaluation(step, {"loss": 1.0, "top1": 0.5}, best=True)
    voice.close()
    tracker(tmp_path, first_step=20, judged_step=judged).close()
    assert [record["step"] for record in records(tmp_path) if "val/loss" in record] == evaluations
    assert [record["step"] for record in records(tmp_path) if "lr" in record] == [10, 20]


def written(run_dir, wandb, before_closing=lambda: None):
    """The bytes of log.jsonl after the same records."""
    run_dir.mkdir()
    voice = tracker(run_dir, wandb=wandb)
    for step in range(1, 21):
        voice.training(step, {**TRAINING, "train/loss": 1 / step})
    voice.evaluation(20, {"loss": 1.25, "top1": 0.625}, best=True)
    before_closing()
    voice.close()
    return (run_dir / "log.jsonl").read_bytes()


@pytest.mark.parametrize("call", ["login", "init", "log", "finish"])
@pytest.mark.parametrize("fault", [RuntimeError("out of order"), FULL_DISK, None], ids=["raises", "disk full", "hangs"])
def test_the_log_is_the_same_whatever_becomes_of_w_and_b(call, fault, tmp_path, monkeypatch, capsys):
    expected = written(tmp_path / "without", "disabled")
    assert expected.count(b"\n") == 21
    goes_on = threading.Event()
    module = Fake(**{call: fault or goes_on})
    monkeypatch.setitem(sys.modules, "wandb", module)
    if fault is None:
        monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 0.3)
    mode = "online" if call == "login" else "offline"
    found = written(tmp_path / "with", mode, lambda: module.wait_for("log" if call == "finish" else call))
    assert found == expected
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join()
    said = capsys.readouterr()
    kept_offline = call == "login" and fault is not None
    assert said.err.count("warning: ") == 1
    assert said.out.count("wandb       kept offline") == (1 if kept_offline or call in ("log", "finish") else 0)


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    voice = tracker(tmp_path)
    voice.training(5, TRAINING)
    voice._file.close()
    voice._file = Path("/dev/full").open("w")  # noqa: SIM115  closing it is what the tracker does
    with pytest.raises(OSError) as caught:
        voice.training(10, TRAINING)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"
    with pytest.raises(OSError):  # what could not be written is not forgotten in closing
        voice.close()
