"""``winnow.toml``: typed, frozen, validated as a whole.

Every field carries its description: ``winnow init`` and ``docs/configuration.md`` are written from it.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from winnow.errors import CallError, ConfigError
from winnow.uris import redact

TaskName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["classification", "segmentation", "embedding"]

DEFAULT_POLICY = "default"
"""Name of the policy that needs no section."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WarehouseConfig(_Section):
    """Where the tables, plans and models live."""

    uri: str = Field(
        "./warehouse",
        min_length=1,
        description="Folder or object-store prefix (s3://bucket/prefix, gs://, az://); relative to winnow.toml.",
    )


class StorageConfig(_Section):
    """How to reach the URLs that start with this section's name; the longest matching name wins.

    Secrets never stand here: keys come from the environment (AWS_ACCESS_KEY_ID, …), a cloud profile, or the machine's
    role.
    """

    endpoint: str | None = Field(None, description="Address of an S3-compatible server, such as http://127.0.0.1:8333.")
    region: str | None = Field(None, description="Region of the bucket; most S3-compatible servers accept any.")
    profile: str | None = Field(None, description="Name of a profile in the AWS credentials file.")
    credentials_file: str | None = Field(
        None, description="AWS credentials file to read the profile from, instead of ~/.aws/credentials."
    )
    anonymous: bool = Field(False, description="Do not sign requests (public buckets).")

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if value is not None and "@" in value:
            raise ValueError("must not hold credentials; use the environment or a profile")
        return value


class TaskConfig(_Section):
    """Something to find out about every image."""

    kind: Kind = Field(
        "classification",
        description=(
            "What the answer looks like: classification (table predictions), segmentation (table segments) or "
            "embedding (table embeddings)."
        ),
    )
    model: str = Field(
        min_length=1,
        description=(
            "Model reference: torchvision/NAME[@WEIGHTS], timm/NAME, or a checkpoint (.safetensors, .pth) "
            "by path or URL; a checkpoint also needs architecture and classes."
        ),
    )
    architecture: str | None = Field(
        None, description="For a checkpoint: torchvision/NAME or timm/NAME whose weights the file holds."
    )
    classes: tuple[str, ...] | None = Field(
        None,
        description=(
            "Class names in the order of the model's outputs. Known already for built-in weights; another number of "
            "names makes the model a starting point for `winnow train`."
        ),
    )
    size: int | None = Field(
        None,
        ge=32,
        le=4096,
        examples=[520],
        description=(
            "Segmentation only: images are fitted into a square of this many pixels a side, and masks have this "
            "resolution. 520 by default, as torchvision's."
        ),
    )
    crop: float | None = Field(
        None,
        ge=0.1,
        le=1.0,
        examples=[1.0],
        description=(
            "Classification and embedding: side of the square that the model sees, as a share of the image's shorter "
            "side. The weights' own by default, such as 0.875; with 1.0 less of the image is lost, at the same cost."
        ),
    )
    multiple_choice: bool = Field(
        False,
        description=(
            "Classification only: an image may have several classes. People may choose several, and `winnow train` "
            "(without --head) learns from that. Counts when the task's project in Label Studio is made."
        ),
    )
    store_probabilities: bool = Field(
        False, description="Also store the whole probability vector of every image (predictions.probabilities)."
    )
    augmentation: str | None = Field(
        None,
        examples=["mild"],
        description=(
            "Name of an [augmentations.NAME] section: the answer is the mean over the image and num_views - 1 "
            "augmented views of it, and how much they disagree is stored."
        ),
    )
    num_views: int = Field(4, ge=2, le=64, description="Views per image, the image itself included, with augmentation.")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> TaskConfig:
        if self.crop is not None and self.kind == "segmentation":
            raise ValueError(f"crop = {self.crop:g} is not for segmentation, which sees whole images; leave it out")
        if self.multiple_choice and self.kind != "classification":
            raise ValueError(f"multiple_choice is for classification only, not {self.kind}; leave it out")
        return self

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("classes")
    @classmethod
    def _classes_are_distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is None:
            return value
        if len(value) < 2:
            raise ValueError("needs at least two class names")
        doubled = sorted({name for name in value if value.count(name) > 1})
        if doubled:
            raise ValueError(f"names must be distinct; given twice: {', '.join(doubled)}")
        return value


