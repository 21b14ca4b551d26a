"""Every argument of train.py, declared once in frozen dataclasses; `command_line` makes flags of them."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cifar_dist.argument_types import (
    any_seed,
    beta_parameter,
    closed_fraction,
    duration,
    fraction,
    non_negative,
    non_negative_int,
    positive,
    positive_fraction,
    positive_int,
    steps_or_duration,
)
from cifar_dist.policy_string import policy_text

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "step", "constant")
INTERPOLATIONS = ("bilinear", "bicubic")


def option(
    default: Any, help: str, *, type: Callable[[str], Any] = str, choices: Sequence[str] | None = None, nargs: int = 0
) -> Any:
    """A dataclass field that knows how to become a command line flag."""
    return field(default=default, metadata={"help": help, "type": type, "choices": choices, "nargs": nargs})


@dataclass(frozen=True)
class DataConfig:
    """data"""

    dataset: str = option(
        "cifar10",
        "cifar10, cifar100 (from the Hub), digits (comes with scikit-learn, no download), or a local path: a folder "
        "of parquet files, cifar-10-batches-py or its tar.gz, an image folder train/CLASS/*.png, or a folder "
        "saved by datasets",
    )
    image_column: str | None = option(None, "column of images (default: the only one of image type)")
    label_column: str | None = option(
        None, "column of labels, e.g. coarse_label (default: the class-label column with the most classes)"
    )
    data_size: int | None = option(None, "pixels a side to keep and crop images at (default: 32)", type=positive_int)
    val_fraction: float = option(
        0.1, "stratified part of train set apart as val where the data bring no val split; 0: no val", type=fraction
    )
    split_seed: int = option(42, "seed of the train/val split", type=any_seed)
    select_on: str = option(
        "val",
        "split that picks the best checkpoint; test trains on all of train, only reproduces older studies, and is "
        "labelled in every output",
        choices=("val", "test"),
    )
    data_mode: str = option(
        "auto",
        "resident: decoded once, kept on the device; stream: read and decoded while training, never whole in memory; "
        "auto: resident where it fits into a quarter of the device's memory",
        choices=("auto", "resident", "stream"),
    )
    shuffle_window: int = option(
        16384, "stream: rows that are shuffled among each other, and the most that wait in memory", type=positive_int
    )
    skip_corrupt: int = option(
        0, "stream: images that may be damaged, per process, before the run stops", type=non_negative_int
    )
    cache_dir: str | None = option(None, "folder of decoded data sets (default: ~/.cache/cifar-dist)")

    @property
    def pixels(self) -> int:
        """A side of the images as they are kept."""
        return self.data_size or 32


@dataclass(frozen=True)
class ModelConfig:
    """model"""

    model: str = option("resnet18_cifar", "any timm model, an alias (swin_base, vit_base, …) or a CIFAR-native one")
    pretrained: bool = option(False, "start from timm's pretrained weights (Hub or its cache)")
    init_weights: str | None = option(
        None, "start from this .safetensors or .pth file, or a run's folder; a head of another size is new"
    )
    img_size: int | None = option(None, "pixels a side the model sees (default: the model's own)", type=positive_int)
    drop: float | None = option(None, "dropout rate (default: the model's own)", type=fraction)
    drop_path: float | None = option(None, "stochastic depth rate (default: the model's own)", type=fraction)
    freeze: str = option(
        "none", "backbone: its parameters stay as they are, only the head trains", choices=("none", "backbone")
    )
    mean: tuple[float, ...] | None = option(
        None, "per-channel mean in [0,1] (default: the model's own)", type=closed_fraction, nargs=3
    )
    std: tuple[float, ...] | None = option(
        None, "per-channel standard deviation (default: the model's own)", type=positive, nargs=3
    )
    interpolation: str | None = option(
        None, "how images are resized (default, and none: the model's own)", choices=(*INTERPOLATIONS, "none")
    )
    sync_bn: bool = option(False, "batch statistics over all processes (SyncBatchNorm)")
    channels_last: bool = option(False, "NHWC memory layout, faster for most CNNs")
    compile: bool = option(False, "torch.compile the model")
    compile_mode: str = option(
        "default", "reduce-overhead: CUDA graphs, faster on GPUs, starts later", choices=("default", "reduce-overhead")
    )


@dataclass(frozen=True)
class AugmentConfig:
    """augmentation"""

    crop_padding: int = option(4, "random crop after padding by this many pixels; 0 is off", type=non_negative_int)
    crop_mode: str = option("zeros", "what the crop's padding is", choices=("zeros", "reflect"))
    scale: tuple[float, ...] | None = option(
        None,
        "with --crop-padding 0: crop a box of a random share of the area, from LOW to HIGH, resized to what the model "
        "sees (RandomResizedCrop), e.g. 0.08 1; all sizes in pixels are of that then",
        type=positive_fraction,
        nargs=2,
    )
    hflip: float = option(0.5, "probability of a horizontal flip; 0 is off", type=closed_fraction)
    flip_mode: str = option(
        "random",
        "horizontal flip: at random every epoch, or at random in the first and the other way each epoch after",
        choices=("random", "alternating"),
    )
    aa: str | None = option(
        None,
        "policy: RandAugment as timm writes it, e.g. rand-m9-mstd0.5-inc1 (m magnitude, n layers, p probability), or "
        "trivial (TrivialAugment)",
        type=policy_text,
    )
    color_jitter: float = option(
        0.0, "change brightness, contrast and saturation by factors up to 1 ± this; 0 is off", type=non_negative
    )
    cutout: int = option(0, "side in pixels of the square set to the mean (Cutout); 0 is off", type=non_negative_int)
    reprob: float = option(0.0, "probability of random erasing", type=closed_fraction)
    remode: str = option(
        "const",
        "what random erasing leaves: the mean, a random colour, or a random colour a pixel",
        choices=("const", "rand", "pixel"),
    )
    mixup: float = option(0.0, "mixup alpha; 0 is off", type=beta_parameter)
    cutmix: float = option(0.0, "CutMix alpha; 0 is off", type=beta_parameter)
    mixup_prob: float = option(1.0, "probability that a pair of images is mixed", type=closed_fraction)
    mixup_switch_prob: float = option(
        0.5, "probability of CutMix rather than mixup where both are on", type=closed_fraction
    )
    smoothing: float = option(0.0, "label smoothing", type=fraction)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, two by two."""
        return self.mixup > 0 or self.cutmix > 0


