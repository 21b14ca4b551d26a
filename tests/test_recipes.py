"""Every recipe is what its study says, typed here by hand from the studies' tables, and can be planned."""

import itertools
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import yaml

from cifar_dist.command_line import load_config, parse_command_line
from cifar_dist.config import Config
from cifar_dist.models import build_model, count_parameters, input_config
from cifar_dist.optim import state_per_parameter
from cifar_dist.plan import Sizes, make_plan
from cifar_dist.schedule import schedule_without_model
from cifar_dist.study.file import load_study
from tests.conftest import ROOT

RECIPES = ROOT / "recipes"
FILES = {str(path.relative_to(RECIPES)): path for path in sorted(RECIPES.rglob("*.yaml"))}
KEYS = {name: set(yaml.safe_load(path.read_text())) for name, path in FILES.items()}
STUDIES = [name for name in FILES if "recipes" in KEYS[name]]
SWEEPS = [name for name in FILES if "program" in KEYS[name]]
ALONE = [name for name in FILES if name not in (*STUDIES, *SWEEPS)]

A = {
    "dataset": "cifar10", "pretrained": True, "img_size": 224, "interpolation": "bilinear", "crop_padding": 4,
    "hflip": 0.5, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010), "opt": "adamw",
    "weight_decay": 0.01, "sched": "cosine", "sched_on_updates": False, "warmup_epochs": 0, "min_lr": 0,
    "precision": "fp16", "batch_size": 128, "select_on": "test", "smoothing": 0, "aa": None, "cutout": 0, "mixup": 0,
}  # fmt: skip
B = {
    "dataset": "cifar100", "pretrained": True, "img_size": 32, "opt": "adamw", "sched": "cosine", "warmup_epochs": 5,
    "lr": 5e-4, "weight_decay": 1e-2, "batch_size": 256, "epochs": 25, "seed": 3407, "select_on": "test",
}  # fmt: skip
C = {
    "dataset": "cifar10", "pretrained": False, "init_weights": None, "img_size": 224, "crop_padding": 0, "hflip": 0.5,
    "opt": "adam", "weight_decay": 0, "batch_size": 64, "select_on": "test", "smoothing": 0, "aa": None, "cutout": 0,
}  # fmt: skip
D = {
    "dataset": "cifar10", "pretrained": False, "val_fraction": 0.1, "split_seed": 42, "select_on": "val",
    "crop_padding": 4, "hflip": 0.5, "cutout": 12, "mixup": 0, "cutmix": 0, "aa": None, "smoothing": 0.1,
    "opt": "momentum", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "sched": "cosine", "sched_on_updates": False,
    "min_lr": 0, "warmup_epochs": 0, "batch_size": 256, "epochs": 100, "patience": 15, "min_delta": 0.001,
}  # fmt: skip
E = {
    "dataset": "cifar10", "model": "cnn4", "hflip": 0.5, "crop_padding": 4, "opt": "adam", "weight_decay": 0,
    "smoothing": 0.1, "sched": "step", "sched_on_updates": False, "decay_epochs": 10, "decay_rate": 0.5, "epochs": 50,
    "select_on": "val",
}  # fmt: skip
VIT, SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"
NFNET, VIT8 = "dm_nfnet_f0.dm_in1k", "vit_base_patch8_224.augreg_in21k_ft_in1k"
DROPS_ONCE = {"sched": "step", "sched_on_updates": False, "decay_rate": 0.1, "lr": 1e-3, "epochs": 25}
SAID = {
    "study_a/vit_lr5e-5.yaml": A | {"model": VIT, "lr": 5e-5, "epochs": 10},
    "study_a/vit_lr7e-4.yaml": A | {"model": VIT, "lr": 7e-4, "epochs": 200},
    "study_a/swin_lr5e-5.yaml": A | {"model": SWIN, "lr": 5e-5, "epochs": 10},
    "study_a/swin_lr7e-4.yaml": A | {"model": SWIN, "lr": 7e-4, "epochs": 200},
    "study_b/nfnet_adamw.yaml": B | {"model": NFNET},
    "study_b/vit_adamw.yaml": B | {"model": VIT8},
    "study_b/nfnet_sgd.yaml": B | {"model": NFNET, "opt": "momentum"},
    "study_b/nfnet_linear.yaml": B | {"model": NFNET, "sched": "linear", "warmup_epochs": 0},
    "study_c/vit.yaml": C | {"model": VIT, "lr": 1e-4, "epochs": 45},
    "study_c/resnet18.yaml": C | {"model": "resnet18"} | DROPS_ONCE,
    "study_c/resnet18_no_preprocessing.yaml": (
        C | {"model": "resnet18", "img_size": 32, "hflip": 0, "mean": (0, 0, 0), "std": (1, 1, 1)} | DROPS_ONCE
    ),
    "study_d/resnet18.yaml": D | {"model": "resnet18_cifar"},
    "study_d/resnet34.yaml": D | {"model": "resnet34_cifar"},
    "study_d/resnet50.yaml": D | {"model": "resnet50_cifar"},
    "study_d/wrn28_10.yaml": D | {"model": "wrn28_10", "drop": 0.3, "weight_decay": 5e-4},
    "study_d/dla34.yaml": D | {"model": "dla34_cifar"},
    "study_d/vit.yaml": D | {"model": "vit_small_cifar"},
    "cnn4.yaml": E,
}
RUNS = {
    "study_a/study.yaml": 4, "study_b/study.yaml": 4, "study_c/study.yaml": 3, "study_d/study.yaml": 6,
    "study_d/grid.yaml": 9, "study_e/study.yaml": 3, "best/study_a.yaml": 4, "best/study_b.yaml": 2,
    "best/study_cd.yaml": 3, "best/study_e.yaml": 6, "best/fine_tuning.yaml": 8, "best/vit_patches.yaml": 3,
}  # fmt: skip


