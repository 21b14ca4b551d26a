"""Random erasing against timm's, by distribution."""

import random

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.random_erasing import RandomErasing

from cifar_dist.data.augment import draws
from cifar_dist.data.augment.erasing import Erasing

IDS = torch.arange(20_000)


def theirs(mode, number, probability=1.0):
    """timm's on constant images that no colour equals: (number,32,32,3)."""
    random.seed(0)
    torch.manual_seed(0)
    erase = RandomErasing(probability, mode=mode, device="cpu")
    return erase(torch.full((number, 3, 32, 32), 9.0)).permute(0, 2, 3, 1)


def rectangles(images):
    """Top, left, height and width of what is no longer 9; checks that it is a rectangle."""
    erased = (images != 9).any(-1)
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])
    found = erased.any(2).any(1)
    first = [side.int().argmax(1) for side in (rows, columns)]
    return torch.stack([*first, rows.sum(1), columns.sum(1)], 1)[found].numpy(), found


def test_boxes_are_distributed_as_timms():
    expected, found = rectangles(theirs("const", 4000))
    assert found.all()
    applies, boxes = Erasing(1.0, "const", seed=4).boxes(IDS, 3, 32)
    top, bottom, left, right = boxes.T.numpy()
    assert applies.all()
    for mine, other in zip((top, left, bottom - top, right - left), expected.T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > 1e-4
    area = (bottom - top) * (right - left)
    assert stats.ks_2samp(area, expected[:, 2] * expected[:, 3]).pvalue > 1e-4
    assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 32, 32)  # all that fits, and no more


@pytest.mark.parametrize("probability", [0.25, 0.9])
def test_probability(probability):
    applies, _ = Erasing(probability, "const", 0).boxes(IDS, 0, 32)
    assert stats.binomtest(int(applies.sum()), len(IDS), probability).pvalue > 1e-4


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_colours_are_timms(mode):
    """Nothing, one normal colour an image, one a pixel; and nothing else changes."""
    number = 500
    mine = torch.full((number, 32, 32, 3), 9.0)
    Erasing(0.5, mode, seed=1).erase_(mine, IDS[:number], 2)
    boxes, found = rectangles(mine)
    applies, expected = Erasing(0.5, mode, seed=1).boxes(IDS[:number], 2, 32)
    assert torch.equal(found, applies)
    assert np.array_equal(boxes[:, :2], expected[applies][:, [0, 2]])
    samples = []
    for images in (mine, theirs(mode, number, 0.5)):
        erased = [image[(image != 9).any(-1)] for image in images]
        erased = [colours for colours in erased if len(colours)]
        if mode != "pixel":
            assert all((colours == colours[0]).all() for colours in erased)
        values = torch.cat([colours[: 1 if mode == "rand" else 20] for colours in erased])
        samples.append(values)
    assert (samples[0] == 0).all() == (mode == "const") == (samples[1] == 0).all()
    if mode != "const":
        assert stats.kstest(samples[0].numpy().ravel(), "norm").pvalue > 1e-4
        assert stats.ks_2samp(*(values.numpy().ravel() for values in samples)).pvalue > 1e-4
        correlation = np.corrcoef(samples[0].numpy().T)[np.triu_indices(3, 1)]
        assert np.abs(correlation).max() < 4.5 / len(samples[0]) ** 0.5


def test_a_colour_for_each_rectangle_is_of_its_own_draws():
    ids = torch.arange(3)
    found = Erasing(1.0, "rand", 5)._colours(ids, 2, 8).view(3, 3)
    assert torch.equal(found, draws.normal(5, 2, ids[:, None], torch.arange(17, 20)))
