"""DeepSpeed ZeRO: weights, gradients or optimizer state cut into a shard per process.

``ds_configs/`` say how memory is laid out. The recipe's numbers are written into DeepSpeed's configuration here, and
read back from its engine.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.parallel.replicated import Replicated
from cifar_dist.plan import Plan

_FROM_THE_RECIPE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "torch_autocast", "optimizer", "scheduler",
)  # fmt: skip
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Zero(Replicated):
    """ZeRO stage 1, 2 or 3, with or without offloading to host memory.

    fp32 and bf16 keep fp32 weights and gradients and, for bf16, run under torch's autocast as DDP does; fp16 is
    DeepSpeed's own engine with fp16 weights, fp32 masters and its loss scaler.

    Args:
        accelerator: started by a launch configuration that asks for DeepSpeed.
        model: on its device, not yet prepared.
        optimizer: over the model's trainable parameters, not yet prepared.
        config: the run's configuration.
        plan: the run's plan.

    Raises:
        UsageError: the DeepSpeed file says what belongs into the recipe.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        plan: Plan,
    ):
        _refuse_second_homes()
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._fp16 = config.run.precision == "fp16"
        numbers = _numbers(config, plan)
        accelerator.gradient_accumulation_steps = plan.grad_accum_steps
        accelerator.state.deepspeed_plugin.deepspeed_config.update(numbers)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # DeepSpeed flattens them: channels_last stays for images
        _share_a_timeout(config.run.ddp_timeout)
        super().__init__(accelerator, model, optimizer, None)
        _read_back(self.model, numbers)
        self._sharded = self.optimizer.optimizer  # DeepSpeed's optimizer, which wraps the one given
        self._stage = self.model.zero_optimization_stage()
        if self._fp16:
            self._sharded.loss_scaler.raise_error_at_min_scale = False  # an end without a checkpoint; `update` tells

    @property
    def input_dtype(self) -> torch.dtype:
        """fp16 weights take fp16 images."""
        return torch.float16 if self._fp16 else torch.float32

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; DeepSpeed is told whether the step's last."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add this process's part of the gradient of the global batch's loss, the sum over processes of `loss`."""
        self.model.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def gradient_is_bad(self) -> torch.Tensor | None:
        """None: DeepSpeed clips, and looks at the gradient's norm, in its step."""
        return None

    def update_unless(self, refused: torch.Tensor) -> bool:
        """False: DeepSpeed decides in its step."""
        return False

    def update(self) -> bool:
        """Step the optimizer; whether the step was refused because the gradient was not finite."""
        self.model.step()
        overflowed = bool(self._sharded.overflow)
        return self._overflows_for_ever(overflowed) if self._fp16 else overflowed

    def drop(self) -> None:
        """Throw the gradient away: DeepSpeed does in its step, since a bad loss's gradient is not finite."""
        self.model.step()
        if not self._sharded.overflow:
            raise RuntimeError("DeepSpeed made a step with a gradient that is not finite")

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole ``state_dict`` of the model in fp32, put together from all processes, one weight after another."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = dict(self.module.state_dict())
        trained = {id(parameter) for group in self._groups for parameter in group}
        for name, parameter in self.module.named_parameters():
            if id(parameter) in trained:
                weights[name] = safe_get_full_fp32_param(parameter).cpu()
            else:
                with self._gathered(parameter):
                    weights[name] = parameter.detach().float().to("cpu", copy=True)
        return weights

    def _gathered(self, parameter: torch.nn.Parameter, modifier_rank: int | None = None) -> Any:
        """A context in which a weight of ZeRO-3 is whole; what process `modifier_rank` changes is kept."""
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank, enabled=self._stage == 3)

    @property
    def _shards(self) -> list[list[torch.Tensor]]:
        """This process's flat fp32 shards of the trained weights, by group; stage 3 cuts large groups into several."""
        zero = self._sharded
        if self._stage < 3:
            return [[shard] for shard in zero.single_partition_of_fp32_groups]
        shards: list[list[torch.Tensor]] = [[] for _ in self._groups]
        for number, shard in enumerate(zero.fp32_partitioned_groups_flat):
            shards[zero.sub_group_to_group_id[number]].append(shard)
        return shards

    def optimizer_state(self) -> dict[str, Any]:
        """The whole ``state_dict`` of the optimizer as torch writes it; of states, only the main process has them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        bare = self._sharded.optimizer
        states: dict[int, dict[str, Any]] = {}
        settings, index = [], 0
        for group, kept, shards in zip(self._groups, bare.param_groups, self._shards, strict=True):
            plain = {key: value for key, value in kept.items() if key != "params"}
            settings.append(plain | {"params": list(range(index, index + len(group)))})
            of_shard = bare.state.get(shards[0], {})
            for index, parameter in enumerate(group, start=index):  # noqa: B020  it counts through the groups
                state = {}
                for key, value in of_shard.items():
                    if isinstance(value, torch.Tensor) and value.shape == shards[0].shape:
                        value = safe_get_full_optimizer_state(parameter, key)
                    if self.accelerator.is_main_process:
                        state[key] = value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
                states[index] = state
            index += 1
        return {"state": {number: state for number, state in states.items() if state}, "param_groups": settings}

    def scaler_state(self) -> dict[str, Any]:
        """The numbers of DeepSpeed's fp16 loss scaler; empty without one."""
        return {name: getattr(self._sharded.loss_scaler, name) for name in _SCALER if self._fp16}

    def load_scaler(self, state: dict[str, Any]) -> None:
        """Put back what `scaler_state` returned."""
        for name in _SCALER:
            if self._fp16 and name in state:
                setattr(self._sharded.loss_scaler, name, state[name])

    def load(self, weights: dict[str, torch.Tensor], optimizer_state: dict[str, Any]) -> None:
        """Cut up what `weights` and `optimizer_state` returned, be it on another engine or number of processes."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device, bare = self.accelerator.device, self._sharded.optimizer
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(weights[name])
            for name, parameter in self.module.named_parameters():
                with self._gathered(parameter, modifier_rank=0):
                    parameter.copy_(weights[name])
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        states = optimizer_state["state"]
        for kept, saved in zip(bare.param_groups, optimizer_state["param_groups"], strict=True):
            kept.update({key: value for key, value in saved.items() if key != "params"})
        self._make_room(states)
        for index, parameter in enumerate(parameter for group in self._groups for parameter in group):
            whole = weights[names[id(parameter)]]
            safe_set_full_fp32_param(parameter, whole.to(device))
            for key, value in states.get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == whole.shape and value.dim():
                    safe_set_full_optimizer_state(parameter, value.to(device, torch.float32), key)

    def _make_room(self, states: dict[int, dict[str, Any]]) -> None:
        """Give each shard the state that the optimizer would make in its first step."""
        index = 0
        for group, shards in zip(self._groups, self._shards, strict=True):
            shape = group[0].shape if self._stage < 3 else group[0].ds_shape
            for shard in shards:
                for key, value in states.get(index, {}).items():
                    per_weight = isinstance(value, torch.Tensor) and value.shape == shape and value.dim()
                    state = torch.zeros_like(shard) if per_weight else copy.deepcopy(value)
                    self._sharded.optimizer.state[shard][key] = state
            index += len(group)
        self._link()

    def _link(self) -> None:
        """Let ZeRO-1 and 2 find each weight's state; by itself DeepSpeed 0.19 does so for the first group only."""
        if self._stage < 3 and self._sharded.optimizer.state:
            self._sharded._hp_optimizer_states_linked = False
            self._sharded._lazy_init_hp_params_optimizer_state()


