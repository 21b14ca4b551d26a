"""What several processes must agree on: bad steps, failures, evaluation, and how little they say to each other."""

import dataclasses
import errno
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cifar_dist.config import OptimConfig
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.stream import StreamSet
from cifar_dist.distributed.group import check_agreement, on_main, shared_buffers, start
from cifar_dist.errors import UsageError
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import checkpoint
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.train_state import TrainState
from cifar_dist.training.batches import Batch
from cifar_dist.training.engine import Evaluator, Meter, Stepper, train_step
from tests.ranks import Ranks
from tests.saving import save
from tests.test_same_training import RECIPE, of, run
from tests.test_train import records
from tests.training.test_engine import INPUT, images


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))


def refused(work):
    """The message with which `work` is refused."""
    with pytest.raises(UsageError) as error:
        work()
    return str(error.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_checkpoint_that_one_process_cannot_write_fails_on_all(tmp_path, monkeypatch, failing):
    def work():
        accelerator, model = start("fp32"), small_model()
        trained = Trained(Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None), None)
        save(tmp_path, trained, TrainState(step=1), best=True)
        save_tensors = checkpoint.save_tensors

        def full(tensors, path):
            if accelerator.process_index == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            save_tensors(tensors, path)

        checkpoint.save_tensors = full
        said = refused(lambda: save(tmp_path, trained, TrainState(step=2), best=True))
        checkpoint.save_tensors = save_tensors
        accelerator.wait_for_everyone()
        checkpoint.load(checkpoint.resume_point(accelerator, tmp_path), trained)
        accelerator.end_training()
        return said, checkpoint.state_of(checkpoint.find(tmp_path, "last")).step

    for said, step in Ranks(work, 2).check().results:
        assert "No space left" in said
        assert step == 1


def test_main_speaks_for_all():
    def work():
        accelerator = start("fp32")

        def refuse():
            raise UsageError("only the main process knows")

        return on_main(accelerator, lambda: accelerator.process_index), refused(lambda: on_main(accelerator, refuse))

    assert Ranks(work, 3).check().results == [(0, "only the main process knows")] * 3


def test_statistics_are_averaged_for_evaluation_and_stay_apart_for_training():
    def work():
        accelerator, norm = start("fp32"), nn.BatchNorm1d(2)
        norm.running_mean += accelerator.process_index
        with shared_buffers(accelerator, norm):
            shared = norm.running_mean.tolist()
        return shared, norm.running_mean.tolist()

    assert Ranks(work, 3).check().results == [([1, 1], [rank, rank]) for rank in range(3)]


def test_a_process_with_other_settings_code_or_data_is_named():
    def work():
        accelerator = start("fp32")
        facts = {"configuration": "a", "set of libraries": "torch 2", "train/val split": "x"}
        check_agreement(accelerator, facts)
        if accelerator.process_index == 2:
            facts["train/val split"] = "y"
        return refused(lambda: check_agreement(accelerator, facts))

    for said in Ranks(work, 3).check().results:
        assert "process 2" in said
        assert "another train/val split than process 0 (y against x)" in said


