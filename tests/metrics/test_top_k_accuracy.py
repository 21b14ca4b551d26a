import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from cifar_dist.metrics.top_k_accuracy import TopKAccuracy


def test_agrees_with_scikit_learn(scored, make):
    probabilities, labels = scored
    found = make(TopKAccuracy).compute(predictions=probabilities, references=labels)
    assert found["top1"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    for k in (3, 5):
        expected = top_k_accuracy_score(labels, probabilities, k=k, labels=range(10))
        assert found[f"top{k}"] == pytest.approx(expected)
    assert 0 < found["top1"] < found["top3"] < found["top5"] < 1


def test_batches_add_up_to_one_computation(scored, make):
    probabilities, labels = scored
    metric = make(TopKAccuracy)
    for part in np.array_split(np.arange(500), 7):
        metric.add_batch(predictions=probabilities[part], references=labels[part])
    assert metric.compute() == make(TopKAccuracy).compute(predictions=probabilities, references=labels)


def test_k_is_capped_by_the_number_of_classes(make):
    found = make(TopKAccuracy).compute(predictions=[[0.9, 0.1], [0.8, 0.2]], references=[0, 1])
    assert found == {"top1": 0.5, "top3": 1.0, "top5": 1.0}


def test_equal_scores_rank_as_in_argmax(make):
    found = make(TopKAccuracy).compute(predictions=[[1.0] * 6] * 6, references=range(6))
    assert found == {"top1": 1 / 6, "top3": 3 / 6, "top5": 5 / 6}


@pytest.mark.parametrize(
    ("predictions", "references", "said"),
    [
        ([[0.5, 0.5]], [2], "from 0 to 1"),
        ([[0.5, 0.5]], [-1], "from 0 to 1"),
        ([[0.5, 0.5], [1.0]], [0, 0], "one score per class"),
        ([[float("nan"), 0.5]], [0], "not finite"),
    ],
)
def test_refuses_what_cannot_be_scored(predictions, references, said, make):
    with pytest.raises(ValueError, match=said):
        make(TopKAccuracy).compute(predictions=predictions, references=references)
