"""The page: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from winnow.audit import CurvePoint, Drift
from winnow.masks import BACKGROUNDS
from winnow.palette import class_colours
from winnow_jobs.report import charts
from winnow_jobs.report.gather import Measured, ModelPoint, Report, TaskReport
from winnow_jobs.report.pictures import Thumbnail, classes_of

MAX_TABLE = 12
"""Classes of a confusion matrix whose numbers fit into a table; more are drawn as a map."""

MAX_SLICES = 12

MAX_CLASSES = 60
"""Rows of the table of classes."""


def render(report: Report, thumbnails: Mapping[tuple[str, str], Thumbnail], *, images: bool = True) -> str:
    """The page.

    Args:
        report: what it says.
        thumbnails: by task and image_id.
        images: show pictures.
    """
    environment = Environment(
        loader=PackageLoader("winnow_jobs.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        percent=charts.percent, count=_count, when=_when, short=_short, decimal=_decimal, hours=_hours, thin=_thin
    )
    template = environment.get_template("page.html")
    return template.render(
        report=report,
        thumbnails=thumbnails,
        images=images,
        charts=charts,
        colours=_colours(),
        legend=_legend,
        headline=_headline,
        calibration_says=_calibration_says,
        coverage_curves=_coverage_curves,
        drift_says=_drift_says,
        versions_say=_versions_say,
        sheet_says=_sheet_says,
        row_total=_row_total,
        MAX_TABLE=MAX_TABLE,
        MAX_CLASSES=MAX_CLASSES,
        MAX_SLICES=MAX_SLICES,
    )


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _when(value: datetime) -> str:
    return f"{value:%Y-%m-%d %H:%M} UTC"


def _short(image_id: str) -> str:
    """Enough of an id to find the image: ``WHERE image_id LIKE '…%'``."""
    return image_id[:10]


def _decimal(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _hours(value: float | None) -> str:
    if not value:
        return "–" if value is None else "none"
    return f"{60 * value:.0f} min" if value < 1 else f"{value:,.1f} h"


def _colours() -> dict[str, str]:
    """Colours of the charts, which people with any kind of colour vision tell apart."""
    names = ("orange", "sky", "green", "yellow", "blue", "vermilion", "purple")
    return {name: _css(colour) for name, colour in zip(names, class_colours(names), strict=True)}


def _css(colour: Any) -> str:
    red, green, blue = (int(value) for value in colour)
    return f"rgb({red} {green} {blue})"


def _legend(task: TaskReport) -> list[tuple[str, str]]:
    """Class and colour, as in the overlays."""
    classes = classes_of(task)
    shown = {label for each in (*task.least, *task.most) for label, _ in each.segments}
    return [
        (name, _css(colour))
        for name, colour in zip(classes, class_colours(classes), strict=True)
        if name in shown and name not in BACKGROUNDS
    ]


# ----------------------------------------------------------------------------------------------------------- sentences


def _headline(task: TaskReport) -> str:
    """The most important about a task, in a sentence."""
    if task.model is None:
        return f"{task.name}: no answers yet."
    look = next((look.statistics for look in task.looks if look.statistics is not None), None)
    last = next(
        (version for version in reversed(task.versions) if version.production and version.value is not None), None
    )
    if task.measured is not None:
        share, where = task.measured.accuracy, "labelled test images"
    elif look is not None:
        share, where = look.accuracy, "images of the blind audit"
    elif last is not None:
        on = f"{last.num_measured:,} images of the split {last.split}"
        return f"{task.name}: {last.name} has a {last.measure} of {last.value:.3f} on {on}."
    else:
        return f"{task.name}: {task.num_answered:,} images are answered; how well, no labels tell yet."
    return (
        f"{task.name}: {charts.percent(share.value)} of {share.num:,} {where} are answered right "
        f"(95% interval {charts.percent(share.low)} to {charts.percent(share.high)})."
    )


def _calibration_says(measured: Measured) -> str:
    mean = sum(each.confidence * each.right.num for each in measured.calibration) / measured.accuracy.num
    gap = mean - (measured.accuracy.value or 0.0)
    inside = measured.accuracy.low <= mean <= measured.accuracy.high
    side = (
        "about as sure as it is right"
        if inside
        else "surer than it is right"
        if gap > 0
        else "less sure than it is right"
    )
    return (
        f"On average over the test split the model is {side}: mean confidence {charts.percent(mean)}, right "
        f"{charts.percent(measured.accuracy.value)}. Expected calibration error {measured.ece:.3f}."
    )


def _versions_say(versions: Sequence[ModelPoint]) -> str:
    """First and last measured version."""
    said = [
        f"{each.name} learned from {each.num_labels:,} images: {each.measure} {each.value:.3f}"
        for each in (versions[0], versions[-1])
    ]
    return f"{said[0]}. {said[1]}."


def _coverage_curves(task: TaskReport) -> list[tuple[str, Sequence[CurvePoint], str]]:
    """Of the last look, and of the test split."""
    curves: list[tuple[str, Sequence[CurvePoint], str]] = []
    if task.looks and task.looks[0].statistics is not None:
        look, found = task.looks[0], task.looks[0].statistics
        curves.append((f"blind audit, look {look.number}: {found.accuracy.num:,} images", found.curve, "one"))
    if task.measured is not None:
        name = f"labelled images of the test split: {task.measured.accuracy.num:,}"
        curves.append((name, task.measured.curve, "two"))
    return curves


def _drift_says(drift: Drift | None) -> str:
    if drift is None:
        return "Drift: there is no earlier look to compare with."
    if not drift.new.num or not drift.before.num:
        return "Drift: no audit image was new since the look before."
    compared = (
        f"{charts.percent(drift.new.value)} of {drift.new.num:,} new audit images are answered right, "
        f"{charts.percent(drift.before.value)} of the {drift.before.num:,} before "
        f"(Fisher’s exact test, p = {drift.p_value:.2g})"
    )
    return f"Drift alarm: {compared}, more than chance explains." if drift.alarm else f"No drift is seen: {compared}."


def _sheet_says(task: TaskReport) -> str:
    few = task.num_answered <= 2 * len(task.least)
    which = "All that may be shown" if few else f"{len(task.least)} from each end of {task.num_answered:,} answers"
    return f"{which}; of equally certain ones those with the lowest image_id, which is a hash."


def _row_total(measured: Measured, said: str) -> int:
    return sum(num for (label, _), num in measured.cells.items() if label == said)


def _thin(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """At most about twenty points, the last among them."""
    step = max(1, len(points) // 20)
    return [point for number, point in enumerate(reversed(points)) if number % step == 0][::-1]
