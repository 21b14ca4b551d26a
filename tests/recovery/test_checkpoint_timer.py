"""When to save and when to leave, by a clock that the test moves."""

import argparse

import pytest

from cifar_dist.argument_types import duration, seconds_of, steps_or_duration
from cifar_dist.config import RunConfig
from cifar_dist.recovery import checkpoint_timer


@pytest.fixture
def clock(monkeypatch):
    """A list whose only number is the time."""
    now = [1000.0]
    monkeypatch.setattr(checkpoint_timer.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint_timer, "STARTED", 1000.0)
    return now


def test_durations():
    assert [seconds_of(text) for text in ("2h", "90m", "45s", "1h30m", "1h1m1s")] == [7200, 5400, 45, 5400, 3661]
    assert steps_or_duration("500") == 500
    assert steps_or_duration("10m") == "10m"
    for text in ("", "10", "m", "10x", "-5m", "0s"):
        with pytest.raises(argparse.ArgumentTypeError):
            duration(text)
    with pytest.raises(argparse.ArgumentTypeError):
        steps_or_duration("0")


def test_checkpoints_by_steps_and_by_the_clock(clock):
    by_steps = checkpoint_timer.CheckpointTimer(RunConfig(checkpoint_every=3))
    assert [step for step in range(1, 8) if by_steps.saves_at(step)] == [3, 6]
    assert not by_steps.wants_save
    by_clock = checkpoint_timer.CheckpointTimer(RunConfig(checkpoint_every="10m"))
    assert not by_clock.saves_at(3)
    clock[0] += 599
    assert not by_clock.wants_save
    clock[0] += 1
    assert by_clock.wants_save
    by_clock.save_begins()
    clock[0] += 20
    assert not by_clock.wants_save
    clock[0] += 580
    assert by_clock.wants_save


def test_a_run_leaves_in_time_to_save(clock):
    run = checkpoint_timer.CheckpointTimer(RunConfig(time_limit="1h"))
    clock[0] = 1000 + 3600 - 61
    assert run.time_is_up() == ""
    clock[0] = 1000 + 3600 - 59  # no checkpoint was timed yet: a minute
    assert run.time_is_up() == "--time-limit 1h"
    run.save_took(4)
    run.save_took(1)
    with run.step():
        clock[0] += 2
    clock[0] = 1000 + 3600 - 3 * 4 - 2 * 2 - 1
    assert run.time_is_up() == ""
    clock[0] += 2
    assert run.time_is_up() == "--time-limit 1h"
    assert checkpoint_timer.CheckpointTimer(RunConfig()).time_is_up() == ""


def test_a_short_limit_keeps_a_twentieth_until_a_checkpoint_was_timed(clock):
    run = checkpoint_timer.CheckpointTimer(RunConfig(time_limit="10m"))
    clock[0] = 1000 + 600 - 31
    assert run.time_is_up() == ""
    clock[0] += 2
    assert run.time_is_up() == "--time-limit 10m"
