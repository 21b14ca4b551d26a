import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from cifar_dist.data import load_other_test_data, load_test_data, load_training_data, load_val_data
from cifar_dist.data.sources import Source, open_source
from cifar_dist.data.splits import stratified_split
from cifar_dist.errors import UsageError
from tests.data.fakes import pixels


@pytest.fixture
def decoded(monkeypatch):
    """The splits that were decoded, in order."""
    seen = []
    plain = Source.rows
    monkeypatch.setattr(Source, "rows", lambda self, split, kept: (seen.append(split), plain(self, split, kept))[1])
    return seen


def test_val_is_part_of_train_and_test_is_not_read(config, decoded):
    data = load_training_data(config("digits", val_fraction=0.2, split_seed=7), 2**40)
    assert decoded == ["train"]
    assert (data.name, data.num_test, len(data.train), len(data.val)) == ("digits", 359, 1150, 288)
    both = torch.cat((data.train.ids, data.val.ids))
    assert sorted(both.tolist()) == list(range(1438))
    whole = load_training_data(config("digits", val_fraction=0.0), 2**40)
    assert whole.val is None and torch.equal(whole.train.images[data.val.ids], data.val.images)
    expected = stratified_split(whole.train.labels.numpy(), 0.2, 7)[1]
    assert np.array_equal(data.val.ids.numpy(), expected) and decoded == ["train"]


def test_select_on_test_takes_test_as_val_and_all_of_train(config, decoded):
    data = load_training_data(config("digits", select_on="test"), 2**40)
    test = load_test_data(config("digits"))
    assert len(data.train) == 1438 and torch.equal(data.val.images, test.test.images)
    assert decoded == ["train", "test"] and data.fingerprint == test.fingerprint


def test_test_data_reads_test_only(config, decoded):
    assert len(load_test_data(config("digits")).test) == 359 and decoded == ["test"]


