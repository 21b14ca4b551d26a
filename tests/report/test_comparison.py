"""Comparisons of made-up runs: what is told apart, what is refused, and that the numbers are the runs' own."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score, f1_score, recall_score, top_k_accuracy_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from cifar_dist.config import Config
from cifar_dist.errors import UsageError
from cifar_dist.report import left_out, report_folder, write_comparison, write_report
from cifar_dist.report.endings import cut_warning
from cifar_dist.report.evidence import load_evidence
from cifar_dist.report.grouping import grid_axes, group_runs
from cifar_dist.report.predictions import load_predictions
from cifar_dist.run_record import Run, open_run
from cifar_dist.study.record import StudyRecord, save_record
from tests.made_up import COST, ENVIRONMENT, LOG, NAMES, PLAN, make_run, make_scored, save_report, with_class_names


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    """Drawing takes most of a report's time, and is another test's."""
    monkeypatch.setattr("cifar_dist.report.one_run._write_pictures", lambda *_: {})


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("cifar_dist.report.comparison_figures.write", lambda *_: {})


def make(tmp_path, name, scored=None, maps=True, cost=COST, **settings):
    folder = make_run(tmp_path / name, **settings)
    save_report(folder, scored, maps=maps, cost=cost)
    run = open_run(folder)
    write_report(run, report_folder(folder))
    return run


def compared(tmp_path, *runs):
    found = write_comparison(runs, [report_folder(run.folder) for run in runs], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == found.summary
    return found


@pytest.fixture
def three(tmp_path):
    """One clearly better than two that are alike."""
    return [
        make(
            tmp_path,
            "sharp",
            make_scored(1, 3.0),
            model="cnn4",
            cost={**COST, "parameters": 2570, "trained_parameters": 2570},
        ),
        make(tmp_path, "dull", make_scored(seed=2), model="resnet18_cifar"),
        make(tmp_path, "blunt", make_scored(seed=3), model="vit_small_cifar"),
    ]


@pytest.mark.usefixtures("no_pictures")
def test_pairs_are_tested_on_the_same_images_and_corrected(tmp_path, three):
    found = compared(tmp_path, *three)
    scored = [make_scored(seed=1, sharpness=3.0), make_scored(seed=2), make_scored(seed=3)]
    right = [s.logits.argmax(1) == s.labels for s in scored]
    raw = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        table = [[(right[a] & right[b]).sum(), (right[a] & ~right[b]).sum()],
                 [(~right[a] & right[b]).sum(), (~right[a] & ~right[b]).sum()]]  # fmt: skip
        raw.append(mcnemar(table, exact=min(table[0][1] + table[1][0], 25) < 25).pvalue)
    pairs = found.summary["pairs"]
    assert [pair["p"] for pair in pairs] == pytest.approx(raw)
    assert [pair["p_corrected"] for pair in pairs] == pytest.approx(multipletests(raw, method="holm")[1])
    assert [pair["difference"] for pair in pairs] == pytest.approx(
        [right[a].mean() - right[b].mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    )
    assert pairs[0]["all_of_a_right_none_of_b"] == int((right[0] & ~right[1]).sum())
    assert pairs[0]["agreement"] == pytest.approx((scored[0].predicted == scored[1].predicted).mean())
    assert found.verdicts[0].startswith("cnn4 is better than resnet18_cifar by ")
    assert "can't be told apart" in found.verdicts[2]


@pytest.mark.usefixtures("no_pictures")
def test_groups_agree_as_their_runs_do_on_average(tmp_path):
    scored = [make_scored(seed=seed, sharpness=sharpness) for seed, sharpness in enumerate((3.0, 2.0, 1.0, 0.5))]
    settings = [{"seed": number % 2, "lr": 0.1 + number // 2} for number in range(4)]
    runs = [make(tmp_path, f"run{k}", scored[k], **settings[k]) for k in range(4)]
    (pair,) = compared(tmp_path, *runs).summary["pairs"]
    across = [(a, b) for a in scored[:2] for b in scored[2:]]
    assert pair["agreement"] == pytest.approx(np.mean([(a.predicted == b.predicted).mean() for a, b in across]))
    assert pair["kappa"] == pytest.approx(np.mean([cohen_kappa_score(a.predicted, b.predicted) for a, b in across]))
    right = [np.stack([s.correct for s in part]) for part in (scored[:2], scored[2:])]
    assert pair["all_of_b_right_none_of_a"] == (right[1].all(0) & ~right[0].any(0)).sum()


@pytest.mark.usefixtures("no_pictures")
def test_what_is_nearly_all_is_not_called_all_nor_is_what_is_unknown(tmp_path):
    nearly = {**COST, "trained_parameters": COST["parameters"] - 1}
    runs = [make(tmp_path, "a", make_scored(1), lr=1.0, cost=nearly), make(tmp_path, "b", cost=None, lr=2.0)]
    markdown = compared(tmp_path, *runs).markdown
    assert "| cnn4, lr 1 | 2.00 | 2.00 | 4.00 |" in markdown and "| cnn4, lr 2 | – | – | – |" in markdown


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_that_would_lose_runs_is_known(tmp_path):
    runs = [make(tmp_path, name, make_scored(seed), lr=seed / 10) for seed, name in enumerate("abc", 1)]
    assert left_out(tmp_path / "out", runs) == []
    compared(tmp_path, *runs)
    assert left_out(tmp_path / "out", runs) == [] and left_out(tmp_path / "out", runs[1:]) == ["a"]


@pytest.mark.usefixtures("no_pictures")
def test_runs_of_one_name_are_told_apart_among_those_left_out(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    here, there, other = (
        make(tmp_path / folder, name, make_scored(seed), lr=seed / 10)
        for seed, (folder, name) in enumerate((("x", "a"), ("y", "a"), ("x", "b[1]")), 1)
    )
    compared(tmp_path, here, there)
    assert left_out(tmp_path / "out", [here, other]) == ["y/a"]
    compared(tmp_path, here, other)
    assert left_out(tmp_path / "out", [here, other]) == []  # no name is a pattern
    assert left_out(tmp_path / "out", [here, there]) == ["b[1]"]


@pytest.mark.usefixtures("no_pictures")
def test_trained_parameters_are_shown_only_where_they_are_not_all(tmp_path):
    whole = {**COST, "trained_parameters": COST["parameters"]}
    runs = [make(tmp_path, name, make_scored(seed), cost=whole, lr=seed / 10) for seed, name in ((1, "a"), (2, "b"))]
    markdown = compared(tmp_path, *runs).markdown
    assert "| settings | parameters (M) | GFLOPs |" in markdown and "trained (M)" not in markdown


@pytest.mark.usefixtures("no_pictures")
def test_images_that_only_one_run_gets_right(tmp_path, three):
    summary = compared(tmp_path, *three).summary
    right = np.stack([s.correct for s in (make_scored(1, 3.0), make_scored(2), make_scored(3))])
    expected = [i for i in range(300) if right[:, i].tolist() == [False, True, False]]
    assert summary["only_right"]["dull"] == expected
    assert summary["all_right"] == int(right.all(0).sum())
    assert summary["none_right"] == int((~right).all(0).sum())


def test_everything_is_written(tmp_path, three):
    compared(tmp_path, *three)
    out = tmp_path / "out"
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = [json.loads((run.folder / "report" / "metrics.json").read_text()) for run in three]
    assert [float(row["top1"]) for row in rows] == [m["top1"] for m in metrics]
    assert [float(row["gflops"]) for row in rows] == [4.0, 4.0, 4.0]
    for row, run in zip(rows, three, strict=True):
        correct = int(load_predictions(run.folder / "report").correct.sum())
        ends = proportion_confint(correct, 300, method="wilson")
        assert (float(row["top1_low"]), float(row["top1_high"])) == pytest.approx(ends)
    assert not {"run_dir", "wandb", "cache_dir", "resume"} & rows[0].keys()
    page = (out / "comparison.html").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [
        "agreement.png", "curves.png", "gflops.png", "grad_cam.png", "latency.png", "only_right.png", "parameters.png",
        "training_time.png",
    ]  # fmt: skip
    assert len(re.findall("data:image/(?:png|jpeg);base64,", page)) == len(pictures)
    assert not re.search(r'src="(?!data:)', page)
    for name in pictures:
        with Image.open(out / name) as image:
            image.verify()
    markdown = (out / "comparison.md").read_text()
    assert "| model | cnn4 | resnet18_cifar | vit_small_cifar |" in markdown
    assert "| settings | run | test |" in markdown
    assert "| settings | parameters (M) | of them trained (M) | GFLOPs |" in markdown
    assert "| cnn4 | 0.00257 | all | 4.00 |" in markdown and "| resnet18_cifar | 2.00 | 1.00 | 4.00 |" in markdown
    assert "say nothing of other seeds" in markdown
    assert f"{100 * metrics[0]['top1']:.2f} %" in markdown
    assert "that only one run gets right (its name), and what the surest of the others says" in markdown


@pytest.mark.usefixtures("no_pictures")
def test_seeds_are_repeats_of_one_setting(tmp_path):
    runs = [make(tmp_path, f"a{s}", make_scored(seed=s, sharpness=3), model="cnn4", seed=s) for s in range(3)]
    runs += [make(tmp_path, f"b{s}", make_scored(seed=10 + s), model="cnn4", lr=0.1, seed=s) for s in range(3)]
    found = compared(tmp_path, *runs)
    groups = found.summary["groups"]
    assert [group["runs"] for group in groups] == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert [group["name"] for group in groups] == ["cnn4, lr 0.001", "cnn4, lr 0.1"]
    accuracies = [make_scored(seed=s, sharpness=3).correct.mean() for s in range(3)]
    assert groups[0]["mean_top1"] == pytest.approx(np.mean(accuracies))
    assert groups[0]["std_top1"] == pytest.approx(np.std(accuracies, ddof=1))
    assert len(found.verdicts) == 1
    assert "is better than" in found.verdicts[0]
    mean, std = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"| **mean of 3 runs** | **{mean:.2f} % ± {std:.2f}** |" in found.markdown
    scores = [make_scored(seed=s, sharpness=3) for s in range(3)]
    third = [100 * top_k_accuracy_score(one.labels, one.logits, k=3) for one in scores]
    assert f" | **{np.mean(third):.2f} % ± {np.std(third, ddof=1):.2f}** | " in found.markdown
    f1 = [f1_score(one.labels, one.predicted, average="macro") for one in scores]
    assert f"| **mean of cnn4, lr 0.001** | **{np.mean(f1):.4f} ± {np.std(f1, ddof=1):.4f}** |" in found.markdown
    assert "± is the sample standard deviation (n - 1) over the n runs" in found.markdown
    assert "± is" not in compared(tmp_path, runs[0], runs[3]).markdown


@pytest.mark.parametrize(("splits", "solid"), [("vv", "val"), ("tt", "test"), ("vt", "val, or test where said so")])
def test_what_was_scored_on_test_while_training_is_never_called_val(tmp_path, monkeypatch, splits, solid):
    drawn = []
    monkeypatch.setattr("cifar_dist.figures.run_curves", lambda curves, split: drawn.append((curves, split)))
    names = {"v": "val", "t": "test"}
    runs = [make(tmp_path, f"r{n}", lr=0.1 + n, select_on=names[split]) for n, split in enumerate(splits)]
    markdown = compared(tmp_path, *runs).markdown
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["val_top1"] for row in rows] == ["0.5" if split == "v" else "" for split in splits]
    for split in splits:
        assert f" | 40.00 % | {'50.00 %' if split == 'v' else '–'} |\n" in markdown
    ((curves, split),) = drawn
    assert split == solid
    assert [curve.label.endswith(" (on test)") for curve in curves] == [splits == "vt" and s == "t" for s in splits]


@pytest.mark.usefixtures("no_pictures")
def test_a_warning_names_its_runs_unless_it_is_of_all(tmp_path):
    runs = [make(tmp_path, f"r{n}", lr=0.1 + n, select_on=split) for n, split in enumerate(("test", "val", "test"))]
    warning = "The run was watched, and its best checkpoint picked, on the test split"
    assert f"**r0, r2: {warning}" in compared(tmp_path, *runs).markdown
    assert f"**{warning}" in (of_all := compared(tmp_path, runs[0], runs[2]).markdown)
    assert of_all.count(warning) == 1


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            [(2, 0.1, 0), (1, 0.2, 0)],
            "cnn4, lr 0.1 has the highest accuracy, 55.33 %, but can't be told apart from cnn4, lr 0.2.",
        ),
        ([(1, 0.1, 0), (1, 0.2, 0)], "Of 2 runs on 300 test images of pets, both runs have the same accuracy."),
        ([(1, lr, 0) for lr in (1, 2, 3)], "Of 3 runs on 300 test images of pets, all 3 runs have the same accuracy."),
        (
            [(1, 0.1, 0), (2, 0.2, 0), (2, 0.3, 0)],
            "cnn4, lr 0.2 and cnn4, lr 0.3 share the highest accuracy, 55.33 %, but",
        ),
        (
            [(1, 0.1, 0), (2, 0.2, 0), (1, 0.2, 1), (1, 0.3, 0)],
            "pets, cnn4, lr 0.2 has the highest mean accuracy, 53.50 %, but",
        ),
        (
            [(1, 0.2, 0), (1, 0.2, 1), (2, 0.1, 0)],
            "pets, cnn4, lr 0.1 has the highest mean accuracy, 55.33 % in a single run, but",
        ),
        (
            [(2, 0.1, 0), (3, 0.1, 1), (6, 0.1, 2), (11, 0.2, 0), (2, 0.2, 1), (3, 0.2, 2)],
            "Of 6 runs on 300 test images of pets, both settings have the same mean accuracy.",
        ),
    ],
)
def test_the_highest_accuracy_may_be_shared_and_is_of_repeats_a_mean(tmp_path, runs, said):
    """Of predictions by their seed: 2 is right more often than 1 is, and 6 as often as 11."""
    right = {seed: make_scored(seed).correct.sum() for seed in (1, 2, 6, 11)}
    assert right[2] > right[1] and right[6] == right[11]
    assert right[2] / 300 == pytest.approx(0.5533, abs=1e-4) and (right[1] + right[2]) / 600 == pytest.approx(0.535)
    made = [make(tmp_path, f"r{n}", make_scored(which), lr=lr, seed=s) for n, (which, lr, s) in enumerate(runs)]
    assert said in compared(tmp_path, *made).markdown.splitlines()[2]


@pytest.mark.usefixtures("no_pictures")
def test_what_a_single_run_beside_repeats_takes_for_granted_is_said(tmp_path):
    """Its seeds are taken to scatter as the others' do."""
    runs = [make(tmp_path, f"r{n}", make_scored(n + 1), lr=0.2, seed=n) for n in range(3)]
    markdown = compared(tmp_path, *runs, make(tmp_path, "best", make_scored(9, 5.0), lr=0.1)).markdown
    assert " in a single run, by more than chance explains, if seeds matter alike in all settings." in markdown
    assert "Trained once: cnn4, lr 0.1. Seeds are taken to matter there as in the other setting of a pair" in markdown
    again = make(tmp_path, "again", make_scored(8, 5.0), lr=0.1, seed=7)
    markdown = compared(tmp_path, *runs, make(tmp_path, "first", make_scored(9, 5.0), lr=0.1), again).markdown
    assert ", by more than chance explains." in markdown and "Trained once" not in markdown


