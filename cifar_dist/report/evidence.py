"""What a report shows of single images: which of them, their pixels, and the maps that explain their predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cifar_dist.errors import UsageError
from cifar_dist.report.predictions import Scored
from cifar_dist.statistics.label_errors import can_tell, label_issues, mean_probability

FILE = "evidence.npz"
SHARED, CLASSES, MISTAKES, SUSPECTS = 10, 20, 24, 24


@dataclass(frozen=True)
class Chosen:
    """Rows of the predictions that a report shows.

    Attributes:
        shared: the first image of each of the first classes, whatever the model: the same for all runs on a test set.
        classes: numbers of the classes with an example each: all, or the worst of many.
        right: per class of these the most confident right prediction of one of its images, or None.
        wrong: likewise the most confident wrong one.
        mistakes: the most confident wrong predictions, the worst first.
        suspects: images whose label looks wrong, the most suspicious first; none where the model is too unsure to tell.
        num_suspects: how many there are in all.
        num_doubted: and with those that the model predicts as they are labelled: they tell how sure it is.
    """

    shared: list[int]
    classes: list[int]
    right: list[int | None]
    wrong: list[int | None]
    mistakes: list[int]
    suspects: list[int]
    num_suspects: int
    num_doubted: int

    @property
    def explained(self) -> list[int]:
        """Rows that get a map, each once."""
        return sorted({row for row in (*self.shared, *self.right, *self.wrong) if row is not None})

    @property
    def shown(self) -> list[int]:
        """Rows whose pixels are needed, each once."""
        return sorted({*self.explained, *self.mistakes, *self.suspects})


def choose(scored: Scored) -> Chosen:
    """Which images to show: a function of the predictions alone."""
    count, confidence = len(scored.class_names), scored.probabilities.max(axis=1)
    by_id = np.argsort(scored.ids, kind="stable")
    of_class = [by_id[scored.labels[by_id] == number] for number in range(count)]
    present = [number for number in range(count) if len(of_class[number])]
    recall = {number: float(scored.correct[of_class[number]].mean()) for number in present}
    classes = sorted(sorted(present, key=lambda number: recall[number])[:CLASSES])

    def surest(rows: np.ndarray) -> int | None:
        return int(rows[confidence[rows].argmax()]) if len(rows) else None

    wrong = np.flatnonzero(~scored.correct)
    doubted = label_issues(scored.probabilities, scored.labels)
    told = can_tell(len(doubted), len(scored.labels), mean_probability(scored.probabilities, scored.labels))
    suspects = doubted[~scored.correct[doubted]]  # as in cleanlab: a class never predicted has a low threshold
    return Chosen(
        shared=[int(of_class[number][0]) for number in present[:SHARED]],
        classes=classes,
        right=[surest(of_class[number][scored.correct[of_class[number]]]) for number in classes],
        wrong=[surest(of_class[number][~scored.correct[of_class[number]]]) for number in classes],
        mistakes=wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES].tolist(),
        suspects=suspects[:SUSPECTS].tolist() if told else [],
        num_suspects=len(suspects),
        num_doubted=len(doubted),
    )


@dataclass(frozen=True)
class Evidence:
    """Pixels and maps of some images.

    Attributes:
        ids: int64 (M,), sample ids of `images`.
        images: uint8 (M,S,S,3).
        explained: int64 (E,), sample ids of the maps.
        maps: by method (``grad_cam``, ``rollout``) uint8 (E,T,T), 255 for what mattered most in that image.
        layer: the layer that Grad-CAM looked at.
        unexplained: by method why there are no maps.
    """

    ids: np.ndarray
    images: np.ndarray
    explained: np.ndarray
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    layer: str = ""
    unexplained: dict[str, str] = field(default_factory=dict)

    def image(self, sample_id: int) -> np.ndarray:
        """uint8 (S,S,3)."""
        return self.images[np.flatnonzero(self.ids == sample_id)[0]]

    def map(self, method: str, sample_id: int) -> np.ndarray | None:
        """float32 (T,T) in [0,1], or None if there is none."""
        found = np.flatnonzero(self.explained == sample_id)
        if method not in self.maps or not len(found):
            return None
        return self.maps[method][found[0]].astype(np.float32) / 255

    def holds(self, sample_ids: Iterable[int]) -> bool:
        """Whether it has the pixels of all of these."""
        return set(sample_ids) <= set(self.ids.tolist())

    def save(self, folder: Path) -> None:
        """Write ``evidence.npz``."""
        words = json.dumps({"layer": self.layer, "unexplained": self.unexplained})
        arrays: dict[str, Any] = {f"map_{name}": maps for name, maps in self.maps.items()}
        arrays |= {"ids": self.ids, "images": self.images, "explained": self.explained, "words": np.array(words)}
        np.savez_compressed(folder / FILE, **arrays)


def load_evidence(folder: Path, shown: Iterable[int]) -> Evidence:
    """What `Evidence.save` wrote.

    Args:
        folder: of a report.
        shown: sample ids whose pixels it must hold.

    Raises:
        UsageError: it is missing, damaged, or of other images.
    """
    try:
        with np.load(folder / FILE, allow_pickle=False) as found:
            maps = {name.removeprefix("map_"): found[name] for name in found.files if name.startswith("map_")}
            words = json.loads(str(found["words"]))
            evidence = Evidence(found["ids"], found["images"], found["explained"], maps, **words)
        if evidence.holds(shown):
            return evidence
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        pass
    raise UsageError(
        f"{folder / FILE} is missing, damaged or of other predictions; remove {folder}/predictions.parquet and run"
        " evaluate.py again."
    )
