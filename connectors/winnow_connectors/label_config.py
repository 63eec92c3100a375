"""What annotators see in Label Studio: the labeling configuration (XML) and the instructions of a task.

A classification task is answered with one choice, a segmentation task with a brush per class. Both can always be
answered with ``UNSURE`` and ``NOT_LISTED``, for the whole image or, with the brush, for some of its pixels. Classes
that stand for the background get no brush: it is what nobody painted.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from winnow.config import Kind
from winnow.errors import CallError
from winnow.masks import BACKGROUNDS, shown_names
from winnow.palette import NUM_COLOURS, class_colours

UNSURE = "unsure"
"""Answer of a person who cannot tell."""

NOT_LISTED = "not listed"
"""Answer of a person who sees something that is none of the classes."""

IMAGE = "image"
"""Name of the image tag, and of the field of a Label Studio task that holds the image's address."""

CLASS = "class"
"""Name of the choice of a class (classification)."""

SEGMENTS = "segments"
"""Name of the brushes (segmentation)."""

REMARK = "remark"
"""Name of the choice for the whole image beside the brushes (segmentation)."""

_TAGS = {"classification": ("Choices", CLASS, "Choice"), "segmentation": ("BrushLabels", SEGMENTS, "Label")}
_OTHER = {UNSURE: ("q", "#9e9e9e"), NOT_LISTED: ("n", "#616161")}
"""Hotkey and colour; no class's colour comes near these greys."""

_HOTKEYS = "1234567890asdfgcxztyijl"
"""Keys of the first classes; Label Studio itself uses b, e, h, k, m, o, p, r, u, v and w."""

_NUM_WITHOUT_FILTER = 12
"""More classes than this get a field to search in."""

_ILLEGAL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff$]")
"""What a name cannot hold: XML has no control characters, and Label Studio puts task data in place of $NAME."""


def label_config(kind: Kind, classes: Sequence[str], *, multiple: bool = False) -> str:
    """The labeling configuration of a new project, as XML.

    Args:
        kind: of the task.
        classes: of the task.
        multiple: several classes may be chosen (classification).

    Raises:
        CallError: people are not asked about this kind of task, or a class cannot be shown under its name.
    """
    names = _offered(kind, classes)
    tag, name, entry = _TAGS[kind]
    view = ET.Element("View")
    ET.SubElement(view, "Image", name=IMAGE, value=f"${IMAGE}", zoom="true", zoomControl="true")
    if len(names) > _NUM_WITHOUT_FILTER:
        ET.SubElement(
            view,
            "Filter",
            name="filter",
            toName=name,
            minlength="0",
            placeholder="search the classes",
            hotkey="shift+f",
        )
    control = ET.SubElement(view, tag, name=name, toName=IMAGE)
    if kind == "classification":
        control.attrib |= {"choice": "multiple" if multiple else "single", "layout": "inline", "required": "true"}
        control.attrib["requiredMessage"] = f"Choose a class, '{UNSURE}' or '{NOT_LISTED}'."
    colours = class_colours(names)
    for label, key, (red, green, blue) in zip_longest(names, _HOTKEYS[: len(names)], colours.tolist()):
        element = ET.SubElement(control, entry, value=label, background=f"#{red:02x}{green:02x}{blue:02x}")
        if key is not None:
            element.set("hotkey", key)
    for label, (key, colour) in _OTHER.items():
        element = ET.SubElement(control, entry, value=label, background=colour)
        if kind == "classification":
            element.set("hotkey", key)
    if kind == "segmentation":
        ET.SubElement(view, "Header", value="Or, of the whole image:", size="5")
        remark = ET.SubElement(view, "Choices", name=REMARK, toName=IMAGE, choice="single", layout="inline")
        for label, (key, _) in _OTHER.items():
            ET.SubElement(remark, "Choice", value=label, hotkey=key)
    return _write(view)


def classes_of(config: str, kind: Kind) -> list[str]:
    """The classes that a project offers, in its order.

    Raises:
        CallError: the configuration has no control of ours; somebody changed it by hand.
    """
    _, control, entry = _find_control(config, kind)
    return [name for name in _values(control, entry) if name not in _OTHER]


