"""Reports of made-up runs, whose every number is known."""

import base64
import csv
import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)
from statsmodels.stats.proportion import proportion_confint

from cifar_dist.errors import UsageError
from cifar_dist.page import plain
from cifar_dist.report import report_folder, write_report
from cifar_dist.report.evidence import choose, load_evidence
from cifar_dist.report.predictions import Scored, load_predictions, save_predictions
from cifar_dist.report.sheets import captions
from cifar_dist.report.tables import shown
from cifar_dist.run_record import open_run
from cifar_dist.statistics.label_errors import label_issues
from tests.made_up import COST, ENVIRONMENT, LOG, NAMES, PLAN, make_run, make_scored, save_report, training


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run")
    save_report(folder)
    return folder


def write(folder):
    return write_report(open_run(folder), report_folder(folder))


SHARP = make_scored(sharpness=2.0)  # three quarters right


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run's folder with its report, only to be looked at, and what `write_report` returned."""
    folder = make_run(tmp_path_factory.mktemp("written") / "run")
    save_report(folder, SHARP)
    return folder, write(folder)


def test_metrics_agree_with_scikit_learn_and_statsmodels(written):
    run, _ = written
    found, scored = json.loads((run / "report" / "metrics.json").read_text()), SHARP
    labels, predicted = scored.labels, scored.logits.argmax(1)
    exact = scored.probabilities.astype(np.float64)
    exact /= exact.sum(1, keepdims=True)
    for k in (1, 3, 5):
        assert found[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, scored.logits, k=k))
    assert found["error_rate"] == pytest.approx((predicted != labels).mean())
    assert found["loss"] == pytest.approx(log_loss(labels, exact))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    expected = np.transpose(precision_recall_fscore_support(labels, predicted))
    rows = [[c["precision"], c["recall"], c["f1"], c["support"]] for c in found["classes"]]
    np.testing.assert_allclose(rows, expected)
    assert [c["name"] for c in found["classes"]] == list(NAMES)
    assert found["weighted_avg"]["f1"] == pytest.approx(f1_score(labels, predicted, average="weighted"))
    right = int((predicted == labels).sum())
    assert found["top1_interval"] == pytest.approx(proportion_confint(right, 300, method="wilson"))
    low, high = found["macro_f1_interval"]
    macro = f1_score(labels, predicted, average="macro")
    assert low < macro < high
    shown = f"| macro F1 | {macro:.4f} | {low:.4f} to {high:.4f} |"
    assert shown in (run / "report" / "report.md").read_text()
    assert found["calibration"]["before"]["brier"] == pytest.approx(((exact - np.eye(6)[labels]) ** 2).sum(1).mean())
    assert found["num_samples"] == 300
    assert found["dataset"] == {"name": "pets", "split": "test", "fingerprint": "aa"}
    assert (found["checkpoint"]["which"], found["checkpoint"]["step"], found["selected_on"]) == ("best", 20, "val")
    assert found["warnings"] == []


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("step", "digest", "split", "row"),
    [
        (20, "dd", "val", "| val | 50.00 % | 0.4000 | at the checkpoint, while training |"),
        (16, "dd", "val", "| val | {top1:.2f} % | {loss:.4f} | at the checkpoint, afterwards |"),
        (16, "of other weights", "val", "| val | – | – | not at the checkpoint's step |"),
        (16, "dd", "test", "| test | – | – | not at the checkpoint's step |"),
    ],
)
def test_the_score_at_the_checkpoint_is_of_its_weights(tmp_path, step, digest, split, row):
    """The log holds those of steps 10 and 20; of step 16 the val predictions of the scoring tell."""
    folder, val = make_run(tmp_path / "run", select_on=split), make_scored(seed=7, split="val", step=16, digest=digest)
    save_predictions(save_report(folder, make_scored(step=step)), val)
    metrics, page = write(folder).metrics, (folder / "report" / "report.md").read_text()
    assert (
        row.format(top1=100 * (val.predicted == val.labels).mean(), loss=log_loss(val.labels, val.probabilities))
        in page
    )
    assert (metrics["evaluation"] is None) == ("–" in row)


EPOCHS_LOG = [  # two epochs of ten steps, logged every four and at the end of each
    {"step": step, "train/loss": loss, "train/top1": loss / 10}
    for step, loss in ((4, 9.0), (8, 8.0), (10, 7.0), (14, 3.0), (18, 2.0), (20, 1.0))
]


