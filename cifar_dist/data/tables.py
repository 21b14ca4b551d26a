"""One split as `datasets` streams it, and which of its columns hold images and labels (by feature type, not name)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import DataConfig
from cifar_dist.errors import UsageError, did_you_mean, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import IterableDataset

SPLITS = ("train", "test")
VAL_NAMES = ("val", "valid", "validation", "dev")
_MOST_CLASSES = 100_000  # of plain numbers, in a set that has fewer rows; above are ids


@dataclass(frozen=True)
class Table:
    """A split.

    Attributes:
        stream: its rows.
        num_rows: their number, where that is known without reading them.
        files: name and rows of each file, in the order of the stream, where rows lie in files of many.
        only: makes the same stream of one column, where that saves reading the others.
        paths: each row's file, as named in the set, where a file is one image.
    """

    stream: IterableDataset
    num_rows: int | None
    files: tuple[tuple[str, int], ...] = ()
    only: Callable[[str], IterableDataset] | None = None
    paths: tuple[str, ...] = ()

    def column(self, name: str) -> IterableDataset:
        """The stream of one column."""
        return self.only(name) if self.only else self.stream.select_columns([name])

    def file_of(self, row: int) -> str:
        """`` (row 5 of train-00001-of-00002.parquet)`` for row number `row` of the split; empty if no file is known."""
        for name, rows in self.files:
            if row < rows:
                return f" (row {row} of {name})"
            row -= rows
        return ""


@dataclass(frozen=True)
class Columns:
    """The columns of images and labels, and the labels' class names."""

    image: str
    label: str
    class_names: tuple[str, ...]


def find_splits(path: Path, present: Iterable[str], splits: Sequence[str]) -> dict[str, str]:
    """What `splits` are called among those that are `present`, without val if there is none.

    Raises:
        UsageError: one is missing, or several could be val.
    """
    present = list(present)
    own_val = [name for name in VAL_NAMES if name in present]
    needed = [split for split in splits if split != "val"]
    for split in needed:
        if split not in present:
            rename = f"rename {own_val[0]} to test (val is then cut from train), or " if own_val else ""
            cure = f": {rename}set images of train apart as test" if split == "test" and "train" in present else ""
            raise UsageError(
                f"--dataset {path}: no {split} split (splits: {', '.join(present) or 'none'}; {contents(path)}); "
                f"it needs {' and '.join(needed)}{cure}."
            )
    found = {split: split for split in needed}
    if "val" not in splits or not own_val:
        return found
    if len(own_val) > 1:
        raise UsageError(f"--dataset {path}: {' and '.join(own_val)} are both for validation; keep one of them.")
    return found | {"val": own_val[0]}


def contents(path: Path) -> str:
    """What lies in a folder, for a message."""
    names = sorted(file.name for file in path.iterdir())
    return f"the folder holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "an empty folder"


def choose_columns(tables: Mapping[str, Table], config: DataConfig) -> Columns:
    """The only image column and the class-label column with the most classes, unless flags name others.

    Of a set to be scored, which may have no train split and images of one class only, test alone decides.

    Raises:
        UsageError: a named column is not there or of another type, none or several would do, another split differs
            from train, or there is only one class.
    """
    main = tables["train" if "train" in tables else "test"]
    features = dict(main.stream.features or {})
    image = _named(config.image_column, "--image-column", features, "images", _is_image)
    image = image or _only_image(features, config)
    label = _named(config.label_column, "--label-column", features, "labels", _is_label)
    label = label or _main_label(features, config)
    names = _class_names(main, label, config)
    if "train" not in tables:
        return Columns(image, label, names)
    found = Columns(image, label, names)
    for split, table in tables.items():
        if split != "train":
            _check_like_train(split, table, found, config)
    if len(names) < 2:
        raise UsageError(f"--dataset {config.dataset}: {label!r} has only one class; a classifier needs at least two.")
    return found


