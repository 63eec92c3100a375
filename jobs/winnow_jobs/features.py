"""Frozen features of images, in this process: read, decode, one pass through the backbone.

Legend: N images, D features or channels; a *map* is (D, h, w).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.errors import CallError, InferenceError, JobError
from winnow_jobs.reading import ImageReader, Read, Row, in_batches

if TYPE_CHECKING:
    from winnow.config import PredictConfig
    from winnow.models.networks import Network
    from winnow.models.references import ResolvedModel
    from winnow_connectors.object_store import ObjectStores

logger = logging.getLogger(__name__)

BATCH = 32
"""Images that are in memory as pixels at once; each thread computes a part of them."""

_FLOAT16_MOST = 65504.0


@dataclass(frozen=True)
class Featured:
    """Some images and what the backbone makes of them.

    Attributes:
        images: n images that could be read.
        features: one array (n, D), or one (n, D, h, w) per map, from fine to coarse; float32.
    """

    images: list[Read]
    features: list[NDArray[np.float32]]


class FeatureReader:
    """Reads images and computes their features, in the order asked, the same on every run.

    Args:
        model: of the backbone alone (``resolve_backbone``).
        network: that backbone, loaded; not to be used by anyone else afterwards.
        stores: access to the images.
        config: limits of reading, and the precision.
    """

    def __init__(self, model: ResolvedModel, network: Network, stores: ObjectStores, config: PredictConfig) -> None:
        import torch

        from winnow.models.predictors import predictors_of

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # As in ``stages.Infer``: each thread computes images of its own and has torch to itself.
        self._num_threads = max(1, len(os.sched_getaffinity(0))) if self.device == "cpu" else 1
        self._threads = ThreadPoolExecutor(self._num_threads, initializer=torch.set_num_threads, initargs=(1,))
        (self._predictor,) = self._threads.submit(
            lambda: predictors_of({model.id: (model, network)}, device=self.device, precision=config.precision)
        ).result()
        self.reader = ImageReader(stores, config, [model.view], num_decoders=max(1, self._num_threads // 2))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, traceback)
        self._threads.shutdown(cancel_futures=True)

    def read(self, rows: Sequence[Row], on_error: Callable[[Read], None]) -> Iterator[Featured]:
        """Images with their features; those that fail, also for features that are not finite, go to ``on_error``."""
        for batch in in_batches(self.reader.read(rows), BATCH, on_error):
            pixels_NHWC = np.stack([image.views[0] for image in batch if image.views is not None])
            parts = list(
                self._threads.map(self._features, np.array_split(pixels_NHWC, min(self._num_threads, len(batch))))
            )
            features = [np.concatenate(each) for each in zip(*parts, strict=True)]
            finite = np.logical_and.reduce(
                [np.isfinite(found).all(axis=tuple(range(1, found.ndim))) for found in features]
            )
            for index in np.flatnonzero(~finite):
                error = InferenceError("not_finite", "the backbone answered NaN or infinity for this image")
                on_error(Read(batch[index].row, error=error))
            if finite.any():
                kept = np.flatnonzero(finite)
                yield Featured([batch[index] for index in kept], [found[kept] for found in features])

    def _features(self, pixels_NHWC: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        chunks = list(self._predictor.features(pixels_NHWC))
        return [np.concatenate(each) for each in zip(*chunks, strict=True)]


class MappedArrays:
    """Arrays of as many rows as there may be images, in temporary files that memory need not hold.

    Args:
        num_rows: room for so many images.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._folder = tempfile.TemporaryDirectory(prefix="winnow-train-")
        self._arrays: list[NDArray[Any]] = []
        self.num_filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._arrays.clear()
        self._folder.cleanup()

    def append(self, rows: Sequence[NDArray[Any]]) -> None:
        """Add n rows to each array; float32 is kept as float16, held within its range.

        Raises:
            CallError: the disk has no room for all rows.
            JobError: the disk cannot be written.
        """
        if not self._arrays:
            self._allocate(rows)
        start, stop = self.num_filled, self.num_filled + len(rows[0])
        for array, values in zip(self._arrays, rows, strict=True):
            if values.dtype == np.float32:
                values = np.clip(values, -_FLOAT16_MOST, _FLOAT16_MOST)
            array[start:stop] = values
        self.num_filled = stop

    def arrays(self) -> list[NDArray[Any]]:
        """The rows filled so far, of every array."""
        return [array[: self.num_filled] for array in self._arrays]

    def _allocate(self, rows: Sequence[NDArray[Any]]) -> None:
        kinds = [np.dtype(np.float16) if values.dtype == np.float32 else values.dtype for values in rows]
        shapes = [(self._num_rows, *values.shape[1:]) for values in rows]
        sizes = [int(np.prod(shape)) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        logger.info("%.1f GB of features and targets go to %s", sum(sizes) / 1e9, self._folder.name)
        for number, (shape, kind, size) in enumerate(zip(shapes, kinds, sizes, strict=True)):
            path = Path(self._folder.name) / f"{number}.bin"
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash later
            except OSError as error:
                needed = f"{sum(sizes) / 1e9:.1f} GB of features of {self._num_rows:,} images"
                if error.errno in (28, 122):  # ENOSPC, EDQUOT
                    raise CallError(
                        f"{self._folder.name} has no room for {needed}; set TMPDIR to a larger disk, give fewer labels "
                        "with --limit-labels, or make the task's size smaller"
                    ) from None
                raise JobError(f"{self._folder.name} cannot hold {needed}: {error}") from None
            self._arrays.append(np.memmap(path, dtype=kind, mode="r+", shape=shape))
