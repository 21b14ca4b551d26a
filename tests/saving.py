"""A checkpoint saved and committed at once."""

from cifar_dist.config import RunConfig
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver


def save(run_dir, trained, state, best=False, keep_last=2):
    """Save the training, and return once it is committed."""
    saver = Saver(run_dir, trained.parallel.accelerator, CheckpointTimer(RunConfig()), keep_last)
    saver.save(trained, state, best)
    saver.finish()
