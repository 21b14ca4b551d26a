"""evaluate.py on the weights of untrained models for the embedded digits: scores, what is scored again, exports."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cifar_dist import eval_spec, scoring
from cifar_dist.config import Config
from cifar_dist.data import load_test_data, load_training_data
from cifar_dist.data.augment import VIEWS
from cifar_dist.errors import UsageError
from cifar_dist.evaluate_arguments import parse_arguments
from cifar_dist.models import build_model
from cifar_dist.recovery import checkpoint, store
from cifar_dist.report import evidence
from cifar_dist.report.predictions import AVERAGED, load_predictions
from cifar_dist.run_record import open_run
from tests.conftest import ROOT
from tests.made_up import COST, ENVIRONMENT, make_run


@pytest.fixture(scope="module")
def script():
    """evaluate.py as a module, under a name that is not the library's."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def quickly(monkeypatch, fresh_accelerate):
    """What drawing and timing take is not what is tested here."""
    monkeypatch.setattr("cifar_dist.report.one_run._write_pictures", lambda *_: {})
    monkeypatch.setattr("cifar_dist.report.comparison_figures.write", lambda *_: {})
    monkeypatch.setattr(scoring, "measure_cost", lambda loaded: COST)


def commit_weights(folder, weights, best=True, step=20):
    """A checkpoint with nothing in it but weights."""
    root = folder / "checkpoints"
    aside = store.begin(root, step)
    save_file(weights, aside / "model.safetensors")
    files = store.settle([aside / "model.safetensors"])
    return store.commit(root, aside, best, {"step": step, "num_processes": 1, "files": files})


def untrained(config, seed=0, sure=1):
    """A model whose probabilities are nearly equal; less so the larger the factor of its classifier."""
    torch.manual_seed(seed)
    model = build_model(config.model, 10).eval()
    model.get_classifier().weight.data *= sure
    return model


def weights_of(config, seed=0, sure=1):
    return untrained(config, seed, sure).state_dict()


def make(folder, seed=0, **settings):
    """A run folder with a checkpoint of an untrained model for the embedded digits."""
    settings = {"model": "cnn4", "dataset": "digits", "wandb": "disabled", **settings}
    data = load_test_data(Config.from_flat(settings).data)
    facts = {"class_names": data.class_names, "data_fingerprint": data.fingerprint}
    make_run(folder, environment=ENVIRONMENT | facts, **settings)
    commit_weights(folder, weights_of(open_run(folder).config, seed))
    return folder


@pytest.fixture
def digits_run(tmp_path):
    return make(tmp_path / "run")