def test_a_process_whose_code_lacks_a_setting_is_named():
    def work():
        accelerator = start("fp32")
        facts = (
            {"--lr": "1", "--new": "2", "commit": "a"} if accelerator.is_main_process else {"--lr": "1", "commit": "b"}
        )
        return refused(lambda: check_agreement(accelerator, facts))

    for said in Ranks(work, 2).check().results:
        assert "process 1" in said and "another --new than process 0 (None against 2)" in said


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 7])
def test_evaluation_counts_each_sample_once_on_any_number_of_processes(processes):
    data = images(359)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def work():
        accelerator, preprocess = start("fp32"), Preprocess(INPUT, "cpu", torch.float32)
        evaluator = Evaluator(accelerator, preprocess, 16, "fp32")
        return evaluator.scores(model, data), evaluator.logits(model, data).numpy()

    with torch.no_grad():
        logits = model(Preprocess(INPUT, "cpu", torch.float32)(data.images))
    expected = {
        "loss": nn.functional.cross_entropy(logits.double(), data.labels).item(),
        "top1": (logits.argmax(1) == data.labels).double().mean().item(),
    }
    for scores, predicted in Ranks(work, processes).check().results:
        assert scores["top1"] == expected["top1"]
        assert scores["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        np.testing.assert_allclose(predicted, logits.numpy(), rtol=1e-5, atol=1e-5)


def spoiler(what, rank, steps):
    """Spoil rank's last micro-batch in `steps`: its input, or (with sound pixels) its loss."""

    def spoil(step, batch):
        if step not in steps or not batch.last or int(os.environ.get("RANK", "0")) != rank:
            return batch
        if what == "input":
            return dataclasses.replace(batch, images=batch.images * math.nan)
        return dataclasses.replace(batch, weights=batch.weights * math.inf)

    return spoil


SHORT = [*RECIPE, "--epochs", 1, "--warmup-epochs", 0, "--micro-batch-size", 36, "--drop", 0.1, "--resume", "auto"]


@pytest.mark.parametrize(
    "engine, what, rank",
    [("ddp", "input", 1), ("ddp", "loss", 0), ("zero1", "loss", 1), ("zero2", "input", 0), ("zero3", "input", 1)],
)
def test_a_bad_loss_on_one_process_stops_all_with_the_last_good_state(tmp_path, engine, what, rank):
    pytest.importorskip("deepspeed")
    bad, good = tmp_path / "bad", tmp_path / "good"
    found = Ranks(lambda: run(*SHORT, "--run-dir", bad, spoil=spoiler(what, rank, {5})), 2, engine)
    assert found.statuses == [1, 1]
    said = "".join(found.said)
    assert said.count("not finite in step 5 (counted from 0; lr ") == 1
    assert "Traceback" not in said
    note = json.loads((bad / "not-finite-00000005.json").read_text())
    assert len(note["sample_ids"]) == len(set(note["sample_ids"])) == 144
    Ranks(lambda: run(*SHORT, "--run-dir", good, "--max-steps", 5), 2, engine).check()
    for file in ("model", "optimizer", "process-0", "process-1"):
        mine, expected = (load_file(d / "checkpoints" / "last" / f"{file}.safetensors") for d in (bad, good))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in mine)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero3"])
def test_a_bad_batch_can_be_skipped(tmp_path, engine):
    pytest.importorskip("deepspeed")
    settings = [*SHORT, "--on-nan", "skip", "--max-steps", 9, "--run-dir", tmp_path]
    found = Ranks(lambda: run(*settings, spoil=spoiler("input", 1, {3, 5})), 2, engine).check()
    assert found.said[0].count("skipped     the loss or its gradient is not finite in step") == 2
    assert checkpoint.state_of(checkpoint.find(tmp_path, "last")).skipped_steps == 2
    assert [r["step"] for r in records(tmp_path) if "train/loss" in r] == [1, 2, 3, 5, 7, 8, 9]
    assert all(math.isfinite(loss) for loss in of(tmp_path, "train/loss"))
    optimizer = json.loads((tmp_path / "checkpoints" / "last" / "optimizer.json").read_text())
    assert "step" in json.dumps(optimizer)
    steps = {k: v for k, v in load_file(tmp_path / "checkpoints/last/optimizer.safetensors").items() if "step" in k}
    assert {value.item() for value in steps.values()} == {7}


def test_skipping_has_an_end(tmp_path):
    settings = [*SHORT, "--epochs", 2, "--on-nan", "skip", "--run-dir", tmp_path]
    found = Ranks(lambda: run(*settings, spoil=spoiler("loss", 1, range(4, 99))), 2)
    assert found.statuses == [1, 1]
    assert found.said[0].count("skipped     ") == 10
    assert "not finite in step 14" in "".join(found.said)


def test_a_bad_step_leaves_statistics_and_random_streams_as_they_were():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Dropout(0.5), nn.Linear(3072, 10))

    def work():
        parallel = Replicated(start("fp32"), model, make_optimizer(model, OptimConfig()), None)
        pixels, labels, weights = torch.randn(8, 3, 32, 32), torch.arange(8), torch.full((8,), 1 / 8)
        pixels[3, 0, 0, 0] = math.nan
        before = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        _, flags = train_step(Stepper(parallel, 0.0), [Batch(pixels, labels, weights, last=True)])
        assert flags.refused
        assert torch.equal(before[1], torch.get_rng_state())
        return all(torch.equal(before[0][k], v) for k, v in model.state_dict().items())

    assert Ranks(work, 2).check().results == [True, True]


