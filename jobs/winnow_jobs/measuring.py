"""What the trainers share: measuring masks, and when too many images are left out.

Legend: N images, H × W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from winnow.calibration import calibration_metrics, fit_temperature
from winnow.errors import FAILURE_KINDS, StoppedError
from winnow.images import View
from winnow.masks import label_dtype, resize_to_source
from winnow.metrics import confusion, segmentation_metrics

LEAST_VAL = 50
"""Labelled images of the val split that are enough to choose by."""

LEAST_VAL_MASKS = 5
"""Masks of the val split that are enough to fit a temperature on; pixels of one image are much alike."""

_PIXELS = 200_000
"""Pixels of a split that calibration is fitted on or measured at, over all images."""

_LEAST_TO_STOP = 20
"""Images after which a share of failures means something."""

Sample = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Logits (n, C) and labels (n,)."""


def check_left_out(
    failures: Mapping[str, int], examples: Sequence[str], num_seen: int, most: float, *, what: str = "labelled images"
) -> None:
    """Stop a training that leaves out too many images for reasons of access, storage, or of their labels.

    Args:
        failures: images left out, by kind of error.
        examples: some of them, in words.
        num_seen: images seen so far.
        most: share of them that may be left out.
        what: they are.

    Raises:
        StoppedError: they are too many.
    """
    systemic = sum(count for kind, count in failures.items() if kind in FAILURE_KINDS and FAILURE_KINDS[kind].systemic)
    if num_seen >= _LEAST_TO_STOP and max(systemic, failures.get("label", 0)) > most * num_seen:
        raise StoppedError(
            f"stopped, nothing was published: {sum(failures.values()):,} of {num_seen:,} {what} could not be "
            f"used, more than max_failure_share = {most:g}: {'; '.join(examples)}. Mend that, then run the same command"
        )


class MaskMeter:
    """Answers as predict gives them, compared pixel by pixel at each image's own size.

    Args:
        view: that the network sees.
        num_classes: C.
        num_images: that will be measured.
        seed: of the pixels that calibration looks at, of each image equally many.
    """

    def __init__(self, view: View, num_classes: int, num_images: int, seed: int) -> None:
        assert view.size is not None
        self._view, self._size, self._num_classes = view, view.size, num_classes
        self._pixels_each = _PIXELS // max(1, num_images)
        self._random = np.random.default_rng(seed)
        self._total_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
        self._logits: list[NDArray[np.float32]] = [np.empty((0, num_classes), np.float32)]
        self._labels: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self.num_images = 0

    def add(self, labels_HW: NDArray[Any], logits_CHW: NDArray[np.float32]) -> None:
        """One image: its label map at its own size, and the logits of the view."""
        from winnow.models.pyramid_training import target_of

        void = int(np.iinfo(label_dtype(self._num_classes)).max)
        height, width = labels_HW.shape
        shown_width, shown_height = self._view.target(width, height)
        answer_HW = logits_CHW[:, :shown_height, :shown_width].argmax(axis=0)
        self._total_CC += confusion(labels_HW, resize_to_source(answer_HW, width, height), self._num_classes, void=void)
        target = target_of(labels_HW, (shown_width, shown_height), self._size, self._num_classes).ravel()
        labelled = np.flatnonzero(target != void)
        chosen = self._random.choice(labelled, min(len(labelled), self._pixels_each), replace=False)
        self._logits.append(logits_CHW.reshape(self._num_classes, -1)[:, chosen].T)
        self._labels.append(target[chosen].astype(np.int64))
        self.num_images += 1

    def metrics(self, classes: Sequence[str]) -> dict[str, Any]:
        """As ``segmentation_metrics`` says."""
        return segmentation_metrics(self._total_CC, classes, self.num_images)

    def sample(self) -> Sample:
        """Logits and labels of labelled pixels of the view."""
        return np.concatenate(self._logits), np.concatenate(self._labels)


def calibrate(samples: Mapping[str, Sample], *, enough: bool, what: str) -> tuple[float, dict[str, Any]]:
    """A temperature fitted on val, and what it does, by split.

    Args:
        samples: by split.
        enough: whether val has enough; else the temperature is 1.
        what: name of what it is fitted on.
    """
    temperature = fit_temperature(*samples["val"]) if enough else 1.0
    measured = {split: calibration_metrics(*sample, temperature) for split, sample in samples.items()}
    return temperature, {"fitted_on": what if enough else None, **measured}


def left_out_sentences(failures: Mapping[str, int], examples: Sequence[str]) -> list[str]:
    """What to say of the images that were left out, if any."""
    if not failures:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(failures.items()))
    return [f"{sum(failures.values()):,} labelled images could not be used ({kinds}): {'; '.join(examples)}"]


def to_safetensors(state: Mapping[str, Any]) -> bytes:
    """Tensors by key as a safetensors file, the same for the same tensors."""
    from safetensors.torch import save

    return save({key: tensor.contiguous() for key, tensor in sorted(state.items())})
