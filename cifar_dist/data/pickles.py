"""The original CIFAR archives (Krizhevsky, 2009), folders of pickles or their tar.gz, read without running code.

The pickles go through an unpickler that knows plain values and arrays of numbers only; a tar is read, never
extracted.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cifar_dist.data.plain_pickle import Array, ArraysOnly
from cifar_dist.data.tables import Table
from cifar_dist.errors import UsageError, first_line

_SIDE = 32
_LARGEST_FILE = 256 << 20  # bytes; CIFAR's have 31 MB, CIFAR-100's 155 MB
_LARGEST_TAR = 1 << 30  # bytes of all files in it
_LARGEST_NAME = 1 << 16  # bytes of a header that holds a long name


@dataclass(frozen=True)
class Layout:
    """Names inside one archive: files of each split, and for each label column its keys in batches and meta file."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: tuple[tuple[str, str, str], ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that must be there."""
        return (*self.train, *self.test, self.meta)


LAYOUTS = (
    Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        (("label", "labels", "label_names"),),
    ),
    Layout(
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        (
            ("fine_label", "fine_labels", "fine_label_names"),
            ("coarse_label", "coarse_labels", "coarse_label_names"),
        ),
    ),
)


def find_layout(path: Path) -> tuple[Path, Layout] | None:
    """The archive that `path` (a folder, the folder above it, or a tar file) holds, if any.

    Raises:
        UsageError: `path` is a tar file that cannot be read.
    """
    if path.is_file():
        names = _tar_names(path)
        return next(((path, layout) for layout in LAYOUTS if layout.meta in names), None)
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            here = sum((folder / name).is_file() for name in layout.files)
            if here > 1 or (here and folder.name == layout.folder):
                return folder, layout
    return None


def open_pickles(path: Path, layout: Layout) -> dict[str, Table]:
    """Both splits of an archive found by `find_layout`.

    Raises:
        UsageError: files are missing, damaged, or hold anything but arrays and plain values.
    """
    from datasets import Array3D, ClassLabel, Features, IterableDataset

    present = _tar_names(path) if path.is_file() else {file.name for file in path.iterdir() if file.is_file()}
    missing = [name for name in layout.files if name not in present]
    if missing:
        what = "no test split" if missing == list(layout.test) else "an incomplete copy"
        raise UsageError(
            f"--dataset {path}: {what} of {layout.folder}: {', '.join(missing)} is missing "
            f"(there: {', '.join(sorted(present)[:12]) or 'nothing'}); unpack or download it again."
        )
    meta = dict(_read(path, (layout.meta,)))[layout.meta]
    features = Features({"image": Array3D((_SIDE, _SIDE, 3), "uint8")})
    for column, _, names in layout.labels:
        if not isinstance(meta.get(names), list):
            raise UsageError(f"--dataset {path}: {layout.meta} has no {names}; download the archive again.")
        if not all(isinstance(name, (str, bytes)) for name in meta[names]):
            raise UsageError(f"--dataset {path}: {names} of {layout.meta} are no words; download the archive again.")
        words = [name.decode("latin1") if isinstance(name, bytes) else name for name in meta[names]]
        features[column] = ClassLabel(names=words)
    return {
        split: Table(
            IterableDataset.from_generator(
                _rows, features=features, gen_kwargs={"path": path, "names": names, "labels": layout.labels}
            ),
            None,
        )
        for split, names in (("train", layout.train), ("test", layout.test))
    }


def _rows(path: Path, names: tuple[str, ...], labels: tuple[tuple[str, str, str], ...]) -> Iterator[dict[str, Any]]:
    batches = dict(_read(path, names))
    for name in names:
        batch = batches[name]
        pixels = batch.get("data")
        columns: dict[str, Any] = {column: batch.get(key) for column, key, _ in labels}
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.shape[1:] != (3 * _SIDE * _SIDE,)
            or any(not isinstance(values, list) or len(values) != len(pixels) for values in columns.values())
        ):
            raise UsageError(f"--dataset {path}: {name} does not hold CIFAR images and labels; download it again.")
        images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        for row, image in enumerate(images):
            yield {"image": image, **{column: values[row] for column, values in columns.items()}}


def _read(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The unpickled files called `names`, in the order they are stored."""
    if path.is_dir():
        for name in names:
            if (size := (path / name).stat().st_size) > _LARGEST_FILE:
                raise _too_large(path, name, size)
            yield name, _unpickle(path, name, (path / name).read_bytes())
        return
    for archive, member in _members(path):
        name = PurePosixPath(member.name).name
        stored = archive.extractfile(member) if name in names else None
        if stored is not None:
            yield name, _unpickle(path, name, stored.read())


def _tar_names(path: Path) -> set[str]:
    return {PurePosixPath(member.name).name for _, member in _members(path)}


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The plain files of a tar, gzipped or not; links and devices are passed over.

    Raises:
        UsageError: it is no whole tar, leads out of itself, or unpacks to more than any CIFAR has.
    """
    total = 0
    try:
        with path.open("rb") as file:
            mode = "r:gz" if file.read(2) == b"\x1f\x8b" else "r:"
        with tarfile.open(path, mode, tarinfo=_BoundedHeader) as archive:  # type: ignore[call-overload]
            for member in archive:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts:
                    raise UsageError(
                        f"--dataset {path}: the tar is refused, {member.name} in it leads out of its folder; "
                        "download it again from its source."
                    )
                total += max(member.size, 0) + tarfile.BLOCKSIZE
                if member.size > _LARGEST_FILE or total > _LARGEST_TAR:
                    raise _too_large(path, member.name, max(member.size, total))
                if member.isfile():
                    yield archive, member
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _unreadable_tar(path, error) from None


class _BoundedHeader(tarfile.TarInfo):
    """tarfile reads headers with long names whole before it gives out their member, so their size is looked at here."""

    @classmethod
    def frombuf(cls, *arguments: Any, **settings: Any) -> Any:
        header = super().frombuf(*arguments, **settings)
        if header.type not in tarfile.SUPPORTED_TYPES and header.size > _LARGEST_FILE:
            raise tarfile.ReadError(f"a member of unknown kind with {header.size:,} bytes")
        if header.type in _NAME_HEADERS and header.size > _LARGEST_NAME:
            raise tarfile.ReadError(f"a name of {header.size:,} bytes")
        return header


_NAME_HEADERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


def _too_large(path: Path, name: str, size: int) -> UsageError:
    return UsageError(
        f"--dataset {path}: {name} is refused, with {size >> 20:,} MiB it is larger than any CIFAR's; "
        "download it again from its source."
    )


def _unreadable_tar(path: Path, error: Exception) -> UsageError:
    reason = first_line(error)
    return UsageError(f"--dataset {path}: not a complete tar file ({reason}); download it again.")


def _unpickle(path: Path, name: str, content: bytes) -> dict[str, Any]:
    try:
        loaded = ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"--dataset {path}: {name} is refused, a CIFAR pickle holds arrays and plain values only ({error}); "
            "download it again from its source."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UsageError(f"--dataset {path}: {name} is damaged ({error!r:.200}); download it again.") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"--dataset {path}: {name} is not a CIFAR batch; download it again.")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): (
            value.content if isinstance(value, Array) else value
        )
        for key, value in loaded.items()
    }
