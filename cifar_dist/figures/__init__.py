"""Pictures of a report and of a comparison: data in, matplotlib figure out, in one style; `save` writes one."""

from cifar_dist.figures.classes import MOST_BARS, class_bars, top_confusions
from cifar_dist.figures.curves import Curve, StepAxis, accuracy_curves, loss_curves, lr_curve
from cifar_dist.figures.matrices import (
    MOST_NAMED_CLASSES,
    MOST_NUMBERED_CLASSES,
    agreement_matrix,
    confusion_matrix,
    normalized_confusion_matrix,
    value_grid,
)
from cifar_dist.figures.reliability import Reliability, reliability_diagram
from cifar_dist.figures.runs import RunCurves, accuracy_against, run_curves
from cifar_dist.figures.sheets import (
    ClassRow,
    Explained,
    Seen,
    cam_grid,
    cam_sheet,
    image_gallery,
    overlay,
)
from cifar_dist.figures.style import EVALUATION, OTHER, TRAIN, save, save_all

__all__ = [
    "EVALUATION",
    "MOST_BARS",
    "MOST_NAMED_CLASSES",
    "MOST_NUMBERED_CLASSES",
    "OTHER",
    "TRAIN",
    "ClassRow",
    "Curve",
    "Explained",
    "Reliability",
    "RunCurves",
    "Seen",
    "StepAxis",
    "accuracy_against",
    "accuracy_curves",
    "agreement_matrix",
    "cam_grid",
    "cam_sheet",
    "class_bars",
    "confusion_matrix",
    "image_gallery",
    "loss_curves",
    "lr_curve",
    "normalized_confusion_matrix",
    "overlay",
    "reliability_diagram",
    "run_curves",
    "save",
    "save_all",
    "top_confusions",
    "value_grid",
]
