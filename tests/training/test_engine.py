"""Training steps against plain PyTorch, and evaluation against scikit-learn."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from cifar_dist.command_line import parse_command_line
from cifar_dist.config import InputConfig, OptimConfig
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.models import build_model
from cifar_dist.optim import fuse, make_optimizer
from cifar_dist.ordering import epoch_order
from cifar_dist.parallel import Replicated
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.schedule import Schedule
from cifar_dist.training.batches import Batch, ResidentBatches
from cifar_dist.training.engine import Evaluator, Meter, Stepper, train_step

INPUT = InputConfig(img_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear")


def images(count, size=32, classes=10):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return ResidentSet(pixels, torch.arange(count) % classes, torch.arange(count))


def normalised(pixels):
    """The hand-written transform: NHWC bytes to NCHW floats."""
    mean, std = torch.tensor(INPUT.mean), torch.tensor(INPUT.std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def our_losses(config, model, data, steps, accelerator):
    return [loss for loss, _ in our_shares(config, model, data, steps, accelerator)]


def our_shares(config, model, data, steps, accelerator):
    """Loss and top-1 of every step."""
    sizes = Sizes(len(data), 0, None, 10, 0, 0, 0, 0)
    plan = make_plan(config, sizes, num_processes=1)
    parallel = Replicated(accelerator, model.train(), make_optimizer(model, config.optim), config.optim.clip_grad)
    schedule = Schedule(parallel.optimizer, config.optim, config.run.epochs, plan.steps_per_epoch)
    batches = ResidentBatches(data, config, plan, INPUT, parallel)
    stepper = Stepper(parallel, config.augment.smoothing)
    shares = []
    for step in range(steps):
        schedule.apply(step)
        share, flags = train_step(stepper, batches(step))
        assert not flags.refused
        shares.append(share.tolist())
    return shares


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True)


FLAGS = """
    --model cnn4 --drop 0 --opt momentum --weight-decay 0 --lr 5e-3 --sched linear --epochs 2 --batch-size 16
    --crop-padding 0 --hflip 0 --smoothing 0.1 --clip-grad 1.0
"""
CONFIG = parse_command_line(FLAGS.split()).config


def test_twenty_steps_equal_plain_pytorch(accelerator):
    data = images(160)
    torch.manual_seed(3)
    model = build_model(CONFIG.model, 10)
    plain = build_model(CONFIG.model, 10)
    plain.load_state_dict(model.state_dict())
    ours = our_losses(CONFIG, model, data, 20, accelerator)

    plain.train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=5e-3, momentum=0.9)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs = []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 20)
        rows = epoch_order(160, 0, step // 10)[(step % 10) * 16 :][:16].copy()
        loss = criterion(plain(normalised(data.images[rows])), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())
    assert theirs[-1] < theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("micro", [8, 4, 2])
def test_accumulation_changes_nothing_without_batch_norm(accelerator, micro):
    """Also over an epoch's last batch of 5 real rows, which is filled up to 16."""
    data, shares = images(37), []
    for micro_batch_size in (16, micro):
        run = dataclasses.replace(CONFIG.run, micro_batch_size=micro_batch_size)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(8 * 49, 10))
        shares.append(our_shares(dataclasses.replace(CONFIG, run=run), model, data, 6, accelerator))
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-5)


def test_an_epochs_last_batch_is_the_mean_over_its_real_rows(accelerator):
    data = images(37)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    frozen = dataclasses.replace(CONFIG, optim=OptimConfig(opt="sgd", lr=1e-30, weight_decay=0))
    data.labels[:] = model(normalised(data.images)).argmax(1)
    data.labels[::3] = (data.labels[::3] + 1) % 10  # two of three are right
    shares = our_shares(frozen, model, data, 3, accelerator)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for share, rows in zip(shares, np.split(epoch_order(37, 0, 0).copy(), [16, 32]), strict=True):
        logits, labels = model(normalised(data.images[rows])), data.labels[rows]
        expected = [criterion(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()]
        assert share == pytest.approx(expected, rel=1e-5) and 0 < share[1] < 1
    assert len(rows) == 5


@pytest.mark.parametrize("flags", ["--mixup 0.8", "--cutmix 1.0", "--mixup 0.4 --cutmix 1.0"])
def test_mixup_trains_and_does_not_depend_on_what_was_drawn_before(accelerator, flags):
    config = parse_command_line(["--batch-size", "16", "--model", "cnn4", *flags.split()]).config
    plan = make_plan(config, Sizes(160, 0, None, 10, 0, 0, 0, 0), 1)
    parallel = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    batches = ResidentBatches(images(160), config, plan, INPUT, parallel)
    first = next(batches(3))
    np.random.seed(77)
    again = next(batches(3))
    assert first.targets.shape == (16, 10)
    torch.testing.assert_close(first.targets.sum(1), torch.ones(16))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, next(batches(4)).targets)


