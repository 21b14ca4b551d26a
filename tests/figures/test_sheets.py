"""Sheets show the very pixels they were given, in the right places, with their captions."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cifar_dist import figures
from cifar_dist.figures import ClassRow, Explained, Seen
from tests.figures.drawn import LONG, assert_no_texts_overlap, assert_nothing_is_cut_off, labels_in

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
HEAT = RNG.uniform(0, 1, (11, 32, 32))


def shown_in(figure):
    """The images of a sheet as rows from the top, each from the left."""
    rows = {}
    for image in figure.axes[0].images:
        left, right, bottom, top = image.get_extent()
        assert bottom - top == pytest.approx(right - left)  # the axis of y points down
        rows.setdefault(round(top, 6), []).append((left, np.asarray(image.get_array())))
    return [[pixels for _, pixels in sorted(row, key=lambda one: one[0])] for _, row in sorted(rows.items())]


def explained(number, caption=""):
    return Explained(IMAGES[number], HEAT[number], caption)


def grid(runs, rows=3):
    seen = [[Seen(HEAT[(r + m) % 11], f"class {r} {m}", (r + m) % 2 == 0) for r in range(rows)] for m in range(runs)]
    names = [f"swin_base_patch4_window7_224 {m}" for m in range(runs)]
    return figures.cam_grid(IMAGES[:rows], [f"true {r}" for r in range(rows)], names, seen)


@pytest.mark.parametrize(
    "figure",
    [
        figures.image_gallery(IMAGES, ["true cat\npredicted automobile\n93.1%"] * 11),
        figures.image_gallery(IMAGES[:1], ["cat"]),
        figures.image_gallery(IMAGES, [f"true {LONG}\npredicted {LONG}"] * 11),
        figures.cam_sheet([ClassRow(LONG, explained(0, LONG * 2), explained(1, LONG * 2))] * 3),
        grid(1),
        grid(12),
    ],
    ids=["gallery", "one", "long captions", "cam sheet", "one run", "twelve runs"],
)
def test_nothing_is_cut_off_or_covered(figure):
    assert_nothing_is_cut_off(figure)
    assert_no_texts_overlap(figure)


def test_a_caption_too_long_for_its_line_keeps_its_arrow():
    figure = figures.image_gallery(IMAGES[:2], ["red apple → blue sky\n98 %", "cat → dog\n97 %"])
    assert {"red apple\n→ blue sky\n98 %", "cat → dog\n97 %"} <= labels_in(figure)


def test_gallery_shows_every_image_in_reading_order_over_its_caption():
    figure = figures.image_gallery(IMAGES, [f"image {number}" for number in range(11)], columns=4)
    rows = shown_in(figure)
    assert [len(row) for row in rows] == [4, 4, 3]
    np.testing.assert_array_equal([pixels for row in rows for pixels in row], IMAGES)
    axes = figure.axes[0]
    for image, text in zip(axes.images, axes.texts, strict=True):
        left, right, bottom, _ = image.get_extent()
        assert text.get_position()[0] == pytest.approx((left + right) / 2)
        assert 0 < text.get_position()[1] - bottom < 0.1
    assert [text.get_text() for text in axes.texts] == [f"image {number}" for number in range(11)]


def test_small_images_keep_their_pixels_in_the_file(tmp_path):
    """Every color of a saved sheet of random pixels is one of the image's own, or white or of its caption."""
    figure = figures.image_gallery(IMAGES[:1], [""])
    figures.save(figure, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        found = {color for _, color in picture.convert("RGB").getcolors(2**20)}
    assert found == {tuple(map(int, color)) for color in IMAGES[0].reshape(-1, 3)} | {(255, 255, 255)}


def test_overlay_is_half_the_image_and_half_the_heat():
    colored = Image.fromarray(matplotlib.colormaps["inferno"](HEAT[0], bytes=True)[..., :3])
    expected = Image.blend(Image.fromarray(IMAGES[0]), colored, 0.5)
    found = figures.overlay(IMAGES[0], HEAT[0])
    assert found.dtype == np.uint8 and found.shape == (32, 32, 3)
    np.testing.assert_allclose(found.astype(int), np.asarray(expected).astype(int), atol=1)


def test_hotter_is_brighter_for_every_kind_of_color_vision():
    """A heat map on black grows in luminance, which all color vision shares."""
    ramp = np.linspace(0, 1, 64)[None].repeat(4, axis=0)
    grey = np.asarray(Image.fromarray(figures.overlay(np.zeros((4, 64, 3), np.uint8), ramp)).convert("L"))
    steps = np.diff(grey[0].astype(int))
    assert steps.min() >= 0 and steps.max() <= 4 and grey[0, -1] > 110


def test_cam_sheet_shows_image_heat_and_overlay_of_a_right_and_a_wrong_prediction():
    figure = figures.cam_sheet([ClassRow("cat", explained(0, "99.0%"), explained(1, "taken for dog, 61.0%"))])
    (row,) = shown_in(figure)
    for half, number in ((row[:3], 0), (row[3:], 1)):
        for found, expected in zip(
            half, (IMAGES[number], HEAT[number], figures.overlay(IMAGES[number], HEAT[number])), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    heat = figure.axes[0].images[1]
    assert heat.get_clim() == (0, 1) and heat.get_cmap().name == "inferno"
    assert {"cat", "99.0%", "taken for dog, 61.0%", "✓ right", "✗ wrong"} <= labels_in(figure)


def test_a_class_that_is_never_right_or_never_wrong_leaves_its_place_empty_with_a_word():
    figure = figures.cam_sheet([ClassRow("cat", None, explained(1)), ClassRow("dog", explained(2), None)])
    first, second = shown_in(figure)
    np.testing.assert_array_equal(first[0], IMAGES[1])
    np.testing.assert_array_equal(second[0], IMAGES[2])
    assert len(first) == len(second) == 3
    assert {"none right", "none wrong", "cat", "dog"} <= labels_in(figure)
    assert labels_in(figures.cam_sheet([])) >= {"✓ right", "✗ wrong"}


def test_cam_grid_shows_the_same_images_as_each_run_saw_them():
    figure = grid(runs=2)
    for r, row in enumerate(shown_in(figure)):
        np.testing.assert_array_equal(row[0], IMAGES[r])
        for m in range(2):
            np.testing.assert_array_equal(row[1 + m], figures.overlay(IMAGES[r], HEAT[r + m]))
    colors = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colors["✓ class 0 0"] == figures.TRAIN and colors["✗ class 0 1"] == figures.EVALUATION
    assert {"true 0", "true 1", "true 2", "image"} <= colors.keys()
