"""One recipe, any number of processes, any engine: the same samples, pixels, learning rates and losses."""

import hashlib
import json
import shlex
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train
from cifar_dist.distributed.ending import run_main
from cifar_dist.training import features
from cifar_dist.training.batches import Batches
from cifar_dist.training.stream_batches import make_batches
from tests.ranks import Ranks

RECIPE = shlex.split(
    "--dataset digits --model test_vit --img-size 32 --wandb disabled --epochs 2 --batch-size 144 --lr 2e-3"
    " --warmup-epochs 1 --clip-grad 1 --layer-decay 0.8 --smoothing 0.1 --cutout 6 --log-every 1 --max-steps 17"
)  # an epoch has 9 steps: 17 are nearly two, and an epoch's last batch is partly filled up


class Recorder:
    """Batches that are looked at, or changed, on their way to the training."""

    def __init__(self, batches, call):
        self.batches, self.call = batches, call

    def __call__(self, step):
        return self.call(step)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def run(*flags, spoil=lambda step, batch: batch):
    """train.py in this process; the step and the sha256 of the pixels and target of each image it saw.

    `spoil(step, batch)` may hand another micro-batch to the training.
    """
    seen = []

    def recorded(*arguments):
        batches: Batches = make_batches(*arguments)
        call = batches.__call__

        def yields(step):
            for batch in call(step):
                for image, target, weight in zip(batch.images, batch.targets, batch.weights, strict=True):
                    if weight > 0:
                        found = hashlib.sha256(image.numpy().tobytes() + target.numpy().tobytes())
                        seen.append((step, found.hexdigest()))
                yield spoil(step, batch)

        return Recorder(batches, yields)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kept, sys.argv, features.make_batches = (sys.argv, features.make_batches), ["train.py", *map(str, flags)], recorded
    try:
        run_main(train.main)
    finally:
        sys.argv, features.make_batches = kept
    return seen


def of(run_dir, key):
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run that all others are compared with: one process, no accumulation."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    return run_dir, run(*RECIPE, "--run-dir", run_dir)


