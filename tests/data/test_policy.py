"""Policies against timm's and torchvision's, which work on one PIL image at a time."""

import functools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment, rand_augment_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from cifar_dist.command_line import parse_command_line
from cifar_dist.data.augment.policy import (
    AFFINE_OPS,
    OPS,
    ColourJitter,
    Layer,
    RandAugment,
    TrivialAugment,
    rand_arguments,
    trivial_arguments,
)  # fmt: skip
from cifar_dist.policy_string import RandPolicy, parse_policy

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)


def smooth_images():
    """Like photographs: neighbours are alike, histograms have gaps, some channels have one value only."""
    coarse = torch.from_numpy(NOISE[:, :6, :6].transpose(0, 3, 1, 2).copy())
    images = TF.resize(coarse, [32, 32], antialias=True).permute(0, 2, 3, 1).contiguous()
    images[3, :, :, 1], images[4], images[5] = 77, 0, images[5] // 3 + 90
    return images


IMAGES = torch.cat([torch.from_numpy(NOISE), smooth_images()])
IDS = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))[: len(IMAGES)]
FILL = (125, 122, 114)
TIMM_NAMES = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "Posterize", "solarize": "Solarize", "solarize_add": "SolarizeAdd", "color": "Color",
    "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness", "shear_x": "ShearX",
    "shear_y": "ShearY", "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
}  # fmt: skip
TORCHVISION_NAMES = {name: words.removesuffix("Rel") for name, words in TIMM_NAMES.items()} | {"identity": "Identity"}


def ours(name, argument, interpolation, fill=FILL, images=IMAGES):
    """One operation, one argument, on all images."""
    op = torch.full((len(images),), OPS.index(name) if name in OPS else -1)
    done = images.clone()
    where = torch.full((len(images),), interpolation == "bicubic") if interpolation != "nearest" else "nearest"
    layer = Layer(op, torch.full((len(images),), float(argument), dtype=torch.float64), where)
    layer.apply_(done, torch.tensor(fill, dtype=torch.uint8))
    return done.numpy().astype(int)


def by_pil(work):
    return np.stack([np.asarray(work(Image.fromarray(image))) for image in IMAGES.numpy()]).astype(int)


@pytest.fixture
def sign(monkeypatch):
    """Sets whether timm negates."""
    return lambda negative: monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if negative else 0.1)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", TIMM_NAMES)
@pytest.mark.parametrize("magnitude", [0.0, 3.7, 9.0, 10.0])
def test_every_operation_of_rand_equals_timm(name, magnitude, increasing, sign):
    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    assert [word.removesuffix("Increasing") for word in names] == list(TIMM_NAMES.values())
    for negative in (False, True):
        sign(negative)
        mine = rand_arguments(torch.tensor([magnitude], dtype=torch.float64), torch.tensor([negative]), increasing, 32)
        assert list(mine) == list(TIMM_NAMES)
        argument = 0.0 if mine[name] is None else mine[name].item()
        for interpolation in ("bilinear", "bicubic"):
            hparams = {"img_mean": FILL, "interpolation": getattr(Image.Resampling, interpolation.upper())}
            op = auto_augment.AugmentOp(names[list(TIMM_NAMES).index(name)], 1.0, magnitude, hparams)
            if name == "posterize" and argument == 0:  # PIL from version 12 refuses to leave no bits, timm asks for it
                assert not ours(name, argument, interpolation).any()
                continue
            off = np.abs(ours(name, argument, interpolation) - by_pil(op))
            assert off.max() <= 1
            assert (off > 0).mean() < (0.05 if name in AFFINE_OPS else 1e-3)  # whole numbers, cut after rounding


