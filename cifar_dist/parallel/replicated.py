"""Whole weights and optimizer state on every process: one process alone, or DDP."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

OVERFLOWS_IN_A_ROW = 14  # from the first loss scale, 2**16, down to 4


class Replicated:
    """How training updates its weights where each process holds all of them.

    The other engines are subclasses; `train_step` and the checkpoints work with any of them.

    Args:
        accelerator: of this process.
        model: on its device, not yet prepared.
        optimizer: over the model's trainable parameters, not yet prepared.
        clip_grad: largest gradient norm, or None.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None,
    ):
        self.accelerator, self.module, self._clip_grad, self._overflows = accelerator, model, clip_grad, 0
        with warnings.catch_warnings():  # Accelerate has no name yet for what torch 2.15 calls forward_sync_buffers
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._parameters = list(self.model.parameters())

    @property
    def input_dtype(self) -> torch.dtype:
        """What the model takes; autocast casts on its own."""
        return torch.float32

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients are shared in the step's last one only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits in training, under autocast where the precision asks for it."""
        return self.model(images)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this process's part of the gradient of the global batch's loss, the sum over processes of `loss`."""
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self.accelerator.scaler is None:
            loss.backward()  # Accelerate's searches the file system for a package each time
        else:
            self.accelerator.backward(loss)

    def gradient_is_bad(self) -> torch.Tensor | None:
        """Clip the gradient; bool (), alike on every process, whether it is not finite. None where only `update` knows.

        A gradient too large for fp16 is the loss scaler's business, not a bad one.
        """
        unscaled = self.accelerator.scaler is None
        if self._clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(self._parameters, self._clip_grad)
        elif unscaled:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        return ~norm.isfinite() if unscaled else torch.zeros((), dtype=torch.bool, device=self.accelerator.device)

    def update_unless(self, refused: torch.Tensor) -> bool:
        """Have the device step the optimizer or, told there, leave all as it is; False if the host must know first.

        torch's fused optimizers can, as GradScaler has them do. The host must for others, for fp16's loss scaler, and
        for a weight's first step, which makes its state: torch's SGD would leave a refused one's momentum undefined.

        Args:
            refused: float32 (), on the device: 1 if the step must not be made, else 0.
        """
        if not self._steps_on_a_gpu or self.accelerator.scaler is not None:
            return False
        if any(parameter.grad is not None and parameter not in self._bare.state for parameter in self._parameters):
            return False
        self._bare.found_inf = refused  # type: ignore[attr-defined]  # torch's name
        self._bare.step()
        self._bare.zero_grad()
        del self._bare.found_inf  # type: ignore[attr-defined]
        return True

    @property
    def _steps_on_a_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda" and all(group.get("fused") for group in self._bare.param_groups)

    def update(self) -> bool:
        """Step the optimizer; whether the step was refused because the gradient was not finite."""
        if self.accelerator.scaler is None:
            self._bare.step()  # Accelerate's inspects signatures each time
            self._bare.zero_grad()
            return False
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._overflows_for_ever(self.optimizer.step_was_skipped)

    @property
    def _bare(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer  # inside Accelerate's wrapper

    def _overflows_for_ever(self, overflowed: bool) -> bool:
        """Whether fp16 gradients overflow at whatever loss scale: then they are not too large, but not finite."""
        self._overflows = self._overflows + 1 if overflowed else 0
        return self._overflows > OVERFLOWS_IN_A_ROW

    def drop(self) -> None:
        """Throw the gradient away; the weights stay as they are."""
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # the scaler sees that the gradient is not finite, and skips
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole ``state_dict`` of the model in fp32; to be called on every process."""
        return self.module.state_dict()

    def optimizer_state(self) -> dict[str, Any]:
        """The whole ``state_dict`` of the optimizer as torch writes it; to be called on every process."""
        return _with_fused(self.optimizer.state_dict(), [None] * len(self.optimizer.param_groups))

    def scaler_state(self) -> dict[str, Any]:
        """The fp16 loss scaler's numbers; empty without one."""
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Put back what `scaler_state` returned."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def load(self, weights: dict[str, torch.Tensor], optimizer_state: dict[str, Any]) -> None:
        """Put back what `weights` and `optimizer_state` returned, be it on another engine."""
        self.module.load_state_dict(weights)
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(_with_fused(optimizer_state, fused))
        _lay_out_like_parameters(self.optimizer)


def _with_fused(state: dict[str, Any], choices: list[bool | None]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` updated in one kernel, or not: that is the machine's choice, not the run's."""
    groups = zip(state["param_groups"], choices, strict=True)
    return state | {"param_groups": [g | {"fused": fused} if "fused" in g else g for g, fused in groups]}


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments their parameter's memory layout (channels_last), as they had before they were saved."""
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
