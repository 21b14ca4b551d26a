"""A test set as two NumPy files, as CIFAR-10.1 (Recht et al., 2018) is published: images and class numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cifar_dist.data.resident import ResidentSet
from cifar_dist.errors import UsageError, first_line


def find_arrays(folder: Path) -> tuple[Path, Path] | None:
    """The only ``*_data.npy`` of a folder with its ``*_labels.npy``, or None.

    Raises:
        UsageError: there are several.
    """
    images = sorted(folder.glob("*_data.npy")) if folder.is_dir() else []
    if len(images) > 1:
        names = ", ".join(path.name for path in images)
        raise UsageError(f"--data {folder}: several sets inside ({names}); leave one with its labels.")
    labels = [path.with_name(path.name.replace("_data.npy", "_labels.npy")) for path in images]
    return (images[0], labels[0]) if labels and labels[0].is_file() else None


def arrays_fingerprint(files: tuple[Path, Path]) -> str:
    """Hex: names and sizes of the files."""
    return hashlib.sha256("".join(f"{path.name} {path.stat().st_size}\n" for path in files).encode()).hexdigest()


def load_arrays(files: tuple[Path, Path], size: int, class_names: Sequence[str]) -> ResidentSet:
    """Images uint8 (N,size,size,3) and labels (N,) that are numbers of `class_names`.

    Raises:
        UsageError: a file is damaged, or of another shape or type; nothing in it is unpickled.
    """
    try:
        images, labels = (np.array(np.lib.format.open_memmap(path, mode="r")) for path in files)
    except Exception as error:  # a damaged file fails in many ways
        raise UsageError(f"--data {files[0].parent}: the arrays cannot be read ({first_line(error)}).") from None
    if labels.dtype.kind not in "iu":
        raise UsageError(f"--data {files[1]}: labels must be whole numbers, these are {labels.dtype}.")
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"--data {files[0]}: uint8 {(*images.shape[:1], size, size, 3)} with as many labels is needed, it is"
            f" {images.dtype} {images.shape} with labels {labels.shape}."
        )
    numbers = torch.from_numpy(labels.astype(np.int64))
    if len(numbers) == 0 or numbers.min() < 0 or numbers.max() >= len(class_names):
        raise UsageError(f"--data {files[1]}: labels must be numbers from 0 to {len(class_names) - 1}.")
    return ResidentSet(torch.from_numpy(images), numbers, torch.arange(len(numbers)))
