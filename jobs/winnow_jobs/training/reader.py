"""The stage of Ray Data that makes batches for training: read, decode, augment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.augment import Policy
from winnow.errors import AugmentError
from winnow.masks import label_dtype
from winnow_connectors.object_store import ObjectStores
from winnow_jobs.labelled import LabelledImages
from winnow_jobs.mask_labels import read_masks
from winnow_jobs.reading import ImageReader, Read
from winnow_jobs.training.spec import FineTuneSpec, sampling_weights, targets_of


class ReadForTraining:
    """Chunks of an epoch to pixels and targets: a batch of ``stop - start`` rows each, in order.

    Rows that could not be read, and those behind the last image, are not ``valid``; their pixels are 0.

    Args:
        spec: what the training does.
        rows: reference to the labelled images.
        stores: access to them.
        num_decoders: decoder processes.
    """

    def __init__(self, spec: FineTuneSpec, rows: Any, stores: ObjectStores, num_decoders: int) -> None:
        import ray

        labelled = LabelledImages(ray.get(rows))
        self._spec = spec
        self._rows = {split: labelled.of(split) for split in ("train", "val")}
        self._targets = targets_of(spec, self._rows["train"])
        self._reader = ImageReader(stores, spec.reading, [spec.start.view], num_decoders=num_decoders)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __call__(self, chunks: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        for split, epoch, start, stop in zip(
            *(chunks[key] for key in ("split", "epoch", "start", "stop")), strict=True
        ):
            yield self._chunk(str(split), int(epoch), int(start), int(stop))

    def _chunk(self, split: str, epoch: int, start: int, stop: int) -> dict[str, NDArray[Any]]:
        spec, view = self._spec, self._spec.start.view
        assert view.size is not None
        if split == "train":
            places = self._order_of(epoch)[start:stop]
        else:
            places = np.arange(start, min(stop, self._rows["val"].num_rows))
        rows = self._rows[split].take(pa.array(places)).to_pylist()
        num = stop - start
        target_shape = {"class": (), "classes": (len(spec.classes),), "mask": view.size}[spec.target]
        target_type = {"class": np.int64, "classes": np.float32, "mask": label_dtype(len(spec.classes))}[spec.target]
        found: dict[str, NDArray[Any]] = {
            "pixels": np.zeros((num, *view.size, 3), dtype=np.uint8),
            "target": np.zeros((num, *target_shape), dtype=target_type),
            "valid": np.zeros(num, dtype=np.bool_),
            "position": np.full(num, -1, dtype=np.int64),
            "error": np.full(num, "", dtype=object),
        }
        found["position"][: len(places)] = places
        images = list(self._reader.read(rows))
        for index, image in enumerate(images):
            if image.error is not None:
                found["error"][index] = f"{image.error.kind}\n{image.row['uri']}: {image.error.message}"
        labels: dict[int, NDArray[Any]] = {}
        if spec.is_dense:
            readable = [index for index, image in enumerate(images) if image.error is None]

            def fail(image: Read, message: str) -> None:
                found["error"][images.index(image)] = f"label\n{message}"

            for number, labels_HW in read_masks(self._reader, [images[i] for i in readable], spec.classes, fail):
                labels[readable[number]] = labels_HW
        for index, image in enumerate(images):
            if found["error"][index]:
                continue
            assert image.views is not None
            pixels_HWC, target = image.views[0], None
            if spec.is_dense:
                target = self._mask(image, labels[index])
            else:
                found["target"][index] = self._target(image.row)
            if split == "train" and spec.policy is not None:
                try:
                    pixels_HWC, target = _augmented(spec.policy, pixels_HWC, target, image.row["image_id"], epoch + 1)
                except AugmentError as error:
                    found["error"][index] = f"{error.kind}\n{image.row['uri']}: {error.message}"
                    continue
            found["pixels"][index], found["valid"][index] = pixels_HWC, True
            if target is not None:
                found["target"][index] = target
        found["error"] = found["error"].astype(str)
        return found

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        from winnow.models.fine_tuning import order_of_epoch

        if self._order[0] != epoch:
            config = self._spec.config
            weights_N = None
            if config.balance == "sampling" and not self._spec.is_dense:
                weights_N = sampling_weights(self._targets)
            order = order_of_epoch(
                self._rows["train"].num_rows,
                epoch,
                seed=self._spec.seed,
                batch_size=config.batch_size,
                weights_N=weights_N,
            )
            self._order = (epoch, order)
        return self._order[1]

    def _target(self, row: Mapping[str, Any]) -> NDArray[Any]:
        (target,) = targets_of(self._spec, pa.Table.from_pylist([dict(row)]))
        return np.asarray(target)

    def _mask(self, image: Read, labels_HW: NDArray[Any]) -> NDArray[Any]:
        from winnow.models.pyramid_training import target_of

        view = self._spec.start.view
        assert view.size is not None
        return target_of(labels_HW, view.target(image.width, image.height), view.size, len(self._spec.classes))


def _augmented(
    policy: Policy, pixels_HWC: NDArray[np.uint8], mask_HW: NDArray[Any] | None, image_id: str, view: int
) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    """View of an image and its mask, at the size that they came in."""
    from PIL import Image

    height, width = pixels_HWC.shape[:2]
    moved_HWC, moved_HW = policy.apply(pixels_HWC, image_id=image_id, view=view, mask_HW=mask_HW)
    if moved_HWC.shape[:2] != (height, width):
        moved_HWC = np.asarray(Image.fromarray(moved_HWC).resize((width, height), Image.Resampling.BILINEAR))
        if moved_HW is not None:
            moved_HW = np.asarray(Image.fromarray(moved_HW).resize((width, height), Image.Resampling.NEAREST))
    return moved_HWC, moved_HW
