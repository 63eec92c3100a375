"""The model's answers as what Label Studio draws, and people's answers as what stands in the table ``labels``.

Legend: a mask in Label Studio has the size of the image, W × H pixels after the EXIF orientation; the model's mask has
the resolution w × h at which it answered, and lies on the image as ``winnow.masks`` says.

A Label Studio task holds the image's address, its ``image_id`` and numbers; no name, no folder, no metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from winnow.errors import CallError, MaskError
from winnow.masks import (
    BACKGROUNDS,
    LabelMap,
    encode_classes,
    label_dtype,
    label_map,
    resize_to_source,
    unlabelled,
)
from winnow_connectors import brush
from winnow_connectors.label_config import CLASS, IMAGE, NOT_LISTED, REMARK, SEGMENTS, UNSURE

Json = dict[str, Any]

_NO_LABELS = (UNSURE, NOT_LISTED)
_HALF = 1000
"""Rank whose priority is one half."""


@dataclass(frozen=True)
class ReviewItem:
    """A row of ``queue``, and how its image is shown.

    Attributes:
        image_id: of the image.
        round: number of the selection.
        rank: place in the queue, the most useful first, from 0 or 1 on.
        reason: why it was chosen.
        audit: to be labelled blind: nothing that the model said may be told.
        url: address of the image for Label Studio; must not tell the original's name or folder.
        width: of the image as shown, in pixels.
        height: of the image as shown, in pixels.
    """

    image_id: str
    round: int
    rank: int
    reason: str
    audit: bool
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class Shape:
    """One class that the model found in an image: a row of ``segments``.

    Attributes:
        label: the class.
        rle: its mask in the model's resolution, COCO's run-length encoding.
        confidence: mean probability over its pixels; None if unknown.
    """

    label: str
    rle: Mapping[str, Any]
    confidence: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a person said about an image.

    Attributes:
        label: the class; None for masks, and when there is no label.
        value: the whole answer as JSON where there is more to it than the class: masks as ``docs/masks.md`` describes
            them, or ``{"answer": "unsure"}`` (``"not listed"``).
        changed: it differs from what was shown; None when nothing was shown.
    """

    label: str | None
    value: str | None
    changed: bool | None


@dataclass(frozen=True)
class Annotation:
    """An annotation as it is now, without its meaning: ``read_class`` and ``read_masks`` find that.

    Attributes:
        annotation_id: its number in Label Studio.
        annotator: mail address of who made it, or the number where the address is not told.
        seconds: spent on it; None if unknown.
        created_at: when it was made.
        updated_at: when it last changed.
        skipped: the person skipped the task.
        result: the regions and choices.
    """

    annotation_id: int
    annotator: str | None
    seconds: float | None
    created_at: datetime
    updated_at: datetime
    skipped: bool
    result: list[Json]


# ----------------------------------------------------------------------------------------------------------------- push


def task_data(item: ReviewItem) -> Json:
    """The data of a Label Studio task. Of an audit image it does not say why it was chosen."""
    data = {
        IMAGE: item.url,
        "image_id": item.image_id,
        "round": item.round,
        "width": item.width,
        "height": item.height,
    }
    return data if item.audit else {**data, "reason": item.reason}


def prediction(model: str, rank: int, result: list[Json]) -> Json:
    """A prediction with the queue's rank in its score: Label Studio serves the lowest score first.

    Args:
        model: version that answered; the project's ``model_version`` must be the same for the order to hold.
        rank: of the queue row.
        result: of ``class_result`` or ``mask_results``.
    """
    return {"model_version": model, "score": priority(rank), "result": result}


def priority(rank: int) -> float:
    """A number in [0, 1) that grows with the rank: what Label Studio takes as score."""
    return rank / (rank + _HALF)


def class_result(*labels: str, confidence: float | None = None) -> list[Json]:
    """The choice of a class, of several, or of none."""
    if not labels:
        return []
    choice = {"from_name": CLASS, "to_name": IMAGE, "type": "choices", "value": {"choices": list(labels)}}
    return [choice if confidence is None else {**choice, "score": confidence}]


def mask_results(shapes: Sequence[Shape], *, width: int, height: int) -> list[Json]:
    """A brush region for each class that the model found, but for the background; in the order given.

    A shape that covers the centre of no pixel of the image is left out.

    Args:
        shapes: of one image, all with masks of one size.
        width: of the image as shown.
        height: of the image as shown.

    Raises:
        MaskError: a mask is malformed, or has another size than the others.
    """
    if not shapes:
        return []
    names = _names((), shapes)
    labels_HW = _shown_map(shapes, names, width, height)
    found = []
    for number, shape in enumerate(shapes):
        mask_HW = labels_HW == names.index(shape.label)
        if shape.label in BACKGROUNDS or not mask_HW.any():
            continue
        region = {
            "id": f"model-{number}",
            "from_name": SEGMENTS,
            "to_name": IMAGE,
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": brush.encode(mask_HW), "brushlabels": [shape.label]},
        }
        found.append(region if shape.confidence is None else {**region, "score": shape.confidence})
    return found


# ----------------------------------------------------------------------------------------------------------------- pull


