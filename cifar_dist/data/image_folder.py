"""Folders of images: ``train/CLASS/*.png``, ``test/CLASS/*.png``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_dist.data.tables import SPLITS, VAL_NAMES, Table, find_splits
from cifar_dist.errors import UsageError

IMAGE_FORMS = {  # what PIL may read, for it starts a program for some others; with the suffixes of files
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMS.values() for suffix in suffixes)
# Rows often lie class by class, so a stream mixes them only as far as it has shards to read in another order.
IMAGES_A_SHARD = 16


def image_files(folder: Path) -> dict[Path, list[Path]]:
    """Image files of each class, a folder of `folder`; classes and files in the order of their names."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        entry: sorted(
            file
            for file in entry.iterdir()
            if file.suffix.lower() in _SUFFIXES and not file.name.startswith("._")  # macOS's, no images
        )
        for entry in entries
        if entry.is_dir() and not _is_no_class(entry.name)
    }


def _is_no_class(name: str) -> bool:
    """Whether a folder is one that programs leave behind."""
    return name.startswith(".") or name in ("__MACOSX", "__pycache__")


def _image_rows(chunks: list[tuple[tuple[int, str], ...]]) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        for label, file in chunk:
            yield {"image": {"path": file, "bytes": None}, "label": label}


def open_images(
    path: Path, images: dict[str, dict[Path, list[Path]]], splits: Sequence[str]
) -> tuple[dict[str, Table], list[Path]]:
    """The splits of a folder of images, and all of its files.

    Args:
        path: the folder.
        images: of each of its splits but val, as `image_files` finds them.
        splits: which it must have, but for val, which may be there.

    Raises:
        UsageError: a split is missing, or there are images where they would not be seen.
    """
    from datasets import ClassLabel, Features, Image, IterableDataset

    own_val = [name for name in VAL_NAMES if (path / name).is_dir()]
    names = find_splits(path, [*(split for split in images if images[split]), *own_val], splits)
    if "val" in names:
        images["val"] = image_files(path / names["val"])
    tables = {}
    for split, classes in images.items():
        if not classes:
            raise UsageError(
                f"--dataset {path}: {names[split]} has no folders of classes, as train has; sort its images into some,"
                " or rename it (val is then cut from train)."
            )
        _refuse_strays(path, next(iter(classes)).parent, classes)
        filled = {folder: files for folder, files in classes.items() if files}
        empty = [str(folder.relative_to(path)) for folder in classes if folder not in filled]
        if empty and (split == "train" or not filled):  # what is only scored may lack classes
            raise UsageError(
                f"--dataset {path}: no image lies directly in {empty[0]} ({', '.join(_SUFFIXES)}); a folder is a"
                " class, so put its images there, or remove it."
            )
        features = Features({"image": Image(), "label": ClassLabel(names=[folder.name for folder in filled])})
        rows = [(label, str(file)) for label, files in enumerate(filled.values()) for file in files]
        chunks = [tuple(rows[first : first + IMAGES_A_SHARD]) for first in range(0, len(rows), IMAGES_A_SHARD)]
        stream = IterableDataset.from_generator(_image_rows, features=features, gen_kwargs={"chunks": chunks})
        inside = ((folder.relative_to(path), files) for folder, files in filled.items())
        paths = tuple(f"{folder}/{file.name}" for folder, files in inside for file in files)
        tables[split] = Table(stream, len(rows), paths=paths)
    every = [file for classes in images.values() for files in classes.values() for file in files]
    return tables, every


def _refuse_strays(path: Path, split: Path, classes: Iterable[Path]) -> None:
    """Raise `UsageError` if images lie beside the folders of classes, or within folders in them, and are not seen."""
    loose = [file.name for file in split.glob("[!.]*") if file.suffix.lower() in _SUFFIXES and file.is_file()]
    if loose:
        raise UsageError(
            f"--dataset {path}: {split.name} has images beside its folders of classes ({min(loose)}, {len(loose):,} in"
            " all); sort them into these, or remove them."
        )
    for folder in classes:
        with os.scandir(folder) as entries:
            inner = [Path(entry) for entry in entries if entry.is_dir() and not _is_no_class(entry.name)]
        deeper = [file for each in inner for file in each.rglob("[!.]*") if file.suffix.lower() in _SUFFIXES]
        if deeper:
            raise UsageError(
                f"--dataset {path}: {folder.relative_to(path)} has images in folders within it"
                f" ({min(deeper).relative_to(path)}, {len(deeper):,} in all); a class's images lie directly in its"
                " folder, so move them up, or remove them."
            )


def near_miss(path: Path) -> str:
    """What a folder of images is, if it is nearly one that can be used."""
    folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    for inner in folders:
        if any(image_files(inner / split) for split in SPLITS):
            return f" ({inner} looks like one: give that)"
    named = [folder.name for folder in folders if folder.name.lower() in SPLITS]
    if named:
        return f" (write {' and '.join(named)} in small letters)"
    classes = sum(any(files) for files in image_files(path).values())
    return f" ({classes} folders with images: set some apart as test, docs/data.md shows how)" if classes else ""
