"""What of a model the compiler is given: a transformer block by block, which starts sooner, any other model whole."""

from __future__ import annotations

import warnings

import torch
from timm.layers import DropPath
from torch import nn

_MOST = 0.9  # of a model's layers


def compile_model(model: nn.Module, mode: str) -> None:
    """Let `torch.compile` have the model, in place; state_dict keeps its keys.

    Blocks that are alike are compiled once ("regional compilation" in PyTorch's tutorials), so that training starts
    sooner (benchmarks/results/speed.md). CUDA graphs (``reduce-overhead``) gain by the whole.

    Args:
        model: on its device.
        mode: of `torch.compile`.
    """
    from torch._inductor import decomposition, list_mode_options
    from torch._inductor.async_compile import AsyncCompile

    if any(parameter.is_cuda for parameter in model.parameters()):
        AsyncCompile.warm_pool()  # its processes begin here, and not at the first step: they inherit what signals do
    # torch 2.11 advises TF32 wherever fp32 is compiled, which is while the model first runs.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    # torch 2.15 makes a max-pool's gradient a sum in any order; Inductor has another way, which adds up in one.
    decomposition.decompositions.pop(torch.ops.aten.max_pool2d_with_indices_backward.default, None)
    decomposition.fast_random_decomps.cache_clear()  # of what was compiled before, such as timm's Kron
    blocks = transformer_blocks(model) if mode == "default" else []
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))  # train, eval
    for block in blocks:
        share_rates(block)
    # As an option it holds for every graph. In torch's configuration it would be lost after the first: Dynamo then
    # restores torch.use_deterministic_algorithms, which sets this, too.
    options = {**list_mode_options(mode), "deterministic": True}
    for part in blocks or [model]:
        part.compile(options=options, dynamic=False)  # shapes are few: a batch in training, one in evaluation


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost blocks with attention that stand in a row of their class, if they are nearly all of the model.

    Returns:
        None at all if they hold less than nine tenths of the layers, as in a hybrid with a convolutional half.
    """
    found: dict[int, nn.Module] = {}
    for row in model.modules():
        blocks = list(row.children()) if isinstance(row, nn.Sequential | nn.ModuleList) else []
        if len(blocks) > 1 and len(set(map(type, blocks))) == 1 and all(map(_attends, blocks)):
            found |= {id(block): block for block in blocks}
    inner = [block for block in found.values() if not any(id(part) in found for part in list(block.modules())[1:])]
    return inner if _size(*inner) > _MOST * _size(model) else []


def _attends(block: nn.Module) -> bool:
    return any(hasattr(module, "fused_attn") for module in block.modules())


def _size(*modules: nn.Module) -> int:
    layers = (layer for module in modules for layer in module.modules() if not isinstance(layer, nn.Identity))
    return sum(not any(layer.children()) for layer in layers)


def share_rates(block: nn.Module) -> None:
    """Make the rates of a block's stochastic depth tensors: the compiler takes numbers for parts of the code.

    With timm's own layers every block would be compiled anew, since the rate rises from one to the next.
    """
    for parent in list(block.modules()):
        for name, child in parent.named_children():
            if type(child) is DropPath and child.scale_by_keep:
                device = next(block.parameters()).device
                setattr(parent, name, SharedDropPath(torch.tensor(1 - child.drop_prob, device=device)))


class SharedDropPath(nn.Module):
    """timm's DropPath (stochastic depth, arXiv:1603.09382), whose code is the same for every rate.

    Attributes:
        keep: float32 (), the share of samples whose path is kept. Not a buffer, so that no engine rounds it.
    """

    def __init__(self, keep: torch.Tensor):
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Set the paths of some samples to zero, and make up for it: (B, ...) as it came in."""
        if not self.training:
            return x
        kept = torch.rand((len(x),) + (1,) * (x.ndim - 1), device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
