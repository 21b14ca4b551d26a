"""Reports of made-up runs, whose every number is known, and of a real model scored by evaluate.py."""

import csv
import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import confusion_matrix, f1_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score

from cifar_dist import checkpoint_store
from cifar_dist.config import Config
from cifar_dist.data import load_test_data
from cifar_dist.errors import UsageError
from cifar_dist.models import build_model
from cifar_dist.predictions import Scored, load_predictions, save_predictions
from cifar_dist.report import write_report
from cifar_dist.run_record import open_run
from tests.conftest import ROOT

NAMES = ("cat", "dog", "a|b", "ship", "truck", "frog")
PLAN = {
    "steps_per_epoch": 10, "schedule_steps": 40, "lr_first": 1e-4, "micro_batch_size": 64, "num_parameters": 9,
    "num_trainable": 8,
}  # fmt: skip
ENVIRONMENT = {
    "command": "python train.py --model cnn4", "num_processes": 1, "versions": {"torch": "2.0"},
    "data_fingerprint": "aa", "class_names": NAMES,
}  # fmt: skip


def training(step, **values):
    return {"step": step, "epoch": step / 10, "train/loss": 3 / step, "train/top1": step / 50, "lr": 1e-3, **values}


LOG = [
    training(5), training(10, seconds=61.0), {"step": 10, "epoch": 1.0, "val/loss": 0.5, "val/top1": 0.25},
    training(20, seconds=122.0), {"step": 20, "epoch": 2.0, "val/loss": 0.4, "val/top1": 0.5},
]  # fmt: skip