def run_script(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()


def expected_logits(config, images, sure=1):
    """By plain PyTorch."""
    model = untrained(config, sure=sure)
    with torch.no_grad():
        return model((images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)


def test_scores_equal_a_plain_pytorch_loop(digits_run, script, monkeypatch, capsys):
    run_script(script, monkeypatch, digits_run)
    config = open_run(digits_run).config
    test, val = load_test_data(config.data).test, load_training_data(config.data, 2**40).val
    for split, images in (("test", test), ("val", val)):
        scored = load_predictions(digits_run / "report", split)
        np.testing.assert_allclose(scored.logits, expected_logits(config, images.images), atol=1e-5)
        np.testing.assert_array_equal(scored.labels, images.labels)
        np.testing.assert_array_equal(scored.ids, images.ids)
    top1 = (expected_logits(config, test.images).argmax(1) == test.labels).float().mean()
    assert f"top-1 {top1:.2%}" in capsys.readouterr().out


def moved(images, pixels):
    """The middle of images that torch enlarged by one pixel, from there moved by so many; (N,32,32,3)."""
    enlarged = F.pad(images.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="reflect").permute(0, 2, 3, 1)
    return enlarged[:, 1 - pixels : 33 - pixels, 1 - pixels : 33 - pixels].to(torch.uint8)


@pytest.mark.parametrize(
    ("tta", "weights", "words"),
    [
        ("flip", {0: 1}, "predictions averaged over each and its mirror image, with"),
        ("flip-shift", {0: 1 / 2, -1: 1 / 4, 1: 1 / 4}, "a pixel up left and down right (1/4 each), with"),
    ],
)
def test_views_average_probabilities(digits_run, script, monkeypatch, tta, weights, words):
    config = open_run(digits_run).config
    commit_weights(digits_run, weights_of(config, sure=30), step=30)  # else means of logits are the same
    run_script(script, monkeypatch, digits_run, "--tta", tta)
    images = load_test_data(config.data).test.images
    expected = sum(
        weight / 2 * expected_logits(config, seen, sure=30).softmax(1)
        for pixels, weight in weights.items()
        for seen in (moved(images, pixels), moved(images, pixels).flip(2))
    )
    report = digits_run / f"report-{tta}"
    np.testing.assert_allclose(load_predictions(report).probabilities, expected, atol=1e-6)
    assert json.loads((report / "metrics.json").read_text())["tta"] == tta
    page = (report / "report.md").read_text()
    assert words in page and "each image once, over several views, unlike" in page and f"--tta {tta}\n" in page


def test_every_way_to_average_has_views_words_and_a_choice(monkeypatch):
    assert set(AVERAGED) == {"none", *VIEWS}
    for tta in AVERAGED:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "RUN", "--tta", tta])
        assert parse_arguments().tta == tta


def test_predictions_are_made_again_only_where_something_changed(digits_run, script, monkeypatch, capsys):
    def scored_again(*arguments):
        run_script(script, monkeypatch, digits_run, *arguments)
        return "saved predictions" not in capsys.readouterr().out

    assert scored_again()
    before = load_predictions(digits_run / "report")
    assert not scored_again()
    assert scored_again("--tta", "flip")
    assert not scored_again()
    assert scored_again("--checkpoint", "last")
    assert not scored_again()  # each has a folder of its own
    assert load_predictions(digits_run / "report").about.checkpoint == "best"
    assert load_predictions(digits_run / "report-last").about.checkpoint == "last"
    commit_weights(digits_run, weights_of(open_run(digits_run).config, seed=1), step=30)
    assert scored_again()
    assert not np.array_equal(load_predictions(digits_run / "report").logits, before.logits)
    (digits_run / "report" / "evidence.npz").write_bytes(b"PK")
    assert scored_again()
    shutil.rmtree(digits_run / "checkpoints")  # as in a folder that was copied for its report
    assert not scored_again()


def test_a_checkpoint_by_its_folder(digits_run, script, monkeypatch, capsys):
    first = checkpoint.find(digits_run, "best").folder
    commit_weights(digits_run, weights_of(open_run(digits_run).config, seed=1), step=30)
    run_script(script, monkeypatch, digits_run, "--checkpoint", first)
    assert load_predictions(digits_run / f"report-{first.name}").about.step == 20
    run_script(script, monkeypatch, digits_run, "--checkpoint", "last")
    assert load_predictions(digits_run / "report-last").about.step == 30
    run_script(script, monkeypatch, digits_run, "--checkpoint", "step-00000030")  # as it is called there
    folder = digits_run / "report-step-00000030"
    assert load_predictions(folder).about.step == 30
    assert "with checkpoint step-00000030 of step 30" in (folder / "report.md").read_text()
    assert not (digits_run / "report").exists()


