"""A linear probe on features that are computed once, against the same run on images, and against plain timm."""

import dataclasses
import json
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train
from cifar_dist.command_line import parse_command_line
from cifar_dist.config import NO_AUGMENTATION, AugmentConfig, ModelConfig
from cifar_dist.data import load_training_data
from cifar_dist.data.resident import ResidentSet
from cifar_dist.distributed.ending import run_main
from cifar_dist.models import build_model, head_parameter_names
from cifar_dist.training import features, setup
from cifar_dist.training.features import Backbone, Features, changes, decide
from tests.ranks import Ranks

FROZEN = ["--dataset", "digits", "--wandb", "disabled", "--freeze", "backbone", "--crop-padding", 0, "--hflip", 0]
PROBE = [*FROZEN, "--epochs", 2, "--batch-size", 128, "--log-every", 1, "--smoothing", 0.1, "--lr", 3e-2]
MODELS = {
    "test_efficientnet": ["--img-size", 32, "--clip-grad", 1, "--lr", 0.2],
    "test_vit": ["--img-size", 32, "--micro-batch-size", 64, "--model-ema-decay", 0.9],
    "test_convnext": ["--img-size", 32, "--precision", "bf16", "--channels-last"],
}
ONCE = "features    1,438 x "


def run(*argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.argv = ["train.py", *map(str, argv)]
    try:
        run_main(train.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def start(monkeypatch):
    """Run train.py's main in this process with a command line, on features or (slow) on images; its exit status."""
    monkeypatch.setattr(sys, "argv", [])

    def start(*argv, slow=False):
        with monkeypatch.context() as patch:
            if slow:
                patch.setattr(setup, "decide", lambda *_: Features())
            return run(*argv)

    return start


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def numbers(run_dir):
    """Losses and scores of a run, in the order of its records."""
    names = ("train/loss", "train/top1", "val/loss", "val/top1")
    return [(record["step"], name, record[name]) for record in records(run_dir) for name in names if name in record]


def tensors(run_dir):
    last = run_dir / "checkpoints" / "last"
    return {f"{file.stem}.{k}": v for file in sorted(last.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_close(one, other, tolerance):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)
    assert [entry[:2] for entry in numbers(one)] == [entry[:2] for entry in numbers(other)]
    found = [np.array([entry[2] for entry in numbers(path)]) for path in (one, other)]
    np.testing.assert_allclose(*found, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_on_features_equals_the_one_on_images(start, tmp_path, capsys, model):
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    settings = [*PROBE, "--model", model, *MODELS[model]]
    assert start(*settings, "--run-dir", fast) == 0
    assert ONCE in capsys.readouterr().out
    assert start(*settings, "--run-dir", slow, slow=True) == 0
    assert "features " not in capsys.readouterr().out
    losses = [value for _, name, value in numbers(fast) if name == "train/loss"]
    assert min(losses) < losses[0] - 0.05
    assert_close(fast, slow, 0)


def test_a_run_cut_on_images_goes_on_on_features_and_ends_as_the_whole_one(start, tmp_path, capsys):
    settings = [*PROBE, "--model", "test_vit", *MODELS["test_vit"], "--checkpoint-every", 5]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(*settings, "--run-dir", whole) == 0
    capsys.readouterr()
    assert start(*settings, "--run-dir", cut, "--max-steps", 5) == 0
    assert "features    computed in every epoch: the run is shorter than an epoch" in capsys.readouterr().out
    for last in (16, 22):
        torch.manual_seed(5)
        assert start(*settings, "--run-dir", cut, "--max-steps", last, "--resume", "auto") == 0
        assert ONCE in capsys.readouterr().out
    one, other = tensors(whole), tensors(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[entry for entry in numbers(path) if "train" in entry[1]] for path in (whole, cut)]
    assert losses[0] == losses[1]


def test_a_finished_run_computes_nothing(start, tmp_path, monkeypatch):
    settings = [*PROBE, "--model", "test_convnext", "--img-size", 32, "--epochs", 1, "--run-dir", tmp_path]
    assert start(*settings) == 0
    monkeypatch.setattr(features, "_compute", None)
    assert start(*settings, "--resume", "auto") == 0


def test_asked_to_stop_meanwhile_it_leaves_with_a_checkpoint_and_goes_on_alike(start, tmp_path, monkeypatch, capsys):
    settings = [*PROBE, "--model", "test_convnext", "--img-size", 32, "--epochs", 1]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    compute = features._compute

    def terminated(split, evaluator, model, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return compute(split, evaluator, model, stop)

    assert start(*settings, "--run-dir", whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(features, "_compute", terminated)
        start(*settings, "--run-dir", cut)
    assert "features    not computed: the run was asked to stop" in capsys.readouterr().out
    assert json.loads((cut / "checkpoints" / "last" / "state.json").read_text())["state"]["step"] == 1
    assert start(*settings, "--run-dir", cut, "--resume", "auto") == 0
    one, other = tensors(whole), tensors(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_equal_one(start, tmp_path):
    settings = [*PROBE, "--model", "test_vit", *MODELS["test_vit"]]
    assert start(*settings, "--run-dir", tmp_path / "one") == 0
    ranks = Ranks(lambda: run(*settings, "--run-dir", tmp_path / "two"), 2).check()
    assert ranks.results == [0, 0]
    assert ONCE in ranks.said[0]
    names = {name for name in tensors(tmp_path / "two") if not name.startswith("process-")}
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6)
    found = [np.array([entry[2] for entry in numbers(tmp_path / which)]) for which in ("one", "two")]
    np.testing.assert_allclose(*found, rtol=1e-6, atol=1e-6)


def test_plain_timm_scores_the_checkpoint_as_the_run_did(start, tmp_path):
    flags = [*PROBE, "--model", "test_efficientnet", *MODELS["test_efficientnet"]]
    assert start(*flags, "--run-dir", tmp_path) == 0
    data = load_training_data(parse_command_line([*map(str, flags)]).config.data, 2**30)
    plain = timm.create_model("test_efficientnet", num_classes=10)
    plain.load_state_dict(load_file(tmp_path / "checkpoints" / "last" / "model.safetensors"))
    mean, std = (torch.tensor(plain.pretrained_cfg[name]) for name in ("mean", "std"))
    with torch.no_grad():
        logits = plain.eval()(((data.val.images / 255 - mean) / std).permute(0, 3, 1, 2))
    loss = torch.nn.functional.cross_entropy(logits, data.val.labels).item()
    told = {name: value for _, name, value in numbers(tmp_path)}
    assert told["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert told["val/top1"] == (logits.argmax(1) == data.val.labels).double().mean().item()


def decided(monkeypatch, *flags, streamed=False, device_bytes=2**30, engine="single"):
    config = parse_command_line([str(word) for word in (*PROBE, *flags)]).config
    model = build_model(config.model, 10)
    rows = torch.zeros(1000, 8, 8, 3, dtype=torch.uint8), torch.zeros(1000, dtype=torch.int64), torch.arange(1000)
    part = range(1000) if streamed else ResidentSet(*rows)
    monkeypatch.setattr(features, "engine_name", lambda _: engine)
    monkeypatch.setattr(features, "device_bytes", lambda _: device_bytes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = decide(config, SimpleNamespace(train=part, val=None), model, SimpleNamespace(num_processes=1))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return found


SMALL = ["--model", "test_vit", "--img-size", 32]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([*SMALL, "--crop-padding", 2, "--hflip", 0.5], "--crop-padding, --hflip change the images"),
        ([*SMALL, "--mixup", 0.2], "--mixup change"),
        ([*SMALL, "--aa", "trivial"], "--aa change"),
        ([*SMALL, "--compile"], "--compile"),
        ([*SMALL, "--drop-path", 0.1], "draws random numbers"),
        ([*SMALL, "--drop", 0.1], "draws random numbers"),
        (["--model", "test_efficientnet", "--img-size", 32, "--drop", 0.1], "draws random numbers"),
        (["--model", "cnn4"], "draws random numbers"),
        (["--model", "deit_tiny_distilled_patch16_224", "--img-size", 32], "several classifiers"),
        (["--model", "volo_d1_224", "--img-size", 32], "not the classifier's result alone"),
        ([*SMALL, "--max-steps", 3], "shorter than an epoch"),
    ],
)
def test_it_refuses_what_would_not_be_exact(flags, reason, monkeypatch):
    found = decided(monkeypatch, *flags)
    assert reason in found.refusal
    assert not found.kept
    assert found.nbytes == 0
    assert found.lines() == [f"features    computed in every epoch: {found.refusal}"]


def test_it_refuses_streams_other_engines_and_what_is_too_large(monkeypatch):
    assert decided(monkeypatch, *SMALL, streamed=True).refusal == "the images are streamed"
    assert "zero1" in decided(monkeypatch, *SMALL, engine="zero1").refusal
    size = 4 * 1000 * 64
    assert decided(monkeypatch, *SMALL, device_bytes=4 * size).nbytes == size
    assert "more than a quarter" in decided(monkeypatch, *SMALL, device_bytes=4 * size - 1).refusal


def test_processes_decide_alike_although_one_has_less_room(tmp_path):
    flags = ["--dataset", "digits", *SMALL, "--freeze", "backbone", "--crop-padding", 0, "--hflip", 0, "--epochs", 2]

    def work():
        if os.environ["RANK"] == "1":
            features.device_bytes = lambda _: 1000
        return run(*flags, "--batch-size", 240, "--wandb", "disabled", "--run-dir", tmp_path / "run")

    found = Ranks(work, 2).check()
    assert "are more than a quarter of the device's 0" in found.said[0]


def test_it_refuses_a_backbone_whose_statistics_move(monkeypatch):
    monkeypatch.setattr("cifar_dist.models.freeze_backbone", lambda model: model.requires_grad_(False))
    found = decided(monkeypatch, "--model", "test_efficientnet", "--img-size", 32)
    assert "otherwise in training than in evaluation" in found.refusal


def test_nothing_is_said_where_nothing_is_frozen(monkeypatch):
    found = decided(monkeypatch, *SMALL, "--freeze", "none")
    assert (found.lines(), found.kept, found.nbytes) == ([], False, 0)


def test_every_augmentation_is_known_to_the_decision():
    modifiers = {"crop_mode", "flip_mode", "remode", "mixup_prob", "mixup_switch_prob"}
    of_the_loss = {"smoothing"}
    assert {field.name for field in dataclasses.fields(AugmentConfig)} == set(
        features.CHANGING
    ) | modifiers | of_the_loss
    assert changes(dataclasses.replace(NO_AUGMENTATION, smoothing=0.1)) == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_efficientnet", (256,)),
        ("test_vit", (64,)),
        ("test_mambaout", (256,)),
        ("test_nfnet", (192,)),
        ("test_coatnet", (128,)),
        ("dla46_c", (256, 1, 1)),  # a convolution as classifier; pre_logits are flat
        ("resnet18_cifar", (512,)),
    ],
)
def test_features_are_what_timm_gives_without_a_classifier(name, shape):
    size = 224 if name == "test_coatnet" else 64
    model = build_model(ModelConfig(model=name, img_size=size, freeze="backbone"), 10)
    images = torch.rand(2, 3, size, size)
    assert features._try(model, images) == (shape, "")
    model.eval()
    head = set(head_parameter_names(model))
    with torch.no_grad():
        found, logits = Backbone(model)(images), model(images)
        torch.testing.assert_close(model.get_classifier()(found).flatten(1), logits, rtol=0, atol=0)
        model.reset_classifier(0)
        assert head.isdisjoint(dict(model.named_parameters()))
        torch.testing.assert_close(found.flatten(1), model(images), rtol=0, atol=0)


def test_what_lies_between_pre_logits_and_the_classifier_is_the_backbones():
    """EfficientViT's head is a batch norm, which is frozen, and a linear layer, which timm calls the classifier."""
    model = build_model(ModelConfig(model="efficientvit_m0", img_size=224, freeze="backbone"), 10)
    model.head.bn.running_mean += 1
    images = torch.rand(2, 3, 224, 224)
    assert features._try(model, images) == ((192,), "")
    model.eval()
    with torch.no_grad():
        pre_logits = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(Backbone(model)(images), model.head.bn(pre_logits))
