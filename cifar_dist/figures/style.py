"""One style for all pictures: colour-blind safe (Okabe and Ito's palette), made through matplotlib's objects.

pyplot is not used, so nothing is shared between figures and no display is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

TRAIN, EVALUATION, OTHER = "#0072B2", "#D55E00", "#000000"
RIGHT, WRONG = TRAIN, EVALUATION
_SETTINGS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000"]
_MARKERS = ["o", "s", "^", "D", "v"]
_FONTS = [  # the first has no Chinese, Japanese, Korean; of the others those that are installed help out
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS",
]  # fmt: skip
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it warns of a font that has one weight only
_INSTALLED = set(font_manager.get_font_names())
STYLE: dict[Any, Any] = {
    "font.family": [name for name in _FONTS if name in _INSTALLED],
    "font.size": 10,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "cifar-dist",
}


def figure_with_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def setting_styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each different label in order, the same in every figure of a comparison.

    Up to 35 pairs differ, and neighbours also in their marker, for whoever prints in grey.
    """
    different = list(dict.fromkeys(labels))
    return {
        label: (_SETTINGS[number % len(_SETTINGS)], _MARKERS[number % len(_MARKERS)])
        for number, label in enumerate(different)
    }


def shortened(name: str, most: int = 24) -> str:
    """A name on one line of at most `most` characters, its middle left out."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most - most // 2 - 1) :]}"


def text_color(background: np.ndarray) -> str:
    """Black or white, whichever is read better on a colour (3,) of fractions, by its relative luminance.

    They read equally well at 0.342 by APCA (Somers 2022), which follows reading more closely on colours of middle
    luminance than the ratio of WCAG 2, by which black would do on a rather dark blue.
    """
    channels = np.asarray(background)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.342 else "white"


def logarithmic(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def say(axes: Axes, words: str) -> None:
    """Words in place of data."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="#555555")


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `path`, a PNG, and beside it as SVG with its text as text; one with photographs as PNG only.

    A figure made anew from the same data gives the same bytes.
    """
    with matplotlib.rc_context(STYLE):  # the canvases' own writers: savefig would lay out and draw each file twice
        FigureCanvasAgg(figure).print_png(path)
        if not _has_photographs(figure):
            figure.set_layout_engine("none")
            FigureCanvasSVG(figure).print_svg(path.with_suffix(".svg"), metadata={"Date": None})


def save_all(drawn: Mapping[str, Figure | None], folder: Path) -> dict[str, Path]:
    """Write the figures there are into a folder, each as its name, those with photographs as JPEG too, for pages.

    Files of those that there are not are removed.

    Returns:
        Their PNG files by name.
    """
    found = {name: figure for name, figure in drawn.items() if figure is not None}
    for name in drawn.keys() - found.keys():
        for suffix in (".png", ".svg", ".jpg"):  # of an earlier time
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    for name, figure in found.items():
        path = folder / f"{name}.png"
        save(figure, path)
        if _has_photographs(figure):
            with Image.open(path) as picture:
                picture.convert("RGB").save(path.with_suffix(".jpg"), quality=80, subsampling=0)
    return {name: folder / f"{name}.png" for name in found}


def _has_photographs(figure: Figure) -> bool:
    return any(np.asarray(image.get_array()).ndim == 3 for axes in figure.axes for image in axes.images)
