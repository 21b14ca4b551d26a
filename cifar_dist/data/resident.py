"""Splits decoded once into uint8, kept in a cache on disk and from there resident on the device.

A cache entry is a folder that appears under its final name only when it is complete. Images of another size are
stretched to `--data-size` squares with PIL's bilinear filter, so nothing is cut off; the aspect ratio is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_dist.config import DataConfig
from cifar_dist.data.sources import Source
from cifar_dist.durable import fsync
from cifar_dist.errors import UsageError

_FORMAT = 2
_LARGEST_UNASKED = 1.5  # times --data-size: the shorter side of an image that nobody has to be asked about


@dataclass(frozen=True)
class ResidentSet:
    """A split, or part of one, in memory.

    Attributes:
        images: uint8 (N,S,S,3).
        labels: int64 (N,) in 0..K-1.
        ids: int64 (N,), row number in the source's split: the sample id.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return self.images.nbytes

    def to(self, device: torch.device | str) -> ResidentSet:
        """The same set on `device`."""
        return ResidentSet(self.images.to(device), self.labels.to(device), self.ids.to(device))

    def take(self, indices: Tensor | np.ndarray) -> ResidentSet:
        """The rows at `indices` (int64), copied; they keep their ids."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return ResidentSet(self.images[chosen], self.labels[chosen], self.ids[chosen])


def load_resident(source: Source, split: str, config: DataConfig) -> ResidentSet:
    """Load a split from the cache, decoding it first if needed; of several processes on a node one decodes.

    The images of the set are a private memory map of the cache: loading is instant, writing to them changes no file.

    Raises:
        UsageError: the data are damaged or empty, or the cache cannot be written.
    """
    from filelock import FileLock

    entry = cache_entry(source, split, config)
    try:
        if not entry.exists():
            entry.parent.mkdir(parents=True, exist_ok=True)
        found = _open(entry, source, config.pixels)
        if isinstance(found, ResidentSet):
            return _checked(found, entry, split, config)
        with FileLock(entry.with_name(entry.name + ".lock")):
            found = _open(entry, source, config.pixels)
            if isinstance(found, ResidentSet):
                return _checked(found, entry, split, config)
            if entry.exists():
                print(f"cache {entry} is damaged ({found}): decoding {split} again", file=sys.stderr, flush=True)
            _write(entry, source, split, config)
            found = _open(entry, source, config.pixels)
    except OSError as error:
        raise UsageError(
            f"--cache-dir {entry.parent}: the decoded images cannot be kept there ({error.strerror or error}); "
            "name a folder with room that can be written."
        ) from None
    if isinstance(found, str):
        raise UsageError(f"--cache-dir {entry.parent}: what was just written reads back wrong ({found}).")
    return found


def _checked(found: ResidentSet, entry: Path, split: str, config: DataConfig) -> ResidentSet:
    """What the cache holds, if it is what was asked for."""
    if split == "train":
        check_size(json.loads((entry / "first.json").read_text()), config)
    return found


def cache_entry(source: Source, split: str, config: DataConfig) -> Path:
    """Where the cache keeps a split of this source, decoded as `config` says."""
    columns, origin = source.columns, (source.fingerprint, source.stamp)
    key = (_FORMAT, origin, split, config.pixels, columns.image, columns.label, columns.class_names)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", source.name)[:40]
    name = f"{readable}-{split}-{config.pixels}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}"
    if config.cache_dir is not None:
        return Path(config.cache_dir, name)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cifar-dist", name)


def _open(entry: Path, source: Source, size: int) -> ResidentSet | str:
    """The set in a cache entry, or what is wrong with it."""
    try:
        json.loads((entry / "first.json").read_text())
        labels = np.load(entry / "labels.npy")
        expected = len(labels) * size * size * 3
        if (length := (entry / "images.u8").stat().st_size) != expected:
            return f"images.u8 has {length} bytes, not {expected}"
        if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(source.class_names):
            return "labels.npy holds other labels"
        images = np.memmap(entry / "images.u8", dtype=np.uint8, mode="c", shape=(len(labels), size, size, 3))
    except (FileNotFoundError, EOFError, ValueError) as error:
        return str(error)
    return ResidentSet(torch.from_numpy(images), torch.from_numpy(labels), torch.arange(len(labels)))


def _write(entry: Path, source: Source, split: str, config: DataConfig) -> None:
    """Decode into a temporary folder beside `entry` and rename it; the caller holds the lock.

    Raises:
        UsageError: see `Source.rows` and `check_size`; or the split is empty.
        OSError: the cache cannot be written.
    """
    for left_over in entry.parent.glob(f".tmp-{entry.name}-*"):
        shutil.rmtree(left_over)
    temporary = entry.with_name(f".tmp-{entry.name}-{socket.gethostname()}-{os.getpid()}")
    temporary.mkdir()
    try:
        _decode_into(temporary, source, split, config)
        if entry.exists():
            shutil.rmtree(entry)
        temporary.rename(entry)
        fsync(entry.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decode_into(folder: Path, source: Source, split: str, config: DataConfig) -> None:
    from tqdm import tqdm

    labels: list[int] = []
    rows = source.rows(split, lambda image: (picture_size(image), to_pixels(image, config.pixels)))
    with (folder / "images.u8").open("wb") as file:
        for (size, pixels), label in tqdm(
            rows, f"decoding {split} once", source.num_rows(split), leave=False, disable=None, unit=" images"
        ):
            if not labels:
                if split == "train":
                    check_size(size, config)
                (folder / "first.json").write_text(json.dumps(size))
            file.write(pixels.tobytes())
            labels.append(label)
    source.check_count(split, len(labels))
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    for path in (*folder.iterdir(), folder):
        fsync(path)


def picture_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def check_size(first: tuple[int, int], config: DataConfig) -> None:
    """Refuse to shrink photographs to what small pictures are kept at, unless that was asked for.

    Args:
        first: width and height of train's first image.
        config: which data.

    Raises:
        UsageError: the image is much larger than it would be kept, and no ``--data-size`` was given.
    """
    width, height = first
    if config.data_size is None and min(width, height) > _LARGEST_UNASKED * config.pixels:
        raise UsageError(
            f"--dataset {config.dataset}: its images (the first: {width} x {height} pixels) would be kept at"
            f" {config.pixels} x {config.pixels}, whatever --img-size says; give --data-size N, for instance the"
            f" model's --img-size, or {config.pixels} if that is enough."
        )


def to_pixels(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """An RGB image of any size as uint8 (S,S,3)."""
    if isinstance(image, np.ndarray) and image.shape[:2] != (size, size):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image) and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