def make_run(folder, *, log=LOG, environment=ENVIRONMENT, **settings):
    """A run folder without checkpoints."""
    folder.mkdir()
    config = Config.from_flat({"model": "cnn4", "wandb": "disabled", **settings})
    (folder / "config.yaml").write_text(config.as_recipe())
    (folder / "plan.json").write_text(json.dumps(PLAN))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def make_scored(**changes):
    """300 predictions of six classes, about half of them right."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 300)
    logits = random.normal(size=(300, 6))
    logits[np.arange(300), labels] += 1.2
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    return dataclasses.replace(
        Scored(np.arange(300), labels, probabilities, NAMES, "pets", "aa", "best", 20), **changes
    )


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run")
    save_predictions(folder, make_scored())
    return folder


def test_metrics_agree_with_scikit_learn(run):
    write_report(run)
    found, scored = json.loads((run / "report" / "metrics.json").read_text()), make_scored()
    labels, predicted = scored.labels, scored.probabilities.argmax(1)
    for k in (1, 3, 5):
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, scored.probabilities, k=k))
    assert found["error_rate"] == pytest.approx((predicted != labels).mean())
    exact = scored.probabilities.astype(np.float64)
    assert found["loss"] == pytest.approx(log_loss(labels, exact / exact.sum(1, keepdims=True)))
    expected = np.transpose(precision_recall_fscore_support(labels, predicted))
    rows = [[c["precision"], c["recall"], c["f1"], c["support"]] for c in found["classes"]]
    np.testing.assert_allclose(rows, expected)
    assert [c["name"] for c in found["classes"]] == list(NAMES)
    assert found["weighted_avg"]["f1"] == pytest.approx(f1_score(labels, predicted, average="weighted"))
    assert found["num_samples"] == 300
    assert found["dataset"] == {"name": "pets", "split": "test", "fingerprint": "aa"}
    assert (found["checkpoint"], found["selected_on"]) == ({"which": "best", "step": 20}, "val")
    assert found["warnings"] == []


def test_predictions_are_a_plain_table(run):
    table, scored = pq.read_table(run / "report" / "predictions.parquet").to_pandas(), make_scored()
    assert list(table) == ["id", "label", "prediction", "probabilities"]
    assert table["id"].dtype == np.int64
    np.testing.assert_array_equal(np.stack(table["probabilities"]), scored.probabilities)
    np.testing.assert_array_equal(table["prediction"], scored.probabilities.argmax(1))
    back = load_predictions(run)
    for field in dataclasses.fields(Scored):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(scored, field.name))


def test_confusion_matrix_file(run):
    write_report(run)
    with (run / "report" / "confusion_matrix.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    scored = make_scored()
    assert header[1:] == [row[0] for row in rows] == list(NAMES)
    counts = np.array([row[1:] for row in rows], dtype=int)
    np.testing.assert_array_equal(counts, confusion_matrix(scored.labels, scored.probabilities.argmax(1)))


def test_the_page_leads_with_the_result_and_its_pictures_exist(run):
    metrics = write_report(run).metrics
    page = (run / "report" / "report.md").read_text()
    assert page.splitlines()[2].startswith(f"**Test accuracy {metrics['top1']:.2%}**")
    for picture in ("loss.png", "accuracy.png", "lr.png", "confusion_matrix.png"):
        assert f"]({picture})" in page
        with Image.open(run / "report" / picture) as image:
            image.verify()
    assert "| val | 50.00% | 0.4000 |" in page
    assert "| train | 40.00% | 0.1500 |" in page
    assert "| a\\|b |" in page
    assert "| training time | 0:02:02 |" in page
    assert f"train.py --config {run / 'config.yaml'} --run-dir {run}-again" in page


def test_a_report_is_made_again_without_the_model(run):
    first = write_report(run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    for path in (run / "report").iterdir():
        if path.name != "predictions.parquet":
            path.unlink()
    assert write_report(run) == first
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "checkpoint", "log", "expected"),
    [
        ({"select_on": "test"}, "best", LOG, "test"),
        ({"select_on": "test"}, "last", LOG, "test"),  # whoever watched the run has looked at it too
        ({}, "last", LOG, "none"),
        ({"val_fraction": 0}, "best", LOG[:2], "none"),
    ],
)
def test_selection_is_labelled(tmp_path, settings, checkpoint, log, expected):
    folder = make_run(tmp_path / "run", log=log, **settings)
    save_predictions(folder, make_scored(checkpoint=checkpoint))
    metrics = write_report(folder).metrics
    page = (folder / "report" / "report.md").read_text()
    assert metrics["selected_on"] == expected
    assert ("**The run was watched, and its best checkpoint picked, on the test split" in page) == (expected == "test")
    assert bool(metrics["warnings"]) == (expected == "test")


def test_changed_data_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    save_predictions(folder, make_scored(fingerprint="bb"))
    assert "fingerprint aa, now bb" in write_report(folder).metrics["warnings"][0]
    assert "**The data set has changed since training" in (folder / "report" / "report.md").read_text()


def test_a_log_of_a_killed_and_resumed_run(tmp_path):
    """A torn last line is no error; a step logged twice counts once, and steps ascend."""
    folder = make_run(tmp_path / "run", log=[*LOG, training(10, lr=5.0), training(30)])
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 40, "train/lo')
    assert open_run(folder).series("lr") == ([5, 10, 20, 30], [1e-3, 5.0, 1e-3, 1e-3])


def break_log(folder, text):
    (folder / "log.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda folder: (folder / "log.jsonl").unlink(), "log.jsonl is missing"),
        (lambda folder: break_log(folder, ""), "no training record"),
        (lambda folder: break_log(folder, "not json\n" + json.dumps(training(1)) + "\n"), "line 1 is no log record"),
        (lambda folder: break_log(folder, json.dumps(training(1)) + "\n[]\n{}\n"), "line 2 is no log record"),
        (lambda folder: (folder / "environment.json").write_text("{"), "environment.json is damaged"),
        (lambda folder: (folder / "report" / "predictions.parquet").unlink(), "predictions.parquet cannot be read"),
        (lambda folder: (folder / "report" / "predictions.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ],
)
def test_bad_run_folders_are_one_clear_line(run, damage, said):
    damage(run)
    with pytest.raises(UsageError, match=said) as error:
        write_report(run)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def script():
    """evaluate.py as a module, under a name that is not the library's."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def digits_run(tmp_path):
    """A run folder with a checkpoint of an untrained model for the embedded digits."""
    config = Config.from_flat({"model": "cnn4", "dataset": "digits", "wandb": "disabled"})
    data = load_test_data(config.data)
    facts = {"class_names": data.class_names, "data_fingerprint": data.fingerprint}
    folder = make_run(tmp_path / "run", environment=ENVIRONMENT | facts, dataset="digits")
    torch.manual_seed(0)
    commit_weights(folder, build_model(config.model, 10).state_dict(), best=True)
    return folder