@pytest.mark.parametrize(
    ("step", "mean"), [(20, 2.2), (18, 2.5), (14, 3.0), (12, 8.2), (10, 8.2), (2, None), (0, None)]
)
def test_train_numbers_are_means_over_the_checkpoints_epoch(tmp_path, step, mean):
    run = open_run(make_run(tmp_path / "run", log=EPOCHS_LOG))
    assert run.epoch_mean("train/loss", step) == (mean if mean is None else pytest.approx(mean))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("select_on", "watched"), [("val", "val"), ("test", "test")])
def test_every_epoch_has_a_row(tmp_path, select_on, watched):
    """Of the log of `made_up`: epochs of ten steps, logged after 5, 10 and 20."""
    folder = make_run(tmp_path / "run", select_on=select_on)
    save_report(folder)
    write(folder)
    with (folder / "report" / "epochs.csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["epoch"], first["step"], first[f"{watched}/top1"], first[f"{watched}/loss"]) == (
        "1",
        "10",
        "0.25",
        "0.5",
    )
    assert float(first["train/loss"]) == pytest.approx((3 / 5 + 3 / 10) / 2)
    assert float(first["train/top1"]) == pytest.approx((5 / 50 + 10 / 50) / 2)
    assert (second["step"], float(second["train/loss"]), second["lr"]) == ("20", pytest.approx(3 / 20), "0.001")


@pytest.mark.usefixtures("no_pictures")
def test_early_stopping_is_said(tmp_path):
    scores = [{"step": 10 * epoch, "val/top1": top1, "val/loss": 1.0} for epoch, top1 in enumerate((0.5, 0.4, 0.3), 1)]
    plan = {**PLAN, "steps_per_epoch": 10, "schedule_steps": 80}
    folder = make_run(tmp_path / "run", log=[*EPOCHS_LOG, *scores], plan=plan, patience=2)
    save_report(folder)
    write(folder)
    page = (folder / "report" / "report.md").read_text()
    assert "Early stopping ended the training after epoch 3 of 8: val top-1 had not gained for 2 epochs" in page


@pytest.mark.usefixtures("no_pictures")
def test_settings_without_an_effect_are_not_shown(tmp_path):
    for name, settings in (("a", {"select_on": "test", "opt": "sgd"}), ("b", {"sched": "step", "decay_rate": 0.1})):
        folder = make_run(tmp_path / name, decay_epochs=7, **settings)
        save_report(folder)
        write(folder)
    on_test, by_steps = ((tmp_path / name / "report" / "report.md").read_text() for name in "ab")
    assert "| val_fraction |" not in on_test and "| decay_epochs |" not in on_test and "| momentum | 0.9 |" in on_test
    assert "| val_fraction | 0.1 |" in by_steps and "| decay_epochs | 7 |" in by_steps and "| momentum" not in by_steps


@pytest.mark.usefixtures("no_pictures")
def test_a_latency_that_other_programs_disturbed_is_called_unsteady(tmp_path):
    for name, p95 in (("calm", 2.5), ("busy", 3.5)):
        speed = COST["inference"]
        cost = {**COST, "inference": {**speed, "latency_p95_seconds": p95 * speed["latency_median_seconds"]}}
        folder = make_run(tmp_path / name)
        save_report(folder, cost=cost)
        write(folder)
        assert ("unsteady" in (folder / "report" / "report.md").read_text()) == (name == "busy")


PLAIN = {"crop_padding": 0, "hflip": 0.0}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "while training, on augmented images, "),
        (PLAIN, "while training, "),
        ({**PLAIN, "smoothing": 0.1}, "while training with label smoothing 0.1, "),
        (
            {**PLAIN, "mixup": 0.2},
            "while training, on augmented images with mixup (a mixed image is of the class it has most of), ",
        ),
        ({**PLAIN, "aa": "trivial"}, "while training, on augmented images, "),
    ],
)
def test_images_are_called_augmented_where_they_are(tmp_path, settings, said):
    folder = make_run(tmp_path / "run", **settings)
    save_report(folder)
    write(folder)
    page = (folder / "report" / "report.md").read_text()
    assert (
        f"| {said}mean over the checkpoint's epoch |" in page
        and f"Train numbers are taken {said}so they may lie" in page
    )


