"""Speed on a clock that the model itself moves, and what is measured as in evaluation."""

import itertools
import statistics
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar_dist.config import InputConfig
from cifar_dist.cost import speed
from cifar_dist.cost.speed import Speed, durations, energy_joules, measure_speed
from cifar_dist.data.augment import Preprocess
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.hardware import processor
from cifar_dist.errors import UsageError
from cifar_dist.training.engine import Evaluator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INPUT = InputConfig(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")


class Paced(nn.Module):
    """Takes the time that `cost` says of a number of images, on a clock of its own, and notes the passes."""

    def __init__(self, cost, most=1 << 20):
        super().__init__()
        self.cost, self.most = cost, most
        self.now, self.passes, self.seconds = 0.0, [], []

    def forward(self, images):
        self.passes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.seconds.append(self.cost(len(images)))
        self.now += self.seconds[-1]
        return images.flatten(1)[:, :2]

    def tried(self):
        return [size for size, _ in itertools.groupby(self.passes)]


@pytest.fixture
def measured(monkeypatch):
    """Measures a paced model."""

    def measure(model, seconds=1.0, precision="fp32"):
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: model.now))
        return measure_speed(model, INPUT, CPU, precision, seconds)

    return measure


def test_a_model_that_sleeps():
    class Sleepy(nn.Module):
        def forward(self, images):
            time.sleep(0.02)
            return images.flatten(1)

    found = measure_speed(Sleepy(), INPUT, CPU, "fp32", seconds=0.1)
    assert 0.02 <= found.latency_median_seconds <= found.latency_p95_seconds
    assert 0 < found.images_per_second <= found.batch_size / 0.02


def test_latencies_are_of_the_timed_passes(measured):
    """The first two passes, which are slow as first ones are, do not count."""
    irregular = itertools.chain([9.0, 8.0], (0.01 + 0.001 * (37 * run % 101) for run in itertools.count()))
    model = Paced(lambda count: next(irregular))
    found = measured(model)
    timed = model.seconds[2 : 2 + found.runs]
    assert sum(timed[:-1]) < 1.0 <= sum(timed)
    assert found.latency_median_seconds == pytest.approx(statistics.median(timed))
    ninety_five = torch.tensor(timed, dtype=torch.float64).quantile(0.95)
    assert found.latency_p95_seconds == pytest.approx(float(ninety_five))


def test_the_batch_grows_while_that_pays(measured):
    model = Paced(lambda count: 0.004 + 0.001 * count + 0.0001 * count**2)
    found = measured(model)
    rates = {size: size / model.cost(size) for size in (1, 2, 4, 8, 16, 32)}
    assert found.batch_size == max(rates, key=rates.get) == 8
    assert found.images_per_second == pytest.approx(rates[8])
    assert model.tried() == [1, 2, 4, 8, 16, 32, 8]


def test_one_disturbed_size_does_not_end_the_search(measured):
    """As another program on the same GPU did: a fast network was left with what it does one image at a time."""
    found = measured(Paced(lambda count: 0.01 if count != 2 else 0.05))
    assert found.batch_size > 2


def test_one_lucky_pass_sets_no_bar_and_disturbed_sizes_are_tried_again(measured):
    """Of the single images one takes a tenth; the first trials of 2 and of 4, with their warm-up, take twice."""
    lucky, slow = itertools.chain([0.01] * 5, [0.001], itertools.repeat(0.01)), {2: 7, 4: 7}

    def cost(count):
        slow[count] = slow.get(count, 0) - 1
        return next(lucky) if count == 1 else 0.02 if slow[count] >= 2 else 0.01

    found = measured(Paced(cost, most=100))
    assert found.batch_size == 64 and found.images_per_second == pytest.approx(6400)


def test_no_memory_ends_the_search(measured):
    model = Paced(lambda count: 0.01, most=5)
    found = measured(model)
    assert found.batch_size == 4
    assert found.images_per_second == pytest.approx(400)
    assert model.tried() == [1, 2, 4, 8, 4] and model.passes.count(8) == 1


