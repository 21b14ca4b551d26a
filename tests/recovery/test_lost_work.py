"""What interruptions cost, as far as a heartbeat tells."""

import json
import shutil

from cifar_dist.recovery.lost_work import Heartbeat, lost_work
from cifar_dist.recovery.train_state import TrainState
from tests.ranks import Ranks
from tests.test_same_training import RECIPE, run


def test_what_is_between_checkpoint_and_heartbeat_is_done_again(tmp_path):
    Heartbeat(tmp_path, writes=True).beat(TrainState(step=20, seconds=50.25))
    lost = lost_work(tmp_path, TrainState(step=12, seconds=30.0))
    assert lost == {"resumed_at_step": 12, "steps_redone": 8, "seconds_lost": 20.2}
    assert lost_work(tmp_path, TrainState(step=21, seconds=51.0))["steps_redone"] == 0


def test_a_heartbeat_is_no_more_than_one_a_second_and_of_one_process(tmp_path):
    heart = Heartbeat(tmp_path, writes=True)
    for step in (1, 2, 3):
        heart.beat(TrainState(step=step))
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 1
    heart.beat(TrainState(step=4), last=True)
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 4
    (tmp_path / "progress.json").unlink()
    Heartbeat(tmp_path, writes=False).beat(TrainState(step=4))
    assert not (tmp_path / "progress.json").exists()


def test_the_log_may_know_more_than_the_heartbeat(tmp_path):
    Heartbeat(tmp_path, writes=True).beat(TrainState(step=20, seconds=5.0))
    records = [{"step": 22, "seconds": 5.5, "train/loss": 1.0}, {"step": 23, "val/top1": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 2')
    lost = lost_work(tmp_path, TrainState(step=20, seconds=5.0))
    assert lost == {"resumed_at_step": 20, "steps_redone": 3, "seconds_lost": 0.5}


def test_no_heartbeat_or_a_torn_one_counts_nothing(tmp_path):
    for text in (None, "{", "[]", '{"step": "x", "seconds": 1}'):
        if text is not None:
            (tmp_path / "progress.json").write_text(text)
        assert lost_work(tmp_path, TrainState(step=3))["steps_redone"] == 0


def test_a_run_accounts_for_what_it_does_twice(tmp_path):
    flags = [*RECIPE, "--epochs", 1, "--warmup-epochs", 0, "--resume", "auto", "--run-dir", tmp_path]
    Ranks(lambda: run(*flags, "--max-steps", 4), 1).check()
    (tmp_path / "progress.json").write_text(json.dumps({"step": 9, "seconds": 1e6}))
    said = Ranks(lambda: run(*flags, "--max-steps", 6), 1).check().said[0]
    assert "resumed     at step 4 of 6; 5 steps, " in said
    said = Ranks(lambda: run(*flags, "--max-steps", 6), 1).check().said[0]
    assert "finished    at step 6 of 6: nothing is left to train" in said and "report      python evaluate.py" in said
    restart = json.loads((tmp_path / "environment.json").read_text())["restarts"][0]
    assert (restart["resumed_at_step"], restart["steps_redone"]) == (4, 5)


def test_a_run_that_was_killed_before_its_first_checkpoint_accounts_for_that_too(tmp_path):
    flags = [*RECIPE, "--epochs", 1, "--warmup-epochs", 0, "--resume", "auto", "--run-dir", tmp_path]
    assert "resumed" not in Ranks(lambda: run(*flags, "--max-steps", 4), 1).check().said[0]
    shutil.rmtree(tmp_path / "checkpoints")
    assert "resumed     at step 0 of 4; 4 steps, " in Ranks(lambda: run(*flags, "--max-steps", 4), 1).check().said[0]
    [restart] = json.loads((tmp_path / "environment.json").read_text())["restarts"]
    assert (restart["resumed_at_step"], restart["steps_redone"]) == (0, 4)
