"""The benchmarks run, and what they reckon with is right; what they measure is for benchmarks/results."""

import json
import multiprocessing
import time
from contextlib import closing

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import gpu, gpu_rows
from benchmarks.gpu_rows import PLAIN, Case, Row, Way
from benchmarks.plain_loop import PlainLoop, Setting
from cifar_dist.models import build_model
from cifar_dist.parallel import Replicated

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TINY = Case("test_vit", 160, 4, images_per_second=1e12, times_plain=1e-6, data_share=1e-9)


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


def test_the_gpu_benchmark_measures_and_says_what_failed(monkeypatch, tmp_path, capsys):
    steps = []
    update = Replicated.update
    monkeypatch.setattr(Replicated, "update", lambda self: steps.append(self) or update(self))
    monkeypatch.setattr(gpu_rows, "CORES", 0)  # no workers
    eager, no_such = Way("eager"), Case("no_such_model", 32, 4)
    monkeypatch.setattr(gpu, "ROWS", [(no_such, eager), (TINY, PLAIN), (TINY, eager)])
    gpu.main(["--seconds-per-row", "0.01", "--json", str(tmp_path / "found.json")])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    failed, plain, ours = found["rows"]
    assert failed["error"].startswith("UsageError: --model no_such_model")
    assert failed["images_per_second"] is None
    assert not plain["error"] and not ours["error"]
    assert len(plain["step_seconds"]) == len(ours["step_seconds"]) == gpu_rows.WINDOWS
    assert ours["mfu"] / plain["mfu"] == pytest.approx(ours["images_per_second"] / plain["images_per_second"])
    assert ours["batch_share"] > 0 and ours["no_data_images_per_second"] > 0
    assert len(steps) >= 2 * gpu_rows.WINDOWS + 3 * gpu_rows.WARM_UP_STEPS
    verdicts = [line.rsplit(": ", 1)[1] for line in said.splitlines() if ", aim at " in line]
    assert verdicts == ["MISSED", "met", "MISSED"]


def test_rows_end_in_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "ROWS", [(TINY, Way("eager"))])
    gpu.main(["--minutes", "0"])
    assert "no time left" in capsys.readouterr().out
    with pytest.raises(TimeoutError, match="not done after"), gpu.limited(0.05):
        while True:
            time.sleep(1)


def test_blocks_that_are_compiled_alone_are_the_innermost_of_a_row():
    names = {
        "vit_tiny_patch16_224": ("Block", 12),
        "swin_tiny_patch4_window7_224": ("SwinTransformerBlock", 2 + 2 + 6 + 2),
        "resnet18_cifar": ("BasicBlock", 4 * 2),
        "wrn28_10": ("WideBlock", 3 * 4),
    }
    for name, (kind, count) in names.items():
        with torch.device("meta"):
            model = build_model(gpu_rows.ModelConfig(model=name), 10)
        blocks = gpu_rows.repeated_blocks(model)
        assert [type(block).__name__ for block in blocks] == [kind] * count
        assert len(set(map(id, blocks))) == count
    assert gpu_rows.repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_a_row_takes_the_median_window():
    row = Row(Case("any", 32, 10), Way("eager"), step_seconds=[1.0, 9.0, 2.0])
    assert row.images_per_second == 5
    assert row.share(0.5) == 0.25
