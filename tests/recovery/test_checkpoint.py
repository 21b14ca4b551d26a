"""Checkpoints: what goes in comes out, and a broken write never becomes visible."""

import errno
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from cifar_dist import optim
from cifar_dist.config import OptimConfig
from cifar_dist.errors import Diverged, UsageError
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import checkpoint
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.train_state import TrainState
from tests.saving import save


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


def resume(run_dir, whole):
    """Put back the newest sound checkpoint."""
    return checkpoint.load(checkpoint.resume_point(whole.parallel.accelerator, run_dir), whole)


def everything(whole):
    """All tensors of model, average and optimizer."""
    found = {**whole.parallel.model.state_dict(), **{f"ema.{k}": v for k, v in whole.ema.module.state_dict().items()}}
    for index, values in whole.parallel.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{key}": value for key, value in values.items()}
    return found


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path, accelerator):
    whole = trained(accelerator, steps=4)
    state = TrainState(step=4, best_top1=0.5, best_step=2, patience_top1=0.4, epochs_without_gain=1, seconds=2.5)
    save(tmp_path, whole, state, best=True)
    advance(whole, accelerator, 3)
    other = trained(accelerator, seed=1, steps=1)
    resume(tmp_path, other)
    assert asdict(checkpoint.state_of(checkpoint.find(tmp_path, "last"))) == asdict(state)
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
        save(tmp_path, whole, TrainState(step=step), best, keep_last=1)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["best", "last", "step-00000002", "step-00000004"]
    for which, step in (("last", 4), ("best", 2)):
        from safetensors.torch import load_file

        found = load_file(root / which / "model.safetensors")
        assert all(torch.equal(found[k], weights[step][k]) for k in found)
        assert checkpoint.state_of(checkpoint.find(tmp_path, which)).step == step


def test_the_average_is_what_gets_evaluated(tmp_path, accelerator):
    whole = trained(accelerator, steps=3)
    save(tmp_path, whole, TrainState(step=3), best=True)
    found = checkpoint.load_weights(checkpoint.find(tmp_path, "best"))
    assert all(torch.equal(found[k], v) for k, v in whole.ema.module.state_dict().items())


@pytest.mark.parametrize("failing", ["durable.save_file", "durable.os.fsync", "recovery.store.os.replace"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, accelerator, monkeypatch, failing):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"cifar_dist.{failing}", full)
    with pytest.raises(UsageError, match=r"No space left on device.*older ones are intact"):
        save(tmp_path, whole, TrainState(step=2), best=True)
    monkeypatch.undo()
    assert checkpoint.state_of(checkpoint.find(tmp_path, "last")).step == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "last", "step-00000001"]
    resume(tmp_path, whole)


FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "optimizer.json", "process-0.safetensors",
         "ema.safetensors", "state.json"]  # fmt: skip


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_taken(tmp_path, accelerator, capfd, file, damage):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    expected = {name: tensor.clone() for name, tensor in everything(whole).items()}
    advance(whole, accelerator, 1)
    save(tmp_path, whole, TrainState(step=2), best=True)
    root = tmp_path / "checkpoints"
    damage(root / "step-00000002" / file)
    assert checkpoint.find(tmp_path, "best").step == 1  # who only reads changes nothing
    assert resume(tmp_path, whole).step == 1
    said = capfd.readouterr().out
    assert f"{root / 'step-00000002'} is damaged ({file} " in said
    assert len(list(root.glob("damaged-step-00000002-*"))) == 1
    found = everything(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for step in (2, 3, 4):
        save(tmp_path, whole, TrainState(step=step), best=False)
    assert checkpoint.find(tmp_path, "last").step == 4
    assert len(list(root.glob("damaged-*"))) == 1


@pytest.mark.parametrize("file", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_now_costs_no_checkpoint(tmp_path, accelerator, monkeypatch, file, number):
    """As on a file server that hiccups: the newest one is neither set aside nor passed over."""
    whole = trained(accelerator, steps=1)
    for step in (1, 2):
        save(tmp_path, whole, TrainState(step=step), best=True)
    newest, plain = tmp_path / "checkpoints" / "step-00000002", Path.open

    def fails(self, *arguments, **settings):
        if self == newest / file:
            raise OSError(number, os.strerror(number))
        return plain(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UsageError, match="step-00000002 cannot be read now"):
        checkpoint.find(tmp_path, "last")
    with pytest.raises(UsageError, match=r"step-00000002 cannot be read now \(.*\); start again when it can"):
        resume(tmp_path, whole)
    monkeypatch.undo()
    assert newest.is_dir()
    assert resume(tmp_path, whole).step == 2


def test_an_older_checkpoint_that_cannot_be_read_now_stops_nothing(tmp_path, accelerator, monkeypatch):
    whole = trained(accelerator, steps=1)
    for step in (1, 2):
        save(tmp_path, whole, TrainState(step=step), best=True)
    older, plain = tmp_path / "checkpoints" / "step-00000001", Path.open

    def fails(self, *arguments, **settings):
        if self.parent == older:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return plain(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", fails)
    assert resume(tmp_path, whole).step == checkpoint.find(tmp_path, "last").step == 2
    save(tmp_path, whole, TrainState(step=3), best=True)
    assert checkpoint.find(tmp_path, "best").step == 3 and older.is_dir()


def test_nothing_but_damaged_ones_is_no_fresh_start(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    flip(tmp_path / "checkpoints" / "last" / "model.safetensors")
    for _ in range(2):
        assert checkpoint.exists(tmp_path)
        with pytest.raises(UsageError, match="no sound checkpoint to go on from"):
            resume(tmp_path, whole)
    with pytest.raises(UsageError, match="no sound checkpoint"):
        checkpoint.find(tmp_path, "last")


def test_a_dangling_link_is_no_fresh_start(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    assert checkpoint.exists(tmp_path)
    with pytest.raises(UsageError, match="no sound checkpoint"):
        resume(tmp_path, whole)


def test_a_damaged_best_one_is_not_scored_in_silence(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    for step, best in ((1, True), (2, False), (3, False)):
        save(tmp_path, whole, TrainState(step=step), best)
    flip(tmp_path / "checkpoints" / "best" / "model.safetensors")
    assert checkpoint.find(tmp_path, "last").step == 3
    with pytest.raises(UsageError, match=r"step-00000001 is no sound checkpoint .*model.safetensors.*--checkpoint"):
        checkpoint.find(tmp_path, "best")


def test_left_overs_of_a_killed_save_are_swept_and_nothing_else(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    root = tmp_path / "checkpoints"
    for name in (".tmp-step-00000002-aa", ".del-step-00000000-bb", "notes", "damaged-step-00000009-cc"):
        (root / name).mkdir()
    assert resume(tmp_path, whole).step == 1
    names = {path.name for path in root.iterdir()}
    assert names == {"best", "last", "step-00000001", "notes", "damaged-step-00000009-cc"}


def test_the_newest_and_the_best_are_kept(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    for step in range(1, 8):
        save(tmp_path, whole, TrainState(step=step), best=step == 2, keep_last=3)
    root = tmp_path / "checkpoints"
    assert sorted(path.name for path in root.glob("step-*")) == [f"step-{step:08d}" for step in (2, 5, 6, 7)]
    assert (root / "best").resolve().name == "step-00000002"


def test_a_step_saved_again_with_its_evaluation_replaces_itself(tmp_path, accelerator):
    """As after a stop within an evaluation; at no moment is there less than before."""
    whole = trained(accelerator, steps=1)
    state = TrainState(step=1)
    save(tmp_path, whole, state, best=False)
    state.judge({"top1": 0.5, "loss": 1.0}, 0.0)
    save(tmp_path, whole, state, best=False)
    found = checkpoint.find(tmp_path, "last")
    assert checkpoint.state_of(found) == state
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [found.folder.name]


def test_a_vanished_run_folder_is_not_made_again(tmp_path, accelerator):
    with pytest.raises(UsageError, match=r"could not be saved .*No such file"):
        save(tmp_path / "gone", trained(accelerator, steps=1), TrainState(step=1), best=True)
    assert not (tmp_path / "gone").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    with torch.no_grad():
        whole.parallel.model[0].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(Diverged, match="not finite after step 2"):
        save(tmp_path, whole, TrainState(step=2), best=True)
    assert checkpoint.state_of(checkpoint.find(tmp_path, "last")).step == 1


def test_a_buffer_may_be_infinite_from_the_start_but_never_nan(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    bound = torch.full((1,), -math.inf)
    whole.parallel.model.register_buffer("bound", bound)  # as of a Gemma ViT's quantisation
    save(tmp_path, whole, TrainState(step=1), best=True)
    assert load_file(checkpoint.find(tmp_path, "last").folder / "model.safetensors")["bound"] == -math.inf
    bound.fill_(math.nan)
    with pytest.raises(Diverged, match="not finite after step 2"):
        save(tmp_path, whole, TrainState(step=2), best=True)


def test_a_statistic_is_never_infinite(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    (norm,) = (module for module in whole.parallel.module.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_var.fill_(math.inf)
    with pytest.raises(Diverged, match="not finite after step 1"):
        save(tmp_path, whole, TrainState(step=1), best=True)


SAVABLE = [name for name in list_optimizers() if not name.startswith(("bnb", "fused", "adahessian"))]


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("opt", SAVABLE)
def test_every_optimizer_of_timm_goes_on_exactly(tmp_path, accelerator, monkeypatch, opt):
    monkeypatch.setattr(optim, "find_spec", lambda _: "a spec")  # of opt_einsum, without which small matrices do
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
    save(tmp_path, runs[0], TrainState(step=1), best=True)
    resume(tmp_path, runs[1])
    for run in runs:
        step(run)
    for mine, other in zip(*(run.parallel.module.parameters() for run in runs), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("fused", [(True, None), (None, True), (True, True)])
@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_run_goes_on_where_the_optimizer_is_fused_or_is_not(tmp_path, accelerator, opt, fused):
    """As when a run moves from a GPU to a CPU or back; torch's fused kernels are there for CPUs, too."""
    runs = []
    for choice in (*fused, None):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        optimizer = make_optimizer(model, OptimConfig(opt=opt, lr=1e-2))
        for group in optimizer.param_groups:
            group["fused"] = choice
        runs.append(Trained(Replicated(accelerator, model, optimizer, None), None))
    before, after, whole = runs

    def step(run, number):
        run.parallel.model(torch.full((3, 6), float(number))).square().sum().backward()
        run.parallel.update()

    for number in (1, 2):
        step(before, number)
        step(whole, number)
    save(tmp_path, before, TrainState(step=2), best=True)
    resume(tmp_path, after)
    assert {group["fused"] for group in after.parallel.optimizer.param_groups} == {fused[1]}
    assert {group["fused"] for group in before.parallel.optimizer_state()["param_groups"]} == {None}
    for run in (after, whole):
        step(run, 3)
    for mine, other in zip(after.parallel.module.parameters(), whole.parallel.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_moments_keep_their_parameters_memory_layout(tmp_path, accelerator):
    whole = trained(accelerator, steps=2)
    save(tmp_path, whole, TrainState(step=2), best=True)
    other = trained(accelerator, seed=1)
    resume(tmp_path, other)
    weight = other.parallel.model[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert other.parallel.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path, accelerator):
    whole = trained(accelerator, steps=1)
    save(tmp_path, whole, TrainState(step=1), best=True)
    path = tmp_path / "checkpoints" / "last" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 99}
    del manifest["digest"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"digest": digest}))
    with pytest.raises(UsageError, match="has format 99, this version of cifar-dist reads 3"):
        resume(tmp_path, whole)
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()
