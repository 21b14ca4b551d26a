"""The optimizer factory against plain PyTorch."""

import pytest
import torch
from timm.optim import list_optimizers

from cifar_dist.config import OptimConfig
from cifar_dist.errors import UsageError
from cifar_dist.optim import fuse, make_optimizer, state_per_parameter


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


def test_unknown_optimizer_suggests_near_ones():
    with pytest.raises(UsageError, match=r"--opt adamx: .*Did you mean .*adam"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(opt="adamx"))


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
def test_on_a_gpu_torchs_own_are_fused():
    """Only those that torch 2.11 has for GPUs; the weights here only say that they are on one."""
    cuda = type("Cuda", (torch.nn.Parameter,), {"is_cuda": True})
    chosen = set()
    for opt in list_optimizers():
        if opt.startswith(("bnb", "fused")):
            continue
        here = fuse(make_optimizer(torch.nn.Linear(5, 3), OptimConfig(opt=opt)))
        assert not any(group.get("fused") for group in here.param_groups), opt
        for group in here.param_groups:
            group["params"] = [cuda(parameter.data) for parameter in group["params"]]
        if any(group.get("fused") for group in fuse(here).param_groups):
            chosen.add(opt)
    assert chosen == {"adam", "adamw", "momentum", "nesterov", "sgd"}
