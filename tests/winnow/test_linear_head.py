from __future__ import annotations

import numpy as np
import pytest

from winnow.calibration import expected_calibration_error, fit_temperature
from winnow.errors import JobError
from winnow.models.linear_head import STRENGTHS, USUAL_STRENGTH, LinearHead, fit_linear_head
from winnow.uncertainty import softmax

C, D = 3, 8


def clouds(num: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes around three centres, far from zero and of unlike scale."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(C, D)) * 2
    labels = np.arange(num) % C
    features = (centres[labels] + spread * random.normal(size=(num, D))) * np.geomspace(1, 30, D) + 100
    return features.astype(np.float32), labels


def loss(head: LinearHead, features: np.ndarray, labels: np.ndarray) -> float:
    """What is minimised, over centred and scaled features, from the folded layer."""
    scale = np.sqrt(features.astype(np.float64).var(axis=0).mean())
    logits = features.astype(np.float64) @ head.weight_CD.T + head.bias_C
    logits -= logits.max(axis=1, keepdims=True)
    log_likelihood = logits[np.arange(len(labels)), labels] - np.log(np.exp(logits).sum(axis=1))
    return float(-log_likelihood.mean() + head.strength / 2 * np.square(head.weight_CD * scale).sum())


def test_separate_classes_are_told_apart_and_logits_are_those_of_a_float32_layer() -> None:
    features, labels = clouds(90)
    head = fit_linear_head(features, labels, C, chooser=clouds(60, seed=1))
    test, truth = clouds(300, seed=2)
    assert (head.logits(test).argmax(axis=1) == truth).mean() > 0.95
    assert head.logits(test).dtype == np.float32
    exact = test.astype(np.float64) @ head.weight_CD.T + head.bias_C
    np.testing.assert_allclose(head.logits(test), exact, atol=1e-3)


def test_the_fit_is_the_least_of_the_penalised_loss() -> None:
    features, labels = clouds(60, spread=3.0)
    head = fit_linear_head(features, labels, C)
    assert head.strength == USUAL_STRENGTH
    least = loss(head, features, labels)
    random = np.random.default_rng(0)
    for _ in range(50):
        moved = LinearHead(
            head.weight_CD * (1 + 0.02 * random.normal(size=head.weight_CD.shape)), head.bias_C, head.strength, {}
        )
        assert loss(moved, features, labels) >= least - 1e-9


def test_the_fit_agrees_with_an_independent_library() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clouds(60, spread=3.0)
    head = fit_linear_head(features, labels, C)
    scale = np.sqrt(features.astype(np.float64).var(axis=0).mean())
    standard = (features - features.mean(axis=0, dtype=np.float64)) / scale
    theirs = linear_model.LogisticRegression(C=1 / (head.strength * len(labels)), tol=1e-9, max_iter=5000)
    theirs.fit(standard, labels)
    np.testing.assert_allclose(softmax(head.logits(features)), theirs.predict_proba(standard), atol=2e-4)


def test_the_same_again_is_the_same_to_the_last_bit() -> None:
    features, labels = clouds(60)
    first, second = (fit_linear_head(features, labels, C, chooser=clouds(30, seed=1)) for _ in range(2))
    assert first.weight_CD.tobytes() == second.weight_CD.tobytes()
    assert first.bias_C.tobytes() == second.bias_C.tobytes()


def test_images_choose_the_strength() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(size=(60, D)).astype(np.float32)
    labels = np.arange(60) % C
    unrelated = random.normal(size=(60, D)).astype(np.float32)
    nothing_to_learn = fit_linear_head(noise, labels, C, chooser=(unrelated, labels))
    assert nothing_to_learn.strength in STRENGTHS[:2]
    # Weaker ones than two in a row that were worse are not tried.
    tried = list(nothing_to_learn.log_losses)
    assert tried == list(STRENGTHS[: len(tried)])
    assert len(tried) < len(STRENGTHS)
    much_to_learn = fit_linear_head(*clouds(60, spread=0.1), C, chooser=clouds(60, seed=1, spread=0.1))
    assert much_to_learn.strength == STRENGTHS[-1]
    assert much_to_learn.strength == min(much_to_learn.log_losses, key=lambda tried: much_to_learn.log_losses[tried])


def test_folds_choose_the_strength_where_no_other_images_do() -> None:
    features, labels = clouds(60, spread=0.1)
    told: list[tuple[int, int]] = []
    head = fit_linear_head(
        features, labels, C, folds_N=np.arange(60) % 5, on_fit=lambda done, total: told.append((done, total))
    )
    assert head.strength == STRENGTHS[-1]
    assert told[-1] == (5 * len(STRENGTHS) + 1, 5 * len(STRENGTHS) + 1)
    # A class of a single fold is unknown to the fit that answers that fold.
    rare = labels.copy()
    rare[labels == 2] = 0
    rare[0] = 2
    assert fit_linear_head(features, rare, C, folds_N=np.arange(60) % 5).weight_CD.shape == (C, D)


def test_the_images_that_choose_also_calibrate() -> None:
    features, labels = clouds(60, spread=4.0)
    unseen, truth = clouds(3_000, seed=2, spread=4.0)
    chooser = clouds(300, seed=1, spread=4.0)
    head = fit_linear_head(features, labels, C, chooser=chooser)
    assert head.temperature == pytest.approx(fit_temperature(head.logits(chooser[0]), chooser[1]), rel=1e-3)
    assert expected_calibration_error(softmax(head.logits(unseen) / head.temperature), truth) < 0.05
    by_folds = fit_linear_head(*chooser, C, folds_N=np.arange(300) % 5)
    assert by_folds.temperature == pytest.approx(fit_temperature(by_folds.logits(unseen), truth), rel=0.2)
    few = fit_linear_head(features, labels, C, chooser=(features[:19], labels[:19]))
    assert few.temperature is None
    # Nobody taught class 1: images of it, which are all wrong, do not make the others unsure.
    known = labels != 1
    without = fit_linear_head(features[known], labels[known], C, chooser=(features, labels)).temperature
    assert (
        without
        == fit_linear_head(features[known], labels[known], C, chooser=(features[known], labels[known])).temperature
    )
    assert fit_linear_head(features, labels, C).temperature is None


def test_a_class_without_labels_is_practically_never_answered() -> None:
    features, labels = clouds(90)
    known = labels != 1
    head = fit_linear_head(features[known], labels[known], C, chooser=(features, labels))
    probabilities = softmax(head.logits(features))
    assert probabilities[:, 1].max() < 1e-4
    assert np.isfinite(probabilities).all()


def test_features_that_never_change_do_no_harm() -> None:
    features, labels = clouds(30)
    features[:, 3] = 5.0
    assert np.isfinite(fit_linear_head(features, labels, C).weight_CD).all()
    features[:] = 5.0
    assert np.isfinite(fit_linear_head(features, labels, C).logits(features)).all()


def test_features_that_are_not_finite_are_refused() -> None:
    features, labels = clouds(30)
    features[4, 2] = np.nan
    with pytest.raises(JobError, match="NaN or infinity"):
        fit_linear_head(features, labels, C)
