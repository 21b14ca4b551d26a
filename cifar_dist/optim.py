"""The optimizer and its parameter groups, through timm's factory."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_layer_decay

from cifar_dist.config import OptimConfig
from cifar_dist.errors import UsageError, did_you_mean

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # for both CPUs and GPUs


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `config` names over the model's trainable parameters.

    Parameters of one dimension (biases, norms) get no weight decay, nor do those that the model names; with
    ``layer_decay`` each layer's groups carry an ``lr_scale`` (timm's ``param_groups_layer_decay``).

    Raises:
        UsageError: timm knows no such optimizer, or it needs a package or device that is not there.
    """
    known = [str(name) for name in list_optimizers()]
    if config.opt not in known:
        raise UsageError(f"--opt {config.opt}: timm has no such optimizer.{did_you_mean(config.opt, known)}")
    if config.opt.startswith("kron") and find_spec("opt_einsum") is None:  # timm only warns
        raise UsageError(f"--opt {config.opt} takes all memory without opt-einsum: pip install opt-einsum.")
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
        )
    except Exception as error:  # missing packages and settings that an optimizer refuses, each in its own way
        raise UsageError(f"--opt {config.opt} cannot be built ({error}); take another.") from None


def fuse(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let torch's own Adam, AdamW and SGD update a weight in one pass over it, on a GPU all weights in one kernel.

    On a CPU torch then takes numbers in the order in which they lie in memory, unchecked: a gradient and moments must
    be laid out as their weight. Autograd sees to the one, torch's optimizers and `Replicated.load` to the other.
    """
    if isinstance(optimizer, FUSED):
        for group in optimizer.param_groups:
            group["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in group["params"]) or None
    return optimizer


def full_rate_share(model: torch.nn.Module, head: set[str], layer_decay: float) -> float:
    """The share of the weights outside the head that keep the full learning rate, since timm sees no layer above them.

    Args:
        model: a timm model.
        head: names of its classifier's parameters.
        layer_decay: less than 1.
    """
    body = {id(parameter): parameter.numel() for name, parameter in model.named_parameters() if name not in head}
    groups = param_groups_layer_decay(model, layer_decay=layer_decay)
    full = (id(parameter) for group in groups if group["lr_scale"] == 1 for parameter in group["params"])
    return sum(body.get(parameter, 0) for parameter in full) / max(sum(body.values()), 1)


def has_momentum(config: OptimConfig) -> bool:
    """Whether timm gives the optimizer ``momentum``."""
    return bool(get_optimizer_info(config.opt).has_momentum)


def state_per_parameter(config: OptimConfig) -> int:
    """Numbers the optimizer keeps per trained weight, counted on a matrix of one thousand.

    Raises:
        UsageError: the optimizer needs more than gradients (second derivatives, a closure).
    """
    layer = torch.nn.Linear(40, 25, bias=False)
    optimizer = make_optimizer(layer, dataclasses.replace(config, lr=1e-3, layer_decay=None))
    layer(torch.ones(1, 40)).sum().backward()
    try:
        optimizer.step()
    except Exception as error:
        raise UsageError(f"--opt {config.opt} cannot step from gradients alone ({error}); take another.") from None
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return round(sum(t.numel() for t in tensors) / 1000)


def is_elementwise(config: OptimConfig) -> bool:
    """Whether the optimizer treats each number of a matrix alone, so that two halves of it are updated as the whole."""
    draws = torch.Generator().manual_seed(0)
    weights, *gradients = torch.randn(4, 256, 160, generator=draws, dtype=torch.float64)
    along = (gradients[0] * weights).sum(1, keepdim=True) / weights.square().sum(1, keepdim=True)
    gradients[0] -= along * weights  # across the weights, which AdamP looks for; the second, against the first
    changes = []
    for shape, pieces in (((256, 160), 1), ((-1,), 2)):
        parameters = [torch.nn.Parameter(piece.clone().view(shape)) for piece in weights.flatten().chunk(pieces)]
        optimizer = create_optimizer_v2(
            [{"params": parameters}],
            opt=config.opt,
            lr=0.1,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
        for gradient in gradients:
            for parameter, part in zip(parameters, gradient.flatten().chunk(pieces), strict=True):
                parameter.grad = part.clone().view(shape)
            optimizer.step()
        changes.append(torch.cat([parameter.detach().flatten() for parameter in parameters]) - weights.flatten())
    return bool((changes[0] - changes[1]).abs().max() < 1e-6 * changes[0].abs().max())
