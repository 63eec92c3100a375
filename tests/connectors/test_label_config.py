"""Labeling configurations: what is offered, and that adding a class never takes one away."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.config import Kind
from winnow.errors import CallError
from winnow_connectors.label_config import NOT_LISTED, UNSURE, add_classes, classes_of, instructions, label_config

KINDS: list[Kind] = ["classification", "segmentation"]
TAGS = {"classification": "Choice", "segmentation": "Label"}
names = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="$"), min_size=1, max_size=20).filter(
        lambda name: name not in (UNSURE, NOT_LISTED, "background", "__background__")
    ),
    min_size=1,
    max_size=40,
    unique=True,
)


def _entries(config: str, kind: Kind) -> list[ET.Element]:
    return list(ET.fromstring(config).iter(TAGS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@given(names)
def test_every_class_is_offered_once_and_so_are_unsure_and_not_listed(kind: Kind, classes: list[str]) -> None:
    config = label_config(kind, classes)
    assert classes_of(config, kind) == classes
    entries = _entries(config, kind)
    assert [entry.get("value") for entry in entries] == [*classes, UNSURE, NOT_LISTED]
    assert len({entry.get("background") for entry in entries}) == len(entries)


@pytest.mark.parametrize("kind", KINDS)
@given(names, names)
def test_classes_are_added_and_none_is_taken_away(kind: Kind, before: list[str], after: list[str]) -> None:
    old = label_config(kind, before)
    config, added = add_classes(old, kind, after)
    assert added == [name for name in after if name not in before]
    assert classes_of(config, kind) == [*before, *added]
    kept = [entry.attrib for entry in _entries(old, kind)]
    assert [entry.attrib for entry in _entries(config, kind) if entry.get("value") not in added] == kept
    entries = _entries(config, kind)
    assert len({entry.get("background") for entry in entries}) == len(entries)
    hotkeys = [element.get("hotkey") for element in ET.fromstring(config).iter() if element.get("hotkey")]
    assert len(set(hotkeys)) == len(hotkeys)
    assert [entry.get("value") for entry in entries][-2:] == [UNSURE, NOT_LISTED]
    assert add_classes(config, kind, after) == (config, [])


def test_what_people_changed_by_hand_stays() -> None:
    config = (
        '<View className="mine"><!-- ours --><Header value="Look &amp; see"/><Image name="image" value="$image"/>'
        '<Choices name="class" toName="image"><Choice value="cat" hotkey="9"/></Choices>'
        '<TextArea name="why" toName="image"/></View>'
    )
    changed, added = add_classes(config, "classification", ["dog", "cat"])
    assert added == ["dog"]
    root = ET.fromstring(changed)
    assert [element.tag for element in root] == ["Header", "Image", "Choices", "TextArea"]
    assert "<!-- ours -->" in changed
    assert root[0].get("value") == "Look & see"
    assert classes_of(changed, "classification") == ["cat", "dog"]


def test_the_background_gets_no_brush_but_is_a_class_of_images() -> None:
    classes = ["__background__", "cat"]
    assert classes_of(label_config("segmentation", classes), "segmentation") == ["cat"]
    assert classes_of(label_config("classification", classes), "classification") == classes


def test_many_classes_can_be_searched() -> None:
    assert "<Filter" not in label_config("classification", ["cat", "dog"])
    assert "<Filter" in label_config("classification", [f"class {n}" for n in range(1000)])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", UNSURE], "'unsure' has the name of an answer"),
        (["cat", NOT_LISTED], "'not listed' has the name of an answer"),
        (["cat", "$5"], r"'\$5' cannot be shown"),
        (["cat", " dog"], "' dog' cannot be shown"),
        (["a\nb", "cat"], "cannot be shown"),
        ([], "has no classes"),
    ],
)
def test_classes_that_cannot_be_offered_are_named(classes: list[str], message: str) -> None:
    with pytest.raises(CallError, match=message):
        label_config("classification", classes)


def test_people_are_not_asked_for_embeddings() -> None:
    with pytest.raises(CallError, match="not embedding"):
        label_config("embedding", ["cat", "dog"])


@pytest.mark.parametrize("config", ["<View/>", "<View", '<View><Choices name="other"/></View>'])
def test_a_configuration_without_our_control_is_refused(config: str) -> None:
    with pytest.raises(CallError, match="labeling configuration"):
        add_classes(config, "classification", ["cat", "dog"])


@pytest.mark.parametrize("kind", KINDS)
def test_instructions_name_the_classes_and_are_safe_html(kind: Kind) -> None:
    text = instructions("parts", kind, ["<script>", "cat"])
    assert "<script>" not in text
    assert "<b>cat</b>" in text
    assert UNSURE in text
    assert "no suggestion" in instructions("parts", kind, ["cat", "dog"], blind=True)
