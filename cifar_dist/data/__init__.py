"""Images and labels for training and for the final evaluation.

`load_training_data` never reads the test split unless `--select-on test` asks for it; `load_test_data` reads nothing
else. A set that does not fit in memory is streamed (`stream`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cifar_dist.config import DataConfig
from cifar_dist.data.arrays import arrays_fingerprint, find_arrays, load_arrays
from cifar_dist.data.resident import ResidentSet, check_size, load_resident, picture_size
from cifar_dist.data.sources import Source, open_source
from cifar_dist.data.splits import stratified_split
from cifar_dist.data.stream import StreamSet, open_stream
from cifar_dist.errors import UsageError


@dataclass(frozen=True)
class TrainingData:
    """What training may see.

    `num_test` is None where the test split would have to be read to count it; `own_val`: val is a split that the set
    brought, not a part of train.
    """

    train: ResidentSet | StreamSet
    val: ResidentSet | None
    class_names: tuple[str, ...]
    name: str
    fingerprint: str
    num_test: int | None
    own_val: bool = False

    def lines(self) -> list[str]:
        """What the plan is to say besides, a fact a line."""
        said = [
            "val         is the data set's own split, so train is whole; --val-fraction and --split-seed have no effect"
        ]
        there = set(self.train.labels.unique().tolist())
        empty = [name for number, name in enumerate(self.class_names) if number not in there]
        named = f"{', '.join(empty[:10])}{', …' if len(empty) > 10 else ''}"
        return said * self.own_val + [f"note        train has no images of {named}"] * bool(empty)

    @property
    def mode(self) -> str:
        """How train is held: resident or stream."""
        return "resident" if isinstance(self.train, ResidentSet) else "stream"

    @property
    def split_digest(self) -> str:
        """12 hexadecimal digits that differ when another row, or label, is in train or in val."""
        digest = hashlib.sha256()
        for split in (self.train, self.val):
            if split is not None:
                digest.update(split.ids.cpu().numpy().tobytes() + split.labels.cpu().numpy().tobytes() + b"/")
        return digest.hexdigest()[:12]

    @property
    def pixel_digest(self) -> str | None:
        """12 hexadecimal digits that differ when a pixel of train or val does; None where train is streamed."""
        if self.mode == "stream":
            return None
        digest = hashlib.sha256()
        for split in (self.train, self.val):
            if isinstance(split, ResidentSet):
                digest.update(split.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:12]

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's folder records of its data."""
        return {
            "data_fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "train_val_split": self.split_digest,
            "pixel_digest": self.pixel_digest,
            "data_mode": self.mode,
        }


@dataclass(frozen=True)
class TestData:
    """The test split, scored once at the end; `files` names each image's, where it has one of its own."""

    __test__ = False  # no test class of pytest

    test: ResidentSet
    class_names: tuple[str, ...]
    name: str
    fingerprint: str
    files: tuple[str, ...] = ()


def load_training_data(config: DataConfig, device_bytes: int) -> TrainingData:
    """Load train, or open it as a stream, and val (None for ``--val-fraction 0``).

    val is the data set's own split for that, or else set apart from train. With ``--select-on test`` it is the test
    split and train is whole, as in the studies this reproduces. It is resident in any case.

    Args:
        config: which data.
        device_bytes: memory of the device; ``--data-mode auto`` streams what takes more than a quarter of it.

    Raises:
        UsageError: the data cannot be used; the message names the flag and the cure.
    """
    source = open_source(config)
    streams = config.data_mode == "stream" or (config.data_mode == "auto" and not _fits(source, config, device_bytes))
    if config.skip_corrupt and not streams:
        raise UsageError(f"--skip-corrupt {config.skip_corrupt} works with --data-mode stream only; add that.")
    train = open_stream(source, "train", config) if streams else load_resident(source, "train", config)
    if isinstance(train, StreamSet) and config.data_size is None and (first := train.first_picture()) is not None:
        check_size(picture_size(first), config)
    if len(train.labels.unique()) < 2:
        raise UsageError(f"--dataset {config.dataset}: all train images are of one class; it needs at least two.")
    val: ResidentSet | None = None
    names, num_test = source.class_names, source.num_rows("test")
    if config.select_on == "test":
        val = load_resident(source, "test", config)
    elif source.has_val:
        if streams:
            _refuse_large_val(source.num_rows("val") or 0, f"--dataset {config.dataset}", config, device_bytes)
        val = load_resident(source, "val", config)
    elif config.val_fraction:
        labels = train.labels.numpy()
        in_train, in_val = stratified_split(labels, config.val_fraction, config.split_seed, names)
        if streams:
            _refuse_large_val(len(in_val), f"--val-fraction {config.val_fraction}", config, device_bytes)
        val = train.take(in_val) if isinstance(train, ResidentSet) else train.take_resident(in_val)
        train = train.take(in_train)
    return TrainingData(train, val, names, source.name, source.fingerprint, num_test, source.has_val)


