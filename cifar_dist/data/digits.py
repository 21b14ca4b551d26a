"""scikit-learn's handwritten digits, which need no download, as a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from cifar_dist.data.local import Local
from cifar_dist.data.splits import stratified_split
from cifar_dist.data.tables import SPLITS, Table

_SIDE = 32
_TEST_FRACTION = 0.2
_SPLIT_SEED = 0


def open_digits() -> Local:
    """1,797 handwritten digits of scikit-learn (UCI, 1998), 8 x 8 and 17 greys, drawn at 32 x 32; a fifth is test."""
    from datasets import ClassLabel, Features, IterableDataset
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    num_test = round(1797 * _TEST_FRACTION)
    sizes = {"train": 1797 - num_test, "test": num_test}

    def table(split: str) -> Table:
        stream: IterableDataset = IterableDataset.from_generator(
            _digit_rows, features=features, gen_kwargs={"part": SPLITS.index(split)}
        )
        return Table(stream, sizes[split])

    return Local({split: table(split) for split in SPLITS}, hashlib.sha256(b"digits-1").hexdigest())


def _digit_rows(part: int) -> Iterator[dict[str, Any]]:
    from sklearn.datasets import load_digits

    greys, labels = load_digits(return_X_y=True)
    for row in stratified_split(labels, _TEST_FRACTION, _SPLIT_SEED)[part]:
        small = Image.fromarray((greys[row].reshape(8, 8) * (255 / 16)).astype(np.float32))
        large = small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        grey = np.asarray(large).clip(0, 255).round().astype(np.uint8)
        yield {"image": Image.fromarray(grey).convert("RGB"), "label": int(labels[row])}
