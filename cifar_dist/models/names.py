"""Names that ``--model`` takes: timm's own, short aliases, and the CIFAR-native models registered with timm."""

from __future__ import annotations

from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, parse_model_name, split_model_name_tag

from cifar_dist.errors import UsageError, did_you_mean
from cifar_dist.models import airbench, cifar_variants, cnn4, wide_resnet  # noqa: F401 - each registers its models

ALIASES = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_base_p8": "vit_base_patch8_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "nfnet_f0": "dm_nfnet_f0.dm_in1k",
}
NATIVE = tuple(name for name in timm.list_models() if model_entrypoint(name).__module__.startswith(__package__))


def resolve_name(name: str) -> str:
    """The name timm builds for what a user typed.

    An alias becomes its timm name; a timm name (also with ``.tag``), ``hf-hub:REPO`` and ``local-dir:FOLDER`` stay.

    Raises:
        UsageError: no such model, tag, source or folder; the nearest names are named.
    """
    name = ALIASES.get(name, name)
    if name.endswith(".py"):
        raise UsageError(f"--model {name}: a model of your own goes into cifar_dist/models (docs/settings.md).")
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise UsageError(f"--model {name}: {_no_name(name) or error}") from None
    if source == "local-dir" and not (Path(identifier) / "config.json").is_file():
        raise UsageError(f"--model {name}: {identifier} is not a model folder (it has no config.json).")
    if source is not None:
        return name
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture):
        near = _nearest(architecture.lower())
        raise UsageError(f"--model {name}: timm has no such model.{near}")
    known = get_arch_pretrained_cfgs(architecture)
    if tag and name not in known:
        tags = ", ".join(known) or "none"
        raise UsageError(f"--model {name}: {architecture} has no tag {tag!r}; there are: {tags}.")
    return name


def _no_name(name: str) -> str:
    """What is meant by a path or an address without its source, which timm refuses."""
    if "/" not in name:
        return ""
    hub = "" if name.startswith((".", "/", "~")) or "://" in name else f"on the Hub hf-hub:{name}, "
    return (
        f"no name of timm's; a model of its is {hub}in a folder local-dir:PATH, and those of transformers have other"
        " names in timm, such as vit_base_patch16_224."
    )


def _nearest(name: str) -> str:
    """`` Did you mean a, b?`` for models that begin with a lower-case name, or else are spelled alike."""
    known = [*ALIASES, *timm.list_models()]
    begin = [model for model in known if name and model.startswith(name)]
    return f" Did you mean {', '.join(begin[:3])}?" if begin else did_you_mean(name, known)
