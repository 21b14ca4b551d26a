"""What a run makes of its scores, and how it counts."""

from types import SimpleNamespace

import pytest

from cifar_dist.errors import Diverged
from cifar_dist.recovery.train_state import TrainState

PLAN = SimpleNamespace(steps_per_epoch=10, total_steps=25)


def test_of_equal_accuracies_the_lower_loss_is_best():
    state = TrainState()
    scores = [(0.9, 0.5), (0.9, 0.4), (0.9, 0.45), (0.8, 0.1), (0.91, 0.9)]
    assert [state.judge({"top1": top1, "loss": loss}, 0.0) for top1, loss in scores] == [True, True, False, False, True]


def test_early_stopping_counts_gains_over_the_last_one_that_counted():
    state = TrainState()
    tops = [0.50, 0.5005, 0.5008, 0.502, 0.51, 0.5, 0.5]
    best = [state.judge({"top1": top1, "loss": 1.0}, 0.001) for top1 in tops[:3]]
    assert best == [True, True, True]
    assert state.epochs_without_gain == 2
    assert not state.goes_on(PLAN, 2)
    assert state.goes_on(PLAN, 3)
    assert state.goes_on(PLAN, None)
    state.judge({"top1": tops[3], "loss": 1.0}, 0.001)  # 0.002 above the reference of 0.50
    assert state.epochs_without_gain == 0


def test_ten_batches_in_a_row_may_be_skipped():
    state = TrainState()
    for _ in range(10):
        assert state.may_skip
        state.advance(skipped=True, seconds=1.0)
    assert not state.may_skip
    state.advance(skipped=False, seconds=2.0)
    assert state.may_skip
    assert (state.step, state.skipped_steps, state.skipped_in_a_row, state.seconds) == (11, 10, 0, 2.0)


def test_scores_within_an_epoch_count_until_there_are_an_epochs():
    state = TrainState(step=3)
    assert state.judge({"top1": 0.4, "loss": 1.0}, 0.0, whole_epoch=False)
    assert (state.best_step, state.epochs_without_gain) == (0, 0)
    state.judge({"top1": 0.2, "loss": 2.0}, 0.0)
    assert not state.judge({"top1": 0.9, "loss": 0.1}, 0.0, whole_epoch=False)
    assert state.best_top1 == 0.2
    with pytest.raises(Diverged, match="loss of the evaluation is nan after step 3"):
        state.judge({"top1": 0.1, "loss": float("nan")}, 0.0)


def test_an_evaluation_is_owed_at_the_end_of_an_epoch_and_of_the_run():
    owed = [step for step in range(26) if TrainState(step=step).owes_evaluation(PLAN)]
    assert owed == [10, 20, 25]
    state = TrainState(step=25)
    assert state.goes_on(PLAN, None)
    state.judge({"top1": 0.4, "loss": 1.0}, 0.0, whole_epoch=False)
    assert not state.owes_evaluation(PLAN)
    assert not state.goes_on(PLAN, None)
