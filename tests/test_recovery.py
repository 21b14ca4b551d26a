"""Short versions of the campaigns in benchmarks/recovery; their results at full length are in benchmarks/results."""

import shutil

import pytest

from benchmarks.recovery import crash_points, damage, endurance, kill_resume, signals, world_sizes

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not there")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Campaigns set a cache of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")


def test_killed_at_any_time_a_run_ends_as_if_nobody_had_touched_it(tmp_path):
    found = kill_resume.run(2, seed=5, folder=tmp_path)
    assert not found["failures"]
    assert found["rows"][0]["kills of all"] + found["rows"][0]["kills of one"] > 0


def test_the_digest_sees_random_streams_that_are_not_put_back(tmp_path):
    found = kill_resume.run(1, seed=2, folder=tmp_path, control=True)
    assert not found["failures"]
    assert found["rows"][0]["other final states"] == found["rows"][0]["went on mid-way"]


@needs_strace
def test_a_process_that_dies_in_a_system_call_of_a_save_leaves_only_sound_checkpoints(tmp_path):
    crash_points.begin(tmp_path)
    assert not crash_points.power_loss(tmp_path)[1]
    rows, failures = crash_points.crash_points(tmp_path, 40, ["fsync", "rename"])
    assert not failures
    assert sum(row["kills"] for row in rows) >= 4


def test_damage_is_noticed_said_and_passed_over(tmp_path):
    assert not damage.run(20, seed=0, folder=tmp_path)["failures"]


def test_signals_in_every_phase(tmp_path):
    assert not signals.run(2, seed=3, folder=tmp_path)["failures"]


def test_other_numbers_of_processes_see_the_same_samples(tmp_path):
    assert not world_sizes.run(1, seed=0, folder=tmp_path)["failures"]


def test_saves_leave_no_descriptors_threads_or_memory_behind(tmp_path):
    found = endurance.run(60, seed=0, folder=tmp_path, pairs=0)
    assert len(found["rows"]) == 2
    assert not [failure for failure in found["failures"] if "skipping" not in failure]  # that one is timed
