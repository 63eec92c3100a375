"""What a run does: everything that its workers need to know, and nothing secret. Part of the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from winnow.augment import Policy
from winnow.config import Config, Kind, Precision, PredictConfig
from winnow.images import DecodeLimits, View
from winnow.models.references import ResolvedModel


@dataclass(frozen=True)
class TaskSpec:
    """One task of the run: its model, and which of the run's views feeds it.

    Attributes:
        kind: of its answers.
        model: what answers.
        view_index: in ``PredictSpec.views``.
        store_probabilities: also keep the whole vector of each image.
        policy: of augmented views whose mean is the answer; None for the image alone.
        num_views: the image itself included.
    """

    kind: Kind
    model: ResolvedModel
    view_index: int
    store_probabilities: bool
    policy: Policy | None = None
    num_views: int = 1

    @property
    def model_id(self) -> str:
        """Value of the column ``model``."""
        return answerer(self.model, (self.policy, self.num_views) if self.policy else None)

    def to_dict(self) -> dict[str, Any]:
        values = dict(vars(self)) | {"model": json.loads(self.model.to_json())}
        return values | {"policy": self.policy.to_dict() if self.policy else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        policy = data.get("policy")
        model = ResolvedModel.from_json(json.dumps(data["model"]))
        return cls(**{**data, "model": model, "policy": Policy.from_dict(policy) if policy else None})


@dataclass(frozen=True, kw_only=True)
class ReadSpec:
    """How a job reads images: what jobs that ask images have in common.

    Attributes:
        batch_size: images per table between the stages and per forward pass.
        chunk_rows: images per file of the plan.
        fragment_rows: images per written file.
        max_bytes_in_flight: compressed bytes held at once by one fetching actor.
        asked: what narrowed the plan (``where``, ``limit``, ``new``, ``retry_failures``).
    """

    batch_size: int
    chunk_rows: int
    fragment_rows: int
    fetch_concurrency: int
    fetch_timeout_s: float
    retry_timeout_s: float
    image_timeout_s: float
    max_bytes: int
    max_pixels: int
    max_failure_share: float
    scaled_decoding: bool
    asked: Mapping[str, Any]
    max_bytes_in_flight: int = 512_000_000

    @property
    def model_ids(self) -> Mapping[str, str]:
        """Model version by task: what the run asks, in the order of the bits of ``asked``."""
        raise NotImplementedError

    def views(self) -> tuple[View, ...]:
        """What each image is decoded to."""
        raise NotImplementedError

    @property
    def fingerprints(self) -> bool:
        """Images get hashes of their pixels: what ``winnow duplicates`` wants beside embeddings."""
        return False

    def limits(self) -> DecodeLimits:
        return DecodeLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels, timeout_s=self.image_timeout_s)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PredictSpec(ReadSpec):
    """Tasks, and how images are read.

    Attributes:
        tasks: by name.
        precision: of the models' arithmetic, as asked.
    """

    tasks: Mapping[str, TaskSpec]
    precision: Precision

    @property
    def model_ids(self) -> Mapping[str, str]:
        return {name: task.model_id for name, task in self.tasks.items()}

    def views(self) -> tuple[View, ...]:
        """The distinct views of all models, in the order of ``TaskSpec.view_index``."""
        return distinct_views([task.model for task in self.tasks.values()])

    @property
    def fingerprints(self) -> bool:
        return any(task.kind == "embedding" for task in self.tasks.values())

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "tasks": {name: task.to_dict() for name, task in self.tasks.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "tasks": {name: TaskSpec.from_dict(task) for name, task in data["tasks"].items()}})

    def answers_digest_source(self) -> dict[str, Any]:
        """The part that decides the answers: two calls with the same part may share one run."""
        values = self.to_dict()
        kept = ("tasks", "precision", "scaled_decoding", "max_bytes", "max_pixels", "asked")
        for task in values["tasks"].values():
            del task["model"]["location"]  # a model is its content, wherever the file lies
        return {key: values[key] for key in kept}


def views_of(config: Config, name: str, model: ResolvedModel) -> tuple[Policy, int] | None:
    """Policy and number of the augmented views whose mean answers a task; None where the image alone does.

    Raises:
        CallError: the policy is faulty, or does not fit the task or the size of its model's input.
    """
    task = config.task(name)
    if task.augmentation is None:
        return None
    policy = Policy.from_config(task.augmentation, config.augmentation(task.augmentation))
    if task.kind == "segmentation":
        policy.check_masks()
    if model.view.size is not None:
        policy.check_size(*model.view.size)
    return policy, task.num_views


def answerer(model: ResolvedModel, views: tuple[Policy, int] | None) -> str:
    """Value of the column ``model``. A mean over views is another answerer than the model alone."""
    if views is None:
        return model.id
    policy, num_views = views
    return f"{model.id}+{policy.name}.{policy.digest}x{num_views}"


def distinct_views(models: list[ResolvedModel]) -> tuple[View, ...]:
    """Each distinct view once, in order of first use."""
    return tuple(dict.fromkeys(model.view for model in models))


def make_spec(
    config: PredictConfig,
    tasks: Mapping[str, tuple[Kind, ResolvedModel, bool]],
    *,
    batch_size: int,
    chunk_rows: int,
    fragment_rows: int,
    asked: Mapping[str, Any],
    augmented: Mapping[str, tuple[Policy, int]] | None = None,
) -> PredictSpec:
    """The specification of a run.

    Args:
        config: the ``[predict]`` section.
        tasks: kind, resolved model and store_probabilities, by task name.
        batch_size: images per forward pass; 0 is planned when the work begins.
        chunk_rows: images per file of the plan.
        fragment_rows: images per written file.
        asked: what narrowed the plan.
        augmented: policy and number of views of the tasks that are answered by the mean over views.
    """
    augmented = augmented or {}
    views = distinct_views([model for _, model, _ in tasks.values()])
    return PredictSpec(
        tasks={
            name: TaskSpec(kind, model, views.index(model.view), store, *augmented.get(name, ()))
            for name, (kind, model, store) in sorted(tasks.items())
        },
        precision=config.precision,
        batch_size=batch_size,
        chunk_rows=chunk_rows,
        fragment_rows=fragment_rows,
        asked=asked,
        **reading(config),
    )


def reading(config: PredictConfig) -> dict[str, Any]:
    """The fields of ``ReadSpec`` that the ``[predict]`` section gives as they are."""
    names = (
        *("fetch_concurrency", "fetch_timeout_s", "retry_timeout_s", "image_timeout_s"),
        *("max_bytes", "max_pixels", "max_failure_share", "scaled_decoding"),
    )
    return {name: getattr(config, name) for name in names}