@pytest.mark.usefixtures("no_pictures")
def test_the_headline_says_from_which_the_best_cannot_be_told_apart(tmp_path):
    """A run that is right nearly always, one that differs from it in a single image, and two that guess."""
    best = make_scored(seed=1, sharpness=9)
    logits = best.logits.copy()
    logits[np.flatnonzero(best.correct)[0]] = -logits[np.flatnonzero(best.correct)[0]]
    second = dataclasses.replace(best, logits=logits)
    scored = (best, second, make_scored(seed=2), make_scored(seed=3))
    runs = [make(tmp_path, f"r{n}", one, model=f"m{n}") for n, one in enumerate(scored)]
    first_line = compared(tmp_path, *runs).markdown.splitlines()[2]
    assert first_line.endswith(
        f"m0 has the highest accuracy, {100 * best.correct.mean():.2f} %, but can't be told apart from m1.**"
    )
    alone, repeated = runs[0], make(tmp_path, "again", scored[0], model="m0", seed=1)
    assumed = "chance explains, if seeds matter alike in all settings"
    for others, explained in (([], "the choice of test images explains"), ([repeated], assumed)):
        first_line = compared(tmp_path, alone, *others, *runs[2:]).markdown.splitlines()[2]
        assert first_line.endswith(f", by more than {explained}.**")
    assert [pair["told_apart"] for pair in compared(tmp_path, *runs[:3]).summary["pairs"]] == [False, True, True]


