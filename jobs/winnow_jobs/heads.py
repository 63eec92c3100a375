"""Heads on frozen features: what a training computes, from labelled images to weights and figures.

Legend: N images, D features, C classes; label maps (H, W).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from winnow.calibration import LEAST_IMAGES, calibration_metrics, fit_temperature
from winnow.errors import FAILURE_KINDS, FetchError, JobError, MaskError, StoppedError
from winnow.mask_files import read_label
from winnow.masks import label_dtype, resize_to_source
from winnow.metrics import classification_metrics, confusion, segmentation_metrics
from winnow.models.cards import Head
from winnow.models.references import ResolvedModel
from winnow.splits import SPLITS
from winnow.uncertainty import softmax
from winnow_jobs.features import Featured, FeatureReader, MappedArrays
from winnow_jobs.labelled import LabelledImages
from winnow_jobs.progress import Progress
from winnow_jobs.reading import Read

if TYPE_CHECKING:
    from torch import nn

    from winnow.config import Kind, PredictConfig
    from winnow_jobs.workspace import Workspace

logger = logging.getLogger(__name__)

LEAST_VAL = 50
"""Labelled images of the val split that are enough to choose by; with fewer, five folds of the train split choose."""

LEAST_VAL_MASKS = 5
"""Masks of the val split that are enough to fit a temperature on; pixels of one image are much alike."""

FEW_LABELS = 5
"""A class with fewer labels is warned about."""

_FOLDS = 5
_PIXELS = 200_000
"""Pixels of a split that calibration is fitted on or measured at, over all images."""

_LEAST_TO_STOP = 20
"""Images after which a share of failures means something."""


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
        failures: images left out, by kind of error.
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
        self.network = load_network(backbone, fetch=workspace.stores.download)
        self.state = {key: tensor.clone() for key, tensor in state_of(self.network).items()}
        self.num_images: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
        self.failures: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self._examples: list[str] = []
        self._warnings: list[str] = []

    def warn(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._warnings.append(sentence)

    def warnings(self) -> list[str]:
        """What was remarked, and the images left out."""
        if not self.failures:
            return self._warnings
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.failures.items()))
        return [
            *self._warnings,
            f"{sum(self.failures.values()):,} labelled images could not be used ({kinds}): {'; '.join(self._examples)}",
        ]

    def read(self, use: Callable[[FeatureReader, Featured], None]) -> None:
        """Features of all images, split by split, in the order of image ids.

        Raises:
            StoppedError: too many images failed.
        """
        started = time.monotonic()
        total = self.labels.rows.num_rows
        with (
            Progress("features", total) as progress,
            FeatureReader(self.backbone, self.network, self.workspace.stores, self.reading) as reader,
        ):
            for split in SPLITS:
                for featured in reader.read(self.labels.of(split).to_pylist(), self.fail):
                    use(reader, featured)
                    done = sum(self.num_images.values()) + sum(self.failures.values())
                    progress.update(done, sum(self.failures.values()))
        self.seconds["features"] = time.monotonic() - started

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
            self._examples.append(message if uri in message else f"{uri}: {message}")
        num_failed = sum(self.failures.values())
        share = self.reading.max_failure_share
        systemic = sum(count for name, count in self.failures.items() if _is_systemic(name))
        num_seen = num_failed + sum(self.num_images.values())
        if num_seen >= _LEAST_TO_STOP and max(systemic, self.failures["label"]) > share * num_seen:
            raise StoppedError(
                f"stopped, nothing was published: {num_failed:,} of {num_seen:,} labelled images could not be used, "
                f"more than max_failure_share = {share:g}: {'; '.join(self._examples)}. Mend that, then run the same "
                "command"
            )

    def check_left(self) -> None:
        """Raises JobError when no image of the train split could be used."""
        if not self.num_images["train"]:
            raise JobError(f"no labelled image of the train split could be used: {'; '.join(self._examples)}")


def _is_systemic(kind: str) -> bool:
    return kind in FAILURE_KINDS and FAILURE_KINDS[kind].systemic


def learn_labels(job: HeadJob) -> Learned:
    """Multinomial logistic regression on the features of each image; val chooses its strength and its temperature."""
    import torch

    from winnow.models.linear_head import fit_linear_head

    index = {name: number for number, name in enumerate(job.classes)}
    features: dict[str, list[NDArray[np.float32]]] = {split: [] for split in SPLITS}
    labels: dict[str, list[int]] = {split: [] for split in SPLITS}
    groups: list[str] = []

    def use(_: FeatureReader, featured: Featured) -> None:
        split = featured.images[0].row["split"]
        features[split].append(featured.features[0])
        labels[split] += [index[image.row["label"]] for image in featured.images]
        if split == "train":
            groups.extend(image.row["group"] for image in featured.images)
        job.num_images[split] += len(featured.images)

    job.read(use)
    job.check_left()
    depth = features["train"][0].shape[1]
    features_ND = {split: np.concatenate([np.empty((0, depth), np.float32), *features[split]]) for split in SPLITS}
    labels_N = {split: np.array(labels[split], dtype=np.int64) for split in SPLITS}
    if len(np.unique(labels_N["train"])) < 2:
        raise JobError("the images of the train split that could be read have one class only; label others")
    by_class = np.bincount(labels_N["train"], minlength=len(job.classes))
    _warn_about_classes(job, {name: int(by_class[index[name]]) for name in job.classes})
    enough = len(labels_N["val"]) >= LEAST_VAL
    if not enough:
        job.warn(
            f"{len(labels_N['val']):,} images of the val split have labels, fewer than {LEAST_VAL}: the strength of "
            "the regularisation is chosen by five folds of the train split"
        )
    started = time.monotonic()
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
            on_fit=on_fit,
        )
    job.seconds["fit"] = time.monotonic() - started
    temperature = fitted.temperature or 1.0
    if fitted.temperature is None:
        job.warn(
            f"fewer than {LEAST_IMAGES} labelled images could be asked that had not taught: the temperature is 1, and "
            "confidence may be far from accuracy"
        )
    head = torch.nn.Linear(depth, len(job.classes))
    head.load_state_dict(
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
        "chosen_by": chosen_by,
        "log_loss_by_strength": {f"{strength:.4g}": loss for strength, loss in fitted.log_losses.items()},
    }
    counts = {
        split: {job.classes[number]: int(count) for number, count in enumerate(np.bincount(labels_N[split])) if count}
        for split in SPLITS
    }
    return Learned(head, "linear", metrics, counts, temperature)


def _folds(groups: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Number of the fold of each image, int64 (N,); images of a group share one, and folds are of like size."""
    distinct = sorted(set(groups), key=lambda group: hashlib.blake2b(f"{seed} {group}".encode()).digest())
    fold = {group: number % _FOLDS for number, group in enumerate(distinct)}
    return np.array([fold[group] for group in groups], dtype=np.int64)


