import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist.data import resident, sources
from cifar_dist.data.resident import load_resident
from cifar_dist.data.sources import Source, open_source
from cifar_dist.errors import UsageError


def entries(config):
    return sorted(path for path in Path(config.cache_dir).iterdir() if path.is_dir())


def test_images_labels_and_ids_are_the_sources(image_folder, config):
    settings = config(image_folder)
    source = open_source(settings)
    loaded = load_resident(source, "train", settings)
    images, labels = zip(*source.rows("train"), strict=True)
    assert loaded.images.dtype == torch.uint8 and loaded.labels.dtype == loaded.ids.dtype == torch.int64
    assert np.array_equal(loaded.images.numpy(), np.stack([np.asarray(image) for image in images]))
    assert loaded.labels.tolist() == list(labels) and loaded.ids.tolist() == list(range(8)) and len(loaded) == 8


def test_rows_decoded_in_threads_keep_their_order(config, monkeypatch):
    settings = config("digits")
    source = open_source(settings)
    monkeypatch.setattr(sources, "_ROWS_AT_A_TIME", 100)  # of 360
    monkeypatch.setattr(sources, "own_cores", lambda: 3)
    monkeypatch.setattr(sources, "_is_small", lambda value: False)
    loaded = load_resident(source, "test", settings)
    expected = list(source.tables["test"].stream)
    assert np.array_equal(loaded.images.numpy(), np.stack([row["image"] for row in expected]))
    assert loaded.labels.tolist() == [row["label"] for row in expected]


@pytest.mark.parametrize("size", [16, 48])
def test_other_sizes_are_stretched_as_pil_does(size, image_folder, config):
    file = image_folder / "train" / "cat" / "1.png"
    Image.open(file).resize((50, 20)).save(file)
    settings = config(image_folder, data_size=size)
    loaded = load_resident(open_source(settings), "train", settings)
    assert loaded.images.shape == (8, size, size, 3)
    for row in (0, 1):
        with Image.open(image_folder / "train" / "cat" / f"{row}.png") as image:
            expected = image.resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(loaded.images[row].numpy(), np.asarray(expected))


def test_take_and_to_keep_ids(image_folder, config):
    settings = config(image_folder)
    whole = load_resident(open_source(settings), "train", settings)
    part = whole.to("cpu").take(np.array([6, 1]))
    assert part.ids.tolist() == [6, 1] and part.labels.tolist() == [1, 0]
    assert torch.equal(part.images, torch.stack((whole.images[6], whole.images[1])))


def test_second_start_decodes_nothing_and_is_private(image_folder, config, monkeypatch):
    settings = config(image_folder)
    source = open_source(settings)
    first = load_resident(source, "train", settings)
    before = first.images.clone()
    monkeypatch.setattr(Source, "rows", lambda *_: pytest.fail("decoded again"))
    first.images.zero_()
    again = load_resident(open_source(settings), "train", settings)
    assert torch.equal(again.images, before)


def test_an_entry_for_each_size_split_label_and_content(cifar100_pickles, config):
    for settings in (
        config(cifar100_pickles),
        config(cifar100_pickles, data_size=16),
        config(cifar100_pickles, label_column="coarse_label"),
    ):
        load_resident(open_source(settings), "train", settings)
    load_resident(open_source(settings), "test", settings)
    assert len(entries(settings)) == 4
    os.utime(cifar100_pickles / "train", ns=(1, 1))
    load_resident(open_source(settings), "train", settings)
    assert len(entries(settings)) == 5


@pytest.mark.parametrize("damage", ["short", "long", "labels", "missing", "range"])
def test_damaged_entry_is_decoded_again_and_said(damage, image_folder, config, capsys):
    settings = config(image_folder)
    source = open_source(settings)
    before = load_resident(source, "train", settings)
    images, labels = before.images.clone(), before.labels.clone()
    assert capsys.readouterr().err == ""
    (entry,) = entries(settings)
    content = (entry / "images.u8").read_bytes()
    if damage in ("short", "long"):
        (entry / "images.u8").write_bytes(content[:-7] if damage == "short" else content + b"x")
    elif damage == "labels":
        (entry / "labels.npy").write_bytes((entry / "labels.npy").read_bytes()[:-8])
    elif damage == "missing":
        (entry / "labels.npy").unlink()
    else:
        np.save(entry / "labels.npy", np.full(8, 2))
    after = load_resident(source, "train", settings)
    assert torch.equal(after.images, images) and torch.equal(after.labels, labels)
    assert "is damaged" in capsys.readouterr().err
    load_resident(source, "train", settings)
    assert capsys.readouterr().err == ""