def test_cost_is_counted_by_hand(written):
    run, report = written
    cost = report.metrics["cost"]
    assert (cost["gflops"], cost["gmacs"], cost["gmacs_without_attention"]) == (4.0, 2.0, 1.5)
    assert cost["training"]["seconds"] == 122.0
    assert cost["training"]["peak_memory_bytes"] == 5 * 2**20
    assert cost["training"]["mfu"] == pytest.approx(3 * 4e9 * 20 / 1e12)
    page = (run / "report" / "report.md").read_text()
    assert "| parameters | 2.00 M | 1.00 M trained |" in page
    assert "| GMACs without attention | 1.50 |" in page
    assert (
        "| latency | 2.00 ms | one image once, median of 50; 95th percentile 4.00 ms; a processor (2 threads), fp32 |"
        in page
    )


@pytest.mark.usefixtures("no_pictures")
def test_few_parameters_are_not_none(tmp_path):
    """A head's, as of a frozen backbone."""
    folder = make_run(tmp_path / "run")
    save_report(folder, cost={**COST, "trained_parameters": 2570})
    write(folder)
    assert "| parameters | 2.00 M | 2,570 trained |" in (folder / "report" / "report.md").read_text()


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes most of a report's time."""
    monkeypatch.setattr("cifar_dist.report.one_run._write_pictures", lambda *_: {})


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("device", "settings", "peak", "expected"),
    [
        (None, {}, 2.5e11, pytest.approx(0.96)),  # 3 passes of 4 GFLOPs for 20 images a second
        (None, {}, 2.3e11, None),
        ("another processor", {}, 2.5e11, None),
        (None, {"freeze": "backbone"}, 2.5e11, None),
    ],
)
def test_mfu_is_left_out_where_it_cannot_be_told(tmp_path, device, settings, peak, expected):
    """The machine was another, or busy while its peak was measured, or a step is no three passes."""
    folder = make_run(tmp_path / "run", **settings)
    inference = {**COST["inference"], "device": device or COST["inference"]["device"]}
    save_report(folder, cost={**COST, "inference": inference, "peak": {"flops_per_second": peak, "source": "measured"}})
    assert write(folder).metrics["cost"]["training"]["mfu"] == expected


@pytest.mark.usefixtures("no_pictures")
def test_temperature_is_fitted_on_val_alone(run):
    confident = make_scored(seed=7)
    confident = dataclasses.replace(
        confident, logits=confident.logits * 4, about=dataclasses.replace(confident.about, split="val")
    )
    save_report(run)
    save_predictions(run / "report", confident)
    found = write(run).metrics["calibration"]
    assert found["fitted_on"] == "val"
    # val is four times too sure, test is not: fitting on test would find a temperature near 1
    grid = np.exp(np.linspace(-2, 3, 2001))
    losses = [log_loss(confident.labels, softmax(confident.logits / t)) for t in grid]
    assert found["temperature"] == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    scaled = softmax(make_scored().logits / found["temperature"])
    assert found["after"]["nll"] == pytest.approx(log_loss(make_scored().labels, scaled), rel=1e-5)


UNUSUAL = "is not between 0.05 and 20: it follows a few images, or logits of an unusual scale"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("wrong", "surely", "reason"),
    [
        (None, 1, "there is no val split at hand"),
        (0, 1, "every image of val is right"),
        (1, 1e-15, f"the best on val, 0.01, {UNUSUAL}"),
        (290, 1, f"the best on val, 100, {UNUSUAL}"),
        (100, 1, None),
    ],
)
def test_why_there_is_no_temperature_is_said(run, wrong, surely, reason):
    if wrong is not None:
        val = make_scored(split="val")
        logits = 0.3 * np.eye(6, dtype=np.float32)[val.labels]
        logits[:wrong] = surely * np.roll(logits[:wrong], 1, axis=1)
        save_predictions(run / "report", dataclasses.replace(val, logits=logits))
    metrics, page = write(run).metrics["calibration"], (run / "report" / "report.md").read_text()
    assert metrics["unfitted"] == reason and (metrics["temperature"] is None) == (reason is not None)
    assert ("No temperature" in page) == (reason is not None)
    assert reason is None or f"No temperature is used: {reason}." in page


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def test_predictions_are_a_plain_table(written):
    run, _ = written
    table, scored = pq.read_table(run / "report" / "predictions.parquet").to_pandas(), SHARP
    assert list(table) == ["id", "label", "prediction", "confidence", "logits"]
    assert table["id"].dtype == np.int64
    np.testing.assert_array_equal(np.stack(table["logits"]), scored.logits)
    np.testing.assert_array_equal(table["prediction"], scored.logits.argmax(1))
    np.testing.assert_allclose(table["confidence"], softmax(scored.logits).max(1), rtol=1e-6)
    back = load_predictions(run / "report")
    for field in dataclasses.fields(Scored):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(scored, field.name))


