"""Random resized crops, against torchvision's."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import AugmentConfig, InputConfig
from cifar_dist.data.augment import Augment
from cifar_dist.data.augment.resized_crop import ResizedCrop
from cifar_dist.errors import UsageError
from cifar_dist.plan import make_plan
from tests.test_plan import SIZES

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
IDS = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:64]


def greys(size, interpolation="bilinear"):
    """What leaves pixels as they are, 0 to 255."""
    return InputConfig(size, (0.0,) * 3, (1 / 255,) * 3, interpolation)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [12, 32, 72])
def test_pixels_are_those_of_torchvision(size, interpolation):
    crop = ResizedCrop((0.05, 1.0), greys(size, interpolation), seed=3)
    made = crop(IMAGES, IDS, epoch=2)
    assert (made.dtype, made.shape) == (torch.uint8, (64, size, size, 3))
    for image, found, (top, left, height, width) in zip(IMAGES, made, crop.boxes(IDS, 2, 32).tolist(), strict=True):
        mode = InterpolationMode(interpolation)
        box = (top, left, height, width)
        expected = TF.resized_crop(image.permute(2, 0, 1), *box, [size, size], mode, antialias=True).permute(1, 2, 0)
        torch.testing.assert_close(found.int(), expected.int(), atol=1, rtol=0)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.6)])
def test_boxes_are_drawn_as_torchvision_draws_them(scale):
    number, size = 4000, 224
    ours = ResizedCrop(scale, greys(32), seed=0).boxes(torch.arange(number), 0, size).numpy()
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(number)])
    for of in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / (size - box[:, 2] + 1),
        lambda box: box[:, 1] / (size - box[:, 3] + 1),
    ):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 0.01
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()


def test_where_no_box_fits_it_is_the_whole_image():
    """All of the area fits as a square alone, which no box of 64 x 10 is."""
    crop = ResizedCrop((1.0, 1.0), greys(32), seed=0)
    assert (crop.boxes(IDS, 0, 4000) == torch.tensor([0, 0, 4000, 4000])).all()


def test_a_sample_is_cropped_alike_in_any_batch_and_otherwise_in_another_epoch():
    augment = Augment(AugmentConfig(crop_padding=0, scale=(0.2, 1.0)), greys(48), 0, "cpu", torch.float32)
    whole, part = augment(IMAGES, IDS, 1), augment(IMAGES[10:20], IDS[10:20], 1)
    assert whole.shape == (64, 3, 48, 48)
    torch.testing.assert_close(whole[10:20], part)
    assert (augment(IMAGES, IDS, 2) != whole).flatten(1).any(1).all()


def test_the_crop_comes_before_all_else():
    """Mirrored, jittered, normalised: as if the crops were the images, at the model's size."""
    rest = {"hflip": 0.5, "aa": "rand-m9", "cutout": 20}
    crop = ResizedCrop((0.2, 1.0), greys(48), seed=5)
    both = Augment(AugmentConfig(crop_padding=0, scale=(0.2, 1.0), **rest), greys(48), 5, "cpu", torch.float32)
    after = Augment(AugmentConfig(crop_padding=0, **rest), greys(48), 5, "cpu", torch.float32)
    torch.testing.assert_close(both(IMAGES, IDS, 1), after(crop(IMAGES, IDS, 1), IDS, 1))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--scale 0.08 1", "--scale crops in place of --crop-padding; add --crop-padding 0"),
        ("--scale 0.5 0.1 --crop-padding 0", "--scale 0.5 0.1: the smaller share of the area comes first"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, said):
    with pytest.raises(UsageError, match=said):
        make_plan(parse_command_line(flags.split()).config, SIZES, 1)


def test_flags_and_recipes_give_it_alike(tmp_path):
    (tmp_path / "r.yaml").write_text("scale: [0.08, 1]\ncrop_padding: 0\n")
    by_recipe = parse_command_line(["--config", str(tmp_path / "r.yaml")]).config
    assert by_recipe == parse_command_line(["--scale", "0.08", "1", "--crop-padding", "0"]).config
    assert by_recipe.augment.scale == (0.08, 1.0)
    assert parse_command_line(["--config", str(tmp_path / "r.yaml"), "--scale", "none"]).config.augment.scale is None
