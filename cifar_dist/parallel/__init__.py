"""Engines: how a training's weights lie over its processes, and are updated and put together."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.memory import refuses_average
from cifar_dist.optim import fuse, is_elementwise
from cifar_dist.parallel.replicated import Replicated
from cifar_dist.plan import Plan

__all__ = ["Replicated", "check_engine", "wrap"]


def check_engine(config: Config, plan: Plan, model: torch.nn.Module) -> None:
    """Refuse what the plan's engine cannot do, before the run has a folder.

    Raises:
        UsageError: the recipe asks for it.
    """
    engine, precision = plan.engine, config.run.precision
    elsewhere = "launch with accelerate_configs/multi_gpu.yaml"
    if config.optim.model_ema_decay is not None and refuses_average(engine, precision):
        raise UsageError(
            f"--model-ema-decay needs whole fp32 weights on every process, which {engine} with --precision"
            f" {precision} does not keep; {elsewhere}."
        )
    if precision == "fp16" and engine == "fsdp2":
        raise UsageError("--precision fp16 is not for fsdp2, whose gradients would be summed in fp16; take bf16.")
    if precision == "fp16" and engine.startswith("zero") and plan.has_batch_norm:
        raise UsageError(
            f"--precision fp16: {engine} makes batch norm's weights fp16 but not its statistics; take --precision bf16."
        )
    if engine.startswith("zero") and not is_elementwise(config.optim):
        raise UsageError(
            f"--opt {config.optim.opt} looks at whole matrices, which ZeRO cuts up: the training would be another;"
            f" {elsewhere}, or take --opt adamw."
        )
    if config.optim.opt.startswith("kron") and plan.num_processes > 1:
        raise UsageError(
            f"--opt {config.optim.opt} draws random numbers, others in each process, whose weights would drift apart;"
            " train with one process, or take another."
        )
    single = next((name for name, parameter in model.named_parameters() if not parameter.dim()), "")
    if single and engine not in ("single", "ddp"):
        raise UsageError(
            f"--model {config.model.model}: {engine} cannot cut up a parameter that is one number ({single});"
            f" {elsewhere}."
        )


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
        UsageError: the DeepSpeed file says what belongs into the recipe.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from cifar_dist.parallel.zero import Zero

        return Zero(accelerator, model, optimizer, config, plan)
    if accelerator.distributed_type == DistributedType.FSDP:
        from cifar_dist.parallel.fully_sharded import FullySharded

        return FullySharded(accelerator, model, optimizer, config)
    return Replicated(accelerator, model, fuse(optimizer), config.optim.clip_grad)