def test_confusion_matrix_file(written):
    run, _ = written
    with (run / "report" / "confusion_matrix.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    scored = SHARP
    assert header[1:] == [row[0] for row in rows] == list(NAMES)
    counts = np.array([row[1:] for row in rows], dtype=int)
    np.testing.assert_array_equal(counts, confusion_matrix(scored.labels, scored.logits.argmax(1)))


PICTURES = [
    "loss", "accuracy", "lr", "confusion_matrix", "confusion_shares", "class_accuracy", "confusions", "reliability",
    "mistakes", "label_errors", "grad_cam",
]  # fmt: skip


def test_the_page_leads_with_the_result_and_its_pictures_exist(written):
    run, report = written
    page, top1 = (run / "report" / "report.md").read_text(), 100 * report.metrics["top1"]
    low, high = (f"{100 * end:.2f}" for end in proportion_confint(SHARP.correct.sum(), 300, method="wilson"))
    assert page.splitlines()[2] == f"**Test accuracy {top1:.2f} % (95 % interval {low} to {high} %, Wilson's)**"
    assert "a percentile bootstrap over images of macro F1." in page
    assert sorted(report.pictures) == sorted(PICTURES)
    for name in PICTURES:
        assert f"]({name}.png)" in page
        with Image.open(run / "report" / f"{name}.png") as image:
            image.verify()
    for name in ("loss", "confusion_matrix", "reliability"):
        ET.parse(run / "report" / f"{name}.svg")
    assert "| val | 50.00 % | 0.4000 |" in page
    assert "| train | 40.00 % | 0.1500 |" in page
    assert "| a\\|b |" in page
    assert " 17 labels are suspected to be wrong themselves" in page
    assert "most suspicious are shown" not in page
    assert "| training time | 0:02:02 |" in page
    assert f"train.py --config {run / 'config.yaml'} --run-dir {run}-again" in page


def test_the_learning_rate_is_drawn_at_every_step_of_the_schedule_up_to_the_last(tmp_path, monkeypatch):
    """A cosine over 8 epochs of 10 steps, of which 20 were taken and three logged, is PyTorch's at all 20."""
    drawn = {}
    monkeypatch.setattr(
        "cifar_dist.figures.lr_curve", lambda schedule, logged, axis: drawn.update(schedule=schedule, logged=logged)
    )
    folder = make_run(tmp_path / "run", epochs=8, lr=0.4, opt="momentum")
    save_report(folder)
    write(folder)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert list(drawn["schedule"].steps) == list(range(1, 21))
    assert drawn["schedule"].values == pytest.approx(rates)
    assert (drawn["logged"].steps, drawn["logged"].values) == ([5, 10, 20], [1e-3] * 3)


def test_pictures_of_an_earlier_report_are_not_left_beside_a_new_one(tmp_path):
    folder, perfect = make_run(tmp_path / "run"), make_scored(sharpness=100)
    for scored, there in ((SHARP, True), (perfect, False)):
        save_report(folder, scored)
        write(folder)
        for name in ("mistakes.jpg", "label_errors.png", "confusions.svg", "confusions.png"):
            assert (folder / "report" / name).exists() == there


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resnet18_cifar, vit_b", "resnet18_cifar, vit_b"),
        ("_cat_", r"\_cat\_"),
        ("__background__", r"\_\_background\_\_"),
        ("~~no~~ `x` *y* <b> a|b [c]", r"\~\~no\~\~ \`x\` \*y\* \<b\> a\|b \[c\]"),
        ("black & white &lt; &#65;", r"black & white \&lt; \&#65;"),
    ],
)
def test_names_are_no_markdown(text, expected):
    assert plain(text) == expected


