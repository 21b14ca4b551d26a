"""The benchmarks run, and what they reckon with is right; what they measure is for benchmarks/results."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.transforms.functional import normalize

from benchmarks import compiling, gpu, gpu_rows, gpu_turns, scaling, scaling_model, time_to_accuracy
from benchmarks.gpu_rows import PLAIN, Case, Row, Way
from benchmarks.noise_scale import noise_scale
from benchmarks.plain_loop import MEAN, STD, PlainLoop, Setting
from benchmarks.recovery.seeded_bugs import BUGS
from benchmarks.scaling_measured import fit, predicted
from benchmarks.scaling_model import Cluster, Link, Work
from benchmarks.time_to_accuracy import Goal, Mark, race, reached
from cifar_dist.config import ModelConfig
from cifar_dist.cost.flops import Peak
from cifar_dist.distributed.group import start
from cifar_dist.models import build_model
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TINY = Case("test_vit", 160, 4, images_per_second=1e12, times_plain=1e-6, data_share=-1e9)


def pictures(count):
    return [(Image.new("RGB", (32, 32), (shade % 256, 0, 0)), shade % 10) for shade in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_plain_loop_trains_epochs_and_lets_go_of_its_workers(workers):
    with closing(PlainLoop(pictures(70), Setting("cnn4", 32, 16, "fp32", workers, on_cpu=True))) as loop:
        before = [weight.clone() for weight in loop._prepared[0].parameters()]
        loop.run(9)  # 70 images are 4 steps: the rest is dropped
        assert len(loop.losses) == 2
        assert len(multiprocessing.active_children()) == workers
        assert any(not torch.equal(*pair) for pair in zip(before, loop._prepared[0].parameters(), strict=True))
    assert not multiprocessing.active_children()


@pytest.fixture
def forked(monkeypatch):
    """Rows in forks of this process, which has imported what they need; a GPU allows none."""
    fork = multiprocessing.get_context("fork")

    def process(target, args):
        pickle.dumps((target, *args[:2]))  # as for a process that is spawned; the last is its pipe
        return fork.Process(target=target, args=args)

    context = SimpleNamespace(Pipe=fork.Pipe, Process=process)
    monkeypatch.setattr(gpu_turns, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


FORK_OF_THREADS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@FORK_OF_THREADS
@pytest.mark.usefixtures("forked")
def test_the_gpu_benchmark_measures_and_says_what_failed(monkeypatch, tmp_path, capsys):
    eager, no_such = Way("eager"), Case("no_such_model", 32, 4)
    monkeypatch.setattr(gpu, "ROWS", [(no_such, eager), (TINY, PLAIN), (TINY, eager)])
    gpu.main(["--seconds-per-row", "0.01", "--together", "2", "--json", str(tmp_path / "found.json")])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    failed, plain, ours = found["rows"]
    assert failed["error"].startswith("UsageError: --model no_such_model")
    assert failed["images_per_second"] is None
    assert not plain["error"] and not ours["error"]
    assert len(plain["step_seconds"]) == len(ours["step_seconds"]) == gpu_rows.WINDOWS
    rates = ours["images_per_second"] / plain["images_per_second"]
    assert ours["mfu"] / plain["mfu"] == pytest.approx(rates, rel=0.5)  # each process has measured this CPU's peak
    assert ours["data_share"] < 1 and ours["no_data_images_per_second"] > 0
    assert found["versions"]["timm"] == timm.__version__
    verdicts = [line.rsplit(": ", 1)[1] for line in said.splitlines() if ", aim at " in line]
    assert verdicts == ["MISSED", "met", "MISSED"]


@pytest.mark.parametrize("way", [PLAIN, Way("eager")])
def test_a_row_is_measured_when_its_turn_has_come(monkeypatch, way):
    monkeypatch.setattr(gpu_rows, "CORES", 0)  # no workers
    data, images = gpu.noise(64)
    row, before = Row(TINY, way), []
    turn = lambda: before.append((list(row.step_seconds), row.ready_seconds))  # noqa: E731
    gpu_rows.fill(gpu_rows.Bench(start("bf16"), data, images, Peak(1e12, "made up"), 0.01, turn), row)
    assert before == [([], row.ready_seconds)] and row.ready_seconds > 0
    assert len(row.step_seconds) == gpu_rows.WINDOWS


def counting(number):
    os.setsid()
    while True:
        number.value += 1


def difference(connection, number):
    os.setsid()
    connection.recv()
    time.sleep(0.2)
    before = number.value
    time.sleep(0.5)
    connection.send(number.value - before)


def test_all_others_stand_still_while_one_is_measured():
    fork, turns = multiprocessing.get_context("fork"), gpu_turns.Turns(None, time.monotonic() + 60)
    (here, there), number = fork.Pipe(), fork.Value("q", 0, lock=False)
    other, one = fork.Process(target=counting, args=(number,)), fork.Process(target=difference, args=(there, number))
    turns._processes = {other, one}
    for process in (other, one):
        process.start()
    try:
        wait_for(lambda: number.value)
        assert turns.alone(one, here) == 0
        after = number.value
        wait_for(lambda: number.value > after)
    finally:
        for process in (other, one):
            gpu_turns.send_signal(process, signal.SIGKILL)
            process.join()


def wait_for(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def dying(row, turn):
    os._exit(1)


def waiting(row, turn):
    time.sleep(600)


@FORK_OF_THREADS
@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("measure", "seconds", "error"),
    [(dying, 60, "its process died"), (waiting, 1, "not done in time"), (waiting, 0, "no time left")],
)
def test_rows_end_in_time(measure, seconds, error):
    rows = [Row(TINY, Way("eager"))] * 2
    began = time.monotonic()
    found = dict(gpu_turns.Turns(measure, began + seconds).take(rows, 2))
    assert [found[number][0].error for number in (0, 1)] == [error] * 2
    assert time.monotonic() - began < 60


def test_steps_get_batches_of_their_own_unless_asked_for_the_same_one(monkeypatch):
    monkeypatch.setattr(gpu_rows, "WARM_UP_STEPS", 0)
    data, pictures = gpu.noise(64)
    bench = gpu_rows.Bench(start("bf16"), data, pictures, Peak(1e12, "made up"), 0.01)
    ours = gpu_rows.Ours(bench, Case("cnn4", 32, 16), Way("eager"))
    asked, batches, seen = [], ours._batches, []
    monkeypatch.setattr(ours, "_batches", lambda step: asked.append(step) or batches(step))
    hook = ours._stepper.parallel.module.register_forward_pre_hook(lambda _, given: seen.append(given[0].sum().item()))
    ours.run(4)
    assert asked == [0, 1, 2, 3]
    ours.run(3, fixed=True)
    hook.remove()
    assert asked == [0, 1, 2, 3]
    assert len(set(seen[:4])) == 4 and len(set(seen[4:])) == 1


@pytest.mark.parametrize("backend", ["inductor", "eager"])
@pytest.mark.parametrize("way", compiling.WAYS)
def test_every_way_to_compile_reaches_the_compiler(monkeypatch, way, backend):
    monkeypatch.setattr(nn.Module, "compile", nn.Module.compile)  # what the benchmark puts there ends with the test
    model = build_model(ModelConfig(model="vit_small_cifar"), 10)
    compiling.compile_as(way, model, backend)
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    blocks = [f"blocks.{index}" for index in range(7)]
    assert compiled == {"uncompiled": [], "whole": [""], "blocks": blocks, "train.py": blocks}[way]


def test_ways_to_run_take_turns():
    asked = []
    ways = [(lambda steps, name=name: asked.append(name) or float(steps), []) for name in "ab"]
    gpu_rows.windows(ways, 0.01)
    assert [found for _, found in ways] == [[1.0] * gpu_rows.WINDOWS] * 2
    assert "".join(asked[1:]) == "abba" * (gpu_rows.WINDOWS // 2)  # the first warms up


def test_a_row_takes_the_median_window():
    row = Row(Case("any", 32, 10), Way("eager"), step_seconds=[1.0, 9.0, 2.0])
    assert row.images_per_second == 5
    row.no_data_step_seconds, row.device_seconds = [1.5, 0.1, 7.0], 1.8
    assert row.data_share == pytest.approx(0.25)
    assert row.busy_share == pytest.approx(0.9)


def test_when_a_target_was_first_reached_by_hand():
    marks = [Mark(0, 0.0, 0.1), Mark(10, 2.0, 0.3), Mark(20, 6.0, 0.5), Mark(30, 8.0, 0.2), Mark(40, 9.0, 0.6)]
    assert reached(marks, 0.35) == Mark(pytest.approx(12.5), pytest.approx(3.0), 0.35)
    assert reached(marks, 0.5) == Mark(20, 6.0, 0.5)
    assert reached(marks, 0.61) is None


@pytest.fixture
def small_race(monkeypatch):
    """A race on noise: two chunks of two turns of a step, of 1, 3, 1, 2, … seconds."""
    data, pictures = gpu.noise(96)
    bench = gpu_rows.Bench(start("bf16"), data, pictures, Peak(1e12, "made up"), 0.0)
    goal = Goal("cnn4", 32, 16, 3e-3, target=0.8, chunk=2, test_images=50)
    seconds = iter([1.0, 3.0, 1.0, 2.0, 1.0, 4.0, 1.0, 3.0])
    monkeypatch.setattr(time_to_accuracy, "TURNS", 2)
    monkeypatch.setattr(time_to_accuracy, "BUSY_PERCENT", 100)
    monkeypatch.setattr(time_to_accuracy, "layout", lambda *_: (True, {}))
    for kind in (gpu_rows.Ours, PlainLoop):
        monkeypatch.setattr(kind, "run", lambda self, count, run=kind.run: run(self, count) and next(seconds))
    return lambda: race(bench, goal, data.train, seed=7, limit_seconds=8)


def test_a_race_gives_both_the_same_steps_and_rates(small_race, monkeypatch):
    steps, top1 = [], {gpu_rows.Ours: iter([0.1, 0.3, 0.9]), PlainLoop: iter([0.1, 0.7, 0.9])}
    monkeypatch.setattr(time_to_accuracy, "score", lambda _, loop, *__: next(top1[type(loop)]))

    def note(optimizer, *_):
        groups = optimizer.param_groups
        (rates,) = {(group["lr"], group["betas"]) for group in groups}
        steps.append((id(optimizer), *rates, max(group["weight_decay"] for group in groups)))

    with ExitStack() as after:
        after.callback(register_optimizer_step_post_hook(note).remove)
        found = small_race()
    del steps[0]  # to count the optimizer's state
    ours, plain = steps[0][0], steps[1][0]
    assert ours != plain
    assert steps == [(each, 3e-3, (0.9, 0.999), 0.05) for each in (ours, plain) * 4]
    marks = {name: [(mark["steps"], mark["seconds"]) for mark in own] for name, own in found["marks"].items()}
    assert marks == {"ours": [(0, 0), (2, 2), (4, 4)], "plain": [(0, 0), (2, 5), (4, 12)]}
    assert found["step_seconds"] == {"ours": 1, "plain": 3}
    assert found["ratio_at_median"] == pytest.approx(3 * 3 / (2 + 5 / 6 * 2))
    assert found["reached"]["ours"]["seconds"] == pytest.approx(2 + 5 / 6 * 2)
    assert found["ratio"] == pytest.approx((5 + 1 / 2 * 7) / (2 + 5 / 6 * 2))


def test_a_race_scores_both_on_torchvisions_images_and_begins_with_the_same_weights(small_race, monkeypatch):
    weights, by_hand, score = [], {"ours": [], "plain": []}, time_to_accuracy.score

    def score_again(bench, loop, goal, test):
        name, own = "plain", (MEAN, STD)
        if isinstance(loop, gpu_rows.Ours):
            name, own = "ours", (loop.model.default_cfg["mean"], loop.model.default_cfg["std"])
        weights.append({key: value.clone() for key, value in loop.model.state_dict().items()})
        seen = []
        hook = loop.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        found = score(bench, loop, goal, test)
        hook.remove()
        assert loop.model.training and test.ids.tolist() == list(range(50))
        images = normalize(test.images.permute(0, 3, 1, 2) / 255, *own)
        torch.testing.assert_close(torch.cat(seen)[:50], images, check_stride=False)
        loop.model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            by_hand[name].append((loop.model(images).argmax(1) == test.labels).float().mean().item())
        loop.model.train()
        return found

    monkeypatch.setattr(time_to_accuracy, "score", score_again)
    found = small_race()
    assert found["reached"] == {"ours": None, "plain": None} and found["ratio"] is None
    marks = {name: [mark["top1"] for mark in own] for name, own in found["marks"].items()}
    one_image = 0.0201  # may be rounded to the other side
    assert marks["ours"] == pytest.approx(by_hand["ours"], abs=one_image)
    assert marks["plain"] == pytest.approx(by_hand["plain"], abs=one_image)
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# alpha 1 s and 10 bytes/s in a node of 4, alpha 5 s and 4 bytes/s between nodes
TOY = Cluster("toy", Link(1.0, 10.0), Link(5.0, 4.0), per_node=4)


def ring_by_walking(count, nbytes, cluster):
    """A reduce-scatter, step by step: each piece goes to the neighbour, over the mean hop and the narrowest place."""
    nodes = -(-count // cluster.per_node)
    hops = [cluster.outer.alpha_seconds] * nodes + [cluster.inner.alpha_seconds] * (count - nodes)
    widths = [cluster.inner.bytes_per_second, cluster.outer.bytes_per_second]
    alpha = sum(hops) / count if nodes > 1 else cluster.inner.alpha_seconds
    width = min(widths) if nodes > 1 else widths[0]
    return sum(alpha + nbytes / count / width for _ in range(count - 1))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_half_a_ring_step_by_step(count):
    assert scaling_model.half_ring(count, 240, TOY) == pytest.approx(ring_by_walking(count, 240, TOY))


def test_all_reduce_by_hand():
    assert scaling_model.all_reduce(4, 40, TOY) == pytest.approx(2 * (3 * 1 + 3 / 4 * 40 / 10))
    # 8 processes on 2 nodes: a ring takes 2 * 7 * ((6 * 1 + 2 * 5) / 8 + 40 / 8 / 4) = 45.5
    assert scaling_model.all_reduce(8, 40, TOY) == pytest.approx(2 * (3 * 1 + 1 * 5) + 2 * 40 / 4)
    assert scaling_model.all_reduce(8, 4000, TOY) == pytest.approx(2 * 7 * (2 + 4000 / 8 / 4))  # the ring sends less


def test_what_does_not_hide_by_hand(monkeypatch):
    monkeypatch.setattr(scaling_model, "DDP_BUCKET_BYTES", 20)
    monkeypatch.setattr(scaling_model, "ZERO_BUCKET", 10)
    monkeypatch.setattr(scaling_model, "FLAGS_BYTES", 0)
    work = Work(parameters=20, image_seconds=0.0)  # 80 bytes: 4 buckets in DDP, 2 in ZeRO
    flags = 2 * 1  # on two processes, two hops without bytes
    one = 2 * (1 + 20 / 2 / 10)  # of DDP, 4 s
    half = 1 + 40 / 2 / 10  # of ZeRO, 3 s

    def exposed(engine, computing):
        return scaling_model.exposed_seconds(work, engine, 2, computing, TOY)

    assert exposed("ddp", 0.0) == pytest.approx(flags + 4 * one)
    assert exposed("ddp", 12.0) == pytest.approx(flags + 4 * one - 3 / 4 * 8)
    assert exposed("ddp", 1000.0) == pytest.approx(flags + one)
    assert exposed("zero1", 1000.0) == exposed("zero2", 0.0) == pytest.approx(flags + 2 * 2 * half)
    assert exposed("zero3", 0.0) == pytest.approx(flags + 3 * 2 * half)
    assert exposed("zero3", 6.0) == pytest.approx(flags + (2 * half - 2) + (4 * half - 4))
    assert exposed("zero3", 1000.0) == pytest.approx(flags + 2 * half)
    assert scaling_model.exposed_seconds(work, "ddp", 1, 1.0, TOY) == 0


def test_a_step_and_how_many_processes_it_is_worth():
    work = Work(parameters=1, image_seconds=1.0, floor_seconds=4.0, update_seconds=8.0)
    free = Cluster("free", Link(0.0, 1e30), Link(0.0, 1e30))
    assert scaling_model.step_seconds(work, "ddp", 2, 16, free) == pytest.approx(16 + 8)
    assert scaling_model.step_seconds(work, "zero2", 2, 16, free) == pytest.approx(16 + 8 / 2)
    assert scaling_model.step_seconds(work, "ddp", 2, 1, free) == pytest.approx(4 + 8)
    # batch 32: 40, 24, 16, 12, 12 s on 1, 2, 4, 8, 16 processes
    assert scaling_model.last_gain(work, 32, free) == 8
    assert scaling_model.last_gain(work, 6, free) == 1  # 14, 12, and 6 images are not for 4


def test_the_noise_scale_doubles_what_a_training_needs():
    assert scaling_model.examples_factor(100, 100) == 2
    assert scaling_model.examples_factor(1, 1000) == pytest.approx(1.001)


def test_alpha_and_beta_are_found_again_from_times():
    link = Link(3e-4, 2e9)
    times = [(n, 2 * 2 * 3e-4 + 2 * 2 / 3 * n / 2e9) for n in (1024, 65536, 2**25)]
    found = fit(3, times)
    assert found.alpha_seconds == pytest.approx(link.alpha_seconds)
    assert found.bytes_per_second == pytest.approx(link.bytes_per_second)


def test_a_prediction_hides_nothing_where_every_core_computes():
    link = Link(0.0, 1e9)
    crowded, spare = (predicted(2, 1.0, link, cores) for cores in (2, 3))
    gradients = 4 * sum(
        weight.numel() for weight in build_model(gpu_rows.ModelConfig("vit_tiny_patch16_224"), 10).parameters()
    )
    assert crowded == pytest.approx(1 + gradients / 1e9, rel=0.01)  # the position embedding of 224 pixels is larger
    assert spare == pytest.approx(crowded)  # one bucket: nothing to hide behind


def test_the_tables_take_their_numbers_from_the_code():
    lines = list(scaling.tables(None))
    for case in scaling.RECIPES:
        with torch.device("meta"):
            model = timm.create_model(case.model, num_classes=10)
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        first = next(line for line in lines if line.startswith(f"| {case.model} |"))
        assert f"| {millions:.1f} |" in first
        assert f"| {case.images_per_second:,.0f} |" in first
    efficiency = [line for line in lines if line.startswith("| vit_base_patch16_224 | zero")]
    assert len(efficiency) == 2 * 2  # zero1 with zero2, and zero3, on two clusters


def test_the_noise_scale_of_made_up_gradients():
    """Gradients of single images with mean (3, 4) and covariance 50 I in two of 100 numbers: 2 * 50 / 25 images."""
    generator = torch.Generator().manual_seed(0)
    batch, count = 8, 20_000
    truth = torch.zeros(100)
    truth[:2] = torch.tensor([3.0, 4.0])
    noise = torch.zeros(count, 100)
    noise[:, 50:52] = torch.randn(count, 2, generator=generator) * (50 / batch) ** 0.5
    assert noise_scale(truth + noise, batch) == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_every_seeded_bug_has_a_place_and_a_test_that_may_notice_it(bug):
    assert (ROOT / bug.file).read_text().count(bug.old) == 1
    file, _, test = bug.test.partition("::")
    assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text()
