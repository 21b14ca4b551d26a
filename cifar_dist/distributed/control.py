"""What all processes decide together at every step, in one small reduction, and the way back from a bad step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on after a step: alike on all of them; nothing, where there was none.

    Attributes:
        bad: the loss, or the gradient of the global batch, is not finite on some process.
        stop: some process was asked to stop.
        save: some process's clock says that a checkpoint is due.
        writing: some process is still writing the last one.
        lost: some process has no more data; the step is refused as a bad one.
    """

    bad: bool = False
    stop: bool = False
    save: bool = False
    writing: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Wish:
    """What this process tells the others after the step: to stop, to save, that it is still writing a checkpoint."""

    stop: bool = False
    save: bool = False
    writing: bool = False


class Agreement:
    """What the processes decide together about a step: under way, so that the device gets more to do meanwhile.

    One reduction, if there are several processes, and, in `verdict`, the step's one host sync.

    Args:
        accelerator: of this process.
        bad: bool (), on the device: whether something is not finite here.
        wish: what this process would have the others do.
        lost: whether this process has no data.

    Attributes:
        refused: float32 (), on the device: 1 if the step must not be made, on whichever process, else 0.
    """

    def __init__(self, accelerator: Accelerator, bad: torch.Tensor, wish: Wish, lost: bool):
        self._own = (lost, wish.stop, wish.save, wish.writing)
        self._arrived: torch.cuda.Event | None = None
        flags = (bad | lost).float().view(1)
        if accelerator.num_processes > 1:
            flags = torch.cat([flags, *(torch.full_like(flags, flag) for flag in self._own)])
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self._flags, self.refused = flags, flags[0]
        if flags.is_cuda:
            self._flags = torch.empty(flags.shape, pin_memory=True).copy_(flags, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def verdict(self) -> Verdict:
        """Wait for the flags, and for nothing that the device was given since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        bad, *others = (flag > 0 for flag in self._flags.tolist())
        lost, stop, save, writing = others or self._own
        return Verdict(bad=bad, stop=stop, save=save, writing=writing, lost=lost)


def any_of(accelerator: Accelerator, wish: bool) -> bool:
    """Whether some process wishes so: one reduction and a host sync."""
    if accelerator.num_processes == 1:
        return wish
    flag = torch.tensor(float(wish), device=accelerator.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return flag.item() > 0


class BeforeStep:
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

    def keep(self) -> None:
        """Remember the state before a step."""
        for buffers, kept in self._lists:
            torch._foreach_copy_(kept, buffers)
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))

    def put_back(self) -> None:
        """Undo what the step has changed."""
        for buffers, kept in self._lists:
            torch._foreach_copy_(buffers, kept)
        torch.set_rng_state(self._random[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random[1], self._device)
