"""How good answers are: plain dicts of numbers that fit on a model's card.

Shapes: ``labels_N`` int64 (N,), class indices; ``probabilities_NC`` float (N, C); ``confusion_CC`` int64 (C, C), true
class by row, answered class by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-15
"""Probabilities below this count as this in the logarithm, so that one sure mistake does not make the loss infinite."""

Counts = NDArray[np.int64]


def classification_metrics(
    labels_N: Counts, probabilities_NC: NDArray[np.floating[Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, macro F1, log-loss (nats), per class precision, recall and F1, and the confusions.

    A class counts in macro F1 when it is the label or the answer of an image. ``confusion`` holds, for each label, how
    often each answer was given to it, without zeros. Of no images there is only ``n``.

    Formulas: Manning, Raghavan & Schütze, "Introduction to Information Retrieval" (2008), sections 8.3 and 13.6.
    """
    if not len(labels_N):
        return {"n": 0}
    answers_N = probabilities_NC.argmax(axis=1)
    confusion_CC = confusion(labels_N, answers_N, len(classes))
    right_C, labelled_C, answered_C = np.diag(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    f1_C = _ratio(2 * right_C, labelled_C + answered_C)
    precision_C, recall_C = _ratio(right_C, answered_C), _ratio(right_C, labelled_C)
    return {
        "n": len(labels_N),
        "accuracy": float(right_C.sum() / len(labels_N)),
        "macro_f1": float(np.nanmean(f1_C)),
        "log_loss": log_loss(labels_N, probabilities_NC),
        "classes": {
            name: {
                "n": int(labelled_C[index]),
                "precision": _number(precision_C[index]),
                "recall": _number(recall_C[index]),
                "f1": _number(f1_C[index]),
            }
            for index, name in enumerate(classes)
        },
        "confusion": {
            name: {classes[other]: int(row[other]) for other in np.flatnonzero(row)}
            for name, row in zip(classes, confusion_CC, strict=True)
            if row.any()
        },
    }


def log_loss(labels_N: Counts, probabilities_NC: NDArray[np.floating[Any]]) -> float:
    """Mean of -ln of the probability that the true class got, in nats."""
    of_labels_N = probabilities_NC[np.arange(len(labels_N)), labels_N].astype(np.float64)
    return float(-np.log(np.clip(of_labels_N, _LEAST, 1.0)).mean())


def segmentation_metrics(confusion_CC: Counts, classes: Sequence[str], num_images: int) -> dict[str, Any]:
    """Mean IoU, pixel accuracy, and per class IoU and labelled pixels, of label maps added up over all images.

    ``IoU = right / (labelled + answered - right)``; a class that neither has nor got a pixel does not count in the
    mean (Everingham et al., "The Pascal Visual Object Classes Challenge" (2015), section 4.4). Of no images there is
    only ``n``.
    """
    if not num_images or not confusion_CC.sum():
        return {"n": num_images}
    right_C, labelled_C, answered_C = np.diag(confusion_CC), confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    iou_C = _ratio(right_C, labelled_C + answered_C - right_C)
    return {
        "n": num_images,
        "mean_iou": float(np.nanmean(iou_C)),
        "pixel_accuracy": float(right_C.sum() / confusion_CC.sum()),
        "classes": {
            name: {"pixels": int(labelled_C[index]), "iou": _number(iou_C[index])} for index, name in enumerate(classes)
        },
    }


def confusion(labels: NDArray[Any], answers: NDArray[Any], num_classes: int, *, void: int | None = None) -> Counts:
    """How often each true class (row) got each answer (column), int64 (C, C).

    Args:
        labels: class indices, of any shape.
        answers: likewise.
        num_classes: C.
        void: the label of what nobody said anything about, which does not count.
    """
    if void is not None:
        known = labels != void
        labels, answers = labels[known], answers[known]
    pairs = labels.astype(np.int64) * num_classes + answers
    return np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def _ratio(above_C: Counts, below_C: Counts) -> NDArray[np.float64]:
    """NaN where nothing can be said."""
    return np.asarray(np.divide(above_C, below_C, out=np.full(len(above_C), np.nan), where=below_C > 0))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
