"""Engines: how a training's weights lie over its processes, and are updated and put together."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cifar_dist.config import Config
from cifar_dist.distributed import engine_name
from cifar_dist.errors import UsageError
from cifar_dist.memory import refuses_average
from cifar_dist.optim import fuse
from cifar_dist.parallel.replicated import Replicated
from cifar_dist.plan import Plan

__all__ = ["Replicated", "wrap"]


def wrap(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: Config, plan: Plan
) -> Replicated:
    """Hand the model and its optimizer to the engine that the launch configuration asks for.

    Args:
        accelerator: as started.
        model: on its device.
        optimizer: over its trainable parameters.
        config: the run's configuration.
        plan: the run's plan.

    Raises:
        UsageError: the engine cannot do what the recipe asks for.
    """
    engine = engine_name(accelerator)
    if config.optim.model_ema_decay is not None and refuses_average(engine, config.run.precision):
        raise UsageError(
            f"--model-ema-decay needs whole fp32 weights on every process, which {engine} with --precision"
            f" {config.run.precision} does not keep; launch with accelerate_configs/multi_gpu.yaml."
        )
    if config.run.precision == "fp16" and engine == "fsdp2":
        raise UsageError("--precision fp16 is not for fsdp2, whose gradients would be summed in fp16; take bf16.")
    if config.run.precision == "fp16" and engine.startswith("zero") and plan.has_batch_norm:
        raise UsageError(
            f"--precision fp16: {engine} makes batch norm's weights fp16 but not its statistics; take --precision bf16."
        )
    single = next((name for name, parameter in model.named_parameters() if not parameter.dim()), "")
    if single and engine not in ("single", "ddp"):
        raise UsageError(
            f"--model {config.model.model}: {engine} cannot cut up a parameter that is one number ({single}); launch"
            " with accelerate_configs/multi_gpu.yaml."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from cifar_dist.parallel.zero import Zero

        return Zero(accelerator, model, optimizer, config, plan)
    if accelerator.distributed_type == DistributedType.FSDP:
        from cifar_dist.parallel.fully_sharded import FullySharded

        return FullySharded(accelerator, model, optimizer, config)
    return Replicated(accelerator, model, fuse(optimizer), config.optim.clip_grad)
