"""A linear layer on frozen features: logistic regression and discriminant analysis, in shares that other images choose.

Images without labels help: they tell in which directions features vary (``emphasis``). The same answer whenever it is
fitted. Legend: N images, D features, C classes, of which K have labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.calibration import LEAST_IMAGES, fit_temperature
from winnow.errors import JobError
from winnow.models.networks import RMS_EPSILON

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Logits = NDArray[np.float64]
Layer = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weight (C, D) and bias (C,)."""

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -7, -1))
"""L2 strengths that are tried, strongest first: 10 to 0.001."""

USUAL_STRENGTH = 0.1
"""Where nothing can choose; on real photographs the choice was 0.1 or next to it, from 100 labels to 1,751."""

SHRINKAGES = (0.99, 0.97, 0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2)
"""How far the covariance within classes is shrunk towards a multiple of the identity, strongest first."""

SHARES = (0.25, 0.5, 0.75)
"""Shares of discriminant analysis that are tried, besides none."""

EMPHASIS = 0.5
"""How much is made of the directions in which features vary much; docs/benchmarks.md compares powers."""

_ABSENT = 10.0
"""The logit of a class without labels lies this far below the mean of the others, which lies below the highest."""

_SMALL = 10_000_000
"""Features, over all images, that one thread fits sooner than several that wait for each other after every product."""

_AT_ONCE = 8192
"""Images whose features are held in float64 while their covariance is added up."""

_MAX_STEPS = 500
_TOLERANCE = 1e-5
"""Largest entry of the gradient at which a fit counts as finished; the loss is about 1."""


@dataclass(frozen=True)
class LinearHead:
    """Logits are ``features @ weight.T + bias``.

    Attributes:
        weight_CD: float64.
        bias_C: float64.
        strength: L2 strength of the regression.
        log_losses: mean log-loss (nats) by strength tried, of calibrated answers on the images that chose; empty where
            nothing chose.
        temperature: by which logits are to be divided, fitted on the images that chose; None where they were fewer than
            ``calibration.LEAST_IMAGES``.
        share: of discriminant analysis in the layer, in [0, 1).
        shrinkage: of its covariance; None where it has no share.
        log_loss: as above, of the layer itself; None where nothing chose.
        emphasised: directions in which images vary were emphasised.
    """

    weight_CD: NDArray[np.float64]
    bias_C: NDArray[np.float64]
    strength: float
    log_losses: dict[float, float]
    temperature: float | None = None
    share: float = 0.0
    shrinkage: float | None = None
    log_loss: float | None = None
    emphasised: bool = False

    def logits(self, features_ND: Features) -> NDArray[np.float32]:
        """Float32 (N, C), computed as a network in float32 does, up to rounding."""
        logits: NDArray[np.float32] = features_ND @ self.weight_CD.T.astype(np.float32) + self.bias_C.astype(np.float32)
        return logits


def rms_norm(features_ND: Features) -> Features:
    """Features scaled image by image to a mean square of 1, float32 (N, D): what ``networks.RmsLinear`` learns from."""
    squares_N1 = np.square(features_ND, dtype=np.float32).mean(axis=1, keepdims=True, dtype=np.float32)
    scaled: Features = features_ND / np.sqrt(squares_N1 + np.float32(RMS_EPSILON))
    return scaled


def emphasis(features_ND: Features, power: float = EMPHASIS) -> NDArray[np.float64]:
    """Features times this matrix weigh more in the directions in which these images vary more.

    It is ``(S / s)^(power / 2)`` for their covariance S and its largest eigenvalue s, so that 0 changes nothing. A
    penalty on weights then holds back what few images could tell anyway: a kernel whose spectrum was changed by images
    with and without labels (Chapelle, Weston & Schölkopf, "Cluster Kernels for Semi-Supervised Learning" (2002)).

    Args:
        features_ND: of at least one image, finite.
        power: of the covariance.

    Returns:
        Float64 (D, D), symmetric; the identity where all images are the same.
    """
    depth = features_ND.shape[1]
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    scatter_DD = torch.zeros(depth, depth, dtype=torch.float64)
    for start in range(0, len(features_ND), _AT_ONCE):
        centred_ND = torch.from_numpy(features_ND[start : start + _AT_ONCE] - mean_D)
        scatter_DD += centred_ND.T @ centred_ND
    values_D, vectors_DD = torch.linalg.eigh(scatter_DD)
    largest = float(values_D[-1])
    if largest <= 0:  # all images are the same
        return np.eye(depth)
    scales_D = (values_D / largest).clamp(min=0) ** (power / 2)
    found: NDArray[np.float64] = ((vectors_DD * scales_D) @ vectors_DD.T).numpy()
    return found


