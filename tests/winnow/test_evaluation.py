"""Comparisons, the rule of promotion, and slices: what they say, and how often they are wrong by chance."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from winnow import evaluation
from winnow.config import PromotionConfig
from winnow.evaluation import (
    Comparison,
    Estimate,
    Measured,
    Pixels,
    compare_labels,
    compare_masks,
    cut_slices,
    decide,
    mean_iou,
    share_right,
)
from winnow.intervals import paired_difference

RULE = PromotionConfig()


Sets = list[frozenset[str] | None]


def names(*values: str | None) -> Any:
    """Each image's only class."""
    return [None if value is None else frozenset({value}) for value in values]


def test_of_several_classes_an_image_all_must_be_found_and_no_other() -> None:
    labels = [frozenset(each) for each in ("ab", "a", "", "b")]
    candidate: Sets = [frozenset(each) for each in ("ab", "ab", "", "a")]
    baseline: Sets = [frozenset("b"), frozenset("a"), frozenset("a"), None]
    found = compare_labels(labels, candidate, baseline)
    assert found.baseline is not None
    assert (found.n, found.candidate.score.value, found.baseline.score.value) == (4, 0.5, 0.25)
    assert found.difference == Estimate(0.25, *paired_difference(2, 1, 4))
    a, b = found.candidate.classes["a"], found.candidate.classes["b"]
    assert (a.n, a.score, a.precision, a.f1) == (2, 1.0, pytest.approx(2 / 3), pytest.approx(4 / 5))
    assert (b.n, b.score, b.precision, b.f1) == (2, 0.5, 0.5, 0.5)
    assert found.classes["a"] == Estimate(0.5, *paired_difference(1, 0, 2, 0.975))
    assert found.classes["b"] == Estimate(0.0, *paired_difference(0, 0, 2, 0.975))


def test_figures_of_each_class_and_of_both_models() -> None:
    labels = names("a", "a", "a", "b", "b")
    found = compare_labels(labels, names("a", "a", "b", "b", None), names("a", "b", "b", "b", "z"))
    assert (found.n, found.candidate.score.value) == (5, 0.6)
    assert found.baseline is not None
    assert found.baseline.score.value == 0.4
    assert found.difference == Estimate(0.2, *paired_difference(1, 0, 5))
    a, b = found.candidate.classes["a"], found.candidate.classes["b"]
    assert (a.n, a.score, a.precision, a.f1) == (3, pytest.approx(2 / 3), 1.0, pytest.approx(4 / 5))
    assert (b.n, b.score, b.precision, b.f1) == (2, 0.5, 0.5, 0.5)
    assert set(found.candidate.classes) == {"a", "b"}
    # Each class of two on its own is at 97.5 %, so that both hold together at 95 %.
    assert found.classes["a"] == Estimate(pytest.approx(1 / 3), *paired_difference(1, 0, 3, 0.975))
    assert Comparison.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_precision_of_a_class_that_is_never_answered_is_unknown() -> None:
    found = compare_labels(names("a", "b"), names("a", "a"), None)
    assert (found.baseline, found.difference, found.classes) == (None, None, {})
    assert (found.candidate.classes["b"].precision, found.candidate.classes["b"].f1) == (None, 0.0)


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high)


def compared(difference: Estimate | None, **classes: Estimate) -> Comparison:
    of_classes = {name: evaluation.ClassFigures(40, 0.5) for name in classes}
    measured = Measured(estimate(0.8, 0.7, 0.9), of_classes)
    return Comparison("accuracy", 100, measured, measured if difference else None, difference, classes)


def test_the_rule_promotes_and_refuses_at_its_borders() -> None:
    better = estimate(0.05, -0.0099, 0.1)
    assert decide(compared(better), RULE).promote
    for difference, says in (
        (estimate(0.0, 0.0, 0.0), "did not rise"),
        (estimate(0.05, -0.01, 0.1), "may fall by more than the margin of 0.01"),
    ):
        decision = decide(compared(difference), RULE)
        assert not decision.promote
        assert len(decision.reasons) == 1
        assert says in decision.reasons[0]
    assert decide(compared(estimate(0.05, -0.01, 0.1)), PromotionConfig(margin=0.02)).promote
    worse = decide(compared(better, ant=estimate(-0.2, -0.3, -0.01), bee=estimate(0.3, 0.1, 0.4)), RULE)
    assert (worse.promote, worse.worse, worse.doubtful) == (False, ("ant",), ())
    assert "ant got worse by more than 0.05" in worse.reasons[0]
    doubtful = decide(compared(better, ant=estimate(-0.2, -0.5, 0.1)), RULE)
    assert (doubtful.promote, doubtful.doubtful) == (True, ("ant",))
    assert decide(compared(better, ant=estimate(-0.05, -0.08, -0.01)), RULE).promote  # no more than is allowed
    alone = decide(compared(None), RULE)
    assert alone.promote
    assert "nothing to compare with" in alone.reasons[0]


