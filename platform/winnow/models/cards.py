"""The card of a model version: what it is, what it was made from, and how good it was when it was made.

A version is named ``<task>@<n>``; ``<task>@base`` is the model that winnow.toml names. The card lies beside the
weights as ``card.json``. It is read strictly: a card that says anything unexpected is refused as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from winnow.config import Kind, TaskConfig
from winnow.errors import CallError, JobError
from winnow.images import View
from winnow.models.architectures import Triple

CARD_FORMAT = 1
"""Raised when a field changes its meaning; a card of another format is refused."""

BASE = "base"
"""What stands behind the ``@`` for the model that winnow.toml names."""

Head = Literal["linear", "rms_linear", "pyramid", ""]
"""What answers on top of the backbone: one linear layer, one on scaled features, a decoder over maps, or nothing."""

_VERSION = re.compile(r"([a-z][a-z0-9_]{0,62})@(base|[1-9][0-9]{0,8})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LabelsSnapshot:
    """The labels that a version was made from.

    Attributes:
        digest: of image ids, splits and labels, hex.
        counts: labels by split and class; for segmentation, labelled images with at least one pixel of the class.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    digest: str
    counts: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Card:
    """One model version.

    Attributes:
        task: what it answers.
        version: its name, ``<task>@<n>``.
        kind: what its answers look like.
        architecture: ``torchvision/NAME`` or ``timm/NAME``.
        head: ``linear``, ``rms_linear`` or ``pyramid`` on a backbone; empty for a network that is whole in itself.
        classes: names of the outputs, distinct, in order.
        view: which pixels the network sees.
        mean, std: normalisation of pixels in [0, 1], by channel R, G, B.
        temperature: by which logits are divided before softmax.
        metrics: measured when it was made, by split; see ``winnow.metrics``.
        labels: what it learned from.
        parent: id of the model it was built on.
        digest: of what was asked for: labels, seed, parent, classes, trainer. A head also depends on which images
            without labels there were: ``metrics["fit"]["unlabelled"]`` is their digest.
        seed: of the training.
        created_at: UTC, ISO 8601.
        winnow_version: that made it.
        sha256: of the weights file, hex.
        run: that made it.
        multi_label: an image may have several of the classes.
        format: of the card.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # of the view too: what it does not know it cannot honour

    task: str
    version: str
    kind: Kind
    architecture: str
    head: Head
    classes: tuple[str, ...]
    view: View
    mean: Triple
    std: Triple
    temperature: float
    metrics: dict[str, Any]
    labels: LabelsSnapshot
    parent: str
    digest: str
    seed: int
    created_at: str
    winnow_version: str
    sha256: str
    run: str
    multi_label: bool = False
    format: int = CARD_FORMAT

    def __post_init__(self) -> None:
        found = _VERSION.fullmatch(self.version)
        if not found or found[1] != self.task or found[2] == BASE:
            raise ValueError(f"version {self.version!r} is not {self.task}@NUMBER")
        if len(self.classes) < 2 and self.kind != "embedding":
            raise ValueError(f"{len(self.classes)} classes are too few; there are at least two")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class stands twice")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature} is not above 0")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std {self.std} is not above 0")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 {self.sha256[:80]!r} is no SHA-256")

    def to_json(self) -> bytes:
        """The text of ``card.json``, for machines and people."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Card:
        """The card that ``to_json`` wrote.

        Args:
            data: the file.
            name: of the version, for messages.

        Raises:
            JobError: the card is damaged, of another format, or says what no card says; the message names the field.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            format = json.loads(data)["format"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise JobError(f"the card of {name} is damaged: {_short(error)}; train the task again") from None
        if format != CARD_FORMAT:
            raise JobError(
                f"the card of {name} has format {format!r}; this version of winnow reads format {CARD_FORMAT}: install "
                "a matching version, or train the task again"
            )
        try:
            return TypeAdapter(cls).validate_json(data, strict=True)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'card'}: {fault['msg'].removeprefix('Value error, ')}"
                for fault in error.errors(include_url=False)[:5]
            )
            raise JobError(f"the card of {name} is damaged: {faults}; train the task again") from None


def version_name(task: str, number: int) -> str:
    """Such as ``garment@2``."""
    return f"{task}@{number}"


def parse_version(text: str) -> tuple[str, int | None]:
    """Task and number of a version's name; None for ``@base``.

    Raises:
        CallError: it is no such name.
    """
    found = _VERSION.fullmatch(text)
    if not found:
        raise CallError(
            f"model version {text!r} is not understood; write TASK@NUMBER, such as garment@2, or TASK@{BASE} for the "
            "model of winnow.toml; `winnow models list` shows what there is"
        )
    return found[1], None if found[2] == BASE else int(found[2])


def check_task(card: Card, task: TaskConfig) -> None:
    """Make sure that a version answers what winnow.toml asks.

    Raises:
        CallError: it is of another kind, or has classes that winnow.toml does not have.
    """
    if card.kind != task.kind:
        raise CallError(
            f"{card.version} answers {card.kind}, but tasks.{card.task}.kind is {task.kind}; choose another version"
        )
    if card.multi_label != task.multiple_choice:
        several = "several classes" if card.multi_label else "one class"
        raise CallError(
            f"{card.version} answers {several} an image, but tasks.{card.task}.multiple_choice is "
            f"{str(task.multiple_choice).lower()}; choose another version, or train one"
        )
    classes = task.classes
    unknown = [name for name in card.classes if classes is not None and name not in classes]
    if unknown:
        raise CallError(
            f"{card.version} answers classes that tasks.{card.task}.classes does not have: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}; add them to winnow.toml, or choose another version with --model"
        )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
