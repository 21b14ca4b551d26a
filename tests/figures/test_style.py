"""What all figures share: how they are written, and what can be read on them."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from cifar_dist import figures
from cifar_dist.figures.style import shortened, text_color
from tests.figures.drawn import CIFAR10, labels_in


def bars(names=CIFAR10):
    return figures.class_bars(names, np.linspace(0.5, 1, len(names)), 0.75)


def written(folder, figure):
    folder.mkdir(exist_ok=True)
    figures.save(figure, folder / "figure.png")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_png_that_is_not_blank_and_an_svg_whose_text_is_text_lie_beside_each_other(tmp_path):
    assert set(written(tmp_path, bars())) == {"figure.png", "figure.svg"}
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors  # bars and mean in the style's own colours
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*CIFAR10, "mean 75.00%", "50.0%"} <= texts


@pytest.mark.parametrize(
    "draw",
    [
        bars,
        lambda: figures.confusion_matrix(np.eye(3, dtype=int), ["a", "b", "c"]),
        lambda: figures.run_curves([figures.RunCurves("a", ([1, 2], [2, 1]), ([1, 2], [2, 1]))]),
        lambda: figures.reliability_diagram([figures.Reliability("t", np.ones(2), np.ones(2), np.ones(2), 0.0)]),
    ],
    ids=["bars", "matrix", "curves", "reliability"],
)
def test_the_same_data_give_the_same_bytes(tmp_path, draw):
    assert written(tmp_path / "first", draw()) == written(tmp_path / "second", draw())


def test_photographs_are_written_as_png_and_for_pages_as_a_jpeg_that_looks_the_same(tmp_path):
    smooth = np.linspace(0, 255, 2 * 128 * 128 * 3).reshape(2, 128, 128, 3).astype(np.uint8)
    sheet = figures.image_gallery(smooth, ["cat", "dog"])
    assert set(written(tmp_path / "one", sheet)) == {"figure.png"}
    assert figures.save_all({"sheet": sheet, "bars": bars(), "none": None}, tmp_path).keys() == {"sheet", "bars"}
    assert {path.name for path in tmp_path.glob("*.*")} == {"sheet.png", "sheet.jpg", "bars.png", "bars.svg"}
    with Image.open(tmp_path / "sheet.png") as png, Image.open(tmp_path / "sheet.jpg") as jpeg:
        assert jpeg.format == "JPEG"
        difference = np.asarray(png.convert("RGB")).astype(int) - np.asarray(jpeg)
    assert np.abs(difference).mean() < 2


def test_names_are_shown_as_they_are(tmp_path):
    names = ["$5 to $10", "a & b <c>", "x_1^2", "Größe"]
    assert set(names) <= labels_in(bars(names))
    written(tmp_path, bars(names))
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert set(names) <= {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize(
    ("name", "short"),
    [("cat", "cat"), ("abcdefgh", "abcdefgh"), ("abcdefghi", "abcd…ghi"), ("two\nlines", "two …nes")],
)
def test_long_names_lose_their_middle(name, short):
    assert shortened(name, 8) == short


def apca(text, background):
    """Lightness contrast of the Accessible Perceptual Contrast Algorithm, 0.1.9, of two luminances."""
    text, background = (y + max(0.022 - y, 0) ** 1.414 for y in (text, background))
    if background > text:
        return (background**0.56 - text**0.57) * 1.14 - 0.027
    return (text**0.62 - background**0.65) * 1.14 - 0.027


@pytest.mark.parametrize("name", ["Blues", "cividis", "gray"])
def test_text_has_the_better_contrast(name):
    """On every colour of the maps that have numbers; where the two are as good as equal, either will do."""
    for color in colormaps[name](np.linspace(0, 1, 101))[:, :3]:
        luminance = float(color**2.4 @ [0.2126729, 0.7151522, 0.0721750])
        black, white = apca(0, luminance), apca(1, luminance)
        assert abs(black - white) < 0.06 or (text_color(color) == "black") == (black > white)
