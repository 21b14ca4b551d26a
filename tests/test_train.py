"""Whole stories through train.py: what a user types, and what they find afterwards."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

import train
from cifar_dist import scoring
from cifar_dist.command_line import load_config
from cifar_dist.data import load_test_data
from cifar_dist.distributed.ending import run_main
from cifar_dist.eval_spec import choose_specs
from cifar_dist.models import build_model, input_config
from cifar_dist.report import write_report
from cifar_dist.report.predictions import save_predictions
from cifar_dist.run_record import open_run
from cifar_dist.training import progress
from cifar_dist.training.engine import Meter
from tests.conftest import ROOT, TORCH_WARNINGS

DIGITS = ["--dataset", "digits", "--model", "cnn4", "--wandb", "disabled", "--batch-size", "64", "--log-every", "5"]


@pytest.fixture
def start(monkeypatch):
    """Run train.py's main in this process with a command line; its exit status."""

    def run(*argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        try:
            run_main(train.main)
        except SystemExit as stop:
            return stop.code
        return 0

    return run


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def state_of(run_dir):
    """Everything that decides how a run goes on."""
    last = run_dir / "checkpoints" / "last"
    tensors = {f"{file.stem}.{k}": v for file in last.glob("*.safetensors") for k, v in load_file(file).items()}
    plain = json.loads((last / "state.json").read_text()), json.loads((last / "optimizer.json").read_text())
    plain[0]["state"].pop("seconds")
    return tensors, plain


def assert_same_state(one, other):
    (tensors, plain), (other_tensors, other_plain) = state_of(one), state_of(other)
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    assert plain == other_plain


def write_report_of(run_dir):
    """Numbers of a run's report, as evaluate.py would write it, without costs."""
    run = open_run(run_dir)
    AcceleratorState._reset_state(reset_partial_state=True)
    (spec,) = choose_specs([run], "best", None, "none")
    loaded = scoring.load_run(run, spec, Accelerator(cpu=True))
    data = scoring.test_data(run, spec)
    scored = scoring.score_test(loaded, data)
    save_predictions(spec.folder, scored)
    scoring.gather_evidence(loaded, scored, data.test).save(spec.folder)
    (spec.folder / "cost.json").write_text("{}")
    return write_report(run, spec.folder).metrics


def test_a_run_goes_on_and_is_scored_where_its_data_lie_now(start, tmp_path):
    def write(folder, images):
        for split in ("train", "test"):
            for label in ("0", "1"):
                (folder / split / label).mkdir(parents=True)
                for number in range(images):
                    Image.new("RGB", (8, 8), (80 * int(label), number, 0)).save(
                        folder / split / label / f"{number}.png"
                    )
        return folder

    flags = [
        "--model",
        "cnn4",
        "--img-size",
        16,
        "--wandb",
        "disabled",
        "--batch-size",
        8,
        "--run-dir",
        tmp_path / "run",
    ]
    data = write(tmp_path / "job1", 20)
    assert start(*flags, "--dataset", data, "--max-steps", 1) == 0
    moved = data.rename(tmp_path / "job2")
    assert start(*flags, "--dataset", moved, "--max-steps", 2, "--resume", "auto") == 0
    assert len(load_test_data(open_run(tmp_path / "run").config.data).test) == 40
    other = write(tmp_path / "job3", 24)
    assert start(*flags, "--dataset", other, "--max-steps", 3, "--resume", "auto") == 2
    assert load_config(tmp_path / "run" / "config.yaml").data.dataset == str(moved)


def test_val_is_the_split_that_the_data_bring_for_it(start, tmp_path, capfd):
    random, pixels = np.random.default_rng(0), {}
    for split, number in (("train", 20), ("validation", 7), ("test", 5)):
        pixels[split] = random.integers(0, 256, (2, number, 16, 16, 3), dtype=np.uint8)
        for label, images in enumerate(pixels[split]):
            (tmp_path / "set" / split / str(label)).mkdir(parents=True)
            for row, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / "set" / split / str(label) / f"{row:02}.png")
    run_dir = tmp_path / "run"
    flags = ["--dataset", tmp_path / "set", "--data-size", 16, "--model", "cnn4", "--wandb", "disabled"]
    flags += ["--batch-size", 8, "--img-size", 16, "--run-dir", run_dir]
    assert start(*flags, "--max-steps", 5) == 0
    said = capfd.readouterr().out
    assert "train 40, val 14, test 10" in said and "\nval         is the data set's own split" in said
    assert start(*flags, "--resume", "auto", "--max-steps", 10) == 0

    run = open_run(run_dir)
    model = build_model(run.config.model, 2).eval()
    model.load_state_dict(load_file(run_dir / "checkpoints" / "last" / "model.safetensors"))
    inputs, labels = input_config(model, run.config.model), torch.arange(2).repeat_interleave(7)
    images = torch.from_numpy(pixels["validation"].reshape(14, 16, 16, 3)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (inputs.mean, inputs.std))
    with torch.no_grad():
        logits = model((images - mean) / std)
    (score,) = [record for record in records(run_dir) if record.get("epoch") == 2 and "val/top1" in record]
    assert score["val/top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert score["val/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)
    loaded = scoring.load_run(run, choose_specs([run], "last", None, "none")[0], Accelerator(cpu=True))
    np.testing.assert_allclose(scoring.score_val(loaded).logits, logits, atol=1e-4)


