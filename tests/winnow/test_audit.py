"""``winnow.audit`` against scipy's exact tests, and in simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from winnow.audit import ALARM, AuditStatistics, Share, coverage_curve, drift_between


@pytest.mark.parametrize(("num_hits", "num"), [(0, 20), (7, 50), (20, 20), (183, 200), (0, 1)])
def test_the_interval_is_clopper_and_pearsons(num_hits: int, num: int) -> None:
    share, truth = Share.of(num_hits, num), binomtest(num_hits, num).proportion_ci(0.95, method="exact")
    assert (share.low, share.high) == pytest.approx((truth.low, truth.high), abs=1e-10)
    assert share.value == num_hits / num


def test_of_no_images_nothing_is_known() -> None:
    assert Share.of(0, 0) == Share(0, 0, None, 0.0, 1.0)


def test_the_curve_goes_from_the_surest_to_all() -> None:
    confidence = np.array([0.99, 0.99, 0.9, 0.6, 0.6], dtype=np.float32)
    curve = coverage_curve(confidence, np.array([False, False, True, True, False]))
    assert [(point.threshold, point.coverage, point.error.num_hits, point.error.num) for point in curve] == [
        (0.905, 0.4, 0, 2),  # of the thresholds that keep these two the lowest
        (0.605, 0.6, 1, 3),
        (0.0, 1.0, 2, 5),
    ]
    assert coverage_curve(confidence[:0], np.zeros(0, dtype=bool)) == ()


def test_statistics_survive_being_written_down() -> None:
    confidence, wrong = np.linspace(0.3, 1, 40), np.arange(40) % 7 == 0
    for seen in (None, np.arange(40) < 25, np.full(40, True)):
        found = AuditStatistics.of(confidence, wrong, seen)
        assert AuditStatistics.from_json(found.to_json()) == found
        assert (found.drift is None) == (seen is None)


def test_without_new_images_there_is_no_alarm() -> None:
    drift = drift_between(np.full(9, 0.5), np.arange(9) < 3, np.full(9, True))
    assert (drift.new.num, drift.p_value, drift.alarm, drift.confidence_new) == (0, 1.0, False, None)


# -- simulations -------------------------------------------------------------------------------------------------------


def alarms(num_before: int, num_new: int, accuracy_before: float, accuracy_new: float, num_trials: int) -> int:
    rng = np.random.default_rng(0)
    seen = np.arange(num_before + num_new) < num_before
    accuracy = np.where(seen, accuracy_before, accuracy_new)
    return sum(
        drift_between(np.ones(len(seen)), rng.random(len(seen)) > accuracy, seen).alarm for _ in range(num_trials)
    )


@pytest.mark.parametrize(("num_before", "num_new"), [(150, 50), (40, 5), (8, 300)])
@pytest.mark.parametrize("accuracy", [0.95, 0.7])
def test_without_drift_alarms_are_as_rare_as_stated(num_before: int, num_new: int, accuracy: float) -> None:
    num_trials = 400
    found = alarms(num_before, num_new, accuracy, accuracy, num_trials)
    assert binomtest(found, num_trials, ALARM, alternative="greater").pvalue > 0.01


def test_a_real_drop_is_seen() -> None:
    assert alarms(150, 100, 0.92, 0.75, 200) >= 0.85 * 200
    assert alarms(150, 100, 0.75, 0.92, 200) >= 0.85 * 200
