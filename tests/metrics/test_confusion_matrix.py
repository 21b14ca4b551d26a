import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

import evaluate
from cifar_dist.metrics.classification_report import ClassificationReport
from cifar_dist.metrics.confusion_matrix import ConfusionMatrix
from cifar_dist.metrics.cross_entropy import CrossEntropy
from cifar_dist.metrics.top_k_accuracy import TopKAccuracy
from tests.conftest import ROOT


def test_agrees_with_scikit_learn(scored, make):
    probabilities, labels = scored
    found = make(ConfusionMatrix).compute(predictions=probabilities, references=labels)["confusion_matrix"]
    np.testing.assert_array_equal(found, confusion_matrix(labels, probabilities.argmax(1), labels=range(10)))


def test_rows_are_true_classes_and_columns_predicted_ones(make):
    found = make(ConfusionMatrix).compute(predictions=[[0.1, 0.9, 0.0]] * 3, references=[0, 0, 1])
    assert found["confusion_matrix"] == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


def test_all_metrics_combine(scored, make):
    probabilities, labels = scored
    kinds = (TopKAccuracy, CrossEntropy, ClassificationReport, ConfusionMatrix)
    expected = {}
    for kind in kinds:
        expected |= make(kind).compute(predictions=probabilities, references=labels)
    combined = evaluate.combine([make(kind) for kind in kinds])
    for rows in np.array_split(np.arange(len(labels)), 3):
        combined.add_batch(predictions=probabilities[rows], references=labels[rows])
    assert combined.compute() == expected


def test_the_library_loads_a_metric_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.loading.init_dynamic_modules", lambda: _importable(tmp_path, monkeypatch))
    path = ROOT / "cifar_dist" / "metrics" / "confusion_matrix.py"
    metric = evaluate.load(str(path), cache_dir=str(tmp_path), keep_in_memory=True)
    found = metric.compute(predictions=[[0.1, 0.9]], references=[0])
    assert found == {"confusion_matrix": [[0, 1], [0, 0]]}


def _importable(folder, monkeypatch):
    """A folder of imported metric scripts, in place of the one in the user's home."""
    modules = folder / "metric_scripts"
    modules.mkdir(exist_ok=True)
    (modules / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    return str(modules)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Any attempt to open a connection fails the test."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a metric opened a connection"))