@pytest.mark.usefixtures("no_pictures")
def test_processes_are_told_where_they_differ_and_a_models_own_input_is_no_setting(tmp_path):
    one, two, other = (
        make(tmp_path, name, lr=rate, model=model, environment={**ENVIRONMENT, "num_processes": processes})
        for name, rate, model, processes in (("a", 0.1, "cnn4", 1), ("b", 0.2, "cnn4", 2), ("c", 0.2, "test_vit", 2))
    )
    page = compared(tmp_path, one, two).markdown
    assert "| processes | 1 | 2 |" in page and "All other settings are the same. What" in page
    page = compared(tmp_path, two, other).markdown
    assert "| processes |" not in page
    assert "are the same (mean, std and interpolation are each model's own where they were not set). What" in page


@pytest.mark.usefixtures("no_pictures")
def test_what_only_one_setting_gets_right_is_of_all_its_repeats(tmp_path):
    """By a count over images."""
    scored = [make_scored(seed) for seed in range(3)]
    runs = [make(tmp_path, f"r{n}", one, seed=n, lr=(0.1, 0.1, 0.2)[n]) for n, one in enumerate(scored)]
    page = compared(tmp_path, *runs).markdown
    right = list(zip(*(one.correct.tolist() for one in scored), strict=True))
    for name, wanted in (("cnn4, lr 0.1", (True, True, False)), ("cnn4, lr 0.2", (False, False, True))):
        assert f"| only {name} | {right.count(wanted)} |" in page
    others = sum(right.count((first, not first, last)) for first in (True, False) for last in (True, False))
    assert (
        f"| several, or only some repeats | {others} |\n| all | {right.count((True,) * 3)} |\n"
        f"| none | {right.count((False,) * 3)} |"
    ) in page
    assert "A setting with repeats is right where all its runs are" in page
    assert f"| only r1 | {sum(b and not a for a, b, _ in right)} |" in compared(tmp_path, *runs[:2]).markdown


