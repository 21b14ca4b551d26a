"""PyTorch's FSDP2: weights, gradients and optimizer state cut into a shard per process, on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from cifar_dist.config import Config
from cifar_dist.distributed.group import autocast
from cifar_dist.parallel.replicated import Replicated

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullySharded(Replicated):
    """FSDP2 (``fully_shard``), as Accelerate sets it up.

    Weights, gradients and their sums are fp32; bf16 is torch's autocast, as under DDP.

    Args:
        accelerator: started by a launch configuration that asks for FSDP.
        model: on its device, not yet prepared.
        optimizer: over the model's trainable parameters, not yet prepared.
        config: the run's configuration.
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config
    ):
        self._precision = config.run.precision
        super().__init__(accelerator, model, optimizer, config.optim.clip_grad)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits in training, under autocast where the precision asks for it."""
        with autocast(self.accelerator.device, self._precision):
            return self.model(images)

    def gradient_is_bad(self) -> torch.Tensor | None:
        """Clip the gradient; bool (), alike on every process, whether it is not finite."""
        bad = super().gradient_is_bad()
        return bad.full_tensor() if isinstance(bad, DTensor) else bad

    def weights(self) -> dict[str, Any]:
        """The whole ``state_dict`` of the model in fp32, put together from all processes; empty but on the first."""
        return get_model_state_dict(self.accelerator.unwrap_model(self.model), options=_WHOLE)

    def optimizer_state(self) -> dict[str, Any]:
        """The whole ``state_dict`` of the optimizer as torch writes it; empty but on the first process."""
        named: Any = get_optimizer_state_dict(self.accelerator.unwrap_model(self.model), self._bare, options=_WHOLE)
        numbers = {name: number for number, name in enumerate(_names(named))}
        states = {numbers[name]: state for name, state in named.get("state", {}).items()}
        groups = [group | {"params": [numbers[n] for n in group["params"]]} for group in named.get("param_groups", [])]
        return {"state": states, "param_groups": groups}

    def load(self, weights: dict[str, torch.Tensor], optimizer_state: dict[str, Any]) -> None:
        """Cut up what `weights` and `optimizer_state` returned, be it on another engine or number of processes."""
        model = self.accelerator.unwrap_model(self.model)
        set_model_state_dict(model, dict(weights), options=_WHOLE)
        for own, saved in zip(self._bare.param_groups, optimizer_state["param_groups"], strict=True):
            own.update({key: value for key, value in saved.items() if key != "params"})
        if not optimizer_state["state"]:
            return
        names = _names(get_optimizer_state_dict(model, self._bare))
        states = {names[number]: state for number, state in optimizer_state["state"].items()}
        groups = [group | {"params": [names[n] for n in group["params"]]} for group in optimizer_state["param_groups"]]
        set_optimizer_state_dict(model, self._bare, {"state": states, "param_groups": groups}, options=_WHOLE)


def _names(named: Any) -> list[str]:
    """Parameter names in the order of the optimizer's groups."""
    return [name for group in named.get("param_groups", []) for name in group["params"]]
