"""In which order a checkpoint becomes durable, visible and the only one, and that all processes see the same."""

import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist.config import OptimConfig, RunConfig
from cifar_dist.distributed.group import start
from cifar_dist.errors import UsageError
from cifar_dist.optim import make_optimizer
from cifar_dist.parallel import Replicated
from cifar_dist.recovery import checkpoint, lookup, store
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.recovery.checkpoint_timer import CheckpointTimer
from cifar_dist.recovery.saver import Saver
from cifar_dist.recovery.train_state import TrainState
from tests.ranks import Ranks
from tests.saving import save


def small(accelerator):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return Trained(Replicated(accelerator, model, make_optimizer(model, OptimConfig()), None), None)


@pytest.fixture
def whole():
    return small(Accelerator(cpu=True))


def saved(folder, whole, step, **settings):
    save(folder, whole, TrainState(step=step), **settings)


@pytest.fixture
def calls(monkeypatch):
    """What is made durable, renamed and removed, in order: (what, path)."""
    found = []
    fsync, replace, rmtree = os.fsync, os.replace, store.shutil.rmtree

    def noted_fsync(descriptor):
        found.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(old, new):
        files = {str(path) for path in old.iterdir()} if old.is_dir() else set()
        found.append(("rename", str(old), str(new), files))
        replace(old, new)

    def noted_rmtree(path, **settings):
        found.append(("remove", str(path)))
        rmtree(path, **settings)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(store.shutil, "rmtree", noted_rmtree)
    return found


def naming(calls, root, step):
    """The place in `calls` where the checkpoint of `step` gets its name."""
    [place] = [n for n, call in enumerate(calls) if call[0] == "rename" and call[2] == f"{root}/step-{step:08d}"]
    return place


def test_a_checkpoint_appears_in_one_rename(tmp_path, whole, calls):
    saved(tmp_path, whole, 1)
    place = naming(calls, tmp_path / "checkpoints", 1)
    assert "/.tmp-step-00000001-" in calls[place][1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".tmp")] == []


def test_everything_is_durable_before_it_has_a_name(tmp_path, whole, calls):
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        saved(tmp_path, whole, step, keep_last=1)
    for step in (1, 2, 3):
        place = naming(calls, root, step)
        _, aside, _, files = calls[place]
        durable = {path for _, path, *_ in (call for call in calls[:place] if call[0] == "fsync")}
        assert len(files) == 6
        assert files | {aside, str(tmp_path)} <= durable
        assert calls[place + 1] == ("fsync", str(root))


def test_the_manifest_is_written_last(tmp_path, whole, calls):
    saved(tmp_path, whole, 1)
    files = [os.path.basename(call[1]) for call in calls if call[0] == "fsync" and "." in os.path.basename(call[1])[1:]]
    assert files.count("manifest.json") == 1
    assert files[-1] == "manifest.json"


def test_links_that_a_copy_has_made_folders_are_links_again(tmp_path, whole):
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        saved(tmp_path / "run", whole, step, best=step == 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    root = tmp_path / "copy" / "checkpoints"
    assert not (root / "last").is_symlink()
    saved(tmp_path / "copy", whole, 3)
    assert (root / "last").resolve().name == "step-00000003" and (root / "best").resolve().name == "step-00000001"
    assert sorted(path.name for path in root.iterdir()) == [
        "best", "last", "step-00000001", "step-00000002", "step-00000003"
    ]  # fmt: skip
    (root / "last").unlink()
    (root / "last").mkdir()
    (root / "last" / "mine").touch()
    saved(tmp_path / "copy", whole, 4)
    assert (root / "last" / "mine").exists()  # which is no copy of a checkpoint


def test_a_file_system_without_links_keeps_checkpoints(tmp_path, whole, monkeypatch):
    def refused(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    saved(tmp_path, whole, 1)
    assert checkpoint.find(tmp_path, "last").step == 1


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_reader_that_comes_while_checkpoints_are_dropped_looks_again(tmp_path, whole, monkeypatch, which):
    saved(tmp_path, whole, 1, best=True)
    choose, waiting = lookup.choose, [2, 3]

    def while_training(root):
        if waiting:
            for old in root.glob("step-*"):
                shutil.rmtree(old)
            with monkeypatch.context() as later:
                later.setattr(lookup, "choose", choose)
                found = None, {root / "step-00000001": "manifest.json is missing"}
                saved(tmp_path, whole, waiting.pop(0), best=True, keep_last=1)
            return found
        return choose(root)

    monkeypatch.setattr(lookup, "choose", while_training)
    assert checkpoint.find(tmp_path, which).step == 3


def test_pruning_comes_after_the_commit(tmp_path, whole, monkeypatch):
    for step in (1, 2):
        saved(tmp_path, whole, step, keep_last=1)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(store, "save_json", full)
    with pytest.raises(UsageError, match="No space left"):
        saved(tmp_path, whole, 3, keep_last=1)
    assert checkpoint.find(tmp_path, "last").step == 2


def test_pruning_counts_sound_ones_only(tmp_path, whole):
    for step in (1, 2, 3):
        saved(tmp_path, whole, step, keep_last=2)
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    saved(tmp_path, whole, 4, keep_last=2)
    assert [stored.step for stored in store.committed(tmp_path / "checkpoints")] == [4, 2]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, whole, monkeypatch):
    """What is written is the training at the time of saving, and there is no checkpoint before all of it is written."""
    parallel, may_write, write = whole.parallel, threading.Event(), checkpoint.Contents.write
    parallel.model(torch.ones(1, 4)).sum().backward()
    parallel.optimizer.step()
    live = {"weight": parallel.module.weight, **parallel.optimizer.state[parallel.module.weight]}
    expected = {name: tensor.detach().clone() for name, tensor in live.items()}

    def late(*arguments):
        assert may_write.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint.Contents, "write", late)
    keeper = Saver(tmp_path, parallel.accelerator, CheckpointTimer(RunConfig()))
    keeper.save(whole, TrainState(step=1))
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    assert keeper.writing
    assert store.committed(tmp_path / "checkpoints") == []
    may_write.set()
    keeper.finish()
    assert not keeper.writing
    checkpoint.load(checkpoint.find(tmp_path, "last"), whole)
    for name, tensor in {"weight": parallel.module.weight, **parallel.optimizer.state[parallel.module.weight]}.items():
        assert torch.equal(tensor, expected[name]), name
    assert "exp_avg" in expected