def test_photographs_are_kept_at_32_pixels_only_for_those_who_ask(start, tmp_path, monkeypatch, capfd):
    def write(folder, width, height):
        for split in ("train", "test"):
            for label in (0, 1):
                (folder / split / str(label)).mkdir(parents=True)
                for number in range(20):
                    picture = Image.new("RGB", (width, height), (80 * label, number, 0))
                    picture.save(folder / split / str(label) / f"{number}.png")
        return folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--model", "cnn4", "--img-size", 64, "--wandb", "disabled", "--batch-size", 8, "--max-steps", 1]
    flags += ["--dataset", write(tmp_path / "photos", 80, 60), "--run-dir", tmp_path / "run"]
    for more in ([], ["--plan"], ["--resume", "auto"]):
        assert start(*flags, *more) == 2
        assert "photos: its images (the first: 80 x 60 pixels) would be kept at 32 x 32" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "recipe.yaml").write_text("data_size: 32\n")
    assert start(*flags, "--config", tmp_path / "recipe.yaml") == 0
    assert start(*flags, "--plan") == 2  # also what the cache has now
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert start(*flags, "--resume", "auto", "--max-steps", 2) == 0  # as does a run of before this was asked
    assert records(tmp_path / "run")[-1]["step"] == 2
    assert start(*flags, "--data-size=64", "--run-dir", tmp_path / "large") == 0
    assert load_config(tmp_path / "large" / "config.yaml").data.data_size == 64
    assert start(*flags, "--dataset", write(tmp_path / "small", 80, 48), "--run-dir", tmp_path / "other") == 0
    assert load_config(tmp_path / "other" / "config.yaml").data.data_size == 32


def test_a_run_learns_and_leaves_what_the_readme_promises(start, tmp_path):
    run_dir = tmp_path / "run"
    assert start(*DIGITS, "--epochs", 4, "--lr", "3e-3", "--hflip", 0, "--run-dir", run_dir) == 0
    found = {path.name for path in run_dir.iterdir()} - {".lock"}
    assert found == {"config.yaml", "plan.json", "environment.json", "log.jsonl", "checkpoints", "progress.json"}
    for which in ("last", "best"):
        assert (run_dir / "checkpoints" / which / "model.safetensors").is_file()
    log = records(run_dir)
    training = [record for record in log if "train/loss" in record]
    evaluations = [record for record in log if "val/top1" in record]
    assert all(
        {"step", "epoch", "train/top1", "lr", "images_per_second", "seconds"} <= record.keys() for record in training
    )
    assert [record["epoch"] for record in evaluations] == [1, 2, 3, 4]
    assert training[-1]["train/loss"] < training[0]["train/loss"] / 3
    assert evaluations[-1]["val/top1"] > 0.9
    plan, environment = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("plan", "environment"))
    assert plan["total_steps"] == log[-1]["step"] == 4 * plan["steps_per_epoch"]
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    cosine = [1.5e-3 * (1 + math.cos(math.pi * (record["step"] - 1) / plan["total_steps"])) for record in training]
    assert [record["lr"] for record in training] == pytest.approx(cosine)
    assert len(environment["class_names"]) == 10
    assert load_config(run_dir / "config.yaml").run.epochs == 4


