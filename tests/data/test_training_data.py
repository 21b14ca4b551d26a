import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image

from cifar_dist.data import load_other_test_data, load_test_data, load_training_data
from cifar_dist.data.sources import Source
from cifar_dist.data.splits import stratified_split
from cifar_dist.errors import UsageError
from tests.data.fakes import pixels


@pytest.fixture
def decoded(monkeypatch):
    """The splits that were decoded, in order."""
    seen = []
    plain = Source.rows
    monkeypatch.setattr(Source, "rows", lambda self, split: (seen.append(split), plain(self, split))[1])
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


def test_train_images_of_one_class(parquet_folder, config):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    values = {"image": list(pixels(4)), "label": [1, 1, 1, 1]}
    with pytest.raises(UsageError, match="all train images are of one class"):
        load_training_data(config(parquet_folder({"train": values, "test": values}, features)), 2**40)


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
