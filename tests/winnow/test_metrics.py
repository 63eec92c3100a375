from __future__ import annotations

import json

import numpy as np
import pytest

from winnow.metrics import classification_metrics, confusion, multilabel_metrics, segmentation_metrics

CLASSES = ("ant", "bee", "cat", "dog")


def test_figures_of_a_classification_worked_out_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    probabilities = np.array(
        [[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1],
         [0.1, 0.8, 0.05, 0.05], [0.5, 0.3, 0.1, 0.1], [0.3, 0.3, 0.4, 0.0]]
    )  # fmt: skip
    found = classification_metrics(labels, probabilities, CLASSES)
    assert found["n"] == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    f1 = {"ant": 2 * 2 / (3 + 3), "bee": 2 * 1 / (2 + 2), "cat": 1.0}
    assert found["macro_f1"] == pytest.approx(sum(f1.values()) / 3)  # nobody saw or said dog
    assert found["log_loss"] == pytest.approx(-np.log([0.7, 0.6, 0.2, 0.8, 0.3, 0.4]).mean())
    assert found["classes"]["ant"] == pytest.approx({"n": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": f1["ant"]})
    assert found["classes"]["dog"] == {"n": 0, "precision": None, "recall": None, "f1": None}
    assert found["confusion"] == {"ant": {"ant": 2, "bee": 1}, "bee": {"ant": 1, "bee": 1}, "cat": {"cat": 1}}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_figures_agree_with_an_independent_library() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 200)
    probabilities = random.dirichlet(np.ones(4), 200)
    found = classification_metrics(labels, probabilities, CLASSES)
    answers = probabilities.argmax(axis=1)
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, answers, average="macro"))
    assert found["log_loss"] == pytest.approx(sklearn.log_loss(labels, probabilities))
    np.testing.assert_array_equal(confusion(labels, answers, 4), sklearn.confusion_matrix(labels, answers))


def test_a_sure_mistake_costs_much_but_not_everything() -> None:
    found = classification_metrics(np.array([0]), np.array([[0.0, 1.0, 0.0, 0.0]]), CLASSES)
    assert 30 < found["log_loss"] < 40


def test_figures_of_a_segmentation_worked_out_by_hand() -> None:
    labels = np.array([[0, 0, 1], [1, 255, 2]])
    answers = np.array([[0, 1, 1], [1, 0, 0]])
    found = segmentation_metrics(confusion(labels, answers, 4, void=255), CLASSES, 1)
    assert found["n"] == 1
    assert found["classes"]["ant"] == pytest.approx({"pixels": 2, "iou": 1 / 3})
    assert found["classes"]["bee"] == pytest.approx({"pixels": 2, "iou": 2 / 3})
    assert found["classes"]["cat"] == {"pixels": 1, "iou": 0.0}
    assert found["classes"]["dog"] == {"pixels": 0, "iou": None}
    assert found["mean_iou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert found["pixel_accuracy"] == pytest.approx(3 / 5)


def test_of_nothing_nothing_is_said() -> None:
    assert classification_metrics(np.zeros(0, dtype=np.int64), np.zeros((0, 4)), CLASSES) == {"n": 0}
    assert segmentation_metrics(np.zeros((4, 4), dtype=np.int64), CLASSES, 0) == {"n": 0}


def test_metrics_of_several_classes_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels_NC = random.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]
    probabilities_NC = np.round(np.clip(0.6 * labels_NC + random.random((200, 4)) * 0.6, 0, 1), 2)  # with ties
    found = multilabel_metrics(labels_NC, probabilities_NC, ("a", "b", "c", "d"))
    answers_NC = probabilities_NC >= 0.5
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(labels_NC, answers_NC))
    assert found["classes"]["d"]["recall"] is None
    for index, name in enumerate("abc"):
        truth, scores, answers = labels_NC[:, index], probabilities_NC[:, index], answers_NC[:, index]
        assert found["classes"][name]["average_precision"] == pytest.approx(
            metrics.average_precision_score(truth, scores)
        )
        assert found["classes"][name]["f1"] == pytest.approx(metrics.f1_score(truth, answers))
        assert found["classes"][name]["n"] == truth.sum()
    assert multilabel_metrics(labels_NC[:0], probabilities_NC[:0], ("a", "b", "c", "d")) == {"n": 0}
