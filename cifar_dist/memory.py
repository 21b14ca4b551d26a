"""What one process holds while it trains, for every engine, before anything is started.

Engines are named single, ddp, fsdp2, and zeroN or zeroN_offload for DeepSpeed's ZeRO stages (Rajbhandari et al. 2020,
arXiv:1910.02054). Counted from what PyTorch 2.15 and DeepSpeed 0.19 were found to hold at the fullest moment of a
step; activations, and the layer that zero3 and fsdp2 put together while it works, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

CONFIG_FILES = {
    "single": "accelerate_configs/gpu.yaml",
    "ddp": "accelerate_configs/multi_gpu.yaml",
    "zero1": "accelerate_configs/zero1.yaml",
    "zero2": "accelerate_configs/zero2.yaml",
    "zero3": "accelerate_configs/zero3.yaml",
    "zero3_offload": "accelerate_configs/zero3_offload.yaml",
    "fsdp2": "accelerate_configs/fsdp2.yaml",
}
ZERO_BUCKET = 10_000_000  # numbers: reduce_bucket_size in ds_configs/
MIB = 2**20
WORTH = 0.05  # of the device's memory: an engine that saves less brings nothing


@dataclass(frozen=True)
class Load:
    """What training has to hold: counts of numbers, bytes for `data_bytes`.

    Attributes:
        num_parameters: of the model.
        num_trainable: of these, how many train.
        state_per_parameter: numbers the optimizer keeps for each that trains.
        data_bytes: resident data, whole on every process.
        precision: fp32, bf16 or fp16.
        average: whether a moving average of the weights is kept.
    """

    num_parameters: int
    num_trainable: int
    state_per_parameter: int
    data_bytes: int = 0
    precision: str = "fp32"
    average: bool = False


@dataclass(frozen=True)
class Usage:
    """Bytes of one process: on its device, and for `host` in main memory."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    data: int
    host: int = 0

    @property
    def state(self) -> int:
        """Device bytes of everything but data."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer state": self.optimizer}
        parts |= {"buckets": self.buckets} if self.buckets else {}
        parts |= {"in main memory": self.host} if self.host else {}
        return ", ".join(f"{size / MIB:,.0f} MiB {name}" for name, size in (parts | {"data": self.data}).items())


def refuses_average(engine: str, precision: str) -> bool:
    """Whether the engine keeps no whole fp32 weights, of which a moving average could be taken."""
    return engine.startswith(("zero3", "fsdp")) or (engine.startswith("zero") and precision == "fp16")


def checkpoint_bytes(load: Load) -> int:
    """Bytes of a checkpoint: fp32 weights, their average if kept, and the optimizer's state, whole on any engine."""
    return 4 * (load.num_parameters * (1 + load.average) + load.state_per_parameter * load.num_trainable)


def usage(engine: str, num_processes: int, load: Load, accumulates: bool = False) -> Usage:
    """Bytes that each of `num_processes` holds at the fullest moment of a step.

    Weights and gradients are fp32, also under bf16 autocast, but in DeepSpeed's own fp16 engine. ZeRO keeps a second,
    fp32 shard of the trained weights for its optimizer in every precision and stage (DeepSpeed 0.19's stage 3 would
    share it in fp32, but compares a device with its name and never does); stage 3 has an fp32 copy of its gradients
    while it steps. fsdp2 keeps whole gradients between micro-batches.

    Args:
        engine: see the module.
        num_processes: that train together.
        load: what is to be held.
        accumulates: whether an optimizer step has several micro-batches.
    """
    if engine.startswith("zero") and not engine.startswith("zero0"):  # stage 0 cuts nothing up
        return _zero(int(engine[4]), engine.endswith("_offload"), num_processes, load)
    shards = num_processes if engine == "fsdp2" else 1
    trained = _shard(load.num_trainable, shards)
    return Usage(
        weights=4 * _shard(load.num_parameters, shards) + _average(load),
        gradients=4 * (load.num_trainable if accumulates else trained),
        optimizer=4 * load.state_per_parameter * trained,
        buckets=0,
        data=load.data_bytes,
    )


def _zero(stage: int, offload: bool, num_processes: int, load: Load) -> Usage:
    """Bytes under ZeRO."""
    word = 2 if load.precision == "fp16" else 4
    trained = _shard(load.num_trainable, num_processes)
    weights = word * (_shard(load.num_parameters, num_processes) if stage == 3 else load.num_parameters)
    gradients = {
        1: max(word * load.num_trainable, 4 * trained),
        2: 4 * trained,
        3: (word + 4) * trained,
    }[stage]
    optimizer = 4 * (load.state_per_parameter + 1) * trained
    host = 0
    if offload:
        host, gradients, optimizer = gradients + optimizer, 0, 0
        if stage == 3:
            host, weights = host + weights, 0
    return Usage(weights + _average(load), gradients, optimizer, word * ZERO_BUCKET, load.data_bytes, host)


def _shard(numbers: int, processes: int) -> int:
    return -(-numbers // processes)


def _average(load: Load) -> int:
    return 4 * load.num_parameters if load.average else 0


def gain(engine: str, own: Usage, ddp: Usage, device_bytes: int) -> str | None:
    """What an engine that cuts up the training state brings on this device, in a line.

    Args:
        engine: that runs.
        own: what a process holds under it.
        ddp: what it would hold under DDP.
        device_bytes: memory of the device.

    Returns:
        None for engines that cut nothing up.
    """
    if engine in ("single", "ddp"):
        return None
    buckets = f" ({own.buckets / MIB:,.0f} of it buckets)" if own.buckets else ""
    line = (
        f"{engine} holds {own.state / MIB:,.0f} MiB of weights, gradients and optimizer state per process{buckets}, DDP"
        f" would hold {ddp.state / MIB:,.0f} MiB of the {device_bytes / MIB:,.0f} MiB there are"
    )
    if ddp.state - own.state >= WORTH * device_bytes:
        return line
    return f"{line}: it brings nothing for this model; take {CONFIG_FILES['ddp']}"