def test_a_model_s_own_size_is_the_same_setting_when_it_is_asked_for():
    runs = [
        Run(Path(), Config.from_flat({"img_size": size, "seed": n}), PLAN, {}, LOG)
        for n, size in enumerate((None, 32, 64))
    ]
    groups = group_runs(runs, "abc", [32, 32, 64])
    assert [(group.members, group.settings) for group in groups] == [
        ((0, 1), {"img_size": 32}),
        ((2,), {"img_size": 64}),
    ]


def test_a_grid_is_of_settings_and_not_of_what_a_model_brings():
    def axes(*settings, sizes):
        runs = [Run(Path(), Config.from_flat(each), PLAN, {}, LOG) for each in settings]
        return grid_axes(group_runs(runs, [f"run{n}" for n in range(len(runs))], sizes))

    assert axes({"model": "a"}, {"model": "b"}, {"model": "c"}, sizes=[32, 32, 160]) is None
    both = [{"model": model, "lr": lr} for model in "ab" for lr in (0.1, 0.2)]
    assert axes(*both, sizes=[32, 32, 160, 160]) == ("model", "lr")
    sized = [{"model": model, "img_size": size} for model in "ab" for size in (32, 64)]
    assert axes(*sized, sizes=[32, 64, 32, 64]) == ("model", "img_size")


@pytest.mark.usefixtures("no_pictures")
def test_a_class_that_all_settings_get_right_alike_has_no_best(tmp_path):
    """Two of three share the best of "dog"; of all others all have the same."""
    one = make_scored(seed=1)
    logits = one.logits.copy()
    logits[(one.labels == 1) & one.correct, 0] = 99
    worse = dataclasses.replace(one, logits=logits)
    runs = [make(tmp_path, f"r{n}", scored, lr=0.1 + n) for n, scored in enumerate((one, worse, one))]
    rows = [line for line in compared(tmp_path, *runs).markdown.splitlines() if line.count("%") == 3]
    bold = {row.split(" | ")[0]: [cell.strip(" |").startswith("**") for cell in row.split(" | ")[1:]] for row in rows}
    assert bold["| dog"] == [True, False, True]
    assert not any(any(cells) for name, cells in bold.items() if name != "| dog")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("own_data", [True, False])