def test_equal_models_are_rarely_refused_for_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "paired_difference", lru_cache(None)(paired_difference))
    random = np.random.default_rng(0)
    letters = "abcdefghij" * 33
    labels = names(*letters)

    def answers(share: float = 0.8, of_c: float | None = None) -> Any:
        shares = [share if of_c is None or letter != "c" else of_c for letter in letters]
        right = random.random(len(letters)) < shares
        return names(*(letter if is_right else "z" for letter, is_right in zip(letters, right, strict=True)))

    refused = np.mean([bool(decide(compare_labels(labels, answers(), answers()), RULE).worse) for _ in range(200)])
    assert refused <= 0.05
    # A class that is really lost is found.
    assert decide(compare_labels(labels, answers(0.9, of_c=0.3), answers(0.9)), RULE).worse == ("c",)


def pixels(random: np.random.Generator, num: int, share: float) -> Pixels:
    """Images of 100 pixels of each of two classes, answered so well."""
    right = random.binomial(100, share, (num, 2))
    return Pixels(right, np.full((num, 2), 100), right + (100 - right)[:, ::-1])


def test_masks_are_compared_on_the_same_draws() -> None:
    random = np.random.default_rng(1)
    better, worse = pixels(random, 40, 0.9), pixels(random, 40, 0.8)
    found = compare_masks(better, worse, ("sky", "sea"))
    expected = better.iou(np.ones((1, 40)))[0]
    assert found.candidate.score.value == pytest.approx(expected[0])
    assert found.candidate.classes["sea"].score == pytest.approx(expected[2])
    assert found.difference is not None
    assert 0.05 < found.difference.low < found.difference.value < found.difference.high < 0.25
    assert found == compare_masks(better, worse, ("sky", "sea"))
    alone = mean_iou(better)
    assert (alone.value, alone.low) == (found.candidate.score.value, found.candidate.score.low)
    same = compare_masks(better, better, ("sky", "sea"))
    assert same.difference == Estimate(0.0, 0.0, 0.0)
    assert Comparison.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_a_class_without_a_labelled_pixel_is_not_shown_but_counts_when_it_is_answered() -> None:
    right, labelled = np.array([[5, 0]] * 12), np.array([[10, 0]] * 12)
    found = compare_masks(Pixels(right, labelled, np.array([[5, 5]] * 12)), None, ("a", "b"))
    assert list(found.candidate.classes) == ["a"]
    assert found.candidate.score.value == pytest.approx((0.5 + 0.0) / 2)  # as winnow.metrics.segmentation_metrics
    silent = compare_masks(Pixels(right, labelled, np.array([[5, 0]] * 12)), None, ("a", "b"))
    assert silent.candidate.score.value == pytest.approx(0.5)


def test_slices_come_worst_first_and_not_smallest_first() -> None:
    right = np.concatenate([np.zeros(5), np.ones(15), np.arange(400) % 2 == 0, np.ones(598), [0, 0]]).astype(bool)
    values = ["small"] * 20 + ["bad"] * 400 + ["good"] * 590 + ["rare one"] * 5 + ["rare two"] * 5
    found = cut_slices("kind", values, lambda inside: share_right(right[inside]), lambda _: estimate(0.5, 0, 1))
    assert [each.value for each in found] == ["bad", "small", "(2 small values)", "good"]
    assert [each.n for each in found] == [400, 20, 10, 590]
    assert found[0].baseline == 0.5


def test_numbers_are_cut_at_quartiles_and_names_are_not() -> None:
    def cut(values: list[object]) -> list[tuple[str, int]]:
        found = cut_slices("x", values, lambda inside: estimate(0.5, 0.4, 0.6))
        return sorted((each.value, each.n) for each in found)

    assert cut([n / 2 for n in range(100)] + [None] * 30) == [
        *(("(none)", 30), ("0 – 12", 25), ("12.5 – 24.5", 25), ("25 – 37", 25), ("37.5 – 49.5", 25))
    ]
    assert cut([str(n) for n in range(100)]) == cut(list(range(100)))  # metadata is text
    assert cut(["1", "2"] * 30) == [("1", 30), ("2", 30)]
    assert cut(["a", None] * 30) == [("(none)", 30), ("a", 30)]
    assert cut(["nan", "inf", *map(str, range(20))]) == [("(22 small values)", 22)]
