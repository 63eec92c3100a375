"""A model's output as rows: what ``predictions`` says about an image.

Legend: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.schemas import TABLES
from winnow.uncertainty import confidence, entropy, is_answered, margin, top_k

_COLUMNS = ("label", "confidence", "margin", "entropy", "top5", "probabilities")

CLASSIFICATION_ANSWER = pa.struct([TABLES["predictions"].field(name).with_nullable(True) for name in _COLUMNS])
"""The columns of ``predictions`` that come from the model."""


def classification_answers(
    probabilities_NC: NDArray[np.float32], classes: Sequence[str], *, store_probabilities: bool = False
) -> pa.StructArray:
    """Label, top five, confidence, margin and entropy of every image, as ``CLASSIFICATION_ANSWER`` (N,).

    An image whose probabilities are not finite gets null.

    Args:
        probabilities_NC: float32 (N, C), rows add up to one.
        classes: C names.
        store_probabilities: also keep the whole vector of each image.
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
    columns = [
        names.take(pa.array(best_NK[:, 0])),
        pa.array(confidence(probabilities_NC), type=pa.float32()),
        pa.array(margin(probabilities_NC), type=pa.float32()),
        pa.array(entropy(probabilities_NC), type=pa.float32()),
        top,
        vectors.cast(CLASSIFICATION_ANSWER.field("probabilities").type),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(CLASSIFICATION_ANSWER), mask=pa.array(~finite))
