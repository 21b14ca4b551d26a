"""What all processes decide together at every step, in one small reduction, and the way back from a bad step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class StepFlags:
    """What one process says of a step, or what holds for all of them: then each is set if it is on some process.

    Attributes:
        refused: the step must not be made: the loss, or the gradient of the global batch, is not finite, or `lost`.
        stop: this training was asked to stop.
        save: a checkpoint is due by the clock.
        writing: the last one is still being written.
        lost: there are no more data.
    """

    refused: bool = False
    stop: bool = False
    save: bool = False
    writing: bool = False
    lost: bool = False


class FlagReduction:
    """The flags of all processes put together, while the device is given more to do.

    One reduction, if there are several processes, and, in `result`, the step's one host sync.

    Args:
        accelerator: of this process.
        nonfinite: bool (), on the device: whether something is not finite here.
        own: this process's flags otherwise.

    Attributes:
        refused: float32 (), on the device: 1 if the step must not be made, on whichever process, else 0.
    """

    def __init__(self, accelerator: Accelerator, nonfinite: torch.Tensor, own: StepFlags):
        self._own = (own.stop, own.save, own.writing, own.lost)
        self._arrived: torch.cuda.Event | None = None
        flags = (nonfinite | own.lost).float().view(1)
        if accelerator.num_processes > 1:
            flags = torch.cat([flags, *(torch.full_like(flags, flag) for flag in self._own)])
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self._flags, self.refused = flags, flags[0]
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, pin_memory=True).copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> StepFlags:
        """Wait for the flags, and for nothing that the device was given since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        refused, *others = (flag > 0 for flag in self._flags.tolist())
        return StepFlags(refused, *(others or self._own))


def any_of(accelerator: Accelerator, own: bool) -> bool:
    """Whether it is so on some process: one reduction and a host sync."""
    if accelerator.num_processes == 1:
        return own
    flag = torch.tensor(float(own), device=accelerator.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return flag.item() > 0


class Snapshot:
    """What a forward pass changes although its step may be refused: buffers (BatchNorm) and random streams.

    Args:
        module: the model whose buffers are kept.
        device: where its random numbers come from.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self._device, self._random = device, list[torch.Tensor]()
        of_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in module.buffers():
            of_type.setdefault(buffer.dtype, []).append(buffer)
        # A list for each type: on a GPU torch copies the tensors of a mixed one by one.
        self._lists = [(buffers, [torch.empty_like(buffer) for buffer in buffers]) for buffers in of_type.values()]

    def take(self) -> None:
        """Remember the state before a step."""
        for buffers, kept in self._lists:
            torch._foreach_copy_(kept, buffers)
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))

    def restore(self) -> None:
        """Undo what the step has changed."""
        for buffers, kept in self._lists:
            torch._foreach_copy_(buffers, kept)
        torch.set_rng_state(self._random[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random[1], self._device)