def test_another_set_is_read_by_the_runs_columns_where_it_has_them(cifar100_pickles, cifar10_pickles, config):
    coarse = [f"c{number}" for number in range(20)]
    settings = config("digits", label_column="coarse_label")
    other = load_other_test_data(str(cifar100_pickles), settings, coarse)
    assert other.test.labels.tolist() == [(7 * number) % 100 // 5 for number in range(12)]
    names = [f"class {number}" for number in range(10)]
    assert len(load_other_test_data(str(cifar10_pickles), settings, names).test) == 4
    with pytest.raises(UsageError, match="--data nowhere"):
        load_other_test_data("nowhere", settings, coarse)


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
OWN = {"train": 12, "val": 6, "test": 4}  # images; split k's are pixels(number, seed=k), the first half cats


def labels_of(number):
    return [0] * (number // 2) + [1] * (number // 2)


def write_own(form, val, root):
    """A set that brings a split for validation, called `val` there."""
    saved = DatasetDict()
    for seed, (split, number) in enumerate(OWN.items()):
        name = val if split == "val" else split
        images = [Picture.fromarray(image) for image in pixels(number, seed)]
        if form == "images":
            for row, (label, image) in enumerate(zip(labels_of(number), images, strict=True)):
                folder = root / name / ("cat", "dog")[label]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{row:02}.png")
            continue
        table = Dataset.from_dict({"image": images, "label": labels_of(number)}, FEATURES)
        root.mkdir(exist_ok=True)
        if form == "parquet":
            table.to_parquet(str(root / f"{name}-00000-of-00001.parquet"))
        else:
            saved[name] = table
    if form == "saved":
        saved.save_to_disk(root)
    return root


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize(
    ("form", "name"),
    [("images", "val"), ("images", "valid"), ("images", "dev"), ("parquet", "validation"), ("saved", "validation")],
)
def test_a_split_of_the_sets_own_is_val_and_train_is_whole(form, name, mode, tmp_path, config):
    settings = config(write_own(form, name, tmp_path / "set"), data_mode=mode, val_fraction=0.3)
    data = load_training_data(settings, 2**40)
    assert (len(data.train), len(data.val), data.num_test, data.mode) == (12, 6, 4, mode)
    assert np.array_equal(data.val.images.numpy(), pixels(6, 1)) and data.val.labels.tolist() == labels_of(6)
    assert data.train.ids.tolist() == list(range(12)) and data.train.labels.tolist() == labels_of(12)
    assert np.array_equal(load_val_data(settings).images.numpy(), pixels(6, 1))
    assert "own split" in data.lines()[0]
    assert np.array_equal(load_test_data(settings).test.images.numpy(), pixels(4, 2))
    without = load_training_data(config(settings.dataset, data_mode=mode, val_fraction=0.0), 2**40)
    assert without.val is None and len(without.train) == 12 and not without.lines()
    assert without.fingerprint != data.fingerprint  # val's files are of no concern
    on_test = load_training_data(config(settings.dataset, data_mode=mode, select_on="test"), 2**40)
    assert np.array_equal(on_test.val.images.numpy(), pixels(4, 2)) and len(on_test.train) == 12


@pytest.mark.parametrize("form", ["images", "parquet", "saved"])
def test_a_split_of_the_sets_own_is_part_of_its_fingerprint(form, tmp_path, config, monkeypatch):
    first, copy = (open_source(config(write_own(form, "val", tmp_path / name))) for name in ("set", "copy"))
    monkeypatch.setitem(OWN, "val", 8)
    other = open_source(config(write_own(form, "val", tmp_path / "other")))
    assert first.fingerprint == copy.fingerprint != other.fingerprint


def test_classes_without_train_images_are_said(tmp_path, config, parquet_folder):
    """As of labels that count from 1: the first class is none."""
    images = {"image": list(pixels(4)), "label": [1, 2, 1, 2]}
    folder = parquet_folder({"train": images, "test": images}, Features({"image": Image(), "label": Value("int64")}))
    found = load_training_data(config(folder, val_fraction=0.0), 2**40)
    assert found.class_names == ("0", "1", "2")
    assert found.lines() == ["note        train has no images of 0"]


def test_a_split_of_the_sets_own_must_have_images_of_trains_classes(tmp_path, config, parquet_folder):
    folder = write_own("images", "val", tmp_path / "set")

    def refused(message):
        with pytest.raises(UsageError, match=message):
            load_training_data(config(folder), 2**40)

    (folder / "valid").mkdir()
    refused("val and valid are both for validation; keep one of them")
    (folder / "valid").rmdir()
    (folder / "val" / "dog").rename(folder / "val" / "emu")
    refused(r"train and val have different classes \(only in train: dog; only in val: emu\)")
    for ignored in ({"select_on": "test"}, {"val_fraction": 0.0}):
        assert len(load_training_data(config(folder, **ignored), 2**40).train) == 12
    for file in (folder / "val").glob("*/*"):
        file.rename(folder / "val" / f"{file.parent.name}-{file.name}")
    refused(r"val has images beside its folders of classes \(cat-00.png, 6 in all\)")
    for label in ("cat", "emu"):
        (folder / "val" / label).rmdir()
    refused("val has no folders of classes, as train has; sort its images")
    images = {"image": list(pixels(4)), "label": [0, 1, 0, 1]}
    none = {"image": [], "label": []}
    folder = parquet_folder({"train": images, "test": images, "validation": none}, FEATURES)
    refused("the val split is empty")
    other = Features({"image": Image(), "kind": ClassLabel(names=["cat", "dog"])})
    table = Dataset.from_dict({"image": images["image"], "kind": images["label"]}, features=other)
    table.to_parquet(str(next(folder.rglob("validation*"))))
    refused("val lacks the column 'label' of train; it has image")


def test_a_split_of_the_sets_own_that_takes_too_much_memory(tmp_path, config):
    settings = config(write_own("images", "val", tmp_path / "set"), data_mode="stream")
    assert len(load_training_data(settings, 4 * 6 * 32 * 32 * 3).val) == 6
    with pytest.raises(UsageError, match=r"--dataset .*: val is held in memory, and its 6 images.*a smaller one"):
        load_training_data(settings, 4 * 6 * 32 * 32 * 3 - 4)


@pytest.mark.parametrize("mode", ["resident", "stream"])
@pytest.mark.parametrize("form", ["images", "saved", "arrays"])
def test_images_that_nobody_asked_to_shrink(form, mode, tmp_path, config):
    def write(side):
        values = {"image": list(pixels(4, 0, side, 80)), "label": [0, 1, 0, 1]}
        kind = Array3D((side, 80, 3), "uint8") if form == "arrays" else Image()
        root = tmp_path / str(side)
        if form == "images":
            for split in ("train", "test"):
                for row, image in enumerate(values["image"]):
                    (root / split / str(row % 2)).mkdir(parents=True, exist_ok=True)
                    Picture.fromarray(image).save(root / split / str(row % 2) / f"{row}.png")
            return root
        if form == "saved":
            values["image"] = [Picture.fromarray(image) for image in values["image"]]
        table = Dataset.from_dict(values, Features({"image": kind, "label": FEATURES["label"]}))
        DatasetDict(dict.fromkeys(("train", "test"), table)).save_to_disk(root)
        return root

    large, small = write(60), write(48)
    for _ in range(2):  # nothing was kept that would pass the second time
        with pytest.raises(
            UsageError, match=r"\(the first: 80 x 60 pixels\) would be kept at 32 x 32, .*--data-size N,"
        ):
            load_training_data(config(large, data_mode=mode, val_fraction=0.5), 2**40)
    if form == "images":
        (large / "train" / "0" / "0.png").write_bytes(b"no image")
        if mode == "stream":
            with pytest.raises(UsageError, match="the first: 80 x 60 pixels"):
                load_training_data(config(large, data_mode=mode, val_fraction=0.0), 2**40)
        large = write(61)
    for size, root in ((32, large), (64, large), (None, small)):
        data = load_training_data(config(root, data_mode=mode, data_size=size, val_fraction=0.5), 2**40)
        assert data.val.images.shape[1] == (size or 32)


@pytest.mark.parametrize("val_fraction", [0.0, 0.5])
def test_other_pixels_in_files_of_the_same_names_and_sizes_are_noticed(tmp_path, config, val_fraction):
    def written(shift):
        for split in ("train", "test"):
            for number in range(4):
                folder = tmp_path / "set" / split / f"class{number % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                grey = number + shift * (number == 3)
                Picture.fromarray(np.full((8, 8, 3), grey, dtype=np.uint8)).save(folder / f"{number}.bmp")
        return load_training_data(config(tmp_path / "set", val_fraction=val_fraction), 2**40)

    before, again, after = written(0), written(0), written(100)
    assert before.fingerprint == after.fingerprint and before.split_digest == after.split_digest
    assert before.pixel_digest == again.pixel_digest != after.pixel_digest


@pytest.mark.parametrize("unwanted", [{"select_on": "test"}, {"val_fraction": 0.0}], ids=["on test", "no val"])
def test_a_split_of_the_sets_own_that_is_not_wanted_is_not_looked_at(unwanted, tmp_path, config):
    root = write_own("images", "val", tmp_path / "set")
    settings = config(root, **unwanted)
    before = load_training_data(settings, 2**40)
    (root / "dev").mkdir()
    for folder in (root / "val").iterdir():
        folder.rename(root / "val" / f"{folder.name}s")
    after = load_training_data(settings, 2**40)
    assert (after.fingerprint, after.split_digest) == (before.fingerprint, before.split_digest)
    shutil.rmtree(root / "val")
    assert load_training_data(settings, 2**40).fingerprint == before.fingerprint


def test_train_images_of_one_class(parquet_folder, config):
    values = {"image": list(pixels(4)), "label": [1, 1, 1, 1]}
    with pytest.raises(UsageError, match="all train images are of one class"):
        load_training_data(config(parquet_folder({"train": values, "test": values}, FEATURES)), 2**40)


def test_real_cifar10_test_split(real_cifar10, config):
    data = load_test_data(config(real_cifar10))
    labels = pq.read_table(next(real_cifar10.glob("*/test-*.parquet")), columns=["label"])["label"].to_pylist()
    assert data.test.images.shape == (10_000, 32, 32, 3) and data.test.labels.tolist() == labels
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    assert 118 < data.test.images.float().mean() < 123  # published: 0.4734 of 255


def test_val_that_takes_too_much_memory_is_refused(config):
    settings = config("digits", data_mode="stream", val_fraction=0.5)
    size = 719 * 32 * 32 * 3
    assert len(load_training_data(settings, 4 * size).val) == 719
    with pytest.raises(UsageError, match=r"--val-fraction 0\.5: .*its 719 images would take 2 MiB.*a smaller one"):
        load_training_data(settings, 4 * size - 4)


def test_a_set_of_unknown_size_is_counted_before_it_is_held_in_memory(cifar10_pickles, config):
    settings = config(cifar10_pickles, val_fraction=0.0)
    assert load_training_data(settings, 4 * 20 * 32 * 32 * 3).mode == "resident"
    assert load_training_data(settings, 4 * 20 * 32 * 32 * 3 - 4).mode == "stream"