def test_several_processes_score_the_same_images_and_write_once(digits_run, script, monkeypatch):
    run_script(script, monkeypatch, digits_run)
    alone = load_predictions(digits_run / "report")
    shutil.rmtree(digits_run / "report")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script, run = ROOT / "evaluate.py", digits_run.relative_to(digits_run.parent)  # a relative path, as people type
    done = subprocess.run([*command, script, run], cwd=digits_run.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    together = load_predictions(digits_run / "report")
    np.testing.assert_array_equal(together.ids, alone.ids)
    np.testing.assert_allclose(together.logits, alone.logits, atol=1e-5)
    metrics = json.loads((digits_run / "report" / "metrics.json").read_text())
    assert metrics["num_samples"] == len(alone.ids)
    assert metrics["cost"]["gflops"] == pytest.approx(2 * cnn4_macs() / 1e9)
    assert sorted(path.name for path in (digits_run / "report").glob("*.png"))  # the real thing draws and times


def cnn4_macs():
    """3x3 convolutions on 32, 16, 8 and 4 pixels, and two linear layers."""
    sizes = [(3, 32, 32), (32, 64, 16), (64, 128, 8), (128, 128, 4)]
    return sum(9 * i * o * side**2 for i, o, side in sizes) + 512 * 256 + 256 * 10


def test_a_run_without_a_best_checkpoint_is_scored_at_its_last(digits_run, script, monkeypatch, capsys):
    shutil.rmtree(digits_run / "checkpoints")
    commit_weights(digits_run, weights_of(open_run(digits_run).config), best=False)
    run_script(script, monkeypatch, digits_run)
    assert "no best" in capsys.readouterr().out
    assert load_predictions(digits_run / "report").about.checkpoint == "last"


def write_classes(folder, names, rows=slice(4)):
    """A folder of class folders, without splits: some test images of each class."""
    test = load_test_data(Config.from_flat({"dataset": "digits"}).data).test
    for number, name in names.items():
        (folder / name).mkdir(parents=True)
        for row in torch.where(test.labels == number)[0][rows].tolist():
            Image.fromarray(test.images[row].numpy()).save(folder / name / f"{row}.png")
    return folder


def test_another_set_is_scored_by_the_names_of_its_classes(digits_run, script, monkeypatch, tmp_path):
    own = write_classes(tmp_path / "own", {7: "7", 2: "2", 9: "9"})
    run_script(script, monkeypatch, digits_run, "--data", own)
    [folder] = digits_run.glob("report-own-*")
    scored = load_predictions(folder)
    assert scored.labels.tolist() == [2] * 4 + [7] * 4 + [9] * 4
    assert len(scored.class_names) == 10
    config = open_run(digits_run).config
    files = [file for name in "279" for file in sorted((own / name).iterdir())]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    np.testing.assert_allclose(scored.logits, expected_logits(config, images), atol=1e-5)
    names = [f"{file.parent.name}/{file.name}" for file in files]
    assert pd.read_parquet(folder / "predictions.parquet")["file"].tolist() == names
    wrong = np.flatnonzero(scored.logits.argmax(1) != scored.labels)
    worst = wrong[np.argsort(-scored.probabilities.max(1)[wrong], kind="stable")]
    listed = "; ".join(f"{number} {names[row]}" for number, row in enumerate(worst, 1))
    assert len(worst) > 3
    assert f"From left to right, line by line: {listed}." in (folder / "report.md").read_text()
    assert not (digits_run / "report").exists()
    warning, alike = json.loads((folder / "metrics.json").read_text())["warnings"]
    assert warning.endswith("of 3 of the 10 classes; macro means are over these, without 0, 1, 3, 4, 5, 6, 8.")
    assert alike.startswith(("Every image is taken for", "Never predicted"))
    namesake = write_classes(tmp_path / "elsewhere" / "own", {1: "1"}, slice(1))  # a single image
    run_script(script, monkeypatch, digits_run, "--data", namesake)
    assert sorted(len(load_predictions(path).ids) for path in digits_run.glob("report-own-*")) == [1, 12]
    (own / "7" / "new.png").write_bytes(next((own / "7").iterdir()).read_bytes())
    run_script(script, monkeypatch, digits_run, "--data", own)
    assert sorted(len(load_predictions(path).ids) for path in digits_run.glob("report-own-*")) == [1, 12, 13]
    write_classes(tmp_path / "other", {7: "seven"})
    with pytest.raises(UsageError, match=r"--data .*other has the classes seven, which the run has not"):
        run_script(script, monkeypatch, digits_run, "--data", tmp_path / "other")
    with pytest.raises(UsageError, match=r"--data nowhere: no such data set or path"):
        run_script(script, monkeypatch, digits_run, "--data", "nowhere")


def write_splits(folder):
    """A data set of the digits' classes with a train and a test split of other images."""
    names = {number: str(number) for number in range(10)}
    write_classes(folder / "train", names)
    write_classes(folder / "test", names, slice(4, 6))
    return folder


def test_data_that_have_moved_are_still_the_runs_own(script, monkeypatch, tmp_path, capsys):
    place = write_splits(tmp_path / "set")
    runs = [make(tmp_path / name, dataset=str(place), val_fraction=0.25, seed=seed) for seed, name in enumerate("ab")]
    images = load_test_data(open_run(runs[0]).config.data).test.images
    moved = place.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=r"set: no such .* If the data of .*a have moved, score it with --data and"):
        run_script(script, monkeypatch, runs[0])
    run_script(script, monkeypatch, *runs, "--data", moved)
    said = capsys.readouterr().out
    for run in runs:
        assert f"those of {run} are read from {moved}" in said
        assert [folder.name for folder in run.glob("report*")] == ["report"]
        assert load_predictions(run / "report").about.own_data
        assert load_predictions(run / "report", "val").about.split == "val"
        page = (run / "report" / "report.md").read_text()
        assert f"--run-dir {run}-again --dataset {moved}\npython evaluate.py {run}-again\n" in page
    logits = load_predictions(runs[0] / "report").logits
    np.testing.assert_allclose(logits, expected_logits(open_run(runs[0]).config, images), atol=1e-5)
    next((moved / "train" / "3").iterdir()).unlink()
    run_script(script, monkeypatch, runs[0], "--data", moved)
    [other] = runs[0].glob("report-*")
    assert other.name.startswith("report-moved-") and not load_predictions(other).about.own_data
    assert f"python evaluate.py {runs[0]}-again --data {moved}\n" in (other / "report.md").read_text()


