"""A linear probe on features that are computed once.

With ``--freeze backbone`` and nothing random in the pixels or in the backbone, the classifier is given the same numbers
for an image in every epoch. They are computed once then, with the model's own forward pass, and the classifier alone is
trained and evaluated on them. Model, optimizer and checkpoints stay whole: a run may go on either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cifar_dist.config import NO_AUGMENTATION, AugmentConfig, Config
from cifar_dist.data import TrainingData
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.control import Snapshot
from cifar_dist.distributed.group import autocast, device_bytes, engine_name, first_failure, say
from cifar_dist.memory import MIB
from cifar_dist.models import head_parameter_names, input_config
from cifar_dist.ordering import steps_per_epoch
from cifar_dist.plan import Plan, steps_in_all
from cifar_dist.recovery.checkpoint import Trained
from cifar_dist.training.batches import Batches, Part, ResidentBatches
from cifar_dist.training.engine import Evaluator, Stopped
from cifar_dist.training.stream_batches import make_batches

CHANGING = ("crop_padding", "scale", "hflip", "aa", "color_jitter", "cutout", "reprob", "mixup", "cutmix")
LARGEST_SHARE = 4  # features may take one in so many bytes of the device
_SAME = 1e-4  # of the largest feature


@dataclass(frozen=True)
class Features:
    """Whether features are computed once.

    Attributes:
        rows: images of train and val.
        shape: of one image's features, as the classifier takes them; nearly always (F,).
        refusal: why they are not, in a few words; empty if they are, None where no backbone is frozen.
    """

    rows: int = 0
    shape: tuple[int, ...] = ()
    refusal: str | None = None

    @property
    def kept(self) -> bool:
        """Whether they are computed once, and kept on the device."""
        return self.refusal == ""

    @property
    def nbytes(self) -> int:
        """Bytes on the device, float32."""
        return 4 * self.rows * torch.Size(self.shape).numel() if self.kept else 0

    def lines(self) -> list[str]:
        """What the plan says of them."""
        if self.refusal is None:
            return []
        if self.refusal:
            return [f"features    computed in every epoch: {self.refusal}"]
        sizes = " x ".join(f"{size:,}" for size in (self.rows, *self.shape))
        return [f"features    {sizes}, {self.nbytes / MIB:,.0f} MiB, are computed once, before the first step"]


def decide(config: Config, data: TrainingData, model: nn.Module, accelerator: Accelerator) -> Features:
    """Whether the run's features can be computed once: exactly, on the device, and so that it saves time.

    Args:
        config: the run's configuration.
        data: the training data.
        model: as built, on the CPU.
        accelerator: of this process; all decide alike.
    """
    if config.model.freeze != "backbone":
        return Features()
    rows = len(data.train) + (0 if data.val is None else len(data.val))
    shape: tuple[int, ...] = ()
    refusal = _refused_by_settings(config, data, engine_name(accelerator))
    if not refusal:
        size = input_config(model, config.model).img_size
        shape, refusal = _try(model, torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    found = Features(rows, shape, refusal)
    room = device_bytes(accelerator)
    if found.nbytes * LARGEST_SHARE > room:
        refusal = f"{found.nbytes / MIB:,.0f} MiB are more than a quarter of the device's {room / MIB:,.0f}"
    return replace(found, refusal=first_failure(accelerator, refusal))


def _refused_by_settings(config: Config, data: TrainingData, engine: str) -> str:
    if not isinstance(data.train, ResidentSet):
        return "the images are streamed"
    if changing := changes(config.augment):
        return f"{', '.join(changing)} change the images (without them they would be computed once)"
    if config.model.compile:
        return "--compile compiles the whole model"
    if engine not in ("single", "ddp"):
        return f"{engine} cuts up the model"
    epoch = steps_per_epoch(len(data.train), config.run.batch_size)
    return "the run is shorter than an epoch" if steps_in_all(config.run, epoch) < epoch else ""


def changes(augment: AugmentConfig) -> list[str]:
    """Flags of the augmentations that are on, so that an image differs from one epoch to the next."""
    on = [name for name in CHANGING if getattr(augment, name) != getattr(NO_AUGMENTATION, name)]
    return [f"--{name.replace('_', '-')}" for name in on]


class Backbone(nn.Module):
    """A model's own forward pass, images (B, 3, H, W) in; what its classifier is given, (B, F), comes out.

    Attributes:
        draws: whether random numbers were drawn before the classifier's turn in the last pass.
        explains: whether the classifier was called once, and its result was the logits, (B, K) or (B, K, 1, 1).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.draws, self.explains = False, True

    def forward(self, images: Tensor) -> Tensor:
        """Pass images through the whole model, and listen at its classifier."""
        random, given, answers = torch.get_rng_state(), list[Tensor](), list[Tensor]()

        def listen(module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> None:
            given.extend(inputs)
            answers.append(answer)

        def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.draws = not torch.equal(random, torch.get_rng_state())

        classifier = cast(Any, self.model).get_classifier()
        hooks = [classifier.register_forward_pre_hook(compare), classifier.register_forward_hook(listen)]
        try:
            logits = self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        self.explains = len(given) == len(answers) == 1 and torch.equal(answers[0].flatten(1), logits.to(answers[0]))
        return given[0] if given else logits


@torch.no_grad()
def _try(model: nn.Module, images: Tensor) -> tuple[tuple[int, ...], str]:
    """Pass images through the model as it trains and as it is evaluated; it stays as it is, but for its mode.

    Its heads are drawn meanwhile: as long as they are zero, what one of them adds to the logits is not seen.

    Returns:
        Shape of one image's features, and why they cannot be computed once.
    """
    if not isinstance(cast(Any, model).get_classifier(), nn.Module):
        return (), "the model has several classifiers"
    snapshot, backbone = Snapshot(model, images.device), Backbone(model)
    snapshot.take()
    heads = [model.get_parameter(name) for name in head_parameter_names(model)]
    kept, generator = [head.clone() for head in heads], torch.Generator().manual_seed(0)
    for head in heads:
        head.copy_(torch.randn(head.shape, generator=generator))
    trained = backbone.train()(images)
    draws, explains = backbone.draws, backbone.explains
    snapshot.restore()
    evaluated = backbone.eval()(images)
    model.train()
    for head, before in zip(heads, kept, strict=True):
        head.copy_(before)
    shape = tuple(trained.shape[1:])
    if not explains or not backbone.explains:
        return shape, "the logits are not the classifier's result alone"
    if draws:
        return shape, "the backbone draws random numbers (--drop, --drop-path)"
    if not torch.allclose(trained, evaluated, rtol=0, atol=_SAME * float(evaluated.abs().max())):
        return shape, "the backbone works otherwise in training than in evaluation"
    return shape, ""


@dataclass(frozen=True)
class Feed:
    """What the training and its evaluations go through.

    Attributes:
        batches: from a step to its micro-batches.
        val: the selecting split on the device; where features are kept, they are its ``images``.
        evaluator: how it is scored.
        seconds: it took to compute the features.
    """

    batches: Batches
    val: ResidentSet | None
    evaluator: Evaluator
    seconds: float = 0.0


class FeatureBatches(ResidentBatches):
    """Batches of features: the set's ``images`` are float32 (N, F), and are the model's input."""

    def _input(self, part: Part, epoch: int) -> Tensor:
        return part.images


def make_feed(
    data: TrainingData, config: Config, plan: Plan, trained: Trained, keeps: bool, stop: Callable[[], bool]
) -> Feed:
    """Batches and evaluation of a run: of its images, or of its features, computed here; the model then takes those.

    Args:
        data: the training data.
        config: the run's configuration.
        plan: the run's plan.
        trained: with the weights that training begins or goes on with.
        keeps: whether features are to be computed once; see `decide`.
        stop: whether this process was asked to stop; if so while features are computed, the run goes on with images.
    """
    parallel = trained.parallel
    device, precision = parallel.accelerator.device, config.run.precision
    inputs = input_config(parallel.module, config.model)
    preprocess = Preprocess(inputs, device, parallel.input_dtype)
    evaluator = Evaluator(parallel.accelerator, preprocess, plan.micro_batch_size, precision)
    if keeps and isinstance(data.train, ResidentSet):
        began = time.perf_counter()
        try:
            train = _compute(data.train, _laid_out(evaluator, config), parallel.module, stop)
            val = None if data.val is None else _compute(data.val, evaluator, parallel.module, stop)
        except Stopped:
            say(parallel.accelerator, "features    not computed: the run was asked to stop")
        else:
            for model in (parallel.module, None if trained.ema is None else trained.ema.module):
                if model is not None:
                    _take_features(model, device, precision)
            batches = FeatureBatches(train, config, plan, inputs, parallel)
            evaluator = replace(evaluator, preprocess=nn.Identity())
            return Feed(batches, val, evaluator, time.perf_counter() - began)
    val = None if data.val is None else data.val.to(device)
    return Feed(make_batches(data.train, config, plan, inputs, parallel, stop), val, evaluator)


def _laid_out(evaluator: Evaluator, config: Config) -> Evaluator:
    """The evaluator with images in memory as training has them, so that features are the same to the last bit."""
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    preprocess = evaluator.preprocess
    return replace(evaluator, preprocess=lambda images: preprocess(images).contiguous(memory_format=layout))


def _compute(split: ResidentSet, evaluator: Evaluator, model: nn.Module, stop: Callable[[], bool]) -> ResidentSet:
    """The split with features for images, on the device; every process computes its share, and has all."""
    device = evaluator.accelerator.device
    found = evaluator.logits(Backbone(model), split.to(device), stop=stop)
    return ResidentSet(found, split.labels, split.ids).to(device)


def _take_features(model: nn.Module, device: torch.device, precision: str) -> None:
    """Let the model take features (B, F), in place; names of parameters, and what wraps the model, stay."""
    classifier = cast(Any, model).get_classifier()

    def forward(features: Tensor) -> Tensor:
        with autocast(device, precision):
            return classifier(features).flatten(1)

    model.forward = forward
