"""Names and aliases of --model."""

import pytest
import timm

from cifar_dist.errors import UsageError
from cifar_dist.models import ALIASES, NATIVE, resolve_name


@pytest.mark.parametrize(
    ("typed", "resolved"),
    [
        ("swin_base", "swin_base_patch4_window7_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("vit_base_p8", "vit_base_patch8_224.augreg_in21k_ft_in1k"),
        ("nfnet_f0", "dm_nfnet_f0.dm_in1k"),
        ("resnet18", "resnet18"),
        ("resnet18.tv_in1k", "resnet18.tv_in1k"),
        ("dla34", "dla34"),
        ("cnn4", "cnn4"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k"),
    ],
)
def test_resolve(typed, resolved):
    assert resolve_name(typed) == resolved


def test_every_alias_is_a_pretrained_timm_model():
    assert all(timm.models.is_model_pretrained(name) for name in ALIASES.values())
    assert not set(ALIASES) & set(NATIVE)


def test_local_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_name(f"local-dir:{tmp_path}") == f"local-dir:{tmp_path}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("swin_bse", "Did you mean swin_base"),
        ("resnet18_cifr", "Did you mean resnet18_cifar"),
        ("wrn28_1", "wrn28_10"),
        ("ViT", "Did you mean vit_tiny, vit_small, vit_base?"),
        ("ResNet18", "Did you mean resnet18, resnet18_cifar"),
        ("Resnet-50", "Did you mean resnet50"),
        ("resnet18.nope", "there are: resnet18.a1_in1k"),
        ("cnn4.nope", "no tag 'nope'"),
        ("xyzzy", "no such model"),
        ("", "no such model"),
        ("timm/resnet18", "hf-hub:timm/resnet18, in a folder"),
        ("ftp:resnet18", "Unknown model source 'ftp'"),
        ("hf-hub:", "no model id"),
        ("local-dir:/nowhere/at/all", "config.json"),
    ],
)
def test_refused(typed, said):
    with pytest.raises(UsageError, match="--model") as caught:
        resolve_name(typed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