NO_AUGMENTATION = AugmentConfig(crop_padding=0, hflip=0.0)


@dataclass(frozen=True)
class OptimConfig:
    """optimization"""

    opt: str = option("adamw", "any optimizer of timm: adamw, adam, momentum (SGD), sgd (Nesterov), lamb, …")
    lr: float = option(1e-3, "peak learning rate for the global batch", type=positive)
    weight_decay: float = option(
        0.05, "weight decay; not applied to what has one dimension: biases, norms", type=non_negative
    )
    momentum: float = option(0.9, "momentum, where the optimizer has one", type=fraction)
    layer_decay: float | None = option(
        None, "learning-rate factor from one layer to the one below", type=positive_fraction
    )
    clip_grad: float | None = option(None, "largest gradient norm", type=positive)
    sched: str = option("cosine", "learning-rate schedule", choices=SCHEDULES)
    sched_on_updates: bool = option(True, "change the learning rate every step; else once an epoch")
    warmup_epochs: float = option(0.0, "epochs of linear warmup before the schedule", type=non_negative)
    warmup_lr: float = option(1e-6, "learning rate the warmup starts from", type=non_negative)
    min_lr: float = option(0.0, "learning rate that cosine and linear end at", type=non_negative)
    decay_epochs: float = option(10.0, "epochs between two drops of the step schedule", type=positive)
    decay_rate: float = option(0.5, "factor of a drop of the step schedule", type=positive)
    model_ema_decay: float | None = option(
        None, "keep a moving average of the weights with this decay, evaluate and select with it", type=fraction
    )


