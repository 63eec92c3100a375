"""How good the weights of a training are."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.masks import label_dtype
from winnow.models.references import Output
from winnow_jobs.features import Featured, FeatureReader
from winnow_jobs.labelled import SCHEMA
from winnow_jobs.mask_labels import read_masks
from winnow_jobs.measuring import LEAST_VAL, LEAST_VAL_MASKS, MaskMeter, Sample, calibrate, check_left_out
from winnow_jobs.reading import ImageReader, Read
from winnow_jobs.training.spec import count_classes, targets_of

if TYPE_CHECKING:
    from winnow_jobs.training.worker import _Worker

_DENSE_BATCH = 8
"""Images whose logits of every pixel are in memory at once while they are measured."""


class Measure:
    """How good the weights of a training are, on val and test, from the same features and answers as predict's."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker
        self._spec = worker.spec
        self.temperature = 1.0
        self.metrics: dict[str, Any] = {}
        self.num_images: dict[str, int] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.warnings: list[str] = []

    def measure(self) -> Measure:
        spec, worker = self._spec, self._worker
        enough = LEAST_VAL_MASKS if spec.is_dense else LEAST_VAL
        samples = self._masks() if spec.is_dense else self._classes()
        num_val = self.num_images["val"]
        what = "pixels of val" if spec.is_dense else "val"
        self.temperature, calibration = calibrate(samples, enough=num_val >= enough, what=what)
        if num_val < enough:
            self.warnings.append(
                f"{num_val:,} images of the val split have labels, fewer than {enough}: the temperature is 1, and "
                "confidence may be far from accuracy"
            )
        if num_val < LEAST_VAL:
            self.warnings.append(
                f"with {num_val:,} labelled images of the val split, fewer than {LEAST_VAL}, no epoch is chosen: the "
                "weights are those of the last one"
            )
        self.metrics["calibration"] = calibration
        self._finish_metrics()
        self.counts["train"] = worker.train_counts()
        return self

    def _finish_metrics(self) -> None:
        """Metrics of classes with the temperature, once it is known."""
        from winnow.metrics import classification_metrics, multilabel_metrics
        from winnow.uncertainty import softmax

        if self._spec.is_dense:
            return
        for split in ("val", "test"):
            logits_NC, targets = self._found[split]
            if self._spec.target == "class":
                probabilities_NC = softmax(logits_NC / self.temperature)
                self.metrics[split] = classification_metrics(targets, probabilities_NC, self._spec.classes)
            else:
                probabilities_NC = 1 / (1 + np.exp(-logits_NC / self.temperature))
                self.metrics[split] = multilabel_metrics(targets > 0.5, probabilities_NC, self._spec.classes)

    def _read(self, split: str, use: Callable[[ImageReader, Featured], None]) -> None:
        worker = self._worker
        from winnow.models.networks import Network

        network = Network(copy.deepcopy(worker.model.backbone).cpu().eval())
        output: Output = "maps" if self._spec.is_dense else "features"
        model = replace(self._spec.start, output=output, head="", classes=())
        rows = worker.labels.of(split).to_pylist()
        place = {row["image_id"]: number for number, row in enumerate(rows)}

        def fail(image: Read) -> None:
            assert image.error is not None
            self._fail(split, place[image.row["image_id"]], image.error.kind, image)

        with FeatureReader(model, network, worker.warehouse.stores, self._spec.reading) as reader:
            for featured in reader.read(rows, fail):
                use(reader.reader, featured)
        failures = Counter(kind for kind, _ in worker.failed.values())
        num_seen = sum(worker.num.values())
        check_left_out(failures, worker.examples(), num_seen, self._spec.reading.max_failure_share)

    def _fail(self, split: str, place: int, kind: str, image: Read) -> None:
        message = image.error.message if image.error is not None else ""
        self._worker.failed[split, place] = (kind, f"{image.row['uri']}: {message}")

    def _logits(self, features: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        import torch

        model = self._worker.model.eval()
        inputs = [torch.from_numpy(found).to(self._worker.device) for found in features]
        with torch.inference_mode():
            if not self._spec.is_dense:
                logits: NDArray[np.float32] = model.head(inputs[0]).float().cpu().numpy()
                return logits
            size = self._spec.start.view.size
            dense = torch.nn.functional.interpolate(model.head(inputs), size=size, mode="bilinear", align_corners=False)
            logits = dense.float().cpu().numpy()
            return logits

    def _classes(self) -> dict[str, Sample]:
        self._found: dict[str, tuple[NDArray[np.float32], NDArray[Any]]] = {}
        samples: dict[str, Sample] = {}
        names = self._spec.classes
        for split in ("val", "test"):
            logits: list[NDArray[np.float32]] = [np.empty((0, len(names)), np.float32)]
            targets: list[NDArray[Any]] = [targets_of(self._spec, self._worker.labels.rows.slice(0, 0))]

            def use(
                _: ImageReader,
                featured: Featured,
                logits: list[NDArray[np.float32]] = logits,
                targets: list[NDArray[Any]] = targets,
            ) -> None:
                logits.append(self._logits(featured.features))
                rows = pa.Table.from_pylist([dict(image.row) for image in featured.images], schema=SCHEMA)
                targets.append(targets_of(self._spec, rows))

            self._read(split, use)
            logits_NC, found = np.concatenate(logits), np.concatenate(targets)
            self._found[split] = logits_NC, found
            self.num_images[split] = len(found)
            self.counts[split] = count_classes(found, names)
            # The presence of a class is an answer of two: its logit against 0.
            samples[split] = (
                (logits_NC, found)
                if found.ndim == 1
                else (
                    np.stack([np.zeros(logits_NC.size, np.float32), logits_NC.ravel()], axis=1),
                    (found > 0.5).ravel().astype(np.int64),
                )
            )
        return samples

    def _masks(self) -> dict[str, Sample]:
        samples: dict[str, Sample] = {}
        spec = self._spec
        void = int(np.iinfo(label_dtype(len(spec.classes))).max)
        for split in ("val", "test"):
            meter = MaskMeter(spec.start.view, len(spec.classes), self._worker.num[split], spec.seed)
            counts: Counter[str] = Counter()

            def use(
                reader: ImageReader,
                featured: Featured,
                meter: MaskMeter = meter,
                counts: Counter[str] = counts,
                split: str = split,
            ) -> None:
                def fail(image: Read, message: str) -> None:
                    self._worker.failed[split, -1 - len(self._worker.failed)] = ("label", message)

                for start in range(0, len(featured.images), _DENSE_BATCH):
                    images = featured.images[start : start + _DENSE_BATCH]
                    logits_NCHW = self._logits([found[start : start + _DENSE_BATCH] for found in featured.features])
                    for number, labels_HW in read_masks(reader, images, spec.classes, fail):
                        meter.add(labels_HW, logits_NCHW[number])
                        for value in np.unique(labels_HW[labels_HW != void]):
                            counts[spec.classes[value]] += 1

            self._read(split, use)
            self.metrics[split] = meter.metrics(spec.classes)
            self.num_images[split] = meter.num_images
            self.counts[split] = dict(counts)
            samples[split] = meter.sample()
        return samples