def test_not_even_one_image(measured):
    with pytest.raises(UsageError, match="not even one image fits into memory; take a smaller --model"):
        measured(Paced(lambda count: 0.01, most=0))


def test_other_errors_go_through(measured):
    class Broken(Paced):
        def forward(self, images):
            if len(images) > 1:
                raise RuntimeError("shapes cannot be multiplied")
            return super().forward(images)

    with pytest.raises(RuntimeError, match="shapes"):
        measured(Broken(lambda count: 0.01))


def test_time_ends_the_search(measured):
    """Ever more images per second, but each size takes at least its five passes."""
    model = Paced(lambda count: 0.07)
    measured(model)
    assert model.tried() == [1, 2, 4, 8, 4] or model.tried() == [1, 2, 4, 8]
    assert sum(model.seconds) < 3 * (1.0 + 5 * 0.07)


def test_every_pass_is_waited_for(monkeypatch):
    """Else a GPU would be timed at taking orders."""
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("done"))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: events.append("look") or len(events)))
    durations(lambda: events.append("work"), CUDA, 0.0)
    assert events == ["work", "work", "done", *3 * ["look", "work", "done", "look"]]


def test_energy_is_of_the_passes_at_that_size(measured, monkeypatch):
    """A GPU that uses half a joule an image."""
    model = Paced(lambda count: 0.01 + 0.01 * count**2)
    monkeypatch.setattr(speed, "energy_joules", lambda device: 0.5 * sum(model.passes))
    assert measured(model).energy_joules_per_image == pytest.approx(0.5)


def test_energy_as_nvml_tells_it(monkeypatch):
    class NVMLError(Exception):
        pass

    def consumed(handle):
        if handle != "GPU-12ab":
            raise NVMLError
        return 2500

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=consumed,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab"))
    assert energy_joules(CUDA) == 2.5
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="an old one's"))
    assert energy_joules(CUDA) is None
    assert energy_joules(CPU) is None


def test_peak_memory_is_that_of_the_gpu(monkeypatch):
    assert measure_speed(nn.Flatten(), INPUT, CPU, "fp32", seconds=0.01).peak_memory_bytes is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert speed._peak_memory_bytes(CUDA) == 12345


class Noting(nn.Module):
    """Notes under which conditions it is called, and with what."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), []

    def forward(self, images):
        logits = self.layer(images.mean((2, 3)))
        batch = tuple(images.shape[1:]), images.dtype, images.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((*batch, self.training, torch.is_grad_enabled(), logits.dtype))
        self.last = images
        return logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("side", [32, 48])
def test_a_pass_is_that_of_an_evaluation(precision, side):
    """Same shape, layout, types and mode, with the pixels of noise, and no draw from the random stream."""
    input = InputConfig(side, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
    model, pixels = Noting().train(), torch.zeros(8, 32, 32, 3, dtype=torch.uint8)
    split = ResidentSet(pixels, torch.zeros(8, dtype=torch.int64), torch.arange(8))
    Evaluator(Accelerator(cpu=True), Preprocess(input, CPU, torch.float32), 4, precision).logits(model, split)
    expected = set(model.seen)
    model.train().seen.clear()
    random = torch.get_rng_state()
    found = measure_speed(model, input, CPU, precision, seconds=0.01)
    assert set(model.seen) == expected and found.precision == precision
    assert torch.equal(random, torch.get_rng_state())
    if side == 32:
        grey = model.last.permute(0, 2, 3, 1) * torch.tensor(input.std) + torch.tensor(input.mean)
        assert float(grey.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(grey.std()) == pytest.approx(1 / 12**0.5, abs=0.02)


@pytest.mark.parametrize(("threads", "said"), [(1, "1 thread"), (2, "2 threads")])
def test_what_it_says_of_itself(measured, monkeypatch, threads, said):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = measured(Paced(lambda count: 0.01 * count))
    assert isinstance(found, Speed) and found.energy_joules_per_image is None
    assert found.batch_size == 1 and found.device == f"{processor()} ({said})"
