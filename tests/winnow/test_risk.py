"""The promise of ``winnow.risk``: against scipy's exact test, and in simulations whose truth is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from winnow.risk import THRESHOLDS, Claim, largest_claim, least_sample, share_of_look, upper_bound

MAX_ERROR, DELTA = 0.05, 0.1


@pytest.mark.parametrize(("num_wrong", "num"), [(0, 59), (1, 100), (7, 50), (49, 50), (50, 50), (0, 1)])
def test_the_bound_is_clopper_and_pearsons(num_wrong: int, num: int) -> None:
    interval = binomtest(num_wrong, num, alternative="less").proportion_ci(0.95, method="exact")
    assert upper_bound(num_wrong, num, 0.05) == pytest.approx(interval.high, abs=1e-10)
    if num_wrong < num:  # at the bound, so few errors are as rare as promised
        assert binom.cdf(num_wrong, num, upper_bound(num_wrong, num, 0.05)) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("num_wrong", [0, 1, 5])
@pytest.mark.parametrize("max_error", [0.01, 0.02, 0.3])
def test_the_least_sample_is_just_enough(num_wrong: int, max_error: float) -> None:
    num = least_sample(max_error, 0.05, num_wrong)
    assert upper_bound(num_wrong, num, 0.05) <= max_error < upper_bound(num_wrong, num - 1, 0.05)


def test_a_claim_without_errors_needs_what_the_textbook_says() -> None:
    assert least_sample(0.02, 0.05) == 149
    assert least_sample(0.05, 0.05) == 59


def test_all_looks_together_spend_delta() -> None:
    assert sum(share_of_look(0.05, look) for look in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("wrong", [(-1, 5, 0.1), (6, 5, 0.1), (1, 5, 0.0), (1, 5, 1.0)])
def test_what_makes_no_sense_is_refused(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match=r"errors among|must lie"):
        upper_bound(*wrong)
    with pytest.raises(ValueError, match=r"from 1"):
        share_of_look(0.1, 0)


def test_the_claim_ends_before_the_first_set_that_fails() -> None:
    confidence = np.repeat([0.99, 0.9, 0.8, 0.7], 100)
    wrong = np.zeros(400, dtype=bool)
    wrong[200:220] = True
    claim = largest_claim(confidence, wrong, MAX_ERROR, DELTA)
    # Down to 0.805 the set is that of 0.9; what lies below the set that fails is never looked at.
    assert claim == Claim(0.805, upper_bound(0, 200, DELTA), 200, 0)
    assert largest_claim(confidence, np.zeros(400, dtype=bool), MAX_ERROR, DELTA) == Claim(
        0.0, upper_bound(0, 400, DELTA), 400, 0
    )
    assert largest_claim(confidence[:40], wrong[:40], MAX_ERROR, DELTA) is None


# -- simulations -------------------------------------------------------------------------------------------------------

Rule = Callable[[np.ndarray, np.ndarray, int], float | None]


def draw(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and whether the answer is wrong."""
    confidence = rng.beta(4, 1, num)
    return confidence, rng.random(num) < 0.8 * (1 - confidence) ** 1.2


def true_errors() -> dict[float, float]:
    """Error rate of every set, by integration over a fine grid."""
    confidence = (np.arange(2_000_000) + 0.5) / 2_000_000
    weight = 4 * confidence**3
    error = 0.8 * (1 - confidence) ** 1.2 * weight
    below_w, below_e = np.cumsum(weight), np.cumsum(error)
    found = {}
    for threshold in THRESHOLDS:
        first = int(threshold * 2_000_000)
        rest_w = below_w[-1] - (below_w[first - 1] if first else 0)
        rest_e = below_e[-1] - (below_e[first - 1] if first else 0)
        found[threshold] = rest_e / rest_w if rest_w > 0 else 0.0
    return found


def broken(rule: Rule, num_trials: int) -> float:
    """Share of trials in which any of five looks at a growing sample promised too much."""
    truth = true_errors()
    rng = np.random.default_rng(0)
    num_broken = 0
    for _ in range(num_trials):
        confidence, wrong = draw(rng, 1600)
        looks = (rule(confidence[:num], wrong[:num], look) for look, num in enumerate((100, 200, 400, 800, 1600), 1))
        num_broken += any(threshold is not None and truth[threshold] > MAX_ERROR for threshold in looks)
    return num_broken / num_trials


def honest(confidence: np.ndarray, wrong: np.ndarray, look: int) -> float | None:
    claim = largest_claim(confidence, wrong, MAX_ERROR, share_of_look(DELTA, look))
    return None if claim is None else claim.threshold


def naive(confidence: np.ndarray, wrong: np.ndarray, look: int) -> float | None:
    """The largest set whose errors in the sample are few enough, as one is tempted to."""
    found = None
    for threshold in THRESHOLDS:
        inside = confidence >= threshold
        if inside.sum() >= 20 and wrong[inside].mean() <= MAX_ERROR:
            found = threshold
    return found


def unpaid(confidence: np.ndarray, wrong: np.ndarray, look: int) -> float | None:
    """The bound of every set at the full delta, the best of all: neither order nor looks are paid for."""
    found = None
    for threshold in THRESHOLDS:
        inside = confidence >= threshold
        if inside.sum() and upper_bound(int(wrong[inside].sum()), int(inside.sum()), DELTA) <= MAX_ERROR:
            found = threshold
    return found


def test_the_promise_is_kept_at_least_as_often_as_promised() -> None:
    num_trials = 1000
    share = broken(honest, num_trials)
    assert binomtest(round(share * num_trials), num_trials, DELTA, alternative="greater").pvalue > 0.01
    claims = [honest(*draw(np.random.default_rng(seed), 1600), 1) for seed in range(20)]
    assert sum(claim is not None for claim in claims) >= 18, "a rule that never claims anything keeps every promise"


@pytest.mark.parametrize("rule", [naive, unpaid])
def test_rules_that_promise_too_much_fail_the_same_test(rule: Rule) -> None:
    num_trials = 300
    share = broken(rule, num_trials)
    assert binomtest(round(share * num_trials), num_trials, DELTA, alternative="greater").pvalue < 0.01
