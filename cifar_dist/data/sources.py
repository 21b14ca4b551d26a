"""Where images come from: the Hub, scikit-learn's digits, or a local path; all of them streamed through `datasets`."""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cifar_dist.config import DataConfig
from cifar_dist.data.digits import open_digits
from cifar_dist.data.image_folder import IMAGE_FORMS
from cifar_dist.data.local import LOCAL_FORMS, Local, open_local
from cifar_dist.data.tables import SPLITS, Columns, Table, choose_columns
from cifar_dist.distributed.node import own_cores
from cifar_dist.errors import UsageError, did_you_mean, first_line

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
NAMES = (*HUB_IDS, "digits")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_open_image` refuses these images itself
_ROWS_AT_A_TIME = 256  # that wait to be decoded, or are
_MOST_DAMAGED = 20  # images that are named at once
_SMALL_BYTES = 8192  # of an encoded image
_LOOKS_ON = 20  # times as many rows, for more of them
_HUB_TIMEOUT_SECONDS = 3.0  # for each of the client's two attempts


@dataclass(frozen=True)
class Source:
    """A data set with the splits train and test, maybe one of its own for val, opened but not decoded.

    Attributes:
        name: "cifar10", "digits", or the path's last part.
        fingerprint: hex; tells data sets apart (the Hub's revision, or local files' names and sizes).
        stamp: hex; changes when local files are written again, so that they are decoded again.
        columns: where images and labels are, and the class names.
        tables: the splits by name.
    """

    name: str
    fingerprint: str
    stamp: str
    columns: Columns
    tables: Mapping[str, Table]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; label k is the k-th."""
        return self.columns.class_names

    @property
    def has_val(self) -> bool:
        """Whether the set brings a split for validation, and it is to be used."""
        return "val" in self.tables

    def num_rows(self, split: str) -> int | None:
        """Rows of a split, where that is known without reading it."""
        return self.tables[split].num_rows

    def place(self, split: str, row: int) -> str:
        """What a message about a row starts with: the data set, the row and its file."""
        return f"--dataset {self.name}: row {row} of {split}{self.tables[split].file_of(row)}"

    def check_count(self, split: str, found: int) -> None:
        """Raise `UsageError` if a split has no rows, or another number than its files announce."""
        if not found:
            raise UsageError(f"--dataset {self.name}: the {split} split is empty; it needs images.")
        expected = self.num_rows(split)
        if expected not in (None, found):
            raise UsageError(
                f"--dataset {self.name}: {split} gave {found} rows, its files announce {expected}; copy them again."
            )

    def no_class(self, split: str, row: int, label: Any) -> UsageError:
        """What to say of a row whose label is none of the classes."""
        return UsageError(
            f"{self.place(split, row)} has the label {label}, which is outside 0..{len(self.class_names) - 1};"
            " every row needs a class (-1 marks rows without label)."
        )

    def rows(self, split: str, kept: Callable[[Image.Image | np.ndarray], Any] = lambda image: image) -> Iterator[Any]:
        """Stream a split in its own order as (what is `kept` of the image, label in 0..K-1).

        An image is in RGB, or uint8 (H,W,3). Photographs are decoded on all cores, and need not be held until their
        turn comes: `kept` is called as soon as one is decoded, in its thread.

        Raises:
            UsageError: a row cannot be read, images are damaged or no 8-bit ones (thousands more are looked at), or a
                label is no class.
        """

        def decoded(number: int, value: Any, label: int) -> tuple[Any, int] | UsageError:
            try:
                return kept(decode_image(value, partial(self.place, split, number))), label
            except UsageError as error:
                return error

        rows, damaged, looked_on, complete = self._labelled_rows(split), list[str](), 0, False
        with ThreadPoolExecutor(own_cores()) as pool:
            for some in iter(lambda: list(islice(rows, _ROWS_AT_A_TIME)), []):
                each = map if _is_small(some[0][1]) else pool.map
                for found in each(decoded, *zip(*some, strict=True)):
                    if isinstance(found, UsageError):
                        damaged.append(str(found))
                    elif not damaged:
                        yield found
                looked_on += bool(damaged)
                if len(damaged) >= _MOST_DAMAGED or looked_on >= _LOOKS_ON:
                    break
            else:
                complete = True
        if damaged:
            raise UsageError(" ".join(damaged[:_MOST_DAMAGED]) + ("" if complete else " There may be more."))

    def _labelled_rows(self, split: str) -> Iterator[tuple[int, Any, int]]:
        """Number, image (still encoded) and label of each row."""
        for number, row in enumerate(self._raw_rows(split)):
            label = row[self.columns.label]
            if label is None or not 0 <= label < len(self.class_names):
                raise self.no_class(split, number, label)
            yield number, row[self.columns.image], int(label)

    def _raw_rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Rows whose images are still encoded, so that one that fails to decode can be named."""
        import datasets

        image, label = self.columns.image, self.columns.label
        stream = self.tables[split].stream.select_columns([image, label])
        if isinstance((stream.features or {})[image], datasets.Image):
            stream = stream.cast_column(image, datasets.Image(decode=False))
        try:
            yield from stream
        except UsageError:
            raise
        except Exception as error:  # each library below has errors of its own for a damaged file
            raise UsageError(
                f"--dataset {self.name}: {split} cannot be read to its end ({first_line(error)}); copy the files again,"
                " or make their columns alike."
            ) from None


def _is_small(value: Any) -> bool:
    """Whether decoding an image takes threads longer than one alone, since most of it is Python: CIFAR's 2 kB."""
    return not isinstance(value, dict) or (value["bytes"] is not None and len(value["bytes"]) < _SMALL_BYTES)


def decode_image(value: Any, where: Callable[[], str]) -> Image.Image | np.ndarray:
    """An image in RGB: grey and palette images are converted, an alpha channel is dropped, EXIF rotation applied.

    `where` says what a message starts with, if one is needed.
    """
    if isinstance(value, np.ndarray):
        return value
    if value is None:
        raise UsageError(f"{where()} has no image; remove the row.")
    if isinstance(value, list):
        return np.asarray(value, dtype=np.uint8)
    file = f" ({value['path']})" if value.get("path") else ""
    try:
        image = _open_image(image_bytes(Path(value["path"])) if value["bytes"] is None else value["bytes"])
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
            return image.convert("RGB")
    except Exception as error:  # PIL's decoders fail in many ways
        reason = first_line(error)
        raise UsageError(f"{where()}{file} cannot be decoded ({reason}); replace or remove the image.") from None
    raise UsageError(f"{where()}{file} has more than 8 bits a channel (mode {image.mode}); save it as an 8-bit image.")


def image_bytes(file: Path) -> bytes:
    """What is in an image file; anything else, such as a device, might never end."""
    if not file.is_file():
        raise OSError(f"{file}: {'not a file' if file.exists() else 'no such file'}")
    return file.read_bytes()


def _open_image(content: bytes) -> Image.Image:
    """The decoded image, upright.

    Raises:
        Exception: it is damaged, of no form of `IMAGE_FORMS`, or has more pixels than PIL takes for an attack.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=tuple(IMAGE_FORMS))
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(IMAGE_FORMS)}") from None
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:  # up to twice as many, PIL only warns
        raise Image.DecompressionBombError(f"it has {pixels:,} pixels, {most:,} are the most that is opened")
    image.load()
    return ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image


def open_source(config: DataConfig, splits: Sequence[str] = SPLITS) -> Source:
    """Open the data set that ``--dataset`` names, which must have `splits`; nothing is decoded.

    With train comes a split that the set brings for validation, unless `config` wants no val, or another.

    Raises:
        UsageError: the name or path is unknown, the Hub cannot be reached, a split or column is missing, or a file is
            damaged.
    """
    if "train" in splits and config.select_on == "val" and config.val_fraction:
        splits = (*splits, "val")
    try:
        name, found = _open_named(config.dataset, splits)
    except OSError as error:
        raise _unwritable_cache(config.dataset, error) or _unreadable(config.dataset, error) or error from None
    for split, table in found.tables.items():
        if table.num_rows == 0:
            raise UsageError(f"--dataset {config.dataset}: the {split} split is empty; it needs images.")
    return Source(name, found.fingerprint, found.stamp, choose_columns(found.tables, config), found.tables)


def _open_named(dataset: str, splits: Sequence[str]) -> tuple[str, Local]:
    """The set's name, and its splits."""
    if dataset in HUB_IDS:
        return dataset, _open_hub(dataset)
    if dataset == "digits":
        return dataset, open_digits()
    if not dataset:
        raise UsageError(f"--dataset is empty; name one of {', '.join(NAMES)}, or a local path: {LOCAL_FORMS}.")
    path = _local_path(dataset)
    return path.resolve().name, open_local(path, splits)


def _unwritable_cache(dataset: str, error: OSError) -> UsageError | None:
    """What to say if an error is of the folder that `datasets` makes for itself, whatever it is to open."""
    import datasets

    cache, failed = Path(datasets.config.HF_DATASETS_CACHE), Path(error.filename or os.devnull)
    related = failed == cache or failed in cache.parents or cache in failed.parents
    if not related or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT):
        return None
    return UsageError(
        f"--dataset {dataset}: Hugging Face's cache {cache} cannot be written ({error.strerror}); set HF_HOME to a"
        " folder of yours."
    )


def _unreadable(dataset: str, error: OSError) -> UsageError | None:
    if error.errno not in (errno.EACCES, errno.EPERM):
        return None
    return UsageError(
        f"--dataset {dataset}: {error.filename} cannot be read ({error.strerror}); give yourself access to it."
    )


def _local_path(dataset: str) -> Path:
    try:
        path = Path(dataset)
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, a zero byte
        raise UsageError(f"--dataset {dataset:.60}: no path that can be opened ({error}).") from None
    if path.is_dir() or (path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar"))):
        return path
    if path.exists():
        raise UsageError(f"--dataset {dataset}: a file of no known form; give {LOCAL_FORMS}.")
    if os.sep in dataset or dataset.startswith((".", "~")):
        raise UsageError(f"--dataset {dataset}: no such file or folder.{did_you_mean(path.name, list(NAMES))}")
    raise UsageError(
        f"--dataset {dataset}: no such data set or path.{did_you_mean(dataset, list(NAMES))} Known are "
        f"{', '.join(NAMES)}, and local paths: {LOCAL_FORMS}."
    )


def _open_hub(name: str) -> Local:
    """The Hub's parquet files, from its cache if they are there (no request is made then), else downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo = HUB_IDS[name]
    try:
        cached = Path(snapshot_download(repo, repo_type="dataset", local_files_only=True))
        return Local(open_local(cached).tables, cached.name)
    except (LocalEntryNotFoundError, UsageError):
        pass  # nothing cached, or only a part of it
    try:
        revision = HfApi().dataset_info(repo, timeout=_HUB_TIMEOUT_SECONDS).sha
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns="*.parquet")
    except Exception as error:  # whatever goes wrong between here and the Hub has the same cure
        raise UsageError(
            f"--dataset {name}: the Hub cannot be reached ({first_line(error)}) and {repo} is not in its cache; use"
            f" `digits`, which needs no download, or a local path: {LOCAL_FORMS} (docs/data.md says where to get them)."
        ) from None
    return Local(open_local(Path(folder)).tables, Path(folder).name)
