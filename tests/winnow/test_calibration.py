from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import log_softmax

from winnow.calibration import (
    HIGHEST,
    LEAST_IMAGES,
    calibration_metrics,
    expected_calibration_error,
    fit_temperature,
    reliability,
)
from winnow.uncertainty import softmax


def calibrated(num: int, seed: int = 0, num_classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from just the probabilities that they say."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(num, num_classes))
    edges = softmax(logits).cumsum(axis=1)
    labels = (random.random((num, 1)) > edges[:, :-1]).sum(axis=1)
    return logits, labels


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_the_temperature_undoes_a_factor_on_true_logits(factor: float) -> None:
    logits, labels = calibrated(20_000)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.03)
    # A number added to all logits of an image means nothing.
    assert fit_temperature(factor * logits + 1000, labels) == pytest.approx(fit_temperature(factor * logits, labels))


def test_no_other_temperature_has_less_log_loss_and_answers_stay() -> None:
    logits, labels = calibrated(2_000, seed=1)
    logits *= 4
    temperature = fit_temperature(logits, labels)
    least = log_loss(logits / temperature, labels)
    assert all(least <= log_loss(logits / other, labels) + 1e-4 for other in np.geomspace(0.05, 20, 200))
    np.testing.assert_array_equal((logits / temperature).argmax(axis=1), logits.argmax(axis=1))


def test_few_images_that_are_all_right_make_no_certainty() -> None:
    num = LEAST_IMAGES
    labels = np.arange(num) % 4
    right = 2.0 * np.eye(4)[labels]
    temperature = fit_temperature(right, labels)
    assert softmax(right / temperature).max() == pytest.approx(1 - 1 / (num + 1) * 3 / 4, abs=1e-3)
    assert fit_temperature(right[:-1], labels[:-1]) == 1.0
    assert fit_temperature(np.empty((0, 4)), labels[:0]) == 1.0
    wrong = 2.0 * np.eye(4)[(labels + 1) % 4]
    assert fit_temperature(wrong, labels) == pytest.approx(HIGHEST, rel=0.01)


def test_logits_that_are_not_finite_are_refused() -> None:
    logits, labels = calibrated(30)
    logits[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_temperature(logits, labels)


def test_the_error_of_true_probabilities_is_near_nothing_and_that_of_sharpened_ones_is_not() -> None:
    logits, labels = calibrated(50_000, seed=2)
    assert expected_calibration_error(softmax(logits), labels) < 0.01
    assert expected_calibration_error(softmax(3 * logits), labels) > 0.15


def test_bins_worked_out_by_hand() -> None:
    probabilities = np.array(
        [[0.5, 0.3, 0.2], [0.45, 0.35, 0.2], [0.1, 0.7, 0.2], [0.9, 0.05, 0.05], [0.0, 0.0, 1.0], [np.nan] * 3]
    )
    labels = np.array([0, 1, 1, 1, 2, 0])
    found = reliability(probabilities, labels, num_bins=4)
    assert [(each["above"], each["to"], each["n"]) for each in found] == [(0.25, 0.5, 2), (0.5, 0.75, 1), (0.75, 1, 2)]
    assert [each["confidence"] for each in found] == pytest.approx([0.475, 0.7, 0.95])
    assert [each["accuracy"] for each in found] == pytest.approx([0.5, 1.0, 0.5])
    expected = (2 * 0.025 + 1 * 0.3 + 2 * 0.45) / 5
    assert expected_calibration_error(probabilities, labels, num_bins=4) == pytest.approx(expected)


def test_figures_for_a_card_say_before_and_after() -> None:
    logits, labels = calibrated(3_000, seed=3)
    found = calibration_metrics(3 * logits, labels, 3.0)
    assert found["ece"] < found["ece_before"]
    assert found["log_loss"] == pytest.approx(log_loss(logits, labels))
    assert found["log_loss_before"] == pytest.approx(log_loss(3 * logits, labels))
    assert sum(each["n"] for each in found["bins"]) == found["n"] == 3_000
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_of_no_images_nothing_is_said() -> None:
    none, nobody = np.empty((0, 3)), np.empty(0, dtype=np.int64)
    assert reliability(none, nobody) == []
    assert math.isnan(expected_calibration_error(none, nobody))
    assert calibration_metrics(none, nobody, 2.0) == {"n": 0}
