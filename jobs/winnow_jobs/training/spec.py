"""What a training does, and what it is told about images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from winnow.augment import Policy
from winnow.config import Config, PredictConfig, TrainConfig
from winnow.errors import CallError, JobError
from winnow.models.references import ResolvedModel
from winnow_jobs.labelled import classes_said

if TYPE_CHECKING:
    from winnow.models.fine_tuning import Target

NO_AUGMENTATION, STANDARD = "none", "standard"
"""Names of augmentations that need no section."""


class WorkersDiedError(JobError):
    """Training workers died too often; the run stays open, and the same call goes on."""


@dataclass(frozen=True)
class FineTuneSpec:
    """What a training does: everything that its workers need to know, and nothing secret. Part of the plan.

    Attributes:
        task: its name.
        target: what is said of an image.
        classes: of the task, in order.
        seed: of the training.
        start: the model whose weights it starts from.
        config: the ``[train]`` section.
        reading: the ``[predict]`` section, whose limits count.
        policy: what is done to every image of the train split; None leaves it as it is.
    """

    task: str
    target: Target
    classes: tuple[str, ...]
    seed: int
    start: ResolvedModel
    config: TrainConfig
    reading: PredictConfig
    policy: Policy | None

    @property
    def is_dense(self) -> bool:
        return self.target == "mask"

    def digest_source(self) -> dict[str, Any]:
        """The part that decides what comes out."""
        values = self.to_dict()
        for name in ("num_workers", "checkpoint_s"):
            del values["config"][name]
        del values["start"]["location"]  # a model is its content, wherever the file lies
        del values["reading"]  # as far as it decides anything, the caller knows
        return values

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        return {
            **vars(self),
            "classes": list(self.classes),
            "start": json.loads(self.start.to_json()),
            "config": self.config.model_dump(mode="json"),
            "reading": self.reading.model_dump(mode="json"),
            "policy": None if self.policy is None else self.policy.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FineTuneSpec:
        values = dict(data)
        values["classes"] = tuple(data["classes"])
        values["start"] = ResolvedModel.from_json(json.dumps(data["start"]))
        values["config"] = TrainConfig.model_validate_json(json.dumps(data["config"]))
        values["reading"] = PredictConfig.model_validate_json(json.dumps(data["reading"]))
        values["policy"] = None if data["policy"] is None else Policy.from_dict(data["policy"])
        return cls(**values)


def targets_of(spec: FineTuneSpec, rows: pa.Table) -> NDArray[Any]:
    """What is said of images: int64 (N,), or float32 (N, C) where several classes may be; empty for masks."""
    index = {name: number for number, name in enumerate(spec.classes)}
    if spec.target == "mask":
        return np.empty(0, dtype=np.int64)
    if spec.target == "class":
        return np.array([index[label] for label in rows["label"].to_pylist()], dtype=np.int64)
    targets_NC = np.zeros((rows.num_rows, len(index)), dtype=np.float32)
    for number, (label, value) in enumerate(zip(rows["label"].to_pylist(), rows["value"].to_pylist(), strict=True)):
        for name in classes_said(label, value) or ():
            targets_NC[number, index[name]] = 1.0
    return targets_NC


def sampling_weights(targets: NDArray[Any]) -> NDArray[np.float64]:
    """Chance of each image, inverse to how common the rarest of its classes is."""
    if targets.ndim == 1:
        return np.asarray(1.0 / np.bincount(targets)[targets])
    counts_C = targets.sum(axis=0)
    rarest_N = np.where(targets > 0, counts_C, np.inf).min(axis=1)
    return np.asarray(1.0 / np.where(np.isfinite(rarest_N), rarest_N, counts_C.max(initial=1.0)))


def count_classes(targets: NDArray[Any], classes: Sequence[str]) -> dict[str, int]:
    """Images by class, of those that have any."""
    counts_C = np.bincount(targets, minlength=len(classes)) if targets.ndim == 1 else targets.sum(axis=0)
    return {name: int(count) for name, count in zip(classes, counts_C, strict=True) if count}


def make_spec(config: Config, name: str, start: ResolvedModel, seed: int) -> FineTuneSpec:
    """The training of a task.

    Args:
        config: the whole of winnow.toml.
        name: of the task.
        start: the model whose weights it starts from.
        seed: of whatever is drawn.

    Raises:
        CallError: an augmentation that does not exist, or does not fit the task or its model.
    """
    from winnow.models.fine_tuning import standard_augmentation

    task = config.task(name)
    chosen = config.train.augmentation
    policy = None
    if chosen in config.augmentations or chosen not in (STANDARD, NO_AUGMENTATION):
        policy = Policy.from_config(chosen, config.augmentation(chosen))
    elif chosen == STANDARD:
        policy = standard_augmentation(start.view, seed)
    if policy is not None:
        if task.kind == "segmentation":
            policy.check_masks()
        assert start.view.size is not None
        policy.check_size(*start.view.size)
    if config.train.balance == "sampling" and task.kind == "segmentation":
        raise CallError('train.balance = "sampling" is not for masks, which hold many classes; use "weights"')
    target: Target = "mask" if task.kind == "segmentation" else "classes" if task.multiple_choice else "class"
    return FineTuneSpec(
        task=name,
        target=target,
        classes=tuple(task.classes or start.classes),
        seed=seed,
        start=start,
        config=config.train,
        reading=config.predict,
        policy=policy,
    )