def test_a_copy_beside_the_runs_own_data_is_another_set(script, monkeypatch, tmp_path):
    """Its files may have the same names and sizes, and other pixels."""
    own = write_splits(tmp_path / "set")
    for file in own.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    run = make(tmp_path / "run", dataset=str(own))
    run_script(script, monkeypatch, run)
    copy = shutil.copytree(own, tmp_path / "copy")
    for file in copy.rglob("*.bmp"):
        Image.fromarray(255 - np.array(Image.open(file))).save(file)
    run_script(script, monkeypatch, run, "--data", copy)
    [other] = run.glob("report-*")
    images = load_test_data(replace(open_run(run).config.data, dataset=str(copy))).test.images
    expected = expected_logits(open_run(run).config, images)
    np.testing.assert_allclose(load_predictions(other).logits, expected, atol=1e-5)


def test_a_pair_of_numpy_files_is_scored(digits_run, script, monkeypatch, tmp_path):
    """As CIFAR-10.1 is published."""
    test = load_test_data(open_run(digits_run).config.data).test
    folder = tmp_path / "digits.1"
    folder.mkdir()
    np.save(folder / "v6_data.npy", test.images[:7].numpy())
    np.save(folder / "v6_labels.npy", test.labels[:7].numpy().astype(np.int32))
    run_script(script, monkeypatch, digits_run, "--data", folder)
    [report] = digits_run.glob("report-digits.1-*")
    scored = load_predictions(report)
    np.testing.assert_array_equal(scored.labels, test.labels[:7])
    expected = expected_logits(open_run(digits_run).config, test.images[:7])
    np.testing.assert_allclose(scored.logits, expected, atol=1e-5)
    for name, array, said in (
        ("v6_labels.npy", np.linspace(0, 1, 7), "labels must be whole numbers, these are float64"),
        ("v6_labels.npy", np.array(["seven"] * 7), "labels must be whole numbers, these are <U5"),
        ("v6_labels.npy", np.full(7, 10), "labels must be numbers from 0 to 9"),
        ("v6_data.npy", np.zeros((7, 28, 28, 3), np.uint8), "is needed, it is"),
        ("v6_data.npy", np.array([{}], dtype=object), "cannot be read"),
    ):
        np.save(folder / name, array, allow_pickle=True)
        with pytest.raises(UsageError, match=said):
            run_script(script, monkeypatch, digits_run, "--data", folder)
    np.save(folder / "v4_data.npy", np.zeros(3))
    with pytest.raises(UsageError, match="several sets inside"):
        run_script(script, monkeypatch, digits_run, "--data", folder)