@cache
def on_no_device(model, num_classes):
    """The model without memory for its weights; that it takes images of the recipe's size is checked by that too."""
    with torch.device("meta"):
        return build_model(replace(model, pretrained=False, init_weights=None), num_classes)


def plan_of(config):
    data, classes = config.data, {"cifar10": 10, "cifar100": 100, "digits": 10}[config.data.dataset]
    num_val = 10_000 if data.select_on == "test" else round(50_000 * data.val_fraction)
    num_train = 50_000 if data.select_on == "test" else 50_000 - num_val
    parameters = count_parameters(on_no_device(config.model, classes))
    sizes = Sizes(num_train, num_val, 10_000, classes, 50_000 * 3072, *parameters, state_per_parameter(config.optim))
    return make_plan(config, sizes, num_processes=1)


@pytest.mark.parametrize("name", SAID)
def test_a_recipe_has_its_studys_settings(name):
    flat = load_config(FILES[name]).flat()
    assert {key: flat[key] for key in SAID[name]} == SAID[name]


def test_every_recipe_of_a_study_is_in_the_table():
    assert {name for name in ALONE if name.startswith("study_")} == set(SAID) - {"cnn4.yaml"}


@pytest.mark.parametrize("name", ALONE)
def test_a_recipe_can_be_planned(name):
    config = load_config(FILES[name])
    plan = plan_of(config)
    assert plan.total_steps == config.run.epochs * math.ceil(plan.num_train / config.run.batch_size)
    assert set(KEYS[name]) <= set(Config().flat())


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_how_to_run_it_and_what_came_of_it(name):
    text = FILES[name].read_text()
    assert re.search(rf"^# command .*\brecipes/{name}\b", text, re.MULTILINE) or name == "demo.yaml"
    if name in ALONE:
        head = {line[2:11].strip() for line in text.splitlines() if line.startswith("#")}
        assert "measured" in head
        assert not name.startswith("study_") or "source" in head
        assert not name.startswith("best/") or {"expected", "reasons"} <= head


def test_the_models_of_study_a_are_the_studys():
    for name, millions in (("vit_lr5e-5", 85.81), ("swin_lr5e-5", 86.75)):
        plan = plan_of(load_config(FILES[f"study_a/{name}.yaml"]))
        assert round(plan.num_parameters / 1e6, 2) == millions