def test_a_bad_gradient_of_a_good_loss_is_seen_on_all_processes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

    def work():
        accelerator = start("fp32")
        if accelerator.process_index == 1:
            model[1].bias.register_hook(lambda gradient: gradient * math.inf)
        parallel = Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None)
        pixels, labels, weights = torch.randn(8, 3, 32, 32), torch.arange(8), torch.full((8,), 1 / 8)
        share, flags = train_step(Stepper(parallel, 0.0), [Batch(pixels, labels, weights, last=True)])
        assert share.isfinite().all()
        return flags.refused

    assert Ranks(work, 2).check().results == [True, True]


def test_a_stop_asked_of_one_process_stops_all_after_the_step(tmp_path):
    def spoil(step, batch):
        if step == 6 and os.environ["RANK"] == "1" and batch.last:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    found = Ranks(lambda: run(*SHORT, "--run-dir", tmp_path / "cut", spoil=spoil), 2).check()
    assert "stopped     by SIGTERM after step 7" in found.said[0]
    assert checkpoint.state_of(checkpoint.find(tmp_path / "cut", "last")).step == 7
    assert (tmp_path / "cut" / "REQUEUE").read_text() == "SIGTERM\n"
    for name in ("cut", "whole"):
        Ranks(lambda name=name: run(*SHORT, "--run-dir", tmp_path / name), 2).check()
    assert not (tmp_path / "cut" / "REQUEUE").exists()
    mine, expected = (load_file(tmp_path / n / "checkpoints/last/model.safetensors") for n in ("cut", "whole"))
    assert all(torch.equal(mine[name], expected[name]) for name in mine)


class HostReads(TorchDispatchMode):
    """Counts the times the host waits for the device: ``item()``, ``bool()`` and the like, and ``tolist()``."""

    def __init__(self):
        super().__init__()
        self.items, self.lists, self.tolist = 0, 0, torch.Tensor.tolist

    def __enter__(self):
        def tolist(tensor):
            self.lists += 1
            return self.tolist(tensor)

        torch.Tensor.tolist = tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self.tolist
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.items += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_says_no_more_than_gradients_and_one_control_reduction(micro_batches):
    """Collectives, counted by the profiler, and numbers fetched by the host."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Linear(3072, 10))  # one bucket of gradients

    def work():
        accelerator = start("fp32")
        parallel = Replicated(accelerator, model, make_optimizer(model, OptimConfig(opt="momentum")), None)
        labels, weights = torch.arange(8), torch.full((8,), 1 / 8 / micro_batches)
        batches = [
            Batch(torch.randn(8, 3, 32, 32), labels, weights, last=n == micro_batches - 1) for n in range(micro_batches)
        ]
        stepper, meter = Stepper(parallel, 0.0), Meter(accelerator, 16)
        for _ in range(2):  # DDP arranges its buckets in the first steps
            meter.add(train_step(stepper, batches)[0])
        with profile(activities=[ProfilerActivity.CPU]) as measured, HostReads() as reads:
            for _ in range(4):
                meter.add(train_step(stepper, batches)[0])
        names = [event.name for event in measured.events() if event.name.startswith("gloo:")]
        return names, reads.items, reads.lists

    for names, items, lists in Ranks(work, 2).check().results:
        assert names == ["gloo:all_reduce"] * 8  # in each of four steps the gradient's and the control's
        assert (items, lists) == (0, 4)  # the control's answer


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_process_whose_stream_breaks_off_stops_all_with_a_checkpoint(tmp_path, engine):
    pytest.importorskip("deepspeed")
    decode, decoded = StreamSet.decode, []

    def breaks_off(self, number, image):
        decoded.append(number)
        if os.environ["RANK"] == "1" and len(decoded) > 4 * 72:
            raise UsageError(f"row {number} cannot be decoded.")
        return decode(self, number, image)

    def work():
        StreamSet.decode = breaks_off
        return run(*SHORT, "--data-mode", "stream", "--val-fraction", 0, "--run-dir", tmp_path)

    found = Ranks(work, 2, engine)
    assert found.statuses == [2, 2]
    assert "cannot be decoded. --skip-corrupt 0 allows no more" in "".join(found.said)
    assert checkpoint.state_of(checkpoint.find(tmp_path, "last")).step == 4
    assert "Traceback" not in "".join(found.said)
