"""Measures of uncertainty against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from winnow.uncertainty import (
    Float32s,
    confidence,
    confidence_of_sets,
    disagreement,
    disagreement_of_sets,
    entropy,
    entropy_of_sets,
    is_answered,
    margin,
    margin_of_sets,
    sigmoid,
    softmax,
    top_k,
)

PROBABILITIES = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]], dtype=np.float32)


def test_confidence_is_the_largest_probability() -> None:
    np.testing.assert_allclose(confidence(PROBABILITIES), [0.5, 1.0, 1 / 3, 0.7], rtol=1e-6)
    assert confidence(PROBABILITIES).dtype == np.float32


def test_margin_is_the_distance_of_the_top_two() -> None:
    np.testing.assert_allclose(margin(PROBABILITIES), [0.25, 1.0, 0.0, 0.5], atol=1e-6)
    with pytest.raises(ValueError, match="at least two classes"):
        margin(PROBABILITIES[:, :1])


def test_entropy_is_in_nats() -> None:
    third = -(0.1 * math.log(0.1) + 0.2 * math.log(0.2) + 0.7 * math.log(0.7))
    np.testing.assert_allclose(entropy(PROBABILITIES), [1.5 * math.log(2), 0.0, math.log(3), third], rtol=1e-6)
    assert not np.signbit(entropy(PROBABILITIES)).any()


def test_disagreement_is_the_entropy_of_the_mean_minus_the_mean_entropy() -> None:
    sure = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)  # two views, each sure of another class
    unsure = np.full((2, 2), 0.5, dtype=np.float32)
    mixed = np.array([[0.9, 0.1], [0.5, 0.5]], dtype=np.float32)
    views_VNC = np.stack([sure, unsure, mixed], axis=1)

    def plain(*values: float) -> float:
        return -sum(value * math.log(value) for value in values)

    expected = plain(0.7, 0.3) - (plain(0.9, 0.1) + plain(0.5, 0.5)) / 2
    np.testing.assert_allclose(disagreement(views_VNC), [math.log(2), 0.0, expected], atol=1e-7)
    assert disagreement(views_VNC).dtype == np.float32
    views_VNC[0, 1, 0] = np.nan
    assert np.isnan(disagreement(views_VNC)).tolist() == [False, True, False]


@given(arrays.arrays(np.float32, (4, 3, 5), elements=st.floats(-20, 20, width=32)))
def test_disagreement_is_never_negative_and_at_most_the_logarithm_of_the_views(logits_VNC: Float32s) -> None:
    found = disagreement(np.stack([softmax(logits_NC) for logits_NC in logits_VNC]))
    assert (found >= 0).all()
    assert (found <= math.log(4) + 1e-6).all()
    one = softmax(logits_VNC[0])
    assert (disagreement(np.stack([one] * 4)) < 1e-6).all()


def test_top_k_is_sorted_and_takes_the_first_of_equals() -> None:
    classes, scores = top_k(PROBABILITIES, 2)
    assert classes.tolist() == [[0, 1], [0, 1], [0, 1], [2, 1]]
    np.testing.assert_allclose(scores, [[0.5, 0.25], [1.0, 0.0], [1 / 3, 1 / 3], [0.7, 0.2]], rtol=1e-6)
    assert top_k(PROBABILITIES, 5)[0].shape == (4, 3)
    with pytest.raises(ValueError, match="at least 1"):
        top_k(PROBABILITIES, 0)


def test_softmax_of_large_logits_neither_overflows_nor_underflows() -> None:
    got = softmax(np.array([[1000.0, 1000.0], [-1000.0, -1001.0], [0.0, 80.0]], dtype=np.float32))
    np.testing.assert_allclose(got[0], [0.5, 0.5])
    np.testing.assert_allclose(got[1], [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))], rtol=1e-6)
    assert np.isfinite(got).all()


def test_only_the_row_that_is_not_finite_is_spoiled() -> None:
    logits = np.array([[1.0, 2.0], [np.nan, 0.0], [np.inf, 0.0], [-np.inf, 0.0], [3.0, 1.0]], dtype=np.float32)
    probabilities = softmax(logits)
    assert is_answered(probabilities).tolist() == [True, False, False, False, True]
    for spoiled in (
        confidence(probabilities),
        margin(probabilities),
        entropy(probabilities),
        top_k(probabilities, 1)[1],
    ):
        assert np.isnan(spoiled[1:4]).all()
        assert np.isfinite(spoiled[[0, 4]]).all()
    np.testing.assert_array_equal(probabilities[[0, 4]], softmax(logits[[0, 4]]))


def test_no_images_give_no_answers() -> None:
    none = np.empty((0, 3), dtype=np.float32)
    assert softmax(none).shape == (0, 3)
    assert confidence(none).shape == margin(none).shape == entropy(none).shape == (0,)
    assert top_k(none, 5)[0].shape == (0, 3)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 20)), elements=st.floats(-50, 50, width=32))
)
def test_measures_agree_with_sorting(logits: np.ndarray) -> None:
    probabilities = softmax(logits)
    num_classes = probabilities.shape[1]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    classes, scores = top_k(probabilities, 5)
    np.testing.assert_array_equal(classes, order[:, : min(5, num_classes)])
    np.testing.assert_array_equal(scores[:, 0], confidence(probabilities))
    np.testing.assert_array_equal(scores[:, 0] - scores[:, 1], margin(probabilities))
    assert (entropy(probabilities) <= math.log(num_classes) + 1e-5).all()
    np.testing.assert_array_equal(classes[:, 0], probabilities.argmax(axis=1))


# ----------------------------------------------------------------------------- where an image may have several classes


def test_measures_of_several_classes_are_about_all_decisions() -> None:
    probabilities_NC = np.array([[0.9, 0.2, 0.6], [0.5, 1.0, 0.0]], dtype=np.float32)
    assert confidence_of_sets(probabilities_NC) == pytest.approx([0.6, 0.5])
    assert margin_of_sets(probabilities_NC) == pytest.approx([0.2, 0.0], abs=1e-6)
    expected = sum(-p * np.log(p) - (1 - p) * np.log(1 - p) for p in (0.9, 0.2, 0.6))
    assert entropy_of_sets(probabilities_NC) == pytest.approx([expected, np.log(2)], rel=1e-6)


def test_views_that_agree_about_every_class_do_not_disagree() -> None:
    one = np.array([[0.9, 0.2]], dtype=np.float32)
    assert disagreement_of_sets(np.stack([one, one])) == pytest.approx([0.0], abs=1e-7)
    certain = np.array([[[1.0, 0.0]], [[0.0, 0.0]]], dtype=np.float32)  # two views: there, and not there
    assert disagreement_of_sets(certain) == pytest.approx([np.log(2)], rel=1e-6)


def test_sigmoid_is_of_each_logit_and_rows_that_are_not_finite_are_nan() -> None:
    found = sigmoid(np.array([[0.0, 2.0, -100.0], [1.0, np.inf, 0.0]], dtype=np.float32))
    assert found[0] == pytest.approx([0.5, 1 / (1 + np.exp(-2)), 0.0], abs=1e-6)
    assert np.isnan(found[1]).all()
