import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from cifar_dist.metrics.cross_entropy import CrossEntropy


def test_agrees_with_scikit_learn(scored, make):
    probabilities, labels = scored
    exact = probabilities.astype(np.float64)
    expected = log_loss(labels, exact / exact.sum(axis=1, keepdims=True), labels=range(10))
    assert make(CrossEntropy).compute(predictions=probabilities, references=labels)["loss"] == pytest.approx(expected)


def test_agrees_with_torch_on_logits(make):
    logits, labels = 8 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 10
    probabilities = logits.double().softmax(1).float()
    found = make(CrossEntropy).compute(predictions=probabilities, references=labels)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_certain_mistake_costs_a_finite_number(make):
    found = make(CrossEntropy).compute(predictions=[[1.0, 0.0]], references=[1])
    assert found["loss"] == pytest.approx(-np.log(np.finfo(np.float64).tiny))


def test_certainty_costs_nothing_rather_than_minus_nothing(make):
    assert f"{make(CrossEntropy).compute(predictions=[[1.0, 0.0]], references=[0])['loss']:.4f}" == "0.0000"


def test_refuses_logits(make):
    with pytest.raises(ValueError, match="softmax"):
        make(CrossEntropy).compute(predictions=[[3.0, -1.0]], references=[1])
