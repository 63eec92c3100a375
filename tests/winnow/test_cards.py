from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from winnow.config import TaskConfig
from winnow.errors import CallError, JobError
from winnow.images import View
from winnow.models.cards import Card, LabelsSnapshot, check_task, parse_version, version_name

CARD = Card(
    task="garment",
    version="garment@2",
    kind="classification",
    architecture="timm/test_resnet",
    head="linear",
    classes=("dress", "hat", "t-shirt"),
    view=View(resize=232, crop=(160, 160), interpolation="bicubic"),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    temperature=1.0,
    metrics={"test": {"n": 3, "accuracy": 0.5, "classes": {"dress": {"f1": None}}}},
    labels=LabelsSnapshot(digest="ab", counts={"train": {"dress": 2, "hat": 1}}),
    parent="timm/test_resnet.r160_in1k",
    digest="cd",
    seed=7,
    created_at="2026-01-31T10:00:00+00:00",
    winnow_version="0.1",
    sha256="0" * 64,
    run="20260131-100000-train-abcdef",
)


def edited(**changes: Any) -> bytes:
    return json.dumps({**json.loads(CARD.to_json()), **changes}).encode()


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        dataclasses.replace(CARD, view=View(resize=(128, 64), crop=None), classes=("ä\n", '"'), head=""),
        dataclasses.replace(CARD, kind="segmentation", head="pyramid", metrics={}),
    ],
    ids=["linear", "odd names", "pyramid"],
)
def test_a_card_comes_back_as_it_was_written(card: Card) -> None:
    found = Card.from_json(card.to_json(), card.version)
    assert found == card
    assert type(found.view.crop) is type(card.view.crop)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[1, 2]", "damaged"),
        (CARD.to_json()[:200], "damaged"),
        (edited(format=2), "has format 2; this version of winnow reads format 1"),
        (edited(format="1"), "has format '1'"),
        (edited(surprise=1), "surprise: "),
        (edited(view={**json.loads(CARD.to_json())["view"], "zoom": 2}), "view.zoom: "),
        (edited(view={"resize": 0}), "at least 1 pixel"),
        (edited(classes=["dress"]), "1 classes are too few"),
        (edited(classes=["dress", "hat", "hat"]), "a class stands twice"),
        (edited(classes=["dress", 3]), "classes.1: "),
        (edited(kind="detection"), "kind: "),
        (edited(head="mlp"), "head: "),
        (edited(seed="7"), "seed: "),
        (edited(std=[0.2, 0.0, 0.2]), "is not above 0"),
        (edited(mean=[0.5, 0.5]), "mean"),
        (edited(temperature=0), "temperature 0.0 is not above 0"),
        (edited(temperature=float("nan")), "temperature nan is not above 0"),
        (edited(sha256="../../x"), "is no SHA-256"),
        (edited(version="hat@2"), "is not garment@NUMBER"),
        (edited(version="garment@base"), "is not garment@NUMBER"),
    ],
)
def test_a_card_that_says_anything_unexpected_is_refused_as_a_whole(data: bytes, says: str) -> None:
    with pytest.raises(JobError) as caught:
        Card.from_json(data, "garment@2")
    assert says in caught.value.message
    assert "card of garment@2" in caught.value.message
    assert len(caught.value.message) < 500


def test_a_card_without_one_of_its_fields_is_refused() -> None:
    for name in set(json.loads(CARD.to_json())) - {"multi_label"}:  # which is newer than the format
        data = json.loads(CARD.to_json())
        del data[name]
        with pytest.raises(JobError, match=name):
            Card.from_json(json.dumps(data).encode(), "garment@2")


def test_names_of_versions() -> None:
    assert parse_version(version_name("garment", 12)) == ("garment", 12)
    assert parse_version("garment@base") == ("garment", None)
    for wrong in ("garment", "garment@", "garment@0", "garment@-1", "garment@01", "Garment@1", "@1", "a@b", "a@1 "):
        with pytest.raises(CallError, match="write TASK@NUMBER"):
            parse_version(wrong)


def test_a_version_must_answer_what_is_asked() -> None:
    check_task(CARD, TaskConfig(model="m", classes=("dress", "hat", "t-shirt", "shoes")))
    check_task(CARD, TaskConfig(model="m"))
    with pytest.raises(CallError, match=r"answers classes that tasks.garment.classes does not have: dress, t-shirt"):
        check_task(CARD, TaskConfig(model="m", classes=("hat", "shoes")))
    with pytest.raises(CallError, match=r"answers classification, but tasks.garment.kind is embedding"):
        check_task(CARD, TaskConfig(model="m", kind="embedding"))