def test_the_html_page_needs_nothing_beside_it(written):
    run, _ = written
    page = (run / "report" / "report.html").read_text()
    assert len(re.findall('src="data:image/(?:png|jpeg);base64,', page)) == len(PICTURES)
    sheet = min((run / "report" / f"grad_cam.{kind}" for kind in ("png", "jpg")), key=lambda path: path.stat().st_size)
    assert base64.b64encode(sheet.read_bytes()).decode() in page
    assert not re.search(r'(src|href)="(?!data:|#|[\w.]+(csv|parquet|json)")', page)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<td>a|b</td>" in page
    assert '<meta name="viewport"' in page


@pytest.mark.usefixtures("no_pictures")
def test_markup_in_names_stays_text(tmp_path):
    folder = make_run(tmp_path / "<b>run")
    scored = make_scored()
    save_report(folder, dataclasses.replace(scored, class_names=("<script>x</script>", *NAMES[1:])))
    write(folder)
    page = (folder / "report" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page


def test_a_report_is_made_again_without_the_model(run):
    first = write(run)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    for path in (run / "report").iterdir():
        if path.suffix in (".png", ".jpg", ".svg", ".md", ".html", ".csv") or path.name == "metrics.json":
            path.unlink()
    assert write(run) == first
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before


def test_a_model_that_cannot_be_explained_has_a_report_all_the_same(tmp_path):
    folder = make_run(tmp_path / "run")
    save_report(folder, maps=False)
    assert "grad_cam" not in write(folder).pictures
    assert "There are no Grad-CAM maps: it has no map." in (folder / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("count", "said"),
    [(0, None), (1, "1 of the 12 Grad-CAM maps shown is"), (5, "5 of the 12 Grad-CAM maps shown are")],
)
def test_empty_maps_are_counted(run, count, said):
    """Of the maps of a right and a wrong prediction of each of six classes."""
    scored, evidence = make_scored(), load_evidence(run / "report", ())
    confidence, shown = scored.probabilities.max(1), []
    for number in range(6):
        for right in (True, False):
            of_class = np.flatnonzero((scored.labels == number) & (scored.correct == right))
            shown.append(of_class[confidence[of_class].argmax()])
    evidence.maps["grad_cam"][np.isin(evidence.explained, shown[:count])] = 0
    evidence.save(run / "report")
    write(run)
    page = (run / "report" / "report.md").read_text()
    assert ("empty, all black" in page) == bool(count)
    assert said is None or f"{said} empty, all black" in page


@pytest.mark.usefixtures("no_pictures")
def test_rollouts_that_say_nothing_are_counted(run):
    """As of a ViT that has hardly been trained: every patch counts, give or take a tenth."""
    evidence = load_evidence(run / "report", ())
    shape = evidence.maps["grad_cam"].shape
    evidence.maps["rollout"] = np.random.default_rng(0).integers(230, 256, shape, dtype=np.uint8)
    evidence.maps["rollout"][:, 0, 0] = 0  # in all of them one patch does not
    evidence.save(run / "report")
    write(run)
    assert "nearly even" not in (run / "report" / "report.md").read_text()
    evidence.maps["rollout"][:, 0, 0] = 255
    evidence.save(run / "report")
    write(run)
    assert "12 of the 12 rollouts shown are nearly even" in (run / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_accuracies_that_are_1_whatever_is_predicted_are_not_shown(tmp_path):
    """Top-3 of three classes."""
    scored = make_scored()
    three = dataclasses.replace(
        scored, labels=scored.labels % 3, logits=scored.logits[:, :3], class_names=scored.class_names[:3]
    )
    folder = make_run(tmp_path / "run")
    save_report(folder, three)
    assert write(folder).metrics["top3"] == 1
    page = (folder / "report" / "report.md").read_text()
    assert "top-1 accuracy" in page and "top-3" not in page and "top-5" not in page


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("settings", "checkpoint", "log", "expected", "said"),
    [
        ({}, "best", LOG, "val", "checkpoint best of step 20 (epoch 2, the run's last step), selected on val"),
        ({"select_on": "test"}, "best", LOG, "test", "selected on test"),
        ({"select_on": "test"}, "last", LOG, "test", "selected on test"),  # whoever watched the run looked at it too
        ({}, "last", LOG, "none", "checkpoint last of step 20 (epoch 2, the run's last step), not selected by a score"),
        ({"patience": 2}, "last", LOG, "val", "checkpoint last of step 20 (epoch 2, the run's last step), selected on"),
        ({"val_fraction": 0}, "best", [LOG[0], LOG[3]], "none", "with the checkpoint of step 20"),
    ],
)
def test_selection_is_labelled(tmp_path, settings, checkpoint, log, expected, said):
    folder = make_run(tmp_path / "run", log=log, **settings)
    save_report(folder, make_scored(checkpoint=checkpoint))
    metrics = write(folder).metrics
    page = (folder / "report" / "report.md").read_text()
    assert metrics["selected_on"] == expected and said in page
    assert ("**The run was watched, and its best checkpoint picked, on the test split" in page) == (expected == "test")
    assert bool(metrics["warnings"]) == (expected == "test")


@pytest.mark.usefixtures("no_pictures")
def test_what_is_to_be_typed_has_the_environment_of_timm(tmp_path):
    folder = make_run(tmp_path / "run", environment=ENVIRONMENT | {"timm_fused_attn": "2"})
    save_report(folder, make_scored())
    write(folder)
    assert f"\nTIMM_FUSED_ATTN=2 python train.py --config {folder}" in (folder / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_another_data_set_is_neither_changed_nor_watched(tmp_path):
    folder = make_run(tmp_path / "run", select_on="test")
    save_report(folder, make_scored(fingerprint="bb", own_data=False))
    assert write(folder).metrics["warnings"] == []
    assert f"evaluate.py {folder}-again --data pets" in (folder / "report" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_another_data_set_is_named_with_the_runs_own(run):
    def page(scored):
        save_report(run, scored)
        write(run)
        return (run / "report" / "report.md").read_text()

    other = page(make_scored(dataset="strays", own_data=False))
    assert other.startswith(
        "# run: cnn4, trained on pets, tested on strays\n\n**Accuracy on strays, another set than the"
    )
    assert "The run's own set is pets: train and val below are of that." in other
    rows = ("| train of pets | 40.00 % |", "| val of pets | 50.00 % |", "| **test of strays** |")
    assert all(row in other for row in rows)
    own = page(make_scored())
    assert own.startswith("# run: cnn4 on pets\n\n**Test accuracy") and " of pets |" not in own


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("checkpoint", "flag"),
    [
        ("best", ""),
        ("last", " --checkpoint last"),
        ("some/run/checkpoints/step-00000020", " --checkpoint {run}-again/checkpoints/step-00000020"),
    ],
)
def test_the_command_scores_the_same_checkpoint_of_the_run_that_is_made_again(tmp_path, checkpoint, flag):
    folder = make_run(tmp_path / "run")
    save_report(folder, make_scored(checkpoint=checkpoint))
    write(folder)
    lines = (folder / "report" / "report.md").read_text().splitlines()
    assert f"python evaluate.py {folder}-again{flag.format(run=folder)}" in lines
    assert "| seed | 0 |" in lines and "| split_seed | 42 |" in lines


def test_a_class_without_images_counts_nothing_and_is_said(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("cifar_dist.figures.class_bars", lambda names, recalls, mean: drawn.update(recalls=recalls))
    whole, folder = make_scored(), make_run(tmp_path / "run")
    kept = whole.labels % 3 != 2  # neither "a|b" nor "frog"
    scored = dataclasses.replace(whole, **{name: getattr(whole, name)[kept] for name in ("ids", "labels", "logits")})
    save_report(folder, scored)
    found, page = write(folder).metrics, (folder / "report" / "report.md").read_text()
    for key, score in (("recall", recall_score), ("precision", precision_score), ("f1", f1_score)):
        expected = score(scored.labels, scored.predicted, labels=[0, 1, 3, 4], average="macro")
        assert found["macro_avg"][key] == pytest.approx(expected)
    assert found["macro_avg"]["recall"] == pytest.approx(found["balanced_accuracy"])
    low, high = found["macro_f1_interval"]
    assert low < found["macro_avg"]["f1"] < high
    said = "The images are of 4 of the 6 classes; macro means are over these, without a|b, frog."
    assert said in found["warnings"]
    assert "| frog | 0.0000 | – | – | 0 |" in page
    assert np.isnan(drawn["recalls"]).tolist() == [False, False, True, False, False, True]


def test_a_model_that_would_suspect_more_than_a_tenth_of_the_labels_shows_none(run):
    """98 of 300, as half of its predictions are wrong; of the better model of the other tests 17."""
    report, page, scored = write(run), (run / "report" / "report.md"), make_scored()
    doubted = label_issues(scored.probabilities, scored.labels)
    assert report.metrics["suspected_label_errors"] == (scored.predicted[doubted] != scored.labels[doubted]).sum()
    assert len(doubted) == 98 and " 98 would be suspected" in page.read_text()
    assert "label_errors" not in report.pictures and "Images whose label may be wrong" not in page.read_text()
    assert (
        "This model is too unsure to tell which labels are wrong themselves: by confident learning" in page.read_text()
    )


def test_an_image_that_is_predicted_as_labelled_is_no_suspect():
    """Class 1 is never predicted, and has 0.01 on average; images of class 0 that have as much of it are right."""
    labels = (np.arange(100) >= 95).astype(int)
    rare = np.where(np.arange(100) < 4, 0.02, np.where(labels == 1, 0.01, 0.001))
    probabilities = np.column_stack([1 - rare, rare])
    assert label_issues(probabilities, labels).tolist()[:4] == [0, 1, 2, 3]
    scored = dataclasses.replace(make_scored(), ids=np.arange(100), labels=labels, logits=np.log(probabilities))
    chosen = choose(dataclasses.replace(scored, class_names=("common", "rare")))
    assert chosen.num_suspects == len(chosen.suspects) == 0 and chosen.num_doubted == 4


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("guesses", "said", "row"),
    [
        (
            [0],
            "Every image is taken for cat: the accuracy is that class's share of the images.",
            "| dog | – | 0.0000 |",
        ),
        ([0, 3, 4, 5], "Never predicted: dog, a|b (a precision of 0 in 0", "| dog | – |"),
        ([0, 1, 3, 4, 5], "Never predicted: a|b (a precision of 0 in 0", "| a\\|b | – |"),
    ],
)
def test_classes_that_are_never_predicted_are_said(tmp_path, guesses, said, row):
    folder, scored = make_run(tmp_path / "run"), make_scored()
    logits = np.eye(6, dtype=np.float32)[np.resize(guesses, 300)]
    save_report(folder, dataclasses.replace(scored, logits=logits))
    assert any(warning.startswith(said) for warning in write(folder).metrics["warnings"])
    assert row in (folder / "report" / "report.md").read_text()


def test_of_many_classes_one_matrix_is_drawn_and_classes_have_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("cifar_dist.figures.save_all", lambda figures, _: drawn.append(figures) or {})
    labels, names = np.resize(np.arange(120), 300), tuple(f"kind{number}" for number in range(120))
    scored = dataclasses.replace(make_scored(), labels=labels, logits=np.eye(120, dtype=np.float32)[labels])
    folder = make_run(tmp_path / "run", environment=ENVIRONMENT | {"class_names": names})
    save_report(folder, dataclasses.replace(scored, class_names=names))
    write(folder)
    assert drawn[0]["confusion_matrix"] is not None and drawn[0]["confusion_shares"] is None
    page = (folder / "report" / "report.md").read_text()
    assert "| 119 | kind119 | 1.0000 |" in page and "|  | **macro mean** | **1.0000** |" in page


@pytest.mark.parametrize(("classes", "said"), [(20, "number of images"), (21, "as shades"), (41, "in the table above")])
def test_a_matrix_is_said_to_show_what_it_shows(classes, said):
    assert captions(classes)["confusion_matrix"].endswith(said)
    assert "100 least accurate" in captions(101)["class_accuracy"]
    assert "each class" in captions(100)["class_accuracy"]


def test_a_model_that_doubts_most_labels_suspects_none(tmp_path):
    """Two thirds right, sure of nothing, and fewer than a tenth suspected, all of them mistakes of its own."""
    folder, scored = make_run(tmp_path / "run"), make_scored(sharpness=2.0)
    flat = dataclasses.replace(scored, logits=0.5 * scored.logits)
    assert flat.correct.mean() > 0.6 and 0 < len(label_issues(flat.probabilities, flat.labels)) < 30
    save_report(folder, flat)
    report, page = write(folder), (folder / "report" / "report.md").read_text()
    mean = np.take_along_axis(softmax(flat.logits), flat.labels[:, None], 1).mean()
    assert "label_errors" not in report.pictures
    assert f"wrong themselves: on average it gives a label a probability of only {mean:.2f}, and by" in page


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("mistakes", "said"),
    [
        (0, "0 of 300 images are given other classes than their labels. 0 labels are suspected to be wrong themselves"),
        (1, "1 of 300 images is given another class than its label. 1 label is suspected to be wrong itself"),
        (2, "2 of 300 images are given other classes than their labels. 2 labels are suspected to be wrong themselves"),
        (27, "as likely as it usually finds that class. The 24 most suspicious are shown. The less accurate"),
    ],
)
def test_mistakes_are_counted_in_words(tmp_path, mistakes, said):
    folder, scored = make_run(tmp_path / "run"), make_scored()
    logits = 9 * np.eye(6, dtype=np.float32)[scored.labels]
    logits[:mistakes] = np.roll(logits[:mistakes], 1, axis=1)
    save_report(folder, dataclasses.replace(scored, logits=logits))
    write(folder)
    assert said in (folder / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "none"), (False, "no"), (True, "yes"), (0.0, "0"), (5e-5, "5e-05"), (0.12345678, "0.12345678"), ("a", "a")],
)
def test_settings_are_not_shown_as_python(value, words):
    assert shown(value) == words