def _refuse_large_val(rows: int, where: str, config: DataConfig, device_bytes: int) -> None:
    if _bytes(rows, config) > device_bytes / 4:
        raise UsageError(
            f"{where}: val is held in memory, and its {rows} images would take"
            f" {_bytes(rows, config) / 2**20:,.0f} MiB, more than a quarter of the"
            f" {device_bytes / 2**20:,.0f} MiB there are; give a smaller one."
        )


def _fits(source: Source, config: DataConfig, device_bytes: int) -> bool:
    rows = source.num_rows("train")
    if rows is None:  # their labels tell, which are read once and kept in the cache
        rows = len(open_stream(source, "train", config))
    return _bytes(rows, config) <= device_bytes / 4


def _bytes(rows: int, config: DataConfig) -> int:
    """What so many decoded images take."""
    return rows * config.pixels**2 * 3


def load_test_data(config: DataConfig) -> TestData:
    """Load the test split.

    Raises:
        UsageError: the data cannot be used; the message names the flag and the cure.
    """
    source = open_source(config)
    images, paths = load_resident(source, "test", config), source.tables["test"].paths
    return TestData(images, source.class_names, source.name, source.fingerprint, paths)


def load_val_data(config: DataConfig) -> ResidentSet | None:
    """Load the val that training chose by; None where it chose by test, or had none.

    Raises:
        UsageError: the data cannot be used; the message names the flag and the cure.
    """
    if config.select_on == "test" or not config.val_fraction:
        return None
    source = open_source(config)
    if source.has_val:
        return load_resident(source, "val", config)
    streams = config.data_mode == "stream"
    train = open_stream(source, "train", config) if streams else load_resident(source, "train", config)
    chosen = stratified_split(train.labels.numpy(), config.val_fraction, config.split_seed)[1]
    return train.take(chosen) if isinstance(train, ResidentSet) else train.take_resident(chosen)


def data_fingerprint(config: DataConfig, other: str | None = None) -> str:
    """The fingerprint of a run's data, or of another set's test split; nothing is decoded.

    Raises:
        UsageError: the data cannot be opened.
    """
    if other is not None and (files := find_arrays(Path(other))) is not None:
        return arrays_fingerprint(files)
    return open_source(config).fingerprint if other is None else _open_other(config, other).fingerprint


def _open_other(config: DataConfig, dataset: str) -> Source:
    """Another set, by the run's columns where it has them."""
    named = replace(config, dataset=dataset)
    found = replace(named, image_column=None, label_column=None)
    if named != found:
        with suppress(UsageError):
            return open_source(named, ("test",))
    try:
        return open_source(found, ("test",))
    except UsageError as error:
        message = (
            str(error)
            .replace("--dataset", "--data")
            .replace("or a DatasetDict", "CLASS/*.png, *_data.npy with *_labels.npy, or a DatasetDict")
        )
        raise UsageError(message) from None


def load_other_test_data(dataset: str, config: DataConfig, class_names: Sequence[str]) -> TestData:
    """Load another set to score, with labels as numbers of `class_names`.

    It may be anything with a test split, a folder of class folders, or CIFAR-10.1's pair of NumPy files.

    Args:
        dataset: what ``--data`` names.
        config: of the run, for the images' size and the cache.
        class_names: of the run; the set may have fewer of them, in any order.

    Raises:
        UsageError: the set has other classes, or cannot be used.
    """
    if (files := find_arrays(Path(dataset))) is not None:
        images = load_arrays(files, config.pixels, class_names)
        return TestData(images, tuple(class_names), Path(dataset).resolve().name, arrays_fingerprint(files))
    source = _open_other(config, dataset)
    try:
        images = load_resident(source, "test", config)
    except UsageError as error:
        raise UsageError(str(error).replace("--dataset", "--data")) from None
    others = sorted(set(source.class_names) - set(class_names))
    if others:
        raise UsageError(
            f"--data {dataset} has the classes {', '.join(others[:5])}{', …' if len(others) > 5 else ''}, which the run"
            f" has not (it has {', '.join(class_names[:10])}{', …' if len(class_names) > 10 else ''}); rename or"
            " remove them."
        )
    numbers = torch.tensor([list(class_names).index(name) for name in source.class_names])
    images = replace(images, labels=numbers[images.labels])
    return TestData(images, tuple(class_names), source.name, source.fingerprint, source.tables["test"].paths)