def fit_linear_head(
    features_ND: Features,
    labels_N: Labels,
    num_classes: int,
    *,
    chooser: tuple[Features, Labels] | None = None,
    folds_N: Labels | None = None,
    shown_ND: Features | None = None,
    on_fit: Callable[[int, int], None] = lambda done, total: None,
) -> LinearHead:
    """The linear layer of least log-loss on other images: logistic regression with a share of discriminant analysis.

    The regression minimises ``mean log-loss + strength / 2 · Σ weight²`` in float64, by L-BFGS; biases are not
    penalised. Features are centred and divided by one number, the root of their mean variance, so that a strength means
    the same for every backbone; both are then folded into the layer. (A divisor for each feature makes much of those
    that hardly change: .796 instead of .817 right on real photographs.) Hastie, Tibshirani & Friedman, "The Elements of
    Statistical Learning" (2009), sections 4.4 and 18.4.

    Linear discriminant analysis assumes more, which is of help while labels are few (Ng & Jordan, "On Discriminative
    vs. Generative Classifiers" (2001)). Both err differently, so their calibrated logits are averaged, which is again a
    linear layer: the logarithmic opinion pool (Heskes, "Selecting Weighting Factors in Logarithmic Opinion Pools"
    (1997)). Strength, then shrinkage and share, are those of least log-loss, each with its best temperature; so is,
    last, whether directions are emphasised.

    Args:
        features_ND: of the images to learn from.
        labels_N: their classes; at least two different ones.
        num_classes: C. A class without labels is answered practically never.
        chooser: features and labels of the images whose log-loss chooses.
        folds_N: without a chooser, number of the fold of each image: every fold is answered by a fit on the others.
        shown_ND: features of all images that there are, with or without labels: directions in which they vary are
            emphasised, which is folded into the layer as well, unless the images that choose are better answered
            without. None: no direction is.
        on_fit: told how many fits are done, and of how many.

    Raises:
        JobError: the features are not finite.
    """
    if not np.isfinite(features_ND).all():
        raise JobError("the backbone answers NaN or infinity for some images; check its weights")
    num_threads = torch.get_num_threads()
    if max(features_ND.size, 0 if shown_ND is None else shown_ND.size) <= _SMALL:
        torch.set_num_threads(1)
    try:
        if shown_ND is None:
            return _fit(features_ND, labels_N, num_classes, chooser, folds_N, on_fit)
        emphasis_DD = emphasis(shown_ND)
        emphasised = _fit(
            (features_ND @ emphasis_DD).astype(np.float32),
            labels_N,
            num_classes,
            chooser and ((chooser[0] @ emphasis_DD).astype(np.float32), chooser[1]),
            folds_N,
            lambda done, total: on_fit(done, 2 * total),
        )
        emphasised = replace(emphasised, weight_CD=emphasised.weight_CD @ emphasis_DD, emphasised=True)
        if emphasised.log_loss is None:
            on_fit(1, 1)
            return emphasised
        plain = _fit(
            features_ND, labels_N, num_classes, chooser, folds_N, lambda done, total: on_fit(total + done, 2 * total)
        )
        assert plain.log_loss is not None
        return plain if plain.log_loss < emphasised.log_loss else emphasised
    finally:
        torch.set_num_threads(num_threads)