def _warn_about_classes(job: HeadJob, counts: Mapping[str, int]) -> None:
    """Classes that cannot be learned, or hardly."""
    what = "labelled image" if job.kind == "segmentation" else "label"
    absent = [name for name, count in counts.items() if not count]
    few = [f"{name} ({count})" for name, count in counts.items() if 0 < count < FEW_LABELS]
    if absent:
        job.warn(f"no {what} of the train split has {_names(absent)}: the version will practically never answer it")
    if few:
        job.warn(f"fewer than {FEW_LABELS} {what}s of the train split have {_names(few)}: expect little of it")


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---------------------------------------------------------------------------------------------------------------- masks


def mask_uri(value: str) -> str | None:
    """The file that a label names, if it is well-formed and names one; what else it may be, ``read_label`` says."""
    try:
        content = json.loads(value)
    except (ValueError, RecursionError):
        return None
    uri = content.get("mask") if isinstance(content, dict) else None
    return uri if isinstance(uri, str) and uri else None


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
            masks = reader.reader.fetch(filter(None, (mask_uri(image.row["value"]) for image in featured.images)))

            def read(uri: str) -> bytes:
                found = masks[uri]
                if isinstance(found, FetchError):
                    raise found
                return found

            for number, image in enumerate(featured.images):
                row = image.row
                try:
                    labels_HW = read_label(row["value"], job.classes, width=image.width, height=image.height, read=read)
                except (MaskError, FetchError) as error:
                    job.leave_out(row["uri"], "label", f"{row['uri']}: {error.message}")
                    continue
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
        _warn_about_classes(job, {name: has_class["train"][name] for name in job.classes})
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
    temperature = fit_temperature(*pixels["val"]) if enough else 1.0
    if not enough:
        job.warn(
            f"{len(truths['val']):,} images of the val split have masks, fewer than {LEAST_VAL_MASKS}: the temperature "
            "is 1, and confidence may be far from accuracy"
        )
    metrics["calibration"] = {
        "fitted_on": "pixels of val" if enough else None,
        **{split: calibration_metrics(*sample, temperature) for split, sample in pixels.items()},
    }
    metrics["train"] = {"n": job.num_images["train"]}
    metrics["fit"] = {"steps": num_steps(job.num_images["train"])}
    return Learned(head, "pyramid", metrics, {split: dict(has_class[split]) for split in SPLITS}, temperature)


def _measure_masks(
    job: HeadJob, head: nn.Module, maps: Sequence[NDArray[Any]], truths: Sequence[_Truth], split: str
) -> tuple[dict[str, Any], tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Answers as predict gives them, compared pixel by pixel at each image's own size.

    Also logits (n, C) and labels (n,) of labelled pixels of the view, drawn by seed, of each image equally many.
    """
    from winnow.models.pyramid_training import BATCH, logits_of, target_of

    size, num_classes = job.backbone.view.size, len(job.classes)
    assert size is not None
    total_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
    random = np.random.default_rng(job.seed)
    sampled_NC, sampled_N = [np.empty((0, num_classes), np.float32)], [np.empty(0, np.int64)]
    with Progress(f"measure {split}", len(truths)) as progress:
        for start in range(0, len(truths), BATCH):
            part = truths[start : start + BATCH]
            logits_NCHW = logits_of(head, [found[start : start + BATCH] for found in maps], size)  # type: ignore[arg-type]
            for truth, logits_CHW in zip(part, logits_NCHW, strict=True):
                labels_HW = truth.unpack()
                void = int(np.iinfo(labels_HW.dtype).max)
                height, width = labels_HW.shape
                shown_width, shown_height = job.backbone.view.target(width, height)
                answer_HW = logits_CHW[:, :shown_height, :shown_width].argmax(axis=0)
                shown = resize_to_source(answer_HW, width, height)
                total_CC += confusion(labels_HW, shown, num_classes, void=void)
                target = target_of(labels_HW, (shown_width, shown_height), size, num_classes).ravel()
                labelled = np.flatnonzero(target != void)
                chosen = random.choice(labelled, min(len(labelled), _PIXELS // len(truths)), replace=False)
                sampled_NC.append(logits_CHW.reshape(num_classes, -1)[:, chosen].T)
                sampled_N.append(target[chosen].astype(np.int64))
            progress.update(start + len(part))
    metrics = segmentation_metrics(total_CC, job.classes, len(truths))
    return metrics, (np.concatenate(sampled_NC), np.concatenate(sampled_N))
