"""Heads on frozen features: what a training computes, from labelled images to weights and figures.

Legend: N images, D features, C classes; label maps (H, W).
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from winnow.calibration import LEAST_IMAGES, calibration_metrics
from winnow.errors import FAILURE_KINDS, JobError
from winnow.masks import label_dtype
from winnow.metrics import classification_metrics
from winnow.models.cards import Head
from winnow.models.references import ResolvedModel
from winnow.splits import SPLITS
from winnow.uncertainty import softmax
from winnow_connectors.ledger import digest_of
from winnow_jobs.features import BATCH, Featured, FeatureReader, MappedArrays
from winnow_jobs.labelled import LabelledImages
from winnow_jobs.mask_labels import read_masks
from winnow_jobs.measuring import (
    LEAST_VAL,
    LEAST_VAL_MASKS,
    MaskMeter,
    Sample,
    calibrate,
    check_left_out,
    left_out_sentences,
)
from winnow_jobs.progress import Progress
from winnow_jobs.reading import Read, Row

if TYPE_CHECKING:
    from torch import nn

    from winnow.config import Kind, PredictConfig
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

FEW_LABELS = 5
"""A class with fewer labels is warned about."""

MOST_FEATURES = 4000
"""Features of so many images tell in which directions they vary; images without labels are read as far as they lack."""

_FOLDS = 5


@dataclass(frozen=True)
class Learned:
    """A fitted head.

    Attributes:
        head: its weights.
        head_name: as on the card.
        metrics: by split.
        counts: labels used, by split and class.
        temperature: by which its logits are divided.
    """

    head: nn.Module
    head_name: Head
    metrics: dict[str, Any]
    counts: dict[str, dict[str, int]]
    temperature: float


class HeadJob:
    """What both kinds of training share: the images, what failed, and the backbone's weights.

    Attributes:
        state: the backbone's tensors as they go to the version's file.
        num_images: that could be used, by split.
        failures: labelled images left out, by kind of error.
        num_unlabelled: images without labels that were looked at.
        seconds: by stage.
    """

    def __init__(
        self,
        workspace: Workspace,
        task: str,
        kind: Kind,
        classes: tuple[str, ...],
        seed: int,
        backbone: ResolvedModel,
        labels: LabelledImages,
        reading: PredictConfig,
        unlabelled: Sequence[Row] = (),
    ) -> None:
        from winnow.models.loading import load_network
        from winnow.models.networks import state_of

        self.workspace = workspace
        self.task = task
        self.kind = kind
        self.classes = classes
        self.seed = seed
        self.backbone = backbone
        self.labels = labels
        self.reading = reading
        self.unlabelled = unlabelled
        self.network = load_network(backbone, fetch=workspace.stores.download)
        self.state = {key: tensor.clone() for key, tensor in state_of(self.network).items()}
        self.num_images: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
        self.failures: Counter[str] = Counter()
        self.num_unlabelled = 0
        self.seconds: dict[str, float] = {}
        self._examples: list[str] = []
        self._skipped: Counter[str] = Counter()
        self._missing: list[str] = []
        self._warnings: list[str] = []

    def warn(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._warnings.append(sentence)

    def warnings(self) -> list[str]:
        """What was remarked, and the images left out."""
        return [*self._warnings, *left_out_sentences(self.failures, self._examples)]

    def read(
        self,
        use: Callable[[FeatureReader, Featured], None],
        use_unlabelled: Callable[[Featured], None] = lambda featured: None,
    ) -> None:
        """Features of all images, split by split, in the order of image ids; then of those without labels.

        Raises:
            StoppedError: too many images failed.
        """
        started = time.monotonic()
        total = self.labels.rows.num_rows + len(self.unlabelled)
        with (
            Progress("features", total) as progress,
            FeatureReader(self.backbone, self.network, self.workspace.stores, self.reading) as reader,
        ):

            def tell() -> None:
                num_failed = sum(self.failures.values())
                num_seen = num_failed + sum(self.num_images.values())
                progress.update(num_seen + self.num_unlabelled + sum(self._skipped.values()), num_failed)

            for split in SPLITS:
                for featured in reader.read(self.labels.of(split).to_pylist(), self.fail):
                    use(reader, featured)
                    tell()
            for featured in reader.read(self.unlabelled, self._skip):
                use_unlabelled(featured)
                self.num_unlabelled += len(featured.images)
                tell()
            tell()
            self._check_skipped()
        self.seconds["features"] = time.monotonic() - started

    def _skip(self, image: Read) -> None:
        """An image without a label that cannot be read is not missed, but without the storage nothing is made.

        Raises:
            StoppedError: access or storage failed for too many of them.
        """
        assert image.error is not None
        self._skipped[image.error.kind] += 1
        if FAILURE_KINDS[image.error.kind].systemic:
            self._missing.append(_example(image.row["uri"], image.error.message))
            # Good images are told a batch later than bad ones.
            if len(self._missing) > self.reading.max_failure_share * (self._num_asked() + BATCH):
                self._check_skipped()

    def _num_asked(self) -> int:
        return self.num_unlabelled + sum(self._skipped.values())

    def _check_skipped(self) -> None:
        share = self.reading.max_failure_share
        check_left_out(self._skipped, self._missing[:1], self._num_asked(), share, what="images without labels")

    def fail(self, image: Read) -> None:
        """Leave an image out.

        Raises:
            StoppedError: it is one too many.
        """
        assert image.error is not None
        self.leave_out(image.row["uri"], image.error.kind, image.error.message)

    def leave_out(self, uri: str, kind: str, message: str) -> None:
        """Leave an image out; raises StoppedError when it is one too many."""
        self.failures[kind] += 1
        if len(self._examples) < 3:
            self._examples.append(_example(uri, message))
        num_seen = sum(self.failures.values()) + sum(self.num_images.values())
        check_left_out(self.failures, self._examples, num_seen, self.reading.max_failure_share)

    def check_left(self) -> None:
        """Raises JobError when no image of the train split could be used."""
        if not self.num_images["train"]:
            raise JobError(f"no labelled image of the train split could be used: {'; '.join(self._examples)}")


def _example(uri: str, message: str) -> str:
    return message if uri in message else f"{uri}: {message}"


def learn_labels(job: HeadJob) -> Learned:
    """A linear head on the scaled features of each image; val chooses its strength and its temperature."""
    import torch

    from winnow.models.linear_head import EMPHASIS, fit_linear_head, rms_norm
    from winnow.models.networks import RmsLinear

    index = {name: number for number, name in enumerate(job.classes)}
    features: dict[str, list[NDArray[np.float32]]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    unlabelled: list[NDArray[np.float32]] = []
    groups: list[str] = []

    def use_unlabelled(featured: Featured) -> None:
        unlabelled.append(rms_norm(featured.features[0]))

    def use(_: FeatureReader, featured: Featured) -> None:
        split = featured.images[0].row["split"]
        features[split].append(rms_norm(featured.features[0]))
        labels[split] += [index[image.row["label"]] for image in featured.images]
        if split == "train":
            groups.extend(image.row["group"] for image in featured.images)
        job.num_images[split] += len(featured.images)

    job.read(use, use_unlabelled)
    job.check_left()
    depth = features["train"][0].shape[1]
    features_ND = {split: np.concatenate([np.empty((0, depth), np.float32), *features[split]]) for split in SPLITS}
    labels_N = {split: np.array(labels[split], dtype=np.int64) for split in SPLITS}
    if len(np.unique(labels_N["train"])) < 2:
        raise JobError("the images of the train split that could be read have one class only; label others")
    by_class = np.bincount(labels_N["train"], minlength=len(job.classes))
    for sentence in class_warnings({name: int(by_class[index[name]]) for name in job.classes}, "label"):
        job.warn(sentence)
    enough = len(labels_N["val"]) >= LEAST_VAL
    if not enough:
        job.warn(
            f"{len(labels_N['val']):,} images of the val split have labels, fewer than {LEAST_VAL}: the strength of "
            "the regularisation is chosen by five folds of the train split"
        )
    started = time.monotonic()
    shown_ND = np.concatenate([features_ND["train"], features_ND["val"], *unlabelled])
    with Progress("train") as progress:

        def on_fit(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        fitted = fit_linear_head(
            features_ND["train"],
            labels_N["train"],
            len(job.classes),
            chooser=(features_ND["val"], labels_N["val"]) if enough else None,
            folds_N=None if enough else _folds(groups, job.seed),
            shown_ND=shown_ND,
            on_fit=on_fit,
        )
    job.seconds["fit"] = time.monotonic() - started
    temperature = fitted.temperature or 1.0
    if fitted.temperature is None:
        job.warn(
            f"fewer than {LEAST_IMAGES} labelled images could be asked that had not taught: the temperature is 1, and "
            "confidence may be far from accuracy"
        )
    head = RmsLinear(depth, len(job.classes))
    head.linear.load_state_dict(
        {"weight": torch.from_numpy(fitted.weight_CD).float(), "bias": torch.from_numpy(fitted.bias_C).float()}
    )
    logits_NC = {split: fitted.logits(features_ND[split]) for split in ("val", "test")}
    metrics: dict[str, Any] = {
        split: classification_metrics(labels_N[split], softmax(logits / temperature), job.classes)
        for split, logits in logits_NC.items()
    }
    metrics["train"] = {"n": len(labels_N["train"])}
    chosen_by = "val" if enough else f"{_FOLDS} folds of train"
    metrics["calibration"] = {
        "fitted_on": None if fitted.temperature is None else chosen_by,
        **{split: calibration_metrics(logits, labels_N[split], temperature) for split, logits in logits_NC.items()},
    }
    metrics["fit"] = {
        "l2_strength": fitted.strength,
        "lda_share": fitted.share,
        "lda_shrinkage": fitted.shrinkage,
        "emphasis": EMPHASIS if fitted.emphasised else 0.0,
        "num_unlabelled": job.num_unlabelled,
        "unlabelled": digest_of({"image_ids": [row["image_id"] for row in job.unlabelled]}),
        "chosen_by": chosen_by,
        "log_loss": fitted.log_loss,
        "log_loss_by_strength": {f"{strength:.4g}": loss for strength, loss in fitted.log_losses.items()},
    }
    counts = {
        split: {job.classes[number]: int(count) for number, count in enumerate(np.bincount(labels_N[split])) if count}
        for split in SPLITS
    }
    return Learned(head, "rms_linear", metrics, counts, temperature)


def _folds(groups: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Number of the fold of each image, int64 (N,); images of a group share one, and folds are of like size."""
    distinct = sorted(set(groups), key=lambda group: hashlib.blake2b(f"{seed} {group}".encode()).digest())
    fold = {group: number % _FOLDS for number, group in enumerate(distinct)}
    return np.array([fold[group] for group in groups], dtype=np.int64)


