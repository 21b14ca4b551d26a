"""Small data sets in every form, made of random images."""

import os
from pathlib import Path

import pytest
from PIL import Image

from cifar_dist.config import DataConfig
from tests.data.fakes import flat, pixels, write_pickle


@pytest.fixture
def config(tmp_path):
    """Builds a DataConfig whose cache lies in the test's own folder."""

    def build(dataset, **settings):
        return DataConfig(dataset=str(dataset), cache_dir=str(tmp_path / "cache"), **settings)

    return build


@pytest.fixture
def image_folder(tmp_path):
    """train/{cat,dog}/0..3.png, test/{cat,dog}/0..1.png; the images differ."""
    root = tmp_path / "images"
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number, image in enumerate(pixels(count, seed=label)):
                Image.fromarray(image).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def cifar10_pickles(tmp_path):
    """cifar-10-batches-py with four images a batch, and the images and labels of train and test."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = pixels(24), [number % 10 for number in range(24)]
    for batch, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(batch * 4, batch * 4 + 4)
        write_pickle(folder / name, {"data": flat(images[rows]), "labels": labels[rows], "batch_label": name})
    write_pickle(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072})
    return folder


@pytest.fixture
def cifar100_pickles(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for split, seed in (("train", 1), ("test", 2)):
        fine = [(7 * number) % 100 for number in range(12)]
        coarse = [label // 5 for label in fine]
        write_pickle(folder / split, {"data": flat(pixels(12, seed)), "fine_labels": fine, "coarse_labels": coarse})
    names = {"fine_label_names": [f"f{i}" for i in range(100)], "coarse_label_names": [f"c{i}" for i in range(20)]}
    write_pickle(folder / "meta", names)
    return folder


@pytest.fixture
def parquet_folder(tmp_path):
    """Builds a folder of parquet as on the Hub from {split: {column: values}} and features."""

    def build(splits, features=None, layout="plain_text/{}-00000-of-00001.parquet"):
        import datasets

        root = tmp_path / "hub"
        for split, columns in splits.items():
            path = root / layout.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
        return root

    return build


@pytest.fixture
def real_cifar10():
    """Path of the Hub's parquet files of CIFAR-10."""
    path = os.environ.get("CIFAR_DIST_TEST_CIFAR10")
    if not path:
        pytest.skip("CIFAR_DIST_TEST_CIFAR10 is not set")
    return Path(path)