@pytest.mark.parametrize(
    "flags",
    [
        ["--patience", 1, "--min-delta", 0.9, "--channels-last"],
        ["--model-ema-decay", 0.9, "--micro-batch-size", 16, "--cutout", 8, "--mixup", 0.2, "--precision", "bf16"],
        [
            "--model",
            "test_vit",
            "--img-size",
            32,
            "--layer-decay",
            0.7,
            "--clip-grad",
            1,
            "--drop-path",
            0.2,
            "--opt",
            "lamb",
        ],
        pytest.param(
            ["--compile", "--compile-mode", "reduce-overhead", "--channels-last", "--precision", "bf16"],
            marks=[
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
                pytest.mark.filterwarnings(*TORCH_WARNINGS),
            ],
        ),
    ],
    ids=["dropout-patience", "ema-accumulation-mixup-bf16", "vit-layer-decay-lamb", "cuda-graphs"],
)
def test_a_run_cut_in_the_middle_of_an_epoch_ends_as_the_whole_one(start, tmp_path, flags):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [*DIGITS, "--epochs", 2, "--checkpoint-every", 7, *flags]
    assert start(*settings, "--max-steps", 30, "--run-dir", whole) == 0
    assert start(*settings, "--max-steps", 13, "--run-dir", cut) == 0
    torch.manual_seed(123)
    assert start(*settings, "--max-steps", 30, "--run-dir", cut, "--resume", "auto") == 0
    assert_same_state(whole, cut)
    steps = [record["step"] for record in records(cut) if "train/loss" in record]
    assert steps == sorted(set(steps))


