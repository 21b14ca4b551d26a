"""Run folders: what is refused, what may change on resume, what is recorded."""

import dataclasses
import json
import os
from types import SimpleNamespace

import pytest
import torch

from cifar_dist.command_line import load_config
from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.run_folder import NOT_THE_TRAINING, choose_run_dir, create_run_dir, identity, run_lock

FACTS = {"data_fingerprint": "aa", "train_val_split": "bb", "pixel_digest": "cc", "class_names": ["cat", "dog"]}


def config(run_dir, resume="never", **run):
    return dataclasses.replace(
        Config(), run=dataclasses.replace(Config().run, run_dir=str(run_dir), resume=resume, **run)
    )


def with_data(settings, **data):
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **data))


def prepare(settings, facts=FACTS):
    run_dir = choose_run_dir(settings)
    lock = run_lock(run_dir)
    create_run_dir(lock, settings, make_plan(settings, Sizes(1280, 0, None, 2, 0, 1000, 1000, 2), 1), facts)
    lock.release()
    return run_dir


def test_a_folder_that_holds_something_is_refused_unless_resumed(tmp_path):
    prepare(config(tmp_path / "run"))
    with pytest.raises(UsageError, match="not empty; name another, or continue with --resume auto"):
        prepare(config(tmp_path / "run"))
    assert prepare(config(tmp_path / "run", resume="auto")) == tmp_path / "run"


def test_resume_refuses_other_training_but_not_other_bookkeeping(tmp_path):
    prepare(config(tmp_path))
    prepare(config(tmp_path, "auto", max_steps=7, log_every=3, checkpoint_every=2, micro_batch_size=4))
    prepare(with_data(config(tmp_path, "auto"), skip_corrupt=5))
    with pytest.raises(UsageError, match=r"other settings \(--epochs 10 -> 11; --seed 0 -> 5\)"):
        prepare(config(tmp_path, "auto", epochs=11, seed=5))


def test_data_may_lie_elsewhere_after_a_resume(tmp_path):
    def settings(place, resume="auto"):
        return with_data(config(tmp_path / "run", resume), dataset=str(tmp_path / place))

    for place in ("job1", "job2"):
        (tmp_path / place).mkdir()
    prepare(settings("job1", "never"))
    prepare(settings("job2"))
    found = load_config(tmp_path / "run" / "config.yaml")
    assert found.data.dataset == str(tmp_path / "job2")
    with pytest.raises(UsageError, match="data fingerprint differs"):
        prepare(settings("job1"), FACTS | {"data_fingerprint": "bb"})
    assert load_config(tmp_path / "run" / "config.yaml") == found
    for place in ("job3", "digits"):
        with pytest.raises(UsageError, match=r"other settings \(--dataset [^;]*\)"):
            prepare(settings(place))


def test_resume_needs_a_run_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"no run folder \(config.yaml is missing\)"):
        prepare(config(tmp_path, "auto"))
    with pytest.raises(UsageError, match="--resume auto needs --run-dir"):
        prepare(dataclasses.replace(Config(), run=dataclasses.replace(Config().run, resume="auto")))