def test_runs_are_compared(tmp_path, script, monkeypatch, capsys):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", seed=1, lr=0.5)]
    run_script(script, monkeypatch, *runs)
    said = capsys.readouterr().out
    assert said.count("verdict     ") == 1
    with (tmp_path / "comparison" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, run in zip(rows, runs, strict=True):
        assert float(row["top1"]) == load_predictions(run / "report").correct.mean()
    assert str(tmp_path / "comparison" / "comparison.html") in said
    assert {(row["test_set"], row["tta"], row["checkpoint"]) for row in rows} == {("digits", "none", "best")}
    before = (tmp_path / "comparison" / "comparison.md").read_bytes()
    run_script(script, monkeypatch, *runs, "--checkpoint", "last", "--tta", "flip")
    page = (tmp_path / "comparison-last-flip" / "comparison.md").read_text()
    assert "averaged over each and its mirror image, each at its last checkpoint" in page
    assert (tmp_path / "comparison" / "comparison.md").read_bytes() == before


def test_an_output_that_cannot_be_is_refused_before_anything_is_scored(tmp_path, script, monkeypatch):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", lr=0.5)]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--output .*file cannot be written \(File exists\)"):
        run_script(script, monkeypatch, *runs, "--output", tmp_path / "file")
    assert not (runs[0] / "report").exists()


def test_runs_that_cannot_be_compared_are_refused_before_anything_is_scored(tmp_path, script, monkeypatch):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", lr=0.5)]
    monkeypatch.setattr(scoring, "score_test", lambda *_: pytest.fail("scored"))
    with pytest.raises(UsageError, match=r"RUN_DIR .*a is given twice; name each run once"):
        run_script(script, monkeypatch, runs[0], tmp_path / "b" / ".." / "a")
    facts = json.loads((runs[1] / "environment.json").read_text())
    (runs[1] / "environment.json").write_text(json.dumps(facts | {"class_names": [*"abcdefghij"]}))
    with pytest.raises(UsageError, match=r"RUN_DIR .*a and .*b have other classes; compare runs on the same ones"):
        run_script(script, monkeypatch, *runs)
    (runs[1] / "environment.json").write_text(json.dumps(facts))
    marks = iter(["of a", "of b"])
    monkeypatch.setattr(eval_spec, "_fingerprint", lambda *_: next(marks))
    with pytest.raises(UsageError, match=r"on data with other fingerprints \(of a and of b\); score both"):
        run_script(script, monkeypatch, *runs)


def test_a_wandb_report_is_specified_without_a_server(tmp_path, script, monkeypatch, capsys):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", lr=0.5)]
    with pytest.raises(UsageError, match=r"--wandb-report: .*a has no W&B run"):
        run_script(script, monkeypatch, *runs, "--wandb-report")
    monkeypatch.setattr(script, "log_report", lambda *_: None)
    for number, run in enumerate(runs):
        (run / "wandb_id").write_text(f"id{number}\n")
    run_script(script, monkeypatch, *runs, "--wandb-report")
    assert "not sent" in capsys.readouterr().out
    text = (tmp_path / "comparison" / "wandb_report.json").read_text()
    blocks = json.loads(text)["spec"]["blocks"]
    assert any("95 % interval" in str(block.get("content")) for block in blocks)
    assert '"id0"' in text and '"id1"' in text
    assert "val/top1" in text


