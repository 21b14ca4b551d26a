"""Where a run stands, and what it makes of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cifar_dist.errors import Diverged
from cifar_dist.plan import Plan

SKIPS_IN_A_ROW = 10


@dataclass
class TrainState:
    """Where a run stands. The data position is `step` alone: order is a function of it."""

    step: int = 0
    best_top1: float = -1.0
    best_loss: float = float("inf")
    best_step: int = 0
    patience_top1: float = -1.0
    epochs_without_gain: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    judged_step: int = -1

    def judge(self, scores: dict[str, float], min_delta: float, whole_epoch: bool = True) -> bool:
        """Take in scores of the selecting split, ``top1`` and ``loss``; whether they are the best so far.

        The higher top-1 (a fraction) is better; of equal ones, the lower loss (nats). Early stopping counts
        the epochs in which top-1 has not risen by more than `min_delta` over the last value that did.
        Scores within an epoch, where a run was cut, count only until there is an epoch's: the run must go on as if it
        had not been cut.

        Raises:
            Diverged: the loss is not finite.
        """
        top1, loss = scores["top1"], self._finite_loss(scores)
        self.judged_step = self.step
        if not whole_epoch:
            return self.best_step == 0
        if top1 > self.patience_top1 + min_delta:
            self.patience_top1, self.epochs_without_gain = top1, 0
        else:
            self.epochs_without_gain += 1
        if (top1, -loss) <= (self.best_top1, -self.best_loss):
            return False
        self.best_top1, self.best_loss, self.best_step = top1, loss, self.step
        return True

    def _finite_loss(self, scores: dict[str, float]) -> float:
        if not math.isfinite(scores["loss"]):
            raise Diverged(
                f"the loss of the evaluation is {scores['loss']} after step {self.step}; start anew with a lower"
                " --lr or --clip-grad."
            )
        return scores["loss"]

    def advance(self, skipped: bool, seconds: float) -> None:
        """Count a step, made or skipped, after `seconds` of training in all."""
        self.step += 1
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.seconds = seconds

    @property
    def may_skip(self) -> bool:
        """Whether one more batch may be skipped."""
        return self.skipped_in_a_row < SKIPS_IN_A_ROW

    def owes_evaluation(self, plan: Plan) -> bool:
        """Whether an epoch, or the run, ends here and has not been evaluated yet."""
        ends = self.step == plan.total_steps or (self.step % plan.steps_per_epoch == 0 and self.step > 0)
        return ends and self.judged_step != self.step

    def goes_on(self, plan: Plan, patience: int | None) -> bool:
        """Whether there is something left to do."""
        return self.owes_evaluation(plan) or (self.step < plan.total_steps and not self.is_out_of_patience(patience))

    def is_out_of_patience(self, patience: int | None) -> bool:
        """Whether early stopping ends the run: after `patience` epochs without a gain, or never if that is None."""
        return patience is not None and self.epochs_without_gain >= patience
