"""Intervals against published values, and by simulation: they hold the true figure as often as they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from winnow.intervals import NUM_DRAWS, between, bootstrap, paired_difference, wilson


def test_wilson_of_published_examples() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    for num, num_of, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(num, num_of) == pytest.approx((low, high), abs=5e-5)
    for num in range(8):
        expected = binomtest(num, 7).proportion_ci(method="wilson")
        assert wilson(num, 7) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_paired_difference_of_published_examples() -> None:
    # Airway hyper-responsiveness before and after transplantation (Fagerland et al. 2014, table 2).
    assert paired_difference(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    # As scoreci.mp(25, 28, 618, 0.9) of R's PropCIs.
    assert paired_difference(28, 25, 618, 0.9) == pytest.approx((-0.0148, 0.0247), abs=5e-5)


def test_the_paired_difference_agrees_with_mcnemars_test_and_is_symmetric() -> None:
    for num_of, gained, lost in itertools.product((1, 2, 5, 9, 40), range(10), range(10)):
        if gained + lost > num_of:
            continue
        low, high = paired_difference(gained, lost, num_of)
        assert -1.0 <= low <= (gained - lost) / num_of <= high <= 1.0
        chi_square = (gained - lost) ** 2 / max(1, gained + lost)
        assert (low > 0.0 or high < 0.0) == (chi_square > 3.841459)
        assert paired_difference(lost, gained, num_of) == pytest.approx((-high, -low), abs=1e-8)
    assert paired_difference(0, 0, 0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="5 of 4 images"):
        wilson(5, 4)
    with pytest.raises(ValueError, match="3 and 2 of 4 images"):
        paired_difference(3, 2, 4)


@pytest.mark.parametrize("shares", [(0.1, 0.05), (0.03, 0.02), (0.3, 0.3)])
def test_the_paired_difference_covers_the_truth(shares: tuple[float, float]) -> None:
    gained_share, lost_share = shares
    counts = np.random.default_rng(1).multinomial(100, [*shares, 1.0 - sum(shares)], size=2000)
    truth = gained_share - lost_share
    distinct, times = np.unique(counts[:, :2], axis=0, return_counts=True)
    held = 0
    for (gained, lost), count in zip(distinct.tolist(), times.tolist(), strict=True):
        low, high = paired_difference(gained, lost, 100)
        held += count * (low <= truth <= high)
    assert 0.935 <= held / 2000 <= 0.98


def test_the_bootstrap_covers_the_truth_and_repeats_itself() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(30):
        values_N = random.normal(0.3, 1.0, 50)
        draws = bootstrap(lambda weights, values=values_N: (weights @ values / len(values))[:, None], 50)
        assert draws.shape == (NUM_DRAWS, 1)
        low, high = between(draws[:, 0])
        held += low <= 0.3 <= high
    assert 25 <= held <= 30

    def first(weights_BN: np.ndarray) -> np.ndarray:
        return weights_BN[:, :1]

    assert np.array_equal(bootstrap(first, 30, seed=3), bootstrap(first, 30, seed=3))
    assert not np.array_equal(bootstrap(first, 30, seed=3), bootstrap(first, 30, seed=4))
    assert between(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