def test_no_steps_make_a_run_of_given_weights_which_may_go_on(start, tmp_path, capfd):
    first, given, whole = (tmp_path / name for name in ("first", "given", "whole"))
    assert start(*DIGITS, "--epochs", 1, "--run-dir", first) == 0
    (score,) = [record for record in records(first) if "val/top1" in record]
    settings = [*DIGITS, "--epochs", 2, "--init-weights", first]
    assert start(*settings, "--max-steps", 0, "--run-dir", given) == 0
    weights = [load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (first, given)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    (found,) = records(given)
    assert found == {**score, "step": 0, "epoch": 0.0}
    report = write_report_of(given)
    assert report["warnings"][0] == "Nothing was trained in this run: its weights are those that it began with."
    alone = tmp_path / "alone"
    assert start(*settings, "--val-fraction", 0, "--max-steps", 0, "--run-dir", alone) == 0
    assert "best so far" not in capfd.readouterr().out.split("given")[-1]
    assert write_report_of(alone)["selected_on"] == report["selected_on"] == "none"
    assert start(*settings, "--max-steps", 0, "--run-dir", given, "--resume", "auto") == 0
    assert "finished    at step 0 of 0: nothing is left to train" in capfd.readouterr().out
    assert start(*settings, "--run-dir", whole) == 0
    assert start(*settings, "--run-dir", given, "--resume", "auto") == 0
    assert_same_state(whole, given)


def test_images_that_fill_up_an_epoch_are_not_counted_as_speed(start, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        progress, "Meter", lambda accelerator, images: told.append(images) or Meter(accelerator, images)
    )
    settings = [*DIGITS, "--epochs", 1, "--batch-size", 1000, "--max-steps", 1]
    assert start(*settings, "--run-dir", tmp_path) == 0
    assert told == [1294 / 2]  # the second batch of each epoch has 294


def test_the_compiler_is_told_its_mode(start, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: told.append(given))
    settings = [*DIGITS, "--epochs", 1, "--max-steps", 1, "--compile"]
    assert start(*settings, "--run-dir", tmp_path / "a") == 0
    assert start(*settings, "--compile-mode", "reduce-overhead", "--run-dir", tmp_path / "b") == 0
    graphs = {"triton.cudagraphs": True}
    assert told == [{"options": {**more, "deterministic": True}, "dynamic": False} for more in ({}, graphs)]


def test_a_frozen_backbone_stays_as_it_was(start, tmp_path):
    settings = [*DIGITS, "--epochs", 1, "--freeze", "backbone", "--opt", "momentum", "--lr", 0.1]
    for steps in (1, 9):
        assert start(*settings, "--max-steps", steps, "--run-dir", tmp_path / str(steps)) == 0
    one, nine = (load_file(tmp_path / n / "checkpoints" / "last" / "model.safetensors") for n in ("1", "9"))
    assert {name for name in one if not torch.equal(one[name], nine[name])} == {"fc.weight", "fc.bias"}


def test_a_damaged_checkpoint_is_never_a_fresh_start(start, tmp_path, capsys):
    settings = [*DIGITS, "--epochs", 1, "--max-steps", 3, "--run-dir", tmp_path]
    assert start(*settings) == 0
    (tmp_path / "checkpoints" / "last" / "state.json").write_text("{")
    assert start(*settings, "--resume", "auto") == 2
    assert "no sound checkpoint to go on from" in capsys.readouterr().err
    assert len(list((tmp_path / "checkpoints").glob("damaged-*/model.safetensors"))) == 1


def test_a_resumed_run_needs_neither_weight_file_nor_hub(start, tmp_path):
    assert start(*DIGITS, "--epochs", 1, "--max-steps", 2, "--run-dir", tmp_path / "first") == 0
    weights = tmp_path / "w.safetensors"
    shutil.copy(tmp_path / "first" / "checkpoints" / "last" / "model.safetensors", weights)
    settings = [*DIGITS, "--epochs", 1, "--init-weights", weights, "--run-dir", tmp_path / "second"]
    assert start(*settings, "--max-steps", 2) == 0
    weights.unlink()
    assert start(*settings, "--max-steps", 4, "--resume", "auto") == 0


def test_resume_auto_starts_when_there_is_nothing_and_stays_when_all_is_done(start, tmp_path):
    settings = [*DIGITS, "--epochs", 1, "--run-dir", tmp_path / "run", "--resume", "auto"]
    assert start(*settings) == 0
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert start(*settings) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_plan_prints_and_leaves_nothing(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert start(*DIGITS, "--plan") == 0
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert all(word in out for word in ("train 1,", "parameters", "steps", "lr", "MiB"))


def test_flags_that_do_nothing_with_this_data_model_or_number_of_processes_are_noted(start, capsys):
    idle = ["--momentum", 0.8, "--interpolation", "bicubic", "--shuffle-window", 64, "--sync-bn"]
    assert start(*DIGITS, "--plan", "--opt", "adam", *idle) == 0
    noted = [line for line in capsys.readouterr().out.splitlines() if " does nothing without " in line]
    assert {line.split()[1] for line in noted} == {flag for flag in idle if str(flag).startswith("--")}
    busy = ["--opt", "sgd", "--crop-padding", 0, "--scale", 0.5, 1, "--data-mode", "stream"]
    assert start(*DIGITS, "--plan", *idle[:-1], *busy) == 0
    assert " does nothing without " not in capsys.readouterr().out


def test_val_fraction_0_trains_on_everything_and_best_is_last(start, tmp_path):
    assert start(*DIGITS, "--epochs", 1, "--val-fraction", 0, "--run-dir", tmp_path) == 0
    assert not any("val/top1" in record for record in records(tmp_path))
    assert json.loads((tmp_path / "plan.json").read_text())["num_val"] == 0
    links = {os.readlink(tmp_path / "checkpoints" / which) for which in ("best", "last")}
    assert len(links) == 1


def test_early_stopping_ends_the_run(start, tmp_path):
    settings = ["--epochs", 30, "--patience", 2, "--min-delta", 0.9, "--run-dir", tmp_path]
    assert start(*DIGITS, *settings) == 0
    assert records(tmp_path)[-1]["epoch"] == 3


@pytest.mark.parametrize("every", [1, 7])
def test_a_diverging_run_stops_with_status_1_and_keeps_only_good_checkpoints(start, tmp_path, capsys, every):
    settings = ["--opt", "momentum", "--lr", "1e30", "--warmup-epochs", 1, "--warmup-lr", 0, "--run-dir", tmp_path]
    assert start(*DIGITS, *settings, "--epochs", 3, "--checkpoint-every", every) == 1
    assert "go on with --on-nan skip, or start anew with a lower --lr" in capsys.readouterr().err
    for file in (tmp_path / "checkpoints").rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--model", "resnet19_cifar"], "resnet19_cifar"),
        (["--dataset", "cifar11"], "cifar11"),
        (["--dataset", "/no/such/folder"], "/no/such/folder"),
        (["--batch-size", "1000000"], "--batch-size 1000000"),
        (["--warmup-epochs", "99"], "--warmup-epochs 99"),
        (["--micro-batch-size", "48"], "--micro-batch-size 48"),
        (["--opt", "adamx"], "--opt adamx"),
        (["--init-weights", "/no/such.safetensors"], "/no/such.safetensors"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--run-dir", ROOT], "--run-dir"),
        (["--wandb", "online"], "--wandb online"),
        (["--resume", "auto"], "--resume auto needs --run-dir"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_makes_no_folder(start, tmp_path, monkeypatch, capsys, flags, said):
    if flags[0] == "--precision" and torch.accelerator.is_available():
        pytest.skip("fp16 works on this machine's accelerator")
    monkeypatch.chdir(tmp_path)
    assert start(*DIGITS, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train.py: error: ")
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda root: shutil.rmtree(root / "test"), "no test split"),
        (lambda root: [shutil.rmtree(root / split / "dog") for split in ("train", "test")], "only one class"),
        (
            lambda root: (root / "train" / "cat" / "1.png").write_bytes(b"\x89PNG broken"),
            "cat/1.png) cannot be decoded",
        ),
        (
            lambda root: [shutil.rmtree(root / "test"), (root / "train-0.parquet").write_bytes(b"PAR1 cut")],
            "no test split",
        ),
        (
            lambda root: [(root / f"{s}-0.parquet").write_bytes(b"PAR1 cut") for s in ("train", "test")],
            "train-0.parquet is truncated",
        ),
    ],
    ids=["no test split", "one class", "corrupt image", "lone parquet", "truncated parquet"],
)
def test_bad_data_is_one_line_and_status_2(start, tmp_path, monkeypatch, capsys, spoil, said):
    root = tmp_path / "pets"
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (number * 80, 0, 0)).save(root / name / f"{number}.png")
    spoil(root)
    monkeypatch.chdir(tmp_path)
    assert start("--dataset", root, "--model", "cnn4", "--batch-size", 2, "--val-fraction", 0) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]


def launch(*command):
    """Start a launcher as a user would, on two cores at most."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_accelerate_launch_with_our_config(tmp_path):
    found = launch(
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "train.py",
        *DIGITS, "--max-steps", 3, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert records(tmp_path / "run")[-1]["step"] == 3


def test_real_cifar10_and_real_weights(start, tmp_path, real_cifar10, real_weights):
    settings = [
        "--dataset",
        real_cifar10,
        "--wandb",
        "disabled",
        "--batch-size",
        32,
        "--max-steps",
        4,
        "--log-every",
        1,
    ]
    model = [
        "--model",
        "tf_efficientnet_lite0",
        "--init-weights",
        real_weights,
        "--img-size",
        64,
        "--val-fraction",
        0.01,
    ]
    assert start(*settings, *model, "--run-dir", tmp_path / "run", "--lr", "1e-3") == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["num_train"], plan["num_val"], plan["num_test"]) == (49_500, 500, 10_000)