@pytest.mark.usefixtures("no_pictures")
def test_changed_data_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    save_report(folder, make_scored(fingerprint="bb"))
    assert "fingerprint aa, now bb" in write(folder).metrics["warnings"][0]
    assert "**The data set has changed since training" in (folder / "report" / "report.md").read_text()


def test_a_log_of_a_killed_and_resumed_run(tmp_path):
    """A torn last line is no error; a step logged twice counts once, and steps ascend."""
    folder = make_run(tmp_path / "run", log=[*LOG, training(10, lr=5.0), training(30)])
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 40, "train/lo')
    assert open_run(folder).series("lr") == ([5, 10, 20, 30], [1e-3, 5.0, 1e-3, 1e-3])


def test_a_run_that_was_stopped_before_its_first_training_record_has_a_report(tmp_path):
    folder = make_run(tmp_path / "run", log=[record for record in LOG if "val/top1" in record])
    save_report(folder)
    assert write(folder).metrics["cost"]["training"]["seconds"] is None
    assert "| steps | 20 of 20 scheduled |" in (folder / "report" / "report.md").read_text()


def test_a_start_that_came_no_further_is_no_interruption(tmp_path):
    restarts = [{"resumed_at_step": 8, "steps_redone": 3, "seconds_lost": 61.0}, {"resumed_at_step": 20}]
    folder = make_run(tmp_path / "run", environment=ENVIRONMENT | {"restarts": restarts})
    save_report(folder)
    write(folder)
    assert "| interruptions | 1 (3 steps done again, 0:01:01 lost) |" in (folder / "report" / "report.md").read_text()


