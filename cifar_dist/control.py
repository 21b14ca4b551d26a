"""What all processes decide together at every step, in one small reduction, and the way back from a bad step."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

import torch
from accelerate import Accelerator


@dataclass(frozen=True)
class Verdict:
    """What the processes agreed on: alike on all of them.

    Attributes:
        bad: the loss, or the gradient of the global batch, is not finite on some process.
        stop: some process was asked to stop.
        lost: some process has no more data; the step is refused as a bad one.
    """

    bad: bool
    stop: bool
    lost: bool


def agree(accelerator: Accelerator, bad: torch.Tensor, stop: bool, lost: bool) -> Verdict:
    """One reduction over all processes and the step's one host sync.

    Args:
        accelerator: of this process.
        bad: bool (), on the device: whether something is not finite here.
        stop: whether this process was asked to stop.
        lost: whether this process has no data.
    """
    flags = torch.stack([bad.float(), *(torch.full_like(bad, flag, dtype=torch.float32) for flag in (stop, lost))])
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    found = flags.tolist()
    return Verdict(bad=found[0] > 0 or found[2] > 0, stop=found[1] > 0, lost=found[2] > 0)


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 instead of dying of them, so that a run can stop at the end of a step.

    Attributes:
        signal: name of the first one that came, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.signal = self.signal or signal.Signals(number).name


class BeforeStep:
    """What a forward pass changes although its step may be refused: buffers (BatchNorm) and random streams.

    Args:
        module: the model whose buffers are kept.
        device: where its random numbers come from.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self._buffers, self._device = list(module.buffers()), device
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._random: list[torch.Tensor] = []

    def keep(self) -> None:
        """Remember the state before a step."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))

    def put_back(self) -> None:
        """Undo what the step has changed."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        torch.set_rng_state(self._random[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random[1], self._device)