def test_of_a_mixed_image_the_class_that_it_has_most_of_is_the_right_one(accelerator):
    shares = torch.tensor([[0.1, 0.9, 0.0], [0.7, 0.0, 0.3], [0.4, 0.6, 0.0], [0.0, 0.2, 0.8]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))  # logits are the pixels
    pixels = torch.tensor([[0.0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]]).view(4, 3, 1, 1)
    parallel = Replicated(accelerator, model, make_optimizer(model, OptimConfig(lr=1e-3)), None)
    batch = Batch(pixels, shares, torch.full((4,), 0.25), last=True)
    share, _ = train_step(Stepper(parallel, 0.1), [batch])
    expected = -(shares * torch.log_softmax(pixels.flatten(1), 1)).sum(1).mean()  # smoothed by mixing already
    assert share.tolist() == pytest.approx([expected.item(), 0.75])


def test_batches_made_ahead_are_those_that_are_asked_for(accelerator):
    """As on a GPU: each micro-batch is made once, and the next step's first one before it is asked for."""
    flags = ["--batch-size", "16", "--micro-batch-size", "8", "--model", "cnn4", "--epochs", "2", "--cutmix", "1.0"]
    config = parse_command_line(flags).config
    plan = make_plan(config, Sizes(50, 0, None, 10, 0, 0, 0, 0), 1)
    parallel = SimpleNamespace(accelerator=accelerator, input_dtype=torch.float32)
    plain, ahead = (ResidentBatches(images(50), config, plan, INPUT, parallel) for _ in range(2))
    made = []
    parts = ahead._parts
    ahead._parts = lambda step: (made.append(step) or part for part in parts(step))
    ahead._looks_ahead = True
    for step in range(plan.total_steps):
        for mine, other in zip(ahead(step), plain(step), strict=True):
            assert torch.equal(mine.images, other.images)
            assert torch.equal(mine.targets, other.targets)
            assert mine.last == other.last
        assert made == [k for k in range(plan.total_steps) for _ in range(2)][: 2 * step + 3]
    assert torch.equal(next(ahead(1)).images, next(plain(1)).images)  # another step than the one made ahead
    ahead._parts = lambda step: parts(step) if step < 2 else iter([1 / 0])
    assert len(list(ahead(1))) == 2  # what step 2 raises is not step 1's
    with pytest.raises(ZeroDivisionError):
        list(ahead(2))