def assert_same(run_dir, seen, one):
    expected_dir, expected = one
    assert sorted(seen) == sorted(expected)  # the same pixels in the same step, each once
    assert len(of(run_dir, "train/loss")) == 17
    np.testing.assert_allclose(of(run_dir, "train/loss"), of(expected_dir, "train/loss"), rtol=1e-5)
    assert of(run_dir, "lr") == of(expected_dir, "lr")
    assert of(run_dir, "val/top1")[-1] == of(expected_dir, "val/top1")[-1]
    assert (
        load_file(run_dir / "checkpoints" / "last" / "model.safetensors").keys()
        == load_file(expected_dir / "checkpoints" / "last" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("processes, micro", [(1, 24), (2, 72), (2, 18), (3, 48)])
def test_processes_and_accumulation_change_nothing(one, tmp_path, processes, micro):
    flags = [*RECIPE, "--micro-batch-size", micro, "--run-dir", tmp_path / "run"]
    found = Ranks(lambda: run(*flags), processes).check().results
    assert_same(tmp_path / "run", [sample for seen in found for sample in seen], one)


def test_a_stream_is_the_same_and_goes_on_with_another_number_of_processes(tmp_path):
    settings = [*RECIPE, "--data-mode", "stream", "--shuffle-window", 200]
    alone = run(*settings, "--run-dir", tmp_path / "one")
    flags, seen = [*settings, "--micro-batch-size", 24, "--run-dir", tmp_path / "many", "--resume", "auto"], []
    for count, steps in ((3, 10), (1, 12), (2, 17)):
        found = Ranks(lambda steps=steps: run(*flags, "--max-steps", steps), count).check()
        seen += [sample for results in found.results for sample in results]
    assert_same(tmp_path / "many", seen, (tmp_path / "one", alone))


AUGMENTED = {
    "mixing-erasing": "--mixup 0.4 --cutmix 1 --mixup-prob 0.8 --reprob 0.3 --remode pixel --flip-mode alternating",
    "rand-jitter": "--aa rand-m9-mstd0.5-inc1 --color-jitter 0.4 --crop-mode reflect",
    "trivial-cutmix": "--aa trivial --cutmix 1",
}


@pytest.mark.parametrize("flags", AUGMENTED.values(), ids=AUGMENTED)
def test_every_augmentation_is_the_same_on_any_number_of_processes(tmp_path, flags):
    """Pixels and targets bit for bit, over an epoch's partly filled last batch too."""
    recipe = [*RECIPE, *flags.split(), "--max-steps", 10]
    expected = run(*recipe, "--run-dir", tmp_path / "one")
    assert len(set(expected)) == len(expected) > 9 * 144
    for processes, micro in ((2, 18), (3, 48)):
        run_dir = tmp_path / f"{processes}-{micro}"
        found = Ranks(lambda m=micro, d=run_dir: run(*recipe, "--micro-batch-size", m, "--run-dir", d), processes)
        seen = [sample for results in found.check().results for sample in results]
        assert sorted(seen) == sorted(expected)
        np.testing.assert_allclose(of(run_dir, "train/loss"), of(tmp_path / "one", "train/loss"), rtol=1e-5)


@pytest.mark.parametrize("engine, micro", [("zero1", 36), ("zero2", 36), ("zero3", 36), ("zero3_offload", 72)])
def test_zero_changes_nothing(one, tmp_path, engine, micro):
    """Cut and resumed on the way."""
    pytest.importorskip("deepspeed")
    flags, seen = [*RECIPE, "--micro-batch-size", micro, "--resume", "auto", "--run-dir", tmp_path], []
    for steps in (10, 17):
        found = Ranks(lambda steps=steps: run(*flags, "--max-steps", steps), 2, engine).check()
        seen += [sample for results in found.results for sample in results]
    assert_same(tmp_path, seen, one)


NORMED = ["--model", "cnn4", "--layer-decay", "none", "--micro-batch-size", 36]


@pytest.mark.parametrize(
    "engine, flags",
    [
        ("ddp", []),
        ("ddp", [*NORMED, "--model-ema-decay", 0.9, "--channels-last"]),  # statistics of each process's own
        ("ddp", [*NORMED, "--sync-bn"]),
        ("zero1", []),
        ("zero1", ["--opt", "adan"]),  # counts its steps in the groups
        ("zero1", ["--opt", "laprop"]),  # keeps another number for each group
        ("zero2", [*NORMED, "--model-ema-decay", 0.9, "--channels-last"]),
        ("zero3", []),
        ("zero3", ["--opt", "momentum", "--momentum", 0, "--freeze", "backbone"]),  # no state at all
    ],
)
def test_a_cut_run_ends_as_the_whole_one_bit_for_bit(tmp_path, engine, flags):
    pytest.importorskip("deepspeed")
    settings = [*RECIPE, "--epochs", 1, "--warmup-epochs", 0, "--resume", "auto", *flags]
    for name, steps in (("whole", 7), ("cut", 4), ("cut", 7)):
        Ranks(lambda n=name, s=steps: run(*settings, "--run-dir", tmp_path / n, "--max-steps", s), 2, engine).check()
    last = [tmp_path / name / "checkpoints" / "last" for name in ("whole", "cut")]
    files = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert {"model.safetensors", "optimizer.safetensors", "process-0.safetensors", "process-1.safetensors"} <= set(
        files
    )
    for file in files:
        whole, cut = (load_file(folder / file) for folder in last)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (last[0] / "optimizer.json").read_text() == (last[1] / "optimizer.json").read_text()


@pytest.mark.parametrize("first, then", [("zero3", "single"), ("ddp", "zero2"), ("zero1", "zero3")])
def test_a_run_goes_on_under_another_engine(one, tmp_path, first, then):
    pytest.importorskip("deepspeed")
    for engine, steps in ((first, 10), (then, 17)):
        flags = [*RECIPE, "--run-dir", tmp_path, "--max-steps", steps, "--resume", "auto"]
        Ranks(lambda flags=flags: run(*flags), 1 if engine == "single" else 2, engine).check()
    np.testing.assert_allclose(of(tmp_path, "train/loss"), of(one[0], "train/loss"), rtol=1e-5)
