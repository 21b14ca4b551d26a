"""Reading a figure back: what it says, and whether all of it can be seen."""

from unittest.mock import patch

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LONG = "a class with a name that is very long indeed"


def drawn_texts(figure):
    """Every text that drawing the figure draws (a figure also holds ticks that lie outside its axes)."""
    drawn, draw = {}, Text.draw

    def record(text, renderer, *others, **named):
        if text.get_visible() and text.get_text():
            drawn[text] = None
        draw(text, renderer, *others, **named)

    with patch.object(Text, "draw", record):
        FigureCanvasAgg(figure).draw()
    return list(drawn)


def labels_in(figure):
    """What the figure says."""
    return {text.get_text() for text in drawn_texts(figure)}


def texts_of(axes):
    """The texts put on axes, by where they stand."""
    return {artist.get_position(): artist.get_text() for artist in axes.texts}


def assert_nothing_is_cut_off(figure, filled=0.8):
    """All artists lie inside the frame and use this share of both sides at least."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    used, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert used.x0 >= 0 and used.y0 >= 0 and used.x1 <= width + 1e-6 and used.y1 <= height + 1e-6
    assert used.width > filled * width and used.height > filled * height


def assert_no_texts_overlap(figure):
    """No two texts cover each other by more than a pixel (where none is turned)."""
    texts = drawn_texts(figure)
    low, high = np.moveaxis([text.get_window_extent().padded(-1).get_points() for text in texts], 1, 0)
    covered = ((low[:, None] < high) & (low < high[:, None])).all(axis=-1)
    pairs = np.argwhere(np.triu(covered, k=1))
    assert not len(pairs), [(texts[one].get_text(), texts[other].get_text()) for one, other in pairs]