class AugmentationConfig(_Section):
    """A policy: transforms of torchvision.transforms.v2 by name, applied in order, seeded by image.

    Used for averaged views in predict and for copies by `winnow augment`.
    """

    transforms: tuple[dict[str, Any], ...] = Field(
        min_length=1,
        description=(
            'Such as [{ name = "RandomHorizontalFlip" }, { name = "ColorJitter", brightness = 0.2 }]: the name of a '
            "torchvision.transforms.v2 class and its parameters."
        ),
    )
    seed: int = Field(0, ge=0, description="Another seed gives other views of the same images.")

    @field_validator("transforms", mode="before")
    @classmethod
    def _transforms_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("transforms")
    @classmethod
    def _transforms_have_names(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for number, transform in enumerate(value, start=1):
            if not isinstance(transform.get("name"), str):
                raise ValueError(f'transform {number} needs a name, such as name = "RandomHorizontalFlip"')
        return value


class IngestConfig(_Section):
    """Which objects under a source are images to know about."""

    include: tuple[str, ...] = Field(
        ("*",), description="Keep only objects whose path matches one of these glob patterns."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Leave out objects whose path matches one of these glob patterns, such as '*.json'."
    )
    hidden: bool = Field(False, description="Also take names that start with a dot.")

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _patterns_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class SplitsConfig(_Section):
    """Shares given by hash when an image is first seen; never changed afterwards."""

    train: Share = Field(0.8, description="Share of images for training.")
    val: Share = Field(0.1, description="Share for validation and calibration.")
    test: Share = Field(0.1, description="Share for measuring.")
    audit: Share = Field(
        0.02, description="Share of all images kept out of everything but honest statistics, across the three splits."
    )

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitsConfig:
        total = self.train + self.val + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"train + val + test must be 1.0; they add up to {total:g}")
        return self


