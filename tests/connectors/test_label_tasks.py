"""Queue rows and answers as Label Studio's JSON and back, pixel by pixel; nothing tells where an image is from."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from winnow.errors import CallError, MaskError
from winnow.mask_files import read_label
from winnow.masks import LabelMap, encode, encode_classes, resize_to_source
from winnow_connectors import brush
from winnow_connectors.label_config import NOT_LISTED, UNSURE
from winnow_connectors.label_tasks import (
    Answer,
    ReviewItem,
    Shape,
    class_result,
    mask_results,
    prediction,
    priority,
    read_annotation,
    read_class,
    read_masks,
    task_data,
)

CLASSES = ["background", "cat", "dog", "bird"]
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
label_maps = st.tuples(st.integers(1, 20), st.integers(1, 20)).flatmap(
    lambda size: arrays.arrays(np.uint8, size, elements=st.integers(0, 3))
)


def _shapes(labels_hw: LabelMap, classes: list[str] = CLASSES) -> list[Shape]:
    return [Shape(classes[found.value], found.rle, 0.5) for found in encode_classes(labels_hw)]


def _region(label: str, mask: np.ndarray) -> dict[str, object]:
    return {
        "from_name": "segments",
        "to_name": "image",
        "type": "brushlabels",
        "original_width": mask.shape[1],
        "original_height": mask.shape[0],
        "value": {"format": "rle", "rle": brush.encode(mask), "brushlabels": [label]},
    }


def _labels(answer: Answer, classes: list[str], width: int, height: int) -> LabelMap:
    assert answer.value is not None
    return read_label(answer.value, classes, width=width, height=height, read=lambda uri: b"")


# -- push --------------------------------------------------------------------------------------------------------------


def _item(audit: bool) -> ReviewItem:
    return ReviewItem("ab" * 16, 2, 7, "margin 0.02", audit, "s3://review/ab.jpg", 640, 480)


def test_a_task_tells_the_image_by_its_id_alone() -> None:
    assert task_data(_item(False)) == {
        "image": "s3://review/ab.jpg",
        "image_id": "ab" * 16,
        "round": 2,
        "width": 640,
        "height": 480,
        "reason": "margin 0.02",
    }
    assert "reason" not in task_data(_item(True))


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_priority_keeps_the_order_of_the_queue(one: int, other: int) -> None:
    assert 0.0 <= priority(one) < 1.0
    assert (priority(one) < priority(other)) == (one < other)


def test_a_prediction_names_model_rank_and_class() -> None:
    made = prediction("pets@3", 1000, class_result("cat", confidence=0.75))
    assert (made["model_version"], made["score"]) == ("pets@3", 0.5)
    (choice,) = made["result"]
    assert choice["value"] == {"choices": ["cat"]}
    assert choice["score"] == 0.75


@given(label_maps, sizes)
def test_masks_are_drawn_in_the_size_of_the_image_and_the_background_is_not(
    labels: LabelMap, size: tuple[int, int]
) -> None:
    width, height = size
    regions = mask_results(_shapes(labels), width=width, height=height)
    source = resize_to_source(labels, width, height)
    drawn = {region["value"]["brushlabels"][0]: region for region in regions}
    assert set(drawn) == {CLASSES[value] for value in np.unique(source)} - {"background"}
    assert len({region["id"] for region in regions}) == len(regions)
    for label, region in drawn.items():
        mask = brush.decode(region["value"]["rle"], width=width, height=height)
        assert np.array_equal(mask, source == CLASSES.index(label))


def test_no_shapes_draw_nothing() -> None:
    assert mask_results([], width=4, height=3) == []


# -- pull: classes -----------------------------------------------------------------------------------------------------


def test_a_class_comes_back_and_says_whether_the_person_changed_it() -> None:
    assert read_class(class_result("cat", confidence=0.9), shown=["cat"]) == Answer("cat", None, False)
    assert read_class(class_result("cat"), shown=["dog"]) == Answer("cat", None, True)
    assert read_class(class_result("cat"), shown=None) == Answer("cat", None, None)


@pytest.mark.parametrize("said", [UNSURE, NOT_LISTED])
def test_unsure_and_not_listed_are_answers_without_a_label(said: str) -> None:
    answer = read_class(class_result(said), shown=["cat"])
    assert answer == Answer(None, json.dumps({"answer": said}, separators=(",", ":")), True)


def test_other_controls_and_several_choices_are_no_class() -> None:
    other = [{"from_name": "why", "value": {"text": ["because"]}}]
    assert read_class(other, shown=["cat"]) == Answer(None, '{"choices":[]}', True)
    two = [{"from_name": "class", "value": {"choices": ["cat", "dog"]}}]
    assert read_class(two, shown=["cat"]) == Answer(None, '{"choices":["cat","dog"]}', True)


# -- pull: masks -------------------------------------------------------------------------------------------------------


@given(label_maps, sizes)
def test_the_models_masks_come_back_pixel_by_pixel_and_unchanged(labels: LabelMap, size: tuple[int, int]) -> None:
    width, height = size
    shapes = _shapes(labels)
    answer = read_masks(
        mask_results(shapes, width=width, height=height), CLASSES, width=width, height=height, shown=shapes
    )
    assert answer.label is None
    assert answer.changed is False
    assert np.array_equal(_labels(answer, CLASSES, width, height), resize_to_source(labels, width, height))


@given(label_maps, sizes)
def test_without_a_background_class_what_nobody_painted_is_not_labelled(
    labels: LabelMap, size: tuple[int, int]
) -> None:
    width, height = size
    shapes = [shape for shape in _shapes(labels) if shape.label != "background"]
    classes = CLASSES[1:]
    answer = read_masks(
        mask_results(shapes, width=width, height=height), classes, width=width, height=height, shown=shapes
    )
    assert answer.changed is False
    source = resize_to_source(labels, width, height)
    assert np.array_equal(_labels(answer, classes, width, height), np.where(source == 0, 255, source - 1))


@given(st.lists(st.tuples(st.sampled_from([*CLASSES[1:], UNSURE, NOT_LISTED]), arrays.arrays(np.bool_, (6, 8)))))
def test_strokes_count_in_their_order(strokes: list[tuple[str, np.ndarray]]) -> None:
    expected = np.zeros((6, 8), dtype=np.uint8)
    for label, mask in strokes:
        expected[mask] = CLASSES.index(label) if label in CLASSES else 255
    result = [_region(label, mask) for label, mask in strokes]
    answer = read_masks(result, CLASSES, width=8, height=6, shown=None)
    assert answer.changed is None
    assert np.array_equal(_labels(answer, CLASSES, 8, 6), expected)


def test_one_pixel_more_is_a_change() -> None:
    labels = np.zeros((6, 8), dtype=np.uint8)
    labels[2:4, 2:5] = 1
    shapes = _shapes(labels)
    stroke = np.zeros((6, 8), dtype=np.bool_)
    stroke[4, 2] = True
    result = [*mask_results(shapes, width=8, height=6), _region("cat", stroke)]
    answer = read_masks(result, CLASSES, width=8, height=6, shown=shapes)
    assert answer.changed is True
    assert np.array_equal(_labels(answer, CLASSES, 8, 6) == 1, (labels == 1) | stroke)
    assert read_masks(result[:1], CLASSES, width=8, height=6, shown=shapes).changed is False
    assert read_masks([], CLASSES, width=8, height=6, shown=shapes).changed is True


@pytest.mark.parametrize("said", [UNSURE, NOT_LISTED])
def test_a_remark_on_the_whole_image_leaves_no_pixel_labelled(said: str) -> None:
    remark = {"from_name": "remark", "to_name": "image", "type": "choices", "value": {"choices": [said]}}
    result = [_region("cat", np.ones((6, 8), dtype=np.bool_)), remark]
    answer = read_masks(result, CLASSES, width=8, height=6, shown=[])
    assert answer.changed is True
    assert json.loads(answer.value or "") == {"segments": [], "answer": said}
    assert (_labels(answer, CLASSES, 8, 6) == 255).all()


def test_a_class_that_the_task_no_longer_has_keeps_its_name() -> None:
    mask = np.eye(3, dtype=np.bool_)
    answer = read_masks([_region("horse", mask)], ["cat", "dog"], width=3, height=3, shown=None)
    assert json.loads(answer.value or "") == {"segments": [{"label": "horse", "rle": encode(mask)}]}


def test_a_region_of_another_size_is_refused() -> None:
    with pytest.raises(MaskError, match="3 x 3 pixels, but the image has 8 x 6"):
        read_masks([_region("cat", np.eye(3, dtype=np.bool_))], CLASSES, width=8, height=6, shown=None)


# -- annotations -------------------------------------------------------------------------------------------------------

DATA = {
    "id": 12,
    "completed_by": 3,
    "lead_time": 4.5,
    "created_at": "2026-01-02T03:04:05.000006Z",
    "updated_at": "2026-01-02T03:04:06Z",
    "was_cancelled": False,
    "result": [],
}


def test_an_annotation_is_read() -> None:
    found = read_annotation(DATA, {3: "ann@example.org"})
    assert (found.annotation_id, found.annotator, found.seconds, found.skipped) == (12, "ann@example.org", 4.5, False)
    assert found.created_at == datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert read_annotation(DATA, {}).annotator == "3"
    assert (
        read_annotation({**DATA, "completed_by": {"id": 3, "email": "b@example.org"}}, {}).annotator == "b@example.org"
    )
    assert read_annotation({**DATA, "completed_by": None, "lead_time": None, "result": None}, {}).seconds is None


@pytest.mark.parametrize("data", [{}, {**DATA, "updated_at": None}, {**DATA, "created_at": "yesterday"}])
def test_an_annotation_that_lacks_something_is_told(data: dict[str, object]) -> None:
    with pytest.raises(CallError, match="cannot be read"):
        read_annotation(data, {})
