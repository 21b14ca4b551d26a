"""Checkpoints: what goes in comes out, and a broken write never becomes visible."""

import errno
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from accelerate import Accelerator
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from cifar_dist import checkpoint
from cifar_dist.checkpoint import Trained
from cifar_dist.config import OptimConfig
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.train_state import TrainState


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
    whole = Trained(Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None), ema)
    advance(whole, accelerator, steps)
    return whole


def advance(whole, accelerator, steps):
    for k in range(steps):
        images = torch.linspace(-1, 1, 75 * (k + 2)).reshape(k + 2, 3, 5, 5)
        whole.parallel.model(images).square().sum().backward()
        whole.parallel.optimizer.step()
        whole.parallel.optimizer.zero_grad()
        whole.ema.update(accelerator.unwrap_model(whole.parallel.model))


def everything(whole):
    """All tensors of model, average and optimizer."""
    found = {**whole.parallel.model.state_dict(), **{f"ema.{k}": v for k, v in whole.ema.module.state_dict().items()}}
    for index, values in whole.parallel.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value for key, value in values.items()}
    return found


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path, accelerator):
    whole = trained(accelerator, steps=4)
    state = TrainState(step=4, best_top1=0.5, best_step=2, patience_top1=0.4, epochs_without_gain=1, seconds=2.5)
    checkpoint.save(tmp_path, whole, state, best=True)
    advance(whole, accelerator, 3)
    other = trained(accelerator, seed=1, steps=1)
    checkpoint.load(tmp_path, other)
    assert asdict(checkpoint.read_state(tmp_path, "last")) == asdict(state)
    advance(other, accelerator, 3)
    mine, theirs = everything(whole), everything(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_last_and_best_hold_model_safetensors_and_others_are_dropped(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    weights = {}
    for step, best in ((1, True), (2, True), (3, False), (4, False)):
        advance(whole, accelerator, 1)
        weights[step] = {k: v.clone() for k, v in whole.parallel.model.state_dict().items()}
        checkpoint.save(tmp_path, whole, TrainState(step=step), best)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step-00000002", "step-00000004"]
    for which, step in (("last", 4), ("best", 2)):
        from safetensors.torch import load_file

        found = load_file(root / which / "model.safetensors")
        assert all(torch.equal(found[k], weights[step][k]) for k in found)
        assert checkpoint.read_state(tmp_path, which).step == step


def test_the_average_is_what_gets_evaluated(tmp_path, accelerator):
    whole = trained(accelerator, steps=3)
    checkpoint.save(tmp_path, whole, TrainState(step=3), best=True)
    found = checkpoint.load_weights(tmp_path, "best")
    assert all(torch.equal(found[k], v) for k, v in whole.ema.module.state_dict().items())


@pytest.mark.parametrize("failing", ["durable.save_file", "durable.os.fsync", "checkpoint.os.replace"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, accelerator, monkeypatch, failing):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"cifar_dist.{failing}", full)
    with pytest.raises(UsageError, match=r"No space left on device.*older ones are intact"):
        checkpoint.save(tmp_path, whole, TrainState(step=2), best=True)
    monkeypatch.undo()
    assert checkpoint.read_state(tmp_path, "last").step == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "last", "step-00000001"]
    checkpoint.load(tmp_path, whole)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "process-0.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damage_is_one_clear_line(tmp_path, accelerator, file, damage):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)
    path = tmp_path / "checkpoints" / "last" / file
    path.write_bytes(path.read_bytes()[:20]) if damage == "truncate" else path.unlink()
    assert checkpoint.exists(tmp_path)  # else a resume would start afresh and drop what is left
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.load(tmp_path, whole)


def test_a_dangling_link_is_damage_and_no_fresh_start(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    assert checkpoint.exists(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        checkpoint.read_state(tmp_path, "last")


def test_weights_that_are_not_finite_are_never_saved(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)
    with torch.no_grad():
        whole.parallel.model[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="not finite after step 2"):
        checkpoint.save(tmp_path, whole, TrainState(step=2), best=True)
    assert checkpoint.read_state(tmp_path, "last").step == 1


SAVABLE = [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "adahessian"))]


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("opt", SAVABLE)
def test_every_optimizer_of_timm_goes_on_exactly(tmp_path, accelerator, opt):
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        optimizer = make_optimizer(model, OptimConfig(opt=opt, lr=1e-3))
        runs.append(Trained(Replicated(accelerator, model, optimizer, None), None))

    def step(run):
        torch.manual_seed(9)
        run.parallel.model(torch.ones(3, 6)).square().sum().backward()
        run.parallel.optimizer.step()
        run.parallel.optimizer.zero_grad()

    step(runs[0])
    checkpoint.save(tmp_path, runs[0], TrainState(step=1), best=True)
    checkpoint.load(tmp_path, runs[1])
    for run in runs:
        step(run)
    for mine, other in zip(*(run.parallel.module.parameters() for run in runs), strict=True):
        assert torch.equal(mine, other)


def test_moments_keep_their_parameters_memory_layout(tmp_path, accelerator):
    whole = trained(accelerator, steps=2)
    checkpoint.save(tmp_path, whole, TrainState(step=2), best=True)
    other = trained(accelerator, seed=1)
    checkpoint.load(tmp_path, other)
    weight = other.parallel.model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.parallel.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_another_format_is_refused(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)
    path = tmp_path / "checkpoints" / "last" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UsageError, match="has format 99, this version of cifar-dist reads 2"):
        checkpoint.load(tmp_path, whole)


def test_a_folder_that_no_link_names_yet_is_written_again(tmp_path, accelerator):
    """What a kill between the rename and the links leaves behind; the run comes to that step once more."""
    whole = trained(accelerator, steps=1)
    checkpoint.save(tmp_path, whole, TrainState(step=1), best=True)
    (tmp_path / "checkpoints" / "step-00000002").mkdir()
    checkpoint.save(tmp_path, whole, TrainState(step=2), best=False)
    assert checkpoint.read_state(tmp_path, "last").step == 2
    checkpoint.load(tmp_path, whole)
