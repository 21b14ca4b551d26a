"""The pictures of a report that show images, and words about all of its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cifar_dist import figures
from cifar_dist.report.evidence import CLASSES, Chosen, Evidence
from cifar_dist.report.predictions import Scored
from cifar_dist.statistics.label_errors import MOST_SUSPECTED, can_tell, mean_probability

CAPTIONS = {
    "loss": "Loss against steps",
    "accuracy": "Top-1 accuracy against steps",
    "lr": "Learning rate against steps: what the settings say for each, and what was logged",
    "class_accuracy": "Accuracy of each class; the dashed line is the mean over all images",
    "confusion_matrix": "Confusion matrix: number of images",
    "confusion_shares": "Confusion matrix: percent of the true class",
    "confusions": "The most frequent confusions",
    "reliability": "Reliability: accuracy against confidence, and how often each confidence occurs",
    "mistakes": "The wrong predictions the model is surest of: true class, predicted class, confidence",
    "label_errors": "Images whose label may be wrong: label, likeliest other class, its probability",
    "grad_cam": f"Grad-CAM of what was predicted, for one right and one wrong prediction of each class (the {CLASSES}"
    " least accurate ones, where there are more)",
    "rollout": "Attention rollout for the same images",
}

METHODS = ("grad_cam", "rollout")
_EVEN = 0.8  # of its highest value, below which no other of a map is that is nearly one colour


def captions(classes: int) -> dict[str, str]:
    """What is said below each picture of so many classes."""
    said = dict(CAPTIONS)
    if classes > figures.MOST_BARS:
        said["class_accuracy"] = said["class_accuracy"].replace("each class", f"the {figures.MOST_BARS} least accurate")
    if classes > figures.MOST_NUMBERED_CLASSES:
        said["confusion_matrix"] = "Confusion matrix: shares of the true class as shades"
    if classes > figures.MOST_NAMED_CLASSES:
        said["confusion_matrix"] += "; classes by their number in the table above"
    return said


def of_images(scored: Scored, chosen: Chosen, evidence: Evidence) -> dict[str, Figure | None]:
    """Galleries of mistakes and suspected label errors, and a sheet for each kind of map."""
    sheets: dict[str, Figure | None] = {
        "mistakes": _gallery(scored, evidence, chosen.mistakes, partial(caption, between="\n")),
        "label_errors": _gallery(scored, evidence, chosen.suspects, doubted),
    }
    explained = {name: _sheet(scored, chosen, evidence, name) if name in evidence.maps else None for name in METHODS}
    return sheets | explained


def _gallery(scored: Scored, evidence: Evidence, rows: list[int], says: Callable[[Scored, int], str]) -> Figure | None:
    if not rows:
        return None
    images = [evidence.image(int(scored.ids[row])) for row in rows]
    return figures.image_gallery(images, [says(scored, row) for row in rows])


def caption(scored: Scored, row: int, between: str = " ") -> str:
    """``cat → dog 98 %``: the true class, the predicted one where it is another, and its confidence."""
    true, guess = scored.class_names[scored.labels[row]], scored.class_names[scored.predicted[row]]
    what = true if true == guess else f"{true} → {guess}"
    return f"{what}{between}{100 * scored.probabilities[row].max():.0f} %"


def doubted(scored: Scored, row: int) -> str:
    """The label, and in its place the likeliest other class with its probability."""
    others = scored.probabilities[row].copy()
    others[scored.labels[row]] = -1
    other = int(others.argmax())
    return f"{scored.class_names[scored.labels[row]]} → {scored.class_names[other]}\n{100 * others[other]:.0f} %"


def _sheet(scored: Scored, chosen: Chosen, evidence: Evidence, method: str) -> Figure:
    def explained(row: int | None) -> figures.Explained | None:
        map = None if row is None else evidence.map(method, int(scored.ids[row]))
        if row is None or map is None:
            return None
        image = as_seen(evidence.image(int(scored.ids[row])), len(map))
        return figures.Explained(image, map, caption(scored, row))

    classes = zip(chosen.classes, chosen.right, chosen.wrong, strict=True)
    names = scored.class_names
    return figures.cam_sheet(
        [figures.ClassRow(names[k], explained(right), explained(wrong)) for k, right, wrong in classes]
    )


def as_seen(image: np.ndarray, size: int) -> np.ndarray:
    """An image uint8 (S,S,3), or a map float32 (S,S), at the size a model sees it."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def mistake_words(scored: Scored, chosen: Chosen) -> str:
    """How many images are wrong, and how many labels look wrong or why this model cannot tell."""
    count, suspected, wrong = len(scored.labels), chosen.num_suspects, int((~scored.correct).sum())
    doubted = chosen.num_doubted
    trust = mean_probability(scored.probabilities, scored.labels)
    are = "is given another class than its label" if wrong == 1 else "are given other classes than their labels"
    words = f"{wrong:,} of {count:,} images {are}."
    by = "by confident learning (Northcutt et al., 2021)"
    if not can_tell(doubted, count, trust):
        why = (
            f"{by} {doubted:,} would be suspected, and even the worst of well-known test sets have no more than a tenth"
            if doubted > MOST_SUSPECTED * count
            else f"on average it gives a label a probability of only {trust:.2f}, and {by}, which compares with that,"
            " its doubts would be taken for wrong labels"
        )
        return f"{words} This model is too unsure to tell which labels are wrong themselves: {why}."
    are = (
        "1 label is suspected to be wrong itself"
        if suspected == 1
        else f"{suspected:,} labels are suspected to be wrong themselves"
    )
    shown = f" The {len(chosen.suspects)} most suspicious are shown." if suspected > len(chosen.suspects) else ""
    return (
        f"{words} {are} {by}: the model predicts another class, and finds it at least as likely as it usually finds"
        f" that class.{shown}"
        " The less accurate a model, the more it suspects wrongly."
    )


