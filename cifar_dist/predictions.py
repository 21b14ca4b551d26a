"""Saved predictions: the one thing a report needs that takes a model to make."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_dist.errors import UsageError


@dataclass(frozen=True)
class Scored:
    """A split scored by a checkpoint.

    Attributes:
        ids: int64 (N,), row number in the source's split.
        labels: int64 (N,).
        probabilities: float32 (N, K).
        class_names: K names.
        dataset: name of the data set.
        fingerprint: of the data that was scored.
        checkpoint: best or last.
        step: optimizer steps the checkpoint has seen.
    """

    ids: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    dataset: str
    fingerprint: str
    checkpoint: str
    step: int


def save_predictions(run_dir: Path, scored: Scored) -> None:
    """Write ``report/predictions.parquet``: id, label, prediction, probabilities; the rest as its metadata.

    Raises:
        UsageError: the report's folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts = {name: getattr(scored, name) for name in ("class_names", "dataset", "fingerprint", "checkpoint", "step")}
    flat = pa.array(np.ascontiguousarray(scored.probabilities, dtype=np.float32).ravel())
    table = pa.table(
        {
            "id": pa.array(scored.ids, pa.int64()),
            "label": pa.array(scored.labels, pa.int64()),
            "prediction": pa.array(scored.probabilities.argmax(axis=1), pa.int64()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, scored.probabilities.shape[1]),
        }
    ).replace_schema_metadata({"cifar_dist": json.dumps(facts)})
    folder = run_dir / "report"
    aside = folder / ".predictions.parquet"
    try:
        folder.mkdir(exist_ok=True)
        pq.write_table(table, aside)
        os.replace(aside, folder / "predictions.parquet")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error}).") from None


def load_predictions(run_dir: Path) -> Scored:
    """Read what `save_predictions` wrote.

    Raises:
        UsageError: it is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = run_dir / "report" / "predictions.parquet"
    try:
        table = pq.read_table(path).combine_chunks()
        facts = json.loads(table.schema.metadata[b"cifar_dist"])
    except (OSError, pa.ArrowInvalid, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); make it with python evaluate.py {run_dir}.") from None
    names = tuple(facts.pop("class_names"))
    probabilities = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(len(table), len(names))
    return Scored(table["id"].to_numpy(), table["label"].to_numpy(), probabilities, names, **facts)