def class_warnings(counts: Mapping[str, int], what: str) -> list[str]:
    """Sentences about classes that cannot be learned, or hardly.

    Args:
        counts: of the train split, by class.
        what: is counted.
    """
    absent = [name for name, count in counts.items() if not count]
    few = [f"{name} ({count})" for name, count in counts.items() if 0 < count < FEW_LABELS]
    said = []
    if absent:
        said.append(f"no {what} of the train split has {_names(absent)}: the version will practically never answer it")
    if few:
        said.append(f"fewer than {FEW_LABELS} {what}s of the train split have {_names(few)}: expect little of it")
    return said


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class _Truth:
    """The label map of an image at its own size, packed."""

    data: bytes
    dtype: str
    shape: tuple[int, int]

    @classmethod
    def pack(cls, labels_HW: NDArray[Any]) -> _Truth:
        height, width = labels_HW.shape
        return cls(zlib.compress(labels_HW.tobytes(), 1), labels_HW.dtype.str, (height, width))

    def unpack(self) -> NDArray[Any]:
        return np.frombuffer(zlib.decompress(self.data), dtype=self.dtype).reshape(self.shape)


def learn_masks(job: HeadJob) -> Learned:
    """A light decoder on feature maps, which wait in temporary files as float16."""
    from winnow.models.pyramid_training import fit_pyramid_head, num_steps, target_of

    size = job.backbone.view.size
    assert size is not None
    num_classes = len(job.classes)
    truths: dict[str, list[_Truth]] = {split: [] for split in SPLITS}
    has_class: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    num_rows = {split: job.labels.of(split).num_rows for split in SPLITS}
    with MappedArrays(num_rows["train"]) as learn, MappedArrays(num_rows["val"] + num_rows["test"]) as judge:

        def use(reader: FeatureReader, featured: Featured) -> None:
            split = featured.images[0].row["split"]
            kept, targets = [], []

            def fail(image: Read, message: str) -> None:
                job.leave_out(image.row["uri"], "label", message)

            for number, labels_HW in read_masks(reader.reader, featured.images, job.classes, fail):
                image = featured.images[number]
                kept.append(number)
                shown = job.backbone.view.target(image.width, image.height)
                targets.append(target_of(labels_HW, shown, size, num_classes))
                for value in np.unique(labels_HW[labels_HW != np.iinfo(label_dtype(num_classes)).max]):
                    has_class[split][job.classes[value]] += 1
                if split != "train":
                    truths[split].append(_Truth.pack(labels_HW))
            if not kept:
                return
            maps = [found[kept] for found in featured.features]
            (learn if split == "train" else judge).append([*maps, np.stack(targets)] if split == "train" else maps)
            job.num_images[split] += len(kept)

        job.read(use)
        job.check_left()
        if not has_class["train"]:
            raise JobError(f"no pixel of the {learn.num_filled:,} masks of the train split is labelled")
        for sentence in class_warnings({name: has_class["train"][name] for name in job.classes}, "labelled image"):
            job.warn(sentence)
        started = time.monotonic()
        *maps, targets_NHW = learn.arrays()
        with Progress("train", num_steps(len(targets_NHW))) as progress:
            head = fit_pyramid_head(
                maps, targets_NHW, num_classes, seed=job.seed, on_step=lambda done, _: progress.update(done)
            )
        job.seconds["fit"] = time.monotonic() - started
        started = time.monotonic()
        metrics: dict[str, Any] = {}
        pixels: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
        first = 0
        for split in ("val", "test"):
            found = [array[first : first + len(truths[split])] for array in judge.arrays()]
            metrics[split], pixels[split] = _measure_masks(job, head, found, truths[split], split)
            first += len(truths[split])
        job.seconds["measure"] = time.monotonic() - started
    enough = len(truths["val"]) >= LEAST_VAL_MASKS
    temperature, metrics["calibration"] = calibrate(pixels, enough=enough, what="pixels of val")
    if not enough:
        job.warn(
            f"{len(truths['val']):,} images of the val split have masks, fewer than {LEAST_VAL_MASKS}: the temperature "
            "is 1, and confidence may be far from accuracy"
        )
    metrics["train"] = {"n": job.num_images["train"]}
    metrics["fit"] = {"steps": num_steps(job.num_images["train"])}
    return Learned(head, "pyramid", metrics, {split: dict(has_class[split]) for split in SPLITS}, temperature)


def _measure_masks(
    job: HeadJob, head: nn.Module, maps: Sequence[NDArray[Any]], truths: Sequence[_Truth], split: str
) -> tuple[dict[str, Any], Sample]:
    """Metrics, and pixels for calibration."""
    from winnow.models.pyramid_training import BATCH, logits_of

    size = job.backbone.view.size
    assert size is not None
    meter = MaskMeter(job.backbone.view, len(job.classes), len(truths), job.seed)
    with Progress(f"measure {split}", len(truths)) as progress:
        for start in range(0, len(truths), BATCH):
            part = truths[start : start + BATCH]
            logits_NCHW = logits_of(head, [found[start : start + BATCH] for found in maps], size)  # type: ignore[arg-type]
            for truth, logits_CHW in zip(part, logits_NCHW, strict=True):
                meter.add(truth.unpack(), logits_CHW)
            progress.update(start + len(part))
    return meter.metrics(job.classes), meter.sample()
