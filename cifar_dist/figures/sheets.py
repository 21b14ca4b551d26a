"""Sheets of images with captions: galleries, and what a class was seen by."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cifar_dist.figures.style import OTHER, RIGHT, STYLE, WRONG, shortened

_TILE, _GAP, _LINE = 1.3, 0.1, 0.16  # inches: a side of an image, between images, a line of text
_SIZE = 8  # points
_MOST_LETTERS = 19  # that fit below an image
_NAMES = 1.5  # inches, for the names of rows
_OPACITY = 0.5
HEAT = "inferno"  # perceptually uniform, and as bright as it is hot for every kind of colour vision


@dataclass(frozen=True)
class Explained:
    """One prediction and what it was based on.

    Attributes:
        image: uint8 (S, S, 3).
        heat: float (S, S) in [0, 1], 1 where the class was seen.
        caption: below the images.
    """

    image: np.ndarray
    heat: np.ndarray
    caption: str = ""


@dataclass(frozen=True)
class ClassRow:
    """A class on a sheet: a right and a wrong prediction of images of it, None where there is none."""

    class_name: str
    right: Explained | None
    wrong: Explained | None


@dataclass(frozen=True)
class Seen:
    """What one run made of an image: heat map float (S, S) in [0, 1], the predicted class, and whether it is right."""

    heat: np.ndarray
    predicted: str
    right: bool


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image under its heat map.

    Args:
        image: uint8 (S, S, 3).
        heat: float (S, S) in [0, 1].

    Returns:
        uint8 (S, S, 3).
    """
    colors = 255 * matplotlib.colormaps[HEAT](heat)[..., :3]
    return np.rint((1 - _OPACITY) * image + _OPACITY * colors).astype(np.uint8)


class _Sheet:
    """A figure that is laid out in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(width, height))
            self._axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
            self._axes.set_axis_off()
            self._axes.autoscale(False)

    def image(self, left: float, top: float, image: np.ndarray) -> None:
        """An image, uint8 (S, S, 3) or heat (S, S), whose pixels are squares where they are large enough to see."""
        small = max(image.shape[:2]) < _TILE * STYLE["figure.dpi"]
        self._axes.imshow(
            image, extent=(left, left + _TILE, top + _TILE, top), aspect="auto", cmap=HEAT, vmin=0, vmax=1,
            interpolation="nearest" if small else "antialiased",
        )  # fmt: skip

    def empty(self, left: float, top: float, words: str) -> None:
        """A box with words in place of an image."""
        self._axes.add_patch(Rectangle((left, top), _TILE, _TILE, facecolor="#eeeeee"))
        self.text(left + _TILE / 2, top + _TILE / 2, words, "#555555", va="center")

    def text(self, x: float, y: float, words: str, color: str = OTHER, ha: str = "center", va: str = "top") -> None:
        """Words about a point."""
        with matplotlib.rc_context(STYLE):
            self._axes.text(x, y, words, color=color, ha=ha, va=va, fontsize=_SIZE)


def image_gallery(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> Figure:
    """Images in reading order, each over its caption, such as misclassified ones or suspected label errors.

    Args:
        images: N images, at least one, uint8 (H, W, 3) each; they are shown as squares.
        captions: N texts of a few lines; long lines are shortened.
        columns: images a row.
    """
    columns, captions = min(columns, len(images)), [_broken(caption) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in captions)
    across, down = _TILE + _GAP, _TILE + _LINE * lines + _GAP
    sheet = _Sheet(_GAP + columns * across, _GAP + -(-len(images) // columns) * down)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = _GAP + column * across, _GAP + row * down
        sheet.image(left, top, image)
        kept = "\n".join(shortened(line, _MOST_LETTERS) for line in caption.split("\n"))
        sheet.text(left + _TILE / 2, top + _TILE + 0.03, kept)
    return sheet.figure


def _broken(caption: str) -> str:
    """A caption whose lines are broken before the arrow between two classes where they would be too long."""
    lines = caption.split("\n")
    return "\n".join(line.replace(" → ", "\n→ ") if len(line) > _MOST_LETTERS else line for line in lines)


def cam_sheet(rows: Sequence[ClassRow]) -> Figure:
    """A row per class: image, heat map and overlay of a right prediction, and the same of a wrong one."""
    across, down = _TILE + _GAP, _TILE + _LINE + _GAP
    halves = [_NAMES, _NAMES + 3 * across + 2 * _GAP]
    top = 3 * _LINE
    sheet = _Sheet(halves[1] + 3 * across, top + len(rows) * down)
    for left, title, color in zip(halves, ("✓ right", "✗ wrong"), (RIGHT, WRONG), strict=True):
        sheet.text(left + 1.5 * across - _GAP / 2, 0.08, title, color)
        for column, what in enumerate(("image", "heat map", "overlay")):
            sheet.text(left + column * across + _TILE / 2, 0.08 + 1.3 * _LINE, what)
    for number, row in enumerate(rows):
        y = top + number * down
        sheet.text(_NAMES - _GAP, y + _TILE / 2, shortened(row.class_name, _MOST_LETTERS), ha="right", va="center")
        for left, shown, word in zip(halves, (row.right, row.wrong), ("none right", "none wrong"), strict=True):
            if shown is None:
                sheet.empty(left, y, word)
                continue
            for column, image in enumerate((shown.image, shown.heat, overlay(shown.image, shown.heat))):
                sheet.image(left + column * across, y, image)
            sheet.text(left + 1.5 * across - _GAP / 2, y + _TILE + 0.03, shortened(shown.caption, 60))
    return sheet.figure


def cam_grid(
    images: Sequence[np.ndarray], class_names: Sequence[str], run_names: Sequence[str], seen: Sequence[Sequence[Seen]]
) -> Figure:
    """The same images as every run saw them: a row per image, a column per run, the image itself first.

    Args:
        images: R images, uint8 (S, S, 3).
        class_names: their true classes, R names.
        run_names: M names.
        seen: what run m made of image r at [m][r].
    """
    across, down, top = _TILE + _GAP, _TILE + _LINE + _GAP, _GAP + 3 * _LINE
    sheet = _Sheet(_GAP + (1 + len(run_names)) * across, top + len(images) * down)
    for column, name in enumerate(["image", *run_names]):
        middle = _GAP + column * across + _TILE / 2
        title = textwrap.fill(shortened(name, 2 * _MOST_LETTERS), _MOST_LETTERS)
        sheet.text(middle, top - 0.04, title, va="bottom")
    for row, (image, true) in enumerate(zip(images, class_names, strict=True)):
        y = top + row * down
        sheet.image(_GAP, y, image)
        sheet.text(_GAP + _TILE / 2, y + _TILE + 0.03, shortened(true, _MOST_LETTERS))
        for column, run in enumerate(seen, start=1):
            left, one = _GAP + column * across, run[row]
            sheet.image(left, y, overlay(image, one.heat))
            mark, color = ("✓", RIGHT) if one.right else ("✗", WRONG)
            caption = f"{mark} {shortened(one.predicted, _MOST_LETTERS - 2)}"
            sheet.text(left + _TILE / 2, y + _TILE + 0.03, caption, color)
    return sheet.figure
