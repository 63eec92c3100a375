from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.calibration import expected_calibration_error, fit_temperature
from winnow.errors import JobError
from winnow.metrics import log_loss
from winnow.models.linear_head import (
    EMPHASIS,
    SHARES,
    SHRINKAGES,
    STRENGTHS,
    USUAL_STRENGTH,
    LinearHead,
    _analyses,
    emphasis,
    fit_linear_head,
    rms_norm,
)
from winnow.models.networks import RmsLinear
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


@pytest.mark.parametrize("num", [60, 6], ids=["more images than features", "fewer images than features"])
def test_the_fit_agrees_with_an_independent_library(num: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clouds(num, spread=3.0)
    head = fit_linear_head(features, labels, C)
    scale = np.sqrt(features.astype(np.float64).var(axis=0).mean())
    standard = (features - features.mean(axis=0, dtype=np.float64)) / scale
    theirs = linear_model.LogisticRegression(C=1 / (head.strength * len(labels)), tol=1e-9, max_iter=5000)
    theirs.fit(standard, labels)
    np.testing.assert_allclose(softmax(head.logits(features)), theirs.predict_proba(standard), atol=2e-4)
    others, _ = clouds(30, seed=1, spread=3.0)
    standard = (others - features.mean(axis=0, dtype=np.float64)) / scale
    np.testing.assert_allclose(softmax(head.logits(others)), theirs.predict_proba(standard), atol=2e-4)


@pytest.mark.parametrize("num", [60, 6])
def test_the_analysis_agrees_with_an_independent_library(num: int) -> None:
    """With more images than features, and with fewer."""
    analysis = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
    features, labels = clouds(num, spread=3.0)
    unseen, _ = clouds(90, seed=1, spread=3.0)
    shrinkages = (0.9, 0.3)
    for shrinkage, (weight, bias) in zip(
        shrinkages, _analyses(features, labels, num_classes=C, shrinkages=shrinkages), strict=True
    ):
        theirs = analysis(solver="lsqr", shrinkage=shrinkage).fit(features.astype(np.float64), labels)
        np.testing.assert_allclose(softmax(unseen @ weight.T + bias), theirs.predict_proba(unseen), atol=1e-5)


def related(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of many features that vary together, as discriminant analysis assumes it."""
    random = np.random.default_rng(seed)
    fixed = np.random.default_rng(7)
    mixing = fixed.normal(size=(40, 40)) * np.geomspace(3, 0.2, 40)
    centres = 0.4 * fixed.normal(size=(C, 40)) @ mixing.T
    labels = np.arange(num) % C
    return (centres[labels] + random.normal(size=(num, 40)) @ mixing.T).astype(np.float32), labels


def test_a_share_of_analysis_is_taken_where_it_helps_and_the_layer_is_what_was_chosen() -> None:
    features, labels = related(60, seed=0)
    chooser = related(200, seed=1)
    head = fit_linear_head(features, labels, C, chooser=chooser)
    assert head.share in SHARES
    assert head.shrinkage in SHRINKAGES
    assert head.log_loss is not None
    assert head.temperature is not None
    assert head.log_loss < min(head.log_losses.values())
    probabilities = softmax(head.logits(chooser[0]) / head.temperature)
    assert log_loss(chooser[1], probabilities) == pytest.approx(head.log_loss, abs=1e-4)
    # Too few images to calibrate on: regression alone.
    few = fit_linear_head(features, labels, C, chooser=(chooser[0][:19], chooser[1][:19]))
    assert (few.share, few.shrinkage, few.temperature) == (0.0, None, None)
    # One image of a class each has no spread, and no harm is done.
    assert np.isfinite(fit_linear_head(features[:3], labels[:3], C, chooser=chooser).weight_CD).all()


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
    assert head.temperature is not None
    probabilities = softmax(head.logits(features) / head.temperature)
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


# -------------------------------------------------------------------------------------------- what needs no labels


def test_emphasis_is_a_power_of_the_covariance_and_zero_changes_nothing() -> None:
    features, _ = clouds(200)
    np.testing.assert_allclose(emphasis(features, 0.0), np.eye(D), atol=1e-12)
    found = emphasis(features)
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    covariance = np.cov(features.astype(np.float64).T, bias=True)
    largest = np.linalg.eigvalsh(covariance)[-1]
    np.testing.assert_allclose(
        np.linalg.matrix_power(found, round(2 / EMPHASIS)), covariance / largest, atol=1e-9, err_msg="S / s"
    )
    # Added up in parts as at once.
    many, _ = clouds(20_000)
    scatter = np.cov(many.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(emphasis(many, 2.0), scatter / np.linalg.eigvalsh(scatter)[-1], atol=1e-9)
    # Images that are all the same have no directions.
    np.testing.assert_array_equal(emphasis(np.full((5, D), 3.0, np.float32)), np.eye(D))


def varied(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that differ where all images vary most, in 6 directions of 200."""
    fixed = np.random.default_rng(3)
    directions = np.linalg.qr(fixed.normal(size=(200, 6)))[0]
    centres = fixed.normal(size=(C, 6)) * 1.6
    random = np.random.default_rng(seed)
    labels = np.arange(num) % C
    inside = centres[labels] + random.normal(size=(num, 6))
    return (inside @ directions.T + 0.7 * random.normal(size=(num, 200))).astype(np.float32), labels


def test_an_emphasised_head_answers_plain_features_as_it_was_fitted_on_emphasised_ones() -> None:
    features, labels = varied(30, seed=0)
    chooser = varied(60, seed=1)
    shown, _ = varied(1_000, seed=2)
    directions = emphasis(shown)
    plain = fit_linear_head(features, labels, C, chooser=chooser)
    assert plain.log_loss is not None
    told: list[tuple[int, int]] = []
    head = fit_linear_head(
        features,
        labels,
        C,
        chooser=chooser,
        shown_ND=shown,
        on_fit=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    turned = fit_linear_head(
        (features @ directions).astype(np.float32),
        labels,
        C,
        chooser=((chooser[0] @ directions).astype(np.float32), chooser[1]),
    )
    assert head.emphasised
    assert head.log_loss == turned.log_loss < plain.log_loss
    assert (head.strength, head.share, head.temperature) == (turned.strength, turned.share, turned.temperature)
    unseen, _ = varied(90, seed=3)
    expected = turned.logits((unseen @ directions).astype(np.float32))
    np.testing.assert_allclose(head.logits(unseen), expected, atol=1e-3)


def test_directions_are_not_emphasised_where_the_images_that_choose_say_so() -> None:
    """The classes differ in a feature that hardly varies, and the loud ones tell nothing."""

    def images(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        labels = np.arange(num) % C
        features = random.normal(size=(num, D)) * 30
        features[:, 0] = labels + 0.2 * random.normal(size=num)
        return features.astype(np.float32), labels

    features, labels = images(60, seed=0)
    chooser = images(60, seed=1)
    shown = np.concatenate([features, chooser[0]])
    head = fit_linear_head(features, labels, C, chooser=chooser, shown_ND=shown)
    plain = fit_linear_head(features, labels, C, chooser=chooser)
    assert not head.emphasised
    assert head.weight_CD.tobytes() == plain.weight_CD.tobytes()
    # Where nothing can choose, they are.
    told: list[tuple[int, int]] = []
    alone = fit_linear_head(features, labels, C, shown_ND=shown, on_fit=lambda done, total: told.append((done, total)))
    assert alone.emphasised
    assert told[-1][0] == told[-1][1]


def test_images_without_labels_make_few_labels_worth_more() -> None:
    unlabelled, _ = varied(1_000, seed=50)
    unseen, truth = varied(3_000, seed=51)
    gains = []
    for seed in range(5):
        features, labels = varied(15, seed=seed)
        chooser = varied(60, seed=seed + 10)
        seen = np.concatenate([features, chooser[0], unlabelled])
        plain, helped = (
            fit_linear_head(features, labels, C, chooser=chooser, shown_ND=shown) for shown in (None, seen)
        )
        right = [(head.logits(unseen).argmax(axis=1) == truth).mean() for head in (plain, helped)]
        gains.append(right[1] - right[0])
    assert min(gains) > 0
    assert np.mean(gains) > 0.03


def test_a_head_is_the_same_with_any_number_of_threads() -> None:
    features, labels = varied(200, seed=0)
    shown, _ = varied(2_000, seed=2)
    threads = torch.get_num_threads()
    found = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            found.append(fit_linear_head(features, labels, C, shown_ND=shown).weight_CD.tobytes())
            assert torch.get_num_threads() == num
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_features_are_scaled_as_the_network_scales_them() -> None:
    features = np.random.default_rng(0).normal(5, 3, size=(20, D)).astype(np.float32)
    features[3] = 0.0  # no feature was excited: no direction, and no harm
    scaled = rms_norm(features)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(np.square(scaled).mean(axis=1)[4:], 1.0, atol=1e-5)
    module = RmsLinear(D, C)
    with torch.inference_mode():
        np.testing.assert_allclose(module.scale(torch.from_numpy(features)).numpy(), scaled, atol=1e-6)
        brighter = module(torch.from_numpy(features[4:] * 7)).numpy()
        np.testing.assert_allclose(brighter, module(torch.from_numpy(features[4:])).numpy(), atol=1e-5)
