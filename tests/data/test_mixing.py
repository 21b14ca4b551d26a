"""mixup and CutMix against timm's `Mixup` in its pair mode."""

import numpy as np
import pytest
import timm.data.mixup
import torch
from scipy import stats
from timm.data import Mixup

from cifar_dist.config import AugmentConfig
from cifar_dist.data.augment import Mixing
from cifar_dist.data.augment.draws import MIX_APPLY, uniform
from cifar_dist.data.augment.mixing import mix_images, symmetric_beta

IDS = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
CHOICES = [
    AugmentConfig(mixup=0.8, smoothing=0.1),
    AugmentConfig(cutmix=1.0),
    AugmentConfig(mixup=0.2, cutmix=1.0, mixup_prob=0.7, mixup_switch_prob=0.3, smoothing=0.1),
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_timm_with_the_same_shares_and_boxes(choice, layout, monkeypatch):
    images = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    labels, ids = torch.arange(64) % 10, IDS[:64]
    mixing = Mixing(choice, seed=5, num_classes=10)
    before = images.clone()
    mixed, targets = mixing(images, labels, ids, 3)
    assert torch.equal(images, before) and mixed.is_contiguous(memory_format=layout)

    # timm pairs the first with the last; its draws are replaced by ours.
    pairs = mixing.pairs(ids, 3, 24)
    corrected = zip(map(tuple, pairs.box[pairs.cut].tolist()), pairs.lam[pairs.cut].numpy(), strict=True)
    theirs = Mixup(choice.mixup, choice.cutmix, mode="pair", label_smoothing=choice.smoothing, num_classes=10)
    lams = np.where(pairs.cut, np.float32(0.5), pairs.lam.numpy())  # corrected by the box
    monkeypatch.setattr(theirs, "_params_per_elem", lambda size: (lams.copy(), pairs.cut.numpy()))
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, **__: next(corrected))
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(63, 0, -2)])
    expected, expected_targets = theirs(images[order].clone(), labels[order])
    torch.testing.assert_close(mixed[order], expected)
    torch.testing.assert_close(targets[order], expected_targets)


def test_boxes_and_their_shares_are_timms(monkeypatch):
    """The same lambda and centre, given to timm's own box."""
    choice, size = AugmentConfig(cutmix=1.0), 32
    pairs = Mixing(choice, 0, 10).pairs(IDS[:2000], 1, size)
    draws = uniform(0, 1, IDS[0:2000:2], torch.arange(MIX_APPLY + 2, MIX_APPLY + 5)[:, None])
    for row, (u, y, x) in enumerate(draws.T.tolist()):
        lam = stats.beta.ppf(u, 1.0, 1.0)
        centre = iter([int(y * size), int(x * size)])
        monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda *_, here=centre, **__: next(here))
        (top, bottom, left, right), share = timm.data.mixup.cutmix_bbox_and_lam((3, size, size), np.float32(lam))
        assert pairs.box[row].tolist() == [top, bottom, left, right]
        assert pairs.lam[row].item() == pytest.approx(share)


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.8, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha):
    lam = symmetric_beta(alpha, uniform(1, 2, torch.arange(50_000), 11)).numpy()
    assert lam.min() >= 0 and lam.max() <= 1
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 1e-4
    exact = stats.beta.ppf(u := np.linspace(0.001, 0.999, 777), alpha, alpha)
    np.testing.assert_allclose(symmetric_beta(alpha, torch.from_numpy(u)).numpy(), exact, atol=1e-4)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_draws_are_distributed_as_timms(choice):
    pairs = Mixing(choice, seed=2, num_classes=10).pairs(torch.arange(40_000), 0, 32)
    np.random.seed(0)
    theirs = Mixup(choice.mixup, choice.cutmix, prob=choice.mixup_prob, switch_prob=choice.mixup_switch_prob)
    lam, cut = theirs._params_per_elem(20_000)
    for row in np.flatnonzero(cut & (lam < 1)):
        lam[row] = timm.data.mixup.cutmix_bbox_and_lam((3, 32, 32), lam[row])[1]
    mine = pairs.lam.numpy()
    assert stats.ks_2samp(mine[~pairs.cut], lam[~cut]).pvalue > 1e-4 if choice.mixup else pairs.cut.all()
    assert stats.ks_2samp(mine[pairs.cut], lam[cut]).pvalue > 1e-4 if choice.cutmix else not pairs.cut.any()
    assert abs(pairs.cut.float().mean() - cut.mean()) < 4.5 * (0.5 / 20_000) ** 0.5
    assert abs((mine == 1).mean() - (lam == 1).mean()) < 4.5 * (0.5 / 20_000) ** 0.5


def test_a_pair_depends_on_nothing_but_itself():
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 10
    mixing = Mixing(CHOICES[2], 0, 10)
    mixed, targets = mixing(images, labels, IDS[:64], 0)
    for start, stop in ((0, 32), (32, 64), (14, 16)):
        part = slice(start, stop)
        images_of_part, targets_of_part = mixing(images[part], labels[part], IDS[:64][part], 0)
        assert torch.equal(images_of_part, mixed[part]) and torch.equal(targets_of_part, targets[part])
    assert not torch.equal(mixing(images, labels, IDS[:64], 1)[0], mixed)


def test_half_precision_is_rounded_once():
    images = torch.randn(8, 3, 8, 8)
    pairs = Mixing(CHOICES[0], 0, 10).pairs(IDS[:8], 0, 8)
    half = mix_images(images.bfloat16(), pairs)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, mix_images(images.bfloat16().float(), pairs).bfloat16())
