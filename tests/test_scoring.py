"""Scoring by several processes: one checkpoint, one set of images, and none that waits for the others for ever."""

import numpy as np
import pytest

from cifar_dist import scoring
from cifar_dist.config import Config
from cifar_dist.data import load_training_data
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from cifar_dist.recovery import checkpoint
from cifar_dist.run_record import open_run
from tests.ranks import Ranks
from tests.test_evaluate import commit_weights, make, weights_of


@pytest.fixture
def two_checkpoints(tmp_path):
    """A run whose best is of step 20, and whose last of step 30 has other weights."""
    folder = make(tmp_path / "run")
    commit_weights(folder, weights_of(open_run(folder).config, seed=1), best=False, step=30)
    return open_run(folder)


def spec(run):
    return scoring.EvalSpec("best", run.config.data, None, None, "none", "fp32", run.folder / "report")


def ranks(work, count=2):
    """Results, or the messages of what was refused, of processes that score."""

    def careful():
        try:
            return work(start("fp32"))
        except UsageError as error:
            return str(error)

    return Ranks(careful, count).check().results


def test_a_checkpoint_that_comes_meanwhile_is_scored_by_no_process(two_checkpoints, monkeypatch):
    run, find, data = two_checkpoints, checkpoint.find, scoring.test_data(two_checkpoints, spec(two_checkpoints))

    def score(accelerator):
        late = accelerator.process_index == 1  # by then there is another best
        monkeypatch.setattr(
            checkpoint, "find", lambda folder, which: find(folder, "last" if late and which == "best" else which)
        )
        scored = scoring.score_test(scoring.load_run(run, spec(run), accelerator), data)
        return scored.about.step, scored.logits

    ((step, alone),) = ranks(lambda accelerator: score(accelerator), count=1)
    assert step == 20
    for step, logits in ranks(score):
        assert step == 20
        np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_a_process_with_other_test_images_is_named(two_checkpoints, monkeypatch):
    def score(accelerator):
        loaded = scoring.load_run(two_checkpoints, spec(two_checkpoints), accelerator)
        data = scoring.test_data(two_checkpoints, spec(two_checkpoints))
        if accelerator.process_index == 1:
            data = scoring.replace(data, fingerprint="another")
        return scoring.score_test(loaded, data)

    for message in ranks(score):
        assert "process 1" in message and "has another test split than process 0" in message


def test_val_that_one_process_lacks_is_scored_by_none(two_checkpoints, monkeypatch):
    load = scoring.load_val_data

    def score(accelerator):
        def missing(config):
            if accelerator.process_index == 1:
                raise UsageError("it is gone.")
            return load(config)

        monkeypatch.setattr(scoring, "load_val_data", missing)
        return scoring.score_val(scoring.load_run(two_checkpoints, spec(two_checkpoints), accelerator))

    assert ranks(score) == [None, None]


def test_val_of_a_run_that_came_to_stream_is_all_that_is_decoded(
    two_checkpoints, monkeypatch, tmp_path, fresh_accelerate
):
    run = two_checkpoints
    streamed = load_training_data(Config.from_flat({"dataset": "digits", "cache_dir": str(tmp_path)}).data, 2**23)
    assert streamed.mode == "stream"
    run.environment["data_mode"] = "stream"
    monkeypatch.setattr("cifar_dist.data.load_resident", lambda *_: pytest.fail("all of train is decoded"))
    scored = scoring.score_val(scoring.load_run(run, spec(run), start("fp32")))
    np.testing.assert_array_equal(scored.ids, streamed.val.ids)