@pytest.mark.parametrize("name", list(trivial_arguments(torch.tensor([0]), torch.tensor([True]))))
@pytest.mark.parametrize("number", [0, 7, 15, 30])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_every_operation_of_trivial_equals_torchvision(name, number, as_tensor):
    """Nearest neighbours may differ where a place lies on the border of two pixels, which PIL finds with 16 bits."""
    space = v2.TrivialAugmentWide._AUGMENTATION_SPACE
    assert list(space) == [TORCHVISION_NAMES[key] for key in trivial_arguments(torch.tensor([0]), torch.tensor([True]))]
    strengths, signed = space[TORCHVISION_NAMES[name]]
    theirs = strengths(31, 32, 32)
    transform = v2.TrivialAugmentWide()
    for negative in (False, True)[: 1 + signed]:
        mine = trivial_arguments(torch.tensor([number]), torch.tensor([negative]))[name]
        magnitude = 0.0 if theirs is None else float(theirs[number]) * (-1 if negative else 1)

        def work(image, magnitude=magnitude):
            words, how = TORCHVISION_NAMES[name], transform.interpolation
            return transform._apply_image_or_video_transform(image, words, magnitude, how, transform._fill)

        if as_tensor:
            expected = work(IMAGES.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy().astype(int)
        else:
            expected = by_pil(work)
        off = np.abs(ours(name, 0.0 if mine is None else mine.item(), "nearest", (0, 0, 0)) - expected).max(-1)
        if name in ("rotate", "shear_x", "shear_y"):
            assert (off > 1).mean() <= (0.02 if number == 30 else 0.001)  # 135 degrees: a diagonal lies on borders
        else:  # torchvision's contrast of tensors takes another mean grey than PIL's
            assert off.max() <= (2 if as_tensor and name == "contrast" else 1)


MANY = torch.arange(60_000)


def drawn(layer):
    """How often each operation, and the arguments of each."""
    names = [OPS[place] if place >= 0 else None for place in layer.op.tolist()]
    arguments = {name: layer.argument[[i for i, other in enumerate(names) if other == name]] for name in set(names)}
    return {name: len(found) for name, found in arguments.items()}, arguments


def assert_frequencies(counts, shares):
    assert counts.keys() == shares.keys()
    observed, expected = zip(*((counts[name], shares[name] * len(MANY)) for name in shares), strict=True)
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def timm_arguments(policy, number=4000):
    """What timm's transform passes on to its operations: {name: [argument or None]}."""

    def note(arguments_so_far, image, *arguments, **_):
        arguments_so_far.append(arguments[0] if arguments else 0.0)
        return image

    transform = rand_augment_transform(policy, {"img_mean": FILL})
    seen = {op.name.removesuffix("Increasing"): [] for op in transform.ops}
    for op in transform.ops:
        op.aug_fn = functools.partial(note, seen[op.name.removesuffix("Increasing")])
    random.seed(0)
    np.random.seed(0)
    for _ in range(number):
        transform(Image.new("RGB", (32, 32)))
    return seen, number * transform.num_layers


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand", "rand-m7-n3-p0.8", "rand-m8-mstd101-p1", "rand-m9-mstd2-mmax20-inc1"]
)
def test_rand_draws_as_timm_does(policy):
    theirs, tries = timm_arguments(policy)
    parsed = parse_policy(policy)
    ours = RandAugment(parsed, seed=3)
    assert ours.num_layers == tries / 4000
    assert stats.binomtest(sum(map(len, theirs.values())), tries, parsed.p).pvalue > 1e-4
    layers = [ours.layer(number, MANY, 2, 32) for number in range(ours.num_layers)]
    shares = dict.fromkeys(TIMM_NAMES, parsed.p / 15) | ({None: 1 - parsed.p} if parsed.p < 1 else {})
    for layer in layers:
        counts, arguments = drawn(layer)
        assert_frequencies(counts, shares)
        bicubic = layer.interpolation.sum().item()
        assert stats.binomtest(bicubic, len(MANY), 0.5).pvalue > 1e-4
        for name, word in TIMM_NAMES.items():
            scale = 32 if name.startswith("translate") else 1  # theirs are shares of the image
            found, expected = arguments[name] / scale, np.array(theirs[word])
            assert stats.ks_2samp(found.numpy().round(9), expected.astype(float).round(9)).pvalue > 1e-5, name
    same = (layers[0].op == layers[1].op)[(layers[0].op >= 0) & (layers[1].op >= 0)].double()
    assert stats.binomtest(int(same.sum()), len(same), 1 / 15).pvalue > 1e-4  # layers do not know of each other


def test_trivial_draws_every_operation_and_strength_alike():
    layer = TrivialAugment(seed=1).layer(0, MANY, 0, 32)
    counts, arguments = drawn(layer)
    names = list(trivial_arguments(torch.tensor([0]), torch.tensor([True])))
    assert_frequencies(counts, {name if name != "identity" else None: 1 / 14 for name in names})
    torch.manual_seed(0)
    strengths, _ = v2.TrivialAugmentWide._AUGMENTATION_SPACE["Rotate"]
    expected = strengths(31, 32, 32)[torch.randint(31, (5000,))] * torch.where(torch.rand(5000) <= 0.5, -1, 1)
    assert stats.ks_2samp(arguments["rotate"].numpy().round(4), expected.numpy().round(4)).pvalue > 1e-4