def test_what_other_processes_are_writing_is_left_alone(tmp_path, whole, monkeypatch):
    """A file that another process has not given its name yet would be gone by the time it is hashed."""
    begin = store.begin

    def busy(*arguments):
        folder = begin(*arguments)
        (folder / ".tmpOther").touch()
        (folder / "process-1.safetensors").touch()
        return folder

    monkeypatch.setattr(store, "begin", busy)
    saved(tmp_path, whole, 1)
    assert sorted(checkpoint.find(tmp_path, "last").files) == [
        "model.safetensors", "optimizer.json", "optimizer.safetensors", "process-0.safetensors", "state.json"
    ]  # fmt: skip


def test_the_newest_is_the_one_committed_last(tmp_path, whole):
    """Whatever folders are called and whatever a copy has done to their times."""
    for step in (5, 3):
        saved(tmp_path, whole, step)
    os.utime(tmp_path / "checkpoints" / "step-00000003", (1, 1))
    found, wrong = store.choose(tmp_path / "checkpoints")
    assert (found.step, wrong) == (3, {})


def test_a_slow_process_is_waited_for(tmp_path):
    def work():
        whole = small(start("fp32"))
        save_tensors, rank = checkpoint.save_tensors, whole.parallel.accelerator.process_index

        def slow(*arguments):
            time.sleep(rank)
            save_tensors(*arguments)

        checkpoint.save_tensors = slow
        saved(tmp_path, whole, 1)
        found = checkpoint.find(tmp_path, "last")
        return sorted(name for name in found.files if name.startswith("process"))

    assert Ranks(work, 2).check().results == [["process-0.safetensors", "process-1.safetensors"]] * 2


def test_one_process_commits(tmp_path):
    def work():
        whole, made = small(start("fp32")), []
        commit = store.commit

        def counted(*arguments):
            made.append(0)
            return commit(*arguments)

        store.commit = counted
        saved(tmp_path, whole, 1)
        return len(made)

    assert Ranks(work, 2).check().results == [1, 0]


def test_all_processes_take_the_same_one(tmp_path):
    """One of them reads the newest otherwise than it was written, as over a network with a fault."""

    def work():
        whole = small(start("fp32"))
        for step in (1, 2):
            saved(tmp_path, whole, step)
        verify = store.Stored.verify

        def fails(self, names=None):
            verify(self, names)
            if names == ["process-1.safetensors"] and self.step == 2:
                raise store.Damaged("it reads otherwise here")

        store.Stored.verify = fails
        return checkpoint.resume_point(whole.parallel.accelerator, tmp_path).step

    found = Ranks(work, 2).check()
    assert found.results == [1, 1]
    assert "step-00000002 is damaged (on process 1: it reads otherwise here)" in found.said[0]


def test_a_process_that_sees_another_manifest_does_not_go_on_with_it(tmp_path):
    def work():
        accelerator = start("fp32")
        whole = small(accelerator)
        for step in (1, 2):
            saved(tmp_path, whole, step)
        read = store.read_manifest

        def stale(folder):
            found = read(folder)
            return replace(found, digest="of an older one") if found.step == 2 else found

        if accelerator.process_index == 1:
            store.read_manifest = stale
        return checkpoint.resume_point(accelerator, tmp_path).step

    found = Ranks(work, 2).check()
    assert found.results == [1, 1]
    assert "step-00000002 is damaged (on process 1: another manifest than the first process's)" in found.said[0]