def test_another_data_set_is_said(tmp_path, own_data):
    runs = [make(tmp_path, f"r{n}", make_scored(n, dataset="strays", own_data=own_data), lr=0.1 + n) for n in range(2)]
    said = "**strays is another set than the runs' own, of which train and val are.**"
    assert (said in compared(tmp_path, *runs).markdown) != own_data


@pytest.mark.usefixtures("no_pictures")
def test_a_study_is_named_and_so_are_its_missing_runs(tmp_path, three):
    failed = "failed with status 2: --lr | is bad."
    record = StudyRecord("mine", {"sharp": "finished", "dull": "finished", "blunt": "new", "bad": failed})
    save_record(tmp_path, record)
    found = compared(tmp_path, *three[:2])
    assert found.title == "Study mine: sharp against dull"  # as people have called them
    assert "| run | test |" in found.markdown  # without names of settings, which are those of the runs
    assert found.summary["study"] == {"name": "mine", "missing": {"blunt": "new", "bad": failed}}
    assert "**2 of the 4 runs of this study are missing.**" in found.markdown
    assert "| blunt | new |\n| bad | failed with status 2: --lr \\| is bad. |" in found.markdown
    save_record(tmp_path, dataclasses.replace(record, runs=dict.fromkeys(("sharp", "dull", "more"), "finished")))
    found = compared(tmp_path, *three[:2])
    assert (
        "**1 of the 3 runs of this study is missing.**" in found.markdown
    )  # as one who leaves out a bad seed must say
    assert "| more | finished |" in found.markdown
    save_record(tmp_path, dataclasses.replace(record, runs=dict.fromkeys(("sharp", "dull"), "finished")))
    found = compared(tmp_path, *three[:2])
    assert found.title.startswith("Study mine: ")
    assert "issing" not in found.markdown


@pytest.mark.usefixtures("no_pictures")
def test_runs_that_are_not_all_of_one_study_are_of_none(tmp_path, three):
    save_record(tmp_path, StudyRecord("mine", {"sharp": "finished", "dull": "finished"}))
    found = compared(tmp_path, *three)
    assert found.title == "cnn4, resnet18_cifar and vit_small_cifar"
    assert "study" not in found.summary
    (tmp_path / "other").mkdir()
    elsewhere = make(tmp_path / "other", "dull", make_scored(seed=2), model="resnet18_cifar")
    assert "Study" not in compared(tmp_path, three[0], elsewhere).title
    for foreign in ("{", "[]", '{"name": "mine"}'):
        (tmp_path / "study.json").write_text(foreign)
        assert "Study" not in compared(tmp_path, *three[:2]).title


@pytest.mark.usefixtures("no_pictures")
def test_of_several_pairs_the_page_says_that_p_decides(tmp_path, three):
    decides = "What decides is p corrected for 3 pairs (Holm, 1979)"
    several, single = (compared(tmp_path, *runs).markdown for runs in (three, three[:2]))
    assert ("95 % interval of the pair alone" in several, decides in several) == (True, True)
    assert ("of the pair alone" in single, "What decides" in single) == (False, False)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("settings", "tests"), [("ab", "M"), ("aab", "t"), ("aabc", "Mt")])
def test_the_methods_of_intervals_are_named(tmp_path, settings, tests):
    """Newcombe's and McNemar's of two single runs, Student's where there are repeats."""
    names = [f"r{n}" for n in range(len(settings))]
    runs = [
        make(tmp_path, name, make_scored(n), seed=n, lr={"a": 0.1, "b": 0.2, "c": 0.3}[setting])
        for n, (name, setting) in enumerate(zip(names, settings, strict=True))
    ]
    found = compared(tmp_path, *runs)
    assert {pair["test"][0] for pair in found.summary["pairs"]} == set(tests)
    assert "Intervals of accuracies are Wilson's score intervals" in found.markdown
    assert ("the interval is Newcombe's (1998) and the test McNemar's" in found.markdown) == ("M" in tests)
    assert ("interval and test are Student's t over images and seeds" in found.markdown) == ("t" in tests)


@pytest.mark.usefixtures("no_pictures")
def test_costs_of_repeats_are_means_of_those_that_were_measured(tmp_path):
    runs = []
    for seed, seconds in enumerate((0.002, 0.004, None)):
        folder = make_run(tmp_path / f"a{seed}", seed=seed)
        inference = {**COST["inference"], "latency_median_seconds": seconds, "device": f"processor {seed}"}
        save_report(folder, make_scored(seed=seed), cost={**COST, "inference": inference} if seconds else None)
        runs.append(open_run(folder))
        write_report(runs[-1], report_folder(folder))
    compared(tmp_path, *runs, make(tmp_path, "b", lr=0.1))
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    header = next(line for line in lines if "latency (ms)" in line).split(" | ")
    row = next(line for line in lines if line.startswith("| cnn4, lr 0.001 | 300 | 3.00")).split(" | ")
    assert row[header.index("latency (ms)")] == "3.00"
    assert row[header.index("images/s") + 1] == "64" and header[header.index("images/s") + 1] == "batch size"
    assert row[-1] == "processor 0; processor 1 |"
    assert "Of several runs of one setting the means are given." in lines


def blacken(folder, number):
    """Make the first maps of a report all zero."""
    evidence = load_evidence(folder / "report", ())
    evidence.maps["grad_cam"][:number] = 0
    evidence.save(folder / "report")
    return evidence.explained[:number]


