"""Where a run stands, and what it makes of its scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cifar_dist.errors import Diverged

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

    def judge(self, scores: dict[str, float], min_delta: float) -> bool:
        """Take in an epoch's scores of the selecting split, ``top1`` and ``loss``; whether they are the best so far.

        The higher top-1 (a fraction) is better; of equal ones, the lower loss (nats). Early stopping counts
        the epochs in which top-1 has not risen by more than `min_delta` over the last value that did.

        Raises:
            Diverged: the loss is not finite.
        """
        top1, loss = scores["top1"], self._finite_loss(scores)
        if top1 > self.patience_top1 + min_delta:
            self.patience_top1, self.epochs_without_gain = top1, 0
        else:
            self.epochs_without_gain += 1
        if (top1, -loss) <= (self.best_top1, -self.best_loss):
            return False
        self.best_top1, self.best_loss, self.best_step = top1, loss, self.step
        return True

    def glimpse(self, scores: dict[str, float]) -> bool:
        """Take note of scores within an epoch; whether there is nothing better: they count only until an epoch's.

        A run cut within an epoch must go on as if it had not been cut.

        Raises:
            Diverged: the loss is not finite.
        """
        self._finite_loss(scores)
        return self.best_step == 0

    def _finite_loss(self, scores: dict[str, float]) -> float:
        if not math.isfinite(scores["loss"]):
            raise Diverged(
                f"the validation loss is {scores['loss']} after step {self.step}; lower --lr or set --clip-grad."
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

    def out_of_patience(self, patience: int | None) -> bool:
        """Whether early stopping with this patience (epochs) ends the run here."""
        return patience is not None and self.epochs_without_gain >= patience