def commit_weights(folder, weights, best):
    """A checkpoint of step 20 with nothing in it but weights."""
    root = folder / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    aside = checkpoint_store.begin(root, 20)
    save_file(weights, aside / "model.safetensors")
    files = checkpoint_store.settle([aside / "model.safetensors"])
    checkpoint_store.commit(root, aside, best, {"step": 20, "num_processes": 1, "files": files})


def run_script(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()


def test_scores_equal_a_plain_pytorch_loop(digits_run, script, monkeypatch, capsys):
    run_script(script, monkeypatch, digits_run)
    scored, config = load_predictions(digits_run), open_run(digits_run).config
    test = load_test_data(config.data).test
    torch.manual_seed(0)
    model = build_model(config.model, 10).eval()
    with torch.no_grad():
        expected = model((test.images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).softmax(1)
    np.testing.assert_allclose(scored.probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(scored.labels, test.labels)
    np.testing.assert_array_equal(scored.ids, np.arange(len(test)))
    top1 = (expected.argmax(1) == test.labels).float().mean()
    assert f"top-1 {top1:.2%}" in capsys.readouterr().out


def test_several_processes_score_the_same_images_and_write_once(digits_run, script, monkeypatch):
    run_script(script, monkeypatch, digits_run)
    alone = load_predictions(digits_run)
    shutil.rmtree(digits_run / "report")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, "evaluate.py", digits_run], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    together = load_predictions(digits_run)
    np.testing.assert_array_equal(together.ids, alone.ids)
    np.testing.assert_allclose(together.probabilities, alone.probabilities, atol=1e-6)
    assert json.loads((digits_run / "report" / "metrics.json").read_text())["num_samples"] == len(alone.ids)


def test_a_run_without_a_best_checkpoint_is_scored_at_its_last(digits_run, script, monkeypatch, capsys):
    torch.manual_seed(0)
    commit_weights(digits_run, build_model(open_run(digits_run).config.model, 10).state_dict(), best=False)
    run_script(script, monkeypatch, digits_run)
    assert "no best" in capsys.readouterr().out
    assert load_predictions(digits_run).checkpoint == "last"


def test_unusable_checkpoints_and_data_are_refused(digits_run, script, monkeypatch):
    facts = json.loads((digits_run / "environment.json").read_text())

    def refused(said, *arguments):
        with pytest.raises(UsageError, match=said) as error:
            run_script(script, monkeypatch, digits_run, *arguments)
        assert "\n" not in str(error.value)

    (digits_run / "environment.json").write_text(json.dumps(facts | {"class_names": ["a", "b"]}))
    refused("the run has 2 classes but digits now has 10")
    (digits_run / "environment.json").write_text(json.dumps(facts | {"class_names": [*"012345678", "ten"]}))
    refused("class 9 was 'ten' in training")
    (digits_run / "environment.json").write_text(json.dumps(facts))
    broken = build_model(Config.from_flat({"model": "cnn4"}).model, 10).state_dict()
    nans = {k: v * float("nan") if v.is_floating_point() else v for k, v in broken.items()}
    commit_weights(digits_run, nans, best=True)
    refused("diverged")
    with (digits_run / "checkpoints" / "step-00000020" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused("no sound checkpoint .*model.safetensors has")
    shutil.rmtree(digits_run / "checkpoints")
    refused("no sound checkpoint", "--checkpoint", "best")
    assert not (digits_run / "report").exists()