def test_an_export_gives_the_same_logits_in_timm(tmp_path, script, monkeypatch):
    run = make(tmp_path / "run", model="test_efficientnet", img_size=32)
    run_script(script, monkeypatch, run, "--export", tmp_path / "export")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = load_test_data(open_run(run).config.data).test.images[:8].permute(0, 3, 1, 2) / 255
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((images - mean) / std)
    np.testing.assert_allclose(load_predictions(run / "report").logits[:8], logits, atol=1e-5)
    for name in ("score_test", "score_val", "save_findings", "test_data"):  # done already: only the model is needed
        monkeypatch.setattr(scoring, name, lambda *_: pytest.fail("scored again"))
    run_script(script, monkeypatch, run, "--export", tmp_path / "again")
    exported = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "again")]
    assert exported[0] == exported[1]
    assert (tmp_path / "export" / "README.md").read_text() == (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RUN", "RUN", "--export", "x"], "--export does not go with this command; give one RUN_DIR"),
        (["RUN", "--onnx"], "--onnx does not go with this command; add --export DIR"),
        (["RUN", "--push-to-hub", "a/b"], "--push-to-hub does not go"),
        (["RUN", "--wandb-report"], "give several RUN_DIRs"),
        (["RUN", "--output", "x"], "give several RUN_DIRs"),
        (["RUN", "RUN", "--checkpoint", "x"], "a folder is of one RUN_DIR"),
        (["RUN", "--export", "x", "--tta", "flip"], "without --data and --tta"),
        (["RUN", "--export", "x", "--data", "y"], "without --data and --tta"),
        (["RUN", "--tta", "rotate"], "invalid choice"),
        ([], "RUN_DIR"),
    ],
)
def test_flags_that_do_not_go_together(digits_run, script, monkeypatch, arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        run_script(script, monkeypatch, *[digits_run if word == "RUN" else word for word in arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_that_has_no_map_is_reported_all_the_same(digits_run, script, monkeypatch):
    def cannot(*_):
        raise scoring.Unexplained("it has no layer with a map.")

    monkeypatch.setattr(scoring, "grad_cam", cannot)
    run_script(script, monkeypatch, digits_run)
    page = digits_run / "report" / "report.md"
    assert "There are no Grad-CAM maps: it has no layer with a map." in page.read_text()


@pytest.mark.parametrize("part", ["grad_cam", "measure_cost"])
def test_a_part_that_fails_does_not_cost_the_report(digits_run, script, monkeypatch, part):
    def fails(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(scoring, part, fails)
    run_script(script, monkeypatch, digits_run)
    page = (digits_run / "report" / "report.md").read_text()
    assert ("It failed: CUDA out of memory." in page) == (part == "grad_cam")
    assert ("## Cost" in page) == (part == "grad_cam")


def test_a_missing_train_split_costs_the_temperature_only(tmp_path, script, monkeypatch, capsys):
    run = make(tmp_path / "run")

    def gone(config):
        raise UsageError("--dataset digits: no train split.")

    monkeypatch.setattr(scoring, "load_val_data", gone)
    run_script(script, monkeypatch, run)
    assert "no temperature is fitted (--dataset digits: no train split.)" in capsys.readouterr().out
    assert json.loads((run / "report" / "metrics.json").read_text())["calibration"]["temperature"] is None


def test_what_cannot_be_written_is_one_line(digits_run, script, monkeypatch):
    (digits_run / "report").mkdir()
    (digits_run / "report" / "report.html").mkdir()
    with pytest.raises(UsageError, match=r"report\.html cannot be written \(Is a directory\)"):
        run_script(script, monkeypatch, digits_run)
    shutil.rmtree(digits_run / "report")
    (digits_run / "report").write_text("")
    with pytest.raises(UsageError, match=r"report cannot be written \((File exists|Not a directory)\)"):
        run_script(script, monkeypatch, digits_run)


def test_evidence_is_of_the_images_that_it_names(digits_run, script, monkeypatch):
    run_script(script, monkeypatch, digits_run)
    scored, folder = load_predictions(digits_run / "report"), digits_run / "report"
    chosen = evidence.choose(scored)
    found = evidence.load_evidence(folder, scored.ids[chosen.shown].tolist())
    test = load_test_data(open_run(digits_run).config.data).test
    for row in chosen.shown:
        np.testing.assert_array_equal(found.image(int(scored.ids[row])), test.images[row])
    assert all(found.map("grad_cam", int(scored.ids[row])).shape == (32, 32) for row in chosen.explained)
    firsts = [int(np.flatnonzero(scored.labels == k)[0]) for k in range(10)]
    assert chosen.shared == firsts
    confidence = scored.probabilities.max(1)
    wrong = np.flatnonzero(~scored.correct)
    assert confidence[chosen.mistakes[0]] == confidence[wrong].max()
    for number, right, mistaken in zip(chosen.classes, chosen.right, chosen.wrong, strict=True):
        for row, ok in ((right, True), (mistaken, False)):
            of_class = np.flatnonzero((scored.labels == number) & (scored.correct == ok))
            assert (row is None) == (len(of_class) == 0)
            assert row is None or confidence[row] == confidence[of_class].max()


def test_unusable_checkpoints_and_data_are_refused(digits_run, script, monkeypatch):
    facts = json.loads((digits_run / "environment.json").read_text())

    def refused(said, *arguments):
        with pytest.raises(UsageError, match=said) as error:
            run_script(script, monkeypatch, digits_run, *arguments)
        assert "\n" not in str(error.value)

    (digits_run / "environment.json").write_text(json.dumps(facts | {"class_names": [*"012345678", "ten"]}))
    refused("class 9 was 'ten' in training")
    (digits_run / "environment.json").write_text(json.dumps(facts | {"class_names": ["a", "b"]}))
    refused("does not fit the model of its config.yaml")
    (digits_run / "environment.json").write_text(json.dumps(facts))
    refused(r"--checkpoint bset: neither best nor last, nor one of .*run \(step-00000020\)", "--checkpoint", "bset")
    refused("neither best nor last", "--checkpoint", digits_run / "checkpoints" / "step-00000099")
    for no_checkpoint in (digits_run, digits_run / "checkpoints", digits_run / "checkpoints/step-00000020/.."):
        refused(r"neither best nor last, nor one of .*run \(step-00000020\)", "--checkpoint", no_checkpoint)
    other = make(digits_run.parent / "other")
    refused("neither best nor last", "--checkpoint", other / "checkpoints" / "best")
    (digits_run.parent / "empty").mkdir()
    for place, said in (
        (digits_run.parent, "holds 2, such as .*other; name those"),
        ("empty", r"config.yaml is missing"),
    ):
        with pytest.raises(UsageError, match=said):
            run_script(script, monkeypatch, digits_run.parent / place)
    broken = {k: v * float("nan") if v.is_floating_point() else v for k, v in weights_of(Config()).items()}
    config = replace(open_run(digits_run).config)
    nans = {k: v * float("nan") if v.is_floating_point() else v for k, v in weights_of(config).items()}
    shutil.rmtree(digits_run / "checkpoints")
    commit_weights(digits_run, broken)
    refused("does not fit the model")
    shutil.rmtree(digits_run / "checkpoints")
    commit_weights(digits_run, nans)
    refused("diverged")
    with (digits_run / "checkpoints" / "step-00000020" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused("no sound checkpoint .*model.safetensors has")
    shutil.rmtree(digits_run / "checkpoints")
    refused("no sound checkpoint", "--checkpoint", "best")
    assert not (digits_run / "report" / "predictions.parquet").exists()
