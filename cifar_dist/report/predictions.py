"""Saved predictions: the one thing a report's numbers need that takes a model to make."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cifar_dist.errors import UsageError, first_line

AVERAGED = {  # --tta in words
    "none": "",
    "flip": ", predictions averaged over each and its mirror image",
    "flip-shift": ", predictions averaged over each and its mirror image, as they are (weight 1/2) and moved by a pixel"
    " up left and down right (1/4 each)",
}


@dataclass(frozen=True)
class About:
    """What was scored, and by what.

    Attributes:
        dataset: name of the data set.
        split: test or val.
        fingerprint: of the data that was scored.
        checkpoint: best, last, or a checkpoint's folder.
        step: optimizer steps the checkpoint has seen.
        digest: sha256 of the checkpoint's manifest.
        tta: the views over which probabilities are averaged: none, flip or flip-shift; see `AVERAGED`.
        precision: fp32, bf16 or fp16.
        own_data: whether it is a split of the data set that the run was trained on.
        place: what ``--data`` named; None without it.
    """

    dataset: str
    split: str
    fingerprint: str
    checkpoint: str
    step: int
    digest: str
    tta: str = "none"
    precision: str = "fp32"
    own_data: bool = True
    place: str | None = None


@dataclass(frozen=True)
class Scored:
    """A split scored by a checkpoint.

    Attributes:
        ids: int64 (N,), row number in the source's split.
        labels: int64 (N,).
        logits: float32 (N, K); with test-time augmentation log-probabilities.
        class_names: K names.
        about: what was scored, and by what.
        files: N names of files, where each image of the split has one of its own.
    """

    ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    class_names: tuple[str, ...]
    about: About
    files: tuple[str, ...] = ()

    def names_of(self, rows: list[int]) -> str:
        """What to find images of the split by: their files, or else their rows in the data set."""
        if self.files:
            return "; ".join(f"{number} {self.files[row]}" for number, row in enumerate(rows, 1))
        return f"rows {', '.join(str(self.ids[row]) for row in rows)} of {self.about.split}, counted from 0"

    @cached_property
    def probabilities(self) -> np.ndarray:
        """float64 (N, K): softmax of the logits."""
        from scipy.special import softmax

        return softmax(self.logits.astype(np.float64), axis=1)

    @cached_property
    def predicted(self) -> np.ndarray:
        """int64 (N,): the class with the highest logit."""
        return self.logits.argmax(axis=1)

    @cached_property
    def correct(self) -> np.ndarray:
        """Bool (N,)."""
        return self.predicted == self.labels


def predictions_file(folder: Path, split: str) -> Path:
    """Where the predictions of a split are in a report's folder."""
    return folder / ("predictions.parquet" if split == "test" else f"predictions_{split}.parquet")


def save_predictions(folder: Path, scored: Scored) -> None:
    """Write id, file, label, prediction, confidence (its probability) and logits as a parquet table, about as metadata.

    Raises:
        UsageError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = {"class_names": scored.class_names, **asdict(scored.about)}
    flat = pa.array(np.ascontiguousarray(scored.logits, dtype=np.float32).ravel())
    table = pa.table(
        {
            "id": pa.array(scored.ids, pa.int64()),
            **({"file": pa.array(scored.files, pa.string())} if scored.files else {}),
            "label": pa.array(scored.labels, pa.int64()),
            "prediction": pa.array(scored.predicted, pa.int64()),
            "confidence": pa.array(scored.probabilities.max(axis=1), pa.float32()),
            "logits": pa.FixedSizeListArray.from_arrays(flat, scored.logits.shape[1]),
        }
    ).replace_schema_metadata({"cifar_dist": json.dumps(facts)})
    path = predictions_file(folder, scored.about.split)
    aside = path.with_name(f".{path.name}")
    try:
        folder.mkdir(exist_ok=True)
        pq.write_table(table, aside)
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({first_line(error)}).") from None


def load_predictions(folder: Path, split: str = "test") -> Scored:
    """Read what `save_predictions` wrote.

    Raises:
        UsageError: it is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = predictions_file(folder, split)
    try:
        table = pq.read_table(path).combine_chunks()
        facts = json.loads(table.schema.metadata[b"cifar_dist"])
        names = tuple(facts.pop("class_names"))
        logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(len(table), len(names))
        files = tuple(table["file"].to_pylist()) if "file" in table.column_names else ()
        return Scored(table["id"].to_numpy(), table["label"].to_numpy(), logits, names, About(**facts), files)
    except (OSError, pa.ArrowInvalid, TypeError, KeyError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read ({first_line(error)}); make it with python evaluate.py {folder.parent}."
        ) from None