def break_log(folder, text):
    (folder / "log.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda folder: (folder / "log.jsonl").unlink(), "log.jsonl is missing"),
        (lambda folder: break_log(folder, ""), "holds no record yet"),
        (lambda folder: break_log(folder, "not json\n" + json.dumps(training(1)) + "\n"), "line 1 is no log record"),
        (lambda folder: break_log(folder, json.dumps(training(1)) + "\n[]\n{}\n"), "line 2 is no log record"),
        (lambda folder: (folder / "environment.json").write_text("{"), "environment.json is damaged"),
        (lambda folder: (folder / "report" / "predictions.parquet").unlink(), "predictions.parquet cannot be read"),
        (lambda folder: (folder / "report" / "predictions.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (lambda folder: (folder / "report" / "evidence.npz").write_bytes(b"PK"), "evidence.npz is missing, damaged"),
        (lambda folder: save_report(folder, make_scored(seed=5)) and save_other(folder), "of other predictions"),
        (lambda folder: (folder / "report" / "cost.json").write_text("{"), "cost.json is damaged"),
        (lambda folder: (folder / "report" / "cost.json").write_text('{"parameters": 1}'), "cost.json of the report"),
    ],
)
def test_bad_run_folders_are_one_clear_line(run, damage, said):
    damage(run)
    with pytest.raises(UsageError, match=said) as error:
        write(run)
    assert "\n" not in str(error.value)


def save_other(folder):
    """Predictions that the evidence is not of."""
    save_predictions(folder / "report", make_scored(seed=9))
