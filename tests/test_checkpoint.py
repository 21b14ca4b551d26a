"""Checkpoints: what goes in comes out, and a broken write never becomes visible."""

import errno
import json
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from cifar_dist import checkpoint
from cifar_dist.checkpoint import Trained, TrainState
from cifar_dist.config import OptimConfig
from cifar_dist.errors import UsageError
from cifar_dist.optim import make_optimizer


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def trained(accelerator, seed=0, steps=0):
    """A small model with dropout and batch norm, its optimizer and average, after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 2)
    ).to(memory_format=torch.channels_last)  # fmt: skip
    ema = ModelEmaV3(model, decay=0.5)
    whole = Trained(*accelerator.prepare(model, make_optimizer(model, OptimConfig())), ema)
    advance(whole, accelerator, steps)
    return whole


def advance(whole, accelerator, steps):
    for k in range(steps):
        images = torch.linspace(-1, 1, 75 * (k + 2)).reshape(k + 2, 3, 5, 5)
        whole.model(images).square().sum().backward()
        whole.optimizer.step()
        whole.optimizer.zero_grad()
        whole.ema.update(accelerator.unwrap_model(whole.model))


def everything(whole):
    """All tensors of model, average and optimizer."""
    found = {**whole.model.state_dict(), **{f"ema.{k}": v for k, v in whole.ema.module.state_dict().items()}}
    for index, values in whole.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value for key, value in values.items()}
    return found


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path, accelerator):
    whole = trained(accelerator, steps=4)
    state = TrainState(step=4, best_top1=0.5, best_step=2, patience_top1=0.4, epochs_without_gain=1, seconds=2.5)
    checkpoint.save(tmp_path, accelerator, whole, state, best=True)
    advance(whole, accelerator, 3)
    other = trained(accelerator, seed=1, steps=1)
    assert asdict(checkpoint.load(tmp_path, accelerator, other)) == asdict(state)
    advance(other, accelerator, 3)
    mine, theirs = everything(whole), everything(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_last_and_best_hold_model_safetensors_and_others_are_dropped(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    weights = {}
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        advance(whole, accelerator, 1)
        weights[step] = {k: v.clone() for k, v in whole.model.state_dict().items()}
        checkpoint.save(tmp_path, accelerator, whole, TrainState(step=step), best)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step-00000002", "step-00000004"]
    for which, step in (("last", 4), ("best", 2)):
        from safetensors.torch import load_file

        found = load_file(root / which / "model.safetensors")
        assert all(torch.equal(found[k], weights[step][k]) for k in found)
        assert checkpoint.read_state(tmp_path, which).step == step


def test_the_average_is_what_gets_evaluated(tmp_path, accelerator):
    whole = trained(accelerator, steps=3)
    checkpoint.save(tmp_path, accelerator, whole, TrainState(step=3), best=True)
    found = checkpoint.load_weights(tmp_path, "best")
    assert all(torch.equal(found[k], v) for k, v in whole.ema.module.state_dict().items())


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, accelerator, monkeypatch, failing):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, accelerator, whole, TrainState(step=1), best=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"cifar_dist.checkpoint.{failing}", full)
    with pytest.raises(UsageError, match=r"No space left on device.*older ones are intact"):
        checkpoint.save(tmp_path, accelerator, whole, TrainState(step=2), best=True)
    monkeypatch.undo()
    assert checkpoint.read_state(tmp_path, "last").step == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "last", "step-00000001"]
    assert checkpoint.load(tmp_path, accelerator, whole).step == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng-0.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damage_is_one_clear_line(tmp_path, accelerator, file, damage):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, accelerator, whole, TrainState(step=1), best=True)
    path = tmp_path / "checkpoints" / "last" / file
    path.write_bytes(path.read_bytes()[:20]) if damage == "truncate" else path.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load(tmp_path, accelerator, whole)


def test_a_newer_format_is_refused(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, accelerator, whole, TrainState(step=1), best=True)
    path = tmp_path / "checkpoints" / "last" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UsageError, match="newer version"):
        checkpoint.load(tmp_path, accelerator, whole)


def test_of_equal_accuracies_the_lower_loss_is_best():
    state = TrainState()
    scores = [(0.9, 0.5), (0.9, 0.4), (0.9, 0.45), (0.8, 0.1), (0.91, 0.9)]
    assert [state.judge(top1, loss, 0.0) for top1, loss in scores] == [True, True, False, False, True]


def test_early_stopping_counts_gains_over_the_last_one_that_counted():
    state = TrainState()
    tops = [0.50, 0.5005, 0.5008, 0.502, 0.51, 0.5, 0.5]
    best = [state.judge(top1, loss=1.0, min_delta=0.001) for top1 in tops[:3]]
    assert best == [True, True, True]
    assert state.epochs_without_gain == 2
    assert state.out_of_patience(2)
    assert not state.out_of_patience(3)
    assert not state.out_of_patience(None)
    state.judge(tops[3], 1.0, 0.001)  # 0.002 above the reference of 0.50
    assert state.epochs_without_gain == 0