class PolicyConfig(_Section):
    """What people see: the share of images that each strategy chooses (docs/selection.md). Shares add up to 1."""

    least_confidence: Share = Field(0.0, description="Share of images whose likeliest class has a low probability.")
    margin: Share = Field(
        0.0, description="Share of images whose two likeliest classes are close; classification tasks only."
    )
    entropy: Share = Field(0.0, description="Share of images with a high entropy; of masks the mean over the pixels.")
    disagreement: Share = Field(
        0.0, description="Share of images whose augmented views disagree; needs augmentation in the task."
    )
    diversity: Share = Field(
        0.0, description="Share of images that lie far from all that people know; needs an embedding task."
    )
    class_balance: Share = Field(0.0, description="Share of images of the classes that people have seen least of.")
    random: Share = Field(0.0, description="Share of images chosen at random.")

    @model_validator(mode="after")
    def _add_up_to_one(self) -> PolicyConfig:
        total = sum(self.shares().values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares must add up to 1.0; they add up to {total:g}")
        return self

    def shares(self) -> dict[str, float]:
        """Share of each strategy that has one."""
        return {name: share for name in type(self).model_fields if (share := getattr(self, name)) > 0.0}


class SelectConfig(_Section):
    """Which images `winnow select` chooses for people."""

    policy: TaskName = Field(
        DEFAULT_POLICY,
        description=(
            "Name of a [policies.NAME] section. Without its section, default is 0.5 margin (of masks: entropy), 0.3 "
            "diversity, 0.1 class_balance and 0.1 random; without an embedding task 0.8 margin and no diversity."
        ),
    )
    audit_share: Share = Field(
        0.1, description="Share of the budget that comes from the audit reserve, to be labelled blind."
    )
    embedding: TaskName | None = Field(
        None, description="Embedding task whose vectors say what is alike; the only one by default."
    )
    near_duplicates: float = Field(
        0.94,
        gt=0.0,
        le=1.0,
        description="Cosine from which on images are near-duplicates, of which people see one; suits MobileNetV2.",
    )


class ReviewConfig(_Section):
    """What people get to see in Label Studio; its address and token come from the environment."""

    serve_originals: bool = Field(
        False,
        description=(
            "Show annotators the original files instead of copies. This reveals their names and folders, and metadata "
            "such as the place and the camera."
        ),
    )


class PromotionConfig(_Section):
    """When `winnow models promote` lets a version answer without `--force` (docs/evaluate.md)."""

    margin: Share = Field(
        0.01,
        description=(
            "The 95 % interval of the difference in accuracy (of masks: mean IoU) must lie above minus this as a whole."
        ),
    )
    max_class_drop: Share = Field(
        0.05,
        description=(
            "The recall of a class (of masks: its IoU) may fall by this much; by more only where that may be chance."
        ),
    )


class PredictConfig(_Section):
    """How predict runs. 0 or "auto" means: planned from what the cluster has."""

    batch_size: int = Field(0, ge=0, le=65_536, description="Images per forward pass; 0 plans it.")
    precision: Precision = Field(
        "auto",
        description="One of auto, float32, bfloat16, float16 (GPU only); auto is float32, which equals torchvision.",
    )
    num_inference_workers: int = Field(
        0, ge=0, description="Actors that hold the models; 0 plans one per GPU, or one per node."
    )
    num_decode_workers: int = Field(0, ge=0, description="Actors that fetch and decode; 0 plans them.")
    decoders_per_worker: int = Field(
        0, ge=0, le=256, description="Decoder processes in each of those actors; 0 plans them."
    )
    fetch_concurrency: int = Field(32, ge=1, le=4096, description="Requests in flight per fetching actor.")
    fetch_timeout_s: float = Field(
        60.0, gt=0, description="Longest silence while an object is read, and longest connect."
    )
    retry_timeout_s: float = Field(
        120.0, ge=0, description="How long 5xx, throttling and refused connections are retried, with backoff."
    )
    image_timeout_s: float = Field(20.0, gt=0, description="Longest decoding of one image.")
    max_bytes: int = Field(100_000_000, ge=1, description="Largest object that is read, in bytes.")
    max_pixels: int = Field(
        100_000_000, ge=1, description="Largest image that is decoded, in pixels, refused from its header."
    )
    scaled_decoding: bool = Field(
        False,
        description=(
            "Let large JPEGs decode at 1/2, 1/4 or 1/8 size: up to 5 times faster on 12 megapixels, with slightly "
            "different answers (docs/models.md)."
        ),
    )
    max_failure_share: Share = Field(
        0.2,
        description="Stop when more than this share of at least 200 images fails for reasons of access or storage.",
    )
    fragment_rows: int = Field(0, ge=0, le=1_000_000, description="Images per written file; 0 plans it, up to 20,000.")


class TrainConfig(_Section):
    """How `winnow train` teaches whole networks. `winnow train --head` needs none of it."""

    unfreeze: Literal["head", "last", "all"] = Field(
        "all",
        description="What is learned: all weights, the last third of the backbone's blocks and the head, or the head.",
    )
    epochs: int = Field(15, ge=1, le=10_000, description="Most times that every image is looked at.")
    patience: int = Field(
        5, ge=0, description="Epochs without a better validation loss after which training ends; 0 never ends it early."
    )
    batch_size: int = Field(32, ge=1, le=65_536, description="Images per step, of all workers together.")
    learning_rate: float = Field(3e-4, gt=0, le=1.0, description="Highest learning rate of the backbone.")
    head_learning_rate: float = Field(3e-3, gt=0, le=1.0, description="Highest learning rate of the head.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="How the rates go on after they rose to their highest: fall to nothing, or stay."
    )
    weight_decay: float = Field(0.02, ge=0, le=1.0, description="Of AdamW, for all weights but biases and norms.")
    balance: Literal["none", "weights", "sampling"] = Field(
        "none",
        description=(
            "For rare classes: none, heavier weights in the loss, or images of rare classes more often (not for masks)."
        ),
    )
    augmentation: TaskName = Field(
        "standard",
        description=(
            "Name of an [augmentations.NAME] section, applied to every image anew in every epoch; standard (a random "
            "crop, mirroring, other light) needs no section, and none leaves images as they are."
        ),
    )
    precision: Precision = Field(
        "auto", description="One of auto, float32, bfloat16; auto is bfloat16 on GPUs that compute it, else float32."
    )
    num_workers: int = Field(0, ge=0, le=4096, description="Training workers; 0 plans one per GPU, or one per node.")
    checkpoint_s: float = Field(120.0, gt=0, description="Seconds of work that a kill may cost at most.")

    @field_validator("precision")
    @classmethod
    def _precision_trains(cls, value: Precision) -> Precision:
        if value == "float16":
            raise ValueError("float16 loses small gradients; choose auto, float32 or bfloat16")
        return value


class Config(_Section):
    """The whole of winnow.toml."""

    warehouse: WarehouseConfig = Field(default_factory=WarehouseConfig)
    storage: dict[str, StorageConfig] = Field(default_factory=dict)
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)
    augmentations: dict[TaskName, AugmentationConfig] = Field(default_factory=dict)
    ingest: IngestConfig = Field(default_factory=IngestConfig)
    splits: SplitsConfig = Field(default_factory=SplitsConfig)
    predict: PredictConfig = Field(default_factory=PredictConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    select: SelectConfig = Field(default_factory=SelectConfig)
    policies: dict[TaskName, PolicyConfig] = Field(default_factory=dict)
    review: ReviewConfig = Field(default_factory=ReviewConfig)
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)

    @field_validator("storage")
    @classmethod
    def _storage_names_are_urls(cls, value: dict[str, StorageConfig]) -> dict[str, StorageConfig]:
        wrong = [name for name in value if "://" not in name]
        if wrong:
            raise ValueError(
                f'section names are URL prefixes such as "s3://" or "s3://bucket"; not: {", ".join(wrong)}'
            )
        return value

    @model_validator(mode="after")
    def _augmentations_exist(self) -> Config:
        for name, task in self.tasks.items():
            if task.augmentation is not None and task.augmentation not in self.augmentations:
                known = ", ".join(sorted(self.augmentations)) or "none"
                raise ValueError(
                    f"tasks.{name}.augmentation = {task.augmentation!r} is unknown; configured [augmentations.NAME] "
                    f"sections: {known}"
                )
        return self

    @model_validator(mode="after")
    def _selection_exists(self) -> Config:
        name, embedding = self.select.policy, self.select.embedding
        if name != DEFAULT_POLICY and name not in self.policies:
            known = ", ".join(sorted({DEFAULT_POLICY, *self.policies}))
            raise ValueError(f"select.policy = {name!r} is unknown; configured policies: {known}")
        if embedding is not None and (embedding not in self.tasks or self.tasks[embedding].kind != "embedding"):
            known = ", ".join(self.embedding_tasks) or "none"
            raise ValueError(
                f'select.embedding = {embedding!r} is no task with kind = "embedding"; configured ones: {known}'
            )
        return self

    @property
    def embedding_tasks(self) -> list[str]:
        """Names of the tasks whose answers are vectors."""
        return [name for name, task in self.tasks.items() if task.kind == "embedding"]

    def policy(self, name: str, kind: Kind) -> PolicyConfig:
        """The policy of that name, for a task of that kind.

        Raises:
            CallError: no such section; the message lists those that exist.
        """
        if name in self.policies:
            return self.policies[name]
        if name != DEFAULT_POLICY:
            known = ", ".join(sorted({DEFAULT_POLICY, *self.policies}))
            raise CallError(f"policy {name!r} is unknown; configured policies: {known}")
        shares = {"diversity": 0.3} if self.embedding_tasks else {}
        uncertainty = "entropy" if kind == "segmentation" else "margin"
        return PolicyConfig(**{**shares, uncertainty: 0.8 - sum(shares.values()), "class_balance": 0.1, "random": 0.1})

    def augmentation(self, name: str) -> AugmentationConfig:
        """The augmentation policy of that name.

        Raises:
            CallError: no such section; the message lists those that exist.
        """
        try:
            return self.augmentations[name]
        except KeyError:
            known = ", ".join(sorted(self.augmentations)) or "none; add an [augmentations.NAME] section to winnow.toml"
            raise CallError(f"augmentation {name!r} is unknown; configured augmentations: {known}") from None

    def task(self, name: str) -> TaskConfig:
        """The task of that name.

        Raises:
            CallError: no such task; the message lists those that exist.
        """
        try:
            return self.tasks[name]
        except KeyError:
            known = ", ".join(sorted(self.tasks)) or "none; add a [tasks.NAME] section to winnow.toml"
            raise CallError(f"task {name!r} is unknown; configured tasks: {known}") from None