def test_cifar_native_models_of_study_d_are_normalised_with_cifars_mean():
    for name in SAID:
        if name.startswith("study_d/"):
            config = load_config(FILES[name])
            found = input_config(on_no_device(config.model, 10), config.model)
            assert (found.mean, found.std) == (A["mean"], A["std"])
            assert found.img_size == 32


def test_study_es_images_are_normalised_by_one_half():
    config = load_config(FILES["cnn4.yaml"])
    found = input_config(on_no_device(config.model, 10), config.model)
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_study_ds_learning_rate_after_100_epochs():
    """2.47e-5 is the closed form's 100th epoch when the cosine steps once an epoch; every step, it would be near 0."""
    config = load_config(FILES["study_d/resnet18.yaml"])
    plan = plan_of(config)
    assert plan.lr_last == pytest.approx(0.1 * (1 + math.cos(math.pi * 99 / 100)) / 2)
    assert f"{plan.lr_last:.2e}" == "2.47e-05"
    schedule = schedule_without_model(config.optim, 100, plan.steps_per_epoch)
    rates = {schedule.apply(step) for step in range(plan.total_steps)}
    assert len(rates) == 100


def test_study_b_warms_up_for_five_epochs_and_then_follows_a_cosine():
    config = load_config(FILES["study_b/nfnet_adamw.yaml"])
    plan = plan_of(config)
    schedule = schedule_without_model(config.optim, 25, plan.steps_per_epoch)
    rates = [schedule.apply(step) for step in range(plan.total_steps)]
    peak = rates.index(max(rates))
    assert peak == plan.warmup_steps == 5 * 196
    assert rates[:peak] == pytest.approx([1e-6 + (5e-4 - 1e-6) * step / peak for step in range(peak)])
    left = len(rates) - peak
    assert rates[peak:] == pytest.approx([5e-4 * (1 + math.cos(math.pi * step / left)) / 2 for step in range(left)])


def test_studys_c_learning_rate_drops_once():
    config = load_config(FILES["study_c/resnet18.yaml"])
    schedule = schedule_without_model(config.optim, 25, 782)
    assert [schedule.apply(782 * epoch) for epoch in range(25)] == pytest.approx([1e-3] * 15 + [1e-4] * 10)


def runs_of(name):
    """Settings of each run of a study, without its folder."""
    return [_comparable(run.config) for run in load_study(FILES[name]).runs]


def _comparable(config):
    return replace(config, run=replace(config.run, run_dir=None, resume="never"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_its_runs(name):
    assert len(runs_of(name)) == len(set(runs_of(name))) == RUNS[name]


def test_study_ds_grid_is_of_epochs_and_batch_sizes_alone():
    base = _comparable(load_config(FILES["study_d/dla34.yaml"]))
    expected = [
        replace(base, run=replace(base.run, epochs=epochs, batch_size=batch))
        for epochs, batch in itertools.product((20, 50, 100), (64, 128, 256))
    ]
    assert runs_of("study_d/grid.yaml") == expected


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_its_studys_grid(name, monkeypatch):
    """W&B passes a grid's values as ``--name=value``, in the folder in which the agent was started."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(FILES[name].read_text())
    assert (sweep["program"], sweep["method"]) == ("train.py", "grid")
    axes = {key: values["values"] for key, values in sweep["parameters"].items()}
    cells = [
        [f"--{key}={value}" for key, value in zip(axes, cell, strict=True)]
        for cell in itertools.product(*axes.values())
    ]
    study = name.replace("grid_sweep", "grid").replace("_sweep", "").replace("sweep", "study")
    assert {parse_command_line(cell).config for cell in cells} == set(runs_of(study))
    assert len(cells) == RUNS[study]


def test_every_study_has_a_sweep():
    assert len(SWEEPS) == len(STUDIES) == len(RUNS)


def test_the_table_of_recipes_names_every_file():
    text = (RECIPES / "README.md").read_text()
    assert [name for name in ALONE + STUDIES if f"({name})" not in text] == []
