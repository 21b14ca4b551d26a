"""What all figures share: how they are written, and what can be read on them."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
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


def test_text_has_the_better_contrast():
    """#767676 is known as the lightest grey on which white reaches 4.5 : 1; black is better on it by a little."""
    assert text_color(np.array(to_rgb("#767676"))) == "black"
    assert text_color(np.array(to_rgb("#757575"))) == "white"
    assert text_color(np.array(to_rgb("#ffe945"))) == "black" and text_color(np.array(to_rgb("#0072B2"))) == "white"
