"""The optimizer factory against plain PyTorch."""

import copy
from contextlib import nullcontext

import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from cifar_dist import optim
from cifar_dist.config import ModelConfig, OptimConfig
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model, head_parameter_names
from cifar_dist.optim import full_rate_share, fuse, make_optimizer, state_per_parameter


@pytest.mark.parametrize(
    "opt, plain",
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    ],
)
def test_names_mean_what_torch_calls_them(opt, plain):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    pairs = [
        (ours, make_optimizer(ours, OptimConfig(opt=opt, lr=0.01, weight_decay=0))),
        (theirs, plain(theirs.parameters())),
    ]
    for _ in range(5):
        inputs = torch.randn(4, 5)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-7)


def test_weight_decay_spares_biases():
    groups = make_optimizer(torch.nn.Linear(5, 3), OptimConfig(weight_decay=0.1)).param_groups
    assert {group["weight_decay"]: [p.ndim for p in group["params"]] for group in groups} == {0.0: [1], 0.1: [2]}


@pytest.mark.parametrize("opt, numbers", [("adamw", 2), ("momentum", 1), ("lion", 1)])
def test_state_is_counted(opt, numbers):
    assert state_per_parameter(OptimConfig(opt=opt)) == numbers


@pytest.mark.parametrize("opt", ["adahessian", "fusedadam", "bnbadam"])
def test_optimizers_that_need_more_are_refused_in_one_line(opt):
    with pytest.raises(UsageError, match=f"--opt {opt} cannot"):
        state_per_parameter(OptimConfig(opt=opt))


@pytest.mark.parametrize(("found", "said"), [(None, "--opt kron takes all memory without opt-einsum"), ("a spec", "")])
def test_kron_needs_what_orders_its_products(monkeypatch, found, said):
    monkeypatch.setattr(optim, "find_spec", lambda name: {"opt_einsum": found}[name])
    monkeypatch.setattr(optim, "create_optimizer_v2", lambda *_, **__: "built")
    with pytest.raises(UsageError, match=said) if said else nullcontext():
        assert make_optimizer(nn.Linear(2, 2), OptimConfig(opt="kron")) == "built"


def test_a_rate_that_is_too_large_is_no_fault_of_the_optimizers():
    assert state_per_parameter(OptimConfig(lr=1e38)) == 2


def test_unknown_optimizer_suggests_near_ones():
    with pytest.raises(UsageError, match=r"--opt SGD: timm has no such optimizer\. Did you mean sgd"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(opt="SGD"))
    with pytest.raises(UsageError, match=r"--opt adamx: .*Did you mean .*adam"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(opt="adamx"))


def test_torchs_own_are_fused_on_cpus_and_gpus():
    """Only those that torch 2.11 has for both."""
    chosen = set()
    for opt in list_optimizers():
        if opt.startswith(("bnb", "fused", "kron")):
            continue
        here = fuse(make_optimizer(torch.nn.Linear(5, 3), OptimConfig(opt=opt)))
        if any(group.get("fused") for group in here.param_groups):
            chosen.add(opt)
        for group in here.param_groups:
            group["params"] = [torch.nn.Parameter(parameter.to("meta")) for parameter in group["params"]]
        assert not any(group.get("fused") for group in fuse(here).param_groups), opt
    assert chosen == {"adam", "adamw", "momentum", "nesterov", "sgd"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("opt", ["adam", "adamw", "sgd"])
def test_fused_is_the_same_update(opt, layout):
    """Also of weights that lie channels last, whose gradients torch's kernel takes as they lie in memory."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 5, 1))
    one = torch.nn.Sequential(*layers).to(memory_format=layout)
    other = copy.deepcopy(one)
    config = OptimConfig(opt=opt, lr=0.01, weight_decay=0.1)
    pairs = [(one, fuse(make_optimizer(one, config))), (other, make_optimizer(other, config))]
    for _ in range(4):
        images = torch.randn(2, 3, 8, 8)
        for model, optimizer in pairs:
            for half in images.split(1):  # two gradients are added up
                model(half).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_layer_decay_leaves_at_the_full_rate_is_counted():
    """timm counts an LCNet's last convolution as head; of a ResNet none."""
    for name, late in (("lcnet_035", "conv_head."), ("resnet18", "none")):
        model = build_model(ModelConfig(model=name, img_size=64), 4)
        sizes = {key: p.numel() for key, p in model.named_parameters() if not key.startswith(("classifier.", "fc."))}
        kept = sum(size for key, size in sizes.items() if key.startswith(late))
        share = full_rate_share(model, set(head_parameter_names(model)), 0.5)
        assert share == pytest.approx(kept / sum(sizes.values())) and (share > 0.5) == (name == "lcnet_035")