def _fit(
    features_ND: Features,
    labels_N: Labels,
    num_classes: int,
    chooser: tuple[Features, Labels] | None,
    folds_N: Labels | None,
    on_fit: Callable[[int, int], None],
) -> LinearHead:
    plans = _plans(features_ND, labels_N, chooser, folds_N)
    judges_N = np.concatenate([np.empty(0, np.int64), *(plan[3] for plan in plans)])
    total = len(plans) * len(STRENGTHS) + 1
    log_losses: dict[float, float] = {}
    chosen = _Chosen(math.inf, 1.0, np.empty((0, num_classes)))
    strength = USUAL_STRENGTH
    regressions = partial(_regressions, num_classes=num_classes, strengths=STRENGTHS)
    for tried, logits in zip(STRENGTHS, _asked(plans, regressions), strict=False):
        found = _calibrated(logits, judges_N)
        log_losses[tried] = found.log_loss
        on_fit(len(log_losses) * len(plans), total)
        if found.log_loss < chosen.log_loss:  # of equal losses the stronger penalty
            strength, chosen = tried, found
        # Weaker ones would be worse still, and take longest to fit.
        if len(log_losses) > 2 and chosen.log_loss < min(list(log_losses.values())[-2:]):
            break
    share, shrinkage, ratio = 0.0, None, 1.0
    temperature = chosen.temperature
    if len(judges_N) >= LEAST_IMAGES:
        regression = chosen
        analyses = partial(_analyses, num_classes=num_classes, shrinkages=SHRINKAGES)
        for tried, logits in zip(SHRINKAGES, _asked(plans, analyses), strict=False):
            analysis = _calibrated(logits, judges_N)
            for part in SHARES:
                found = _calibrated((1 - part) * regression.logits_NC + part * analysis.logits_NC, judges_N)
                if found.log_loss < chosen.log_loss:
                    share, shrinkage, chosen = part, tried, found
                    ratio = regression.temperature / analysis.temperature
                    temperature = regression.temperature * found.temperature
    path = [tried for tried in STRENGTHS if tried > strength * 1.01] + [strength]
    *_, (weight_CD, bias_C) = _regressions(features_ND, labels_N, num_classes=num_classes, strengths=path[-3:])
    if shrinkage is not None:
        # Brought to the scale of the regression.
        ((other_CD, other_C),) = _analyses(features_ND, labels_N, num_classes=num_classes, shrinkages=[shrinkage])
        weight_CD = (1 - share) * weight_CD + share * ratio * other_CD
        bias_C = (1 - share) * bias_C + share * ratio * other_C
    present = np.unique(labels_N)
    bias_C[np.setdiff1d(np.arange(num_classes), present)] -= _ABSENT * max(0.0, temperature - 1)
    on_fit(total, total)
    logger.info(
        "linear head: %d images, %d classes, L2 strength %g, share of discriminant analysis %g",
        len(labels_N),
        len(present),
        strength,
        share,
    )
    return LinearHead(
        weight_CD,
        bias_C,
        strength,
        log_losses,
        temperature if len(judges_N) >= LEAST_IMAGES else None,
        share,
        shrinkage,
        chosen.log_loss if log_losses else None,
    )


@dataclass(frozen=True)
class _Chosen:
    """Logits divided by the temperature, which makes their log-loss the least."""

    log_loss: float
    temperature: float
    logits_NC: Logits


def _calibrated(logits_NC: Logits, labels_N: Labels) -> _Chosen:
    temperature = fit_temperature(logits_NC, labels_N)
    logits_NC = logits_NC / temperature
    return _Chosen(_log_loss(logits_NC, labels_N), temperature, logits_NC)


Plan = tuple[Features, Labels, Features, Labels]
"""Images that teach, and images that judge."""


def _plans(
    features_ND: Features, labels_N: Labels, chooser: tuple[Features, Labels] | None, folds_N: Labels | None
) -> list[Plan]:
    plans: list[Plan] = []
    if chooser is not None:
        plans.append((features_ND, labels_N, *chooser))
    elif folds_N is not None:
        for fold in np.unique(folds_N):
            rest = folds_N != fold
            if len(np.unique(labels_N[rest])) > 1:
                plans.append((features_ND[rest], labels_N[rest], features_ND[~rest], labels_N[~rest]))
    # What nobody showed, no fit can make right.
    known = [np.isin(judge_N, train_N) for _, train_N, _, judge_N in plans]
    return [(*plan[:2], plan[2][each], plan[3][each]) for plan, each in zip(plans, known, strict=True) if each.any()]


def _asked(plans: Sequence[Plan], fits: Callable[[Features, Labels], Iterator[Layer]]) -> Iterator[Logits]:
    """Logits of all images that judge, of one setting after the other."""
    for layers in zip(*(fits(train_ND, train_N) for train_ND, train_N, _, _ in plans), strict=True):
        yield np.concatenate(
            [
                judge_ND @ weight_CD.T + bias_C
                for (weight_CD, bias_C), (_, _, judge_ND, _) in zip(layers, plans, strict=True)
            ]
        )


