"""Run folders and the log: what is refused, what is forgotten on resume, what is written."""

import dataclasses
import json
import sys

from cifar_dist.config import Config
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.tracking import Tracker


def config(run_dir, resume="never", **run):
    return dataclasses.replace(
        Config(), run=dataclasses.replace(Config().run, run_dir=str(run_dir), resume=resume, **run)
    )


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def tracker(run_dir, first_step=0):
    settings = config(run_dir, wandb="disabled")
    return Tracker(run_dir, settings, make_plan(settings, Sizes(1280, 0, None, 10, 0, 0, 0, 0), 1), first_step)


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


def test_selecting_on_test_is_said_everywhere(tmp_path, capsys):
    settings = config(tmp_path, wandb="disabled")
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, select_on="test"))
    voice = Tracker(tmp_path, settings, make_plan(settings, Sizes(1280, 0, None, 10, 0, 0, 0, 0), 1), 0)
    voice.evaluation(10, {"loss": 1.0, "top1": 0.5}, best=False)
    voice.close()
    assert records(tmp_path)[0]["selected_on"] == "test"
    assert "TEST (selecting on it)" in capsys.readouterr().out


def test_a_resumed_log_has_each_step_once(tmp_path):
    voice = tracker(tmp_path)
    for step in (10, 20, 30):
        voice.training(step, TRAINING)
    voice.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "trai')  # torn by a kill
    voice = tracker(tmp_path, first_step=20)
    voice.training(30, TRAINING)
    voice.close()
    assert [record["step"] for record in records(tmp_path)] == [10, 20, 30]