def empty_maps(evidence: Evidence, sample_ids: Iterable[int]) -> int:
    """How many of the Grad-CAM maps of these images are all zero."""
    maps = [evidence.map("grad_cam", sample_id) for sample_id in sample_ids]
    return sum(map is not None and not map.any() for map in maps)


def _is_even(map: np.ndarray | None) -> bool:
    """Whether nothing in a map stands out."""
    return map is not None and bool(map.min() > _EVEN * map.max())


def map_words(evidence: Evidence, sample_ids: Sequence[int]) -> str:
    """How the maps of these images were made and how many show nothing, or why there are none."""
    missing = {"grad_cam": "There are no Grad-CAM maps", "rollout": "There is no attention rollout"}
    reasons = "".join(f" {missing[method]}: {reason}" for method, reason in evidence.unexplained.items())
    if "grad_cam" not in evidence.maps:
        return reasons.strip()
    rollout = (
        " Attention rollout (Abnar and Zuidema, 2020) follows attention from the class token back to the patches,"
        " whatever the class."
        if "rollout" in evidence.maps
        else ""
    )
    even = sum(_is_even(evidence.map("rollout", sample_id)) for sample_id in sample_ids) if rollout else 0
    if even:
        rollout += f" {even} of the {len(sample_ids)} rollouts shown {'is' if even == 1 else 'are'} nearly even: the"
        rollout += " class token attends to all patches alike."
    empty = empty_maps(evidence, sample_ids)
    are = f"{empty} of the {len(sample_ids)} Grad-CAM maps shown {'is' if empty == 1 else 'are'} empty"
    nothing = f" {are}, all black: nothing at this layer speaks for the class." if empty else ""
    how = f"Grad-CAM (Selvaraju et al., 2017) at layer {evidence.layer}, for the predicted class."
    return f"{how}{nothing}{rollout}{reasons}"