def _regressions(
    features_ND: Features, labels_N: Labels, *, num_classes: int, strengths: Sequence[float]
) -> Iterator[Layer]:
    """Logistic regression for each strength; each fit starts where the one before ended.

    The penalised weights are sums of images, so with fewer images than features there are only as many unknowns: the
    images' coordinates in the space that they span (Hastie, Tibshirani & Friedman (2009), section 18.3.5).
    """
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    scale = math.sqrt(features_ND.var(axis=0, dtype=np.float64).mean()) or 1.0
    standard_ND = torch.from_numpy((features_ND - mean_D) / scale)
    basis_DR = None
    if len(standard_ND) < standard_ND.shape[1]:
        basis_DR = torch.linalg.qr(standard_ND.T).Q
        standard_ND = standard_ND @ basis_DR
    present, targets = np.unique(labels_N, return_inverse=True)
    targets_N = torch.from_numpy(targets.astype(np.int64))
    weight_KR = torch.zeros(len(present), standard_ND.shape[1], dtype=torch.float64, requires_grad=True)
    counts_K = torch.bincount(targets_N).to(torch.float64)
    bias_K = (counts_K / counts_K.sum()).log().requires_grad_()
    for strength in strengths:
        _minimise(standard_ND, targets_N, weight_KR, bias_K, strength)
        weight_KD = weight_KR.detach() if basis_DR is None else weight_KR.detach() @ basis_DR.T
        weight = weight_KD.numpy() / scale
        yield _with_absent(weight, bias_K.detach().numpy() - weight @ mean_D, present, num_classes)


def _analyses(
    features_ND: Features, labels_N: Labels, *, num_classes: int, shrinkages: Sequence[float]
) -> Iterator[Layer]:
    """Linear discriminant analysis for each shrinkage s of the covariance S within classes.

    It becomes ``(1 - s) S + s tr(S) / D I``: Friedman, "Regularized Discriminant Analysis" (1989), for one covariance;
    Hastie, Tibshirani & Friedman (2009), section 4.3. Solved with as many unknowns as there are images or features,
    whichever are fewer (Woodbury).
    """
    present, classes_N = np.unique(labels_N, return_inverse=True)
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    centred_ND = features_ND - mean_D
    means_KD = np.stack([centred_ND[classes_N == number].mean(axis=0) for number in range(len(present))])
    priors_K = np.log(np.bincount(classes_N) / len(classes_N))
    rest_ND = torch.from_numpy(centred_ND - means_KD[classes_N])
    num_images, depth = rest_ND.shape
    spread = float(rest_ND.square().mean()) or 1.0
    if num_images > depth:
        rest_ND = torch.linalg.qr(rest_ND, mode="r").R  # the same scatter in fewer rows
    gram = rest_ND @ rest_ND.T
    means = torch.from_numpy(means_KD)
    across = rest_ND @ means.T
    for shrinkage in shrinkages:
        ridge = num_images * shrinkage * spread / (1 - shrinkage)
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=torch.float64))
        explained = torch.cholesky_solve(across, factor).T @ rest_ND
        weight_KD = ((means - explained) / (shrinkage * spread)).numpy()
        half_K = (weight_KD * means_KD).sum(axis=1) / 2
        bias_K = priors_K - half_K - weight_KD @ mean_D
        yield _with_absent(weight_KD, bias_K, present, num_classes, below=_ABSENT * max(1.0, float(half_K.mean())))


def _with_absent(
    weight_KD: NDArray[np.float64],
    bias_K: NDArray[np.float64],
    present: Labels,
    num_classes: int,
    below: float = _ABSENT,
) -> Layer:
    """A layer for all classes; those without labels lie below the mean of the others."""
    weight_CD = np.tile(weight_KD.mean(axis=0), (num_classes, 1))
    bias_C = np.full(num_classes, bias_K.mean() - below)
    weight_CD[present], bias_C[present] = weight_KD, bias_K
    return weight_CD, bias_C


def _minimise(standard_ND: Tensor, targets_N: Tensor, weight_KD: Tensor, bias_K: Tensor, strength: float) -> None:
    """L-BFGS with a strong Wolfe line search (Nocedal & Wright 2006, chapter 7), in place."""
    optimiser = torch.optim.LBFGS(
        [weight_KD, bias_K],
        max_iter=_MAX_STEPS,
        max_eval=2 * _MAX_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits_NK = torch.addmm(bias_K, standard_ND, weight_KD.T)
        value = torch.nn.functional.cross_entropy(logits_NK, targets_N) + strength / 2 * weight_KD.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]


def _log_loss(logits_NC: NDArray[np.float64], labels_N: Labels) -> float:
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits_NC), torch.from_numpy(labels_N)))
