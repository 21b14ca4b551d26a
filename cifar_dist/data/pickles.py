"""The original CIFAR archives (Krizhevsky, 2009), folders of pickles or their tar.gz, read without running code.

The pickles go through an unpickler that admits numpy arrays and plain values only; a tar is read, never extracted.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.data.tables import Table
from cifar_dist.errors import UsageError

_SIDE = 32


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
            if any((folder / name).is_file() for name in layout.files):
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
        features[column] = ClassLabel(names=[str(name) for name in meta[names]])
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
            yield name, _unpickle(path, name, (path / name).read_bytes())
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                stored = archive.extractfile(member) if member.isfile() and name in names else None
                if stored is not None:
                    yield name, _unpickle(path, name, stored.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _unreadable_tar(path, error) from None


def _tar_names(path: Path) -> set[str]:
    try:
        with tarfile.open(path) as archive:
            return {Path(member.name).name for member in archive if member.isfile()}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _unreadable_tar(path, error) from None


def _unreadable_tar(path: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [repr(error)])[0]
    return UsageError(f"--dataset {path}: not a complete tar file ({reason}); download it again.")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 written by Python 3 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding}")
    return text.encode("latin1")


def _admitted() -> dict[tuple[str, str], Any]:
    """The callables a pickled array needs, under the names old and new numpy give them."""
    rebuild: Any = np.empty(0).__reduce__()[0]
    from_buffer: Any = np.empty(0).__reduce_ex__(5)[0]
    admitted: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):
        admitted[package + ".multiarray", "_reconstruct"] = rebuild
        admitted[package + ".numeric", "_frombuffer"] = from_buffer
    admitted["_codecs", "encode"] = _latin1
    return admitted


class _ArraysOnly(pickle.Unpickler):
    """Refuses every global but those of `_admitted`, so that no code of the file's choice is called."""

    admitted = _admitted()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.admitted[module, name]


def _unpickle(path: Path, name: str, content: bytes) -> dict[str, Any]:
    try:
        loaded = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"--dataset {path}: {name} is refused, a CIFAR pickle holds arrays and plain values only ({error}); "
            "download it again from its source."
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UsageError(f"--dataset {path}: {name} is damaged ({error!r}); download it again.") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"--dataset {path}: {name} is not a CIFAR batch; download it again.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in loaded.items()}