@pytest.mark.parametrize("count, batch_size", [(37, 8), (40, 8), (5, 64)])
def test_evaluation_counts_every_row_once(accelerator, count, batch_size):
    data = images(count)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 10))
    preprocess = Preprocess(INPUT, "cpu", torch.float32)
    evaluator = Evaluator(accelerator, preprocess, batch_size, "fp32")
    scores, logits = evaluator.scores(model, data), evaluator.logits(model, data)
    with torch.inference_mode():
        expected = model.eval()(normalised(data.images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert scores["top1"] == pytest.approx(accuracy_score(data.labels, expected.argmax(1)))
    probabilities = expected.double().softmax(1)
    assert scores["loss"] == pytest.approx(log_loss(data.labels, probabilities, labels=range(10)), rel=1e-4)


def test_the_meter_reads_means(accelerator, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cifar_dist.training.engine.time.perf_counter", lambda: now[0])
    meter = Meter(accelerator, images=10)
    meter.add(torch.tensor([2.0, 0.5], dtype=torch.float64))
    now[0] += 0.25
    with meter.paused():
        now[0] += 60
    meter.add(torch.tensor([4.0, 0.0], dtype=torch.float64))
    now[0] += 0.75
    expected = {"train/loss": 3.0, "train/top1": 0.25, "images_per_second": 2 * 10 / 1.0, "data_wait": 0.25}
    assert meter.read([0.25, 0.0]) == pytest.approx(expected)


def scaled_engine(clip_grad):
    """An engine under fp16 with torch's loss scaler, as Accelerate sets it up on a GPU, here on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**10), True
    accelerator.state._mixed_precision = "fp16"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return Replicated(accelerator, model, make_optimizer(model, OptimConfig(opt="momentum", lr=0.01)), clip_grad)


def batch_of(pixels):
    labels = torch.arange(len(pixels))
    return [Batch(pixels, labels, torch.full((len(pixels),), 1 / len(pixels)), last=True)]


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_fp16_with_its_scaler_follows_fp32_and_refuses_a_bad_loss(clip_grad):
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    parallel = scaled_engine(clip_grad)
    stepper, scaler = Stepper(parallel, 0.0), parallel.accelerator.scaler
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    optimizer.param_groups[0]["weight_decay"] = 0.0

    def plain_step():
        nn.functional.cross_entropy(plain(pixels), torch.arange(8)).backward()
        if clip_grad:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    for group in parallel.optimizer.param_groups:
        group["weight_decay"] = 0.0
    assert not train_step(stepper, batch_of(pixels))[1].refused
    plain_step()
    assert train_step(stepper, batch_of(pixels * math.nan))[1].refused  # changes nothing but the scale
    assert scaler.get_scale() == 2.0**9
    before = scaler.state_dict()
    without_data = [dataclasses.replace(batch, lost=True) for batch in batch_of(pixels)]
    assert train_step(stepper, without_data)[1].lost and scaler.state_dict() == before  # not even the scale
    assert not train_step(stepper, batch_of(pixels))[1].refused
    plain_step()
    for mine, theirs in zip(parallel.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("opt", ["adamw", "momentum", "adam"])
@pytest.mark.parametrize("spoiled", [[0], [1, 2], [3]])
def test_a_device_that_refuses_a_step_itself_does_what_the_host_would(accelerator, monkeypatch, opt, spoiled):
    """Weights, moments and their count of steps, bit for bit; on GPUs the device decides, here it is made to."""
    pixels, states = torch.randn(6, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), []
    pixels[spoiled, 0, 0, 0, 0] = math.nan
    decide, decided = Replicated.update_unless, list[bool]()

    def noting(self, refused):
        decided.append(decide(self, refused))
        return decided[-1]

    monkeypatch.setattr(Replicated, "update_unless", noting)
    for on_device in (False, True):
        monkeypatch.setattr(Replicated, "_steps_on_a_gpu", on_device)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Dropout(0.5), nn.Linear(3072, 10))
        parallel = Replicated(accelerator, model, fuse(make_optimizer(model, OptimConfig(opt=opt, lr=0.01))), 1.0)
        stepper = Stepper(parallel, 0.0)
        refused = [train_step(stepper, batch_of(batch))[1].refused for batch in pixels]
        assert refused == [step in spoiled for step in range(6)]
        moments = [value for state in parallel.optimizer.state.values() for value in state.values()]
        states.append([*model.state_dict().values(), *moments])
    first = 2 if spoiled == [0] else 1  # until one was made, there is no state
    assert decided == [False] * (6 + first) + [True] * (6 - first)
    for mine, theirs in zip(*states, strict=True):
        assert torch.equal(mine, theirs)


def test_a_loss_scaler_steps_itself(monkeypatch):
    monkeypatch.setattr(Replicated, "_steps_on_a_gpu", True)
    parallel = scaled_engine(None)
    stepper = Stepper(parallel, 0.0)
    for _ in range(2):
        assert not train_step(stepper, batch_of(torch.randn(8, 3, 32, 32)))[1].refused
        assert not parallel.update_unless(torch.zeros(()))


def test_a_weights_first_step_is_not_made_on_the_device(accelerator, monkeypatch):
    """Also where others have their momentum already."""
    monkeypatch.setattr(Replicated, "_steps_on_a_gpu", True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 10))
    parallel = Replicated(accelerator, model, fuse(make_optimizer(model, OptimConfig(opt="momentum", lr=0.01))), None)
    model[1].requires_grad_(False)
    assert not train_step(Stepper(parallel, 0.0), batch_of(torch.randn(8, 3, 32, 32)))[1].refused
    model[2].weight.grad = torch.ones_like(model[2].weight)
    assert parallel.update_unless(torch.ones(()))
    model[1].weight.grad = torch.ones_like(model[1].weight)
    assert not parallel.update_unless(torch.ones(()))


def test_fp16_gradients_that_overflow_at_every_scale_are_bad():
    parallel = scaled_engine(None)
    parallel.module[1].bias.register_hook(lambda gradient: gradient * math.inf)
    before = parallel.module[1].weight.detach().clone()
    refused = [train_step(Stepper(parallel, 0.0), batch_of(torch.randn(8, 3, 32, 32)))[1].refused for _ in range(15)]
    assert refused == [False] * 14 + [True]
    assert torch.equal(before, parallel.module[1].weight)