def run_decoders(settings, patch, number):
    """Load the train split in processes forked from one that ran `patch`; returns the status, 0 if all succeeded."""
    code = f"""
import os, signal, time
from cifar_dist.config import DataConfig
from cifar_dist.data import resident
from cifar_dist.data.sources import Source, open_source
config = DataConfig(dataset={settings.dataset!r}, cache_dir={settings.cache_dir!r})
plain = Source.rows
{patch}
Source.rows = rows
children = []
for _ in range({number - 1}):
    children.append(os.fork())
    if not children[-1]:
        children = []
        break
loaded = resident.load_resident(open_source(config), "train", config)
failed = len(loaded) != 8 or any(os.waitpid(pid, 0)[1] for pid in children)
raise SystemExit(3 if failed else 0)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=180).returncode


def test_several_processes_decode_once(image_folder, config, tmp_path):
    settings = config(image_folder)
    patch = f"""
def rows(self, split, kept):
    with open({str(tmp_path / "log")!r}, "a") as log:
        log.write(split + "\\n")
    time.sleep(1)
    yield from plain(self, split, kept)
"""
    assert run_decoders(settings, patch, 3) == 0
    assert (tmp_path / "log").read_text() == "train\n"


def test_killed_in_the_middle_leaves_no_entry(image_folder, config):
    settings = config(image_folder)
    patch = """
def rows(self, split, kept):
    for number, row in enumerate(plain(self, split, kept)):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row
"""
    assert run_decoders(settings, patch, 1) == -signal.SIGKILL
    (left_over,) = entries(settings)
    assert left_over.name.startswith(".tmp-") and any(left_over.iterdir())
    assert len(load_resident(open_source(settings), "train", settings)) == 8
    (entry,) = entries(settings)
    assert not entry.name.startswith(".tmp-")


def test_everything_is_on_disk_before_the_rename(image_folder, config, monkeypatch):
    synced = []
    plain = resident.fsync
    monkeypatch.setattr(resident, "fsync", lambda path: (synced.append((path, path.stat())), plain(path)))
    settings = config(image_folder)
    load_resident(open_source(settings), "train", settings)
    (entry,) = entries(settings)
    assert {path.name: status.st_size for path, status in synced[:3]} == {
        file.name: file.stat().st_size for file in entry.iterdir()
    }
    (folder, before), (parent, _) = synced[3:]
    assert folder.name.startswith(".tmp-") and parent == entry.parent
    assert before.st_ino == entry.stat().st_ino  # renamed, not copied


def test_disk_without_room(image_folder, config, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = config(image_folder)
    monkeypatch.setattr(resident, "fsync", full)
    with pytest.raises(UsageError, match=r"--cache-dir .*cache: .*No space left on device.*name a folder with room"):
        load_resident(open_source(settings), "train", settings)
    assert entries(settings) == []


def test_cache_folder_that_cannot_be(image_folder, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    settings = dataclasses.replace(config(image_folder), cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"--cache-dir .*Not a directory"):
        load_resident(open_source(settings), "train", settings)


def test_default_folder_follows_xdg(image_folder, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    settings = dataclasses.replace(config(image_folder), cache_dir=None)
    load_resident(open_source(settings), "test", settings)
    assert [path for path in (tmp_path / "xdg" / "cifar-dist").iterdir() if path.is_dir()]


def test_split_that_ends_early_is_refused(image_folder, config):
    settings = config(image_folder)
    source = open_source(settings)
    table = dataclasses.replace(source.tables["train"], num_rows=9)
    short = dataclasses.replace(source, tables={**source.tables, "train": table})
    with pytest.raises(UsageError, match="train gave 8 rows, its files announce 9"):
        load_resident(short, "train", settings)
    assert entries(settings) == []
