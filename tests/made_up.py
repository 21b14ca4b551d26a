"""Run folders whose every number is known, and predictions to go with them."""

import dataclasses
import json

import numpy as np

from cifar_dist.config import Config
from cifar_dist.report.evidence import Evidence, choose
from cifar_dist.report.predictions import About, Scored, save_predictions

NAMES = ("cat", "dog", "a|b", "ship", "truck", "frog")
PLAN = {
    "steps_per_epoch": 10, "schedule_steps": 20, "lr_first": 1e-4, "micro_batch_size": 64, "num_parameters": 9,
    "num_trainable": 8,
}  # fmt: skip
ENVIRONMENT = {
    "command": "python train.py --model cnn4", "num_processes": 1, "versions": {"torch": "2.0"},
    "device": "cpu", "processor": "a processor", "cpu_threads": 2, "data_fingerprint": "aa", "class_names": NAMES,
}  # fmt: skip
COST = {
    "parameters": 2_000_000, "trained_parameters": 1_000_000, "img_size": 32,
    "flops": {"forward": 4_000_000_000, "attention": 1_000_000_000},
    "inference": {
        "latency_median_seconds": 0.002, "latency_p95_seconds": 0.004, "images_per_second": 1234.0, "batch_size": 64,
        "peak_memory_bytes": 300 * 2**20, "energy_joules_per_image": None, "runs": 50,
        "device": "a processor (2 threads)", "precision": "fp32",
    },
    "peak": {"flops_per_second": 1e12, "source": "measured"},
}  # fmt: skip


def training(step, **values):
    return {"step": step, "epoch": step / 10, "train/loss": 3 / step, "train/top1": step / 50, "lr": 1e-3, **values}


LOG = [
    training(5), training(10, seconds=61.0), {"step": 10, "epoch": 1.0, "val/loss": 0.5, "val/top1": 0.25},
    training(20, seconds=122.0, images_per_second=20.0, peak_memory_bytes=5 * 2**20),
    {"step": 20, "epoch": 2.0, "val/loss": 0.4, "val/top1": 0.5},
]  # fmt: skip


def make_run(folder, *, log=LOG, environment=ENVIRONMENT, plan=PLAN, **settings):
    """A run folder without checkpoints."""
    folder.mkdir()
    config = Config.from_flat({"model": "cnn4", "dataset": "pets", "wandb": "disabled", **settings})
    (folder / "config.yaml").write_text(config.as_recipe())
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def make_scored(seed=0, sharpness=1.2, **about):
    """300 predictions of six classes, about half of them right; the labels do not depend on the seed."""
    labels = np.random.default_rng(0).integers(0, 6, 300)
    logits = np.random.default_rng(seed + 1).normal(size=(300, 6))
    logits[np.arange(300), labels] += sharpness
    facts = {"dataset": "pets", "split": "test", "fingerprint": "aa", "checkpoint": "best", "step": 20, "digest": "dd"}
    return Scored(np.arange(300), labels, logits.astype(np.float32), NAMES, About(**facts | about))


def save_report(run, scored=None, folder="report", cost=COST, maps=True):
    """What scoring leaves in a report's folder."""
    scored, folder = scored or make_scored(), run / folder
    save_predictions(folder, scored)
    chosen, random = choose(scored), np.random.default_rng(0)
    ids, explained = scored.ids[chosen.shown], scored.ids[chosen.explained]
    images = random.integers(0, 256, (len(ids), 8, 8, 3), dtype=np.uint8)
    found = {"grad_cam": random.integers(0, 256, (len(explained), 16, 16), dtype=np.uint8)} if maps else {}
    Evidence(ids, images, explained, found, "blocks.3", {} if maps else {"grad_cam": "it has no map."}).save(folder)
    (folder / "cost.json").write_text(json.dumps(cost or {}))
    return folder


def with_class_names(scored, names):
    return dataclasses.replace(scored, class_names=tuple(names))