def _check_like_train(split: str, table: Table, train: Columns, config: DataConfig) -> None:
    """Raise `UsageError` unless a split has train's columns, and its class names in the same order."""
    from datasets import ClassLabel

    features = dict(table.stream.features or {})
    for column in (train.image, train.label):
        if column not in features:
            raise UsageError(
                f"--dataset {config.dataset}: {split} lacks the column {column!r} of train; it has {_listed(features)}."
            )
    for column, fits, what in ((train.image, _is_image, "images"), (train.label, _is_label, "labels")):
        if not fits(features[column]):
            raise UsageError(
                f"--dataset {config.dataset}: the column {column!r} of {split} does not hold {what}, as train's does;"
                f" it has {_listed(features)}."
            )
    label = features[train.label]
    if not isinstance(label, ClassLabel) or list(train.class_names) == label.names:
        return
    ours, theirs = set(train.class_names), set(label.names)
    lonely = {"train": sorted(ours - theirs), split: sorted(theirs - ours)}
    found = [f"only in {where}: {', '.join(names[:5])}" for where, names in lonely.items() if names]
    raise UsageError(
        f"--dataset {config.dataset}: train and {split} have different classes "
        f"({'; '.join(found) or 'the same names in another order'}); give both the same ones."
    )


def _is_image(feature: Any) -> bool:
    from datasets import Array3D, Image

    pixels = isinstance(feature, Array3D) and feature.dtype == "uint8" and feature.shape[-1] == 3
    return isinstance(feature, Image) or pixels or (isinstance(feature, dict) and "bytes" in feature)


def _is_label(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _named(name: str | None, flag: str, features: dict[str, Any], what: str, fits: Any) -> str | None:
    if name is None or (name in features and fits(features[name])):
        return name
    if name in features:
        raise UsageError(f"{flag} {name}: the column does not hold {what}; the data set has {_listed(features)}.")
    near = did_you_mean(name, list(features))
    raise UsageError(f"{flag} {name}: no such column; the data set has {_listed(features)}.{near}")


def _only_image(features: dict[str, Any], config: DataConfig) -> str:
    images = [name for name, feature in features.items() if _is_image(feature)]
    if len(images) == 1:
        return images[0]
    what = "several columns of images; choose one with --image-column" if images else "no column of images"
    raise UsageError(f"--dataset {config.dataset}: {what} (it has {_listed(features)}).")


def _main_label(features: dict[str, Any], config: DataConfig) -> str:
    from datasets import ClassLabel

    sizes = {name: feature.num_classes for name, feature in features.items() if isinstance(feature, ClassLabel)}
    best = [name for name, size in sizes.items() if size == max(sizes.values())]
    best = best or [name for name, feature in features.items() if _is_label(feature)]
    if len(best) == 1:
        return best[0]
    what = "several columns could be the label" if best else "no column of class labels"
    raise UsageError(f"--dataset {config.dataset}: {what}; name one with --label-column (it has {_listed(features)}).")


def _class_names(train: Table, label: str, config: DataConfig) -> tuple[str, ...]:
    """The feature's names; for plain whole numbers, 0 to the largest one in train."""
    from datasets import ClassLabel

    feature = (train.stream.features or {})[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    try:
        parts = list(map(_rows_and_largest, train.column(label).with_format("arrow").iter(65536)))
    except Exception as error:  # a missing label, or a damaged file, which each library reports in its own way
        reason = first_line(error)
        raise UsageError(f"--dataset {config.dataset}: labels {label!r} cannot be read ({reason}).") from None
    rows, largest = sum(part[0] for part in parts), max((part[1] for part in parts), default=-1)
    if largest >= max(rows, _MOST_CLASSES):
        raise UsageError(
            f"--dataset {config.dataset}: the column {label!r} goes up to {largest:,} in {rows:,} rows, so it holds no"
            " numbers of classes from 0 on; name another with --label-column, or number the classes."
        )
    return tuple(str(number) for number in range(largest + 1))


def _rows_and_largest(labels: pa.Table) -> tuple[int, int]:
    import pyarrow.compute

    if labels.column(0).null_count:
        raise ValueError("a label is missing")
    return labels.num_rows, pyarrow.compute.max(labels.column(0)).as_py()


def _listed(features: dict[str, Any]) -> str:
    """``img (Image), label (ClassLabel of 10)``."""
    from datasets import ClassLabel, Value

    def kind(feature: Any) -> str:
        if isinstance(feature, ClassLabel):
            return f"ClassLabel of {feature.num_classes}"
        return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items()) or "no columns"
