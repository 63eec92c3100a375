"""A model's output as rows: what ``predictions``, ``segments`` and ``embeddings`` say about an image.

Between the stages an answer is one value per image, null where there is none; ``rows_of`` makes the rows of it.
Legend: N images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.config import Kind
from winnow.masks import box_to_source, encode_classes
from winnow.schemas import TABLES
from winnow.uncertainty import (
    confidence,
    confidence_of_sets,
    entropy,
    entropy_of_sets,
    is_answered,
    margin,
    margin_of_sets,
    top_k,
)

if TYPE_CHECKING:
    from winnow.models.predictors import MaskAnswer


def _struct(table: str, *columns: str) -> pa.StructType:
    return pa.struct([TABLES[table].field(name).with_nullable(True) for name in columns])


_PREDICTED = ("label", "confidence", "margin", "entropy", "top5", "probabilities", "classes", "disagreement")
CLASSIFICATION_ANSWER = _struct("predictions", *_PREDICTED)
"""The columns of ``predictions`` that come from the model."""

SEGMENT = _struct("segments", "label", "area_share", "confidence", "entropy", "disagreement", "box", "rle")
"""The columns of ``segments`` that come from the model; the answer for an image is a list of these."""

ANSWER_TYPES: dict[Kind, pa.DataType] = {
    "classification": CLASSIFICATION_ANSWER,
    "segmentation": pa.list_(SEGMENT),
    "embedding": pa.list_(pa.float32()),
}
"""The answer for one image, by kind of task."""

ANSWER_TABLES: dict[Kind, str] = {
    "classification": "predictions",
    "segmentation": "segments",
    "embedding": "embeddings",
}
"""The table that a kind of task is answered in."""


def classification_answers(
    probabilities_NC: NDArray[np.float32],
    classes: Sequence[str],
    *,
    store_probabilities: bool = False,
    disagreement_N: NDArray[np.float32] | None = None,
    multi_label: bool = False,
) -> pa.StructArray:
    """Label, top five, confidence, margin and entropy of every image, as ``CLASSIFICATION_ANSWER`` (N,).

    An image whose probabilities are not finite gets null.

    Args:
        probabilities_NC: float32 (N, C), rows add up to one, unless ``multi_label``.
        classes: C names.
        store_probabilities: also keep the whole vector of each image.
        disagreement_N: float32 (N,) between views, whose mean the probabilities are; None for one view.
        multi_label: an image may have several classes, each with a probability of its own. Found are those with a
            probability of at least 0.5, the likeliest first; the label is the likeliest of all, found or not, and the
            measures are about all decisions together.
    """
    if probabilities_NC.shape[1:] != (len(classes),):
        raise ValueError(f"{len(classes)} classes do not fit probabilities of shape {probabilities_NC.shape}")
    finite = is_answered(probabilities_NC)
    probabilities_NC = np.where(finite[:, None], probabilities_NC, np.float32(1.0 / len(classes)))
    num = len(probabilities_NC)
    depth = min(5, len(classes))
    best_NK, scores_NK = top_k(probabilities_NC, depth)
    names = pa.array(classes, type=pa.string())
    offsets = pa.array(np.arange(num + 1, dtype=np.int32) * depth)
    top_type = CLASSIFICATION_ANSWER.field("top5").type
    top = pa.ListArray.from_arrays(
        offsets,
        pa.StructArray.from_arrays(
            [names.take(pa.array(best_NK.reshape(-1))), pa.array(scores_NK.reshape(-1), type=pa.float32())],
            fields=list(top_type.value_type),
        ),
    ).cast(top_type)
    if store_probabilities:
        ends = pa.array(np.arange(num + 1, dtype=np.int32) * len(classes))
        vectors = pa.ListArray.from_arrays(ends, pa.array(probabilities_NC.reshape(-1), type=pa.float32()))
    else:
        vectors = pa.nulls(num, CLASSIFICATION_ANSWER.field("probabilities").type)
    measures = (confidence_of_sets, margin_of_sets, entropy_of_sets) if multi_label else (confidence, margin, entropy)
    columns = [
        names.take(pa.array(best_NK[:, 0])),
        *(pa.array(measure(probabilities_NC), type=pa.float32()) for measure in measures),
        top,
        vectors.cast(CLASSIFICATION_ANSWER.field("probabilities").type),
        _found(probabilities_NC, classes)
        if multi_label
        else pa.nulls(num, CLASSIFICATION_ANSWER.field("classes").type),
        pa.nulls(num, pa.float32()) if disagreement_N is None else pa.array(disagreement_N, type=pa.float32()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(CLASSIFICATION_ANSWER), mask=pa.array(~finite))


def _found(probabilities_NC: NDArray[np.float32], classes: Sequence[str]) -> pa.ListArray:
    """Names of the classes with a probability of at least 0.5, the likeliest first, (N,)."""
    order_NC = np.argsort(-probabilities_NC, axis=1, kind="stable")
    found_NC = np.take_along_axis(probabilities_NC, order_NC, axis=1) >= 0.5
    return pa.array(
        [[classes[place] for place in order_C[found_C]] for order_C, found_C in zip(order_NC, found_NC, strict=True)],
        CLASSIFICATION_ANSWER.field("classes").type,
    )


def segmentation_answers(
    masks: Sequence[MaskAnswer | None], classes: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> pa.ListArray:
    """The segments of every image, a list of ``SEGMENT`` per class found (N,); null where there is no mask.

    Args:
        masks: of N images.
        classes: C names.
        sizes: (width, height) of each source image, in whose pixels the boxes are.
    """
    rows: list[list[dict[str, object]] | None] = []
    for mask, size in zip(masks, sizes, strict=True):
        if mask is None:
            rows.append(None)
            continue
        height, width = mask.labels_HW.shape
        rows.append(
            [
                {
                    "label": classes[found.value],
                    "area_share": found.num_pixels / (width * height),
                    "confidence": mask.confidence_C[found.value],
                    "entropy": mask.entropy_C[found.value],
                    "disagreement": None if mask.disagreement_C is None else mask.disagreement_C[found.value],
                    "box": box_to_source(found.box, (width, height), size),
                    "rle": found.rle,
                }
                for found in encode_classes(mask.labels_HW)
            ]
        )
    return pa.array(rows, type=ANSWER_TYPES["segmentation"])


def embedding_answers(vectors_ND: NDArray[np.float32]) -> pa.ListArray:
    """The vector of every image, a list of D float32 (N,); null where it is not finite."""
    num, depth = vectors_ND.shape
    offsets = pa.array(np.arange(num + 1, dtype=np.int32) * depth)
    values = pa.array(np.ascontiguousarray(vectors_ND).reshape(-1), type=pa.float32())
    return pa.ListArray.from_arrays(offsets, values, mask=pa.array(~is_answered(vectors_ND)))


def rows_of(kind: Kind, answers: pa.Array) -> tuple[pa.Table, NDArray[np.int64]]:
    """Rows of the table ``ANSWER_TABLES[kind]`` without their keys, and the number of each row's image.

    Args:
        kind: of the task.
        answers: one per image, none of them null.
    """
    images_N = np.arange(len(answers))
    if kind == "classification":
        return pa.Table.from_struct_array(answers), images_N
    if kind == "embedding":
        return pa.table({"vector": answers}), images_N
    return pa.Table.from_struct_array(answers.flatten()), np.repeat(images_N, answers.value_lengths().to_numpy())