def test_colour_jitter_draws_as_torchvision_does():
    jitter, theirs = ColourJitter(0.4, seed=2), v2.ColorJitter(0.4, 0.4, 0.4)
    layers = [jitter.layer(number, MANY, 1, 32) for number in range(3)]
    orders = torch.stack([layer.op for layer in layers])
    assert stats.chisquare(orders.unique(dim=1, return_counts=True)[1].numpy()).pvalue > 1e-4
    assert orders.unique(dim=1).shape == (3, 6)
    torch.manual_seed(0)
    params = [theirs.make_params([]) for _ in range(4000)]
    for name, key in (("brightness", "brightness"), ("contrast", "contrast"), ("color", "saturation")):
        expected = np.array([param[f"{key}_factor"] for param in params])
        found = torch.cat([layer.argument[layer.op == OPS.index(name)] for layer in layers])
        assert len(found) == len(MANY)
        assert stats.ks_2samp(found.numpy(), expected).pvalue > 1e-4
        assert found.min() >= 0.6 and found.max() <= 1.4
    assert ColourJitter(1.5, 0).layer(0, MANY, 0, 32).argument.min() >= 0


def test_colour_jitter_equals_torchvision_on_pil_images():
    jitter = ColourJitter(0.8, seed=5)
    layers = [jitter.layer(number, IDS, 1, 32) for number in range(3)]
    done = IMAGES.clone()
    for layer in layers:
        layer.apply_(done, torch.zeros(3, dtype=torch.uint8))
    works = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast, "color": TF.adjust_saturation}
    for row, mine in enumerate(done.numpy().astype(int)):
        image = Image.fromarray(IMAGES[row].numpy())
        for layer in layers:
            image = works[OPS[layer.op[row]]](image, layer.argument[row].item())
        assert np.abs(mine - np.asarray(image)).max() <= 1


def test_a_policy_works_on_the_images_it_draws_for():
    """Layers in order, each image by its own operation: the same as one image at a time."""
    policy = RandAugment(parse_policy("rand-m9-n3-p0.9"), seed=0)
    layers = [policy.layer(number, IDS, 4, 32) for number in range(3)]
    together = IMAGES.clone()
    for layer in layers:
        layer.apply_(together, torch.tensor(FILL, dtype=torch.uint8))
    for row in range(len(IDS)):
        image = IMAGES[row : row + 1].clone()
        for layer in layers:
            if (place := layer.op[row]) >= 0:
                filter = "bicubic" if layer.interpolation[row] else "bilinear"
                image = torch.from_numpy(ours(OPS[place], layer.argument[row], filter, images=image)).to(torch.uint8)
        assert torch.equal(image[0], together[row])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rand", RandPolicy()),
        ("rand-m9-mstd0.5-inc1", RandPolicy(m=9, mstd=0.5, inc=True)),
        ("rand-n3-m7-p0.25", RandPolicy(m=7, n=3, p=0.25)),
        ("rand-mstd101", RandPolicy(mstd=float("inf"))),
        ("rand-m15-mmax20-inc0", RandPolicy(m=15, mmax=20)),
        ("trivial", None),
    ],
)
def test_policies_are_read_as_timm_reads_them(text, expected):
    assert parse_policy(text) == expected
    if expected is not None:
        theirs = rand_augment_transform(text, {"img_mean": FILL})
        op = theirs.ops[4]
        assert (theirs.num_layers, op.prob, op.magnitude) == (expected.n, expected.p, expected.m)
        assert (op.magnitude_std, op.magnitude_max or 10) == (expected.mstd, expected.mmax)
        assert op.name == ("PosterizeIncreasing" if expected.inc else "Posterize")


@pytest.mark.parametrize(
    "text, said",
    [
        ("randaug-m9", "'randaug-m9' is no policy; write rand-m9-mstd0.5-inc1, trivial or none"),
        ("rand-q3", "'q3' is none of m, n, p, mstd, mmax and inc with a number"),
        ("rand-m", "'m' is none of"),
        ("rand-tweights", "'tweights' is none of"),
        ("rand-m9-m5", "m is given twice"),
        ("rand-p1.5", "p is a number from 0 to 1, not 1.5"),
        ("rand-n0", "n is a whole number from 1 to 16, not 0"),
        ("rand-m9.5", "m is a whole number from 0, not 9.5"),
        ("rand-m15", "m15 is above the highest, 10; raise it with mmax"),
        ("", "'' is no policy"),
    ],
)
def test_bad_policies_are_refused_in_one_line(text, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_command_line([f"--aa={text}"])
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "argument --aa: " in error and said in error and error.count("\n") == 1
