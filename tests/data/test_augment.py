import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode

from cifar_dist.config import AugmentConfig, InputConfig
from cifar_dist.data.augment import Augment, Preprocess, View, draws
from cifar_dist.data.augment.draws import CROP_X, CROP_Y, CUTOUT_X, CUTOUT_Y, FLIP, uniform
from cifar_dist.data.augment.policy import AFFINE_OPS, OPS, RandAugment, TrivialAugment
from cifar_dist.policy_string import parse_policy

PLAIN = InputConfig(32, (0.49, 0.48, 0.45), (0.25, 0.24, 0.26), "bilinear")
GREYS = InputConfig(32, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), "bilinear")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8))
IDS = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[:64]


def splitmix64(state):
    """The published generator on Python's integers: (next state, output)."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return state, z ^ (z >> 31)


def test_mix_is_the_published_finaliser():
    outputs, state = [], 0
    for _ in range(1000):
        state, output = splitmix64(state)
        outputs.append(output)
    assert outputs[0] == 0xE220A8397B1DCDAF  # the first number of splitmix64.c for seed 0
    states = torch.arange(1, 1001) * draws._GAMMA
    assert [value % 2**64 for value in draws._mix(states).tolist()] == outputs


def test_draws_are_the_numbers_of_a_samples_own_stream():
    key = splitmix64(splitmix64(3)[1] + 5 * 0x9E3779B97F4A7C15)[1]  # seed 3, epoch 5
    for sample in (0, 1, 49_999):
        state = splitmix64(sample + key - 0x9E3779B97F4A7C15)[1]
        for draw in range(4):
            state, output = splitmix64(state)
            assert uniform(3, 5, torch.tensor([sample]), draw).item() == (output >> 11) / 2**53


def test_draws_are_pinned():
    """The same numbers on every machine and version: a change here changes every run."""
    assert (CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X) == (0, 1, 2, 3, 4)
    assert uniform(0, 0, torch.arange(3), torch.tensor([[0], [4]])).tolist() == [
        [0.7682768830978309, 0.2653777604926165, 0.38022682556804],
        [0.577513903746266, 0.16502487394732968, 0.3716801782641892],
    ]


@pytest.mark.parametrize("along", ["ids", "epochs", "draws", "seeds"])
def test_uniform_and_unrelated_along_each_argument(along):
    number = 20_000
    count = torch.arange(number)
    one = torch.tensor([7])
    values = {
        "ids": lambda: uniform(0, 0, count, 0),
        "epochs": lambda: torch.cat([uniform(0, epoch, one, 0) for epoch in range(number // 10)]),
        "draws": lambda: uniform(0, 0, one, count),
        "seeds": lambda: torch.cat([uniform(seed, 0, one, 0) for seed in range(number // 10)]),
    }[along]().numpy()
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    assert stats.chisquare(np.histogram(values, 100, (0, 1))[0]).pvalue > 1e-4
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    for lag in (1, 2, 3, 16):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 4.5 / len(values) ** 0.5
    pairs = np.histogram2d(values[1::2], values[::2], 8, [(0, 1), (0, 1)])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 299, 0)])
def test_neighbouring_seeds_epochs_and_draws_are_unrelated(other):
    ids = torch.arange(50_000)
    here = uniform(0, 0, ids, 0).numpy()
    there = uniform(other[0], other[1], ids, other[2]).numpy()
    assert abs(np.corrcoef(here, there)[0, 1]) < 4.5 / 50_000**0.5
    table = np.histogram2d(here, there, 10, [(0, 1), (0, 1)])[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-4
    assert not np.isin(here, there).any()


def test_numbers_depend_on_the_sample_alone():
    whole = uniform(1, 2, IDS, torch.arange(5)[:, None])
    for row in (0, 17, 63):
        for draw in range(5):
            assert uniform(1, 2, IDS[row : row + 1], draw).item() == whole[draw, row].item()


def offsets(seed, epoch, padding):
    u = [uniform(seed, epoch, IDS, draw) for draw in range(5)]
    span = 2 * padding + 1
    centres = [(u[CUTOUT_Y] * 32).long().tolist(), (u[CUTOUT_X] * 32).long().tolist()]
    return (u[CROP_Y] * span).long().tolist(), (u[CROP_X] * span).long().tolist(), u[FLIP], *centres


def by_torchvision(choice, input, seed, epoch):
    """One image at a time, with the same offsets."""
    results = []
    for image, top, left, flip, y, x in zip(IMAGES, *offsets(seed, epoch, choice.crop_padding), strict=True):
        mode = {"zeros": "constant"}.get(choice.crop_mode, choice.crop_mode)
        image = TF.crop(TF.pad(image.permute(2, 0, 1), [choice.crop_padding], 0, mode), top, left, 32, 32)
        image = TF.hflip(image) if flip < choice.hflip else image
        image = TF.normalize(TF.convert_image_dtype(image, torch.float32), list(input.mean), list(input.std))
        for row in range(32):
            for column in range(32):
                first_row, first_column = y - choice.cutout // 2, x - choice.cutout // 2
                if 0 <= row - first_row < choice.cutout and 0 <= column - first_column < choice.cutout:
                    image[:, row, column] = 0
        mode = InterpolationMode(input.interpolation)
        results.append(TF.resize(image, [input.img_size] * 2, mode, antialias=True))
    return torch.stack(results)


@pytest.mark.parametrize(
    "choice",
    [
        AugmentConfig(),
        AugmentConfig(crop_padding=0, hflip=0.5),
        AugmentConfig(crop_padding=7, hflip=0.0),
        AugmentConfig(crop_padding=0, hflip=0.0),
        AugmentConfig(crop_mode="reflect"),
        AugmentConfig(crop_padding=31, crop_mode="reflect", hflip=0.0),
        AugmentConfig(cutout=16),
        AugmentConfig(cutout=5, hflip=1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [32, 48])
def test_equals_torchvision_with_the_same_offsets(choice, size):
    input = dataclasses.replace(PLAIN, img_size=size)
    ours = Augment(choice, input, 11, "cpu", torch.float32)(IMAGES, IDS, 4)
    assert ours.shape == (64, 3, size, size) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, by_torchvision(choice, input, 11, 4), rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch():
    apply = Augment(AugmentConfig(cutout=8), PLAIN, 0, "cpu", torch.float32)
    before = IMAGES.clone()
    whole = apply(IMAGES, IDS, 3)
    order = torch.randperm(64)
    assert torch.equal(apply(IMAGES[order], IDS[order], 3), whole[order])
    assert torch.equal(apply(IMAGES[5:6], IDS[5:6], 3), whole[5:6])
    assert torch.equal(IMAGES, before)
    assert not torch.equal(apply(IMAGES, IDS, 4), whole)
    assert not torch.equal(Augment(AugmentConfig(cutout=8), PLAIN, 1, "cpu", torch.float32)(IMAGES, IDS, 3), whole)


def test_offsets_are_all_as_frequent():
    """Where a lit corner lands tells the crop; 9 x 9 offsets and the flip, each equally often."""
    image = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    image[0, 4, 4] = 255
    number = 40_000
    apply = Augment(AugmentConfig(crop_padding=4, hflip=0.25), GREYS, 0, "cpu", torch.float32)
    apply._preprocess._input = dataclasses.replace(GREYS, img_size=9)
    seen = apply(image.expand(number, 9, 9, 3), torch.arange(number), 0)[:, 0].sum(0) / 255
    assert seen.sum() == number
    assert stats.chisquare(seen.numpy().ravel()).pvalue > 1e-4


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_flip_probability(share):
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, :, 0] = 1
    number = 20_000
    input = dataclasses.replace(GREYS, img_size=4)
    apply = Augment(AugmentConfig(crop_padding=0, hflip=share), input, 0, "cpu", torch.float32)
    flipped = apply(image.expand(number, 4, 4, 3), torch.arange(number), 0)[:, 0, 0, 3].sum().item()
    assert stats.binomtest(int(flipped), number, share).pvalue > 1e-4


def test_alternating_flips_at_random_and_then_the_other_way_each_epoch():
    """airbench: half the images are mirrored in epoch 0, from then on every image changes sides."""
    number, share = 20_000, 0.5
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[0, :, 0] = 1
    choice = AugmentConfig(crop_padding=0, flip_mode="alternating")
    apply = Augment(choice, dataclasses.replace(GREYS, img_size=4), 0, "cpu", torch.float32)
    ids = torch.arange(number)
    flipped = [apply(image.expand(number, 4, 4, 3), ids, epoch)[:, 0, 0, 3] for epoch in range(4)]
    assert stats.binomtest(int(flipped[0].sum()), number, share).pvalue > 1e-4
    for before, after in itertools.pairwise(flipped):
        assert torch.equal(after, 1 - before)


EVERYTHING = AugmentConfig(cutout=8, aa="rand-m9-mstd0.5-inc1", color_jitter=0.4, reprob=0.5, remode="pixel")


@pytest.mark.parametrize(
    "choice", [EVERYTHING, dataclasses.replace(EVERYTHING, aa="trivial", remode="rand", crop_padding=0, hflip=0)]
)
def test_with_everything_on_a_sample_does_not_depend_on_its_batch(choice):
    apply = Augment(choice, PLAIN, 0, "cpu", torch.float32)
    before = IMAGES.clone()
    whole = apply(IMAGES, IDS, 3)
    order = torch.randperm(64)
    assert torch.equal(apply(IMAGES[order], IDS[order], 3), whole[order])
    for row in range(8):
        assert torch.equal(apply(IMAGES[row : row + 1], IDS[row : row + 1], 3), whole[row : row + 1])
    assert torch.equal(IMAGES, before)
    assert not torch.equal(apply(IMAGES, IDS, 4), whole)


def test_default_pixels_are_pinned():
    """What was drawn before other augmentations came is drawn the same."""
    pixels = Augment(AugmentConfig(cutout=8), GREYS, 7, "cpu", torch.float32)(IMAGES, IDS, 2)
    digest = hashlib.sha256(pixels.round().to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()
    assert digest[:16] == "334c4781af0bb947"


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [20, 31, 48, 64, 224])
def test_resize_equals_pil_within_one_grey_level(interpolation, size):
    """On 8-bit images, noise among them: bicubic overshoots there and is clipped after each pass, as PIL does."""
    images = IMAGES[:20]
    input = dataclasses.replace(GREYS, img_size=size, interpolation=interpolation)
    ours = Preprocess(input, "cpu", torch.float32)(images).permute(0, 2, 3, 1).round().numpy()
    for image, mine in zip(images.numpy(), ours, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((size, size), FILTERS[interpolation]))
        assert np.abs(mine - theirs.astype(np.float32)).max() <= 1


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [20, 31, 48, 64, 224])
def test_resize_equals_pil_on_floats(interpolation, size):
    """PIL neither rounds nor clips float images, so middle greys can be compared more closely."""
    images = IMAGES[:8] // 2 + 64
    input = dataclasses.replace(GREYS, img_size=size, interpolation=interpolation)
    ours = Preprocess(input, "cpu", torch.float32)(images)
    for image, mine in zip(images.permute(0, 3, 1, 2).float().numpy(), ours, strict=True):
        for plane, channel in zip(image, mine, strict=True):
            theirs = np.asarray(Image.fromarray(plane).resize((size, size), FILTERS[interpolation]))
            assert np.abs(channel.numpy() - theirs).max() < 1e-3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_equals_torchvision_and_commutes_with_normalise(interpolation):
    input = dataclasses.replace(PLAIN, img_size=80, interpolation=interpolation)
    images = IMAGES // 2 + 64  # middle greys: torchvision does not clip floats
    ours = Preprocess(input, "cpu", torch.float32)(images)
    floats = TF.convert_image_dtype(images.permute(0, 3, 1, 2), torch.float32)
    resized = TF.resize(floats, [80, 80], InterpolationMode(interpolation), antialias=True)
    torch.testing.assert_close(ours, TF.normalize(resized, list(input.mean), list(input.std)), rtol=1e-5, atol=2e-5)


def test_bicubic_is_clipped_in_each_channel_by_its_own_bounds():
    """Black, white and noise; PIL clips greys, ours what they are normalised to."""
    images = torch.cat([IMAGES[:4], (IMAGES[4:8] > 127).byte() * 255])
    input = dataclasses.replace(PLAIN, img_size=64, interpolation="bicubic", mean=(0.1, 0.5, 0.9), std=(0.1, 0.3, 0.7))
    ours = Preprocess(input, "cpu", torch.float32)(images)
    pictures = [Image.fromarray(image).resize((64, 64), FILTERS["bicubic"]) for image in images.numpy()]
    theirs = torch.stack([TF.to_tensor(picture) for picture in pictures])
    theirs = TF.normalize(theirs, list(input.mean), list(input.std))
    in_greys = (ours - theirs).abs() * torch.tensor(input.std)[:, None, None] * 255
    assert in_greys.max() < 1.1  # PIL rounds after each pass


def test_no_resize_keeps_channels_last():
    ours = Preprocess(PLAIN, "cpu", torch.float32)(IMAGES)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    theirs = TF.normalize(IMAGES.permute(0, 3, 1, 2) / 255, list(PLAIN.mean), list(PLAIN.std))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [32, 64])
def test_half_precision_is_rounded_after_normalising(size):
    input = dataclasses.replace(PLAIN, img_size=size)
    exact = Augment(AugmentConfig(), input, 0, "cpu", torch.float32)(IMAGES, IDS, 0)
    half = Augment(AugmentConfig(), input, 0, "cpu", torch.bfloat16)(IMAGES, IDS, 0)
    assert half.dtype == torch.bfloat16
    if size == 32:
        assert torch.equal(half, exact.to(torch.bfloat16))
    assert (half.float() - exact).abs().max() < 0.04  # of about 4: three roundings to 8 bits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [32, 96])
def test_cuda_sees_the_same_pixels(size):
    choice, input = AugmentConfig(cutout=8), dataclasses.replace(PLAIN, img_size=size)
    here = Augment(choice, input, 5, "cpu", torch.float32)(IMAGES, IDS, 9)
    there = Augment(choice, input, 5, "cuda", torch.float32)(IMAGES.cuda(), IDS.cuda(), 9)
    assert torch.equal(uniform(5, 9, IDS, 0), uniform(5, 9, IDS.cuda(), 0).cpu())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "trivial"])
def test_cuda_sees_the_same_pixels_of_every_policy(aa):
    """Within a grey level, which a later operation may stretch: in all but a few of them."""
    choice = dataclasses.replace(EVERYTHING, aa=aa)
    here = Augment(choice, GREYS, 5, "cpu", torch.float32)(IMAGES, IDS, 9)
    there = Augment(choice, GREYS, 5, "cuda", torch.float32)(IMAGES.cuda(), IDS, 9).cpu()
    assert ((here - there).abs() > 1.01).float().mean() < 1e-3


def test_a_view_is_moved_as_it_says_and_then_mirrored():
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    image[0, 2, 5] = 255
    assert View(1, moved=1)(image)[0, ..., 0].nonzero().tolist() == [[3, 6]]
    assert View(1, mirrored=True, moved=-1)(image)[0, ..., 0].nonzero().tolist() == [[1, 3]]


def test_the_numbers_of_draws_are_pinned():
    """They are part of the format: with another one, a run that goes on would see other pixels."""
    found = {name: value for name, value in vars(draws).items() if name.isupper() and not name.startswith("_")}
    assert found == {
        "CROP_Y": 0, "CROP_X": 1, "FLIP": 2, "CUTOUT_Y": 3, "CUTOUT_X": 4, "JITTER_ORDER": 5, "JITTER_BRIGHTNESS": 6,
        "JITTER_CONTRAST": 7, "JITTER_COLOUR": 8, "MIX_APPLY": 9, "MIX_SWITCH": 10, "MIX_LAM": 11, "MIX_Y": 12,
        "MIX_X": 13, "ERASE_APPLY": 14, "ERASE_TOP": 15, "ERASE_LEFT": 16, "ERASE_COLOUR": 17, "ERASE_AREA": 20,
        "ERASE_ASPECT": 30, "BOX_AREA": 40, "BOX_RATIO": 50, "BOX_TOP": 60, "BOX_LEFT": 61, "POLICY_OP": 64,
        "POLICY_APPLY": 65, "POLICY_LEVEL": 66, "POLICY_SIGN": 67, "POLICY_FILTER": 68, "POLICY_STRIDE": 5,
        "ERASE_PIXELS": 2**20,
    }  # fmt: skip


@pytest.mark.parametrize("flag", [{"aa": "trivial"}, {"aa": "rand-m9-n2"}, {"color_jitter": 0.4}])
def test_policies_are_applied(flag):
    """To images that have no one colour, and in one of them, by draws of its own."""
    plain, changed = (
        Augment(AugmentConfig(crop_padding=0, hflip=0, **more), GREYS, 0, torch.device("cpu"), torch.float32)
        for more in ({}, flag)
    )
    same = (plain(IMAGES, IDS, 0) == changed(IMAGES, IDS, 0)).flatten(1).all(1)
    assert same.float().mean() < 0.4


@pytest.mark.parametrize(("aa", "expected"), [("trivial", {0, 255}), ("rand-m9-n1", {128, 255})])
def test_what_a_policy_moves_in_is_black_or_the_mean(aa, expected):
    """torchvision's TrivialAugment fills with black, timm's RandAugment with the mean."""
    white = torch.full((200, 16, 16, 3), 255, dtype=torch.uint8)
    grey, ids = InputConfig(16, (128 / 255,) * 3, (1 / 255,) * 3, "bilinear"), torch.arange(200)
    config = AugmentConfig(crop_padding=0, hflip=0, aa=aa)
    pixels = (Augment(config, grey, 0, torch.device("cpu"), torch.float32)(white, ids, 0) + 128).round().flatten(1)
    layers = TrivialAugment(0) if aa == "trivial" else RandAugment(parse_policy(aa), 0)
    moved = torch.tensor([OPS[op] in AFFINE_OPS for op in layers.layer(0, ids, 0, 16).op.tolist()])
    assert {pixels[moved].min().item(), pixels[moved].max().item()} == expected