def read_annotation(data: Mapping[str, Any], annotators: Mapping[int, str]) -> Annotation:
    """An annotation as Label Studio's API tells it.

    Args:
        data: the JSON object.
        annotators: mail address by number of the user.

    Raises:
        CallError: it lacks what every annotation has.
    """
    try:
        user = data.get("completed_by")
        if isinstance(user, Mapping):
            annotator = user.get("email") or str(user["id"])
        else:
            annotator = None if user is None else annotators.get(user, str(user))
        seconds = data.get("lead_time")
        return Annotation(
            annotation_id=int(data["id"]),
            annotator=annotator,
            seconds=None if seconds is None else float(seconds),
            created_at=datetime.fromisoformat(data["created_at"]),
            updated_at=datetime.fromisoformat(data["updated_at"]),
            skipped=bool(data.get("was_cancelled")),
            result=list(data.get("result") or []),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CallError(
            f"Label Studio answered an annotation that cannot be read ({type(error).__name__}: {error}): {data!r:.200}"
        ) from None


def read_class(result: Sequence[Mapping[str, Any]], *, shown: Sequence[str] | None) -> Answer:
    """The class that a person chose, or the classes.

    Args:
        result: of the annotation.
        shown: the classes that the model answered, which were preselected; None when no answer was shown.
    """
    chosen = _chosen(result, CLASS)
    return Answer(*class_columns(chosen), None if shown is None else set(chosen) != set(shown))


def class_columns(chosen: Sequence[str]) -> tuple[str | None, str | None]:
    """What stands in the columns ``label`` and ``value`` for the classes that were chosen."""
    if len(chosen) != 1:
        return None, _json({"choices": sorted(chosen)})
    return (None, _json({"answer": chosen[0]})) if chosen[0] in _NO_LABELS else (chosen[0], None)


def read_masks(
    result: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    *,
    width: int,
    height: int,
    shown: Sequence[Shape] | None,
) -> Answer:
    """The masks that a person painted: a label of pixels, in which every pixel is of one class at most.

    Regions count in their order: where two overlap, the later one. What nobody painted is background when the task has
    such a class, else not labelled; what was painted as unsure or not listed is not labelled. Where the person said one
    of the two of the whole image, no pixel is labelled.

    Args:
        result: of the annotation.
        classes: of the task, in the order of their ids. Others that were painted are kept under their names.
        width: of the image as shown.
        height: of the image as shown.
        shown: the model's answer that was drawn in; None when none was.

    Raises:
        MaskError: a region is malformed, or has another size than the image.
    """
    names = _names(classes, shown or (), (label for item in result for label in _painted(item)))
    labels_HW = np.full((height, width), _ground(names, classes), dtype=label_dtype(len(names)))
    for region in result:
        for label in _painted(region)[:1]:
            mask_HW = _read_region(region, width, height)
            labels_HW[mask_HW] = unlabelled(labels_HW) if label in _NO_LABELS else names.index(label)
    remark = _chosen(result, REMARK)
    changed = None
    if shown is not None:
        changed = bool(remark) or not np.array_equal(labels_HW, _as_painted(shown, names, classes, width, height))
    if remark:
        return Answer(None, _json({"segments": [], "answer": remark[0]}), changed)
    void = unlabelled(labels_HW)
    found = [item for item in encode_classes(labels_HW) if item.value != void]
    return Answer(None, _json({"segments": [{"label": names[item.value], "rle": item.rle} for item in found]}), changed)


# --------------------------------------------------------------------------------------------------------------- inside


def _chosen(result: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The values chosen in one control."""
    values = (item.get("value") or {} for item in result if item.get("from_name") == name)
    return [str(choice) for value in values for choice in value.get("choices") or []]


def _painted(region: Mapping[str, Any]) -> list[str]:
    """The label of a brush region, in a list; empty for anything else."""
    if region.get("from_name") != SEGMENTS:
        return []
    labels = (region.get("value") or {}).get("brushlabels") or []
    return [str(label) for label in labels]


def _read_region(region: Mapping[str, Any], width: int, height: int) -> Any:
    size = region.get("original_width"), region.get("original_height")
    if size != (width, height):
        raise MaskError(
            f"the region of {_painted(region)[0]!r} was painted on an image of {size[0]} x {size[1]} pixels, but the "
            f"image has {width} x {height}; was the image replaced?"
        )
    return brush.decode(region["value"].get("rle") or [], width=width, height=height)


def _names(classes: Sequence[str], shapes: Sequence[Shape], painted: Any = ()) -> list[str]:
    """Every class once: those of the task first."""
    found = dict.fromkeys([*classes, *(shape.label for shape in shapes), *painted])
    return [name for name in found if name not in _NO_LABELS]


def _ground(names: Sequence[str], classes: Sequence[str]) -> int:
    """The value of what nobody painted."""
    background = next((name for name in classes if name in BACKGROUNDS), None)
    return int(np.iinfo(label_dtype(len(names))).max) if background is None else names.index(background)


def _shown_map(shapes: Sequence[Shape], names: Sequence[str], width: int, height: int) -> LabelMap:
    """The model's answer in the size of the image, uint8 or uint16 (H, W)."""
    labels: LabelMap = resize_to_source(label_map([(shape.label, shape.rle) for shape in shapes], names), width, height)
    return labels


def _as_painted(
    shapes: Sequence[Shape], names: Sequence[str], classes: Sequence[str], width: int, height: int
) -> LabelMap:
    """What ``read_masks`` finds when the model's answer is left as it was drawn: the background is not drawn."""
    ground = _ground(names, classes)
    if not shapes:
        return np.full((height, width), ground, dtype=label_dtype(len(names)))
    labels_HW = _shown_map(shapes, names, width, height)
    backgrounds = [number for number, name in enumerate(names) if name in BACKGROUNDS]
    labels_HW[np.isin(labels_HW, [*backgrounds, unlabelled(labels_HW)])] = ground
    return labels_HW


def _json(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
