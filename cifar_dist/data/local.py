"""Data sets on this machine, recognised by their files: parquet, image folder, saved by `datasets`, pickles."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.data.image_folder import IMAGES_A_SHARD, image_files, near_miss, open_images
from cifar_dist.data.pickles import find_layout, open_pickles
from cifar_dist.data.tables import SPLITS, VAL_NAMES, Table, contents, find_splits
from cifar_dist.errors import UsageError, first_line

if TYPE_CHECKING:
    from datasets import IterableDataset

LOCAL_FORMS = (
    "a folder of parquet files as on the Hub, cifar-10-batches-py or cifar-100-python or their tar.gz, "
    "train/CLASS/*.png|jpg with test/CLASS/..., or a DatasetDict saved by datasets"
)
_MOST_SHARDS = 256  # of a saved split: each takes datasets 2 ms to set up


@dataclass(frozen=True)
class Local:
    """The splits found in a path.

    Attributes:
        tables: the splits; one that the set brings for validation, whatever it is called there, as val.
        fingerprint: a hex digest of the names and sizes of the files behind them; the same for a copy.
        stamp: a hex digest of when these files were written; another for most copies.
    """

    tables: dict[str, Table]
    fingerprint: str
    stamp: str = ""


def open_local(path: Path, splits: Sequence[str] = SPLITS) -> Local:
    """Recognise and open the data set at `path`; no image is decoded.

    Args:
        path: a folder, or a tar file.
        splits: which it must have, but for val, which may be there. Where that is test alone, a folder of classes
            without splits is it too.

    Raises:
        UsageError: no form is recognised, a split is missing, or a file is damaged.
    """
    found = find_layout(path)
    if found is not None:
        base, layout = found
        files = [base] if base.is_file() else [base / name for name in layout.files]
        return _opened(open_pickles(base, layout), path, base.parent, files)
    if path.is_file():
        raise UsageError(f"--dataset {path}: a tar file without CIFAR's pickles in it; give {LOCAL_FORMS}.")
    if (path / "dataset_dict.json").is_file():
        return _open_saved(path, splits)
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        raise UsageError(f"--dataset {path}: one saved Dataset; save a DatasetDict with train and test.")
    parquet = _parquet_files(path)
    images = {split: image_files(path / split) for split in splits if split != "val"}
    whole = all(any(classes.values()) for classes in images.values())
    if parquet and (not whole or {"train", "test"} <= parquet.keys()):  # a table beside images may be about them
        return _open_parquet(path, parquet, splits)
    if splits == ("test",) and not images["test"] and any((plain := image_files(path)).values()):
        images = {"test": plain}
    if any(images.values()):
        tables, every = open_images(path, images, splits)
        return _opened(tables, path, path, every)
    raise UsageError(
        f"--dataset {path}: {contents(path)}, which is no form known here{near_miss(path)}; give {LOCAL_FORMS}."
    )


def _opened(tables: dict[str, Table], path: Path, base: Path, files: Iterable[Path]) -> Local:
    """The splits, identified by their files; these are named relative to `base`.

    Raises:
        UsageError: a file cannot be looked at (a link to nowhere), or has a name that is no text.
    """
    digest, times = hashlib.sha256(), hashlib.sha256()
    for file in sorted(files):
        try:
            status = file.stat()
        except OSError as error:
            raise UsageError(f"--dataset {path}: {file} cannot be read ({error.strerror}); remove it.") from None
        try:
            digest.update(f"{file.relative_to(base)}\0{status.st_size}\n".encode())
        except UnicodeEncodeError:
            name = os.fsencode(file).decode(errors="replace")
            raise UsageError(f"--dataset {path}: the name of {name} is not in UTF-8; rename it.") from None
        times.update(f"{status.st_mtime_ns}\n".encode())
    return Local(tables, digest.hexdigest(), times.hexdigest())


def _parquet_files(path: Path) -> dict[str, list[Path]]:
    """Files by split, from `path` itself or else from the only folder in it that has a train or test."""
    here = _by_split(path)
    if here:
        return here
    inside = {folder: files for folder in sorted(path.iterdir()) if (files := _by_split(folder))}
    if len(inside) > 1:
        names = ", ".join(str(folder) for folder in inside)
        raise UsageError(f"--dataset {path}: several data sets inside; give one of {names}.")
    return next(iter(inside.values()), {})


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """``train-00000-of-00001.parquet`` and ``train/0000.parquet`` by the split in their file's or folder's name."""
    splits: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("[!.]*.parquet"), *folder.glob("*/[!.]*.parquet")]):
        words = re.split(r"[-_.]", file.stem) if file.parent == folder else [file.parent.name]
        split = next((word for known in (SPLITS, VAL_NAMES) for word in words if word in known), None)
        if split is not None:
            splits.setdefault(split, []).append(file)
    return splits


def _open_parquet(path: Path, files: dict[str, list[Path]], splits: Sequence[str]) -> Local:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import IterableDataset

    names = find_splits(path, files, splits)
    tables = {}
    for split, name in names.items():
        sizes = {}
        for file in files[name]:
            try:
                sizes[file] = pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise UsageError(
                    f"--dataset {path}: {file.name} is truncated or no parquet file ({first_line(error)}); copy it"
                    " again."
                ) from None
        filled = [file for file in files[name] if sizes[file]] or files[name]
        stream, only = (partial(how, [str(file) for file in filled]) for how in (IterableDataset.from_parquet, _column))
        named = tuple((file.name, sizes[file]) for file in filled)
        try:
            tables[split] = Table(stream(), sum(sizes.values()), named, only)
        except Exception as error:  # of metadata that datasets has written, or another version of it
            if isinstance(error, OSError) and error.filename:
                raise  # of the folder that datasets makes for itself
            raise UsageError(
                f"--dataset {path}: {filled[0].name} cannot be opened by datasets ({first_line(error)}); write it"
                " again."
            ) from None
    return _opened(tables, path, path, [file for name in names.values() for file in files[name]])


def _column(files: list[str], name: str) -> IterableDataset:
    from datasets import IterableDataset

    return IterableDataset.from_parquet(files, columns=[name])


def _open_saved(path: Path, splits: Sequence[str]) -> Local:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder can fail in any way
        raise UsageError(
            f"--dataset {path}: cannot be loaded by datasets ({first_line(error)}); save it again."
        ) from None
    names = find_splits(path, saved, splits)
    tables = {}
    for split, name in names.items():
        rows = saved[name].num_rows
        shards = max(1, min(_MOST_SHARDS, rows // IMAGES_A_SHARD))
        tables[split] = Table(saved[name].with_format(None).to_iterable_dataset(num_shards=shards), rows)
    inside = [found for name in names.values() for found in os.walk(path / name)]
    files = [Path(root) / file for root, _, here in inside for file in here]
    return _opened(tables, path, path, files)
