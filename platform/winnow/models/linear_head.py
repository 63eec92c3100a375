"""A linear layer on frozen features: multinomial logistic regression, the same answer whenever it is fitted.

Legend: N images, D features, C classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.calibration import LEAST_IMAGES, fit_temperature
from winnow.errors import JobError

logger = logging.getLogger(__name__)

Features = NDArray[np.float32]
Labels = NDArray[np.int64]

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -7, -1))
"""L2 strengths that are tried, strongest first: 10 to 0.001."""

USUAL_STRENGTH = 0.1
"""Where nothing can choose; on real photographs the choice was 0.1 or next to it, from 100 labels to 1,751."""

_ABSENT = 10.0
"""The logit of a class without labels lies this far below the mean of the others, which lies below the highest."""

_SMALL = 10_000_000
"""Features, over all images, that one thread fits sooner than several that wait for each other after every product."""

_MAX_STEPS = 500
_TOLERANCE = 1e-5
"""Largest entry of the gradient at which a fit counts as finished; the loss is about 1."""


@dataclass(frozen=True)
class LinearHead:
    """Logits are ``features @ weight.T + bias``.

    Attributes:
        weight_CD: float64.
        bias_C: float64.
        strength: L2 strength that it was fitted with.
        log_losses: mean log-loss (nats) by strength tried, on the images that chose; empty where nothing chose.
        temperature: by which logits are to be divided, fitted on the images that chose; None where they were fewer than
            ``calibration.LEAST_IMAGES``.
    """

    weight_CD: NDArray[np.float64]
    bias_C: NDArray[np.float64]
    strength: float
    log_losses: dict[float, float]
    temperature: float | None = None

    def logits(self, features_ND: Features) -> NDArray[np.float32]:
        """Float32 (N, C), computed as a network in float32 does, up to rounding."""
        logits: NDArray[np.float32] = features_ND @ self.weight_CD.T.astype(np.float32) + self.bias_C.astype(np.float32)
        return logits


def fit_linear_head(
    features_ND: Features,
    labels_N: Labels,
    num_classes: int,
    *,
    chooser: tuple[Features, Labels] | None = None,
    folds_N: Labels | None = None,
    on_fit: Callable[[int, int], None] = lambda done, total: None,
) -> LinearHead:
    """The linear layer of least log-loss with an L2 penalty, whose strength other images choose.

    Minimises ``mean log-loss + strength / 2 · Σ weight²`` in float64, by L-BFGS; biases are not penalised. Features are
    centred and divided by one number, the root of their mean variance, so that a strength means the same for every
    backbone; both are then folded into the layer. (A divisor for each feature makes much of those that hardly change:
    .796 instead of .817 right on real photographs.) Hastie, Tibshirani & Friedman, "The Elements of Statistical
    Learning" (2009), sections 4.4 and 18.4.

    Args:
        features_ND: of the images to learn from.
        labels_N: their classes; at least two different ones.
        num_classes: C. A class without labels is answered practically never.
        chooser: features and labels of the images whose log-loss chooses the strength.
        folds_N: without a chooser, number of the fold of each image: every fold is answered by a fit on the others.
        on_fit: told how many fits are done, and of how many.

    Raises:
        JobError: the features are not finite.
    """
    if not np.isfinite(features_ND).all():
        raise JobError("the backbone answers NaN or infinity for some images; check its weights")
    num_threads = torch.get_num_threads()
    if features_ND.size <= _SMALL:
        torch.set_num_threads(1)
    try:
        return _fit(features_ND, labels_N, num_classes, chooser, folds_N, on_fit)
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
    present = np.unique(labels_N)
    plans: list[tuple[Features, Labels, Features, Labels]] = []
    if chooser is not None:
        plans.append((features_ND, labels_N, *chooser))
    elif folds_N is not None:
        for fold in np.unique(folds_N):
            rest = folds_N != fold
            if len(np.unique(labels_N[rest])) > 1:
                plans.append((features_ND[rest], labels_N[rest], features_ND[~rest], labels_N[~rest]))
    total = len(plans) * len(STRENGTHS) + 1
    judged = _judge(plans, num_classes, lambda done: on_fit(done, total))
    log_losses = {tried: _log_loss(*answers) for tried, answers in judged.items()}
    # Of equal losses the stronger penalty: dicts keep the order of STRENGTHS.
    strength = min(log_losses, key=lambda tried: log_losses[tried]) if log_losses else USUAL_STRENGTH
    temperature = None
    if strength in judged and len(judged[strength][1]) >= LEAST_IMAGES:
        temperature = fit_temperature(*judged[strength])
    path = [tried for tried in STRENGTHS if tried > strength * 1.01] + [strength]
    *_, (weight_CD, bias_C) = _path(features_ND, labels_N, num_classes, path[-3:])
    on_fit(total, total)
    logger.info("linear head: %d images, %d classes, L2 strength %g", len(labels_N), len(present), strength)
    return LinearHead(weight_CD, bias_C, strength, log_losses, temperature)


def _judge(
    plans: Sequence[tuple[Features, Labels, Features, Labels]], num_classes: int, on_fit: Callable[[int], None]
) -> dict[float, tuple[NDArray[np.float64], Labels]]:
    """Logits and labels of the images that judge, over all plans, by strength, strongest first.

    Ends when two in a row are worse than the best: weaker ones would be worse still, and take longest to fit.
    """
    paths = [_path(train_ND, train_N, num_classes, STRENGTHS) for train_ND, train_N, _, _ in plans]
    # What nobody showed, no strength can make right.
    known = [np.isin(judge_N, train_N) for _, train_N, _, judge_N in plans]
    judged: dict[float, tuple[NDArray[np.float64], Labels]] = {}
    if not any(each.any() for each in known):
        return judged
    labels_N = np.concatenate([judge_N[each] for each, (_, _, _, judge_N) in zip(known, plans, strict=True)])
    losses: list[float] = []
    done = 0
    for strength in STRENGTHS:
        logits = []
        for path, each, (_, _, judge_ND, _) in zip(paths, known, plans, strict=True):
            weight_CD, bias_C = next(path)
            logits.append(judge_ND[each] @ weight_CD.T + bias_C)
            done += 1
            on_fit(done)
        judged[strength] = np.concatenate(logits), labels_N
        losses.append(_log_loss(*judged[strength]))
        if len(losses) > 2 and min(losses) < min(losses[-2:]):
            break
    return judged


def _path(
    features_ND: Features, labels_N: Labels, num_classes: int, strengths: Sequence[float]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Weight and bias for each strength; each fit starts where the one before ended."""
    mean_D = features_ND.mean(axis=0, dtype=np.float64)
    scale = math.sqrt(features_ND.var(axis=0, dtype=np.float64).mean()) or 1.0
    standard_ND = torch.from_numpy((features_ND - mean_D) / scale)
    present, targets = np.unique(labels_N, return_inverse=True)
    targets_N = torch.from_numpy(targets.astype(np.int64))
    weight_KD = torch.zeros(len(present), features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    counts_K = torch.bincount(targets_N).to(torch.float64)
    bias_K = (counts_K / counts_K.sum()).log().requires_grad_()
    for strength in strengths:
        _minimise(standard_ND, targets_N, weight_KD, bias_K, strength)
        weight = weight_KD.detach().numpy() / scale
        bias = bias_K.detach().numpy() - weight @ mean_D
        weight_CD = np.tile(weight.mean(axis=0), (num_classes, 1))
        bias_C = np.full(num_classes, bias.mean() - _ABSENT)
        weight_CD[present], bias_C[present] = weight, bias
        yield weight_CD, bias_C


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