@dataclass(frozen=True)
class RunConfig:
    """run"""

    epochs: int = option(10, "epochs to train, which the schedule spans", type=positive_int)
    max_steps: int | None = option(
        None,
        "stop after this many optimizer steps in all, 0 to make a run of given weights as they are; the schedule still "
        "spans --epochs",
        type=non_negative_int,
    )
    batch_size: int = option(128, "images per optimizer step, over all processes (HF: total batch)", type=positive_int)
    micro_batch_size: int | None = option(
        None,
        "largest batch one process holds; accumulation follows from it (HF: per_device_train_batch_size)",
        type=positive_int,
    )
    auto_micro_batch: bool = option(
        False, "try before training what fits into memory, and halve the micro-batch until it does; same global batch"
    )
    seed: int = option(0, "seed of order, augmentation, initial weights and dropout", type=any_seed)
    precision: str = option(
        "fp32",
        "compute type; weights stay fp32; auto: fp32 or bf16, and --channels-last or not, whichever is measured to be "
        "the fastest here before training",
        choices=(*PRECISIONS, "auto"),
    )
    patience: int | None = option(None, "stop after so many epochs without a better top-1", type=positive_int)
    min_delta: float = option(0.0, "smallest gain in top-1 (a fraction) that early stopping counts", type=fraction)
    on_nan: str = option(
        "stop",
        "a loss or gradient that is not finite: stop after a checkpoint of the last good state, or skip the batch "
        "(at most 10 in a row)",
        choices=("stop", "skip"),
    )
    ddp_timeout: int = option(600, "seconds a process waits for the others, e.g. for a late node", type=positive_int)
    run_dir: str | None = option(None, "folder of this run (default: runs/MODEL-DATASET-TIME)")
    resume: str = option(
        "never", "auto: continue from the last checkpoint in --run-dir if there is one", choices=("never", "auto")
    )
    log_every: int = option(50, "steps between two training records", type=positive_int)
    checkpoint_every: int | str | None = option(
        None,
        "also checkpoint every so many steps, or so often: 10m (besides every epoch's end)",
        type=steps_or_duration,
    )
    keep_last: int = option(2, "how many of the newest checkpoints to keep; the best one always is", type=positive_int)
    time_limit: str | None = option(
        None, "leave with a checkpoint in time before this much has passed since the start: 2h, 90m", type=duration
    )
    wandb: str | None = option(
        None, "Weights & Biases (default: online if logged in, else offline)", choices=("online", "offline", "disabled")
    )
    wandb_project: str = option(
        os.environ.get("WANDB_PROJECT") or "cifar-dist", "Weights & Biases project; by default that of $WANDB_PROJECT"
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run, one frozen section per concern."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def flat(self) -> dict[str, Any]:
        """Every setting under its flag's name (with ``_``); a valid recipe once written as YAML."""
        sections = (getattr(self, section.name) for section in dataclasses.fields(self))
        return {f.name: getattr(s, f.name) for s in sections for f in dataclasses.fields(s)}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Config:
        """The inverse of `flat`; settings that are absent keep their defaults."""
        sections = {}
        for section in dataclasses.fields(cls):
            kind = typing.get_type_hints(cls)[section.name]
            own = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
            sections[section.name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})
        return cls(**sections)

    def as_recipe(self) -> str:
        """The merged configuration as YAML that ``--config`` reads back."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.flat().items()}
        return yaml.safe_dump(plain, sort_keys=False)


@dataclass(frozen=True)
class InputConfig:
    """What a model expects of its input, after its own timm data config and the user's overrides."""

    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