def _share_a_timeout(seconds: int) -> None:
    """Make the processes' group in which DeepSpeed communicates; one that it makes would have torch's own timeout."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timedelta(seconds=seconds))


def _refuse_second_homes() -> None:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    written = json.loads(Path(path).read_text()) if path and path != "none" else {}
    if second := [name for name in _FROM_THE_RECIPE if written.get(name, "auto") != "auto"]:
        raise UsageError(
            f"{path} sets {', '.join(second)}, which the recipe decides; take it out (--batch-size, --micro-batch-size,"
            " --clip-grad, --precision, --opt)."
        )


def _numbers(config: Config, plan: Plan) -> dict[str, Any]:
    """The recipe's numbers under DeepSpeed's names."""
    precision = config.run.precision
    return {
        "train_batch_size": plan.batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": config.optim.clip_grad or 0.0,
        # torch's own loss scaler: from 2**16, twice as much after 2000 good steps, half at the first bad one
        "fp16": {
            "enabled": precision == "fp16",
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
            "auto_cast": False,
        },
        "bf16": {"enabled": False},
        # as under DDP: fp32 weights, and gradients that are summed over processes in fp32
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
    }


def _read_back(engine: Any, numbers: dict[str, Any]) -> None:
    """Compare what DeepSpeed's engine says it does with what it was told.

    Raises:
        RuntimeError: they differ.
    """
    found = {
        "train_batch_size": engine.train_batch_size(),
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "fp16": engine.fp16_enabled(),
        "bf16": engine.bfloat16_enabled(),
        "torch_autocast": engine.torch_autocast_enabled(),
    }
    for name, value in found.items():
        told = numbers[name]["enabled"] if isinstance(numbers[name], dict) else numbers[name]
        if told != value:
            raise RuntimeError(f"DeepSpeed's {name} is {value}, but the recipe says {told}")