@pytest.mark.usefixtures("no_pictures")
def test_empty_maps_are_counted_for_each_run(tmp_path):
    runs = [make(tmp_path, "a"), make(tmp_path, "b", make_scored(seed=4), lr=0.1)]
    compared(tmp_path, *runs)
    assert "some are empty" not in (tmp_path / "out" / "comparison.md").read_text()
    scored, black = make_scored(seed=4), blacken(runs[1].folder, 10)
    shared = {next(i for i in range(300) if scored.labels[i] == number) for number in range(6)}
    count = len(shared & set(black.tolist()))
    assert 0 < count < 10
    compared(tmp_path, *runs)
    said = f"Of the 6 Grad-CAM maps of each run, some are empty, all black: {count} of b."
    assert said in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_accuracies_of_single_classes_stand_side_by_side(tmp_path):
    """Means over seeds by scikit-learn, without "frog", of which there are no images; the best of each row is bold."""
    kept = make_scored().labels != 5

    def without_frogs(*args, **kwargs):
        whole = make_scored(*args, **kwargs)
        return dataclasses.replace(whole, **{n: getattr(whole, n)[kept] for n in ("ids", "labels", "logits")})

    scored = [without_frogs(seed=1), without_frogs(seed=2), without_frogs(seed=3, sharpness=1.4)]
    settings = [{"seed": 0}, {"seed": 1}, {"lr": 0.5}]
    runs = [make(tmp_path, f"r{n}", one, **own) for n, (one, own) in enumerate(zip(scored, settings, strict=True))]
    markdown = compared(tmp_path, *runs).markdown
    recalls = [recall_score(one.labels, one.predicted, labels=range(5), average=None) for one in scored]
    expected = ["| class | cnn4, lr 0.001 | cnn4, lr 0.5 |", "| --- | --- | --- |"]
    for name, first, second in zip(NAMES, np.mean(recalls[:2], axis=0), recalls[2], strict=False):
        cells = [f"{100 * value:.2f} %" for value in (first, second)]
        cells[int(second > first)] = f"**{cells[int(second > first)]}**"
        expected.append(f"| {name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    assert "\n".join(expected) in markdown
    html = (tmp_path / "out" / "comparison.html").read_text()
    assert html.count('<td class="number"><b>') == 5
    assert "Accuracy per class" not in compared(tmp_path, *runs[:2]).markdown  # repeats of one setting


@pytest.mark.usefixtures("no_pictures")
def test_runs_of_one_name_are_told_apart_and_one_given_twice_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    runs = [make(tmp_path / "x", "run", lr=0.1), make(tmp_path / "y", "run", make_scored(seed=5), lr=0.2)]
    summary = compared(tmp_path, *runs).summary
    assert list(summary["only_right"]) == ["x/run", "y/run"]
    assert [row["lr"] for row in summary["runs"]] == [0.1, 0.2]
    assert [row["train_top1"] for row in summary["runs"]] == [0.4, 0.4]
    with pytest.raises(UsageError, match=r"x/run is given twice"):
        compared(tmp_path, runs[0], runs[0])


@pytest.mark.usefixtures("no_pictures")
def test_repeats_alone_have_no_verdict(tmp_path):
    runs = [make(tmp_path, f"a{s}", make_scored(seed=s), seed=s) for s in range(2)]
    found = compared(tmp_path, *runs)
    assert found.verdicts == []
    accuracies = [100 * make_scored(seed=s).correct.mean() for s in range(2)]
    mean = f"{np.mean(accuracies):.2f} % ± {np.std(accuracies, ddof=1):.2f} (standard deviation)"
    said = f"**2 runs of one setting have a mean accuracy of {mean} on 300 test images of pets"
    assert found.markdown.splitlines()[2].startswith(said)
    assert "there is nothing to compare" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_grid_of_two_settings(tmp_path):
    runs = [
        make(tmp_path, f"{batch}-{epochs}", make_scored(seed=batch + epochs), batch_size=batch, epochs=epochs)
        for batch in (64, 128) for epochs in (20, 50)
    ]  # fmt: skip
    compared(tmp_path, *runs)
    text = (tmp_path / "out" / "grid.svg").read_text()
    for run in runs:
        metrics = json.loads((run.folder / "report" / "metrics.json").read_text())
        assert f"{metrics['top1']:.2%}" in text
    assert "batch size" in text
    assert "epochs" in text


def test_a_new_comparison_removes_the_pictures_of_the_last_one_and_nothing_else(tmp_path, three):
    compared(tmp_path, *three)
    out = tmp_path / "out"
    own = {"holiday.jpg", "thesis.svg", "plot.png", "curves.txt"}
    for name in (*own, "grid.png", "grid.svg"):
        (out / name).write_text("")
    drawn = {path.name for path in out.iterdir()} - {"grid.png", "grid.svg"}
    compared(tmp_path, *three)
    assert {path.name for path in out.iterdir()} == drawn >= own


def test_names_of_groups():
    def groups(*settings, called="cnn4-digits-20260101-120000-00"):
        runs = [Run(Path(), Config.from_flat(each), PLAN, {}, LOG) for each in settings]
        return group_runs(runs, [f"{called}{n}" for n in range(len(runs))], [None] * len(runs))

    assert [g.name for g in groups({"model": "a", "seed": 1}, {"model": "b", "lr": 0.5})] == ["a", "b"]
    found = groups({"model": "a", "lr": 0.1}, {"model": "a", "lr": 0.2}, {"model": "b", "epochs": 3})
    assert [g.name for g in found] == ["a, lr 0.1", "a, lr 0.2", "b"]
    assert [g.members for g in groups({"seed": 1}, {"seed": 2}, {"lr": 0.5})] == [(0, 1), (2,)]
    found = groups({"hflip": 0.0, "lr": 0.1}, {"hflip": 0.5, "lr": 0.1}, {"hflip": 0.5, "lr": 0.2})
    assert [g.name for g in found] == [
        f"resnet18_cifar, hflip {flip}, lr {lr}" for flip, lr in ((0, 0.1), (0.5, 0.1), (0.5, 0.2))
    ]
    # what is off is named where all else is others' too
    found = groups({"lr": 0.1}, {"lr": 0.1, "model_ema_decay": 0.9}, {"lr": 0.2, "model_ema_decay": 0.9})
    assert found[0].name == "resnet18_cifar, lr 0.1, model ema decay none"
    assert [g.name for g in groups({}, {"model_ema_decay": 0.9})] == [
        "resnet18_cifar", "resnet18_cifar, model ema decay 0.9"
    ]  # fmt: skip
    # of many settings, those that tell it apart
    plain = {"lr": 0.1, "batch_size": 64, "mixup": 0.1, "cutmix": 0.1, "reprob": 0.1}
    other = {"lr": 0.2, "batch_size": 32, "mixup": 0.2, "cutmix": 0.2, "smoothing": 0.1, "epochs": 3}
    names = [g.name for g in groups({**plain, "val_fraction": 0.0, "epochs": 7}, plain, other)]
    assert "val fraction 0" in names[0] and "epochs 7" in names[0] and names[0].endswith(", …")
    assert "val fraction" not in names[2]
    # very long names give way to the runs' own
    long = [{**plain, "init_weights": "/private/a/weights.pth", "smoothing": 0.1}, plain, {**plain, "lr": 0.5}]
    assert groups(*long[:2], called="run")[0].name == "resnet18_cifar, init weights weights.pth, smoothing 0.1"
    assert [g.name for g in groups(other, *long, called="run")] == ["run0", "run1", "run2", "run3"]
    # where it ran and what it was called are no settings
    assert len(groups({"run_dir": "x", "micro_batch_size": 8}, {"run_dir": "y", "seed": 1})) == 1
    assert grid_axes(groups({"lr": 0.1, "epochs": 1}, {"lr": 0.2, "epochs": 1}, {"lr": 0.1, "epochs": 2})) == (
        "lr", "epochs"
    )  # fmt: skip
    assert grid_axes(groups({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})) is None


def test_a_seed_that_a_group_has_already_is_no_repeat(tmp_path):
    """As one training on a CPU and on a GPU: n would be 2, with no spread at all."""
    settings = [{"seed": 0}, {"seed": 1}, {"seed": 0}, {"seed": 0, "lr": 0.5}, {"seed": 1}]

    def groups(*devices):
        runs = [
            Run(Path(), Config.from_flat(each), PLAN, {"device": device}, LOG)
            for each, device in zip(settings, devices, strict=True)
        ]
        return [(group.name, group.members) for group in group_runs(runs, "abcde", [None] * 5)]

    assert groups(*["cpu"] * 5) == [("a", (0, 1)), ("c", (2, 4)), ("resnet18_cifar, lr 0.5", (3,))]
    assert groups("cpu", "gpu", "gpu", "cpu", "cpu") == [
        ("a", (0, 4)), ("b", (1, 2)), ("resnet18_cifar, lr 0.5", (3,))
    ]  # fmt: skip


def test_repeats_may_have_had_their_data_elsewhere():
    places = [("job1", "x"), ("job2", "x"), ("other", "y")]
    runs = [
        Run(Path(), Config.from_flat({"dataset": place, "seed": seed}), PLAN, {"data_fingerprint": mark}, LOG)
        for seed, (place, mark) in enumerate(places)
    ]
    assert [group.members for group in group_runs(runs, "abc", [None] * 3)] == [(0, 1), (2,)]


def test_a_shuffle_window_is_a_setting_of_what_was_streamed():
    asked = [
        ("auto", 100, {"data_mode": "resident"}),
        ("resident", 200, {"data_mode": "resident"}),
        ("auto", 100, {}),
        ("auto", 100, {"data_mode": "stream"}),
        ("stream", 200, {}),
    ]
    runs = [
        Run(Path(), Config.from_flat({"data_mode": mode, "shuffle_window": window, "seed": seed}), PLAN, found, LOG)
        for seed, (mode, window, found) in enumerate(asked)
    ]
    groups = group_runs(runs, "abcde", [None] * 5)
    assert [group.members for group in groups] == [(0, 1, 2), (3,), (4,)]
    assert [group.settings for group in groups] == [{"shuffle_window": window} for window in (None, 100, 200)]


@pytest.mark.usefixtures("no_pictures")
def test_two_runs_of_one_seed_are_compared(tmp_path):
    runs = [make(tmp_path, "cpu"), make(tmp_path, "gpu", make_scored(seed=1))]
    found = compared(tmp_path, *runs)
    assert found.title == "cpu against gpu"
    assert [group["runs"] for group in found.summary["groups"]] == [["cpu"], ["gpu"]]
    assert [pair["test"] for pair in found.summary["pairs"]] == ["McNemar, chi-square with continuity correction"]
    assert "All settings are the same. Runs with the same settings and the same seed are no repeats" in found.markdown
    assert "the same settings but the seed" not in found.markdown


LONGER = {**PLAN, "schedule_steps": 40}
STALLED = [{"step": 10 * n, "epoch": n, "val/loss": 1.0, "val/top1": 0.5} for n in (1, 2)]


@pytest.mark.parametrize(
    ("plan", "log", "settings", "cut", "apart"),
    [
        (PLAN, LOG, {"max_steps": 20}, False, False),  # no fewer than are scheduled
        (PLAN, LOG, {"max_steps": 500}, False, False),
        (LONGER, LOG, {"max_steps": 20}, True, True),
        (LONGER, LOG, {}, True, False),  # by a signal: the page warns
        (LONGER, LOG, {"max_steps": 500}, True, False),
        (LONGER, STALLED, {"patience": 1, "max_steps": 30}, False, False),
        (LONGER, STALLED, {"patience": 2}, True, False),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_runs_that_were_cut_are_told_apart_and_warned_of(tmp_path, plan, log, settings, cut, apart):
    patience = {"patience": settings["patience"]} if "patience" in settings else {}
    runs = [make(tmp_path, "a", **patience), make(tmp_path, "b", log=log, plan=plan, seed=1, **settings)]
    found = compared(tmp_path, *runs)
    assert len(found.summary["groups"]) == 1 + apart
    said = "**Not all runs were trained to the end of their schedule; cut: b after 20 of 40 steps.**"
    assert (said in found.markdown) == cut
    assert "The run was not trained" not in found.markdown
    own = (runs[1].folder / "report" / "report.md").read_text()
    assert ("**The run was not trained to the end of its schedule: it was cut after 20 of 40 steps.**" in own) == cut
    if apart:
        assert "| max steps | none | 20 |" in found.markdown
        assert "All other settings are the same, but not all runs were trained to their end." in found.markdown


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_says_how_far_each_run_was_trained_and_which_epoch_was_scored(tmp_path):
    """By hand: the last epoch's record has a loss of 3 / 20, and that of the longer one 3 / 25."""
    longer = [*LOG, {"step": 25, "train/loss": 3 / 25, "train/top1": 0.5, "lr": 1e-3}]
    runs = [make(tmp_path, "a", make_scored(step=10)), make(tmp_path, "b", log=longer, plan=LONGER, lr=0.5)]
    lines = [line.strip("| ").split(" | ") for line in compared(tmp_path, *runs).markdown.splitlines()]
    header = next(line for line in lines if "scored at epoch" in line)
    rows = [dict(zip(header, line, strict=True)) for line in lines[lines.index(header) + 2 :][:2]]
    found = [[row[name] for name in ("epochs", "scored at epoch", "final train loss")] for row in rows]
    assert found == [["2 of 2", "1", "0.1500"], ["2.5 of 4", "2", "0.1200"]]


def test_a_run_that_ended_before_its_last_evaluation_was_cut(tmp_path):
    run = make(tmp_path, "a", log=LOG[:-1])
    assert cut_warning(run).endswith("it was cut after 20 of 20 steps, before the last evaluation.")
    assert cut_warning(make(tmp_path, "b", log=[record for record in LOG if "train/loss" in record])) is None


def test_a_run_that_was_cut_between_two_records_has_the_steps_of_its_heartbeat(tmp_path):
    run = make(tmp_path, "a", plan=LONGER)
    for text, steps in (('{"step": 23, "seconds": 1.0}', 23), ('{"step": 7}', 20), ("{", 20), ("[]", 20)):
        (run.folder / "progress.json").write_text(text)
        assert cut_warning(run).endswith(f" {steps} of 40 steps.")


def test_a_run_without_maps_is_left_out_of_the_sheet(tmp_path):
    runs = [make(tmp_path, "a", model="cnn4"), make(tmp_path, "b", make_scored(seed=4), maps=False, model="vit")]
    compared(tmp_path, *runs)
    assert (tmp_path / "out" / "grad_cam.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_comparison_says_over_which_views_predictions_are_averaged(tmp_path):
    runs = [make(tmp_path, f"r{n}", make_scored(n, tta="flip"), lr=0.1 + n) for n in range(2)]
    said = "Of 2 runs on 300 test images of pets, predictions averaged over each and its mirror image, "
    assert said in compared(tmp_path, *runs).markdown


SCORED = make_scored(seed=4)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (with_class_names(SCORED, ["cow", "dog", "a|b", "ship", "truck", "frog"]), "have other classes"),
        (with_class_names(SCORED, SCORED.class_names[::-1]), "have other classes"),
        (dataclasses.replace(SCORED, ids=SCORED.ids + 1), "scored on other test images"),
        (dataclasses.replace(SCORED, labels=(SCORED.labels + 1) % 6), "scored on other test images"),
        (make_scored(seed=4, fingerprint="bb"), "data with other fingerprints"),
        (make_scored(seed=4, tta="flip"), "with other --tta"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, other, said):
    runs = [make(tmp_path, "a"), make(tmp_path, "b", other, lr=0.5)]
    with pytest.raises(UsageError, match=said) as error:
        compared(tmp_path, *runs)
    assert "\n" not in str(error.value)
    assert f"{runs[0].folder} and {runs[1].folder}" in str(error.value)