def add_classes(config: str, kind: Kind, classes: Sequence[str]) -> tuple[str, list[str]]:
    """A project's configuration with the classes that it lacks, and their names; all else stays as it is.

    Classes that the task no longer has stay too: annotations may use them. Changes made by hand stay.

    Args:
        config: XML of the project.
        kind: of the task.
        classes: of the task now.

    Raises:
        CallError: the configuration has no control of ours, or a class cannot be shown under its name.
    """
    root, control, entry = _find_control(config, kind)
    known = _values(control, entry)
    added = [name for name in _offered(kind, classes) if name not in known]
    if not added:
        return config, []
    taken = {str(element.get(name)).lower() for element in root.iter() for name in ("background", "hotkey")}
    palette = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in class_colours([str(n) for n in range(NUM_COLOURS)]).tolist()]
    colours = [colour for colour in palette if colour not in taken] or palette
    keys = [key for key in _HOTKEYS if key not in taken]
    place = min((known.index(name) for name in _OTHER if name in known), default=len(known))
    for number, label in enumerate(added):
        element = ET.Element(entry, value=label, background=colours[number % len(colours)])
        if number < len(keys):
            element.set("hotkey", keys[number])
        control.insert(place + number, element)
    return _write(root), added


def instructions(task: str, kind: Kind, classes: Sequence[str], *, blind: bool = False, multiple: bool = False) -> str:
    """What annotators are told about a task, as HTML.

    Args:
        task: its name.
        kind: of the task.
        classes: of the task.
        blind: nothing is drawn in: images that measure how good the model is.
        multiple: several classes may be chosen.
    """
    names = ", ".join(f"<b>{escape(name)}</b>" for name in _offered(kind, classes)[:50])
    more = ", …" if len(classes) > 50 else ""
    title = escape(task)
    shown = (
        "You see no suggestion here: your answer measures the model."
        if blind
        else "The model's answer is drawn in. Look at the image first; correct what is wrong, or submit it as it is."
    )
    if kind == "classification":
        return (
            f"<p><b>{title}</b>: choose {'every class' if multiple else 'the class'} of the image.</p>"
            f"<p>{names}{more}</p><p>{shown}</p>"
            f"<p>Choose <b>{UNSURE}</b> when you cannot tell, <b>{NOT_LISTED}</b> when none of the classes fits.</p>"
        )
    unpainted = "background" if any(name in BACKGROUNDS for name in classes) else "left out"
    return (
        f"<p><b>{title}</b>: paint each class with its brush; where two overlap, the later one counts.</p>"
        f"<p>{names}{more}</p><p>{shown}</p>"
        f"<p>Paint <b>{UNSURE}</b> over what you cannot tell, and <b>{NOT_LISTED}</b> over things of no class; "
        f"what nobody painted is {unpainted}. The same two answers exist for the whole image.</p>"
    )


# -------------------------------------------------------------------------------------------------------------- inside


def _offered(kind: Kind, classes: Sequence[str]) -> list[str]:
    """The classes that people can choose: all, but no brush for the background.

    Raises:
        CallError: see ``label_config``.
    """
    if kind not in _TAGS:
        raise CallError(f"people are asked about tasks of the kind {' or '.join(_TAGS)}, not {kind}")
    names = [name for name in classes if kind == "classification" or name not in BACKGROUNDS]
    kept = [name for name in names if name in _OTHER]
    if kept:
        raise CallError(
            f"class {kept[0]!r} has the name of an answer that people always have; rename it in winnow.toml, "
            f"because {UNSURE!r} and {NOT_LISTED!r} mean that there is no label"
        )
    wrong = [name for name in names if not name.strip() or name != name.strip() or _ILLEGAL.search(name)]
    if wrong:
        raise CallError(
            f"{shown_names(wrong)} cannot be shown in Label Studio; class names for review hold neither $ nor control "
            "characters, and no blanks at their ends"
        )
    if not names:
        raise CallError("the task has no classes to choose from; name them in winnow.toml (tasks.NAME.classes)")
    return names


def _find_control(config: str, kind: Kind) -> tuple[ET.Element, ET.Element, str]:
    """Root, the element that holds the classes, and the tag of a class."""
    tag, name, entry = _TAGS[kind]
    try:
        root = ET.fromstring(config, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    except ET.ParseError as error:
        raise CallError(f"the labeling configuration is no XML: {error}") from None
    control = next((element for element in root.iter(tag) if element.get("name") == name), None)
    if control is None:
        raise CallError(
            f'the project\'s labeling configuration has no <{tag} name="{name}">, so its answers cannot be told apart; '
            "put it back in the project's settings, or rename the project to get a new one"
        )
    return root, control, entry


def _values(control: ET.Element, entry: str) -> list[str]:
    return [str(element.get("value")) for element in control.iter(entry)]


def _write(root: ET.Element) -> str:
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")
