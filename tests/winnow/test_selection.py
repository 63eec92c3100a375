"""Strategies rank as their definitions say; a policy mixes them by its shares and shows nothing twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow import selection, uncertainty
from winnow.coreset import Coverage
from winnow.selection import Balance, Choice, Ranking, Repeats, Spread, Strategy, choose
from winnow.similarity import NearRule

PROBABILITIES = np.array([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.9, 0.1, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=np.float32)


def none(num: int) -> np.ndarray:
    return np.zeros(num, dtype=bool)


def no_repeats() -> Repeats:
    return Repeats(())


def ranking(scores: Any, seed: int = 0) -> Ranking:
    scores = np.asarray(scores, dtype=np.float64)
    return Ranking(scores, np.random.default_rng(seed).permutation(len(scores)))


@pytest.mark.parametrize(
    ("name", "measure", "most_useful"),
    [
        ("least_confidence", uncertainty.confidence, 3),
        ("margin", uncertainty.margin, 3),
        ("entropy", uncertainty.entropy, 3),
    ],
)
def test_each_score_is_highest_where_the_model_is_least_sure(name: str, measure: Any, most_useful: int) -> None:
    scores = selection.SCORES[name](measure(PROBABILITIES))
    assert int(scores.argmax()) == most_useful or scores[most_useful] == scores.max()
    assert int(scores.argmin()) == 2
    assert (scores >= 0).all()


def test_scores_order_as_brute_force_from_the_probabilities() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.full(5, 0.5), 200).astype(np.float32)
    for row in probabilities[:50]:
        ordered = np.sort(row.astype(np.float64))[::-1]
        one = row[None]
        assert selection.least_confidence(uncertainty.confidence(one))[0] == pytest.approx(1 - ordered[0], abs=1e-6)
        assert selection.margin(uncertainty.margin(one))[0] == pytest.approx(1 - (ordered[0] - ordered[1]), abs=1e-6)
        expected = -sum(p * np.log(p) for p in ordered if p > 0)
        assert selection.entropy(uncertainty.entropy(one))[0] == pytest.approx(expected, abs=1e-5)


def test_every_score_has_a_column() -> None:
    assert selection.SCORES.keys() == selection.COLUMNS.keys()


def drain(strategy: Strategy, num: int) -> list[int]:
    """All that a strategy gives, in order."""
    taken, order = none(num), []
    while (found := strategy.best(taken)) is not None:
        order.append(found[0])
        taken[found[0]] = True
        strategy.learn(found[0])
    return order


@given(st.lists(st.one_of(st.integers(0, 5).map(float), st.just(float("nan"))), max_size=60), st.integers(0, 9))
def test_a_ranking_gives_the_highest_first_and_never_what_has_no_score(scores: list[float], seed: int) -> None:
    order = drain(ranking(scores, seed), len(scores))
    assert sorted(order) == [index for index, score in enumerate(scores) if score == score]
    given_scores = [scores[index] for index in order]
    assert given_scores == sorted(given_scores, reverse=True)
    assert order == drain(ranking(scores, seed), len(scores))


def test_equal_scores_come_in_an_order_that_the_seed_decides() -> None:
    orders = {tuple(drain(ranking(np.zeros(20), seed), 20)) for seed in range(5)}
    assert len(orders) == 5


@given(
    st.lists(st.integers(0, 4), max_size=50),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.integers(0, 9),
)
def test_balance_gives_the_rarest_class_that_still_has_candidates(
    classes: list[int], counts: list[int], seed: int
) -> None:
    ties = np.random.default_rng(seed).permutation(len(classes))
    balance = Balance(np.array(classes, dtype=np.int64), np.array(counts), ties)
    order = drain(balance, len(classes))
    assert sorted(order) == list(range(len(classes)))
    seen, left = list(counts), list(classes)
    for index in order:
        assert seen[classes[index]] == min(seen[name] for name in left)
        left.remove(classes[index])
        seen[classes[index]] += 1


def test_balance_learns_what_others_chose() -> None:
    balance = Balance(np.array([0, 0, 1, 1]), np.zeros(2), np.arange(4))
    assert balance.best(none(4)) == (0, 1.0)
    balance.learn(0)
    assert balance.best(np.array([True, False, False, False])) == (2, 1.0)
    balance.learn(2)
    assert balance.best(np.array([True, False, True, False])) == (1, 0.5)


SHARES = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10), min_size=1).map(
    lambda parts: {name: part / sum(parts.values()) for name, part in parts.items()}
)


@given(SHARES, st.integers(0, 80), st.integers(0, 99))
def test_every_beginning_of_the_queue_has_the_policys_mixture(shares: dict[str, float], num: int, seed: int) -> None:
    size = 100
    rng = np.random.default_rng(seed)
    strategies: dict[str, Strategy] = {name: ranking(rng.random(size)) for name in shares}
    choices, _ = choose(strategies, shares, num, none(size), no_repeats())
    assert len(choices) == num
    assert len({choice.index for choice in choices}) == num
    for length in range(1, num + 1):
        for name, share in shares.items():
            count = sum(choice.strategy == name for choice in choices[:length])
            assert abs(count - share * length) < 2.0


def test_the_strategy_with_the_largest_share_comes_first() -> None:
    strategies: dict[str, Strategy] = {name: ranking(np.arange(10.0)) for name in "abc"}
    choices, _ = choose(strategies, {"a": 0.2, "b": 0.5, "c": 0.3}, 1, none(10), no_repeats())
    assert choices == [Choice(9, "b", 9.0)]


def test_what_a_strategy_cannot_fill_goes_to_the_others_by_their_shares() -> None:
    scores = np.full(100, np.nan)
    scores[:3] = 1.0
    strategies: dict[str, Strategy] = {
        "few": ranking(scores), "one": ranking(np.arange(100.0)), "two": ranking(-np.arange(100.0)),
    }  # fmt: skip
    choices, _ = choose(strategies, {"few": 0.5, "one": 0.25, "two": 0.25}, 60, none(100), no_repeats())
    counts = {name: sum(choice.strategy == name for choice in choices) for name in strategies}
    assert sum(counts.values()) == 60
    assert counts["few"] <= 3
    assert abs(counts["one"] - counts["two"]) <= 4


def test_fewer_candidates_than_asked_for_are_all_chosen_once() -> None:
    taken = none(7)
    taken[2] = True
    strategies: dict[str, Strategy] = {"a": ranking(np.arange(7.0)), "b": ranking(np.arange(7.0))}
    choices, _ = choose(strategies, {"a": 0.5, "b": 0.5}, 100, taken, no_repeats())
    assert [choice.index for choice in choices] == [6, 5, 4, 3, 1, 0]
    assert taken.sum() == 1


def test_the_same_bytes_or_pixels_are_chosen_once_and_unknown_hashes_are_no_repetition() -> None:
    bytes_N = np.array([5, 5, 0, 0, 6, 7], dtype=np.uint64)
    pixels_N = np.array([1, 2, 0, 0, 3, 3], dtype=np.uint64)
    strategies: dict[str, Strategy] = {"a": ranking([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])}
    choices, num_repeats = choose(strategies, {"a": 1.0}, 6, none(6), Repeats((bytes_N, pixels_N)))
    assert [choice.index for choice in choices] == [0, 2, 3, 4]
    assert num_repeats == 2


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 120), num_groups=st.integers(1, 30), lacking=st.integers(0, 5), seed=st.integers(0, 2**32 - 1)
)
def test_of_near_duplicates_one_is_chosen_as_brute_force_would(
    num: int, num_groups: int, lacking: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_groups, 40))
    vectors = centers[rng.integers(0, num_groups, num)] + 0.02 * rng.standard_normal((num, 40))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    indices = np.sort(rng.permutation(num)[: max(1, num - lacking)])  # candidates that have a vector
    rows = np.full(num, -1)
    rows[indices] = np.arange(len(indices))
    scores = rng.random(num)
    rule = NearRule()

    coverage = Coverage(vectors[indices], np.zeros(len(indices), np.uint64), rule, num=num)
    repeats = Repeats((), coverage, rows)
    strategies: dict[str, Strategy] = {"sure": ranking(scores), "spread": Spread(coverage, indices)}
    choices, num_repeats = choose(strategies, {"sure": 0.5, "spread": 0.5}, num, none(num), repeats)

    chosen = [choice.index for choice in choices]
    known = [index for index in chosen if rows[index] >= 0]
    cosines = vectors[known] @ vectors[known].T
    np.fill_diagonal(cosines, -1)
    assert (cosines < rule.threshold).all()
    left = [index for index in range(num) if index not in chosen]
    assert len(left) == num_repeats
    assert all((vectors[known] @ vectors[index]).max() >= rule.threshold - 1e-6 for index in left)


def test_spread_passes_over_what_is_taken_and_learns_what_others_chose() -> None:
    vectors = np.eye(4, dtype=np.float32)
    coverage = Coverage(vectors, np.zeros(4, np.uint64), NearRule(), num=4, start=2)
    spread = Spread(coverage, np.array([10, 20, 30, 40]))
    taken = none(50)
    taken[30] = True
    coverage.add(0)
    found = spread.best(taken)
    assert found is not None
    assert found[0] in (20, 40)
    assert found[1] == 1.0
