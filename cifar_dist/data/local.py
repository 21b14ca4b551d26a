"""Data sets on this machine, recognised by their files: parquet, image folder, saved by `datasets`, pickles."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.data.pickles import find_layout, open_pickles
from cifar_dist.data.tables import SPLITS, VAL_NAMES, Table
from cifar_dist.errors import UsageError

if TYPE_CHECKING:
    from datasets import IterableDataset

LOCAL_FORMS = (
    "a folder of parquet files as on the Hub, cifar-10-batches-py or cifar-100-python or their tar.gz, "
    "train/CLASS/*.png|jpg with test/CLASS/..., or a DatasetDict saved by datasets"
)
IMAGE_FORMS = {  # what PIL may read, for it starts a program for some others; with the suffixes of files
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMS.values() for suffix in suffixes)
# Rows often lie class by class, so a stream mixes them only as far as it has shards to read in another order.
_IMAGES_A_SHARD = 16
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
    if parquet:
        return _open_parquet(path, parquet, splits)
    images = {split: _image_files(path / split) for split in splits if split != "val"}
    if splits == ("test",) and not images["test"] and any((plain := _image_files(path)).values()):
        images = {"test": plain}
    if any(images.values()):
        return _open_images(path, images, splits)
    raise UsageError(f"--dataset {path}: {_contents(path)}, which is no form known here; give {LOCAL_FORMS}.")


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
                f"--dataset {path}: no {split} split (splits: {', '.join(present) or 'none'}; {_contents(path)}); "
                f"it needs {' and '.join(needed)}{cure}."
            )
    found = {split: split for split in needed}
    if "val" not in splits or not own_val:
        return found
    if len(own_val) > 1:
        raise UsageError(f"--dataset {path}: {' and '.join(own_val)} are both for validation; keep one of them.")
    return found | {"val": own_val[0]}


def _contents(path: Path) -> str:
    names = sorted(file.name for file in path.iterdir())
    return f"the folder holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "an empty folder"


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
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]):
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
                reason = str(error).splitlines()[0]
                raise UsageError(
                    f"--dataset {path}: {file.name} is truncated or no parquet file ({reason}); copy it again."
                ) from None
        filled = [file for file in files[name] if sizes[file]] or files[name]
        stream, only = (partial(how, [str(file) for file in filled]) for how in (IterableDataset.from_parquet, _column))
        named = tuple((file.name, sizes[file]) for file in filled)
        tables[split] = Table(stream(), sum(sizes.values()), named, only)
    return _opened(tables, path, path, [file for name in names.values() for file in files[name]])


def _column(files: list[str], name: str) -> IterableDataset:
    from datasets import IterableDataset

    return IterableDataset.from_parquet(files, columns=[name])


def _image_files(folder: Path) -> dict[Path, list[Path]]:
    """Image files of each class, a folder of `folder`; classes and files in the order of their names."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        entry: sorted(file for file in entry.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)
        for entry in entries
        if entry.is_dir() and not entry.name.startswith((".", "__"))  # __MACOSX
    }


def _image_rows(chunks: list[tuple[tuple[int, str], ...]]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        for label, file in chunk:
            yield {"image": {"path": file, "bytes": None}, "label": label}


def _open_images(path: Path, images: dict[str, dict[Path, list[Path]]], splits: Sequence[str]) -> Local:
    from datasets import ClassLabel, Features, Image, IterableDataset

    own_val = [name for name in VAL_NAMES if (path / name).is_dir()]
    names = find_splits(path, [*(split for split in images if images[split]), *own_val], splits)
    if "val" in names:
        images["val"] = _image_files(path / names["val"])
    tables = {}
    for split, classes in images.items():
        if not classes:
            raise UsageError(
                f"--dataset {path}: {names[split]} has no folders of classes, as train has; sort its images into some,"
                " or rename it (val is then cut from train)."
            )
        _refuse_deeper(path, classes)
        filled = {folder: files for folder, files in classes.items() if files}
        empty = [str(folder.relative_to(path)) for folder in classes if folder not in filled]
        if empty and (split == "train" or not filled):  # what is only scored may lack classes
            raise UsageError(
                f"--dataset {path}: no image lies directly in {empty[0]} ({', '.join(_IMAGE_SUFFIXES)}); a folder is a"
                " class, so put its images there, or remove it."
            )
        features = Features({"image": Image(), "label": ClassLabel(names=[folder.name for folder in filled])})
        rows = [(label, str(file)) for label, files in enumerate(filled.values()) for file in files]
        chunks = [tuple(rows[first : first + _IMAGES_A_SHARD]) for first in range(0, len(rows), _IMAGES_A_SHARD)]
        stream = IterableDataset.from_generator(_image_rows, features=features, gen_kwargs={"chunks": chunks})
        inside = ((folder.relative_to(path), files) for folder, files in filled.items())
        paths = tuple(f"{folder}/{file.name}" for folder, files in inside for file in files)
        tables[split] = Table(stream, len(rows), paths=paths)
    every = [file for classes in images.values() for files in classes.values() for file in files]
    return _opened(tables, path, path, every)


def _refuse_deeper(path: Path, classes: Iterable[Path]) -> None:
    """Raise `UsageError` if a class's images lie in folders of their own, where they would not be seen."""
    for folder in classes:
        with os.scandir(folder) as entries:
            inner = [Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__"))]
        deeper = [file for each in inner for file in each.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES]
        if deeper:
            raise UsageError(
                f"--dataset {path}: {folder.relative_to(path)} has images in folders within it"
                f" ({min(deeper).relative_to(path)}, {len(deeper):,} in all); a class's images lie directly in its"
                " folder, so move them up, or remove them."
            )


def _open_saved(path: Path, splits: Sequence[str]) -> Local:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder can fail in any way
        reason = str(error).splitlines()[0]
        raise UsageError(f"--dataset {path}: cannot be loaded by datasets ({reason}); save it again.") from None
    names = find_splits(path, saved, splits)
    tables = {}
    for split, name in names.items():
        rows = saved[name].num_rows
        shards = max(1, min(_MOST_SHARDS, rows // _IMAGES_A_SHARD))
        tables[split] = Table(saved[name].to_iterable_dataset(num_shards=shards), rows)
    inside = [found for name in names.values() for found in os.walk(path / name)]
    files = [Path(root) / file for root, _, here in inside for file in here]
    return _opened(tables, path, path, files)