def test_a_run_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        prepare(config(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"--run-dir .*xxx cannot be used \(File name too long\); name another"):
        prepare(config(tmp_path / ("x" * 300)))


def test_what_no_object_says_is_damage(tmp_path):
    prepare(config(tmp_path / "run"))
    (tmp_path / "run" / "environment.json").write_text("[]")
    with pytest.raises(UsageError, match=r"environment\.json is damaged"):
        prepare(config(tmp_path / "run", "auto"))


def test_the_folder_and_what_identifies_the_run_are_durable(tmp_path, monkeypatch):
    """Of a file that is replaced first the new text, then its name."""
    durable, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (durable.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    run = prepare(config(tmp_path / "run"))
    assert str(tmp_path) in durable
    for name in ("config.yaml", "plan.json", "environment.json"):
        assert str(run) in durable[durable.index(f"{run}/.tmp-{name}") :]


@pytest.mark.parametrize("still_running", [True, False])
def test_of_two_runs_that_chose_one_folder_only_the_first_gets_it(tmp_path, still_running):
    settings = config(tmp_path / "run")
    assert choose_run_dir(settings) == choose_run_dir(settings)
    plan = make_plan(settings, Sizes(1280, 0, None, 2, 0, 0, 0, 0), 1)
    first, second = run_lock(tmp_path / "run"), run_lock(tmp_path / "run")
    create_run_dir(first, settings, plan, FACTS)
    if not still_running:
        first.release()
    with pytest.raises(UsageError, match="in use by another training"):
        create_run_dir(second, settings, plan, FACTS)
    first.release()


def test_settings_are_compared_again_once_the_folder_is_locked(tmp_path):
    """Another training may have begun and ended while this one decoded its data."""
    (tmp_path / "run").mkdir()
    settings = config(tmp_path / "run", "auto", seed=5)
    assert choose_run_dir(settings) == tmp_path / "run"
    prepare(config(tmp_path / "run"))
    plan = make_plan(settings, Sizes(1280, 0, None, 2, 0, 0, 0, 0), 1)
    with pytest.raises(UsageError, match=r"other settings \(--seed 0 -> 5\)"):
        create_run_dir(run_lock(tmp_path / "run"), settings, plan, FACTS)
    assert load_config(tmp_path / "run" / "config.yaml").run.seed == 0


def test_a_start_into_a_live_run_changes_nothing(tmp_path):
    settings = config(tmp_path / "run", "auto")
    plan = make_plan(settings, Sizes(1280, 0, None, 2, 0, 0, 0, 0), 1)
    live = run_lock(tmp_path / "run")
    create_run_dir(live, settings, plan, FACTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UsageError, match="in use by another training"):
        prepare(settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    live.release()


def test_a_resumed_run_keeps_its_first_environment_and_counts_restarts(tmp_path):
    prepare(config(tmp_path))
    first = json.loads((tmp_path / "environment.json").read_text())
    for _ in range(2):
        prepare(config(tmp_path, "auto"))
    again = json.loads((tmp_path / "environment.json").read_text())
    assert len(again.pop("restarts")) == 2
    assert again == first


def test_which_of_timms_attentions_are_fused_is_noted(tmp_path, monkeypatch):
    for name, set_to in (("a", None), ("b", "2")):
        monkeypatch.delenv("TIMM_FUSED_ATTN", raising=False)
        if set_to:
            monkeypatch.setenv("TIMM_FUSED_ATTN", set_to)
        prepare(config(tmp_path / name))
        assert json.loads((tmp_path / name / "environment.json").read_text())["timm_fused_attn"] == set_to


@pytest.mark.parametrize(
    "change, how",
    [
        ({"data_fingerprint": "b" * 64}, "(files have other names or sizes"),
        ({"train_val_split": "ee"}, "(labels, or the order of images, are others)"),
        ({"pixel_digest": "dd"}, "(images are others, in files of the same names and sizes"),
        ({"class_names": ["dog", "cat"]}, "(['cat', 'dog'] -> ['dog', 'cat'])"),
    ],
)
def test_resume_refuses_other_data(tmp_path, change, how):
    prepare(config(tmp_path))
    with pytest.raises(UsageError, match=f"{next(iter(change)).replace('_', ' ')} differs") as error:
        prepare(config(tmp_path, "auto"), FACTS | change)
    assert how in str(error.value)
    assert "--dataset cifar10, or train on them in another --run-dir" in str(error.value)


def test_a_run_of_an_earlier_version_that_lacks_a_fact_goes_on_and_has_it_from_then_on(tmp_path):
    prepare(config(tmp_path), {name: value for name, value in FACTS.items() if name != "pixel_digest"})
    prepare(config(tmp_path, "auto"))
    with pytest.raises(UsageError, match="pixel digest differs"):
        prepare(config(tmp_path, "auto"), FACTS | {"pixel_digest": "dd"})


def test_a_run_without_room_for_its_checkpoints_is_refused(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr("cifar_dist.run_folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"checkpoints take .* MiB each.*--keep-last 2.*free"):
        prepare(config(tmp_path))
    usage.free = 2**40
    prepare(config(tmp_path))


@pytest.mark.parametrize("held", [0, 5000])
def test_the_last_ones_the_best_and_the_next_are_to_fit_beside_what_is_there(tmp_path, monkeypatch, held):
    """2,000 bytes too few would be one checkpoint's own writing; of a run that goes on, its own are replaced."""
    run_dir = prepare(config(tmp_path / "run", keep_last=3))
    each = json.loads((run_dir / "plan.json").read_text())["checkpoint_bytes"]
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(bytes(held))
    usage = SimpleNamespace(free=5 * each - held)
    monkeypatch.setattr("cifar_dist.run_folder.shutil.disk_usage", lambda _: usage)
    prepare(config(run_dir, "auto", keep_last=3))
    usage.free -= 1
    with pytest.raises(UsageError, match="are free; make room"):
        prepare(config(run_dir, "auto", keep_last=3))


MAY_CHANGE = """
    cache_dir skip_corrupt max_steps micro_batch_size auto_micro_batch on_nan ddp_timeout run_dir resume log_every
    checkpoint_every keep_last time_limit wandb wandb_project
"""


@pytest.mark.parametrize("name", Config().flat())
def test_what_may_change_on_resume(name):
    """All else would make another training of it. A new setting is to be decided on here."""
    assert (name in NOT_THE_TRAINING) == (name in MAY_CHANGE.split())


def test_processes_are_alike_whose_caches_are_not(monkeypatch):
    first = identity(with_data(config("run"), cache_dir="/a"))
    assert first == identity(with_data(config("run"), cache_dir="/b"))
    assert first != identity(config("run", seed=3))
    monkeypatch.setattr("cifar_dist.run_folder._git_commit", lambda: "another")
    assert first != identity(with_data(config("run"), cache_dir="/a"))


def test_what_a_kill_in_the_first_second_leaves_can_be_started_again(tmp_path):
    for names in ((".lock", ".tmp-config.yaml"), (".lock", "config.yaml", ".tmp-plan.json")):
        folder = tmp_path / str(len(names))
        prepare(config(folder))
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
        (folder / names[-1]).touch()
        prepare(config(folder, "auto"))
        assert json.loads((folder / "environment.json").read_text())["data_fingerprint"] == "aa"


def test_what_a_killed_save_has_left_is_no_reason_to_refuse_a_run(tmp_path, monkeypatch):
    prepare(config(tmp_path))
    litter = tmp_path / "checkpoints" / ".tmp-step-00000003-abcd"
    litter.mkdir(parents=True)

    def usage(_):
        return SimpleNamespace(free=10 if litter.exists() else 2**40)

    monkeypatch.setattr("cifar_dist.run_folder.shutil.disk_usage", usage)
    prepare(config(tmp_path, "auto"))
    assert not litter.exists()


@pytest.mark.parametrize(("in_use", "device"), [(True, "NVIDIA L4"), (False, "cpu")])
def test_a_gpu_is_a_runs_device_where_it_is_used(tmp_path, monkeypatch, in_use, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    prepare(config(tmp_path))
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == device