def load_config(path: Path) -> Config:
    """Read and validate a configuration file.

    Raises:
        ConfigError: the file is missing, is not TOML, or has faults; the message lists every fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `winnow init` writes one, or name another with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return parse_config(text, name=str(path))


def parse_config(text: str, *, name: str = "winnow.toml") -> Config:
    """Validate configuration text; ``name`` stands in the messages.

    Raises:
        ConfigError: not TOML, or faulty; the message lists every fault with key, value and what is valid.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from None
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors(include_url=False)]
    raise ConfigError("\n".join([f"{name} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:", *faults]))


def _describe(fault: Any) -> str:
    """One line: key, value, what is valid."""
    location = fault["loc"]
    if not location:  # a fault between sections names its keys itself
        return f"  {_lower(fault['msg'].removeprefix('Value error, '))}"
    key = ".".join(_quote(part) for part in location)
    kind, message, value = fault["type"], fault["msg"], fault.get("input")
    if kind == "extra_forbidden":
        return f"  {key}: unknown key{_did_you_mean(location)}"
    if kind == "missing":
        return f"  {key}: missing; {_lower(_description(location))}"
    message = _lower(message.removeprefix("Value error, "))
    if kind in ("tuple_type", "list_type"):
        message = "input should be a list" + (f", such as [{json.dumps(value)}]" if isinstance(value, str) else "")
    if location[-1] == "[key]":
        key = ".".join(_quote(part) for part in location[:-1])
        return f"  {key}: a name starts with a lower-case letter; lower-case letters, digits and _ follow, 63 at most"
    if isinstance(value, dict):
        return f"  {key}: {message}"
    shown = redact(value) if isinstance(value, str) else value
    return f"  {key} = {shown!r}: {message}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _quote(part: int | str) -> str:
    text = str(part)
    return f'"{text}"' if not text.replace("_", "").replace("-", "").isalnum() else text


def _section_class(location: tuple[int | str, ...]) -> type[_Section] | None:
    """The section that the last part of a location belongs to."""
    if len(location) == 1:
        return Config
    tables: dict[str, type[_Section]] = {
        "storage": StorageConfig,
        "tasks": TaskConfig,
        "augmentations": AugmentationConfig,
        "policies": PolicyConfig,
    }
    first = str(location[0])
    if first in tables:
        return tables[first] if len(location) == 3 else None
    field = Config.model_fields.get(first)
    annotation = field.annotation if field else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, _Section) else None


def _description(location: tuple[int | str, ...]) -> str:
    section = _section_class(location)
    field = section.model_fields.get(str(location[-1])) if section else None
    return (field.description if field else None) or "this key is required"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    section = _section_class(location)
    if section is None:
        return ""
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid keys: {', '.join(known)}"
